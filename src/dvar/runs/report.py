"""The report of a run: one page with the verdict, the curves, the images and how to use the result."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dvar.config.training import BUNDLED_MODELS
from dvar.html.images import embed_image
from dvar.html.templates import pluralise, render, write_page
from dvar.runs import report_figures
from dvar.runs.run_folder import RunFolder
from dvar.stopping.diagnosis import Reason
from dvar.training.loading_code import STABLE_DIFFUSION, generate_line, import_lines, load_lines
from dvar.training.pipeline_code import load_pipeline_code, pipeline_import_lines
from dvar.training.run_layout import REPORT

NEXT_STEPS = {
    Reason.STABILISED: "Check the sample images, then use the result as shown below.",
    Reason.CAP: "If L_det is still falling, train longer (--max_train_steps). If it only fluctuates, use a larger held "
    "batch (--eval_batch_size).",
    Reason.NOT_LEARNING: "Check the images and the learning rate, then train again.",
    Reason.RISING: "Use the weights of the lowest L_det. If the loss rose early, lower the learning rate.",
    Reason.NON_FINITE: "Lower the learning rate or use float32, and continue from a checkpoint before that step.",
    Reason.INTERRUPTED: "Repeat the command with --resume_from_checkpoint latest to continue.",
}
"""What to do after a run that ended for this reason."""


class KeyNumber(NamedTuple):
    """One of the numbers at the top of a report: its value, what it is, and a detail."""

    value: str
    name: str
    detail: str


def write_report(run_dir: str | Path, path: str | Path | None = None) -> Path:
    """Write the report of a run, finished or not, and return its path.

    The page is one file that loads nothing and runs no script. Equal runs give equal bytes.

    Args:
        run_dir: Folder of the run.
        path: The page; ``report.html`` in the folder of the run by default.

    Raises:
        RefusedInput: The folder holds no run or a damaged one, or the page cannot be written.
        TraceError: The trace of the run is damaged.
    """
    run = RunFolder.open(run_dir)
    return write_page(Path(path).expanduser() if path else run.folder / REPORT, render_report(run))


def render_report(run: RunFolder) -> str:
    """Return the report as HTML."""
    steps, model = report_figures.select_sample_steps(run), run.settings.pretrained_model_name_or_path
    return render(
        "dvar.runs",
        "report.html",
        run=run,
        verdict=run.verdict,
        subject=run.settings.subject,
        model=BUNDLED_MODELS.get(model, model),
        next_step=NEXT_STEPS.get(run.verdict.reason) if run.result else None,
        numbers=list(_key_numbers(run)),
        figures=report_figures,
        sample_steps=steps,
        sample_rows=report_figures.arrange_samples(run, steps),
        final_images=run.samples.get(max(run.samples, default=0) if run.exported_step is None else run.exported_step),
        image=embed_image,
        command=_command(run),
        program=_program(run) if run.result else "",
        tables=_settings(run),
    )


def _key_numbers(run: RunFolder) -> Iterator[KeyNumber]:
    cap, total = run.config["max_train_steps"], sum(run.seconds.values())
    yield KeyNumber(f"{run.steps}", "step" if run.steps == 1 else "steps", f"of at most {cap}")
    if total:
        shares = [f"{kind} {100 * seconds / total:.0f} %" for kind, seconds in run.seconds.items()]
        yield KeyNumber(_duration(total), "time", " · ".join(shares))
    if run.result and run.stopped_by_condition and total < run.seconds_to_cap:
        to_cap = f"{pluralise(cap, 'step')} without the probe take about {_duration(run.seconds_to_cap)}"
        yield KeyNumber(_duration(run.seconds_to_cap - total), "time saved", to_cap)
    if run.best:
        (step, value), first = run.best, run.trace.values[0]
        gain = f", {100 * (1 - value / first):.2g} % below the first" if value < first else ""
        yield KeyNumber(f"{step}", "step of the lowest L_det", f"{value:.5g}{gain}")


def _prompt(run: RunFolder) -> str:
    return f"{run.settings.plain_prompt} on the beach"


def _command(run: RunFolder) -> str:
    return shlex.join(["dvar", "generate", run.config["output_dir"], "--prompt", _prompt(run)])


def _program(run: RunFolder) -> str:
    """Return Python code that generates an image with the weights of a finished run and stock diffusers."""
    result = run.result or {}
    weights, family, config = result["weights"], result.get("family", STABLE_DIFFUSION), run.settings
    lines = [
        *pipeline_import_lines(config),
        *import_lines(weights, family),
        "",
        f"pipeline = {load_pipeline_code(config, public=False)}",
        *load_lines(weights, run.config["output_dir"], run.config["placeholder_token"], family),
        generate_line(config, _prompt(run), family),
    ]
    return "\n".join(lines)


def _settings(run: RunFolder) -> dict[str, dict[str, str]]:
    """Return the settings of the run and the versions of its software as texts."""
    settings = {name: value for name, value in run.config.items() if name != "versions"}
    tables: dict[str, dict[str, Any]] = {"Settings": settings, "Versions": run.config.get("versions", {})}
    return {
        title: {name: value if isinstance(value, str) else _quote(value) for name, value in values.items()}
        for title, values in tables.items()
    }


def _quote(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _duration(seconds: float) -> str:
    """Return the time in its two largest units: "48 s", "3 min 12 s", "1 h 04 min"."""
    rounded = round(seconds)
    if rounded < 60:
        return f"{rounded} s" if rounded else f"{seconds:.1g} s"
    minutes, rest = divmod(rounded, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"
