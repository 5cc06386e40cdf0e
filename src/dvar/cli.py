"""The command line: parse, call, print.  Whatever is slow to import is imported by the command that needs it."""

from __future__ import annotations

import inspect
import shlex
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from cyclopts import App, CycloptsError, Group, Parameter

from dvar.config import ALIASES, TextualInversionConfig, read_settings
from dvar.errors import DvarError, RefusedInput

if TYPE_CHECKING:
    from dvar.trainer.run import Result

REFUSED, FAILED, INTERRUPTED = 2, 1, 130

app = App(name="dvar", help="Know when a text-to-image fine-tune is done.", result_action="return_value")
train = App(name="train", help="Personalise a model; training stops by itself.")
app.command(train)


def main(tokens: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0, 2 for refused input, 1 for a failure, 130 when interrupted."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
        try:
            return app(tokens, exit_on_error=False, print_error=False) or 0
        except CycloptsError as error:
            return _fail(REFUSED, [" ".join(str(error).split())])
        except RefusedInput as error:
            return _fail(REFUSED, error.problems)
        except DvarError as error:
            return _fail(FAILED, str(error).splitlines())
        except KeyboardInterrupt:
            return _fail(INTERRUPTED, ["interrupted"])


def _with_flags_of(settings: type) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Give a command a flag for every field of a settings class; its keyword arguments are then those that were given."""

    def decorate(command: Callable[..., int]) -> Callable[..., int]:
        own = inspect.signature(command, eval_str=True).parameters.values()
        flags = [parameter for parameter in own if parameter.kind is inspect.Parameter.KEYWORD_ONLY]
        hints, group = get_type_hints(settings), None
        for item in fields(settings):
            if title := item.metadata["section"]:
                group = Group(title, sort_key=len(flags))
            names = [item.name, *(alias for alias, name in ALIASES.items() if name == item.name)]
            shown = Parameter(name=[f"--{name}" for name in names], help=item.metadata["help"], group=group)
            flag = inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=item.default)
            flags.append(flag.replace(annotation=Annotated[hints[item.name], shown]))
        command.__signature__ = inspect.Signature(flags)  # type: ignore[attr-defined]
        return command

    return decorate


@train.command(name="textual-inversion")
@_with_flags_of(TextualInversionConfig)
def textual_inversion(*, config: Path | None = None, **given: Any) -> int:
    """Learn a new word for the subject of a folder of pictures; stop by DVAR, or at the cap.

    The defaults shown are the paper's; the bundled model has a preset of its own.  A preset is overridden by the settings
    file, and that by a flag.

    Parameters
    ----------
    config
        TOML file of settings, named as the flags.
    """
    return _personalise({**(read_settings(config) if config else {}), **given})


@app.command
def generate(
    run: Path,
    *,
    prompt: str,
    num_images: int = 4,
    seed: int = 0,
    guidance_scale: float | None = None,
    num_inference_steps: int | None = None,
    output: Path | None = None,
) -> int:
    """Draw pictures of a learned word.

    Parameters
    ----------
    run
        Folder of a finished run.
    prompt
        What to draw; write the learned word where the subject goes.
    num_images
        How many pictures.
    seed
        Seed of the first picture; each further one has the next.
    guidance_scale
        Classifier-free guidance; the run's own by default.
    num_inference_steps
        Denoising steps; the run's own by default.
    output
        Folder for the pictures; "generated" in the run's folder by default.
    """
    from dvar.diffusion.sampling import sample
    from dvar.laboratory.runs import Run
    from dvar.trainer.run import personalised

    settings = Run.open(run).config
    pictures = sample(
        personalised(run),
        [prompt] * num_images,
        range(seed, seed + num_images),
        size=settings["resolution"],
        steps=num_inference_steps or settings["num_inference_steps"],
        guidance=settings["guidance_scale"] if guidance_scale is None else guidance_scale,
    )
    folder = output or run / "generated"
    folder.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        path = _unused(folder)
        picture.save(path)
        print(path)
    return 0


@app.command
def report(run: Path) -> int:
    """Write the report of a run, finished or not, as one page.

    Parameters
    ----------
    run
        Folder of the run.
    """
    from dvar.laboratory.report import write_report

    print(write_report(run))
    return 0


@app.command
def demo(*, concept: str | None = None, output_dir: Path | None = None) -> int:
    """Personalise the bundled model with one of the bundled concepts, in a few minutes on two cores.

    Parameters
    ----------
    concept
        Name of a concept, one of those that `dvar concepts` lists.
    output_dir
        Folder of the run; by default runs/demo, which each demo replaces.
    """
    from dvar import mini

    known = mini.concepts()
    name = concept or next(iter(known))
    if name not in known:
        raise RefusedInput([f"concept {name!r} is not bundled, the nearest is {nearest(name, known)}: see dvar concepts"])
    return _personalise(
        {
            "instance_data_dir": known[name],
            "initializer_token": mini.noun(name),
            "output_dir": output_dir or "runs/demo",
            "overwrite": output_dir is None,
        }
    )


@app.command
def concepts() -> int:
    """List the bundled concepts: name, class noun, folder of pictures."""
    from dvar import mini

    for name, folder in mini.concepts().items():
        print(f"{name:<28}{mini.noun(name):<12}{folder}")
    return 0


def _personalise(given: dict[str, Any]) -> int:
    from dvar.trainer.presets import configure

    config = configure(given)
    if problems := config.problems():
        raise RefusedInput(problems)
