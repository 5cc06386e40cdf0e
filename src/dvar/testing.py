"""Tools for tests: contracts of rules, log formats and methods, and tiny random models with images."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dvar.errors import RefusedInput
from dvar.logs.formats import LogFormat, find_log, recognise_format
from dvar.logs.reader import read_log
from dvar.stopping.diagnosis import Reason
from dvar.stopping.rule import Rule
from dvar.stopping.trace import LOSS, Trace
from dvar.stopping.verdict import Verdict

if TYPE_CHECKING:  # the contracts need NumPy alone: whatever is heavier is imported where it is used
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    from dvar.config.training import TrainingConfig
    from dvar.training.loop import StepRecord

# --- contracts ------------------------------------------------------------------------------------------------------

CURVES: Mapping[str, Callable[[int], float]] = {
    "line": lambda step: 1 - step / 1000,
    "exponential": lambda step: 0.5 + math.exp(-step / 30),
    "noise": lambda step: 0.5 + 0.01 * math.sin(step * step),
    "spike": lambda step: 9.0 if step == 7 else 1 - step / 1000,
    "rise": lambda step: 0.5 + step / 1000,
    "late start": lambda step: 0.5 + math.exp(-max(0, step - 60) / 20),
    "nan": lambda step: math.nan if step == 51 else 0.5 + math.exp(-step / 30),
    "constant": lambda step: 0.5,
}
"""The curves on which a rule is tested, by name: from a step to a value."""

# TensorBoard keeps values in float32, so these are.
LOGGED_CURVE = {step: float(np.float32(0.1 + 0.01 * math.exp(-step / 40))) for step in range(0, 400, 2)}
"""The curve with which a log format is tested: a loss by step."""


class RuleContract:
    """The tests that every stopping rule passes.

    Subclass it in a test module, and pytest runs it::

        class TestMyRule(RuleContract):
            rule = MyRule(window=40)

    A window of about 40 steps fits: the traces have 60 records, one every 3 steps.
    """

    rule: Rule
    """The rule to test."""
    metric: str = LOSS
    """The metric that it reads; the loss is constant if it is another one."""

    def record_step(self, trace: Trace, step: int, curve: Callable[[int], float]) -> None:
        """Append the record of a step to a trace, with the curve as the metric that the rule reads."""
        values = {LOSS: 0.5, self.metric: curve(step)}
        trace.record(step, values.pop(LOSS), **values)

    def judge_curve(self, curve: Callable[[int], float]) -> tuple[Trace, list[Verdict]]:
        """Return the trace of a curve, and the verdict after each of its records."""
        trace, verdicts = Trace(), []
        for step in range(0, 180, 3):
            self.record_step(trace, step, curve)
            verdicts.append(self.rule(trace))
        return trace, verdicts

    def test_an_empty_trace_does_not_stop(self) -> None:
        assert not self.rule(Trace()).stop

    def test_the_trace_is_its_only_state(self) -> None:
        """Check that calling twice, or on a replayed or resumed trace, gives the verdicts of the live run."""
        for name, curve in CURVES.items():
            trace, verdicts = self.judge_curve(curve)
            assert self.rule(trace) == verdicts[-1], name
            assert [self.rule(trace.cut(step)) for step in range(0, 180, 30)] == verdicts[::10], name
            assert len(trace) == len(verdicts), name

    def test_a_verdict_is_about_a_step_and_says_so(self) -> None:
        for name, curve in CURVES.items():
            for index, verdict in enumerate(self.judge_curve(curve)[1]):
                assert 0 <= verdict.step <= 3 * index, name
                answer = "stop" if verdict.stop else "go on"
                assert str(verdict).startswith(f"{answer} at step {verdict.step}: "), name
                assert "\n" not in str(verdict), name
                assert all(isinstance(value, int | float) for value in verdict.metrics.values()), name

    def test_it_does_not_stop_while_it_runs_or_warms_up(self) -> None:
        for name, curve in CURVES.items():
            for verdict in self.judge_curve(curve)[1]:
                assert not (verdict.stop and verdict.reason in (Reason.RUNNING, Reason.WARMING_UP)), name

    def test_a_metric_that_is_not_finite_is_never_stabilised(self) -> None:
        _, verdicts = self.judge_curve(CURVES["nan"])
        assert all(verdict.reason is not Reason.STABILISED for verdict in verdicts[51 // 3 :])

    def test_a_verdict_survives_json(self) -> None:
        for name, curve in CURVES.items():
            verdict = self.judge_curve(curve)[1][-1]
            restored = Verdict.from_json(verdict.to_json())
            assert (str(restored), restored.diagnoses) == (str(verdict), verdict.diagnoses), name

    def test_it_is_a_value(self) -> None:
        """Check that a rule has a hash and cannot be changed, as a frozen dataclass."""
        assert hash(self.rule) == hash(self.rule)
        try:
            self.rule.window = 3  # type: ignore[attr-defined]
        except AttributeError:
            return
        raise AssertionError(f"{self.rule!r} can be changed: make it a frozen dataclass")


class LogFormatContract:
    """The tests that every log format passes, once it is registered.

    Subclass it in a test module, and pytest runs it::

        class TestMyFormat(LogFormatContract):
            log_format = MY_FORMAT

            def write_log(self, folder: Path, curve: Mapping[int, float]) -> Path:
                ...  # writes the curve as the program of this format does, and returns the file or the folder
    """

    log_format: LogFormat
    """The format to test."""

    def write_log(self, folder: Path, curve: Mapping[int, float]) -> Path:
        """Write a log with ``curve``, a loss by step, and return its file or folder.

        The name of the loss says that it is on fixed inputs, such as "val_loss". Other curves may be beside it.
        """
        raise NotImplementedError("a subclass writes a log of its format")

    def test_it_recognises_its_log_and_no_format_before_it_does(self, tmp_path: Path) -> None:
        path = find_log(self.write_log(tmp_path, LOGGED_CURVE))
        assert self.log_format.recognises(path)
        assert recognise_format(path) is self.log_format, "register the format, and make it more specific"

    def test_it_recognises_no_foreign_file(self, tmp_path: Path) -> None:
        for content in (b"", b"PK\x03\x04 an archive", b"\x89PNG\r\n\x1a\n", b"a line of text\n"):
            path = tmp_path / "foreign.bin"
            path.write_bytes(content)
            assert not self.log_format.recognises(path), content

    def test_its_points_are_steps_names_and_values(self, tmp_path: Path) -> None:
        points = list(self.log_format.read_points(find_log(self.write_log(tmp_path, LOGGED_CURVE)), None))
        assert points
        for step, name, value in points:
            assert step is None or isinstance(step, int)
            assert isinstance(name, str)
            assert isinstance(value, float | str)

    def test_the_curve_is_read_as_it_was_recorded(self, tmp_path: Path) -> None:
        trace = read_log(self.write_log(tmp_path, LOGGED_CURVE))
        assert dict(zip(trace.steps.tolist(), trace.values.tolist(), strict=True)) == LOGGED_CURVE

    def test_reading_changes_nothing(self, tmp_path: Path) -> None:
        log = self.write_log(tmp_path, LOGGED_CURVE)
        content = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        assert read_log(log).records == read_log(log).records
        assert {path: path.read_bytes() for path in content} == content

    def test_it_is_found_in_a_folder_by_its_names(self, tmp_path: Path) -> None:
        log = self.write_log(tmp_path, LOGGED_CURVE)
        for name in self.log_format.file_names:
            name = name.replace("*", "1")  # a pattern
            folder = tmp_path / f"folder of {name.replace('/', ' and ')}"
            (folder / name).parent.mkdir(parents=True)
            shutil.copyfile(find_log(log), folder / name)
            assert read_log(folder).records == read_log(log).records

    def test_a_column_of_steps_that_is_not_there_is_refused(self, tmp_path: Path) -> None:
        log, message = self.write_log(tmp_path, LOGGED_CURVE), ""
        try:
            read_log(log, step="no such column")
        except RefusedInput as error:
            message = str(error)
        assert "no such column" in message


# --- a tiny Stable Diffusion: its weights are random; every shape, file and code path is that of a real model --------

WORDS = """
a an the my of in on at with and to one photo picture rendering drawing depiction painting illustration image style good
nice bright dark clean dirty small large big cool weird close up cropped red green blue yellow white black mug vase cat
dog house lamp chair boat bird robot sculpture toy object beach grass snow night table ktn pll ucd
""".split()  # noqa: SIM905 (sixty words read better as text)
ALPHABET = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
START, END = "<|startoftext|>", "<|endoftext|>"


def tiny_pipeline(
    folder: str | Path, *, resolution: int = 32, vocabulary: Iterable[str] = WORDS, seed: int = 0
) -> Path:
    """Save a `StableDiffusionPipeline` with random weights, of 1.2 MB, to ``folder`` and return the folder.

    The same arguments give the same weights, and the global random state is left as it was.

    Args:
        folder: Where to save.
        resolution: Side of its images in pixels, 32 or a larger multiple of 8; latents are a quarter of it and have 4
            channels.
        vocabulary: Words that are one token each; every other text is spelled out.
        seed: Seed of the weights.
    """
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = tiny_tokenizer(vocabulary)
        pipeline = StableDiffusionPipeline(
            vae=_build_autoencoder(resolution),
            text_encoder=_build_text_encoder(tokenizer),
            tokenizer=tokenizer,
            unet=_build_unet(resolution // 4),
            scheduler=DDIMScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(folder)
    return Path(folder)


def tiny_tokenizer(words: Iterable[str] = WORDS) -> CLIPTokenizer:
    """Return a `CLIPTokenizer` whose byte pairs are merged until each of ``words`` is a single token."""
    from transformers import CLIPTokenizer

    spellings = {word: [*word[:-1], word[-1] + "</w>"] for word in dict.fromkeys(words)}
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for pieces in spellings.values() for pair in pairwise(pieces)):
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        spellings = {word: _merge_pair(pieces, best) for word, pieces in spellings.items()}
    pieces = [*ALPHABET, *(letter + "</w>" for letter in ALPHABET), *map("".join, merges), START, END]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


def tiny_clip(folder: str | Path, *, resolution: int = 32, vocabulary: Iterable[str] = WORDS, seed: int = 1) -> Path:
    """Save a `CLIPModel` with random weights, its tokenizer and its processor to ``folder`` and return the folder.

    It reads images of ``resolution`` pixels and texts of 77 tokens. Its embeddings have 16 numbers.
    """
    import torch
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    shared = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = tiny_tokenizer(vocabulary)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**shared, **ends, "vocab_size": len(tokenizer), "max_position_embeddings": 77}
    vision = {**shared, "image_size": resolution, "patch_size": resolution // 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"shortest_edge": resolution}, crop_size={"height": resolution, "width": resolution}
    ).save_pretrained(folder)
    return Path(folder)


def tiny_concept(folder: str | Path, *, images: int = 4, size: int = 64) -> Path:
    """Save PNG images of one banded ball to ``folder`` and return the folder.

    The ball is the same in each image; its place and its background differ.

    Args:
        folder: Where to save.
        images: Number of images.
        size: Side of the images in pixels.
    """
    from PIL import Image, ImageDraw

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(images):
        image = Image.new("RGB", (size, size), (40 + 50 * (index % 4), 200 - 40 * (index % 4), 120 + 30 * (index % 3)))
        left, top, side = size * (1 + index % 3) // 8, size * (1 + index % 2) // 8, size * 5 // 8
        pen = ImageDraw.Draw(image)
        pen.ellipse((left, top, left + side, top + side), fill=(220, 60, 50), outline=(30, 20, 20))
        pen.rectangle(
            (left + side // 8, top + side * 2 // 5, left + side * 7 // 8, top + side * 3 // 5), fill=(250, 230, 120)
        )
        image.save(folder / f"{index:02d}.png")
    return folder


def _merge_pair(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def _build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            initializer_factor=5.0,
        )
    ).eval()


def _build_autoencoder(resolution: int) -> AutoencoderKL:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=resolution,
    ).eval()


def _build_unet(side: int) -> UNet2DConditionModel:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=side,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    ).eval()


# --- the contract of a method ---------------------------------------------------------------------------------------


def assert_only_the_method_moves(config: TrainingConfig, model: Path) -> None:
    """Assert that the method of ``config`` leaves the model at ``model`` as it is, and that only its parameters train.

    Raises:
        AssertionError: Building the method changes the model's loss, or an update moves what is not the method's.
    """
    import torch

    from dvar.diffusion.backbone import load_backbone
    from dvar.diffusion.objective import Draws, denoising_loss
    from dvar.training.methods.registry import build_method

    backbone = load_backbone(model, device="cpu")
    noise = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    ids = backbone.tokenize(["a photo of mug", "a dark cat"])
    draws = Draws(torch.cat([noise[0], noise[0]], dim=1), noise[1], noise[2], torch.tensor([500, 20]), ids)
    base_losses = denoising_loss(backbone.predict, draws, backbone.schedule)
    method = build_method(config, backbone)
    assert torch.equal(denoising_loss(backbone.predict, draws, backbone.schedule), base_losses), "the model changed"

    draws = replace(draws, input_ids=backbone.tokenize([method.expand(config.plain_prompt), "a dark cat"]))
    trained = {id(weight) for weight in method.parameters}
    assert len(trained) == len(method.parameters), "a parameter is listed twice"
    weights = [pair for network in backbone.modules for pair in network.named_parameters()]
    before = {name: weight.detach().clone() for name, weight in weights}
    optimizer = torch.optim.AdamW(method.parameters, lr=1e-2, weight_decay=0.1)
    for _ in range(2):  # LoRA's first factors have a gradient once the second ones are no longer zero
        optimizer.zero_grad()
        torch.autograd.backward(denoising_loss(backbone.predict, draws, backbone.schedule).mean())
        optimizer.step()
    for name, weight in weights:
        assert torch.equal(weight, before[name]) == (id(weight) not in trained), name
        assert (weight.grad is None) == (id(weight) not in trained), name
    assert {id(weight) for _, weight in weights} >= trained, "a parameter belongs to no network"


class _Stopped(Exception):
    """A run was stopped by its test."""


class MethodContract:
    """Tests that every method of personalisation passes: subclass it in a test module and set ``config``.

        class TestMine(MethodContract):
            config = MineConfig(learning_rate=0.05)

    Attributes:
        config: A config of the method, valid but for the model and the folders, with a learning rate at which ten
            steps move the weights.
    """

    config: TrainingConfig

    def short_config(self, folder: Path) -> TrainingConfig:
        """Return ``config`` for a run of ten steps on the tiny model, in ``folder``."""
        return replace(
            self.config,
            pretrained_model_name_or_path=str(tiny_pipeline(folder / "model")),
            instance_data_dir=str(tiny_concept(folder / "images")),
            resolution=32,
            max_train_steps=10,
            window=8,
            threshold=1e-9,
            validation_steps=5,
            num_validation_images=1,
            num_inference_steps=2,
            checkpointing_steps=4,
            output_dir=str(folder / "run"),
        )

    def test_it_is_registered_under_its_name(self) -> None:
        """Find the method in the registry by the name in its config."""
        from dvar.training.methods.registry import METHODS

        assert METHODS.find(self.config.method).config_type is type(self.config)

    def test_its_config_survives_json(self) -> None:
        """Restore the config from what config.json and checkpoints hold."""
        from dvar.training.methods.registry import config_from_dict

        assert config_from_dict(json.loads(json.dumps(self.config.to_dict()))) == self.config

    def test_its_config_has_no_problems(self, tmp_path: Path) -> None:
        """Accept the config in the checks that all methods share."""
        from dvar.config.training import problems

        assert problems(self.short_config(tmp_path)) == []

    def test_what_is_trained_moves_and_nothing_else_does(self, tmp_path: Path) -> None:
        """Leave the model as it is when the method is built, and move only its parameters in an update."""
        assert_only_the_method_moves(self.config, tiny_pipeline(tmp_path))

    def test_loading_a_state_restores_it(self, tmp_path: Path) -> None:
        """Take over with `load` what ``state`` returned, a copy."""
        import torch

        from dvar.diffusion.backbone import load_backbone
        from dvar.training.methods.registry import build_method

        method = build_method(self.config, load_backbone(tiny_pipeline(tmp_path), device="cpu"))
        state = method.state
        with torch.no_grad():
            for weight in method.parameters:
                weight.add_(1.0)
        assert any(not torch.equal(tensor, state[name]) for name, tensor in method.state.items())
        method.load(state)
        assert all(torch.equal(tensor, state[name]) for name, tensor in method.state.items())

    def test_its_files_are_float32_and_stock_diffusers_reads_them(self, tmp_path: Path) -> None:
        """Export weight files of a kind for which the model card has a line of code."""
        import torch

        from dvar.diffusion.backbone import load_backbone
        from dvar.training.loading_code import load_lines
        from dvar.training.methods.registry import build_method
        from dvar.training.weight_files import split_by_token

        method = build_method(self.config, load_backbone(tiny_pipeline(tmp_path), device="cpu"))
        files = split_by_token(method.files(method.state))
        assert len(load_lines(files)) == len(files) > 0
        assert all(tensor.dtype == torch.float32 for tensors in files.values() for tensor in tensors.values())

    def test_a_run_that_is_resumed_is_the_run_that_was_not_interrupted(self, tmp_path: Path) -> None:
        """Depend on the seed alone in training, and keep everything in a checkpoint."""
        import torch
        from safetensors.torch import load_file

        from dvar.training.personalise import personalise
        from dvar.training.run_layout import TRACE

        config = self.short_config(tmp_path)
        uninterrupted = personalise(replace(config, output_dir=str(tmp_path / "whole")))

        def stop(step: StepRecord) -> None:
            if step.step == 6:
                raise _Stopped

        with suppress(_Stopped):
            personalise(config, [stop])
        resumed = personalise(replace(config, resume_from_checkpoint="latest"))
        assert uninterrupted.steps == resumed.steps == 10
        traces = [Trace.read(result.folder / TRACE).values.tolist() for result in (uninterrupted, resumed)]
        assert traces[0] == traces[1]
        for path, other_path in zip(uninterrupted.weights, resumed.weights, strict=True):
            tensors, others = load_file(path), load_file(other_path)
            assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())
