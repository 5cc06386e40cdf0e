"""The page docs/scale.md: ``python docs/scale.py`` writes it from measurements and the paper's minutes."""

# Every figure is computed here from docs/scale/batch.json, docs/performance/step.json or the paper's Table 1, or from
# the shapes of weights, and says which.

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dvar.config.methods import PAPER_METHODS
from dvar.paper.published import TABLE_1

HERE = Path(__file__).parent
PAGE = HERE / "scale.md"
MEASURED, STEPS = HERE / "scale" / "batch.json", HERE / "performance" / "step.json"
CONCEPTS_A_DAY = (10, 1_000, 100_000)

HIDDEN, CROSS_ATTENTIONS, TEXT_WIDTH = (320, 640, 1280), (5, 5, 6), 768
"""Widths of the U-Net of Stable Diffusion 1.5, cross-attention layers of each width, and the width of its text."""
RANK, FLOAT = 4, 4
"""Rank of the LoRA, and bytes of a number."""

TEXT = """# Many runs, many machines

<!-- written by docs/scale.py -->

`dvar batch` trains many concepts; `accelerate launch -m dvar train` trains one with several GPUs. Both leave ordinary
run folders, which are the only state: kill anything at any time, and the same command goes on.

## Many concepts: `dvar batch`

```bash
dvar batch concepts/                    # a folder of images for each concept, with NAME.json beside it: its noun
dvar batch jobs.toml --workers 2        # a table for each job, on two processes of this machine
dvar batch jobs.csv --ray auto          # the same on a Ray cluster: pip install 'dvar[ray]'
```

In a TOML file the settings before the first table are those of all jobs, and each table `[[job]]` has an `id` and what
differs; in a CSV file each setting is a column. Settings have the names of the flags of `dvar train`, and `method` is
one more. [`examples/cluster/jobs.toml`](../examples/cluster/jobs.toml) is a start. Whatever is wrong with any job is
refused before the first one, all at once: unknown columns, two jobs with one folder, an address that does not answer, a
node with another version or without the shared folder.

- **A worker loads the base model once** and gives each run a copy that shares its weights. A run is bit for bit the run
  of `dvar train` with the same settings.
- **A job that fails is tried again** from its last checkpoint, `--retries` times without getting further; the others go
  on. What would fail again in the same way, such as an image that cannot be read, is not repeated. A worker that is
  lost with its node is no failure of the job.
- **The same command does only what is missing.** A job is the same if its id, its settings and its images are; an id
  that is used for another job is refused.
- **What is left** of a run is what it exported, its samples and its trace; `--checkpoints last` or `all` leaves more.
  `summary.json` counts verdicts, steps saved and failures with their reasons; `events.jsonl` has a line for each event,
  and `--json` prints them.
- **`--output_dir s3://…`** or any other URL of fsspec works too: a run is fetched before it, and pushed at each
  checkpoint and at its end.

From Python, `dvar.batch` yields the same events:

```python
for event in dvar.batch(tables, output_dir="runs/today", workers=2):
    if event.kind == "done":
        print(event.job, event.facts["verdict"], event.facts["steps"])
```

`dvar record --ray auto` and `dvar reproduce --ray auto` record on a cluster in the same way.

### On a cluster

| to run on | start from |
|---|---|
| SLURM, an array job without Ray | [`examples/cluster/slurm_array.sh`](../examples/cluster/slurm_array.sh) |
| SLURM, a Ray cluster in a job | [`examples/cluster/slurm_ray.sh`](../examples/cluster/slurm_ray.sh) |
| clouds, with SkyPilot | [`examples/cluster/skypilot.yaml`](../examples/cluster/skypilot.yaml) |
| Kubernetes, with KubeRay | [`examples/cluster/kuberay.yaml`](../examples/cluster/kuberay.yaml) |

They use the command line alone. They have been parsed and their flags checked, and have not been run on such clusters.
Token authentication of Ray (`RAY_AUTH_MODE=token`) is for the environment to switch on; `dvar` passes it on. The
command must run on a node of the cluster (`ray job submit` does that).

## One run on several GPUs

```bash
accelerate launch --num_processes 4 -m dvar train dreambooth-lora --train_batch_size 4 …
torchrun --nproc_per_node 2 -m dvar train textual-inversion …                # the same; also on CPUs
```

The samples of a step are numbered, and what is drawn for a sample depends on its number alone. So 1, 2 or 4 processes
train on the same samples: losses are equal to the tolerance of a sum in another order, the run stops at the same step,
and it can be resumed on another number of processes. The batch is that of the whole run, so it must be divisible by
their number. One process measures, judges and writes; its verdict ends all of them. A process that dies or hangs ends
the others within a minute with a message. The whole model must fit on each GPU: it is not sharded (no FSDP).

## What it costs

### The engine

```
python benchmarks/batch.py --jobs {jobs} --steps {steps} --output docs/scale/batch.json
```

{engine}

Measured: {jobs} jobs of {steps} steps on the bundled model, on two cores that other work kept busy, so that a second
worker gains little and all seconds are long. *Beyond training* is what a job takes besides its training steps and
evaluations: reading and encoding its images, a sample image, the export, and for the first job of a worker the start of
its process and the base model. A process for each job would pay for the start each time.

### GPU hours and storage

Computed from the paper's Table 1: minutes of a run on Stable Diffusion 1.5 and one A100, to the cap (*Baseline*) and
with DVAR, probe included. On other GPUs, resolutions or batches they differ; the ratio hardly does. *GPUs* is how many
are busy all day.

{hours}

The paper evaluates the held batch at every step. The preset `lean` spends about a twentieth of the time on it, as
counts of forward passes have it; on the bundled model the probe took {probe} of a run (measured:
[performance](performance.md)).

Estimated storage: the bytes of the learned weights follow from their shapes, in float32, and a run exports them twice,
at its last step and at its best one (`keep = "best"` halves that); the rest of a run, its trace, samples and reference
images, is what a run of the bundled model left, {rest} (measured above). Images of 512 × 512 pixels are some 50 times
as large as its 64 × 64 (an estimate), which makes {images} MB of a run.

{storage}

A checkpoint has the weights four times: now, at the best step so far, and as the two moments of AdamW. A run has one at
a time on its disk, and none at its end.
"""

IMAGES_FACTOR = 50
"""How much larger an image of 512 x 512 pixels is than one of 64 x 64 as PNG: an estimate, 64 by their areas."""


def format_table(header: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown, with its first column to the left."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def minutes_of(method: str, strategy: str) -> float:
    """Return the mean minutes of a strategy in the paper's Table 1."""
    row = next(row for row in TABLE_1[method] if row.strategy == strategy)
    return float(row.minutes.split()[0])


def weight_bytes(method: str) -> int:
    """Return the bytes of what a method learns on Stable Diffusion 1.5, a word included."""
    word = TEXT_WIDTH * FLOAT
    widths = [width for width, count in zip(HIDDEN, CROSS_ATTENTIONS, strict=True) for _ in range(count)]
    if method == "textual-inversion":
        return word
    if method == "custom-diffusion":
        return word + sum(2 * width * TEXT_WIDTH * FLOAT for width in widths)
    # Self-attention has four matrices of width x width; cross-attention two, and two from the width of the text.
    of_layer = [RANK * (4 * 2 * width + 2 * 2 * width + 2 * (width + TEXT_WIDTH)) for width in widths]
    return word + sum(of_layer) * FLOAT


def format_engine(measured: Mapping[str, Any]) -> str:
    """Return the table of jobs an hour."""
    header = ["engine", "workers", "jobs an hour", "beyond training, first job, s", "further jobs, s"]
    rows = [
        [
            row["engine"],
            str(row["workers"]),
            f"{row['jobs_an_hour']:.0f}",
            f"{row['first_job']:.1f}",
            f"{row['further_jobs']:.1f}",
        ]
        for row in measured["rows"]
    ]
    return format_table(header, rows)


def format_hours() -> str:
    """Return the table of GPU hours a day."""
    header = ["method", "concepts a day", "GPU hours to the cap", "with stopping", "GPUs to the cap", "with stopping"]
    rows = []
    for method, config_type in PAPER_METHODS.items():
        for count in CONCEPTS_A_DAY:
            hours = [count * minutes_of(method, strategy) / 60 for strategy in ("Baseline", "DVAR")]
            busy = [f"{hour / 24:,.1f}" for hour in hours]
            rows.append([config_type.title, f"{count:,}", *(f"{hour:,.1f}" for hour in hours), *busy])
    return format_table(header, rows)


def format_storage(rest: float) -> str:
    """Return the table of storage a day, for runs that leave so many bytes beside their weights."""
    header = ["method", "weights, MB", *(f"{count:,} concepts a day" for count in CONCEPTS_A_DAY)]
    rows = []
    for method, config_type in PAPER_METHODS.items():
        weights = weight_bytes(method)
        sizes = [count * (2 * weights + rest) / 1e9 for count in CONCEPTS_A_DAY]
        rows.append([config_type.title, f"{weights / 1e6:.3f}", *(f"{size:,.2f} GB" for size in sizes)])
    return format_table(header, rows)


def page() -> str:
    """Return the whole page."""
    measured = json.loads(MEASURED.read_text(encoding="utf-8"))
    shares = [row["ratios"]["probe share"] for row in json.loads(STEPS.read_text(encoding="utf-8"))["methods"].values()]
    rest = float(measured["rows"][0]["run_bytes"])
    return TEXT.format(
        jobs=measured["rows"][0]["jobs"],
        steps=measured["steps"],
        engine=format_engine(measured),
        hours=format_hours(),
        probe=f"{100 * min(shares):.0f} to {100 * max(shares):.0f} %",
        rest=f"{rest / 1e3:.0f} kB",
        images=f"{rest * IMAGES_FACTOR / 1e6:.0f}",
        storage=format_storage(rest * IMAGES_FACTOR),
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8", newline="\n")
