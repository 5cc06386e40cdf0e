"""The commands of ``dvar survey``: parse, call, print, as `dvar.cli.main`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any, Literal

from cyclopts import App
from cyclopts.types import PositiveInt

from dvar.cli.options import with_flags_of
from dvar.errors import RefusedInput
from dvar.survey.config import SurveyBuildConfig, SurveyScoreConfig, SurveyServeConfig, survey_problems

survey = App(name="survey", help="Ask people which of two runs draws better pictures, and read their answers.")


@survey.command
@with_flags_of(SurveyBuildConfig)
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
    from dvar.survey.build import build
    from dvar.survey.survey import QUESTIONS

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
@with_flags_of(SurveyServeConfig)
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
    from dvar.survey.server import serve

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
    from dvar.survey.crowdsourcing import write_tasks
    from dvar.survey.server import read_secret

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
    from dvar.survey.crowdsourcing import read_answers
    from dvar.survey.server import read_secret

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
    from dvar.survey.survey import VOTES, Survey
    from dvar.survey.vote_store import VoteStore

    ballots = VoteStore(folder / VOTES, Survey.open(folder))
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
@with_flags_of(SurveyScoreConfig)
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
    from dvar.survey.result_page import write_page
    from dvar.survey.scoring import score
    from dvar.survey.survey import VOTES, Survey
    from dvar.survey.vote_store import VoteStore

    asked = Survey.open(folder)
    found = score(asked, VoteStore(folder / VOTES, asked).votes(), config)
    for row in found.after:
        print(f"{row.method}, {row.question}: {row}")
    print(f"people    {len(found.people)}, {len(found.excluded)} left out for failing the controls")
    print(f"page      {write_page(folder, found, Path(config.output or folder / 'score.html'))}")
    return 0
