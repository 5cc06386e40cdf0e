"""The pictures that a run drew, each with its prompt and seed: those of training, and those asked for afterwards."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from dvar.config.training import Sampler
from dvar.errors import RefusedInput
from dvar.runs.run_folder import RunFolder

if TYPE_CHECKING:
    from dvar.diffusion.backbone import Backbone

GENERATED, LIST = "generated", "drawings.jsonl"


@dataclass(frozen=True)
class GeneratedImage:
    """One picture: equal prompt, seed and manner start it from equal noise, whatever the run."""

    path: Path
    prompt: str
    seed: int
    num_inference_steps: int
    guidance_scale: float
    result: str = ""
    """Which result drew it: a run that was trained anew in its folder disowns the pictures of the one before."""
    scheduler: Sampler = "model"

    @property
    def manner(self) -> tuple[int, float, Sampler]:
        """Steps, guidance and scheduler."""
        return self.num_inference_steps, self.guidance_scale, self.scheduler


def drawings(run: RunFolder) -> tuple[GeneratedImage, ...]:
    """Return what a run drew with the weights it exported: its last sample pictures, then what `draw` left in it.

    Raises: RefusedInput when the list of the generated pictures is damaged.
    """
    sampled = run.samples.get(run.exported_step, ()) if run.exported_step is not None else ()
    config = run.settings
    steps, guidance, scheduler = config.num_inference_steps, float(config.guidance_scale), config.validation_scheduler
    found = [
        GeneratedImage(path, str(item["prompt"]), int(item["seed"]), steps, guidance, scheduler=scheduler)
        for path, item in zip(sampled, run.prompts, strict=False)
    ]
    listed = run.folder / GENERATED / LIST
    if not listed.exists():
        return tuple(found)
    try:
        rows = [json.loads(line) for line in listed.read_text(encoding="utf-8").splitlines()]
        listed_here = [GeneratedImage(**{**row, "path": listed.parent / Path(row["path"]).name}) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise RefusedInput([f"{listed} is damaged ({error}): delete it, and draw the pictures again"]) from error
    return (*found, *(drawing for drawing in listed_here if drawing.result == _result(run)))


def draw(
    run: RunFolder,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    folder: Path | None = None,
    guidance_scale: float | None = None,
    num_inference_steps: int | None = None,
    scheduler: Sampler | None = None,
) -> tuple[GeneratedImage, ...]:
    """Return one new picture for each prompt and seed, drawn by a finished run's model and listed beside it.

    They go to "generated" in the run's folder unless another is given; what is there already is kept. Steps,
    guidance and scheduler are the run's own unless given.

    Raises: RefusedInput when the run has not finished; ModelError when its model cannot be loaded.
    """
    from dvar.diffusion.sampling import sample
    from dvar.runs.load_model import personalised

    backbone: Backbone = personalised(run.folder)
    steps = num_inference_steps or run.settings.num_inference_steps
    guidance = float(run.settings.guidance_scale if guidance_scale is None else guidance_scale)
    way = scheduler or run.settings.validation_scheduler
    drawn = sample(
        backbone, prompts, seeds, size=run.settings.resolution, steps=steps, guidance=guidance, scheduler=way
    )
    folder = folder or run.folder / GENERATED
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for picture, prompt, seed in zip(drawn, prompts, seeds, strict=True):
        path = next(path for number in count() if not (path := folder / f"{number:02d}.png").exists())
        picture.save(path)
        found.append(GeneratedImage(path, prompt, seed, steps, guidance, _result(run), way))
    _list(folder / LIST, found)
    return tuple(found)


def _result(run: RunFolder) -> str:
    """A digest of what the run ended with."""
    return sha256(json.dumps(run.result, sort_keys=True).encode()).hexdigest()[:16]


def _list(path: Path, drawn: Iterable[GeneratedImage]) -> None:
    with path.open("a", encoding="utf-8") as file:
        for drawing in drawn:
            file.write(json.dumps({**vars(drawing), "path": drawing.path.name}, ensure_ascii=False) + "\n")
