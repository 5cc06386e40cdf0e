"""The commands `dvar train` and `concepts`."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from dvar.cli.console import FAILED, INTERRUPTED, print_message, program_name
from dvar.cli.garbage_collection import collecting_late
from dvar.cli.options import Command, option_value, raise_problems, with_flags_of
from dvar.config.fields import read_settings
from dvar.errors import DvarError, first_line
from dvar.training.methods.registry import METHODS

if TYPE_CHECKING:
    from dvar.config.training import TrainingConfig
    from dvar.training.loop import StepRecord
    from dvar.training.run import TrainingResult

HELP = {
    "textual-inversion": "Learn a new word for a concept.",
    "dreambooth-lora": (
        "Learn a low-rank change of the denoising network for a concept, and a new word if one is given.\n\n"
        "With --placeholder_token a new word is learned too, as in the paper; with --instance_prompt alone this is the "
        "DreamBooth-LoRA of diffusers."
    ),
    "custom-diffusion": (
        "Learn a new word and new cross-attention weights for a concept.\n\n"
        "Images of its class prevent the class from drifting; the model generates them before training unless a folder "
        "is given."
    ),
}
PRESETS_HELP = (
    "\n\nTraining stops by DVAR or at the cap.\n\n"
    "The values shown are those of preset '{preset}'. --preset names another; the default is that of the bundled "
    "model, 'mini' or 'mini-flow', and 'lean' for any other, in which Stable Diffusion XL and later families have some "
    "of their own. A settings file overrides the preset, and a flag overrides both."
)
ConfigFile = Annotated[
    Path | None, Parameter(name="--config", help="TOML file of settings, named as the flags.", group="Settings file")
]


def build_train_app(tokens: Sequence[str]) -> App:
    """Return the app of `dvar train`, one command for each method.

    Only what the command line needs is built: all methods take 20 ms, for the plugins of other packages.

    Args:
        tokens: The words of the command line. The method that they name gets its flags, and its help page shows the
            values of the preset that they lead to.
    """
    app = App(name="train", help="Personalise a model; training stops by itself.")
    if "train" not in tokens:
        return app
    for method in [word for word in tokens[1:2] if word in METHODS] or METHODS:
        config_type = METHODS[method].config_type
        command, text = _train_command(config_type), HELP.get(method, f"Train with {config_type.title}.")
        if method in tokens:
            values = settings_of(config_type, tokens) if {"--help", "-h"} & {*tokens} else None
            command = with_flags_of(config_type, values)(command)
            text += PRESETS_HELP.format(preset=values.preset) if values else ""
        app.command(command, name=method, help=text)
    return app


def settings_of(config_type: type[TrainingConfig], tokens: Sequence[str]) -> TrainingConfig:
    """Return the settings of a method with the model, the preset and the settings file that a command line names."""
    from dvar.config.presets import configure

    path = option_value(tokens, "config")
    names = ("preset", "pretrained_model_name_or_path")
    flags = {name: value for name in names if (value := option_value(tokens, name))}
    return configure({**(read_settings(path, config_type) if path else {}), **flags}, config_type)


def _train_command(config_type: type[TrainingConfig]) -> Command:
    def train(*, config: ConfigFile = None, **flags: Any) -> int:
        settings = read_settings(config, config_type) if config else {}
        return run_training({**settings, **flags}, config_type)

    return train


def concepts(folder: str | None = None, /) -> int:
    """List the bundled concepts, or check a folder of your own: name, class noun, images.

    Parameters
    ----------
    folder
        Folder of concepts, each a folder of images with a file beside it, as dvar record --concepts_dir reads it.
    """
    from dvar import mini

    if folder is not None:
        return check_folder(folder)
    for name, images in mini.concepts().items():
        print(f"{name:<28}{mini.noun(name):<12}{images}")
    return 0


def check_folder(folder: str) -> int:
    """Print what each concept in ``folder`` holds, every problem, and which of the paper's are there."""
    from dvar.paper.published import CONCEPTS
    from dvar.recordings.concepts import check_concepts

    checks = check_concepts(folder)
    for check in checks:
        print(f"{check.name:<28}{check.noun or '–':<12}{check.images} images, {check.prompts} prompts of its own")
    names = {check.name for check in checks if not check.problems}
    for source, of_source in CONCEPTS.items():
        missing = [name for name in of_source if name not in names]
        if len(missing) < len(of_source):
            listed = f"; not there: {', '.join(missing)}" if missing else ""
            print(f"the paper's, from {source}: {len(of_source) - len(missing)} of {len(of_source)}{listed}")
    raise_problems([problem for check in checks for problem in check.problems])
    return 0


def run_training(
    settings: Mapping[str, Any],
    config_type: type[TrainingConfig],
    finish: Callable[[TrainingResult, str], int] | None = None,
) -> int:
    """Train by these settings, show the progress, print the result and return the exit status.

    Args:
        settings: Settings by name, over those of the preset.
        config_type: The config class of the method.
        finish: What is done with the result and a prompt, in place of `print_result`.
    """
    with collecting_late() as begin:
        return _train(settings, config_type, finish or print_result, begin)


def _train(
    settings: Mapping[str, Any],
    config_type: type[TrainingConfig],
    finish: Callable[[TrainingResult, str], int],
    begin: Callable[[StepRecord], None],
) -> int:
    """Do what `run_training` does; ``begin`` is called with each step."""
    from dvar.config.presets import configure_to_cap
    from dvar.training.family_fit import family_settings
    from dvar.training.preflight import is_main_process, preflight

    config, scaled = configure_to_cap(settings, config_type, family_settings)
    if config.extend:
        settings = {**_read_step_settings(config.output_dir), **settings}
        config, scaled = configure_to_cap(settings, config_type, family_settings)
    concept = preflight(config)
    if not is_main_process(os.environ):  # which speaks for the others
        from dvar.training.personalise import personalise

        result = personalise(config, [begin], concept=concept)
        return INTERRUPTED if result.verdict.reason.value == "interrupted" else 0
    if scaled:
        print_message(scaled)
    title = f"{config.subject} · {config.pretrained_model_name_or_path} · {config.output_dir}"
    print_message(f"loading for {title}")
    from dvar.training.personalise import personalise
    from dvar.training.progress import read_earlier_losses, show_progress

    with show_progress(config.max_train_steps, title, sys.stderr, read_earlier_losses(config)) as progress:
        result = personalise(config, [begin, progress], concept=concept)
    return finish(result, f"{config.plain_prompt} on the beach")


def _read_step_settings(folder: str) -> dict[str, int]:
    """Return the settings that count steps of the run in ``folder``, which a low cap may have scaled."""
    from dvar.config.presets import STEP_SETTINGS
    from dvar.files import read_json
    from dvar.training.run_layout import CONFIG

    try:
        config = read_json(Path(folder).expanduser() / CONFIG, dict.fromkeys(STEP_SETTINGS, int))
    except (OSError, ValueError):  # there is no run, as preflight says
        return {}
    return {name: config[name] for name in STEP_SETTINGS}


def print_result(result: TrainingResult, prompt: str, again: str = "the same command with") -> int:
    """Print how a run ended, what it left and what to do next, and return the exit status.

    Args:
        result: The result of the run.
        prompt: A prompt to generate images with.
        again: The command that continues an interrupted run, without the flag for it.
    """
    from dvar.runs.report import write_report
    from dvar.stopping.diagnosis import Reason
    from dvar.training.token_initializer import describe_initializers

    print(result.verdict)
    for diagnosis in result.verdict.diagnoses:
        print(f"note: {diagnosis}")
    if result.verdict.reason is Reason.INTERRUPTED:
        print(f"next      {again} --resume_from_checkpoint latest")
        return INTERRUPTED
    for sentence in describe_initializers(result.folder):
        print(f"started   {sentence}")
    try:
        print(f"report    {write_report(result.folder)}")
    except (OSError, DvarError) as error:  # what was learned matters more, and is on the disk
        folder = shlex.quote(str(result.folder))
        print_message(f"no report could be written: {first_line(error)}; dvar report {folder} tries again")
    for path in result.weights:
        print(f"weights   {path}")
    print(f"next      {program_name()} generate {shlex.quote(str(result.folder))} {shlex.join(['--prompt', prompt])}")
    return FAILED if result.verdict.reason is Reason.NON_FINITE else 0
