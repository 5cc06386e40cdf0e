"""The commands `dvar train`, `demo` and `concepts`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cyclopts import App

from dvar.cli.options import FAILED, INTERRUPTED, say, with_flags_of
from dvar.config.fields import read_settings
from dvar.config.training import CustomDiffusionConfig, DreamBoothLoraConfig, TextualInversionConfig
from dvar.errors import RefusedInput, nearest

if TYPE_CHECKING:
    from dvar.config.training import AnyConfig
    from dvar.training.run import TrainingResult


train = App(name="train", help="Personalise a model; training stops by itself.")


@train.command(name="textual-inversion")
@with_flags_of(TextualInversionConfig)
def textual_inversion(*, config: Path | None = None, **given: Any) -> int:
    """Learn a new word for the subject of some pictures; stop by DVAR or at the cap.

    Defaults shown are the paper's; preset 'mini' (bundled model) or 'lean' (others: a cheaper probe) comes over them.
    A settings file overrides a preset, and a flag overrides both.

    Parameters
    ----------
    config
        TOML file of settings, named as the flags.
    """
    return _train(TextualInversionConfig, config, given)


@train.command(name="dreambooth-lora")
@with_flags_of(DreamBoothLoraConfig)
def dreambooth_lora(*, config: Path | None = None, **given: Any) -> int:
    """Learn a low-rank change of the U-Net for the subject of some pictures, and a new word where one is given.

    Training stops by DVAR or at the cap.  With --placeholder_token a new word is learned too, as in the paper; with
    --instance_prompt alone it is diffusers' DreamBooth-LoRA.
    Defaults shown are the paper's; preset 'mini' (bundled model) or 'lean' (others: a cheaper probe) comes over them.
    A settings file overrides a preset, and a flag overrides both.

    Parameters
    ----------
    config
        TOML file of settings, named as the flags.
    """
    return _train(DreamBoothLoraConfig, config, given)


@train.command(name="custom-diffusion")
@with_flags_of(CustomDiffusionConfig)
def custom_diffusion(*, config: Path | None = None, **given: Any) -> int:
    """Learn a new word and new cross-attention for the subject of some pictures; stop by DVAR or at the cap.

    Pictures of its class keep the class from drifting; the model draws them before training unless a folder is given.
    Defaults shown are the paper's; preset 'mini' (bundled model) or 'lean' (others: a cheaper probe) comes over them.
    A settings file overrides a preset, and a flag overrides both.

    Parameters
    ----------
    config
        TOML file of settings, named as the flags.
    """
    return _train(CustomDiffusionConfig, config, given)


def demo(
    *, concept: str | None = None, output_dir: Path | None = None, resume_from_checkpoint: str | None = None
) -> int:
    """Personalise the bundled model with one of the bundled concepts, in a few minutes on two cores.

    Parameters
    ----------
    concept
        Name of a concept, one of those that `dvar concepts` lists.
    output_dir
        Folder of the run; by default runs/demo, which each demo replaces.
    resume_from_checkpoint
        Go on with an interrupted demo: "latest", or the name of a checkpoint.
    """
    from dvar import mini

    known = mini.concepts()
    name = concept or next(iter(known))
    if name not in known:
        raise RefusedInput(
            [f"concept {name!r} is not bundled, the nearest is {nearest(name, known)}: see dvar concepts"]
        )
    return _personalise(
        {
            "instance_data_dir": known[name],
            "initializer_token": mini.noun(name),
            "output_dir": output_dir or "runs/demo",
            "overwrite": output_dir is None and not resume_from_checkpoint,
            "resume_from_checkpoint": resume_from_checkpoint,
        }
    )


def concepts() -> int:
    """List the bundled concepts: name, class noun, folder of pictures."""
    from dvar import mini

    for name, folder in mini.concepts().items():
        print(f"{name:<28}{mini.noun(name):<12}{folder}")
    return 0


def _train(known: type[AnyConfig], path: Path | None, given: dict[str, Any]) -> int:
    return _personalise({**(read_settings(path, known) if path else {}), **given}, known.method)


def _personalise(given: dict[str, Any], method: str = TextualInversionConfig.method) -> int:
    from dvar.config.presets import configure

    config = configure(given, method)
    from dvar.training.dataset import read_concept
    from dvar.training.placeholder_tokens import tokenizer_of

    concept = read_concept(config, tokenizer_of)
    title = f"{config.subject} · {config.pretrained_model_name_or_path} · {config.output_dir}"
    say(f"loading for {title}")
    from dvar.training.personalise import personalise
    from dvar.training.progress import watch

    with watch(config.max_train_steps, title, sys.stderr) as progress:
        result = personalise(config, [progress], concept=concept, tell=say)
    return _tell(result, f"{config.plain_prompt} on the beach")


def _tell(result: TrainingResult, prompt: str) -> int:
    """Print how a run ended, where to look and what to do next; return the exit status that says the same."""
    from dvar.runs.report import write_report
    from dvar.stopping.diagnosis import Reason
    from dvar.training.token_initializer import told_of

    print(result.verdict)
    for diagnosis in result.verdict.diagnoses:
        print(f"note: {diagnosis}")
    if result.verdict.reason is Reason.INTERRUPTED:
        print("next      the same command with --resume_from_checkpoint latest")
        return INTERRUPTED
    for sentence in told_of(result.folder):
        print(f"started   {sentence}")
    print(f"report    {write_report(result.folder)}")
    for path in result.weights:
        print(f"weights   {path}")
    print(f"next      dvar generate {shlex.quote(str(result.folder))} {shlex.join(['--prompt', prompt])}")
    return FAILED if result.verdict.reason is Reason.NON_FINITE else 0
