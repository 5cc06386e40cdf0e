"""The page docs/performance.md and its picture: ``python docs/performance.py`` writes them from the benchmarks' files.

Every number on the page comes from the JSON files in docs/performance; the page names the command that makes each.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from dvar.paper.style import COLOURS, NOISE, SOFT, STYLE

HERE = Path(__file__).parent
FOLDER = HERE / "performance"
LOOPS = {"plain": "a plain script", "dvar": "dvar"}
PARTS, PROBE = ("data", "encode", "text", "U-Net forward", "backward", "optimizer", "other"), "probe"
TEXT = """# How fast it is, and what the probe costs

Measured on two shared cores of a server without an accelerator, so the ratios count, not the milliseconds: both sides
take turns in one process. `make docs` writes this page from the files in `docs/performance/`; each was made by the
command above its table.

## A step, part by part

```
python benchmarks/step.py --threads 1 --output docs/performance/step.json
```

![Where the milliseconds of a step go]({picture})

{steps}

*A plain script* is `benchmarks/reference.py`: it does what public scripts do (opens and encodes its pictures at each
step, puts the whole embedding table into the optimizer and back, waits for the device to read the loss) and reads the
held batch after every step, as the paper does. Batch, precision, threads, captions and attention are the same on both
sides. *Ceiling* is what a step would gain if it were nothing but the networks: the plain script's step over its text
encoder, U-Net and backward pass alone. On a CPU there is no more to be had without other arithmetic;
a ratio above its ceiling is the noise of a shared machine.

## What a cheaper probe does to the stop

```
python benchmarks/cadence.py record --concepts pink_checked_house brown_boot
python benchmarks/cadence.py table --output docs/performance/cadence.json
```

DVAR at its preset on {runs} runs of the bundled model, each read at every step. *Kept* counts the runs whose stop is
at most 2 % earlier and at most max(2 %, one cadence) later than that of 8 held samples read at every step, or that go
to the cap by both; then the mean and the extremes of the difference in steps. A cadence moves the stop by little;
another batch is another curve, and stops elsewhere. Every 40 steps is not there: a window would hold too few readings.

{cadences}

## Time to a result

```
python benchmarks/time_to_quality.py --output docs/performance/quality.json
```

From the command to the saved result: start-up, encoding, training, samples, export. The CLIP score is that of 16
pictures on fresh seeds against the concept's own, by the bundled CLIP that conditions nothing. One concept, one thread,
and the other core had work of its own.

{quality}

## What was tried without gain

{tried}
"""
TRIED = """- Channels-last weights of the U-Net: 1.00 (forward) to 1.16 (forward and backward) times the time in
  float32, 1.05 to 1.24 in bfloat16 (one thread, one process).
- Plain matrix products for attention: 0.98 (forward and backward) to 1.03 of the fused kernel's time in float32; 0.82
  in bfloat16.
- `--mixed_precision bf16` on a CPU with native bfloat16: forward and backward of the U-Net in 0.76 to 0.93 of the
  time. It is left off: settings were frozen in float32.
- Compiling the bundled U-Net: a hundred seconds for 11 % (LOG.md)."""


def read(name: str) -> Any:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def steps_table(told: dict[str, Any]) -> str:
    methods = told["methods"].values()

    def line(name: str, say: Callable[[dict[str, Any]], str]) -> str:
        return row(name, *map(say, methods))

    lines = [row("ms a step", *told["methods"]), row("---", *["---:"] * len(methods))]
    for name, wording in LOOPS.items():
        for part in PARTS:
            lines.append(
                line(f"{wording}: {part}", lambda found, of=name, part=part: f"{found['parts'][of][part]:.1f}")
            )
        for what, key in (("a step", name), ("a probe", f"{name} probe")):
            lines.append(line(f"**{wording}: {what}**", lambda found, key=key: f"{found['whole'][key]:.1f}"))
    lines.append(line("**step, probe off**", lambda found: f"{found['ratios']['step']:.2f} x"))
    lines.append(line("its ceiling", lambda found: f"{ceiling(found):.2f} x"))
    lines.append(line("dvar's cadence", lambda found: f"{found['cadence']} steps"))
    lines.append(line("**whole loop**", lambda found: f"{found['ratios']['loop']:.2f} x"))
    lines.append(line("**probe, share of dvar's time**", lambda found: f"{found['ratios']['probe share']:.1%}"))
    return "\n".join(lines)


def ceiling(found: dict[str, Any]) -> float:
    plain = found["parts"]["plain"]
    return sum(plain.values()) / (plain["text"] + plain["U-Net forward"] + plain["backward"])


def steps_picture(told: dict[str, Any]) -> str:
    """One bar a loop and method: the parts of a step, and the probe's share of one at its cadence."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.5, 3.4), layout="constrained")
        axes = figure.subplots()
        bars: list[tuple[str, dict[str, float]]] = []
        for method, found in told["methods"].items():
            for name, wording in LOOPS.items():
                every = 1 if name == "plain" else found["cadence"]
                parts = dict(found["parts"][name]) | {PROBE: found["whole"][f"{name} probe"] / every}
                bars.append((f"{method}, {wording}", parts))
        left = [0.0] * len(bars)
        for index, part in enumerate((*PARTS, PROBE)):
            widths = [parts[part] for _, parts in bars]
            colour = NOISE if part == "other" else COLOURS[0] if part == PROBE else COLOURS[1 + index]
            axes.barh(range(len(bars)), widths, left=left, height=0.66, color=colour, label=part)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for place, total in enumerate(left):
            axes.annotate(f"{total:.0f}", (total, place), (4, 0), textcoords="offset points", va="center", color=SOFT)
        axes.set_yticks(range(len(bars)), [name for name, _ in bars])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("milliseconds a step, probe included")
        figure.legend(loc="outside lower center", ncols=8, handlelength=1, columnspacing=1)
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None})
    return written.getvalue()


def cadence_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        row("method", "batch", "every", "probe's share", "kept", "mean", "earliest", "latest"),
        row("---", "---", "---:", "---:", "---:", "---:", "---:", "---:"),
    ]
    for found in rows:
        off = [100 * value for value in found["off"]]
        spread = [f"{sum(off) / len(off):+.1f} %", f"{min(off):+.1f} %", f"{max(off):+.1f} %"] if off else ["–"] * 3
        kept = f"{found['within']} of {found['of']}"
        lines.append(
            row(found["method"], found["batch"], str(found["cadence"]), f"{found['share']:.1%}", kept, *spread)
        )
    return "\n".join(lines)


def quality_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        row("method", "way", "minutes", "steps", "CLIP score", "training, s", "probe, s"),
        row("---", "---", "---:", "---:", "---:", "---:", "---:"),
    ]
    for found in rows:
        seconds = found["seconds"]
        numbers = (f"{found['minutes']:.2f}", str(found["steps"]), f"{found['clip']:.3f}")
        lines.append(row(found["method"], found["way"], *numbers, f"{seconds['train']:.0f}", f"{seconds['probe']:.0f}"))
    return "\n".join(lines)


def pages() -> dict[Path, str]:
    """Each file's text, by its path."""
    told, cadences, quality = read("step"), read("cadence"), read("quality")
    page = TEXT.format(
        picture="performance/step.svg",
        steps=steps_table(told),
        runs=sum({found["method"]: found["of"] for found in cadences}.values()),
        cadences=cadence_table(cadences),
        quality=quality_table(quality),
        tried=TRIED,
    )
    return {HERE / "performance.md": page, FOLDER / "step.svg": steps_picture(told)}


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
