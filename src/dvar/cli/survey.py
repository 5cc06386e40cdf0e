"""The commands of `dvar survey`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from dvar.cli.options import convert_numbers, raise_problems, with_flags_of
from dvar.errors import RefusedInput
from dvar.survey.config import (
    SurveyBuildConfig,
    SurveyExportConfig,
    SurveyImportConfig,
    SurveyScoreConfig,
    SurveyServeConfig,
    problems,
)


def build_survey_app() -> App:
    """Return the app of `dvar survey`."""
    app = App(name="survey", help="Ask people which of two runs generates better images, and evaluate their answers.")
    app.command(build)
    app.command(serve)
    app.command(export_tasks, name="export")
    app.command(import_table, name="import")
    app.command(forget_people, name="forget")
    app.command(score)
    return app


@with_flags_of(SurveyBuildConfig)
def build(*runs: Path, **flags: Any) -> int:
    """Pair the images of finished runs into a survey.

    Runs of one method and one concept are compared: the one named first is the candidate.
    Images that the runs lack are generated first.

    Parameters
    ----------
    runs
        Folders of finished runs, two for each concept.
    """
    config = SurveyBuildConfig(**flags)
    raise_problems(problems(config))
    from dvar.survey.build import build_survey
    from dvar.survey.survey import QUESTIONS

    survey = build_survey(runs, config)
    for pair in survey.runs:
        versus = f"{pair['candidate']} ({survey.candidate}) against {pair['baseline']} ({survey.baseline})"
        print(f"compares  {pair['method']}, {pair['concept']}: {versus}")
    for question in QUESTIONS:
        print(f"asks      {len(survey.select(question, 'pair'))} pairs about {question}")
    print(f"survey    {config.output_dir}")
    print(f"next      dvar survey serve {shlex.quote(config.output_dir)}")
    return 0


@with_flags_of(SurveyServeConfig)
def serve(folder: Path, /, **flags: Any) -> int:
    """Serve a survey to people's browsers until interrupted.

    Parameters
    ----------
    folder
        Folder of the survey.
    """
    config = SurveyServeConfig(**flags)
    raise_problems(problems(config))
    from dvar.survey.server import serve_survey

    serve_survey(folder, config, lambda line: print(line, flush=True))
    return 0


@with_flags_of(SurveyExportConfig)
def export_tasks(folder: Path, /, **flags: Any) -> int:
    """Write the tasks of one question as a table for a crowdsourcing platform.

    Parameters
    ----------
    folder
        Folder of the survey.
    """
    config = SurveyExportConfig(**flags)
    raise_problems(problems(config))
    from dvar.survey.crowdsourcing import write_tasks

    count = write_tasks(folder, Path(config.output), config.question, config.images_url, config.secret_file)
    print(f"rows      {count} in {config.output}")
    return 0


@with_flags_of(SurveyImportConfig)
def import_table(folder: Path, answers: Path, /, **flags: Any) -> int:
    """Count the answers in a table with the columns ticket, worker and answer among the survey's votes.

    Parameters
    ----------
    folder
        Folder of the survey.
    answers
        Table, separated by commas or tabs; reading it again changes nothing.
    """
    config = SurveyImportConfig(**flags)
    raise_problems(problems(config))
    from dvar.survey.crowdsourcing import import_answers

    added, duplicates = import_answers(folder, answers, config.secret_file)
    print(f"answers   {added} new, {duplicates} counted before")
    return 0


def forget_people(folder: Path, /, *people: Annotated[int, Parameter(converter=convert_numbers)]) -> int:
    """Delete people and all their answers, for good; their numbers are on the progress page.

    Answers that came by import return when their table is read again.

    Parameters
    ----------
    folder
        Folder of the survey.
    people
        Numbers of people.
    """
    from dvar.survey.survey import Survey
    from dvar.survey.vote_store import open_votes

    votes = open_votes(folder, Survey.load(folder))
    if not people:
        raise RefusedInput(["people are needed, got none: see the progress page for their numbers"])
    if unknown := [str(number) for number in people if votes.rater_name(number) is None]:
        problem = f"people must have answered the survey, and {folder} has no {', '.join(unknown)}"
        raise RefusedInput([f"{problem}: see the progress page for their numbers"])
    for number in people:
        print(f"forgotten {number}: {votes.delete_rater(number)} answers")
    return 0


@with_flags_of(SurveyScoreConfig)
def score(folder: Path, /, **flags: Any) -> int:
    """Evaluate the votes, and write the result as a page.

    Parameters
    ----------
    folder
        Folder of the survey.
    """
    config = SurveyScoreConfig(**flags)
    raise_problems(problems(config))
    from dvar.survey.result_page import write_result_page
    from dvar.survey.scoring import score_votes
    from dvar.survey.survey import Survey
    from dvar.survey.vote_store import open_votes

    survey = Survey.load(folder)
    result = score_votes(survey, open_votes(folder, survey).load_votes(), config)
    for row in result.results:
        print(f"{row.method}, {row.question}: {row}")
    print(f"people    {len(result.raters)}, {len(result.excluded)} excluded for failing the controls")
    print(f"page      {write_result_page(folder, result, Path(config.output or folder / 'score.html'))}")
    return 0
