"""Write docs/memory.md from the figures that benchmarks/memory.py measures: ``python docs/build/memory.py``."""

# ruff: noqa: E501 (the prose of the page wraps as its other pages do, and a table does not)

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1]
GIB, BILLION = 2**30, 1e9
NF4, INT8, HALF, FULL, ADAMW = 0.516, 1.0, 2.0, 4.0, 12.0
"""Bytes of a weight: in 4 bits with the scales of its block, in 8, 16 and 32 bits; learned, with AdamW's two moments."""
BESIDES = 1.0
"""GiB for the runtime of the GPU and the half of the autoencoder that draws samples; assumed, not measured."""
CARDS = (8, 12, 16, 24, 32, 48, 80)


def train_gib(row: dict[str, Any], in_block: float) -> float:
    """Return the GiB of a step whose frozen weights in blocks take ``in_block`` bytes each."""
    frozen = row["in_blocks"] * in_block + (row["weights"] - row["in_blocks"]) * HALF
    return float((frozen + row["learned"] * ADAMW) * BILLION / GIB + row["rest_gib"] + BESIDES)


def sample_gib(row: dict[str, Any], in_block: float) -> float:
    """Return the GiB of decoding a sample beside a network whose frozen weights in blocks take ``in_block`` bytes."""
    return train_gib({**row, "rest_gib": row["decoding_gib"]}, in_block)


def encoders_gib(row: dict[str, Any]) -> tuple[float, float]:
    """Return the GiB of all text encoders and of the largest, CLIPs in 32 bits and others in 16."""
    sizes = [size * FULL for size in row["clips"]] + [size * HALF for size in row["frozen"]]
    return sum(sizes) * BILLION / GIB, max(sizes) * BILLION / GIB


def smallest_card(gib: float) -> str:
    """Return the smallest usual card that has as much, with a tenth to spare."""
    return next((f"{card}" for card in CARDS if gib * 1.1 <= card), f"over {CARDS[-1]}")


def page() -> str:
    """Return the page."""
    rows = json.loads((DOCS / "memory.json").read_text(encoding="utf-8"))
    by_key = {(row["model"], row["resolution"], row["checkpointing"]): row for row in rows}
    lines = []
    for name in dict.fromkeys(row["model"] for row in rows):
        row = by_key[name, 512, True]
        both, largest = encoders_gib(row)
        cells = [name, f"{row['weights']:.1f}", f"{both:.1f} ({largest:.1f})"]
        for resolution in (512, 1024):
            thrifty, plain = (by_key[name, resolution, checkpointing] for checkpointing in (True, False))
            cells += [f"{train_gib(plain, HALF):.1f}", f"{train_gib(thrifty, HALF):.1f}"]
            cells += [f"{train_gib(thrifty, INT8):.1f}", f"{train_gib(thrifty, NF4):.1f}"]
        large = by_key[name, 1024, True]
        cells.append(smallest_card(max(train_gib(large, NF4), sample_gib(large, NF4), largest + BESIDES)))
        lines.append(f"| {' | '.join(cells)} |")
    sizes = {row["model"]: row["decoding_gib"] for row in rows if row["resolution"] == 1024}
    usual = min(sizes.values())
    others = ", ".join(f"{name} {size:.1f}" for name, size in sizes.items() if size > 1.1 * usual)
    return TEXT.replace("{rows}", "\n".join(lines)).replace("{decoding}", f"{usual:.1f} GiB ({others})")


TEXT = """# What memory a family needs

*Estimates.* No GPU has measured them yet. Weights are counted from the configs of the models at full size; what a step
needs beside them is the most bytes that are alive at once in a forward and a backward pass of the real networks over
tensors that have shapes but no values (`python benchmarks/memory.py`); 1 GiB is assumed for the runtime of the GPU and
half the autoencoder. A GPU's allocator and its kernels add to this, so leave a tenth free.

GiB for `dvar train dreambooth-lora --mixed_precision bf16 --train_batch_size 1 --eval_batch_size 1` of rank 4, without
a new word, at 512 and at 1,024 px: as it is; with `--gradient_checkpointing`; with `--quantize int8` or `nf4` besides.
The last column is the smallest card, in GiB, for 1,024 px with `--gradient_checkpointing --quantize nf4 --offload`.

| model | billion weights | text encoders (the largest) | 512 plain | checkpointing | int8 | nf4 | 1,024 plain | checkpointing | int8 | nf4 | card |
|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|
{rows}

- **Text encoders** that train nothing read every prompt once, before the first step, and their weights are freed: in
  training they take nothing. By default they are on the GPU together with the denoising network while they read, so the
  start of a run needs the sum of both; with `--offload` they are there one at a time, which needs the figure in
  brackets. The encoder half of the autoencoder is freed in the same way. None of this changes a loss or an image. Only
  Latent Diffusion keeps its text encoder, which its stock pipeline calls itself for each sample.
- **A new word** keeps the encoders that learn it, which are CLIPs; T5 is freed all the same.
- **Samples** and class images are generated in batches of at most 1,024 × 1,024 pixels, one image of that size or four
  of 512, and decoded in float32. Beside the weights a batch takes {decoding} for that, which the
  last column counts.
- **Half precision.** Under `--mixed_precision bf16` the denoising network and the text encoders that learn no word have
  their weights in bfloat16, and weights that are stored in 16 bits are loaded so. Under `fp16` those encoders stay in
  float32, for T5 overflows in fp16.
- **`--quantize nf4`** and `int8` convert the frozen linear layers in the blocks of the denoising network, by
  bitsandbytes (`pip install 'dvar[quantize]'`, [or from a clone](get-started.md#not-on-pypi-yet)), after their digest
  is taken. What is learned stays in float32, and its files fit the whole model; `--merged` adds it to the whole model.
  Custom Diffusion trains these weights and is refused.
- **`dvar generate`** loads the model as the run had it: in its precision, with its bits and with `--offload`, so that
  what has trained generates too, and a sample of the run can be repeated bit for bit. It needs what the start of a run
  needs. `--mixed_precision`, `--quantize` and `--offload` or `--no_offload` change that. `dvar export --merged` writes
  the whole model in the run's precision, in float32 with `--mixed_precision no`, and works on the CPU.
- **Several GPUs** can share the frozen weights of a model that does not fit one: [FSDP](guides/run-many.md).
- **Not in the table:** Latent Diffusion, whose autoencoder is built for 256 px; class images, which double the batch;
  larger batches and held batches, which cost in proportion only what is over the weights. A held batch of 1 makes the
  curve depend on a single timestep: take 4 or 8 where it fits (`--eval_batch_size`).
"""

if __name__ == "__main__":
    (DOCS / "memory.md").write_text(page(), encoding="utf-8")
    print(DOCS / "memory.md")
