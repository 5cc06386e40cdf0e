"""The names of the files in a run's folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from dvar.files import read_json, writing_problem

if TYPE_CHECKING:
    from dvar.config.training import TrainingConfig

CONFIG = "config.json"
TRACE = "trace.jsonl"
RESULT = "result.json"
REPORT = "report.html"
MODEL_CARD = "README.md"
INITIALIZER = "initializer.json"
REFERENCES = "references"
SAMPLES = "samples"
SAMPLE_PROMPTS = "prompts.json"
TRACKER_LOGS = "logs"
CLASS_IMAGES = "class_images"
GENERATED = "generated"
GENERATED_LIST = "generated.jsonl"
SAVE_REQUEST = "save-request"
"""A file that asks a run for a checkpoint while it goes on; the run removes it."""

EMBEDS = "learned_embeds.safetensors"
CLIP_EMBEDS = "learned_clip_embeds.safetensors"
LORA = "pytorch_lora_weights.safetensors"
ATTENTION = "custom_diffusion_weights.safetensors"
WEIGHTS = (EMBEDS, CLIP_EMBEDS, LORA, ATTENTION)
"""By name: the vectors of placeholder tokens; those of one token for two CLIPs, "clip_l" and "clip_g"; a low-rank
change of the model; whole weights under the U-Net's names."""

# All that a run writes into its folder. A run does not start where any of these exists unless told to overwrite, and
# overwriting removes nothing else. What no run writes there, such as a file of one's own in one of its folders, or a
# checkpoint of another program, is `foreign`, and nothing is overwritten beside it.
WRITTEN = (
    *(CONFIG, TRACE, f"{TRACE}.cut-*", f"{TRACE}.part", "checkpoint-*", ".checkpoint-*"),
    *(REFERENCES, SAMPLES, f"{CLASS_IMAGES}*", f".{CLASS_IMAGES}*.part", TRACKER_LOGS),
    *(INITIALIZER, RESULT, REPORT, MODEL_CARD),
)
_IN_FOLDERS = re.compile(
    r"\.?checkpoint-\d+(\.part)?/(tensors\.safetensors|facts\.json|trace\.jsonl(\.part)?|manifest\.json)"
    rf"|{REFERENCES}/\d+\.png"
    rf"|{SAMPLES}/({re.escape(SAMPLE_PROMPTS)}(\.part)?|\.?step-\d+(\.part)?/\d+\.png|\.step-\d+\.lock)"
    rf"|\.?{CLASS_IMAGES}(_\d+)?(\.part)?/\d+\.png"
    rf"|{TRACKER_LOGS}/events\.out\.tfevents\..*"
)
"""What a run writes into the folders of its folder."""
_WEIGHT_FILE = re.compile(
    rf"(?P<name>{'|'.join(re.escape(Path(name).stem) for name in WEIGHTS)}|{Path(EMBEDS).stem}\.[A-Za-z0-9_-]*?)"
    r"(-steps-\d+)?\.safetensors"
)
"""A weight file as `at_step` and `of_token` name them; a copy under another name is not the run's."""


def find_written(folder: Path) -> list[Path]:
    """Return the files and folders in a run's folder that have the names of what a run writes."""
    weights = [path for path in folder.glob("*.safetensors") if _WEIGHT_FILE.fullmatch(path.name)]
    return sorted({*weights, *(path for name in WRITTEN for path in folder.glob(name))})


def find_steps_of(path: Path) -> list[Path]:
    """Return the weight files that are the one at ``path`` of any step, itself included."""
    name = name_without_step(path.name)
    return [other for other in path.parent.glob("*.safetensors") if name_without_step(other.name) == name]


def name_without_step(name: str) -> str:
    """Return the name that `at_step` was given, without its suffix; empty for what is no weight file of a run."""
    match = _WEIGHT_FILE.fullmatch(name)
    return match["name"] if match else ""


def find_foreign(folder: Path) -> list[str]:
    """Return what `find_written` finds although no run wrote it, as paths within ``folder``.

    That is a link, a file in one of a run's folders that no run writes there, and everything where no run ever was.
    """
    written = find_written(folder)
    links = [path for path in written if path.is_symlink()]
    inside = [file for path in written if path.is_dir() and path not in links for file in path.rglob("*")]
    names = [path.relative_to(folder).as_posix() for path in inside if path.is_symlink() or not path.is_dir()]
    foreign = [name for name in names if not _IN_FOLDERS.fullmatch(name) or (folder / name).is_symlink()]
    if written and not _was_run(folder):
        return [path.name for path in written]
    return [*(path.name for path in links), *foreign]


def _was_run(folder: Path) -> bool:
    """Return whether a run has begun in a folder: it writes its config first."""
    try:
        config = read_json(folder / CONFIG)
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "versions" in config


def problems(config: TrainingConfig) -> list[str]:
    """Return what keeps a run from writing into its folder: a file, the images, another run, or nothing to resume."""
    if not str(config.output_dir).strip():
        return [f"output_dir must name a folder, got {str(config.output_dir)!r}: give one, such as runs/mug"]
    folder, resume = Path(config.output_dir).expanduser(), config.resume_from_checkpoint
    if problem := writing_problem(folder, folder=True):
        return [f"output_dir must be a folder that can be written, and {problem}: choose another"]
    if config.instance_data_dir and folder.resolve() == Path(config.instance_data_dir).expanduser().resolve():
        return [f"output_dir must not be the folder of the images, {folder}: choose another"]
    if resume:
        checkpoints = sorted(path.name for path in checkpoint_paths(folder))
        if not checkpoints or (resume != "latest" and Path(resume).name not in checkpoints):
            content = f"it holds {', '.join(checkpoints)}" if checkpoints else "it holds no checkpoint"
            return [f"resume_from_checkpoint {resume!r} is not in {folder}, {content}: correct it or start afresh"]
    elif not config.overwrite and (written := find_written(folder)):
        names = ", ".join(path.name for path in written[:4])
        message = f"output_dir {folder} holds another run, or files in its place ({names})"
        remedy = "choose another folder, resume with --resume_from_checkpoint latest, or replace them with --overwrite"
        return [f"{message}: {remedy}"]
    elif config.overwrite and (foreign := find_foreign(folder)):
        message = f"overwrite replaces what a run wrote, and no run wrote {', '.join(foreign[:4])} in {folder}"
        return [f"{message}: move it away, or choose another folder"]
    return []


def checkpoint_name(step: int) -> str:
    """Return the name of the checkpoint of a step."""
    return f"checkpoint-{step}"


def checkpoint_step(path: Path) -> int:
    """Return the step of the checkpoint at ``path``."""
    return int(path.name.removeprefix("checkpoint-"))


def checkpoint_paths(folder: Path) -> list[Path]:
    """Return the checkpoints in a run's folder, newest step first, whether complete or not."""
    paths = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(paths, key=checkpoint_step, reverse=True)


def step_name(step: int) -> str:
    """Return the name, without a suffix, of what belongs to one step: sample images, weights, sheets."""
    return f"step-{step:06d}"


def class_images_name(number: int) -> str:
    """Return the name of the folder of class images of concept ``number``, counted from 0."""
    return f"{CLASS_IMAGES}_{number + 1}" if number else CLASS_IMAGES


def at_step(name: str, step: int) -> str:
    """Return the name of a weight file of ``step``, where that is not the exported step."""
    return f"{Path(name).stem}-steps-{step}{Path(name).suffix}"


def of_token(token: str) -> str:
    """Return the name of the file of one of several placeholder tokens: learned_embeds.new1.safetensors of <new1>."""
    return f"{Path(EMBEDS).stem}.{re.sub(r'[^A-Za-z0-9_-]', '', token)}{Path(EMBEDS).suffix}"


def weights_kind(name: str) -> str:
    """Return which of `WEIGHTS` a file is that `at_step` or `of_token` named."""
    return next(kind for kind in WEIGHTS if name.startswith(Path(kind).stem))
