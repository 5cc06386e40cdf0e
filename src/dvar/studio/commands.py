"""Commands of dvar on one run, each in a process of its own, and the files that they make for a download."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

from dvar.errors import RefusedInput
from dvar.files import remove
from dvar.runs.load_model import load_result
from dvar.runs.run_folder import RunFolder
from dvar.studio.library import LibraryRun
from dvar.training.loading_code import has_embedding
from dvar.training.run_layout import LORA, MODEL_CARD
from dvar.training.run_layout import WEIGHTS as WEIGHT_FILES

WEIGHTS, OTHERS, MERGED, REPORT = (
    "weights for diffusers",
    "weights for ComfyUI and other programs",
    "whole pipeline",
    "report",
)
FORMATS = (WEIGHTS, OTHERS, MERGED, REPORT)


def list_formats(run: RunFolder) -> tuple[str, ...]:
    """Return the formats that a finished run can be exported in."""
    result = run.result or {"weights": ()}
    for_others = LORA in result["weights"] or has_embedding(run.settings.method, result)
    return tuple(name for name in FORMATS if name != OTHERS or for_others)


def run_command(words: Sequence[str], module: str = "dvar") -> str:
    """Run a command of dvar and return what it printed.

    Raises:
        RefusedInput: It was refused or failed; the message is its own.
    """
    process = subprocess.run(
        [sys.executable, "-m", module, *words], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if process.returncode:
        lines = [line.removeprefix("dvar: ") for line in process.stderr.splitlines() if line.strip()]
        raise RefusedInput(lines[-5:] or [f"dvar {' '.join(words[:1])} ended with status {process.returncode}"])
    return process.stdout


def generate(run: LibraryRun, prompt: str, count: int, seed: int) -> None:
    """Generate images of a prompt with the weights of a run; they go into its folder.

    Raises:
        RefusedInput: As `run_command`.
    """
    run_command(["generate", str(run.folder), f"--prompt={prompt}", "--num_images", str(count), "--seed", str(seed)])


def measure(run: LibraryRun) -> None:
    """Measure likeness and obedience of the samples of a run.

    Raises:
        RefusedInput: As `run_command`.
    """
    run_command([str(run.folder)], module="dvar.studio.scores")


def take_step(run: LibraryRun, step: int) -> None:
    """Make the weights of a step the result of a run.

    Raises:
        RefusedInput: As `run_command`.
    """
    run_command(["export", str(run.folder), "--step", str(step)])


def export(run: LibraryRun, name: str) -> Path:
    """Return a file with a finished run in one of `FORMATS`, in a new folder for downloads; the run's others go.

    Raises:
        RefusedInput: As `run_command`, or there is no such format.
    """
    if run.state != "finished" or not run.opened or name not in list_formats(run.opened):
        raise RefusedInput([f"{run.name} cannot be exported as {str(name)[:40]!r}: choose one of the list"])
    prefix = f"export-{sha256(run.name.encode()).hexdigest()[:16]}-"
    for earlier in download_folder().glob(f"{prefix}*"):
        remove(earlier)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=download_folder()))
    makers: dict[str, Callable[[], Path]] = {
        WEIGHTS: lambda: _zip_weights(run, folder),
        OTHERS: lambda: _zip_for_others(run, folder),
        MERGED: lambda: _zip_pipeline(run, folder),
        REPORT: lambda: _write_report(run, folder / f"{run.folder.name}.html"),
    }
    try:
        return makers[name]()
    except BaseException:
        remove(folder)
        raise


def download_folder() -> Path:
    """Return the folder whose files the browser may load: that of uploads, which ends with the studio."""
    from gradio.utils import get_upload_folder

    return Path(get_upload_folder())


def _zip_weights(run: LibraryRun, folder: Path) -> Path:
    path, (_, result) = folder / f"{run.folder.name}.zip", load_result(run.folder)
    # A run may have come from anybody, so a name leads to no other file of the machine.
    own = {MODEL_CARD, *(file.name for kind in WEIGHT_FILES for file in run.folder.glob(f"{Path(kind).stem}*"))}
    with ZipFile(path, "w", ZIP_DEFLATED) as archive:
        for name in dict.fromkeys([*result["weights"], *result.get("best_weights", ()), MODEL_CARD]):
            if name in own and (run.folder / name).is_file():
                archive.write(run.folder / name, name)
    return path


def _zip_for_others(run: LibraryRun, folder: Path) -> Path:
    """Return a zip with the LoRA and the embedding of a run, as far as it has them, and how prompts call the word."""
    content, name = folder / run.folder.name, re.sub(r"[^A-Za-z0-9._-]", "-", run.folder.name)
    config, result = load_result(run.folder)
    words = ["export", str(run.folder)]
    if LORA in result["weights"]:
        words += ["--kohya", str(content / f"{name}.safetensors")]
    if has_embedding(config.method, result):
        words += ["--embedding", str(content / f"{name}-word.safetensors")]
    text = run_command(words).replace(f"{content}/", "")
    (content / "README.txt").write_text(text, encoding="utf-8", newline="\n")
    path = Path(shutil.make_archive(str(content), "zip", folder, content.name))
    shutil.rmtree(content)
    return path


def _zip_pipeline(run: LibraryRun, folder: Path) -> Path:
    pipeline = folder / run.folder.name
    run_command(["export", str(run.folder), "--merged", str(pipeline)])
    path = Path(shutil.make_archive(str(pipeline), "zip", folder, pipeline.name))
    shutil.rmtree(pipeline)
    return path


def _write_report(run: LibraryRun, path: Path) -> Path:
    run_command(["report", str(run.folder), "--output", str(path)])
    return path
