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
    from dvar.runs.export import list_embeddings, push_finished_run, write_kohya_lora, write_merged_pipeline
    from dvar.runs.take_step import take_step

    if config.step is not None:
        for path in take_step(run, config.step):
            print(path)
    if config.kohya:
        print(write_kohya_lora(run, Path(config.kohya).expanduser()))
        for path in list_embeddings(run):
            print(f"note      the new word is not in it but in {path}, which prompts need too:")
            print(f"          ComfyUI and AUTOMATIC1111 read it as an embedding, called {path.stem} in prompts")
    if config.merged:
        print(write_merged_pipeline(run, Path(config.merged).expanduser(), config.mixed_precision))
    if config.push_to_hub:
        print(push_finished_run(run, config.push_to_hub))
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
