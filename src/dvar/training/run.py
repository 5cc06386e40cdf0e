"""A training run: its parts put together, and what it leaves in its folder."""

from __future__ import annotations

import platform
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial, reduce
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dvar._version import __version__
from dvar.config.training import TrainingConfig
from dvar.diffusion.backbone import Backbone
from dvar.diffusion.clip import Clip
from dvar.diffusion.devices import describe_arithmetic, peak_memory
from dvar.diffusion.objective import Bucketed, Draws, Examples, denoising_loss, draw
from dvar.diffusion.randomness import generator
from dvar.diffusion.sampling import rehearse, sample, sample_into
from dvar.diffusion.timesteps import density_of, loss_weights
from dvar.errors import NonFiniteLoss
from dvar.files import read_content, regular_file, write_atomically, write_json
from dvar.stopping.diagnosis import Reason
from dvar.stopping.probe import Probe, draw_stratified_timesteps
from dvar.stopping.rules import CONDITION_REASONS, Rule
from dvar.stopping.trace import Trace, TraceFile
from dvar.stopping.verdict import Verdict
from dvar.training.augmentation import encode_examples, encode_rescaled_examples
from dvar.training.checkpoint import Checkpoint
from dvar.training.dataset import ClassImages, Concept
from dvar.training.digests import digest_of, digest_of_classes
from dvar.training.loop import Learner, Series, StepRecord, Stopwatch, training_loop
from dvar.training.methods.registry import PersonalisationMethod
from dvar.training.model_card import write_model_card
from dvar.training.processes import ALONE, Processes
from dvar.training.requests import GradientRequest, Request, answer_requests
from dvar.training.rule import rule_of
from dvar.training.run_layout import (
    CONFIG,
    REFERENCES,
    RESULT,
    SAMPLE_PROMPTS,
    SAMPLES,
    SAVE_REQUEST,
    TRACE,
    at_step,
    find_steps_of,
    step_name,
)
from dvar.training.sample_prompts import read_sample_prompts
from dvar.training.sharding import sampler_of
from dvar.training.weight_files import provenance, split_by_token, write_weights


@dataclass(frozen=True)
class TrainingResult:
    """The end of a run.

    Attributes:
        folder: The folder of the run.
        verdict: The last verdict.
        steps: Updates made.
        best_step: The best step, by the config's ``best_by``.
        seconds: Seconds by kind of work: "train", "probe", "other".
        weights: The weight files of the exported step; none of a run that can still be resumed.
    """

    folder: Path
    verdict: Verdict
    steps: int
    best_step: int
    seconds: Mapping[str, float]
    weights: tuple[Path, ...] = ()


HELD_PIXELS = 2**21
"""Pixels of held samples in one forward pass: 8 images of 512, or 2 of 1,024, take less memory than a training step."""


class TrainingRun:
    """A run in progress.

    Args:
        folder: The folder of the run.
        config: Its config.
        concept: What it learns from.
        classes: The class images, where it has a prior.
        backbone: The base model, with the method put into it.
        method: The method, untrained.
        clip: The CLIP that scores samples, where the best step is judged by it.
        processes: The processes that train it.
    """

    def __init__(
        self,
        folder: Path,
        config: TrainingConfig,
        concept: Concept,
        classes: Sequence[ClassImages],
        backbone: Backbone,
        method: PersonalisationMethod,
        clip: Clip | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self.folder, self.config, self.concept, self.backbone, self.method = folder, config, concept, backbone, method
        self.classes, self.clip, self.processes = classes, clip, processes
        self.schedule = schedule = backbone.schedule
        self.density = density_of(config, schedule.density)
        self.weights = loss_weights(
            schedule.signals,
            schedule.spreads,
            schedule.prediction_type,
            snr_gamma=config.snr_gamma,
            weighting=config.loss_weighting,
        )
        self.empty_caption = backbone.tokenize([""])[0] if config.caption_dropout else None
        for network in backbone.modules:  # what is trained keeps its dropout, where a model has any
            network.train(any(weight.requires_grad for weight in network.parameters()))
        texts = [[method.expand(text) for text in concept.texts(index)] for index in range(len(concept.images))]
        encode = encode_rescaled_examples if config.random_rescale else encode_examples
        flip, repeats = config.random_flip, concept.repeats
        self.examples: Examples = encode(concept.images, texts, backbone, mirrored=flip, repeats=repeats)
        self.prior: Examples | None = None
        if classes:
            images = [image for class_images in classes for image in class_images.images]
            texts = [[class_images.prompt] for class_images in classes for _ in class_images.images]
            self.prior = encode_examples(images, texts, backbone, mirrored=config.random_flip)
        sources = [self.examples, *([self.prior] if self.prior else [])]
        empty = [] if self.empty_caption is None else [self.empty_caption.unsqueeze(0)]
        backbone.prepare_training(torch.cat([*(source.all_captions for source in sources), *empty]))
        self.rule: Rule = rule_of(config)
        # As in the released code the held batch has its augmentations, and L_det neither their mask nor the prior.
        self.held = held = self.draw_held(config.eval_batch_size)
        self.probe = Probe(self.held_losses, held, modules=backbone.modules)
        timesteps = [timestep for part in held for timestep in part.timesteps.tolist()]
        header: dict[str, Any] = {"method": config.method, "timesteps": timesteps}
        if config.pivot_step:
            header["judged_from"] = config.pivot_step
        self.learner = Learner(method, config, header, processes)

    def open(self, checkpoint: Checkpoint | None) -> None:
        """Write the config and the instance images into the folder, and restore ``checkpoint``, if any."""
        if checkpoint:
            self.learner.restore(checkpoint)
            _cut_trace(self.folder / TRACE, checkpoint)
            self._complete_last_step(checkpoint.trace)
        (self.folder / REFERENCES).mkdir(parents=True, exist_ok=True)
        write_config(self.folder, self.config)
        for index, image in enumerate(self.concept.images):
            image.save(self.folder / REFERENCES / f"{index:02d}.png")

    def release_encoders(self) -> None:
        """Give up the weights of text encoders and of the autoencoder's encoder that this run needs no more."""
        config = self.config

        def generate() -> None:
            prompts, negatives, _ = self.sample_texts
            size = config.resolution
            rehearse(self.backbone, prompts, negatives=negatives, size=size, guidance=config.guidance_scale)

        self.backbone.release_encoders(generate, images=not config.random_rescale)

    @cached_property
    def sample_texts(self) -> tuple[list[str], list[str | None], list[int]]:
        """The prompts, the negative one of each, if any, and the seeds of the sample images."""
        config = self.config
        prompts = [prompt for prompt in read_sample_prompts(config) for _ in range(config.num_validation_images)]
        seeds = [
            (config.seed if prompt.seed is None else prompt.seed) + index % config.num_validation_images
            for index, prompt in enumerate(prompts)
        ]
        return [prompt.prompt for prompt in prompts], [prompt.negative for prompt in prompts], seeds

    def steps(self, interrupted: Callable[[], bool], series: Series | None = None) -> Iterator[StepRecord]:
        """Train by itself, writing the trace and the checkpoints; ``series`` is as for `training_loop`."""
        return answer_requests(self.loop(interrupted, series), self.answer)

    def loop(
        self, interrupted: Callable[[], bool], series: Series | None = None
    ) -> Generator[StepRecord | Request, None, None]:
        """Train as `steps` does, and yield each request too, which `answer` answers by a forward pass of its own."""
        config = self.config

        def all_series(step: int, watch: Stopwatch) -> Mapping[str, Any]:
            return {**self.score_samples(step, watch, interrupted), **(series(step, watch) if series else {})}

        with TraceFile(self.folder / TRACE, self.learner.trace.header) as file:
            yield from training_loop(
                self.learner,
                rule=self.rule,
                log=file.append,
                save=lambda: self.save(config.checkpoints_total_limit),
                interrupted=interrupted,
                series=all_series,
            )

    def answer(self, request: Request) -> None:
        """Answer a request of `loop` by a forward pass of its own."""
        if isinstance(request, GradientRequest):
            self.learner.leave_gradient(self.training_losses, request)
        else:
            self.processes.call_for_pass("measure")
            request.losses = self.probe()

    def follow(self, interrupted: Callable[[], bool]) -> dict[str, Any]:
        """Take part as one of several processes that is not the main one; return what that one ends its calls with.

        What is measured and generated here is dropped: the main process needs the parts of the base model alone.
        """
        works: dict[str, Callable[..., Any]] = {
            "release": self.release_encoders,
            "update": partial(self.learner.update, self.training_losses),
            "measure": self.probe,
            "sample": partial(sample, self.backbone),
            "ask": lambda: self.processes.any(interrupted(), self.learner.device),
        }
        return self.processes.serve(works)

    def save(self, keep: int | None) -> None:
        """Write a checkpoint; of the older ones, leave the ``keep`` newest."""
        facts = {"config": self.config.to_dict(), "pictures": digest_of(self.concept), "base": self.backbone.digest}
        facts["class_images"] = digest_of_classes(self.classes)
        self.learner.checkpoint(**facts).write(self.folder, keep)

    def save_on_request(self, step: StepRecord) -> None:
        """Write a checkpoint if the folder holds the file `SAVE_REQUEST`, and remove that file."""
        request = self.folder / SAVE_REQUEST
        if request.exists():
            if step.verdict.reason is not Reason.NON_FINITE:
                self.save(self.config.checkpoints_total_limit)
            request.unlink(missing_ok=True)

    def generate_samples(self, step: int, interrupted: Callable[[], bool] = lambda: False) -> list[Path]:
        """Return the paths of the sample images of ``step``, generated unless the folder has them all.

        Raises:
            Abandoned: ``interrupted`` returned True.
        """
        config, samples = self.config, self.folder / SAMPLES
        prompts, negatives, seeds = self.sample_texts
        samples.mkdir(exist_ok=True)
        rows = [
            {"prompt": prompt, "seed": seed, **({"negative_prompt": negative} if negative else {})}
            for prompt, negative, seed in zip(prompts, negatives, seeds, strict=True)
        ]
        write_json(samples / SAMPLE_PROMPTS, rows)
        return sample_into(
            samples / step_name(step),
            self.backbone,
            prompts,
            seeds,
            size=config.resolution,
            steps=config.num_inference_steps,
            guidance=config.guidance_scale,
            scheduler=config.validation_scheduler,
            negatives=negatives,
            interrupted=interrupted,
            sampler=sampler_of(self.processes),
        )

    def score_samples(
        self, step: int, watch: Stopwatch, interrupted: Callable[[], bool] = lambda: False
    ) -> dict[str, float]:
        """Return the metric "clip_image" of ``step``, where the best step is judged by CLIP and samples are due.

        It is the mean cosine of all pairs of a sample image and an instance image.

        Raises:
            Abandoned: ``interrupted`` returned True.

        Source: Section 4.1, the CLIP score with which DVAR is compared.
        """
        config = self.config
        due = step % config.validation_steps == 0 or step == config.max_train_steps
        if not self.clip or config.best_by != "clip" or not due:
            return {}
        with watch("samples"):
            samples = [Image.open(regular_file(path)) for path in self.generate_samples(step, interrupted)]
            cosines = self.clip.embed_images(samples) @ self.clip.embed_images(self.concept.images).T
        return {"clip_image": float(cosines.mean())}

    def finish(self, verdict: Verdict) -> TrainingResult:
        """Write the exports and, last of all, result.json; return how the run ended.

        Raises:
            NonFiniteLoss: There is nothing finite to export.
        """
        config, learner = self.config, self.learner
        only_best = config.keep == "best" or verdict.reason is Reason.NON_FINITE
        if only_best:
            if not np.isfinite(learner.trace.values).any():
                raise NonFiniteLoss(
                    "no evaluation was finite, so nothing is exported: try --mixed_precision no or another model"
                )
            self.method.load(learner.best)
        exported_step = learner.best_step if only_best else learner.trace.last_step
        result = replace(self.result(verdict), weights=self._export(self.method.state, exported_step))
        best_weights = result.weights
        if exported_step != learner.best_step and config.keep != "last":
            best_weights = self._export(learner.best, learner.best_step, name_step=True)
        of_any_step = {path for written in result.weights for path in find_steps_of(written)}
        for path in of_any_step - {*result.weights, *best_weights}:
            path.unlink()
        names = [path.name for path in result.weights]
        write_model_card(self.folder, config, verdict, self.generate_samples(exported_step), names, self.backbone.title)
        facts = {
            "verdict": verdict.to_json(),
            "stopped": verdict.stop and verdict.reason in CONDITION_REASONS,
            "steps": result.steps,
            "exported_step": exported_step,
            "best_step": result.best_step,
            "best_by": learner.best_by,
            "seconds": result.seconds,
            "memory": {"peak": peak_memory(self.backbone.device)},
            "arithmetic": describe_arithmetic(self.backbone.device, config.mixed_precision),
            "placeholder": config.placeholder_token,
            "weights": names,
            "best_weights": [path.name for path in best_weights],
            "base_sha256": self.backbone.digest,
            "family": self.backbone.title,
        }
        write_json(self.folder / RESULT, facts)
        return result

    def result(self, verdict: Verdict) -> TrainingResult:
        """Return the result of the run as it is now, without weights."""
        trace = self.learner.trace
        seconds = {name: float(trace.metric(f"seconds.{name}")[1].sum()) for name in ("train", "probe", "other")}
        return TrainingResult(self.folder, verdict, trace.last_step, self.learner.best_step, seconds)

    def draw(self, examples: Examples, stream: str, step: int, first: int, count: int) -> Draws:
        """Return the draws of samples ``first`` to ``first + count - 1`` of a step of a stream, by the run's seed."""
        draws = draw(
            examples,
            timesteps=len(self.schedule),
            density=self.density,
            seed=self.config.seed,
            stream=stream,
            step=step,
            first=first,
            count=count,
            noise_offset=0.0 if stream == "held" else self.config.noise_offset,
            caption_dropout=self.config.caption_dropout if stream == "train" else 0.0,
            empty_caption=self.empty_caption,
        )
        return draws.to(self.backbone.device)

    def draw_held(self, count: int) -> tuple[Draws, ...]:
        """Return ``count`` held draws without a mask: one batch of each size of images, every image being as likely.

        Where timesteps are stratified, the batch of each size has strata of its own.
        """
        examples = self.examples
        if isinstance(examples, Bucketed):
            chosen = [examples.choose_bucket(self.config.seed, "held", 0, index) for index in range(count)]
            batches = [
                reduce(Draws.joined, [self.draw(bucket, "held", 0, index, 1) for index in places])
                for bucket in examples.buckets
                if (places := [index for index, other in enumerate(chosen) if other is bucket])
            ]
        else:
            batches = [self.draw(examples, "held", 0, 0, count)]
        if self.config.eval_timesteps == "stratified":
            batches = [self.stratify(batch, "held") for batch in batches]
        return tuple(replace(batch, mask=None) for batch in batches)

    def stratify(self, draws: Draws, stream: str) -> Draws:
        """Return ``draws`` with one timestep from each of as many equal parts of the schedule, in rising order."""
        strata = generator(self.config.seed, f"{stream}/strata")
        timesteps = draw_stratified_timesteps(len(draws.timesteps), len(self.schedule), strata)
        return replace(draws, timesteps=timesteps.to(draws.timesteps.device))

    def training_losses(self, step: int, first: int, count: int) -> Tensor:
        """Return the losses of these samples of a step, float32 [count]."""
        parts = self.training_draws(step, first, count)
        return self.weigh(parts, [self.losses(part) for part in parts])

    def training_draws(self, step: int, first: int, count: int) -> tuple[Draws, ...]:
        """Return the draws of these samples of a step: one batch of each size of images.

        With a prior, those of as many class images follow the instance images'.
        """
        draws = self.draw(self.examples, "train", step, first, count)
        if self.prior is None:
            return (draws,)
        classes = self.draw(self.prior, "prior", step, first, count)
        return (draws.joined(classes),) if classes.noise.shape == draws.noise.shape else (draws, classes)

    def weigh(self, parts: Sequence[Draws], losses: Sequence[Tensor]) -> Tensor:
        """Return the training losses, float32 [count], from the losses of what `training_draws` returned.

        Each is multiplied by what its timestep weighs in training. With a prior, the loss of a class image is added to
        each, times the prior's weight.
        """
        weighted = torch.cat(list(losses))
        if self.weights is not None:
            timesteps = torch.cat([part.timesteps for part in parts])
            weighted = weighted * self.weights.to(weighted.device)[timesteps]
        if self.prior is None:
            return weighted
        instance_losses, class_losses = weighted.chunk(2)
        return instance_losses + self.config.effective_prior_weight * class_losses

    def held_losses(self, held: Sequence[Draws]) -> Tensor:
        """Return the losses of the held draws, those of each size in batches of at most `HELD_PIXELS`, float32 [B]."""
        count = max(1, HELD_PIXELS // self.config.resolution**2)
        return torch.cat([self.losses(batch) for part in held for batch in part.split(count)])

    def losses(self, draws: Draws) -> Tensor:
        """Return the losses of these draws, float32 [B]."""
        return denoising_loss(self.backbone.predict, draws, self.schedule)

    def _complete_last_step(self, trace: Trace) -> None:
        """Generate the samples and the score of the last step of ``trace``, where its run ended before them."""
        *earlier, last = trace.records
        if last["step"] % self.config.validation_steps == 0:
            self.generate_samples(last["step"])
        scores = self.score_samples(last["step"], Stopwatch())
        if scores and not scores.keys() <= last.keys():
            self.learner.trace = Trace(trace.header)
            for record in (*earlier, {**last, **scores}):
                self.learner.trace.record(**record)
            self.learner.trace.write(self.folder / TRACE)
            self.learner.keep_best()

    def _export(self, state: Mapping[str, Tensor], step: int, *, name_step: bool = False) -> tuple[Path, ...]:
        """Write the weight files of ``state``, with the step in their names where asked; return their paths."""
        paths, metadata = [], {**provenance(self.config, self.backbone.digest, step), **self.method.metadata}
        for name, tensors in split_by_token(self.method.files(state)).items():
            paths.append(self.folder / (at_step(name, step) if name_step else name))
            write_weights(paths[-1], tensors, metadata)
        return tuple(paths)


def _cut_trace(path: Path, checkpoint: Checkpoint) -> None:
    """Write the trace of ``checkpoint`` to ``path``; keep the later lines beside it, which the rerun must repeat."""
    lines = read_content(path).splitlines(keepends=True) if path.exists() else []
    if later := lines[1 + len(checkpoint.trace) :]:
        write_atomically(path.with_name(f"{path.name}.cut-{checkpoint.step}"), b"".join(later))
    checkpoint.trace.write(path)


def write_config(folder: Path, config: TrainingConfig) -> None:
    """Write the config of a run, with the versions of what it runs on, into its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG, {**config.to_dict(), "versions": _versions()})


def _versions() -> dict[str, str]:
    """Return the versions of Python, dvar and the packages that training depends on."""
    packages = ("torch", "diffusers", "transformers", "peft", "safetensors", "numpy")
    return {"dvar": __version__, "python": platform.python_version(), **{name: version(name) for name in packages}}
