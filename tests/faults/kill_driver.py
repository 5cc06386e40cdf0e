"""Kill runs at random moments: ``python kill_driver.py MODEL IMAGES FOLDER KILLS``; print kills and finished runs."""

# A process of its own, because it forks: each child has everything imported and the model loaded before its run begins,
# so the kills fall into the run. The lock of tqdm, which is shared across a fork, would stay held by a child that is
# killed while it prints; one of threads is each process's own.

from __future__ import annotations

import copy
import multiprocessing
import random
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import torch
from short_run import Outcome, resume_run, short_run
from tqdm import tqdm

from dvar.diffusion.backbone import load_backbone
from dvar.diffusion.backbones.stable_diffusion import StableDiffusion
from dvar.training.personalise import personalise
from dvar.training.run_layout import checkpoint_paths


def main(model: str, images: str, folder: str, kills: str) -> None:
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())
    backbone = load_backbone(model, device="cpu")
    StableDiffusion.load = lambda *_, **__: copy.deepcopy(backbone)  # type: ignore[method-assign, assignment]
    config = replace(short_run(Path(model), Path(images), Path(folder) / "reference"), checkpointing_steps=1)
    start = time.monotonic()
    reference = Outcome.of(personalise(config).folder)
    duration, random_state, kill_count, run_count = time.monotonic() - start, random.Random(0), 0, 0
    fork = multiprocessing.get_context("fork")
    while kill_count < int(kills) or not run_count:
        settings = replace(config, output_dir=str(Path(folder) / f"run-{run_count}"))
        child = fork.Process(target=resume_run, args=(settings,))
        child.start()
        child.join(random_state.uniform(0, duration))
        child.kill()
        child.join()
        if child.exitcode:
            kill_count += 1
            assert child.exitcode == -9, f"the run failed by itself after {kill_count} kills"
            if kill_count % 10 == 0 and checkpoint_paths(Path(settings.output_dir)):  # now and then the run may finish
                assert resume_run(settings) == reference, "after kills the run differs"
                run_count += 1
        else:
            assert Outcome.of(Path(settings.output_dir)) == reference
            run_count += 1
    print(kill_count, run_count)


if __name__ == "__main__":
    main(*sys.argv[1:])
