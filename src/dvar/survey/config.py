"""Settings of `dvar survey`, with their help, ranges and checks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

from dvar.config.fields import COUNT, NOT_NEGATIVE, Config, Range, faults, setting

LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""The addresses under which a machine reaches itself alone."""


@dataclass(frozen=True, kw_only=True)
class SurveyBuildConfig(Config):
    """Every setting of ``dvar survey build``.

    Source: Section 4.4 asks for 10 answers to each pair; the other numbers are ours.
    """

    output_dir: str = setting("survey", "Folder of the survey.", section="The survey")
    candidate: str = setting("DVAR", "What to call the run that is named first of two.")
    baseline: str = setting("baseline", "What to call the run that is named second.")
    overlap: int = setting(10, "People who are asked about each pair.", COUNT)
    per_person: int = setting(40, "Pairs that one person is asked about in each of the two surveys, at most.", COUNT)
    control_every: int = setting(6, "One task in this many is a control with an obvious answer.", Range(2))
    seed: int = setting(0, "Seed of orders and sides.", NOT_NEGATIVE)

    draw: bool = setting(
        True, "Draw what the runs have not drawn yet; otherwise pair what is there.", section="Pictures"
    )
    scenes: str | None = setting(
        None, "Text file of scenes, such as 'on the beach', one a line; eight of our own by default."
    )
    pictures_per_prompt: int = setting(2, "Pictures that each run draws of each prompt.", COUNT)


@dataclass(frozen=True, kw_only=True)
class SurveyServeConfig(Config):
    """Every setting of ``dvar survey serve``: by default this machine alone can reach it."""

    host: str = setting("127.0.0.1", "Address to listen on; another than this machine's own needs the two below.")
    port: int = setting(8000, "Port to listen on; 0 takes a free one.", Range(0, 65536))
    public_url: str | None = setting(None, "Address that people open, such as https://survey.example.org.")
    secret_file: str | None = setting(
        None,
        "File with a secret of at least 32 characters that signs everything; by default one in the survey's folder.",
    )
    joins_per_hour: int = setting(
        30,
        "People whom one address may send within an hour, where there is a public_url; 0 lets nobody new in.",
        NOT_NEGATIVE,
    )


@dataclass(frozen=True, kw_only=True)
class SurveyScoreConfig(Config):
    """Every setting of ``dvar survey score``."""

    min_accuracy: float = setting(
        0.8, "Share of the controls that must be right for a person's votes to count.", NOT_NEGATIVE
    )
    confidence: float = setting(0.95, "Share of samples in which an interval holds the truth.", Range(0.5, 1))
    resamples: int = setting(2000, "Samples of people and concepts behind the clustered intervals.", Range(100))
    seed: int = setting(0, "Seed of those samples.", NOT_NEGATIVE)
    output: str | None = setting(None, "Page to write; score.html in the survey's folder by default.")


def survey_problems(config: SurveyBuildConfig | SurveyServeConfig | SurveyScoreConfig) -> list[str]:
    """Everything wrong with these settings by themselves, a line each; empty when in order."""
    problems = [said for _, said in faults(config)]
    match config:
        case SurveyBuildConfig():
            if config.candidate == config.baseline:
                said = f"candidate and baseline must have different names, got {config.candidate!r} twice"
                problems.append(f"{said}: rename one")
        case SurveyServeConfig():
            problems += _public_problems(config)
        case SurveyScoreConfig():
            if not problems and config.min_accuracy > 1:
                problems.append(f"min_accuracy must be at most 1, got {config.min_accuracy}: give a share")
    return problems


def _public_problems(config: SurveyServeConfig) -> Iterator[str]:
    if config.host not in LOOPBACK:
        for name, value in (("public_url", config.public_url), ("secret_file", config.secret_file)):
            if not value:
                yield f"{name} is missing: it is needed to listen on {config.host}, where others can reach it"
    url = urlsplit(config.public_url or "https://host")
    if url.scheme not in ("http", "https") or not url.hostname or url.path.strip("/") or url.query or url.fragment:
        yield f"public_url must be like https://survey.example.org, got {config.public_url!r}: drop the rest"
