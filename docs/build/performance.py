"""The page docs/performance.md and its figure: ``python docs/build/performance.py`` writes them from measurements."""

# Every number on the page comes from the JSON files in docs/performance; the page names the command that writes each.

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

import matplotlib
from matplotlib.figure import Figure

from dvar.html.tables import Column, cells
from dvar.paper.style import COLOURS, NOISE, SOFT, STYLE

T = TypeVar("T")

DOCS = Path(__file__).parents[1]
FOLDER = DOCS / "performance"
LOOPS = {"plain": "a plain script", "dvar": "dvar"}
GOAL = 1.3  # times the speed of diffusers' scripts
PARTS, PROBE = ("data", "encode", "text", "U-Net forward", "backward", "optimizer", "other"), "probe"
TEXT = """# How fast it is, and what the probe costs

Measured on two shared cores of a server without an accelerator. Read the ratios, not the milliseconds: both sides of a
comparison take turns in one process. `make docs` writes this page from the files in `docs/performance/`; each was
written by the command above its table. The tables of a step, of a cheaper probe and of the time to a result were
measured on 2026-11-21, with the code and the bundled model of that day.

## A step, part by part

```bash
python benchmarks/step.py --threads 1 --output docs/performance/step.json
```

![Where the milliseconds of a step go]({figure})

{steps}

*A plain script* is `benchmarks/reference.py`. It does what public scripts do: it opens and encodes its images at each
step, optimizes the whole embedding table and restores the rest of it, and waits for the device to read the loss. It
evaluates the held batch after every step, as the paper does. Batch, precision, threads, captions and attention are the
same on both sides. *Its ceiling* is the speed-up of a step that consists of the networks only: the plain script's step
over its text encoder, U-Net and backward pass. On a CPU nothing more can be gained without other arithmetic; a ratio
above its ceiling is noise of the shared machine.

## Beside diffusers' own scripts

```bash
python benchmarks/against_diffusers.py CHECKOUT --output docs/performance/against_diffusers.json
```

Whole programs on the bundled model, with the same batch, images and optimizer, in one thread: the scripts of a checkout
of diffusers, with diffusers {version}, and `dvar train` with a probe of 8 held samples at every 12th step. *A step* is
the slope of processor time between two lengths, and *beside the steps* is the rest: imports, loading, saving. Neither
draws images, except that `dvar` draws two of a single sampling step. The cores did other work too.

{against}

{verdict}

## What a cheaper probe does to the stop

```bash
python benchmarks/cadence.py record --concepts pink_checked_house brown_boot
python benchmarks/cadence.py table --output docs/performance/cadence.json
```

DVAR with its preset on {runs} runs of the bundled model, each recorded at every step. The reference is the stop with 8
held samples, evaluated at every step. *Same stop* counts the runs that stop at most 2 % before the reference and at
most max(2 %, one cadence) after it, and those that reach the cap in both cases. The other columns are the mean and the
extremes of the difference, in percent of the reference. A sparser cadence moves the stop little; a different batch has
a different curve, and stops elsewhere. A cadence of 40 steps is missing, since a window would hold too few evaluations.

{cadences}

## Time to a result

```bash
python benchmarks/time_to_quality.py --output docs/performance/quality.json
```

From the command to the saved result: start-up, encoding, training, sample images, export. The CLIP score compares 16
images on fresh seeds with those of the concept, by the bundled CLIP that conditions nothing. One concept, one thread;
the other core was busy.

{quality}

## Beside other programs

```bash
python benchmarks/busy_cores.py --rounds 1 --updates 12 --output docs/performance/busy_cores.json
```

Updates a second, alone and beside programs that never give up a core, in one round on two cores. OpenMP's threads wait
for one another many times in an update, by default for milliseconds without giving up their core. `dvar` sets
`GOMP_SPINCOUNT=20000`, so that they give it up soon, unless the environment has that variable or `OMP_WAIT_POLICY`. A
program of yours that imports `dvar` sets it itself, before PyTorch is imported. The number of threads stays PyTorch's,
one for each core. Where another program takes a core for good, fewer are faster: set `OMP_NUM_THREADS`.

{busy}

## What was tried and did not help

{tried}
"""
TRIED = """\
- Channels-last weights of the U-Net take 1.00 (forward) to 1.16 (forward and backward) times as long in float32, and
  1.05 to 1.24 times in bfloat16 (one thread, one process).
- Plain matrix products for attention take 0.98 (forward and backward) to 1.03 times as long as the fused kernel in
  float32, and 0.82 times in bfloat16.
- `--mixed_precision bf16` on a CPU with native bfloat16: forward and backward pass of the U-Net take 0.76 to 0.93 times
  as long. It is off by default, because settings were tuned in float32.
- Compiling the bundled U-Net costs a hundred seconds and makes it 11 % faster (LOG.md)."""


def read_benchmark(name: str) -> Any:
    """Return the content of a benchmark's file."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def format_table(columns: Sequence[Column[T]], rows: Sequence[T], *, left_columns: int) -> str:
    """Return a table in Markdown, with the first ``left_columns`` columns aligned to the left."""
    head = [column.title for column in columns]
    rule = ["---" if place < left_columns else "---:" for place in range(len(columns))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *cells(columns, rows)))


Measurements = Mapping[str, Any]
"""What benchmarks/step.py measured of one method."""
StepLine = tuple[str, Callable[[Measurements], str]]
"""One line of the table of a step: its label, and its text for a method."""


def ceiling(method: Measurements) -> float:
    """Return the speed-up of a step that consists of the networks only."""
    plain = method["parts"]["plain"]
    return float(sum(plain.values()) / (plain["text"] + plain["U-Net forward"] + plain["backward"]))


def step_lines() -> list[StepLine]:
    """Return the lines of the table of a step."""

    def part_line(loop: str, part: str) -> StepLine:
        return f"{LOOPS[loop]}: {part}", lambda method: f"{method['parts'][loop][part]:.1f}"

    def whole_line(label: str, key: str) -> StepLine:
        return f"**{label}**", lambda method: f"{method['whole'][key]:.1f}"

    lines: list[StepLine] = []
    for loop, title in LOOPS.items():
        lines += [part_line(loop, part) for part in PARTS]
        lines += [whole_line(f"{title}: a step", loop), whole_line(f"{title}: a probe", f"{loop} probe")]
    return [
        *lines,
        ("**step, probe off**", lambda method: f"{method['ratios']['step']:.2f} x"),
        ("its ceiling", lambda method: f"{ceiling(method):.2f} x"),
        ("dvar's cadence", lambda method: f"{method['cadence']} steps"),
        ("**whole loop**", lambda method: f"{method['ratios']['loop']:.2f} x"),
        ("**probe, share of dvar's time**", lambda method: f"{method['ratios']['probe share']:.1%}"),
    ]


def format_steps(methods: Mapping[str, Measurements]) -> str:
    """Return the table of a step, with a column for each method."""

    def method_column(name: str) -> Column[StepLine]:
        return Column(name, lambda line: line[1](methods[name]))

    columns = [Column[StepLine]("ms a step", lambda line: line[0]), *map(method_column, methods)]
    return format_table(columns, step_lines(), left_columns=1)


def plot_steps(methods: Mapping[str, Measurements]) -> str:
    """Return an SVG with a bar for each loop and method: the parts of a step, and the probe's share of it."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.5, 3.4), layout="constrained")
        axes = figure.subplots()
        bars: list[tuple[str, dict[str, float]]] = []
        for name, method in methods.items():
            for loop, title in LOOPS.items():
                cadence = 1 if loop == "plain" else method["cadence"]
                parts = dict(method["parts"][loop]) | {PROBE: method["whole"][f"{loop} probe"] / cadence}
                bars.append((f"{name}, {title}", parts))
        offsets = [0.0] * len(bars)
        for index, part in enumerate((*PARTS, PROBE)):
            widths = [parts[part] for _, parts in bars]
            colour = NOISE if part == "other" else COLOURS[0] if part == PROBE else COLOURS[1 + index]
            axes.barh(range(len(bars)), widths, left=offsets, height=0.66, color=colour, label=part)
            offsets = [a + b for a, b in zip(offsets, widths, strict=True)]
        for place, total in enumerate(offsets):
            axes.annotate(f"{total:.0f}", (total, place), (4, 0), textcoords="offset points", va="center", color=SOFT)
        axes.set_yticks(range(len(bars)), [name for name, _ in bars])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("milliseconds a step, probe included")
        figure.legend(loc="outside lower center", ncols=8, handlelength=1, columnspacing=1)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _format_difference(statistic: Callable[[Sequence[float]], float]) -> Callable[[Sequence[float]], str]:
    """Return a function that writes a statistic of differences; a dash where there are none."""
    return lambda differences: f"{100 * statistic(differences):+.1f} %" if differences else "–"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


Row = Mapping[str, Any]
CADENCE_COLUMNS = (
    Column[Row]("method", itemgetter("method")),
    Column[Row]("batch", itemgetter("batch")),
    Column[Row]("every", itemgetter("cadence")),
    Column[Row]("probe's share", itemgetter("share"), "{:.1%}".format),
    Column[Row]("same stop", lambda row: f"{row['within']} of {row['of']}"),
    Column[Row]("mean", itemgetter("off"), _format_difference(_mean)),
    Column[Row]("earliest", itemgetter("off"), _format_difference(min)),
    Column[Row]("latest", itemgetter("off"), _format_difference(max)),
)
QUALITY_COLUMNS = (
    Column[Row]("method", itemgetter("method")),
    Column[Row]("training ends", itemgetter("way")),
    Column[Row]("minutes", itemgetter("minutes"), "{:.2f}".format),
    Column[Row]("steps", itemgetter("steps")),
    Column[Row]("CLIP score", itemgetter("clip"), "{:.3f}".format),
    Column[Row]("training, s", lambda row: row["seconds"]["train"], "{:.0f}".format),
    Column[Row]("probe, s", lambda row: row["seconds"]["probe"], "{:.0f}".format),
)
AGAINST_COLUMNS = (
    Column[Row]("method", itemgetter("method")),
    Column[Row]("program", itemgetter("program")),
    Column[Row]("ms a step", lambda row: 1000 * row["step"], "{:.0f}".format),
    Column[Row]("speed", itemgetter("speed"), "{:.2f} x".format),
    Column[Row]("beside the steps", lambda row: row.get("beside"), "{:.1f} s".format),
)
BUSY_COLUMNS = (
    Column[Row]("threads", itemgetter("threads")),
    *(Column[Row](load, itemgetter(load), "{:.2f}".format) for load in ("quiet", "one core taken", "all cores taken")),
)


def judge_speed(rows: Sequence[Row]) -> str:
    """Return the sentence that says which methods take their steps 1.3 times as fast, with the probe."""
    reached = [row["method"] for row in rows if row["program"] == "dvar" and row["speed"] >= GOAL]
    missed = [row["method"] for row in rows if row["program"] == "dvar" and row["speed"] < GOAL]
    parts = [f"{', '.join(names)} {verb}" for names, verb in ((reached, "reached"), (missed, "missed")) if names]
    return f"The goal, {GOAL} times their speed with the probe on: {'; '.join(parts)}."


def pages() -> dict[Path, str]:
    """Return the text of each file, by its path."""
    methods, cadences, quality = read_benchmark("step")["methods"], read_benchmark("cadence"), read_benchmark("quality")
    against = read_benchmark("against_diffusers")
    page = TEXT.format(
        figure="performance/step.svg",
        steps=format_steps(methods),
        version=against["diffusers"],
        verdict=judge_speed(against["rows"]),
        against=format_table(AGAINST_COLUMNS, against["rows"], left_columns=2),
        runs=sum({row["method"]: row["of"] for row in cadences}.values()),
        cadences=format_table(CADENCE_COLUMNS, cadences, left_columns=2),
        quality=format_table(QUALITY_COLUMNS, quality, left_columns=2),
        busy=format_table(BUSY_COLUMNS, read_benchmark("busy_cores"), left_columns=1),
        tried=TRIED,
    )
    return {DOCS / "performance.md": page, FOLDER / "step.svg": plot_steps(methods)}


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
