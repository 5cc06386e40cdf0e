"""Recorded runs: training past every way to stop, with all that any rule or figure asks of it measured on the way.

A run is recorded once for a method, a concept and a seed; ways to stop are read off it afterwards
(`dvar.recordings.archive` says what it leaves).  It is a run of the trainer like any other, only that nothing ends it
before its cap: its trace holds what `dvar train` under its config.json would hold, bit for bit.
"""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dvar.diffusion.objective import Draws, denoising_loss
from dvar.diffusion.randomness import generator
from dvar.errors import CheckpointError, DvarError, NonFiniteLoss, RefusedInput
from dvar.files import write_json
from dvar.recordings.archive import DONE, RESCORED, ROUNDS, SCORES, RecordedRun, digest
from dvar.recordings.image_metrics import Scorer
from dvar.recordings.protocol import DRIFT, FRESH, PROTOCOLS, STRATIFIED, UNSEEN
from dvar.recordings.restore import ANEW, SHEETS, WEIGHTS, sheet_at, weights_at, write_sheet
from dvar.recordings.score_samples import add_rounds, drawn, drawn_and_scored, scorer_of
from dvar.recordings.spec import FACTS, RecordingSpec, facts_of, shots
from dvar.stopping.diagnosis import Reason
from dvar.stopping.probe import PairedProbe, Probe, stratified_timesteps
from dvar.stopping.rules import Dvar, FixedSteps, Rule
from dvar.stopping.trace import Trace
from dvar.training.augmentation import encoded
from dvar.training.checkpoint import latest
from dvar.training.loop import StepRecord, Stopwatch
from dvar.training.personalise import interruption, prepared
from dvar.training.run import TrainingRun
from dvar.training.weight_files import write_weights

try:
    import fcntl
except ModuleNotFoundError:
    fcntl = None  # type: ignore[assignment]

FAILED = "failed.json"
SAMPLES = {STRATIFIED: 32, FRESH: 8, UNSEEN: 8, DRIFT: 8}
UNSEEN_PICTURES = 4


class Recorder:
    """All that is measured beside a run.  Called with a step, it returns the series that are due; at a scored step it
    also leaves pictures, scores and weights in the run's folder.

    It is made before the job is opened, while its model is still untouched; it never moves the model: flags, global
    random states and trainable weights are afterwards what they were.
    """

    def __init__(
        self, recording: RecordingSpec, job: TrainingRun, scorer: Scorer, rows: Sequence[dict[str, Any]] = ()
    ) -> None:
        self.job, self.scorer, self.folder = job, scorer, job.folder
        self.plan, self.scored = PROTOCOLS[recording.plan], set(recording.scored)
        self.shots = shots(recording, job.concept)
        self.steps = self.plan.sampling_steps or job.config.num_inference_steps
        self.rows = list(rows)
        texts = {text for part in self.shots.values() for text in part.texts}
        if long := [text for text in texts if len(scorer.clip.tokenizer(text).input_ids) > scorer.clip.length]:
            raise RefusedInput([f"the CLIP that scores reads {scorer.clip.length} tokens, too few for {long[0]!r}"])
        self._untouched = job.method.state
        self._series: dict[str, Callable[[int], dict[str, Any]]] = {}
        self._header: dict[str, dict[str, Any]] = {}
        self._hold(STRATIFIED, self._stratified())
        paired = PairedProbe(job.losses, self._frozen, self._fresh, job.backbone.modules, seed=job.config.seed)
        self._add(FRESH, lambda step: _pair(paired, step))
        self._header["frozen"] = self._header[FRESH]
        if recording.bundled:
            pictures = unseen_pictures(recording.concept)
            texts_of = [[job.method.expand(text) for text in job.concept.texts(0)]] * len(pictures)
            examples = encoded(pictures, texts_of, job.backbone, mirrored=False)
            self._hold(UNSEEN, job.drawn(examples, UNSEEN, 0, 0, SAMPLES[UNSEEN]))
        self._add_drift(f"a photo of a {recording.noun}")

    @property
    def header(self) -> dict[str, Any]:
        """What the trace's header says of the series: cadence, and timesteps where they are held."""
        always = {"eval": self.job.config.probe_every, "token_norm": 1}
        return {"series": {**{name: {"every": every} for name, every in always.items()}, **self._header}}

    def __call__(self, step: int, watch: Stopwatch) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, series in self._series.items():
            if step % self.plan.every[name] == 0:
                with watch(name):
                    found |= series(step)
        rows = getattr(self.job.backbone.text_encoder.get_input_embeddings(), "rows", None)
        if rows is not None:
            found["token_norm"] = float(rows.detach().double().norm())
        if step in self.scored:
            with watch("score"):
                self.score(step)
                self.keep(step)
        return found

    def score(self, step: int) -> None:
        """Draw and score the pictures of a step, leaving them in a sheet and their scores in a row."""
        pictures, scores = drawn_and_scored(self.job, self.shots, self.scorer, self.steps)
        write_sheet(sheet_at(self.folder, step), pictures)
        self.rows = [*(kept for kept in self.rows if kept["step"] != step), {"step": step, **scores}]
        write_json(self.folder / SCORES, {"header": self._scores_header(), "rows": self.rows})

    def keep(self, step: int) -> None:
        """Leave what is learned by now in the folder."""
        path = weights_at(self.folder, step)
        path.parent.mkdir(exist_ok=True)
        write_weights(path, self.job.method.state)

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        """Return the pictures of these prompts by the model as it stands."""
        return drawn(self.job, prompts, seeds, self.steps)

    def _add(self, name: str, series: Callable[[int], dict[str, Any]], timesteps: Tensor | None = None) -> None:
        self._series[name] = series
        held = {} if timesteps is None else {"timesteps": timesteps.tolist()}
        self._header[name] = {"every": self.plan.every[name], **held}

    def _hold(self, name: str, draws: Draws) -> None:
        probe = Probe(self.job.losses, draws, modules=self.job.backbone.modules)
        self._add(name, lambda step: {name: probe()}, draws.timesteps)

    def _stratified(self) -> Draws:
        job, count = self.job, SAMPLES[STRATIFIED]
        draws = job.drawn(job.examples, STRATIFIED, 0, 0, count)
        strata = generator(job.config.seed, f"{STRATIFIED}/strata")
        timesteps = stratified_timesteps(count, len(job.schedule.alphas_cumprod), strata)
        return replace(draws, timesteps=timesteps.to(draws.timesteps.device), mask=None)  # as the held batch

    def _fresh(self, step: int) -> Draws:
        return replace(self.job.drawn(self.job.examples, FRESH, step, 0, SAMPLES[FRESH]), mask=None)

    def _frozen(self, draws: Draws) -> Tensor:
        """The losses of the untouched model: what is trained steps aside for them."""
        learned = self.job.method.state
        self.job.method.load(self._untouched)
        try:
            return self.job.losses(draws)
        finally:
            self.job.method.load(learned)

    def _add_drift(self, prompt: str) -> None:
        """How far the prediction on pictures of the class has moved: mean of its squared change, on held draws.

        The pictures are the untouched model's own, so that the series needs no data.
        """
        job = self.job
        pictures = self.draw([prompt] * SAMPLES[DRIFT], range(SAMPLES[DRIFT]))
        examples = encoded(pictures, [[prompt]] * len(pictures), job.backbone, mirrored=False)
        draws = job.drawn(examples, DRIFT, 0, 0, SAMPLES[DRIFT])

        def prediction(held: Draws) -> Tensor:
            seen: list[Tensor] = []

            def predict(*given: Tensor) -> Tensor:
                seen.append(job.backbone.predict(*given))
                return seen[0]

            denoising_loss(predict, held, job.schedule)
            return seen[0].float()

        with torch.no_grad():
            before = prediction(draws)
        moved = Probe(
            lambda held: (prediction(held) - before).square().mean(dim=(1, 2, 3)), draws, job.backbone.modules
        )
        self._add(DRIFT, lambda step: {DRIFT: float(moved().double().mean())}, draws.timesteps)

    def _scores_header(self) -> dict[str, Any]:
        return {
            "share": self.plan.share,
            "pairing": self.scorer.pairing,
            "judges": self.scorer.names,
            **{f"{part}_prompts": list(wanted.prompts) for part, wanted in self.shots.items()},
            **{f"{part}_texts": list(wanted.texts) for part, wanted in self.shots.items()},
            "seeds": list(self.shots["train"].seeds),
            "sampling_steps": self.steps,
            "guidance": self.job.config.guidance_scale,
            "references": len(self.job.concept.pictures),
        }


def record(recording: RecordingSpec, consumers: Sequence[Callable[[StepRecord], None]] = ()) -> Path:
    """Return the folder of the recorded run, made now; one that was interrupted goes on from its last checkpoint, and
    one that is whole but for some of its plan's rounds of pictures has those drawn.

    A damaged one is made anew; what is not a recording of this very kind is not touched.
    Raises: RefusedInput and ModelError before training; NonFiniteLoss when training broke; KeyboardInterrupt when it
    was asked to stop, and then it can go on.
    """
    with alone(recording.folder):
        torch.set_num_threads(recording.threads)
        concept = recording.check()
        scorer = scorer_of(recording, concept)
        if problem := recording.foreign():
            raise RefusedInput([problem])
        (recording.folder / FAILED).unlink(missing_ok=True)
        if not whole(recording.folder):
            _record(recording, scorer, consumers)
        add_rounds(recording, concept, scorer)
    return recording.folder


def _record(recording: RecordingSpec, scorer: Scorer, consumers: Sequence[Callable[[StepRecord], None]]) -> None:
    folder, config = recording.folder, recording.config
    write_json(folder / FACTS, recording.facts)
    rows = scores_to_go_on_from(recording)
    if rows is None:
        forget(folder)
    job, checkpoint = prepared(
        replace(config, overwrite=rows is None, resume_from_checkpoint=None if rows is None else "latest")
    )
    recorder = Recorder(recording, job, scorer, rows or ())
    job.criterion = FixedSteps(config.max_train_steps)
    job.learner.trace = Trace({**job.learner.trace.header, **recorder.header})
    job.open(checkpoint)
    verdict, live = job.criterion(job.learner.trace), Live(config.window, config.threshold, job.learner.trace)
    with interruption() as interrupted:
        for step in job.steps(interrupted, recorder):
            verdict = step.verdict
            if live(job.learner.trace):
                recorder.keep(step.step)
            for consumer in consumers:
                consumer(step)
    if verdict.reason is Reason.INTERRUPTED:
        raise KeyboardInterrupt
    if verdict.reason is Reason.NON_FINITE:
        raise NonFiniteLoss(f"training broke: {verdict.sentence}")
    job.finish(verdict)
    versions = json.loads((folder / "config.json").read_text(encoding="utf-8"))["versions"]
    hashes = {name: digest(folder / name) for name in ("trace.jsonl", SCORES)}
    write_json(folder / DONE, {"hashes": hashes, "versions": versions, "threads": recording.threads})


def whole(folder: Path) -> bool:
    """Return whether a finished run stands there that can be read, with whatever rounds of pictures."""
    try:
        return bool(RecordedRun.open(folder))
    except DvarError:
        return False


class Live:
    """The paper's rule, ours and the strict one, judged along the run: whether one of them now begins to stop."""

    def __init__(self, window: int, threshold: float, trace: Trace) -> None:
        self.rules: tuple[Rule, ...] = (Dvar(window, threshold), Dvar(window, threshold, strict_paper=True))
        self.stopping = [rule(trace).stop for rule in self.rules]

    def __call__(self, trace: Trace) -> bool:
        before, self.stopping = self.stopping, [rule(trace).stop for rule in self.rules]
        return any(now and not then for then, now in zip(before, self.stopping, strict=True))


def unseen_pictures(concept: str) -> list[Image.Image]:
    """Return renderings of a bundled concept that nothing was trained on, in places of no picture it ships with."""
    from dvar.mini.world.concepts import held_out, reference_scenes
    from dvar.mini.world.places import PLACES as ALL
    from dvar.mini.world.scene import render, sample_scene

    rng = np.random.default_rng([11, list(held_out()).index(concept)])
    shown = {scene.place for scene in reference_scenes(concept)}
    places = rng.permutation([place for place in ALL if place not in shown])[:UNSEEN_PICTURES]
    scenes = [sample_scene(rng, place=str(place), style="photo") for place in places]
    return [Image.fromarray(render(held_out()[concept], scene)) for scene in scenes]


def scores_to_go_on_from(recording: RecordingSpec) -> list[dict[str, Any]] | None:
    """Return the rows of scores that an interrupted recording left, up to its last checkpoint.

    None when it cannot go on: nothing is there, it was finished, or something of it is damaged.
    """
    folder = recording.folder
    if (folder / DONE).exists() or facts_of(folder) is None:
        return None
    try:
        with warnings.catch_warnings(action="ignore"):
            step = latest(folder).step
        rows = json.loads((folder / SCORES).read_text(encoding="utf-8"))["rows"]
        kept = [row for row in rows if row["step"] <= step]
        there = [row["step"] for row in kept if weights_at(folder, row["step"]).exists()]
    except (CheckpointError, OSError, ValueError, KeyError, TypeError):
        return None
    return kept if there == [scored for scored in recording.scored if scored <= step] else None


def forget(folder: Path) -> None:
    """Remove what only a recording leaves in a run's folder, but for what it is of; the rest is the trainer's."""
    for name in (DONE, SCORES, FAILED, ROUNDS, RESCORED):
        (folder / name).unlink(missing_ok=True)
    for name in (WEIGHTS, SHEETS, ANEW):
        shutil.rmtree(folder / name, ignore_errors=True)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a run's folder while it is written; whoever dies lets go of it.  Windows has no such lock.

    Raises: RefusedInput when another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("wb") as lock:
        try:
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RefusedInput([f"{folder} is being written by another process: wait for it, or end it"]) from error
        yield


def main() -> int:
    """Make the one recording that the first argument describes in JSON; a sweep starts this as a process of its own."""
    try:
        record(RecordingSpec.told(sys.argv[1]))
    except DvarError as error:
        print(f"dvar: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _pair(paired: PairedProbe[Draws], step: int) -> dict[str, Any]:
    now, before, timesteps = paired.both(step)
    return {FRESH: now, "frozen": before, "fresh_timesteps": timesteps}


if __name__ == "__main__":
    sys.exit(main())
