"""Jobs, read from a TOML file, a CSV file or a folder of folders."""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import dvar.config.training as training_config
from dvar.config.fields import canonical_settings, read_settings
from dvar.config.presets import configure_to_cap
from dvar.config.training import BUNDLED_MODEL, TrainingConfig
from dvar.errors import RefusedInput, name_some
from dvar.files import read_text
from dvar.jobs.config import BatchConfig
from dvar.jobs.job import PATHS, Job, is_url
from dvar.recordings.concepts import read_noun
from dvar.training import pack_fit, rule
from dvar.training.family_fit import family_settings
from dvar.training.methods.registry import METHODS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
JOB_KEYS, NOUN = ("id", "method"), "noun"
DECIDED = ("resume_from_checkpoint", "overwrite", "extend", "checkpoints_total_limit")
"""Settings that a batch decides."""
IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"}

Table = Mapping[str, Any]
"""The settings of one job by name, with its "id" and "method", as a file holds them."""


def read_jobs(source: str | Path | Sequence[Table], config: BatchConfig) -> list[Job]:
    """Return the jobs of a batch.

    Args:
        source: A TOML file with a table ``[[job]]`` for each job and settings of all of them before; a CSV file with a
            column for each setting; a folder with a folder of images for each job, each perhaps with NAME.json beside
            it that names its class noun; or the tables themselves.
        config: The settings of the batch.

    Raises:
        RefusedInput: Settings are unknown or cannot be used, ids or folders are given twice, or there are no jobs;
            every problem of every job is named.
    """
    jobs, problems = read_jobs_and_problems(source, config)
    if problems:
        raise RefusedInput(problems)
    return jobs


def read_jobs_and_problems(source: str | Path | Sequence[Table], config: BatchConfig) -> tuple[list[Job], list[str]]:
    """Return the jobs of a batch that can be used, and what is wrong with the others, as `read_jobs` reads them."""
    shared: Table = {}
    problems: list[str] = []
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        name = path.name
        try:
            shared, tables, problems = _read_source(path)
        except RefusedInput as refused:
            return [], list(refused.problems)
    else:
        tables, name = list(source), "jobs"
    jobs: list[Job] = []
    jobs_by_problem: dict[str, list[str]] = {}
    for number, table in enumerate(tables):
        try:
            jobs.append(_build_job(table, shared, config))
        except RefusedInput as refused:
            for problem in refused.problems:
                jobs_by_problem.setdefault(problem, []).append(str(table.get("id") or number + 1))
    problems += [f"{name}, job {name_some(labels)}: {problem}" for problem, labels in jobs_by_problem.items()]
    problems += _duplicate_problems(jobs)
    if not tables and not problems:
        problems.append(f"{name} must hold at least one job, got none: add a table [[job]], a line or a folder")
    return jobs, problems


def _read_source(path: Path) -> tuple[Table, list[Table], list[str]]:
    """Return the settings of all jobs, the table of each, and what is wrong with others."""
    if path.is_dir():
        return {}, *_read_folders_and_problems(path)
    if path.suffix not in (".toml", ".csv"):
        problem = f"jobs must be a .toml or .csv file or a folder of folders, got {path}"
        raise RefusedInput([f"{problem}: name another" if path.exists() else f"{problem}, which does not exist"])
    try:
        text = read_text(path, "utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RefusedInput([f"{path} must be text in UTF-8, and cannot be read ({error}): check it"]) from error
    return (*_parse_toml(path, text), []) if path.suffix == ".toml" else ({}, *_parse_csv_and_problems(path, text))


def _parse_toml(path: Path, text: str) -> tuple[Table, list[Table]]:
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RefusedInput([f"{path} is not valid TOML: {error}"]) from error
    tables = content.pop("job", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise RefusedInput(
            [f"{path} must have a table [[job]] for each job, got job = {tables!r}: double the brackets"]
        )
    return content, tables


def _parse_csv_and_problems(path: Path, text: str) -> tuple[list[Table], list[str]]:
    """Return the rows, without their empty cells, and what is wrong with columns that no row has a cell of.

    `_build_job` converts a text to the type of its setting.
    """
    rows = list(csv.reader(text.splitlines()))
    header = [name.strip() for name in rows[0]] if rows else []
    problems = [f"{path}: column {name!r} is there twice: keep one" for name in {*header} if header.count(name) > 1]
    wide = [number for number, row in enumerate(rows, 1) if len(row) > len(header)]
    problems += [f"{path}, line {number} has more cells than there are columns: quote its commas" for number in wide]
    if problems:
        raise RefusedInput(problems)
    named = (dict(zip(header, (cell.strip() for cell in row), strict=False)) for row in rows[1:] if any(row))
    tables: list[Table] = [{name: _Cell(cell) for name, cell in row.items() if cell} for row in named]
    blank = [name for name in header if name and not any(name in table for table in tables)]
    unknown = [f"{path}: column {name!r} is no setting of any method: rename or remove it" for name in blank]
    return tables, [problem for name, problem in zip(blank, unknown, strict=True) if not _is_setting(name)]


def _is_setting(name: str) -> bool:
    """Return whether some method has a setting of this name."""
    if name in (*JOB_KEYS, NOUN):
        return True
    for method in METHODS.values():
        with suppress(RefusedInput):
            return bool(canonical_settings({name: None}, method.config_type))
    return False


class _Cell(str):
    """A cell of a CSV file, of no type yet."""


def _read_folders_and_problems(folder: Path) -> tuple[list[Table], list[str]]:
    """Return a table for each folder of images inside ``folder``, and what is wrong with the other folders."""
    tables: list[Table] = []
    problems: list[str] = []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith("."):
            if not any(file.suffix.lower() in IMAGES for file in path.iterdir()):
                problems.append(f"each folder in {folder} must hold images, and {path.name} has none: remove it")
                continue
            try:
                noun = {NOUN: read_noun(path)} if path.with_name(f"{path.name}.json").exists() else {}
            except RefusedInput as refused:
                problems += refused.problems
                continue
            tables.append({"id": path.name, "instance_data_dir": str(path), **noun})
    return tables, problems


def _build_job(table: Table, shared: Table, config: BatchConfig) -> Job:
    """Return the job of a table.

    Raises:
        RefusedInput: Its id or settings cannot be used; every problem is named.
    """
    method = str(table.get("method", shared.get("method", config.method)))
    config_type = METHODS.find(method).config_type
    values = read_settings(config.config, config_type) if config.config else {}
    problems: list[str] = []
    for part in (shared, table):
        settings = {name: value for name, value in part.items() if name not in JOB_KEYS}
        named, unknown = _split_known(_name_noun(settings, config_type), config_type)
        values |= _convert_cells(named, config_type)
        problems += unknown
    problems += [f"{name} is decided by the batch, got {values[name]!r}: drop it" for name in DECIDED if name in values]
    images = values.get("instance_data_dir")
    name = str(table.get("id") or (Path(str(images)).name if images else ""))
    if not ID.fullmatch(name):
        problems.append(f"id must be letters, digits, '.', '_' and '-', got {name!r}: give another")
    values.setdefault("output_dir", f"{config.output_dir.rstrip('/')}/{name}")
    limit = {} if config.checkpoints == "all" else {"checkpoints_total_limit": 1}
    run, scaled = configure_to_cap({**values, **limit}, config_type, family_settings)
    problems += [*training_config.problems(run), *rule.problems(run), *_path_problems(run)]
    problems += pack_fit.problems(run) if config.pack > 1 else []
    if problems:
        raise RefusedInput(problems)
    return Job(name, _with_whole_paths(run), config.checkpoints, scaled)


def _split_known(settings: Table, config_type: type[TrainingConfig]) -> tuple[dict[str, Any], list[str]]:
    """Return the settings that are known, under their field names, and what is wrong with the others."""
    try:
        return canonical_settings(settings, config_type), []
    except RefusedInput as refused:
        values: dict[str, Any] = {}
        for name, value in settings.items():
            with suppress(RefusedInput):
                values |= canonical_settings({name: value}, config_type)
        return values, list(refused.problems)


def _name_noun(settings: Table, config_type: type[TrainingConfig]) -> dict[str, Any]:
    """Return settings with the class noun of a folder under the name that a method has for it."""
    settings = dict(settings)
    if noun := settings.pop(NOUN, None):
        names = {item.name for item in fields(config_type)}
        settings.setdefault("class_noun" if "class_noun" in names else "initializer_token", noun)
    return settings


def _with_whole_paths(config: TrainingConfig) -> TrainingConfig:
    """Return a config whose paths do not depend on the folder that a worker runs in."""
    paths = {"output_dir": config.output_dir} if not is_url(config.output_dir) else {}
    for name in PATHS:
        value = getattr(config, name)
        if value and value != BUNDLED_MODEL and not is_url(value) and Path(value).expanduser().exists():
            paths[name] = value
    whole: dict[str, Any] = {name: str(Path(value).expanduser().resolve()) for name, value in paths.items()}
    return replace(config, **whole)


def _path_problems(config: TrainingConfig) -> Iterator[str]:
    """Yield which folders and files that the digest of a job is of cannot be read."""
    for name in ("instance_data_dir", "class_data_dir"):
        folder = getattr(config, name)
        if isinstance(folder, str) and not Path(folder).expanduser().is_dir():
            yield f"{name} must be a folder, and {folder} is none: check the path"
    for name in ("concepts_list", "sample_prompts"):
        file = getattr(config, name)
        if isinstance(file, str) and not Path(file).expanduser().is_file():
            yield f"{name} must be a file, and {file} is none: check the path"


def _convert_cells(settings: Mapping[str, Any], config_type: type[TrainingConfig]) -> dict[str, Any]:
    """Return settings with the cells of a CSV file as values of the type of their field."""
    hints = get_type_hints(config_type)
    return {
        name: _convert(str(value), hints[name]) if isinstance(value, _Cell) else value
        for name, value in settings.items()
    }


def _convert(text: str, hint: Any) -> Any:
    """Return a text as a value of a type, or as it is where it cannot be one: the checks then refuse it."""
    if get_origin(hint) in (Union, UnionType):
        hint = next(part for part in get_args(hint) if part is not NoneType)
    if hint is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    try:
        return hint(text) if hint in (int, float) and "_" not in text else text  # Python reads 1_9 as 19
    except ValueError:
        return text


def _duplicate_problems(jobs: Sequence[Job]) -> Iterator[str]:
    """Yield the ids and the folders that several jobs share."""
    ids: set[str] = set()
    folders: dict[str, str] = {}
    for job in jobs:
        folder = job.config.output_dir
        if job.id in ids:
            yield f"each job needs an id of its own, got {job.id!r} twice: give the second another id"
        elif folder in folders:
            yield f"each job needs a folder of its own, and {job.id} and {folders[folder]} share {folder}: change one"
        ids.add(job.id)
        folders.setdefault(folder, job.id)
