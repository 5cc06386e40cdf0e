"""The state of a job, by the files in its run's folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dvar.jobs.job import JOB, Job
from dvar.jobs.store import read_run_json
from dvar.stopping.diagnosis import Reason
from dvar.training.run_layout import CONFIG, RESULT

State = Literal["done", "failed", "missing"]
JOB_SCHEMA = {"digest": str}
END_SCHEMA = {"steps": int, "seconds": {str: float}, "verdict": {"reason": str, "sentence": str}}
"""What a batch needs of a run's result.json."""


@dataclass(frozen=True)
class JobStatus:
    """The state of a job.

    Attributes:
        state: "failed" where training broke, which another attempt would only repeat; other failures are "missing".
        facts: The facts about the end of a run; "reason" of a failure.
        conflict: What keeps the job from its folder; empty if nothing does.
    """

    job: Job
    state: State
    facts: Mapping[str, Any]
    conflict: str = ""


def read_status(job: Job) -> JobStatus:
    """Return the state of a job."""
    folder = job.config.output_dir
    saved, result = read_run_json(folder, JOB, JOB_SCHEMA), read_run_json(folder, RESULT, END_SCHEMA)
    if saved is not None and saved["digest"] != job.digest:
        rule = f"a job with an id that was used must be the same, and {job.id} has other settings or images"
        return JobStatus(
            job, "missing", {}, f"{rule} than the run in {folder}: give it another id, or move the run away"
        )
    if saved is None and (result, read_run_json(folder, CONFIG)) != (None, None):
        rule = f"the folder of a job must be its own, and {folder} holds a run that no batch has started"
        return JobStatus(job, "missing", {}, f"{rule}: give {job.id} another id, or move the run away")
    if not result:
        return JobStatus(job, "missing", {})
    facts = end_facts(result, job)
    if facts["verdict"] == Reason.NON_FINITE.value:
        return JobStatus(job, "failed", {**facts, "reason": facts["sentence"]})
    return JobStatus(job, "done", facts)


def end_facts(result: Mapping[str, Any], job: Job) -> dict[str, Any]:
    """Return the facts about the end of a run, from its result.json: verdict, steps, cap and seconds."""
    verdict, seconds = result["verdict"], sum(result["seconds"].values())
    facts = {"steps": result["steps"], "cap": job.config.max_train_steps, "seconds": seconds}
    return {**facts, "verdict": verdict["reason"], "sentence": verdict["sentence"]}


def summarise(statuses: Iterable[JobStatus], failures: Mapping[str, str]) -> dict[str, Any]:
    """Return the summary of a batch: how many jobs are in each state, their verdicts, what stopping has saved.

    Args:
        failures: The reasons of the jobs that failed now, by id.
    """
    statuses = list(statuses)
    reasons = {status.job.id: str(status.facts["reason"]) for status in statuses if status.state == "failed"}
    reasons |= {status.job.id: failures[status.job.id] for status in statuses if status.job.id in failures}
    done = [status for status in statuses if status.state == "done"]
    verdicts = [str(status.facts["verdict"]) for status in done]
    steps, caps = (sum(int(status.facts[name]) for status in done) for name in ("steps", "cap"))
    return {
        "jobs": len(statuses),
        "done": len(done),
        "failed": len(reasons),
        "missing": len(statuses) - len(done) - len(reasons),
        "verdicts": {verdict: verdicts.count(verdict) for verdict in sorted({*verdicts})},
        "steps": steps,
        "steps_saved": caps - steps,
        "seconds": sum(float(status.facts["seconds"]) for status in done),
        "failures": reasons,
    }


def format_summary(summary: Mapping[str, Any]) -> list[str]:
    """Return a summary in lines."""
    counts = ", ".join(f"{summary[name]} {name}" for name in ("done", "failed", "missing") if summary[name])
    lines = [f"jobs      {counts or 'none'} of {summary['jobs']}"]
    if summary["done"]:
        verdicts = ", ".join(f"{count} {verdict}" for verdict, count in summary["verdicts"].items())
        caps = summary["steps"] + summary["steps_saved"]
        share = 100 * summary["steps_saved"] / caps
        lines.append(f"verdicts  {verdicts}")
        lines.append(f"steps     {summary['steps']:,} of {caps:,}: stopping has saved {share:.0f} %")
    return lines + [f"failed    {name}: {reason}" for name, reason in summary["failures"].items()]
