"""The session of a launched script: what the additions to its training loop call."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dvar.errors import DvarError, RefusedInput, describe_error
from dvar.launch.config import TRACE, LaunchConfig, output_problems, trace_problems
from dvar.stopping.trace import Trace

if TYPE_CHECKING:
    from dvar.launch.held import HeldItems
    from dvar.launch.judge import LaunchJudge, Measurement
    from dvar.launch.keep_best import BestWeights
    from dvar.launch.loops import TrainingLoop
    from dvar.stopping.verdict import Verdict

# This module imports torch and accelerate only once a training loop has begun: by then the script has imported them,
# after whatever it sets first.


@dataclass
class RunningLoop:
    """A training loop that is being measured, from its first batch on.

    Attributes:
        loop: The loop in the source.
        accelerator: The accelerator of the script.
        settings: The script's ``args``; None where it has none.
        first: Number of updates before the first batch: that of the checkpoint when the script resumes.
        updates: Number of updates so far.
        seconds: Time since the last record, by what it was spent on.
        since: When the last measurement ended.
    """

    loop: TrainingLoop
    accelerator: Any
    settings: Any
    first: int
    updates: int
    seconds: dict[str, float] = field(default_factory=dict)
    since: float = field(default_factory=time.perf_counter)


@dataclass(frozen=True)
class LaunchResult:
    """The result of a launched script.

    Attributes:
        verdict: The last verdict.
        trace: The file of the trace.
        best: The folder with the weights of the best step; None where they are not kept.
    """

    verdict: Verdict
    trace: Path
    best: Path | None


class LaunchSession:
    """The probe of a launched script, and its stop.

    Only the first training loop that runs is measured. Whatever goes wrong in here is reported once and switches the
    probe off, on all processes or on none: the others would wait for the held losses of one that has it off. The script
    goes on. What the main process does alone leaves the probe on if it fails.

    Args:
        config: The settings of `dvar launch`.
        script: The script.
        loops: The instrumented loops by their keys; more may come as the script imports its modules.
        report: Called with each line for the user, on the main process.

    Attributes:
        measuring: Whether the batch in the script's hands is a held one.
        verdict: The last verdict; None before the first.
        trace_path: The file of the trace, once it is known.
        best: The weights of the best step, where they are kept.
    """

    def __init__(
        self,
        config: LaunchConfig,
        script: Path,
        loops: dict[str, TrainingLoop],
        report: Callable[[str], None],
    ) -> None:
        self.config, self.script, self.loops, self._report = config, script, loops, report
        self.measuring = False
        self.verdict: Verdict | None = None
        self.trace_path: Path | None = None
        self.best: BestWeights | None = None
        self._folder = Path.cwd()  # the script may change to another
        self._running: RunningLoop | None = None
        self._accelerator: Any = None
        self._active = True
        self._passed_backward = False
        self._idle = True
        self._judge: LaunchJudge | None = None
        self._held: HeldItems | None = None
        self._whole = False
        self._judged_step, self._recorded = -1, False
        self._other_items: dict[str, Any] = {}
        self._loss: Any = None
        self._error: Exception | None = None
        self._fault: Exception | None = None
        self._failures: set[str] = set()

    # --- what the additions call -----------------------------------------------------------------------------------

    def batches(
        self,
        key: str,
        counted: bool,
        iterable: tuple[Any, ...],
        counter: Callable[[], Any],
        accelerator: Callable[[], Any],
        settings: Callable[[], Any],
    ) -> Iterator[Any]:
        """Yield the batches of a training loop, and the held ones where a measurement is due.

        Args:
            key: The key of the loop.
            counted: Whether the loop iterates over `enumerate`.
            iterable: The arguments of `enumerate`, or what the loop iterates over.
            counter: Returns the script's number of updates.
            accelerator: Returns the script's accelerator.
            settings: Returns the script's ``args``.
        """
        source: Iterable[Any] = iterable[0]
        position = iterable[1] if len(iterable) > 1 else 0
        self._idle = True
        if self.stopped(key):
            return
        running = self._begin_loop(key, source, counter, accelerator, settings)
        batches = iter(source)
        while True:
            if running and self._is_due(running):
                yield from self._measure(running, source, position if counted else None)
            if self.stopped(key):
                return
            self._passed_backward = self._idle = False
            try:
                # No variable holds the batch: the script decides how long it lives.
                if counted:
                    yield position, next(batches)
                else:
                    yield next(batches)
            except StopIteration:
                return
            position += 1
            if running and self._passed_backward:
                running.updates += bool(running.accelerator.gradient_state.sync_gradients)

    def take(self, loss: Any) -> None:
        """Take the loss that the script computed on a held batch."""
        self._loss = loss.detach()

    def next(self, place: str, iterator: Iterator[Any]) -> Any:
        """Return the next item of an iterator that the loop reads beside its batches; a held batch gets the first one.

        Args:
            place: Where the script calls it.
            iterator: The iterator.
        """
        from dvar.launch.held import copy_item

        if self.measuring:
            return copy_item(self._other_items[place])
        item = next(iterator)
        if self._active and place not in self._other_items:
            try:
                self._other_items[place] = copy_item(item)
            except Exception as error:
                self._fault = error.with_traceback(None)  # for the next measurement, which all processes share
        return item

    def count(self) -> None:
        """Note that a batch of training has had its backward pass."""
        self._passed_backward = True

    def absorb(self) -> bool:
        """Return whether the exception that is being handled came from a held batch, and must not end the script."""
        error = sys.exc_info()[1]
        if not self.measuring or not isinstance(error, Exception):
            return False
        self._error = error.with_traceback(None)  # its frames hold tensors
        return True

    def stopped(self, key: str) -> bool:
        """Return whether the rule has stopped this training loop."""
        running = self._running
        return (
            self._active
            and running is not None
            and running.loop.key == key
            and bool(self.verdict and self.verdict.stop)
        )

    def idle(self, key: str) -> bool:
        """Return whether the rule had stopped this training loop before an epoch had a batch.

        What the script does at the end of an epoch, such as a mean over its losses, may then be impossible.
        """
        return self._idle and self.stopped(key)

    def finish(self) -> LaunchResult | None:
        """Save the best weights, if they are kept, and return what happened.

        Returns:
            None where nothing was measured, and on all processes but the main one.
        """
        running, best = self._running, None
        if (
            running is None
            or self.verdict is None
            or self.trace_path is None
            or not running.accelerator.is_main_process
        ):
            return None
        if self.best:
            try:
                best = self.best.save()
            except Exception as error:  # what the script has saved itself matters more
                self.print_message(f"the best weights could not be saved: {describe_error(error)}")
        return LaunchResult(self.verdict, self.trace_path, best)

    # --- the loop ----------------------------------------------------------------------------------------------------

    def _begin_loop(
        self,
        key: str,
        source: Any,
        counter: Callable[[], Any],
        accelerator: Callable[[], Any],
        settings: Callable[[], Any],
    ) -> RunningLoop | None:
        """Return the loop if it is to be measured; its first epoch opens the trace."""
        if not self._active or self._running:
            return self._running if self._running and self._running.loop.key == key else None
        try:
            from dvar.launch.held import find_loader, held_problems

            loader = find_loader(source)
            if problems := held_problems(loader, self.config.dvar_held):
                raise RefusedInput(problems)
            first = _read_value(counter)
            step = first if isinstance(first, int) and first > 0 else 0
            self._accelerator = accelerator()
            running = RunningLoop(self.loops[key], self._accelerator, _read_value(settings), step, step)
            self._prepare(running, loader)
            self._begin_trace(running, loader)
        except RefusedInput:
            raise
        except Exception as error:
            self._switch_off(error)
            return None
        self._running = running
        running.since = time.perf_counter()
        return running

    def _prepare(self, running: RunningLoop, loader: Any) -> None:
        """Open the trace and draw the held samples; what one process cannot do ends it on all of them.

        Raises:
            RefusedInput: The trace, the weights or the dataset are not what they must be.
            DvarError: A fault of this process or of another.
        """
        from dvar.launch.judge import Measurement

        error = ""
        try:
            self._open(running)
            self._draw(running, loader)
        except RefusedInput:
            raise
        except Exception as fault:
            error = describe_error(fault)
        if error := Measurement((), error).together(running.accelerator).error:
            raise DvarError(error)

    def _open(self, running: RunningLoop) -> None:
        from dvar.launch.judge import LaunchJudge

        config, header = self.config, self.config.header(self.script.name)
        folder = getattr(running.settings, "output_dir", None) or "."
        self.trace_path = self._folder / (config.dvar_trace or Path(folder) / TRACE)
        problems = output_problems("dvar_trace", self.trace_path) or trace_problems(self.trace_path, header)
        if problems:
            raise RefusedInput(problems)
        if running.first and self.trace_path.exists():
            header = Trace.read(self.trace_path).header  # the rule may be another than in the part before
        if config.dvar_keep_best:
            from dvar.launch.keep_best import BestWeights

            self.best = BestWeights(running.accelerator, self.trace_path.parent, resumed=running.first > 0)
        self._judge = LaunchJudge(
            config.rule, self.trace_path, config.dvar_every, header, running.accelerator, self.print_message
        )
        self._whole = running.loop.by_position

    def _begin_trace(self, running: RunningLoop, loader: Any) -> None:
        assert self._judge is not None
        self.verdict = self._judge.begin(running.first)
        self.print_message(
            f"{running.loop.path.name}: the loop of line {running.loop.line} over {len(loader.dataset)} samples of "
            f"{type(loader.dataset).__name__}, with the loss of line {running.loop.loss_line}; L_det on "
            f"{self._describe_held(running)} every {self.config.dvar_every} steps, judged by {self.config.rule!r}, "
            f"recorded in {self.trace_path}"
        )

    def _draw(self, running: RunningLoop, loader: Any) -> None:
        from dvar.launch.held import draw_held_items

        share = -(-self.config.held // running.accelerator.num_processes)
        self._held = draw_held_items(loader, share, self.config.dvar_seed, whole=self._whole)

    def _describe_held(self, running: RunningLoop) -> str:
        assert self._held is not None
        count = self._count(running)
        return f"{count} held batches" if self._whole else f"{count} held samples"

    def _count(self, running: RunningLoop) -> int:
        """Return the number of held batches of all processes."""
        assert self._held is not None
        processes: int = running.accelerator.num_processes
        return processes * -(-self.config.held // (processes * self._held.size))

    def _is_due(self, running: RunningLoop) -> bool:
        step = running.updates
        # A resumed script may still be skipping batches, and other iterators have no item yet: one update comes first.
        ready = step > running.first or not (running.first or running.loop.iterators)
        return self._active and ready and step != self._judged_step and step % self.config.dvar_every == 0

    # --- a measurement -----------------------------------------------------------------------------------------------

    def _measure(self, running: RunningLoop, loader: Any, position: int | None) -> Iterator[Any]:
        """Yield the held batches, then record and judge the losses that the script computed on them.

        Args:
            running: The loop.
            loader: What it iterates over.
            position: The number of the next batch; None where the loop does not count.
        """
        begin, step = time.perf_counter(), running.updates
        if step > running.first:
            running.seconds["train"] = begin - running.since
        self._judged_step = step
        try:
            measurement = yield from self._yield_held(running, loader, position)
            if measurement.error and not self._whole and not self._recorded:
                # Some scripts need as many samples as they have in a batch.
                self._whole, self._held = True, None
                measurement = yield from self._yield_held(running, loader, position)
            if measurement.error:
                raise DvarError(measurement.error)
            running.seconds["probe"] = time.perf_counter() - begin
            self._record(running, step, measurement.losses)
        except Exception as error:
            self._switch_off(error)
        running.since = time.perf_counter()

    def _yield_held(self, running: RunningLoop, loader: Any, position: int | None) -> Generator[Any, None, Measurement]:
        """Yield the held batches of this process and return the measurement of all: the error of one is that of all."""
        from dvar.launch.held import find_loader
        from dvar.launch.judge import Measurement

        try:
            if self._held is None:
                self._draw(running, find_loader(loader))
            part = Measurement((yield from self._yield_samples(running, position)))
        except Exception as error:
            part = Measurement((), describe_error(error))
        return part.together(running.accelerator)

    def _yield_samples(self, running: RunningLoop, position: int | None) -> Generator[Any, None, tuple[float, ...]]:
        """Yield the held batches of this process and return the losses that the script computed on them.

        Raises:
            DvarError: The script computed no loss on one of them.
        """
        from dvar.launch.held import sample_seed
        from dvar.launch.measurement import measurement_scope

        assert self._held is not None
        if self._fault:
            raise self._fault
        accelerator, samples = running.accelerator, self._count(running)
        losses: list[Any] = []
        self._error = None
        for sample in range(accelerator.process_index, samples, accelerator.num_processes):
            index, self._loss = sample // accelerator.num_processes, None
            seed = sample_seed(self.config.dvar_seed, sample)
            with measurement_scope(accelerator, running.settings, seed, sample, samples):
                batch = self._held.copy(index)
                self.measuring = True
                try:
                    if position is not None and running.loop.by_position:
                        position = index % len(self._held.items)
                    # Elsewhere the number is that of the next batch: a resumed script skips those of lower numbers.
                    yield batch if position is None else (position, batch)
                finally:
                    self.measuring = False
            if self._loss is None:
                error = describe_error(self._error) if self._error else "the loop went on without backward"
                raise DvarError(f"the script computed no loss on a held batch ({error})")
            if self._loss.element_size() < 4 and not losses and not self._recorded:
                self.print_message(
                    f"the script computes its loss in {self._loss.dtype}, of which a rule sees three digits at most: "
                    "let it convert prediction and target with `.float()`"
                )
            losses.append(self._loss.float().mean())
        return tuple(float(loss) for loss in losses)

    def _record(self, running: RunningLoop, step: int, losses: tuple[float, ...]) -> None:
        assert self._judge is not None
        self.verdict = self._judge.judge(step, losses, running.seconds)
        running.seconds, self._recorded = {}, True
        with self._report_failure("L_det could not be logged"):
            self._judge.log(step, losses, self.verdict)
        if self.best:
            with self._report_failure("the best weights could not be copied"):
                self.best.consider(step, sum(losses) / len(losses))
        if self.verdict.stop:
            self.print_message(self.verdict.sentence)

    # --- messages ----------------------------------------------------------------------------------------------------

    def print_message(self, line: str) -> None:
        """Print a line for the user, on the main process, if that is possible."""
        if self._accelerator is None or self._accelerator.is_main_process:
            with contextlib.suppress(Exception):  # such as a pipe that nobody reads any more
                self._report(line)

    @contextlib.contextmanager
    def _report_failure(self, what: str) -> Iterator[None]:
        """Report an error as a line that begins with ``what``, at its first time, and go on."""
        try:
            yield
        except Exception as error:
            if what not in self._failures:
                self._failures.add(what)
                self.print_message(": ".join((what, describe_error(error))))

    def _switch_off(self, error: Exception) -> None:
        self._active, self._held = False, None
        self.print_message(f"the probe is switched off, and training goes on without a stop: {describe_error(error)}")


def _read_value(value: Callable[[], Any]) -> Any:
    """Return what the script has under a name; None where it has nothing yet."""
    try:
        return value()
    except (NameError, AttributeError, LookupError, TypeError):
        return None
