"""The recorder: everything that is measured during a recorded run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dvar.diffusion.objective import Draws, denoising_loss
from dvar.errors import RefusedInput
from dvar.files import write_json
from dvar.recordings.concept_images import render_unseen_images
from dvar.recordings.image_change import project_images
from dvar.recordings.image_metrics import Scorer
from dvar.recordings.protocol import (
    DRIFT,
    FRESH,
    IMAGE_PROJECTIONS,
    PROTOCOLS,
    STABLE_RANK,
    STRATIFIED,
    UNSEEN,
    cadence_to_json,
)
from dvar.recordings.recorded_run import SCORES
from dvar.recordings.restore import sheet_path, weights_path, write_sheet
from dvar.recordings.score_samples import generate_and_score, generate_images, scoring_prompts
from dvar.recordings.spec import RecordingSpec
from dvar.recordings.weight_metrics import stable_rank
from dvar.stopping.cadence import is_due
from dvar.stopping.probe import PairedProbe, Probe
from dvar.training.augmentation import encode_examples
from dvar.training.loop import Stopwatch
from dvar.training.run import TrainingRun
from dvar.training.weight_files import write_weights


class Recorder:
    """Measures a run on the way, without disturbing it.

    Called with a step, it returns the values of the series that are due; at a scored step it also writes images, scores
    and weights into the run's folder.

    It is made before the run is opened, while its model is still untouched. It never changes the run: flags, global
    random states and trainable weights are afterwards what they were.

    Args:
        rows: Scores of an interrupted recording that goes on.
    """

    def __init__(
        self, spec: RecordingSpec, run: TrainingRun, scorer: Scorer, rows: Sequence[dict[str, Any]] = ()
    ) -> None:
        self.run, self.scorer, self.folder = run, scorer, run.folder
        self.protocol, self.scored_steps = PROTOCOLS[spec.protocol], set(spec.scored_steps)
        self.prompts = scoring_prompts(spec, run.concept)
        self.sampling_steps = self.protocol.sampling_steps or run.config.num_inference_steps
        self.rows = list(rows)
        self._conditions = {
            "setting": spec.setting,
            "protocol": {"name": spec.protocol, "version": self.protocol.version},
            "base": run.backbone.digest,
        }
        texts = {text for part in self.prompts.values() for text in part.texts}
        if long := [text for text in texts if len(scorer.clip.tokenizer(text).input_ids) > scorer.clip.length]:
            raise RefusedInput([f"the CLIP that scores reads {scorer.clip.length} tokens, too few for {long[0]!r}"])
        self._untouched = run.method.state
        self._series: dict[str, Callable[[int], dict[str, Any]]] = {}
        self._header: dict[str, dict[str, Any]] = {}
        self._add_held(STRATIFIED, self._stratified_draws())
        modules, seed = run.backbone.modules, run.config.seed
        paired = PairedProbe(run.losses, self._frozen_losses, self._fresh_draws, modules, seed=seed)
        self._add_series(FRESH, lambda step: _measure_pair(paired, step))
        self._header["frozen"] = self._header[FRESH]
        if spec.bundled:
            images = render_unseen_images(spec.concept)
            captions = [[run.method.expand(text) for text in run.concept.texts(0)]] * len(images)
            examples = encode_examples(images, captions, run.backbone, mirrored=False)
            self._add_held(UNSEEN, run.draw(examples, UNSEEN, 0, 0, self.protocol.samples[UNSEEN]))
        self._add_drift(f"a photo of a {spec.noun}")

    @property
    def header(self) -> dict[str, Any]:
        """The part of the trace's header that describes the series: cadences, and timesteps of held batches."""
        always = {"eval": self.run.config.probe_every, "token_norm": 1}
        scored = {IMAGE_PROJECTIONS: {"steps": sorted(self.scored_steps)}}
        return {"series": {**{name: {"every": every} for name, every in always.items()}, **self._header, **scored}}

    def __call__(self, step: int, watch: Stopwatch) -> dict[str, Any]:
        """Return the values of the series that are due at ``step``; ``watch`` times each of them."""
        values: dict[str, Any] = {}
        for name, series in self._series.items():
            if is_due(self.protocol.every[name], step):
                with watch(name):
                    values |= series(step)
        rows = getattr(self.run.backbone.text_encoder.get_input_embeddings(), "rows", None)
        if rows is not None:
            values["token_norm"] = float(rows.detach().double().norm())
        if step in self.scored_steps:
            with watch("score"):
                values |= self.score_step(step)
                self.save_weights(step)
        return values

    def score_step(self, step: int) -> dict[str, Any]:
        """Generate and score the images of a step, and write them as a sheet and a row of scores.

        Returns:
            What the trace holds of the images of training prompts, whose seeds are the same at every step.
        """
        images, scores = generate_and_score(self.run, self.prompts, self.scorer, self.sampling_steps)
        write_sheet(sheet_path(self.folder, step), images)
        self.rows = [*(row for row in self.rows if row["step"] != step), {"step": step, **scores}]
        write_json(self.folder / SCORES, {"header": self._scores_header(), "rows": self.rows})
        return {IMAGE_PROJECTIONS: project_images(images[0])}

    def save_weights(self, step: int) -> None:
        """Write the trained weights as they are now."""
        path = weights_path(self.folder, step)
        path.parent.mkdir(exist_ok=True)
        write_weights(path, self.run.method.state)

    def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        """Return images of these prompts by the model as it is now."""
        return generate_images(self.run, prompts, seeds, self.sampling_steps)

    def _add_series(self, name: str, series: Callable[[int], dict[str, Any]], timesteps: Tensor | None = None) -> None:
        self._series[name] = series
        held = {} if timesteps is None else {"timesteps": timesteps.tolist()}
        self._header[name] = {"every": cadence_to_json(self.protocol.every[name]), **held}

    def _add_held(self, name: str, draws: Draws) -> None:
        """Add the losses on a held batch, one for each sample."""
        probe = Probe(self.run.losses, draws, modules=self.run.backbone.modules)
        self._add_series(name, lambda step: {name: probe()}, draws.timesteps)

    def _stratified_draws(self) -> Draws:
        draws = self.run.draw(self.run.examples, STRATIFIED, 0, 0, self.protocol.samples[STRATIFIED])
        return replace(self.run.stratify(draws, STRATIFIED), mask=None)  # as the held batch

    def _fresh_draws(self, step: int) -> Draws:
        return replace(self.run.draw(self.run.examples, FRESH, step, 0, self.protocol.samples[FRESH]), mask=None)

    def _frozen_losses(self, draws: Draws) -> Tensor:
        """Return the losses of the untouched model, [n]; the trained weights are put back afterwards."""
        trained = self.run.method.state
        self.run.method.load(self._untouched)
        try:
            return self.run.losses(draws)
        finally:
            self.run.method.load(trained)

    def _add_drift(self, prompt: str) -> None:
        """Add the drift: the mean squared change of the prediction on images of the class, on held draws; and with it
        the stable rank of the learned update.

        The untouched model generates these images, so that the series needs no data.
        """
        run = self.run
        images = self.generate([prompt] * self.protocol.samples[DRIFT], range(self.protocol.samples[DRIFT]))
        examples = encode_examples(images, [[prompt]] * len(images), run.backbone, mirrored=False)
        draws = run.draw(examples, DRIFT, 0, 0, self.protocol.samples[DRIFT])

        def prediction(draws: Draws) -> Tensor:
            outputs: list[Tensor] = []

            def predict(*inputs: Tensor) -> Tensor:
                outputs.append(run.backbone.predict(*inputs))
                return outputs[0]

            denoising_loss(predict, draws, run.schedule)
            return outputs[0].float()

        with torch.no_grad():
            before = prediction(draws)

        def squared_change(draws: Draws) -> Tensor:
            return (prediction(draws) - before).square().mean(dim=(1, 2, 3))

        probe = Probe(squared_change, draws, run.backbone.modules)

        def measure(step: int) -> dict[str, Any]:
            rank = stable_rank(run.method.state, self._untouched)
            return {DRIFT: float(probe().double().mean()), **({} if rank is None else {STABLE_RANK: rank})}

        self._add_series(DRIFT, measure, draws.timesteps)

    def _scores_header(self) -> dict[str, Any]:
        return {
            **self._conditions,
            "share": self.protocol.share,
            "pairing": self.scorer.pairing,
            "judges": self.scorer.names,
            **{f"{part}_prompts": list(prompts.prompts) for part, prompts in self.prompts.items()},
            **{f"{part}_texts": list(prompts.texts) for part, prompts in self.prompts.items()},
            "seeds": list(self.prompts["train"].seeds),
            "sampling_steps": self.sampling_steps,
            "guidance": self.run.config.guidance_scale,
            "references": self.scorer.references,
        }


def _measure_pair(paired: PairedProbe[Draws], step: int) -> dict[str, Any]:
    losses, frozen_losses, timesteps = paired.measure_both(step)
    return {FRESH: losses, "frozen": frozen_losses, "fresh_timesteps": timesteps}
