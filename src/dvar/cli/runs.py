"""The commands on one run: `dvar generate`, `export` and `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dvar.cli.console import print_message
from dvar.cli.garbage_collection import collecting_late
from dvar.cli.options import raise_problems, with_flags_of
from dvar.runs.config import ExportConfig, GenerateConfig, ReportConfig, problems


@with_flags_of(GenerateConfig)
@collecting_late()
def generate(run: Path, /, **flags: Any) -> int:
    """Generate images of a learned word.

    Parameters
    ----------
    run
        Folder of a finished run.
    """
    config = GenerateConfig(**flags)
    raise_problems(problems(config))
    from dvar.runs.generate import find_missing_word, generate_images
    from dvar.runs.run_folder import RunFolder

    folder = RunFolder.open(run)
    if problem := find_missing_word(folder.settings, str(config.prompt)):
        print_message(problem)
    images = generate_images(
        folder,
        [str(config.prompt)] * config.num_images,
        range(config.seed, config.seed + config.num_images),
        folder=Path(config.output).expanduser() if config.output else None,
        guidance_scale=config.guidance_scale,
        num_inference_steps=config.num_inference_steps,
        scheduler=config.scheduler,
        mixed_precision=config.mixed_precision,
        quantize=config.quantize,
        offload=config.offload,
    )
    for image in images:
        print(image.path)
    return 0


@with_flags_of(ExportConfig)
def export(run: Path, /, **flags: Any) -> int:
    """Write a finished run in the formats that other software reads.

    Parameters
    ----------
    run
        Folder of a finished run.
    """
    config = ExportConfig(**flags)
    raise_problems(problems(config))
    from dvar.runs import export as exports
    from dvar.runs.load_model import load_result
    from dvar.runs.take_step import take_step
    from dvar.training.loading_code import has_embedding

    embedding = Path(config.embedding).expanduser() if config.embedding else None
    lora = Path(config.kohya).expanduser() if config.kohya else None
    merged = Path(config.merged).expanduser() if config.merged else None
    refusals = exports.embedding_problems(run, embedding) if embedding else []
    refusals += exports.kohya_problems(run, lora) if lora else []
    refusals += exports.merged_problems(merged) if merged else []
    refusals += exports.push_problems(config.push_to_hub) if config.push_to_hub else []
    raise_problems(refusals)
    if config.step is not None:
        for path in take_step(run, config.step):
            print(path)
    if embedding:
        print(exports.write_embedding(run, embedding))
        print("note      in prompts the new word is called by the name of this file:")
        for line in exports.describe_embedding(run, embedding.stem):
            print(f"          {line}")
    if lora:
        print(exports.write_kohya_lora(run, lora, embedding.stem if embedding else None))
        trained, result = load_result(run)
        if not embedding and has_embedding(trained.method, result):
            print("note      its prompts need the new word too: write it by --embedding NAME.safetensors")
    if merged:
        print(exports.write_merged_pipeline(run, merged, config.mixed_precision))
    if config.push_to_hub:
        print(exports.push_finished_run(run, config.push_to_hub))
    return 0


@with_flags_of(ReportConfig)
def report(run: Path, /, **flags: Any) -> int:
    """Write the report of a run, finished or not, as one page; also of a script that `dvar launch` ran.

    Parameters
    ----------
    run
        Folder of the run, or the trace of a launched script or its folder.
    """
    config = ReportConfig(**flags)
    raise_problems(problems(config))
    from dvar.runs.launch_report import find_launch_trace, write_launch_report

    if trace := find_launch_trace(run):
        print(write_launch_report(trace, Path(config.output).expanduser() if config.output else None))
        return 0
    from dvar.runs.report import write_report

    print(write_report(run, config.output))
    return 0
