"""Settings of `dvar generate`, `export`, `report` and `replay`, with their help, ranges and checks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dvar.config.fields import (
    COUNT,
    IMAGE_COUNT,
    NOT_NEGATIVE,
    POSITIVE,
    SAMPLING_STEPS,
    SEED,
    Config,
    Range,
    invalid_fields,
    replace_invalid_fields,
    setting,
)
from dvar.config.training import Sampler, TrainingConfig
from dvar.files import writing_problem
from dvar.stopping.rule import RULE_DEFAULTS
from dvar.stopping.rules import RULES

ALL_RULES = "all"
"""The name that stands for every rule of `RULES`."""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(Config):
    """Every setting of ``dvar generate``."""

    prompt: str | None = setting(None, "Text of the images; write the learned word where the subject goes.")
    num_images: int = setting(4, "Number of images.", IMAGE_COUNT)
    seed: int = setting(0, "Seed of the first image; each further one has the next.", SEED)
    guidance_scale: float | None = setting(None, "Classifier-free guidance; the run's own by default.", NOT_NEGATIVE)
    num_inference_steps: int | None = setting(None, "Denoising steps; the run's own by default.", SAMPLING_STEPS)
    scheduler: Sampler | None = setting(None, "Scheduler that samples; the run's own by default.")
    output: str | None = setting(None, "Folder for the images; 'generated' in the run's folder by default.")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = setting(
        None, "Arithmetic of the model; the run's own by default.", section="Memory"
    )
    quantize: Literal["no", "nf4", "int8"] | None = setting(
        None, "Bits of the denoising network; the run's own by default."
    )
    offload: bool | None = setting(
        None, "Keep idle networks on the CPU, or with --no_offload not; the run's own by default."
    )


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Config):
    """Every setting of ``dvar export``."""

    step: int | None = setting(
        None, "Make the weights of this step, which must have a checkpoint, the result of the run.", NOT_NEGATIVE
    )
    merged: str | None = setting(
        None, "New folder for a whole diffusers pipeline: the base model with what was learned merged into it."
    )
    kohya: str | None = setting(
        None,
        "New file, NAME.safetensors, for the LoRA of a dreambooth-lora run under the names that ComfyUI and, of Stable "
        "Diffusion 1.x, 2.x and XL, AUTOMATIC1111 and kohya's scripts read.",
    )
    embedding: str | None = setting(
        None,
        "New file, NAME.safetensors, for the new word of a textual-inversion or dreambooth-lora run, which ComfyUI "
        "and, of Stable Diffusion 1.x, 2.x and XL, AUTOMATIC1111, Forge and InvokeAI call NAME in prompts.",
    )
    mixed_precision: Literal["no", "fp16", "bf16"] | None = setting(
        None, "Precision of the merged pipeline; the run's own by default, and float32 with 'no'."
    )
    push_to_hub: str | None = setting(
        None, "Id on the hub, as owner/name, to upload the weights, the model card and the samples to."
    )


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Config):
    """Every setting of ``dvar report``."""

    output: str | None = setting(None, "Page to write; report.html in the run's folder by default.")


@dataclass(frozen=True, kw_only=True)
class ReplayConfig(Config):
    """Every setting of ``dvar replay``.

    Source: window and threshold are those of Textual Inversion. Appendix E gives no threshold for its rules, and none
        for a plateau of the loss: those defaults are ours, for a loss that falls by a few per cent in all.
    """

    rule: tuple[str, ...] = setting(
        ("dvar",),
        "Rule to replay: dvar, paper (DVAR as published), ema, hall, trend, plateau, octave, one of an installed "
        "package, or all; repeat the flag for another.",
        section="Rules",
    )
    window: int = setting(TrainingConfig.window, "Number of past steps that a rule uses.")
    threshold: float = setting(TrainingConfig.threshold, "DVAR's alpha: stop when recent / whole variance is below it.")
    ema_threshold: float = setting(
        RULE_DEFAULTS["ema_threshold"], "Relative change of the moving average over the window.", POSITIVE
    )
    hall_threshold: float = setting(
        RULE_DEFAULTS["hall_threshold"], "Range of the loss in the window, relative to its maximum.", POSITIVE
    )
    trend_threshold: float = setting(
        RULE_DEFAULTS["trend_threshold"], "Slope per step, relative to the first loss.", POSITIVE
    )
    patience: int = setting(TrainingConfig.window, "Number of steps without improvement that end a run.", COUNT)
    min_delta: float = setting(
        RULE_DEFAULTS["min_delta"], "Smallest decrease of the loss that counts as improvement.", NOT_NEGATIVE
    )

    metric: str | None = setting(
        None,
        "Curve in the log; by default the loss on fixed inputs, or of several the one called pooled, total or mean.",
        section="Log",
    )
    step_column: str | None = setting(None, "Column of steps in a table; found by its name by default.")
    output: str | None = setting(None, "Figure of the replay to write: a file that ends in .svg or .html.")

    follow: bool = setting(
        False, "Follow the log while another program writes it, until the rule stops.", section="Following a log"
    )
    on_stop: str | None = setting(
        None, "Command to run at a stop; the step and the verdict are in DVAR_STEP and DVAR_VERDICT."
    )
    stop_file: str | None = setting(None, "New file to write at a stop, with the verdict as JSON.")
    pid: int | None = setting(
        None, "Process that writes the log: interrupted at a stop, as by Ctrl-C; following ends when it does.", COUNT
    )
    poll_seconds: float = setting(
        5.0, "Seconds from one look at the log to the next.", Range(0, above=True, most=86_400)
    )
    idle_minutes: float = setting(60.0, "Minutes without a new record after which following ends.", POSITIVE)


RunsConfig = GenerateConfig | ExportConfig | ReportConfig | ReplayConfig


def problems(config: RunsConfig) -> list[str]:
    """Return everything that is wrong with these settings, without the run or log they apply to.

    The settings of rules are checked by the rules themselves.
    """
    messages = [message for _, message in invalid_fields(config)]
    if isinstance(config, ReplayConfig) and not {*replace_invalid_fields(config).rule} <= {*RULES, ALL_RULES}:
        messages.insert(0, f"rule must be one of {', '.join([*RULES, ALL_RULES])}, got {config.rule!r}")
    match config:
        case GenerateConfig(prompt=None):
            messages.append("prompt is missing: give --prompt the text of the images, with the learned word in it")
        case ExportConfig(step=None, merged=None, kohya=None, embedding=None, push_to_hub=None):
            rule = "export needs --step, --merged, --kohya, --embedding or --push_to_hub, got none"
            messages.append(f"{rule}: name what to write")
        case ExportConfig(merged=None, mixed_precision=str(precision)):
            messages.append(f"mixed_precision is for a pipeline, got {precision} without --merged: drop it")
        case ReportConfig(output=str(output)) if not output.endswith(".html"):
            messages.append(f"output must end in .html, got {output!r}: name a page")
        case ReplayConfig(output=str(output)) if Path(output).suffix not in (".svg", ".html"):
            messages.append(f"output must end in .svg or .html, got {output!r}: name a figure or a page")
    if isinstance(config, ReplayConfig):
        messages += _follow_problems(config)
    return messages or _output_problems(config)


def _output_problems(config: RunsConfig) -> list[str]:
    """Return which of the files and folders that are to be written cannot be."""
    messages = []
    for name in ("output", "merged", "kohya", "embedding"):
        value = getattr(config, name, None)
        folder = name == "merged" or (name == "output" and isinstance(config, GenerateConfig))
        if value is not None and (problem := writing_problem(value, folder=folder)):
            messages.append(f"{name} cannot be written, {problem}: name another")
    return messages


def _follow_problems(config: ReplayConfig) -> list[str]:
    messages = []
    actions = [name for name in ("on_stop", "stop_file", "pid") if getattr(config, name) is not None]
    if actions and not config.follow:
        messages.append(f"{' and '.join(actions)} are for a log that is followed, got no --follow: add it")
    if config.follow and (len(config.rule) > 1 or ALL_RULES in config.rule):
        messages.append(f"one rule decides when a log is followed, got {', '.join(config.rule)}: name one --rule")
    if isinstance(config.stop_file, str):
        path = Path(config.stop_file)
        if path.exists():
            messages.append(f"stop_file must be a new file, and {path} exists: remove it, or name another")
        elif not path.parent.is_dir():
            messages.append(f"stop_file must be in a folder that exists, and {path.parent} does not: create it")
    return messages
