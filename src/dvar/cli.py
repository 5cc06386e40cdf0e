"""The command line: parse, call, print.  Whatever is slow to import is imported by the command that needs it."""

from __future__ import annotations

import inspect
import shlex
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_type_hints

from cyclopts import App, CycloptsError, Group, Parameter, Token, UnknownOptionError, convert
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
from dvar.laboratory.config import (
    EXPERIMENTS,
    ReplayConfig,
    ReproduceConfig,
    SurveyBuildConfig,
    SurveyScoreConfig,
    SurveyServeConfig,
    replay_problems,
    reproduce_problems,
    survey_problems,
)
from dvar.settings import aliases, nearest, read_settings

if TYPE_CHECKING:
    from dvar.config import AnyConfig
    from dvar.laboratory.replay import Outcome
    from dvar.settings import Config
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
survey = App(name="survey", help="Ask people which of two runs draws better pictures, and read their answers.")
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


def _whole(kind: Any, tokens: Sequence[Token]) -> Any:
    """A whole number as it was written; by itself Cyclopts reads 1.5 as 2."""
    if "." in tokens[0].value:
        raise ValueError(f"must be a whole number, got {tokens[0].value}")
    return convert(kind, tokens)


def _with_flags_of(settings: type[Config]) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Give a command a flag for each field of a settings class; its keyword arguments are then the flags given.

    A field that the command takes itself, under the same name, gets none.
    """

    def decorate(command: Callable[..., int]) -> Callable[..., int]:
        own = inspect.signature(command, eval_str=True).parameters.values()
        flags = [parameter for parameter in own if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
        taken = {parameter.name for parameter in flags}
        hints, others, groups = get_type_hints(settings), aliases(settings), dict[str, Group]()
        title = ""
        for item in (item for item in fields(settings) if item.name not in taken):
            title = item.metadata["section"] or title
            group = groups.setdefault(title, Group(title, sort_key=len(flags)))
            names = [item.name, *(alias for alias, name in others.items() if name == item.name)]
            hint = hints[item.name]
            shown = Parameter(
                name=[f"--{name}" for name in names],
                help=item.metadata["help"],
                group=group,
                negative_iterable=(),
                converter=_whole if int in (hint, *get_args(hint)) else None,
                show_default=", ".join if isinstance(item.default, tuple) else None,
            )
            flag = inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=item.default)
            flags.append(flag.replace(annotation=Annotated[hint, shown]))
        command.__signature__ = inspect.Signature(flags)  # type: ignore[attr-defined]
        return command

    return decorate


@train.command(name="textual-inversion")
@_with_flags_of(TextualInversionConfig)
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
@_with_flags_of(DreamBoothLoraConfig)
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
@_with_flags_of(CustomDiffusionConfig)
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
    num_images: Annotated[PositiveInt, Parameter(converter=_whole)] = 4,
    seed: Annotated[NonNegativeInt, Parameter(converter=_whole)] = 0,
    guidance_scale: NonNegativeFloat | None = None,
    num_inference_steps: Annotated[PositiveInt | None, Parameter(converter=_whole)] = None,
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
@_with_flags_of(ReproduceConfig)
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
@_with_flags_of(ReplayConfig)
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


@survey.command
@_with_flags_of(SurveyBuildConfig)
def build(*runs: Path, **given: Any) -> int:
    """Pair the pictures of finished runs into a survey.

    Runs of one method and one concept are compared: the one named first is the candidate.
    What they have not drawn yet is drawn first.

    Parameters
    ----------
    runs
        Folders of finished runs, two for each concept.
    """
    config = SurveyBuildConfig(**given)
    if problems := survey_problems(config):
        raise RefusedInput(problems)
    from dvar.laboratory.survey.build import build
    from dvar.laboratory.survey.plan import QUESTIONS

    made = build(runs, config)
    for pair in made.runs:
        told = f"{pair['candidate']} ({made.candidate}) against {pair['baseline']} ({made.baseline})"
        print(f"compares  {pair['method']}, {pair['concept']}: {told}")
    for question in QUESTIONS:
        print(f"asks      {len(made.of(question, 'pair'))} pairs about {question}")
    print(f"survey    {config.output_dir}")
    print(f"next      dvar survey serve {shlex.quote(config.output_dir)}")
    return 0


@survey.command
@_with_flags_of(SurveyServeConfig)
def serve(folder: Path, /, **given: Any) -> int:
    """Serve a survey to people's browsers until interrupted.

    Parameters
    ----------
    folder
        Folder of the survey.
    """
    config = SurveyServeConfig(**given)
    if problems := survey_problems(config):
        raise RefusedInput(problems)
    from dvar.laboratory.survey.server import serve

    serve(folder, config, lambda line: print(line, flush=True))
    return 0


@survey.command(name="export")
def export_tasks(
    folder: Path,
    /,
    *,
    question: Literal["reconstruction", "customization"],
    pictures: str,
    output: Path,
    secret_file: Path | None = None,
) -> int:
    """Write the tasks of one question as a table for a platform that finds people to answer.

    Parameters
    ----------
    folder
        Folder of the survey.
    question
        Which of the two surveys.
    pictures
        Address at which the survey's folder of pictures can be read, such as https://survey.example.org/pictures.
    output
        New file, comma-separated.
    secret_file
        File with the secret that signs the rows; by default the one in the survey's folder.
    """
    from dvar.laboratory.survey.exchange import write_tasks
    from dvar.laboratory.survey.server import read_secret

    secret = read_secret(folder, str(secret_file) if secret_file else None)
    print(f"rows      {write_tasks(folder, output, question, secret, pictures)} in {output}")
    return 0


@survey.command(name="import")
def import_answers(folder: Path, answers: Path, /, *, secret_file: Path | None = None) -> int:
    """Count the answers in a table with the columns ticket, worker and answer among the survey's votes.

    Parameters
    ----------
    folder
        Folder of the survey.
    answers
        Table, separated by commas or tabs; reading it again changes nothing.
    secret_file
        File with the secret that signed the rows; by default the one in the survey's folder.
    """
    from dvar.laboratory.survey.exchange import read_answers
    from dvar.laboratory.survey.server import read_secret

    new, known = read_answers(folder, answers, read_secret(folder, str(secret_file) if secret_file else None))
    print(f"answers   {new} new, {known} counted before")
    return 0


@survey.command(name="forget")
def forget_people(folder: Path, /, *people: PositiveInt) -> int:
    """Delete people and all that they answered, for good; the numbers are on the page of progress.

    Answers that came by import come back when their table is read again.

    Parameters
    ----------
    folder
        Folder of the survey.
    people
        Numbers of people.
    """
    from dvar.laboratory.survey.ballots import Ballots
    from dvar.laboratory.survey.plan import VOTES, Survey

    ballots = Ballots(folder / VOTES, Survey.open(folder))
    unknown = [str(number) for number in people if ballots.name(number) is None]
    if unknown or not people:
        said = (
            f"numbers of people of {folder} are needed, it has no {', '.join(unknown)}"
            if unknown
            else "people are needed, got none"
        )
        raise RefusedInput([f"{said}: see the page of progress"])
    for number in people:
        print(f"forgotten {number}: {ballots.forget(number)} answers")
    return 0


@survey.command(name="score")
@_with_flags_of(SurveyScoreConfig)
def score_votes(folder: Path, /, **given: Any) -> int:
    """Tell what the votes say, and write it as a page.

    Parameters
    ----------
    folder
        Folder of the survey.
    """
    config = SurveyScoreConfig(**given)
    if problems := survey_problems(config):
        raise RefusedInput(problems)
    from dvar.laboratory.survey.ballots import Ballots
    from dvar.laboratory.survey.page import write_page
    from dvar.laboratory.survey.plan import VOTES, Survey
    from dvar.laboratory.survey.score import score

    asked = Survey.open(folder)
    found = score(asked, Ballots(folder / VOTES, asked).votes(), config)
    for row in found.after:
        print(f"{row.method}, {row.question}: {row}")
    print(f"people    {len(found.people)}, {len(found.excluded)} left out for failing the controls")
    print(f"page      {write_page(folder, found, Path(config.output or folder / 'score.html'))}")
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
