"""The parts of one run put together: what it trains on, how it judges, what it leaves in its folder."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch import Tensor

from dvar._version import __version__
from dvar.config.training import (
    AnyConfig,
    CustomDiffusionConfig,
    DreamBoothLoraConfig,
    TextualInversionConfig,
    initializers,
    prior_weight,
    sample_prompt,
    words,
    written,
)
from dvar.diffusion.backbone import Backbone
from dvar.diffusion.clip import Clip
from dvar.diffusion.objective import Draws, Examples, denoising_loss, draw
from dvar.diffusion.sampling import sample_into
from dvar.errors import NonFiniteLoss
from dvar.files import write_json, write_whole
from dvar.stopping.diagnosis import Reason
from dvar.stopping.probe import Probe
from dvar.stopping.rules import SETTLED, AnyOf, Dvar, FixedSteps, Rule
from dvar.stopping.trace import Trace, TraceFile
from dvar.stopping.verdict import Verdict
from dvar.training.augmentation import encoded, rescaled
from dvar.training.checkpoint import Checkpoint
from dvar.training.dataset import ClassImages, Concept
from dvar.training.loop import Learner, Series, StepRecord, Stopwatch, TrainableMethod, train
from dvar.training.memory_estimate import Memory, peak
from dvar.training.methods.custom_diffusion import CustomDiffusion
from dvar.training.methods.dreambooth_lora import DreamBoothLora
from dvar.training.methods.textual_inversion import TextualInversion
from dvar.training.model_card import write_model_card
from dvar.training.run_layout import RESULT, WEIGHTS, at_step
from dvar.training.weight_files import by_word, provenance, write_weights


class PersonalisationMethod(TrainableMethod, Protocol):
    """What a run asks of a way to personalise besides: how it writes a prompt, and what it leaves in which file."""

    def expand(self, prompt: str) -> str: ...
    def files(self, state: Mapping[str, Tensor]) -> Mapping[str, Mapping[str, Tensor]]: ...
    @property
    def metadata(self) -> Mapping[str, str]: ...


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended: its folder, the last verdict, the updates made, and the step of the lowest L_det.

    ``weights`` are the files of the exported step; there are none of a run that can still go on.
    """

    folder: Path
    verdict: Verdict
    steps: int
    best_step: int
    seconds: Mapping[str, float]
    weights: tuple[Path, ...] = ()


class TrainingRun:
    """One run under way: the parts that `personalise` put together, and what they leave in the folder."""

    def __init__(
        self,
        folder: Path,
        config: AnyConfig,
        concept: Concept,
        classes: Sequence[ClassImages],
        backbone: Backbone,
        method: PersonalisationMethod,
        clip: Clip | None = None,
    ) -> None:
        self.folder, self.config, self.concept, self.backbone, self.method = folder, config, concept, backbone, method
        self.clip = clip
        self.memory: Memory | None = None  # `needed` tells it where somebody asks
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
        self.criterion: Rule = AnyOf((Dvar(config.window, config.threshold), FixedSteps(config.max_train_steps)))
        # As in the released code the held batch has its augmentations, and L_det neither their mask nor the prior.
        held = replace(self.drawn(self.examples, "held", 0, 0, config.eval_batch_size), mask=None)
        self.probe = Probe(self.losses, held, modules=backbone.modules)
        self.learner = Learner(method, config, {"method": config.method, "timesteps": held.timesteps.tolist()})

    def open(self, checkpoint: Checkpoint | None) -> None:
        """Make the folder this run's: the trace as it was at ``checkpoint``, the settings and what training sees."""
        if checkpoint:
            self.learner.restore(checkpoint)
            _cut(self.folder / "trace.jsonl", checkpoint)
            self._caught_up(checkpoint.trace)
        (self.folder / "references").mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "config.json", {**written(self.config), "versions": _versions()})
        for index, picture in enumerate(self.concept.pictures):
            picture.save(self.folder / "references" / f"{index:02d}.png")

    def steps(self, interrupted: Callable[[], bool], series: Series | None = None) -> Iterator[StepRecord]:
        """Train, leaving the trace and the checkpoints in the folder; ``series`` is as for `train`."""
        config = self.config

        def all_series(step: int, watch: Stopwatch) -> Mapping[str, Any]:
            return {**self.scores(step, watch, interrupted), **(series(step, watch) if series else {})}

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
        facts = {"config": written(self.config), "pictures": digest_of(self.concept), "base": self.backbone.digest}
        self.learner.checkpoint(**facts).write(self.folder, keep)

    def draw_samples(self, step: int, interrupted: Callable[[], bool] = lambda: False) -> list[Path]:
        """Return the sample pictures of ``step``, drawn unless the folder has them all.

        Raises: Abandoned when ``interrupted`` says so meanwhile.
        """
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
            scheduler=config.validation_scheduler,
            interrupted=interrupted,
        )

    def scores(self, step: int, watch: Stopwatch, interrupted: Callable[[], bool] = lambda: False) -> dict[str, float]:
        """How like the subject's pictures the samples of ``step`` are, by the CLIP of a run that judges its best by it:
        the mean cosine of all pairs, wherever samples are drawn and at the cap.

        Raises: as `draw_samples`.
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
            samples = [Image.open(path) for path in self.draw_samples(step, interrupted)]
            likeness = self.clip.of_pictures(samples) @ self.clip.of_pictures(self.concept.pictures).T
        return {"clip_image": float(likeness.mean())}

    def finish(self, verdict: Verdict) -> TrainingResult:
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
            "best_by": learner.best_by,
            "seconds": result.seconds,
            "memory": {"estimated": self.memory and self.memory.total, "peak": peak(self.backbone.device)},
            "placeholder": config.placeholder_token,
            "weights": weights,
            "best_weights": [path.name for path in best],
            "base_sha256": self.backbone.digest,
        }
        write_json(folder / RESULT, facts)
        return result

    def result(self, verdict: Verdict) -> TrainingResult:
        """Return how the run stands."""
        trace = self.learner.trace
        seconds = {name: float(trace.metric(f"seconds.{name}")[1].sum()) for name in ("train", "probe", "other")}
        return TrainingResult(self.folder, verdict, trace.last_step, self.learner.best_step, seconds)

    def _caught_up(self, trace: Trace) -> None:
        """Make up for the samples and the score of the last step in ``trace``, where its run ended before them."""
        *before, last = trace.records
        if last["step"] % self.config.validation_steps == 0:
            self.draw_samples(last["step"])
        if (found := self.scores(last["step"], Stopwatch())) and not found.keys() <= last.keys():
            self.learner.trace = Trace(trace.header)
            for record in (*before, {**last, **found}):
                self.learner.trace.record(**record)
            self.learner.trace.write(self.folder / "trace.jsonl")
            self.learner.keep_best()

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
        return self.weighed(self.training_draws(step, first, count))

    def training_draws(self, step: int, first: int, count: int) -> Draws:
        """The draws of these samples; with a prior, then those of as many class pictures."""
        draws = self.drawn(self.examples, "train", step, first, count)
        return draws if self.prior is None else draws.joined(self.drawn(self.prior, "prior", step, first, count))

    def weighed(self, draws: Draws) -> Tensor:
        """The losses of `training_draws`, one a sample."""
        losses = self.losses(draws)
        if self.prior is None:
            return losses
        own, others = losses.chunk(2)
        return own + prior_weight(self.config) * others

    def losses(self, draws: Draws) -> Tensor:
        """The losses of these samples, float32 [B]."""
        return denoising_loss(self.backbone.predict, draws, self.schedule)


def assembled(config: AnyConfig, backbone: Backbone) -> PersonalisationMethod:
    """Return the method of these settings, put into ``backbone`` and untrained."""
    initializer, vectors = str(config.initializer_token), config.num_vectors
    match config:
        case TextualInversionConfig():
            return TextualInversion(backbone, config.placeholder_token, initializer, vectors)
        case DreamBoothLoraConfig():
            return DreamBoothLora(
                backbone,
                config.placeholder_token,
                initializer,
                vectors,
                rank=config.rank,
                alpha=config.lora_alpha,
                targets=config.lora_targets,
                text_encoder=config.train_text_encoder,
                seed=config.seed,
            )
        case CustomDiffusionConfig():
            pairs = dict(zip(words(config), initializers(config), strict=True))
            return CustomDiffusion(backbone, pairs, vectors, part=config.freeze_model)


def _cut(path: Path, checkpoint: Checkpoint) -> None:
    """Put the trace back to its checkpoint, and keep the lines that were cut beside it: the rerun must repeat them."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    if later := lines[1 + len(checkpoint.trace) :]:
        write_whole(path.with_name(f"{path.name}.cut-{checkpoint.step}"), b"".join(later))
    checkpoint.trace.write(path)


def digest_of(concept: Concept) -> str:
    digest = sha256()
    for index, picture in enumerate(concept.pictures):
        digest.update(picture.tobytes() + json.dumps(concept.texts(index)).encode())
    for known in concept.classes:
        for picture in known.pictures:
            digest.update(picture.tobytes())
        digest.update(known.prompt.encode())
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    packages = ("torch", "diffusers", "transformers", "peft", "safetensors", "numpy")
    return {"dvar": __version__, "python": platform.python_version(), **{name: version(name) for name in packages}}
