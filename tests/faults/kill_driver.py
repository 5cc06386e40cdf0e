"""Kill runs at random moments: ``python kill_driver.py MODEL PICTURES FOLDER KILLS``; prints kills and finished runs.

A process of its own, because it forks: each child has everything imported and the model loaded before its run begins,
and so the kills fall into the run.
"""

from __future__ import annotations

import copy
import multiprocessing
import random
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from short_run import Outcome, gone_on, short_run

from dvar.diffusion.backbone import load_backbone
from dvar.diffusion.stable_diffusion import StableDiffusion
from dvar.training.personalise import personalise
from dvar.training.run_layout import checkpoint_paths


def main(model: str, pictures: str, folder: str, kills: str) -> None:
    torch.set_num_threads(1)
    first = load_backbone(model, device="cpu")
    StableDiffusion.load = lambda *_, **__: copy.deepcopy(first)  # type: ignore[method-assign, assignment]
    config = replace(short_run(Path(model), Path(pictures), Path(folder) / "straight"), checkpointing_steps=1)
    began = time.monotonic()
    straight = Outcome.of(personalise(config).folder)
    longest, choose, killed, finished = time.monotonic() - began, random.Random(0), 0, 0
    fork = multiprocessing.get_context("fork")
    while killed < int(kills) or not finished:
        each = replace(config, output_dir=str(Path(folder) / f"run-{finished}"))
        child = fork.Process(target=gone_on, args=(each,))
        child.start()
        child.join(choose.uniform(0, longest))
        child.kill()
        child.join()
        if child.exitcode:
            killed += 1
            assert child.exitcode == -9, f"the run failed by itself after {killed} kills"
            if killed % 10 == 0 and checkpoint_paths(Path(each.output_dir)):  # every so often it is let to its end
                assert gone_on(each) == straight, "after kills the run differs"
                finished += 1
        else:
            assert Outcome.of(Path(each.output_dir)) == straight
            finished += 1
    print(killed, finished)


if __name__ == "__main__":
    main(*sys.argv[1:])
