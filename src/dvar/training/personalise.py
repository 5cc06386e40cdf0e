"""A whole run from door to door: what is refused, the model, the loop, and how it ends or goes on."""

from __future__ import annotations

import shutil
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType

import torch

from dvar.config.training import AnyConfig, restored, written
from dvar.diffusion.backbone import Backbone
from dvar.diffusion.sampling import Abandoned
from dvar.diffusion.tokens import model_path
from dvar.errors import CheckpointError, OutOfResources
from dvar.stopping.diagnosis import Reason
from dvar.training.checkpoint import Checkpoint, latest
from dvar.training.class_images import with_pictures
from dvar.training.dataset import Concept, read_concept
from dvar.training.loop import StepRecord
from dvar.training.memory_estimate import needed
from dvar.training.placeholder_tokens import tokenizer_of
from dvar.training.run import TrainingResult, TrainingRun, assembled, digest_of
from dvar.training.run_layout import RESULT, WRITTEN
from dvar.training.token_initializer import clip_of, first_words
from dvar.training.trackers import Tracker

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


def personalise(
    config: AnyConfig,
    consumers: Sequence[Callable[[StepRecord], None]] = (),
    *,
    concept: Concept | None = None,
    tell: Callable[[str], None] | None = None,
) -> TrainingResult:
    """Learn the subject of the pictures that ``config`` names, by the method of its class; leave the run in its folder.

    Training goes on until DVAR or the cap stops it.
    ``consumers`` are called with each `StepRecord`; ``concept`` is what `read_concept` returned, where that was called
    before.  ``tell`` is given a line on the memory that the run will take, before its first step; without it none is
    estimated.  SIGTERM or SIGINT ends the run after the step under way, between two forward passes of its update, or
    between two denoising steps of its samples, with a checkpoint to go on from and the verdict "interrupted"; nothing
    is exported then.  A loss that is not finite ends it too, and the best step before it is what is exported.

    Raises: RefusedInput with every problem at once, before a model loads; ModelError; CheckpointError when there is
    nothing to resume from, or only a run under other settings, pictures or weights; OutOfResources when memory or disk
    ran out; NonFiniteLoss when no evaluation was finite.
    Source: Sections 3.2, 3.3 and 4.1.
    """
    with _told_in_a_line(config):
        return _carried_out(config, consumers, concept, tell)


def _carried_out(
    config: AnyConfig,
    consumers: Sequence[Callable[[StepRecord], None]],
    concept: Concept | None,
    tell: Callable[[str], None] | None,
) -> TrainingResult:
    job, checkpoint = prepared(config, concept)
    config = job.config
    job.open(checkpoint)
    if tell:
        _tell_memory(job, tell)
    verdict = job.criterion(job.learner.trace)
    with interruption() as interrupted, closing(Tracker(config.report_to, job.folder, asdict(config))) as tracker:
        for step in job.steps(interrupted):
            verdict = step.verdict
            tracker(step)
            for consumer in consumers:
                consumer(step)
            if step.step % config.validation_steps == 0 and not verdict.stop:
                try:
                    job.draw_samples(step.step, interrupted)
                except Abandoned:
                    verdict = replace(verdict, stop=True, reason=Reason.INTERRUPTED, step=step.step)
                    job.save(config.checkpoints_total_limit)
                    break
        if interrupted() and not verdict.stop:  # within an update, which was given up
            verdict = replace(verdict, stop=True, reason=Reason.INTERRUPTED)
    return job.result(verdict) if verdict.reason is Reason.INTERRUPTED else job.finish(verdict)


def prepared(config: AnyConfig, concept: Concept | None = None) -> tuple[TrainingRun, Checkpoint | None]:
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
    if config.mixed_precision == "fp16" and backbone.device.type == "cpu":
        warnings.warn(
            "fp16 on a CPU takes many times as long as float32: --mixed_precision bf16 does not", stacklevel=2
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
    return TrainingRun(folder, config, concept, classes, backbone, assembled(config, backbone), clip), checkpoint


def _tell_memory(job: TrainingRun, tell: Callable[[str], None]) -> None:
    try:
        job.memory = needed(job)
    except Exception as error:  # whatever a build of PyTorch raises: an estimate stops no run
        warnings.warn(f"the memory could not be estimated ({str(error).splitlines()[0]})", stacklevel=2)
    else:
        tell(str(job.memory))


def _clear(folder: Path, checkpoint: Checkpoint | None) -> None:
    """Remove from the folder what stands in the way: the result of a run that goes on, or all of another run."""
    _remove(folder, (RESULT,) if checkpoint else WRITTEN)


def _to_resume(folder: Path, config: AnyConfig, concept: Concept) -> Checkpoint:
    """The checkpoint that the settings name, if it was made under these settings and pictures."""
    name = str(config.resume_from_checkpoint)
    checkpoint = latest(folder) if name == "latest" else Checkpoint.read(folder / Path(name).name)
    now, then = written(config), written(restored(checkpoint.facts["config"]))
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
    if checkpoint.facts["pictures"] != digest_of(concept):
        differing.append("the pictures or their captions changed")
    if differing:
        said = f"checkpoint-{checkpoint.step} was made under other settings ({'; '.join(differing)})"
        raised = " (a higher cap alone is taken with --extend)" if higher and not bends and not config.extend else ""
        raise CheckpointError(f"{said}: resume with those{raised}, or start another --output_dir")
    return checkpoint


def _remove(folder: Path, names: Sequence[str]) -> None:
    for path in [found for name in names for found in folder.glob(name)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


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
