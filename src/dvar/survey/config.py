"""Settings of the commands of `dvar survey`, and what can be wrong with them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, dataclass
from typing import Literal
from urllib.parse import urlsplit

from dvar.config.fields import COUNT, NOT_NEGATIVE, SEED, Config, Range, invalid_fields, setting
from dvar.files import writing_problem

LOOPBACK = ("127.0.0.1", "localhost", "::1")  # addresses that only this machine can reach


@dataclass(frozen=True, kw_only=True)
class SurveyBuildConfig(Config):
    """Settings of ``dvar survey build``.

    Source: Section 4.4 asks for 10 answers to each pair; the other numbers are ours.
    """

    output_dir: str = setting("survey", "Folder of the survey.", section="Survey")
    candidate: str = setting("DVAR", "Name of the run that is named first in each pair.")
    baseline: str = setting("baseline", "Name of the run that is named second.")
    overlap: int = setting(10, "Number of raters for each pair.", Range(1, most=100_000))
    per_person: int = setting(40, "Maximum number of pairs of each question for one rater.", COUNT)
    control_every: int = setting(6, "One task in this many is a control with an obvious answer.", Range(2))
    seed: int = setting(0, "Seed of orders and sides.", SEED)

    generate: bool = setting(
        True, "Generate the images that the runs do not have yet; otherwise use those they have.", section="Images"
    )
    scenes: str | None = setting(
        None, "Text file with one scene per line, such as 'on the beach'; eight built-in scenes by default."
    )
    images_per_prompt: int = setting(2, "Number of images of each prompt from each run.", Range(1, most=1000))


@dataclass(frozen=True, kw_only=True)
class SurveyServeConfig(Config):
    """Settings of ``dvar survey serve``; by default only this machine can reach the survey."""

    host: str = setting(
        "127.0.0.1", "Address to listen on; any other than this machine's own needs public_url and secret_file."
    )
    port: int = setting(8000, "Port to listen on; 0 takes a free one.", Range(0, 65536))
    public_url: str | None = setting(None, "Address that raters open, such as https://survey.example.org.")
    secret_file: str | None = setting(
        None, "File with a secret of at least 32 characters for signing; by default one in the survey's folder."
    )
    joins_per_hour: int = setting(
        30,
        "Maximum number of new raters from one address within an hour when public_url is set; 0 admits nobody new.",
        NOT_NEGATIVE,
    )


@dataclass(frozen=True, kw_only=True)
class SurveyScoreConfig(Config):
    """Settings of ``dvar survey score``."""

    min_accuracy: float = setting(
        0.8, "Share of the controls that must be right for a rater's votes to count.", NOT_NEGATIVE
    )
    confidence: float = setting(0.95, "Coverage of the intervals.", Range(0.5, 1))
    resamples: int = setting(
        2000, "Number of resamples of raters and concepts for the intervals.", Range(100, most=1_000_000)
    )
    seed: int = setting(0, "Seed of the resamples.", SEED)
    output: str | None = setting(None, "Page to write; score.html in the survey's folder by default.")


@dataclass(frozen=True, kw_only=True)
class SurveyExportConfig(Config):
    """Settings of ``dvar survey export``."""

    question: Literal["reconstruction", "customization"] = setting(MISSING, "Which of the two questions.")
    images_url: str = setting(
        MISSING, "Address of the survey's image folder, such as https://survey.example.org/pictures."
    )
    output: str = setting(MISSING, "New file of comma-separated values.")
    secret_file: str | None = setting(
        None, "File with the secret that signs the rows; by default the one in the survey's folder."
    )


@dataclass(frozen=True, kw_only=True)
class SurveyImportConfig(Config):
    """Settings of ``dvar survey import``."""

    secret_file: str | None = setting(
        None, "File with the secret that signed the rows; by default the one in the survey's folder."
    )


SurveyConfig = SurveyBuildConfig | SurveyServeConfig | SurveyScoreConfig | SurveyExportConfig | SurveyImportConfig


def problems(config: SurveyConfig) -> list[str]:
    """Return everything wrong with ``config``, one line each."""
    lines = [line for _, line in invalid_fields(config)]
    match config:
        case SurveyBuildConfig():
            if not lines:
                lines += _output_problems(config.output_dir, folder=True)
            if config.candidate == config.baseline:
                problem = f"candidate and baseline must have different names, got {config.candidate!r} twice"
                lines.append(f"{problem}: rename one")
        case SurveyServeConfig():
            lines += _address_problems(config)
        case SurveyScoreConfig():
            if not lines and config.min_accuracy > 1:
                lines.append(f"min_accuracy must be at most 1, got {config.min_accuracy}: give a share")
            if not lines and config.output and not config.output.endswith(".html"):
                lines.append(f"output must end in .html, got {config.output!r}: name a page")
            elif not lines and config.output:
                lines += _output_problems(config.output)
        case SurveyExportConfig() if not lines:
            if not _is_plain_address(config.images_url, with_path=True):
                rule = "images_url must look like https://survey.example.org/pictures"
                lines.append(f"{rule}, got {config.images_url!r}: give the address at which raters load the images")
            lines += _output_problems(config.output)
    return lines


def _output_problems(path: str, *, folder: bool = False) -> list[str]:
    problem = writing_problem(path, folder=folder)
    return [f"{'output_dir' if folder else 'output'} cannot be written, {problem}: name another"] if problem else []


def _address_problems(config: SurveyServeConfig) -> Iterator[str]:
    if config.host not in LOOPBACK:
        for name, value in (("public_url", config.public_url), ("secret_file", config.secret_file)):
            if not value:
                yield f"{name} is missing: it is needed to listen on {config.host}, which other machines can reach"
    if config.public_url is not None and not _is_plain_address(config.public_url, with_path=False):
        yield f"public_url must look like https://survey.example.org, got {config.public_url!r}: remove the rest"


def _is_plain_address(text: str, *, with_path: bool) -> bool:
    """Return whether a text is the address of a site, without a user, a query or a fragment."""
    try:
        url = urlsplit(text)
        port = url.port  # a `ValueError` where it is none
    except ValueError:
        return False
    plain = not (url.username or url.password or "@" in url.netloc or url.query or url.fragment or port == 0)
    path = with_path or not url.path.strip("/")
    return (
        plain
        and path
        and url.scheme in ("http", "https")
        and bool(url.hostname)
        and text.isprintable()
        and " " not in text
    )
