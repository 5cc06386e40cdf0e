"""A whole run: refusals, the model, the loop, the pictures, what it leaves."""

from __future__ import annotations

import json
import platform
import shutil
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dvar import __version__
from dvar.config import (
    AnyConfig,
    CustomDiffusionConfig,
    DreamBoothLoraConfig,
    TextualInversionConfig,
    initializers,
    prior_weight,
    restored,
    sample_prompt,
    words,
    written,
)
from dvar.diffusion.backbone import Backbone
from dvar.diffusion.clip import Clip
from dvar.diffusion.objective import Draws, Examples, denoising_loss, draw
from dvar.diffusion.sampling import sample_into
from dvar.errors import CheckpointError, NonFiniteLoss, OutOfResources, RefusedInput
from dvar.stopper.probe import Probe
from dvar.stopper.rules import SETTLED, AnyOf, Criterion, Dvar, FixedSteps
from dvar.stopper.trace import TraceFile
from dvar.stopper.verdict import Reason, Verdict
from dvar.trainer.artifacts import (
    RESULT,
    by_word,
    provenance,
    write_json,
    write_model_card,
    write_weights,
    write_whole,
)
from dvar.trainer.checkpoint import Checkpoint, latest
from dvar.trainer.concept import WRITTEN, Class, Concept, model_path, read_concept, tokenizer_of
from dvar.trainer.examples import encoded, rescaled
from dvar.trainer.initialisation import clip_of, first_words
from dvar.trainer.loading import WEIGHTS, at_step
from dvar.trainer.loop import Learner, Method, Series, Step, Stopwatch, train
from dvar.trainer.methods.custom_diffusion import CustomDiffusion
from dvar.trainer.methods.dreambooth_lora import DreamBoothLora
from dvar.trainer.methods.textual_inversion import TextualInversion
from dvar.trainer.prior import with_pictures
from dvar.trainer.trackers import Tracker

# Settings that may differ when a run goes on: they decide where it is kept, not what it computes.
_FREE = {
    "preset",
    "instance_data_dir",
    "class_data_dir",
    "concepts_list",
    "output_dir",
    "overwrite",
    "resume_from_checkpoint",
    "report_to",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "extend",
    "keep",
}


class Personalisation(Method, Protocol):
    """What a run asks of a way to personalise besides: how it writes a prompt, and what it leaves in which file."""

    def expand(self, prompt: str) -> str: ...
    def files(self, state: Mapping[str, Tensor]) -> Mapping[str, Mapping[str, Tensor]]: ...
    @property
    def metadata(self) -> Mapping[str, str]: ...


@dataclass(frozen=True)
class Result:
    """How a run ended: its folder, the last verdict, the updates made, and the step of the lowest L_det.

    ``weights`` are the files of the exported step; there are none of a run that can still go on.
    """

    folder: Path
    verdict: Verdict
    steps: int
    best_step: int
    seconds: Mapping[str, float]
    weights: tuple[Path, ...] = ()


def personalise(
    config: AnyConfig, consumers: Sequence[Callable[[Step], None]] = (), *, concept: Concept | None = None
) -> Result:
    """Learn the subject of the pictures that ``config`` names, by the method of its class; leave the run in its folder.

    Training goes on until DVAR or the cap stops it.
    ``consumers`` are called with each `Step`; ``concept`` is what `read_concept` returned, where that was called
    before.  SIGTERM or SIGINT ends the run after the step under way, with a
    checkpoint to go on from and the verdict "interrupted"; nothing is exported then.  A loss that is not finite ends
    it too, and the best step before it is what is exported.

    Raises: RefusedInput with every problem at once, before a model loads; ModelError; CheckpointError when there is
    nothing to resume from, or only a run under other settings, pictures or weights; OutOfResources when memory or disk
    ran out; NonFiniteLoss when no evaluation was finite.
    Source: Sections 3.2, 3.3 and 4.1.
    """
    with _told_in_a_line(config):
        return _carried_out(config, consumers, concept)


def _carried_out(config: AnyConfig, consumers: Sequence[Callable[[Step], None]], concept: Concept | None) -> Result:
    job, checkpoint = prepared(config, concept)
    config = job.config
    job.open(checkpoint)
    if checkpoint and checkpoint.step % config.validation_steps == 0:
        job.draw_samples(checkpoint.step)  # it may have died after the checkpoint and before its samples
    verdict = job.criterion(job.learner.trace)
    with interruption() as interrupted, closing(Tracker(config.report_to, job.folder, asdict(config))) as tracker:
        for step in job.steps(interrupted):
            verdict = step.verdict
            tracker(step)
            for consumer in consumers:
                consumer(step)
            if step.step % config.validation_steps == 0 and not verdict.stop:
                job.draw_samples(step.step)
    return job.result(verdict) if verdict.reason is Reason.INTERRUPTED else job.finish(verdict)


def prepared(config: AnyConfig, concept: Concept | None = None) -> tuple[Job, Checkpoint | None]:
    """Return the run that ``config`` describes, ready to be opened, and the checkpoint from which it is to go on.

    What stands in its way is removed from its folder, and the first word and the class pictures that it needs are found
    and left there; nothing of the run itself is written yet.
    Raises: as `personalise`, before anything is removed.
    """
    folder = Path(config.output_dir).expanduser()
    concept = concept or read_concept(config, tokenizer_of)
    checkpoint = _to_resume(folder, config, concept) if config.resume_from_checkpoint else None
    backbone = Backbone.load(
        model_path(config.pretrained_model_name_or_path),
        mixed_precision=config.mixed_precision,
        gradient_checkpointing=config.gradient_checkpointing,
        attention_slicing=config.attention_slicing,
        compile=config.compile,
    )
    if checkpoint and (then := checkpoint.facts["base"]) != backbone.digest:
        said = f"checkpoint-{checkpoint.step} was made on another base model (its SHA-256 was {then[:12]}... and is "
        raise CheckpointError(f"{said}{backbone.digest[:12]}...): put that one back, or start another --output_dir")
    wanted = config.best_by == "clip" or (config.initializer == "clip" and not checkpoint)
    clip = clip_of(config, backbone) if wanted else None
    _clear(folder, checkpoint)
    if checkpoint:  # which tells the first word, where it was not given
        config = replace(config, initializer_token=checkpoint.facts["config"]["initializer_token"])
    else:
        config = first_words(config, concept, backbone, clip)
    classes = tuple(with_pictures(config, concept.classes, backbone))
    return Job(folder, config, concept, classes, backbone, assembled(config, backbone), clip), checkpoint


def assembled(config: AnyConfig, backbone: Backbone) -> Personalisation:
    """Return the method of these settings, put into ``backbone`` and untrained."""
    initializer, vectors = str(config.initializer_token), config.num_vectors
    match config:
        case TextualInversionConfig():
            return TextualInversion(backbone, config.placeholder_token, initializer, vectors)
        case DreamBoothLoraConfig():
            shape = {"rank": config.rank, "alpha": config.lora_alpha or config.rank, "seed": config.seed}
            both = config.train_text_encoder
            return DreamBoothLora(backbone, config.placeholder_token, initializer, vectors, **shape, text_encoder=both)
        case CustomDiffusionConfig():
            pairs = dict(zip(words(config), initializers(config), strict=True))
            return CustomDiffusion(backbone, pairs, vectors, part=config.freeze_model)


def finished(folder: str | Path) -> tuple[AnyConfig, dict[str, Any]]:
    """Return the settings of a finished run and what its result.json tells.

    Raises: RefusedInput when the folder holds no finished run.
    """
    folder = Path(folder)
    try:
        config, result = (json.loads((folder / name).read_text(encoding="utf-8")) for name in ("config.json", RESULT))
        return restored(config), result
    except (OSError, ValueError) as error:
        raise RefusedInput([f"{folder} is no finished run: it must hold config.json and {RESULT} ({error})"]) from error


def personalised(folder: str | Path, *, step: int | None = None, **loading: Any) -> Backbone:
    """Return the model of a finished run with what was learned; ``loading`` goes to `Backbone.load`.

    With a ``step`` it is what was learned by then, from the checkpoint of that step; the run need not have finished.
    Warns when the base model is no longer the one that was trained on.

    Raises: RefusedInput when the folder holds no finished run; CheckpointError when it has no such checkpoint;
    ModelError.
    """
    folder = Path(folder)
    if step is None:
        config, result = finished(folder)
        base, files = result["base_sha256"], _weights(folder, result["weights"])
        learned = {name: tensor for file in files for name, tensor in file.items()}
    else:
        checkpoint = Checkpoint.read(folder / f"checkpoint-{step}")
        config, base, learned = restored(checkpoint.facts["config"]), checkpoint.facts["base"], checkpoint.state
    backbone = Backbone.load(model_path(config.pretrained_model_name_or_path), **loading)
    if backbone.digest != base:
        said = f"{config.pretrained_model_name_or_path} is not what {folder} was trained on"
        warnings.warn(f"{said}: its pictures will differ", stacklevel=2)
    try:
        assembled(config, backbone).load(learned)
    except (KeyError, RuntimeError) as error:
        said = f"{folder} holds other weights than its config.json tells of ({error})"
        raise RefusedInput([f"{said}: restore them or train again"]) from error
    return backbone


def _weights(folder: Path, names: Sequence[str]) -> list[dict[str, Tensor]]:
    try:
        return [load_file(folder / name) for name in names]
    except (OSError, SafetensorError) as error:
        raise RefusedInput([f"{folder} lacks its weights or they are damaged ({error}): train again"]) from error


class Job:
    """One run under way: the parts that `personalise` put together, and what they leave in the folder."""

    def __init__(
        self,
        folder: Path,
        config: AnyConfig,
        concept: Concept,
        classes: Sequence[Class],
        backbone: Backbone,
        method: Personalisation,
        clip: Clip | None = None,
    ) -> None:
        self.folder, self.config, self.concept, self.backbone, self.method = folder, config, concept, backbone, method
        self.clip = clip
        self.schedule = backbone.schedule
        for network in backbone.modules:  # what is trained keeps its dropout, where a model has any
            network.train(any(weight.requires_grad for weight in network.parameters()))
        texts = [[method.expand(text) for text in concept.texts(index)] for index in range(len(concept.pictures))]
        shown = rescaled if isinstance(config, CustomDiffusionConfig) and config.random_rescale else encoded
        self.examples: Examples = shown(concept.pictures, texts, backbone, mirrored=config.random_flip)
        self.prior: Examples | None = None
        if classes:
            pictures = [picture for known in classes for picture in known.pictures]
            texts = [[known.prompt] for known in classes for _ in known.pictures]
            self.prior = encoded(pictures, texts, backbone, mirrored=config.random_flip)
        self.criterion: Criterion = AnyOf((Dvar(config.window, config.threshold), FixedSteps(config.max_train_steps)))
        # As in the released code the held batch has its augmentations, and L_det neither their mask nor the prior.
        held = replace(self.drawn(self.examples, "held", 0, 0, config.eval_batch_size), mask=None)
        self.probe = Probe(self.losses, held, modules=backbone.modules)
        self.learner = Learner(method, config, {"method": config.method, "timesteps": held.timesteps.tolist()})

    def open(self, checkpoint: Checkpoint | None) -> None:
        """Make the folder this run's: the trace as it was at ``checkpoint``, the settings and what training sees."""
        if checkpoint:
            self.learner.restore(checkpoint)
            _cut(self.folder / "trace.jsonl", checkpoint)
        (self.folder / "references").mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "config.json", {**written(self.config), "versions": _versions()})
        for index, picture in enumerate(self.concept.pictures):
            picture.save(self.folder / "references" / f"{index:02d}.png")

    def steps(self, interrupted: Callable[[], bool], series: Series | None = None) -> Iterator[Step]:
        """Train, leaving the trace and the checkpoints in the folder; ``series`` is as for `train`."""
        config = self.config

        def all_series(step: int, watch: Stopwatch) -> Mapping[str, Any]:
            return {**self.scores(step, watch), **(series(step, watch) if series else {})}

        with TraceFile(self.folder / "trace.jsonl", self.learner.trace.header) as file:
            yield from train(
                self.learner,
                losses=self.training_losses,
                probe=self.probe,
                criterion=self.criterion,
                log=file.append,
                save=lambda: self.save(config.checkpoints_total_limit),
                interrupted=interrupted,
                series=all_series,
            )

    def save(self, keep: int | None) -> None:
        """Write a checkpoint."""
        facts = {"config": written(self.config), "pictures": _digest(self.concept), "base": self.backbone.digest}
        self.learner.checkpoint(**facts).write(self.folder, keep)

    def draw_samples(self, step: int) -> list[Path]:
        """Return the sample pictures of ``step``, drawn unless the folder has them all."""
        config, samples = self.config, self.folder / "samples"
        prompts = [sample_prompt(config)] * config.num_validation_images
        seeds = [config.seed + index for index in range(len(prompts))]
        samples.mkdir(exist_ok=True)
        listed = [{"prompt": prompt, "seed": seed} for prompt, seed in zip(prompts, seeds, strict=True)]
        write_json(samples / "prompts.json", listed)
        return sample_into(
            samples / f"step-{step:06d}",
            self.backbone,
            prompts,
            seeds,
            size=config.resolution,
            steps=config.num_inference_steps,
            guidance=config.guidance_scale,
        )

    def scores(self, step: int, watch: Stopwatch) -> dict[str, float]:
        """How like the subject's pictures the samples of ``step`` are, by the CLIP of a run that judges its best by it:
        the mean cosine of all pairs, wherever samples are drawn and at the cap.

        Source: Section 4.1, the CLIP score that DVAR is held against.
        """
        config = self.config
        if (
            not self.clip
            or config.best_by != "clip"
            or (step % config.validation_steps and step != config.max_train_steps)
        ):
            return {}
        with watch("samples"):
            samples = [Image.open(path) for path in self.draw_samples(step)]
            likeness = self.clip.of_pictures(samples) @ self.clip.of_pictures(self.concept.pictures).T
        return {"clip_image": float(likeness.mean())}

    def finish(self, verdict: Verdict) -> Result:
        """Write the exports and, last of all, result.json; return how the run ended.

        Raises: NonFiniteLoss when there is nothing finite to export.
        """
        folder, config, learner = self.folder, self.config, self.learner
        only_best = config.keep == "best" or verdict.reason is Reason.NON_FINITE
        if only_best:
            if not np.isfinite(learner.trace.values).any():
                raise NonFiniteLoss(
                    "no evaluation was finite, so nothing is exported: try --mixed_precision no or another model"
                )
            self.method.load(learner.best)
        exported = learner.best_step if only_best else learner.trace.last_step
        result = replace(self.result(verdict), weights=self._export(self.method.state, exported))
        best = result.weights
        if exported != learner.best_step and config.keep != "last":
            best = self._export(learner.best, learner.best_step, beside=True)
        weights = [path.name for path in result.weights]
        for stale in {found for name in WEIGHTS for found in folder.glob(f"{Path(name).stem}*.safetensors")}:
            if stale not in (*result.weights, *best):
                stale.unlink()
        write_model_card(folder, config, verdict, self.draw_samples(exported), weights)
        facts = {
            "verdict": verdict.to_json(),
            "stopped": verdict.stop and verdict.reason in SETTLED,
            "steps": result.steps,
            "exported_step": exported,
            "best_step": result.best_step,
            "best_by": config.best_by,
            "seconds": result.seconds,
            "placeholder": config.placeholder_token,
            "weights": weights,
            "best_weights": [path.name for path in best],
            "base_sha256": self.backbone.digest,
        }
        write_json(folder / RESULT, facts)
        return result

    def result(self, verdict: Verdict) -> Result:
        """Return how the run stands."""
        trace = self.learner.trace
        seconds = {name: float(trace.metric(f"seconds.{name}")[1].sum()) for name in ("train", "probe", "other")}
        return Result(self.folder, verdict, trace.last_step, self.learner.best_step, seconds)

    def _export(self, state: Mapping[str, Tensor], step: int, *, beside: bool = False) -> tuple[Path, ...]:
        """Return the files of ``state``, that of ``step``, once written; ``beside`` puts the step into their names."""
        paths, told = [], {**provenance(self.config, self.backbone.digest, step), **self.method.metadata}
        for name, tensors in by_word(self.method.files(state)).items():
            paths.append(self.folder / (at_step(name, step) if beside else name))
            write_weights(paths[-1], tensors, told)
        return tuple(paths)

    def drawn(self, examples: Examples, stream: str, step: int, first: int, count: int) -> Draws:
        """Samples ``first`` to ``first + count - 1`` of one step of a stream, drawn under the run's seed."""
        timesteps = len(self.schedule.alphas_cumprod)
        draws = draw(
            examples,
            timesteps=timesteps,
            seed=self.config.seed,
            stream=stream,
            step=step,
            first=first,
            count=count,
        )
        return draws.to(self.backbone.device)

    def training_losses(self, step: int, first: int, count: int) -> Tensor:
        """The losses of these samples; with a prior, each has that of a class picture added at the prior's weight."""
        draws = self.drawn(self.examples, "train", step, first, count)
        if self.prior is None:
            return self.losses(draws)
        both = self.losses(draws.joined(self.drawn(self.prior, "prior", step, first, count)))
        return both[:count] + prior_weight(self.config) * both[count:]

    def losses(self, draws: Draws) -> Tensor:
        """The losses of these samples, float32 [B]."""
        return denoising_loss(self.backbone.predict, draws, self.schedule)


def _clear(folder: Path, checkpoint: Checkpoint | None) -> None:
    """Remove from the folder what stands in the way: the result of a run that goes on, or all of another run."""
    _remove(folder, (RESULT,) if checkpoint else WRITTEN)


def _to_resume(folder: Path, config: AnyConfig, concept: Concept) -> Checkpoint:
    """The checkpoint that the settings name, if it was made under these settings and pictures."""
    name = str(config.resume_from_checkpoint)
    checkpoint = latest(folder) if name == "latest" else Checkpoint.read(folder / Path(name).name)
    now, then = written(config), {"method": TextualInversionConfig.method, **checkpoint.facts["config"]}
    # A schedule that bends towards the cap makes other steps under another cap; a constant one does not.
    bends = not config.lr_scheduler.startswith("constant")
    higher = config.max_train_steps > then["max_train_steps"]
    free = _FREE | ({"max_train_steps"} if config.extend and higher and not bends else set())
    free |= {"initializer_token"} if config.initializer != "manual" else set()
    differing = [
        f"{key} was {then.get(key)!r} and is {now[key]!r}"
        for key in now
        if key not in free and now[key] != then.get(key)
    ]
    if checkpoint.facts["pictures"] != _digest(concept):
        differing.append("the pictures or their captions changed")
    if differing:
        said = f"checkpoint-{checkpoint.step} was made under other settings ({'; '.join(differing)})"
        raised = " (a higher cap alone is taken with --extend)" if higher and not bends and not config.extend else ""
        raise CheckpointError(f"{said}: resume with those{raised}, or start another --output_dir")
    return checkpoint


def _digest(concept: Concept) -> str:
    digest = sha256()
    for index, picture in enumerate(concept.pictures):
        digest.update(picture.tobytes() + json.dumps(concept.texts(index)).encode())
    for known in concept.classes:
        for picture in known.pictures:
            digest.update(picture.tobytes())
        digest.update(known.prompt.encode())
    return digest.hexdigest()


def _cut(path: Path, checkpoint: Checkpoint) -> None:
    """Put the trace back to its checkpoint, and keep the lines that were cut beside it: the rerun must repeat them."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    if later := lines[1 + len(checkpoint.trace) :]:
        write_whole(path.with_name(f"{path.name}.cut-{checkpoint.step}"), b"".join(later))
    checkpoint.trace.write(path)


def _remove(folder: Path, names: Sequence[str]) -> None:
    for path in [found for name in names for found in folder.glob(name)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _versions() -> dict[str, str]:
    packages = ("torch", "diffusers", "transformers", "peft", "safetensors", "numpy")
    return {"dvar": __version__, "python": platform.python_version(), **{name: version(name) for name in packages}}


@contextmanager
def _told_in_a_line(config: AnyConfig) -> Iterator[None]:
    """Let memory or disk that runs out end in an error of ours, which says what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        remedies = {
            "--gradient_checkpointing": not config.gradient_checkpointing,
            "--mixed_precision bf16": config.mixed_precision == "no",
            "--attention_slicing": not config.attention_slicing,
            "--train_batch_size 1 with --gradient_accumulation_steps": config.train_batch_size > 1,
            "a smaller --eval_batch_size": config.eval_batch_size > 1,
        }
        tried = ", ".join(remedy for remedy, useful in remedies.items() if useful)
        raise OutOfResources(f"the memory does not suffice: try {tried or 'a lower --resolution'}") from error
    except OSError as error:
        place = error.filename or config.output_dir
        said = f"{place} cannot be written or read ({error.strerror or error})"
        raise OutOfResources(
            f"{said}: make room or mend it, then go on with --resume_from_checkpoint latest"
        ) from error


@contextmanager
def interruption() -> Iterator[Callable[[], bool]]:
    """Yield whether SIGTERM or SIGINT has asked to stop; a second one interrupts at once.  Main thread only."""
    asked = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    heard = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, ask) for number in heard}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
