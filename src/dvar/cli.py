"""The command line: parse, call, print.  Whatever is slow to import is imported by the command that needs it."""

from __future__ import annotations

import shlex
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter, UnknownOptionError
from cyclopts.types import NonNegativeFloat, NonNegativeInt, PositiveInt

from dvar.config import (
    BUNDLED_MODEL,
    CONFIGS,
    CustomDiffusionConfig,
    DreamBoothLoraConfig,
    Sampler,
    TextualInversionConfig,
)
from dvar.errors import CheckpointError, DvarError, ModelError, RefusedInput, TraceError
from dvar.flags import whole, with_flags_of
from dvar.laboratory.config import EXPERIMENTS, ReplayConfig, ReproduceConfig, replay_problems, reproduce_problems
from dvar.laboratory.survey.commands import survey
from dvar.settings import nearest, read_settings

if TYPE_CHECKING:
    from dvar.config import AnyConfig
    from dvar.laboratory.replay import Outcome
    from dvar.trainer.job import Result

REFUSED, FAILED, INTERRUPTED = 2, 1, 130
PLAIN_WIDTH = 200  # of a table that goes into a file or a pipe

# Plain text, because reading help as Markdown costs 40 ms of the 100 that help takes.
app = App(
    name="dvar",
    help="Know when a text-to-image fine-tune is done.",
    help_format="plaintext",
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)
train = App(name="train", help="Personalise a model; training stops by itself.")
app.command(train)
app.command(survey)


def main(tokens: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0, 2 for refused input, 1 for a failure, 130 when interrupted."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
        try:
            return app(tokens, exit_on_error=False, print_error=False) or 0
        except UnknownOptionError as error:
            known = [name for argument in error.argument_collection for name in argument.names]
            flag = error.token.keyword or error.token.value
            return _fail(REFUSED, [f"unknown flag {flag}: the nearest known one is {nearest(flag, known)}"])
        except CycloptsError as error:
            return _fail(REFUSED, [" ".join(str(error).split())])
        except RefusedInput as error:
            return _fail(REFUSED, error.problems)
        except (CheckpointError, ModelError, TraceError) as error:
            return _fail(REFUSED, str(error).splitlines())
        except DvarError as error:
            return _fail(FAILED, str(error).splitlines())
        except ModuleNotFoundError as error:
            if str(error.name).partition(".")[0] == "dvar":
                raise
            extra = "survey" if error.name in ("starlette", "uvicorn", "jinja2", "itsdangerous") else "train"
            return _fail(FAILED, [f"this command needs {error.name}: pip install 'dvar[{extra}]'"])
        except KeyboardInterrupt:
            return _fail(INTERRUPTED, ["interrupted"])


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


@app.command
def generate(
    run: Path,
    /,
    *,
    prompt: str,
    num_images: Annotated[PositiveInt, Parameter(converter=whole)] = 4,
    seed: Annotated[NonNegativeInt, Parameter(converter=whole)] = 0,
    guidance_scale: NonNegativeFloat | None = None,
    num_inference_steps: Annotated[PositiveInt | None, Parameter(converter=whole)] = None,
    scheduler: Sampler | None = None,
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
    scheduler
        Scheduler that draws; the run's own by default.
    output
        Folder for the pictures; "generated" in the run's folder by default.
    """
    from dvar.laboratory.drawings import draw
    from dvar.laboratory.runs import Run

    drawn = draw(
        Run.open(run),
        [prompt] * num_images,
        range(seed, seed + num_images),
        folder=output,
        guidance_scale=guidance_scale,
        num_inference_steps=num_inference_steps,
        scheduler=scheduler,
    )
    for drawing in drawn:
        print(drawing.path)
    return 0


@app.command
def export(run: Path, /, *, merged: Path | None = None, kohya: Path | None = None) -> int:
    """Write a finished run in the forms that other software reads.

    Parameters
    ----------
    run
        Folder of a finished run.
    merged
        New folder for a whole diffusers pipeline: the base model with what was learned merged into it.
    kohya
        New file, NAME.safetensors, for the LoRA of a dreambooth-lora run under the names that ComfyUI, AUTOMATIC1111
        and kohya's scripts read.
    """
    if not (merged or kohya):
        raise RefusedInput(["export needs --merged or --kohya, got neither: name what to write"])
    from dvar.trainer.export import write_kohya, write_merged

    if kohya:
        print(write_kohya(run, kohya))
    if merged:
        print(write_merged(run, merged))
    return 0


@app.command
def report(run: Path, /) -> int:
    """Write the report of a run, finished or not, as one page.

    Parameters
    ----------
    run
        Folder of the run.
    """
    from dvar.laboratory.report import write_report

    print(write_report(run))
    return 0


@app.command(help_epilogue="\n".join(f"{name:<10}{says}" for name, says in EXPERIMENTS.items()))
@with_flags_of(ReproduceConfig)
def reproduce(names: tuple[str, ...], /, **given: Any) -> int:
    """Make tables and figures of the paper from recorded runs: their data, their pictures and a page.

    Parameters
    ----------
    names
        Which ones, as listed below, or "all" for a report of everything.
    """
    config = ReproduceConfig(names=names, **given)
    if problems := reproduce_problems(config):
        raise RefusedInput(problems)
    from dvar.laboratory.reproduce import reproduce as make

    print(make(config, _say))
    return 0


@app.command
@with_flags_of(ReplayConfig)
def replay(log: Path, /, **given: Any) -> int:
    """Tell when each rule would have stopped a recorded run, and why.

    Reads trace.jsonl, CSV, JSON lines, W&B's exported history, SimpleTuner's and ai-toolkit's logs.
    With dvar[tensorboard] it reads event files too.

    Parameters
    ----------
    log
        File of a curve over steps, or a folder with one.
    """
    config = ReplayConfig(**given)
    if problems := replay_problems(config):
        raise RefusedInput(problems)
    from dvar.laboratory.replay import replayed, write_picture
    from dvar.stopper.logs import read_log

    trace = read_log(log, config.metric, config.step_column)
    outcomes = replayed(trace, config)
    _print_outcomes(outcomes)
    if config.output:
        print(f"picture   {write_picture(Path(config.output), log.name, trace, outcomes, config)}")
    return 0


@app.command
def record(
    methods: Annotated[list[str], Parameter(consume_multiple=True)] | None = None,
    /,
    *,
    concepts: Annotated[list[str], Parameter(consume_multiple=True)] | None = None,
    first: PositiveInt | None = None,
    seeds: Annotated[list[NonNegativeInt], Parameter(consume_multiple=True)] | None = None,
    preset: Literal["quick", "cpu", "full"] = "cpu",
    quick: bool = False,
    records: Path = Path("records"),
    workers: PositiveInt | None = None,
    model: str = BUNDLED_MODEL,
    concepts_dir: Path | None = None,
    clip: str | None = None,
    dino: str | None = None,
    pairing: Literal["all pairs", "row by row"] = "all pairs",
    config: Path | None = None,
    estimate: bool = False,
) -> int:
    """Record runs for the laboratory: train past every stop, and measure on the way.

    What is there and whole is not made again, so the same command goes on after a kill.

    Parameters
    ----------
    methods
        Methods by name; all of them by default.
    concepts
        Concepts by name; all but the tuning ones by default.
    first
        Only so many of the concepts.
    seeds
        Seeds of the runs; 0 by default.
    preset
        How much is measured: quick, cpu or full.
    quick
        The same as --preset quick.
    records
        Folder of all records.
    workers
        Runs at once; one a GPU, or one a core, by default.
    model
        A hub id, a diffusers folder, or "mini", the bundled model.
    concepts_dir
        Folder of concepts, each a folder of pictures with a concept.json that says its class; else the bundled ones.
    clip
        Folder or hub id of the CLIP that scores; the bundled one by default.
    dino
        Folder or hub id of a DINO that scores too.
    pairing
        What a picture is held against: all references, or the one in its row.
    config
        TOML file of settings of the method, where one method is recorded.
    estimate
        Only tell how long it will take.
    """
    from dvar.laboratory import sweeps
    from dvar.laboratory.plans import Recording

    chosen = methods or list(CONFIGS)
    if config and len(chosen) > 1:
        raise RefusedInput(["settings are of one method: name it before --config"])
    given = read_settings(config, CONFIGS[chosen[0]]) if config and chosen[0] in CONFIGS else {}
    folder = str(concepts_dir) if concepts_dir else None
    base = Recording(
        *("", "", 0, str(records), "quick" if quick else preset, model, folder, clip, dino, pairing),
        settings=tuple(given.items()),
    )
    names = (concepts or sweeps.laboratory_concepts(folder))[:first]
    runs = sweeps.grid(base, chosen, names, seeds or [0])
    rows = sweeps.recorded(runs, lambda line: print(line, flush=True), workers=workers, only_estimate=estimate)
    if estimate:
        return 0
    for line in sweeps.table(rows):
        print(line)
    return FAILED if any(row.state != "done" for row in rows) else 0


@app.command
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


@app.command
def concepts() -> int:
    """List the bundled concepts: name, class noun, folder of pictures."""
    from dvar import mini

    for name, folder in mini.concepts().items():
        print(f"{name:<28}{mini.noun(name):<12}{folder}")
    return 0


def _train(known: type[AnyConfig], path: Path | None, given: dict[str, Any]) -> int:
    return _personalise({**(read_settings(path, known) if path else {}), **given}, known.method)


def _personalise(given: dict[str, Any], method: str = TextualInversionConfig.method) -> int:
    from dvar.trainer.presets import configure

    config = configure(given, method)
    from dvar.trainer.concept import read_concept
    from dvar.trainer.words import tokenizer_of

    concept = read_concept(config, tokenizer_of)
    title = f"{config.subject} · {config.pretrained_model_name_or_path} · {config.output_dir}"
    _say(f"loading for {title}")
    from dvar.trainer.progress import watch
    from dvar.trainer.run import personalise

    with watch(config.max_train_steps, title, sys.stderr) as progress:
        result = personalise(config, [progress], concept=concept, tell=_say)
    return _tell(result, f"{config.plain_prompt} on the beach")


def _tell(result: Result, prompt: str) -> int:
    """Print how a run ended, where to look and what to do next; return the exit status that says the same."""
    from dvar.laboratory.report import write_report
    from dvar.stopper.verdict import Reason
    from dvar.trainer.initialisation import told_of

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


def _print_outcomes(outcomes: Iterable[Outcome]) -> None:
    """Print a table of the rules, wrapped to the terminal; plain lines where there is none."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("rule", no_wrap=True)
    table.add_column("stops at", justify="right", no_wrap=True)
    table.add_column("why", overflow="fold")
    for outcome in outcomes:
        table.add_row(outcome.name, "–" if outcome.stop is None else f"{outcome.stop}", outcome.why)
    Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH).print(table)


def _say(line: str) -> None:
    print(f"dvar: {line}", file=sys.stderr, flush=True)


def _fail(status: int, lines: Iterable[str]) -> int:
    for line in lines:
        _say(line)
    return status
