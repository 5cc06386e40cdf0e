"""The page docs/guides/run-many.md: ``python docs/build/scale.py`` writes it from measurements."""

# Every figure is computed here from docs/scale/batch.json and pack.json, docs/performance/step.json or the paper's
# Table 1, or from the shapes of weights, and says which.

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dvar.config.methods import PAPER_METHODS
from dvar.paper.published import TABLE_1

DOCS = Path(__file__).parents[1]
PAGE = DOCS / "guides" / "run-many.md"
MEASURED, STEPS = DOCS / "scale" / "batch.json", DOCS / "performance" / "step.json"
PACKS = DOCS / "scale" / "pack.json"
CONCEPTS_A_DAY = (10, 1_000, 100_000)

HIDDEN, CROSS_ATTENTIONS, TEXT_WIDTH = (320, 640, 1280), (5, 5, 6), 768
"""Widths of the U-Net of Stable Diffusion 1.5, cross-attention layers of each width, and the width of its text."""
RANK, FLOAT = 4, 4
"""Rank of the LoRA, and bytes of a number."""

TEXT = """# Many runs, many machines

<!-- written by docs/build/scale.py -->

`dvar batch` trains many concepts; `accelerate launch -m dvar train` trains one with several GPUs. Both leave ordinary
run folders, which are the only state: kill anything at any time, and the same command goes on. On Windows an
interrupted batch ends its workers at once, without a save: they go on from their last checkpoints.

## Many concepts: `dvar batch`

```bash
dvar batch concepts/                    # a folder of images for each concept, with NAME.json beside it: its noun
dvar batch jobs.toml --workers 2        # a table for each job, on two processes of this machine
dvar batch jobs.csv --ray auto          # the same on a Ray cluster, with the extra ray
dvar batch jobs.toml --pack 4           # four concepts in each forward pass of a worker
```

In a TOML file the settings before the first table are those of all jobs, and each table `[[job]]` has an `id` and what
differs; in a CSV file each setting is a column. Settings have the names of the flags of `dvar train`, and `method` is
one more. [`examples/cluster/jobs.toml`](../reference/examples.md#jobs-toml) is a start. What is
wrong with the settings of any job, by themselves, is refused before the first one, all at once, and so are unknown
columns, folders that are missing or shared by two jobs, an id that was used for another job, an address that does not
answer, and a node with another version or without a folder that it must see. What needs the base model or the images
themselves is checked by the worker where the job begins: the packages, that images and captions can be read, the tokens
and the hub. A job that fails there ends with its reasons, and the others go on.

- **A worker loads the base model once** and gives each run a copy that shares its weights. A run is bit for bit the run
  of `dvar train` with the same settings.
- **A job that fails is tried again** from its last checkpoint, `--retries` times without getting further; the others go
  on. What would fail again in the same way, such as an image that cannot be read, is not repeated. A worker that is
  lost with its node is no failure of the job.
- **The same command does only what is missing.** A job is the same if its id, its settings and its images are; an id
  that is used for another job is refused.
- **What is left** of a run is what it exported, its samples and its trace; `--checkpoints last` or `all` leaves more.
  `summary.json` counts verdicts, steps saved and failures with their reasons; `events.jsonl` has a line for each event,
  and `--json` prints them. Behind a URL neither file is written; the command prints the summary.
- **`--output_dir s3://…`** or any other URL of fsspec works too: a run is fetched before it, and pushed at each
  checkpoint and at its end. Where two workers write one run, the last to begin goes on, and the other ends with a line.

From Python, `dvar.batch` yields the same events:

```python
for event in dvar.batch(tables, output_dir="runs/today", workers=2):
    if event.kind == "done":
        print(event.job, event.facts["verdict"], event.facts["steps"])
```

`dvar record --ray auto` and `dvar reproduce --ray auto` record on a cluster in the same way.

### Many concepts in one forward pass

With `--pack N` each worker trains N jobs at once, on this machine and on Ray, and so does `dvar.batch(…, pack=N)`. The
base model is frozen and what learns is small, so the samples of all N runs go through the denoising network together:
each sample has its own run's word (Textual Inversion) and its own run's pair of matrices (LoRA, two batched products a
layer). Held batches share passes too. Each run has its own draws, step, probe, rule, optimizer, checkpoints and
folder; when *its* rule stops it, its place is given to the next job.

- **A run in a pack is the run alone, but for rounding.** It draws the same samples, and a larger batch adds numbers up
  in another order. The tests, on tiny random models, admit 2e-6 of a loss, 1e-4 of a gradient's norm (4e-5 was
  measured) and 2e-4 of a weight, and ask for the same stop and the same files; on the bundled model see the table. A
  pack of one is bit for bit the run alone for Textual Inversion. AdamW's first step is as long for a gradient that is
  zero but for rounding as for any other, so where many are, runs drift apart further, as they do between two machines.
- **A run that breaks ends by itself**: a loss that is not finite, an image that cannot be read, a disk. What the others
  compute in the passes that it still shared is bit for bit what it would have been beside a sound one; afterwards the
  passes have fewer samples. A process that dies, or memory that runs out in a shared pass, costs every run of the pack
  an attempt, from its last checkpoint.
- **It leaves an ordinary run folder**, which resumes alone or in any pack; all runs of a pack that are interrupted at
  once and resume together give the same bits as without the interruption.
- **What can share a pass.** Textual Inversion and DreamBooth-LoRA, also in one pack, with any rank, targets, word,
  prior, batch, optimizer, rate and number of images; images of another size have passes of their own. The runs of a
  pack have one base model and precision: a job of another one waits until the pack has ended, and jobs are begun in an
  order that makes this rare. Refused by name are `custom-diffusion` and `use_dora`, which train the network's own
  weights, and `compile`, `quantize` and `offload`, under which a base model is not copied: train them without `--pack`.
- **What it does not share**: text encoders, which are small, read each run's captions apart; sample images, class
  images and exports are made by one run while the others wait. The seconds in a trace are those of the clock, which all
  runs of the pack share. Output of all jobs of a worker is in one log, `logs/worker-1.log`.

Tested on CPUs, in float32, on random models of Stable Diffusion, SDXL, Stable Diffusion 3, FLUX and Latent Diffusion;
not on GPUs, nor in half precision.

```bash
python benchmarks/pack.py --workers 1 --output docs/scale/pack.json
```

{pack}

Measured: {pack_steps} updates of each run on the bundled model, {pack_processes}, on a machine of two cores that
trainings beside it kept busy, so that the clock says little. Concepts an hour are therefore computed from processor
time: {concept_steps} updates of a concept and half as many probes, on {pack_cores}; starting up, samples and exports
come on top. The first row of each method is a process for each run, without a pack; *ratio* is against it. A second
core trains as many concepts again, in a process of its own with as much memory, either way. *Memory* is that of the
process at its peak, *a concept* the share of each run in training. *Difference* is the largest of L_det between one run
in the pack and alone, relative to its value.

On a CPU that two images keep busy already, a pack saves the small operations of a small network and little more: the
gain ends at about four runs. What it saves everywhere is memory: a further run costs 7 to 8 % of a
process. On a GPU, which two images of a small model do not fill, more is to be expected; that has not been measured.

### On a cluster

| to run on | start from |
|---|---|
| SLURM, an array job without Ray | [`examples/cluster/slurm_array.sh`](../reference/examples.md#slurm-array) |
| SLURM, a Ray cluster in a job | [`examples/cluster/slurm_ray.sh`](../reference/examples.md#slurm-ray) |
| clouds, with SkyPilot | [`examples/cluster/skypilot.yaml`](../reference/examples.md#skypilot) |
| Kubernetes, with KubeRay | [`examples/cluster/kuberay.yaml`](../reference/examples.md#kuberay) |

They use the command line alone. They have been parsed and their flags checked, and have not been run on such clusters.
Token authentication of Ray (`RAY_AUTH_MODE=token`) is for the environment to switch on; `dvar` passes it on. The
command must run on a node of the cluster. `ray job submit` does that, and so does KubeRay; both need the job server
of `pip install 'ray[default]'` on the head, which the extra `ray` of `dvar` does not install.

What was run is a Ray cluster of two workers on one machine: 48 bundled concepts, 24 steps of Textual Inversion each.
One job and one worker were ended by SIGKILL on the way. Every job was done once, and all 48 traces and weights are bit
for bit those of the same command without `--ray`.

## One run on several GPUs

```bash
accelerate launch --num_processes 4 -m dvar train dreambooth-lora --train_batch_size 4 …
torchrun --nproc_per_node 2 -m dvar train textual-inversion …                # the same; also on CPUs,
                                                            # where accelerate launch starts one process
```

The samples of a step are numbered, and what is drawn for a sample depends on its number alone (dropout does not: a word
of Latent Diffusion is refused in several processes). So 1, 2 or 4 processes train on the same samples: losses are equal
to the tolerance of a sum in another order, the run stops at the same step, and it can be resumed on another number of
processes. The batch is that of the whole run, so it must be divisible by their number. One process measures, judges and
writes; its verdict ends all of them. A process that dies or is frozen ends the others within a minute with a message.
The whole model must fit on each GPU; where it does not, shard it.

### A base model that does not fit one GPU

```bash
accelerate launch --use_fsdp --fsdp_version 2 --num_processes 4 -m dvar train dreambooth-lora \\
  --mixed_precision bf16 --train_batch_size 4 …
```

With FSDP each process holds its part of the frozen weights of the denoising network and of the text encoders that learn
no word (T5, language models). A block is gathered when a forward or a backward pass comes to it, and freed again after
it. So all processes make every pass together, also those of the held batch, of sample images and of class images; all
else is as above. What trains is small and whole on each process, and so are CLIPs and the autoencoder. Checkpoints,
exports and `report.html` are therefore the same files, and a run can be resumed with FSDP or without it.

- **A GPU holds** the frozen weights divided by the number of processes, the blocks at work, what is whole, and the
  activations of its own samples. `--gradient_checkpointing` lowers these.
- **The CPU's memory** must hold the whole base model once for each process of a machine while it is loaded.
- **Blocks** are those that diffusers and transformers name for their networks. Of the launcher's settings for FSDP,
  `--fsdp_reshard_after_forward` has its effect; those that say what to wrap or how to save a state have none.
- **Refused by name**, all at once and before weights are read: `--quantize`, `--compile` and `--offload` of `dvar`,
  version 1 of FSDP, `--fsdp_offload_params`, `--fsdp_activation_checkpointing`, and DeepSpeed and Megatron-LM instead.
  `dvar batch`, with its `--pack`, is started without a launcher.
- **A signal** to stop waits for the sample images that have been begun.

`dvar generate` loads the whole model in one process; `--offload` and `--quantize nf4` help there.

Tested on CPUs with two gloo processes, on tiny random models: losses and weights for each method, verdict, files and
images, resuming on one process, and a process that is lost. Losses, gradients and images of each family were compared
once, in float32 and bfloat16. Of the bundled model's U-Net, 44.4 MB with a LoRA, each of two processes held 22.3 MB,
before and after a pass. A test for two GPUs is written and has not run yet.

## What it costs

### The engine

```bash
python benchmarks/batch.py --jobs {jobs} --steps {steps} --output docs/scale/batch.json
```

{engine}

Measured: {jobs} jobs of {steps} steps on the bundled model, on a quiet machine of two cores. *Beyond training* is what
a job takes besides its training steps and evaluations: reading and encoding its images, a sample image, the export, and
for the first job of a worker the start of its process and the base model. A process for each job would pay for the
start each time.

### GPU hours and storage

Computed from the paper's Table 1: minutes of a run on Stable Diffusion 1.5 and one A100, to the cap (*Baseline*) and
with DVAR, probe included. On other GPUs, resolutions or batches they differ; the ratio hardly does. *GPUs* is how many
are busy all day.

{hours}

The paper evaluates the held batch at every step. The preset `lean` spends 3 to 4 % of the work on it, by count of
forward and backward passes; on the model that was bundled until 2026-11-28 the probe took {probe} of a run (measured:
[performance](../performance.md)).

Estimated storage: the bytes of the learned weights follow from their shapes, in float32, and a run exports them twice,
at its last step and at its best one (`keep = "best"` halves that); the rest of a run, its trace, samples and reference
images, is what a run of the bundled model left, {rest} (in docs/scale/batch.json). Images of 512 × 512 pixels are some
50 times as large as its 64 × 64 (an estimate), which makes {images} MB a run.

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


def format_packs(measured: Mapping[str, Any]) -> str:
    """Return the table of concepts an hour over the size of a pack."""
    header = ["method", "N", "concepts an hour", "ratio", "memory, MB", "a concept, MB", "difference"]
    rows = [
        [
            PAPER_METHODS[row["method"]].title,
            str(row["pack"]),
            f"{row['an_hour']:.0f}",
            f"{row['ratio']:.2f}",
            f"{row['memory'] / 1e6:,.0f}",
            f"{row['memory'] / row['pack'] / measured['workers'] / 1e6:,.0f}",
            f"{row['difference']:.0e}" if row["pack"] > 1 else "",
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
    rest, packs = float(measured["rows"][0]["run_bytes"]), json.loads(PACKS.read_text(encoding="utf-8"))
    return TEXT.format(
        pack=format_packs(packs),
        pack_steps=packs["steps"],
        pack_processes="one process on one thread"
        if packs["workers"] == 1
        else f"{packs['workers']} processes at once",
        pack_cores="one dedicated core" if packs["workers"] == 1 else f"{packs['workers']} dedicated cores",
        concept_steps=packs["concept_steps"],
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
