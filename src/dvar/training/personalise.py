"""Personalise a model: a whole run, from its config to its result."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType

import torch

from dvar.config.training import FREE_FIELDS, TrainingConfig
from dvar.diffusion.backbone import Backbone, load_backbone
from dvar.diffusion.devices import float32_arithmetic
from dvar.diffusion.sampling import Abandoned, sample
from dvar.diffusion.source import ModelSource
from dvar.errors import CheckpointError, ModelError, OutOfResources, RefusedInput
from dvar.files import remove
from dvar.locks import lock_folder
from dvar.stopping.diagnosis import Reason
from dvar.stopping.rules import CONDITION_REASONS
from dvar.stopping.verdict import Verdict
from dvar.training.checkpoint import Checkpoint, latest_checkpoint, validate_run_facts
from dvar.training.class_images import generate_class_images
from dvar.training.dataset import Concept
from dvar.training.digests import digest_of, digest_of_classes
from dvar.training.loop import StepRecord
from dvar.training.methods.registry import PersonalisationMethod, build_method, config_from_dict
from dvar.training.preflight import preflight
from dvar.training.processes import ALONE, Processes, launched_processes
from dvar.training.publish import push_run, repository_of
from dvar.training.requests import Request, outcome_of
from dvar.training.run import TrainingResult, TrainingRun, write_config
from dvar.training.run_layout import (
    CLASS_IMAGES,
    CONFIG,
    RESULT,
    checkpoint_name,
    checkpoint_paths,
    find_written,
    problems,
)
from dvar.training.shard_fit import is_sharded
from dvar.training.sharding import shard_backbone
from dvar.training.token_initializer import choose_initializer_tokens, load_clip
from dvar.training.trackers import Tracker

LoadBase = Callable[[TrainingConfig], Backbone]
Interruption = Callable[[], AbstractContextManager[Callable[[], bool]]]
"""A scope whose value says whether the run is asked to stop."""


def personalise(
    config: TrainingConfig,
    consumers: Sequence[Callable[[StepRecord], None]] = (),
    *,
    concept: Concept | None = None,
    load: LoadBase | None = None,
) -> TrainingResult:
    """Learn the concept of ``config`` by the method of its class, and write the run into its folder.

    Training goes on until DVAR or the cap stops it. SIGTERM, SIGINT or SIGHUP ends the run after the step in progress,
    between two forward passes of its update, or between two denoising steps of its samples, with a checkpoint to resume
    from and the verdict "interrupted"; nothing is exported then. A loss that is not finite ends it too, and the best
    step before it is exported.

    Where a launcher has started several processes, they share the samples of each step; the main one alone measures,
    judges and writes, and returns the whole result. Where it asks for FSDP, each holds a part of the base model alone,
    and all make each forward pass together.

    Args:
        config: The config of the run.
        consumers: Each is called with every `StepRecord`.
        concept: What `preflight` returned for this config; by default it is called here.
        load: Loads the base model of a config, for callers that hold one already; by default `load_base_model`.

    Returns:
        How the run ended.

    Raises:
        RefusedInput: Something is wrong with the input, or another process writes into the folder; every problem is
            named, before a model is loaded.
        ModelError: A model cannot be loaded.
        CheckpointError: There is no checkpoint to resume from, or only one of another config, concept or base model.
        OutOfResources: Memory or disk ran out.
        NonFiniteLoss: No evaluation was finite.
        ProcessLost: Another process that trains this run has ended.

    Source: Sections 3.2, 3.3 and 4.1.
    """
    arithmetic = float32_arithmetic(config.allow_tf32)
    with resource_errors(config), arithmetic, launched_processes() as processes:
        if not processes.is_main:
            return _follow(config, concept, load, processes)
        with lock_folder(Path(config.output_dir).expanduser()):
            run, checkpoint = prepare(config, concept, load, processes)
            training = train_run(run, checkpoint, consumers, interruption, owns_base=load is None)
            result = outcome_of(training, run.answer)
        processes.end_calls(verdict=result.verdict.to_json(), steps=result.steps, best_step=result.best_step)
        return result


def train_run(
    run: TrainingRun,
    checkpoint: Checkpoint | None,
    consumers: Sequence[Callable[[StepRecord], None]],
    interruption: Interruption,
    *,
    owns_base: bool = False,
) -> Generator[Request, None, TrainingResult]:
    """Train a run that has been prepared, to its end or to an interruption, and yield its requests.

    Args:
        run: The run.
        checkpoint: What it is resumed from, if anything.
        consumers: As for `personalise`.
        interruption: The scope in which it can be asked to stop.
        owns_base: Whether no other run uses its base model, of which it then gives up what it needs no more.
    """
    config = run.config
    run.open(checkpoint)
    if owns_base:
        run.processes.call("release")
        run.release_encoders()
    verdict = run.rule(run.learner.trace)
    if checkpoint and config.extend and verdict.stop and verdict.reason in CONDITION_REASONS:
        ended = f"the rule had ended this run at step {checkpoint.step}, and --extend raises the cap alone"
        remedy = "train into another --output_dir, under settings that stop later"
        warnings.warn(f"{ended}: {remedy}", stacklevel=2)
    tracker = Tracker(config.report_to, run.folder, config.to_dict())
    all_consumers: tuple[Callable[[StepRecord], None], ...] = (tracker, run.save_on_request, *consumers)
    with interruption() as interrupted, closing(tracker), closing(run.loop(interrupted)) as loop:
        for step in loop:
            if isinstance(step, Request):
                yield step
                continue
            verdict = step.verdict
            for consumer in all_consumers:
                consumer(step)
            if step.step % config.validation_steps == 0 and not verdict.stop:
                try:
                    run.generate_samples(step.step, interrupted)
                except Abandoned:
                    verdict = replace(verdict, stop=True, reason=Reason.INTERRUPTED, step=step.step)
                    run.save(config.checkpoints_total_limit)
                    break
        if interrupted() and not verdict.stop:  # within an update, which was abandoned
            verdict = replace(verdict, stop=True, reason=Reason.INTERRUPTED)
    if verdict.reason is Reason.INTERRUPTED:
        return run.result(verdict)
    result = run.finish(verdict)
    if config.push_to_hub:
        _push(run.folder, config)
    return result


def _follow(
    config: TrainingConfig, concept: Concept | None, load: LoadBase | None, processes: Processes
) -> TrainingResult:
    """Take part as one of several processes that is not the main one, in what that one has prepared."""
    concept = concept or preflight(config)
    backbone = _load_base(config, load, processes)
    prepared = processes.serve({})
    config = replace(config, initializer_token=prepared["initializer_token"])
    folder = Path(config.output_dir).expanduser()
    backbone, method = _build(config, backbone, processes)
    processes.serve({"sample": partial(sample, backbone)})
    classes = tuple(generate_class_images(config, concept.classes, backbone))  # which the main process has
    run = TrainingRun(folder, config, concept, classes, backbone, method, processes=processes)
    if prepared["checkpoint"] is not None:
        run.learner.restore(Checkpoint.read(folder / checkpoint_name(prepared["checkpoint"])))
    with interruption() as interrupted:
        end = run.follow(interrupted)
    return TrainingResult(folder, Verdict.from_json(end["verdict"]), end["steps"], end["best_step"], seconds={})


def prepare(
    config: TrainingConfig,
    concept: Concept | None = None,
    load: LoadBase | None = None,
    processes: Processes = ALONE,
) -> tuple[TrainingRun, Checkpoint | None]:
    """Return the run of ``config``, ready to be opened, and the checkpoint to resume it from.

    What is in its way is removed from its folder, and the initializer tokens and the class images that it needs are
    chosen and written there, with the config; nothing else of the run is written yet.

    Raises:
        DvarError: As `personalise`, before anything is removed.
    """
    folder = Path(config.output_dir).expanduser()
    concept = concept or preflight(config)
    if new_problems := problems(config):  # another process may have begun a run there since the check, and ended it
        raise RefusedInput(new_problems)
    checkpoint = _checkpoint_to_resume(folder, config, concept) if config.resume_from_checkpoint else None
    backbone = _load_base(config, load, processes)
    if checkpoint and (digest := checkpoint.facts["base"]) != backbone.digest:
        message = f"{checkpoint_name(checkpoint.step)} was made on another base model (its SHA-256 was {digest[:12]}..."
        remedy = "restore that one, or start another --output_dir"
        raise CheckpointError(f"{message} and is {backbone.digest[:12]}...): {remedy}")
    needs_clip = config.best_by == "clip" or (config.initializer.startswith("clip") and not checkpoint)
    clip = load_clip(config, backbone) if needs_clip else None
    if checkpoint:  # which holds the initializer token, where it was not given
        config = replace(config, initializer_token=checkpoint.facts["config"]["initializer_token"])
    else:
        for path in find_written(folder):
            if path.name != CONFIG:  # which says that the rest is a run's: it is there until the new one replaces it
                remove(path)
        write_config(folder, config)
        config = choose_initializer_tokens(config, concept, backbone, clip)
        write_config(folder, config)
    step = checkpoint.step if checkpoint else None
    processes.end_calls(initializer_token=config.initializer_token, checkpoint=step)
    backbone, method = _build(config, backbone, processes)
    classes = tuple(generate_class_images(config, concept.classes, backbone, processes))
    if checkpoint:
        digest = digest_of_classes(classes)
        if checkpoint.facts.get("class_images", digest) != digest:
            message = f"{checkpoint_name(checkpoint.step)} was made with other class images than those in {folder}"
            remedy = f"put them back, remove {folder / CLASS_IMAGES} to have them generated as before, or start another"
            raise CheckpointError(f"{message}: {remedy} --output_dir")
        remove(folder / RESULT)
    processes.end_calls()
    judge = clip if config.best_by == "clip" else None  # one that has chosen initializer tokens is not kept
    return TrainingRun(folder, config, concept, classes, backbone, method, judge, processes), checkpoint


def _load_base(config: TrainingConfig, load: LoadBase | None, processes: Processes) -> Backbone:
    """Return the base model of ``config``, left on the CPU where it will be sharded: it may not fit one GPU."""
    return (load or load_base_model)(replace(config, offload=config.offload or processes.sharded))


def _build(config: TrainingConfig, backbone: Backbone, processes: Processes) -> tuple[Backbone, PersonalisationMethod]:
    """Return a base model with the method of ``config`` put into it, sharded where its processes ask for it."""
    method = build_method(config, backbone)  # first, for what trains is not sharded
    return (shard_backbone(backbone, processes) if processes.sharded else backbone), method


def _push(folder: Path, config: TrainingConfig) -> None:
    """Push a finished run; a hub that refuses it takes nothing from the run."""
    try:
        push_run(folder, repository_of(config))
    except ModelError as error:
        warnings.warn(str(error), stacklevel=2)


def load_base_model(config: TrainingConfig) -> Backbone:
    """Return the base model of ``config``."""
    backbone = load_backbone(
        ModelSource.of(config),
        mixed_precision=config.mixed_precision,
        gradient_checkpointing=config.gradient_checkpointing,
        attention_slicing=config.attention_slicing,
        compile=config.compile,
        quantize=config.quantize,
        offload=config.offload,
    )
    if config.mixed_precision == "fp16" and backbone.device.type == "cpu":
        message = "fp16 on a CPU takes many times as long as float32: --mixed_precision bf16 does not"
        warnings.warn(message, stacklevel=2)
    return backbone


def _checkpoint_to_resume(folder: Path, config: TrainingConfig, concept: Concept) -> Checkpoint:
    """Return the checkpoint that ``config`` names.

    Raises:
        CheckpointError: It was made under another config or on other images.
    """
    name = str(config.resume_from_checkpoint)
    checkpoint = latest_checkpoint(folder) if name == "latest" else Checkpoint.read(folder / Path(name).name)
    validate_run_facts(checkpoint)
    current, saved = config.to_dict(), config_from_dict(checkpoint.facts["config"]).to_dict()
    # A schedule that bends towards the cap makes other steps under another cap, and so does a word that is frozen at a
    # part of it.
    constant = config.lr_scheduler.startswith("constant") and not config.pivot_step
    higher = config.max_train_steps > saved["max_train_steps"]
    free = FREE_FIELDS | ({"max_train_steps"} if config.extend and higher and constant else set())
    free |= {"initializer_token"} if config.initializer != "manual" else set()
    differences = [
        f"{key} was {saved.get(key)!r} and is {value!r}"
        for key, value in current.items()
        if key not in free and value != saved.get(key)
    ]
    if checkpoint.facts["pictures"] != digest_of(concept):
        differences.append("the images, their captions or how often each is drawn changed")
    if differences:
        message = f"{checkpoint_name(checkpoint.step)} was made under other settings ({'; '.join(differences)})"
        hint = " (a higher cap alone is accepted with --extend)" if higher and constant and not config.extend else ""
        raise CheckpointError(f"{message}: resume with those{hint}, or start another --output_dir")
    return checkpoint


@contextmanager
def resource_errors(config: TrainingConfig, *, packed: bool = False) -> Iterator[None]:
    """Turn errors of memory and disk into `OutOfResources`, with what to do about them, in a pack of runs too."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        sharded = is_sharded(os.environ)
        remedies = {
            "a smaller --pack": packed,
            "more processes": sharded,
            "--gradient_checkpointing": not config.gradient_checkpointing,
            "--mixed_precision bf16": config.mixed_precision == "no",
            "--quantize nf4": config.quantize == "no" and config.method != "custom-diffusion" and not sharded,
            "--offload": not config.offload and not sharded,
            "--attention_slicing": not config.attention_slicing,
            "--train_batch_size 1 with --gradient_accumulation_steps": config.train_batch_size > 1,
            "a smaller --eval_batch_size": config.eval_batch_size > 1,
        }
        useful = ", ".join(remedy for remedy, applies in remedies.items() if applies)
        raise OutOfResources(f"the memory does not suffice: try {useful or 'a lower --resolution'}") from error
    except OSError as error:
        message = f"{error.filename or config.output_dir} cannot be written or read ({error.strerror or error})"
        resumable = checkpoint_paths(Path(config.output_dir).expanduser())
        start = "go on with --resume_from_checkpoint latest" if resumable else "start the run again"
        remedy = f"make room or repair it, then {start}"
        raise OutOfResources(f"{message}: {remedy}") from error


@contextmanager
def interruption() -> Iterator[Callable[[], bool]]:
    """Yield whether SIGTERM, SIGINT or SIGHUP has asked to stop; a second signal interrupts at once.  Main thread only.

    Where SIGHUP is ignored, as under nohup, it stays so.
    """
    requested = threading.Event()

    def request(number: int, frame: FrameType | None) -> None:
        if requested.is_set():
            raise KeyboardInterrupt
        requested.set()

    numbers = [signal.SIGTERM, signal.SIGINT] if threading.current_thread() is threading.main_thread() else []
    if numbers and hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)  # a terminal that closes; Windows has none
    handlers = {number: signal.signal(number, request) for number in numbers}
    try:
        yield requested.is_set
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
