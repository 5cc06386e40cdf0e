"""The names of the files of a run."""

from __future__ import annotations

from pathlib import Path

from dvar.training.weight_files import WEIGHTS

CLASS_PICTURES, INITIALIZER = "class_pictures", "initializer.json"


# All that a run writes into its folder: unasked it goes into a folder without any, and replacing it removes no more.
WRITTEN = (
    *("config.json", "trace.jsonl", "trace.jsonl.*", "checkpoint-*", ".checkpoint-*"),
    *(f"{Path(name).stem}*.safetensors" for name in WEIGHTS),
    *(
        "references",
        "samples",
        f"{CLASS_PICTURES}*",
        f".{CLASS_PICTURES}*.part",
        "logs",
        INITIALIZER,
        "result.json",
        "report.html",
        "README.md",
    ),
)
