"""The trainers that dvar can be added to: the files that each needs, and what to put into its config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dvar.errors import RefusedInput
from dvar.files import write_atomically
from dvar.registry import Registry


@dataclass(frozen=True)
class Tool:
    """A trainer with a program of its own.

    Args:
        title: Its name.
        marker: A file of its checkout, by which a folder is known as one.
        files: Contents of the files that it needs, by their paths in the checkout.
        steps: What is left for a user to do, as lines.
    """

    title: str
    marker: str
    files: Mapping[str, str] = field(default_factory=dict)
    steps: tuple[str, ...] = ()


TOOLS: Registry[Tool] = Registry("tool", "dvar.tools")
"""The tools by name. Other packages add theirs under the entry point group "dvar.tools"."""


def integrate(name: str, checkout: Path) -> list[Path]:
    """Write the files that a tool needs into its checkout, and return those that are new.

    Files that are there already with this content stay as they are.

    Raises:
        RefusedInput: There is no such tool, the folder is no checkout of it, or a file there has another content.
    """
    tool = TOOLS.find(name)
    if not (checkout / tool.marker).is_file():
        raise RefusedInput(
            [f"{checkout} is no checkout of {tool.title}, it lacks {tool.marker}: name the folder that holds that file"]
        )
    new_files = {checkout / path: content for path, content in tool.files.items()}
    new_files = {path: content for path, content in new_files.items() if not _holds(path, content)}
    if existing := [path for path in new_files if path.exists()]:
        raise RefusedInput(
            f"{path} exists with another content: move it away, or keep it and change nothing" for path in existing
        )
    try:
        for path, content in new_files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content.encode())
    except OSError as error:
        problem = error.strerror or error
        raise RefusedInput([f"{checkout} cannot be written to ({problem}): check its rights"]) from error
    return list(new_files)


def _holds(path: Path, content: str) -> bool:
    return path.is_file() and path.read_bytes() == content.encode()


_AI_TOOLKIT = '''\
"""A trainer that stops when the concept is learned (dvar)."""

from toolkit.extension import Extension


class DvarExtension(Extension):
    uid = "dvar_trainer"
    name = "Trainer that stops when the concept is learned"

    @classmethod
    def get_process(cls):
        from dvar.stopping.integrations.trainers.ai_toolkit import build_trainer
        from extensions_built_in.sd_trainer.DiffusionTrainer import DiffusionTrainer

        return build_trainer(DiffusionTrainer)


AI_TOOLKIT_EXTENSIONS = [DvarExtension]
'''

_SIMPLETUNER = '''\
"""A tracker that ends the training when the concept is learned (dvar)."""

from accelerate.tracking import GeneralTracker
from dvar.stopping.integrations.trainers.simpletuner import LoggedLossStop

from simpletuner.helpers.training.state_tracker import StateTracker


class DvarTracker(GeneralTracker):
    name = "dvar"
    requires_logging_directory = False
    main_process_only = True

    def __init__(self, run_name, logging_dir=None):
        super().__init__()
        self.stop = None

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        pass

    def log(self, values, step=None, **kwargs):
        if self.stop is None:
            self.stop = LoggedLossStop(StateTracker.get_args())
        self.stop.log(values, step)
'''

_ONETRAINER = '''\
"""Train as train.py does, and stop when the concept is learned (dvar)."""

from util.import_util import script_imports

script_imports()

import train
from dvar.stopping.integrations.trainers.onetrainer import watch_trainers

from modules.trainer.GenericTrainer import GenericTrainer

if __name__ == "__main__":
    watch_trainers(GenericTrainer)
    train.main()
'''

TOOLS.register(
    "ai-toolkit",
    Tool(
        "ai-toolkit",
        "jobs/process/BaseSDTrainProcess.py",
        {"extensions/dvar_trainer/__init__.py": _AI_TOOLKIT},
        (
            "in the YAML of the job, for the process:",
            "  type: dvar_trainer",
            "  train:",
            "    validation_config:",
            "      validate_every_n_steps: 5",
            "      validation_items:  # training images: nothing need be held out",
            "        - {image_path: images/mug/00.png, prompt: a photo of a mug}",
            "  dvar: {window: 310, threshold: 0.15}  # may be left out",
            "to train a text encoder or an embedding, use another way: ai-toolkit keeps the outputs of the start",
        ),
    ),
)
TOOLS.register(
    "simpletuner",
    Tool(
        "SimpleTuner",
        "simpletuner/helpers/training/trainer.py",
        {"simpletuner/custom-trackers/dvar_tracker.py": _SIMPLETUNER},
        (
            "in the settings of the training:",
            "  --report_to=custom-tracker --custom_tracker=dvar_tracker --eval_steps_interval=5",
            "in the list of data sets: one of type eval, which may hold the training images",
            "environment variables, which may be left out: DVAR_WINDOW=310 DVAR_THRESHOLD=0.15",
        ),
    ),
)
TOOLS.register(
    "onetrainer",
    Tool(
        "OneTrainer",
        "modules/trainer/GenericTrainer.py",
        {"scripts/train_dvar.py": _ONETRAINER},
        (
            "in the configuration: switch validation on, every 5 steps, and add a concept of the type VALIDATION,",
            "which may be the folder of the training images; then export it and run",
            "  python scripts/train_dvar.py --config-path CONFIG.json",
            "environment variables, which may be left out: DVAR_WINDOW=310 DVAR_THRESHOLD=0.15",
        ),
    ),
)
TOOLS.register(
    "sd-scripts",
    Tool(
        "sd-scripts",
        "train_network.py",
        steps=("no file is needed: accelerate launch -m dvar launch train_network.py and the script's own flags",),
    ),
)
TOOLS.register(
    "musubi-tuner",
    Tool(
        "musubi-tuner",
        "src/musubi_tuner/training/trainer_base.py",
        steps=(
            "no file is needed: accelerate launch -m dvar launch src/musubi_tuner/flux_2_train_network.py,",
            "or the script of another model, and its own flags",
        ),
    ),
)
TOOLS.register(
    "diffsynth",
    Tool(
        "DiffSynth-Studio",
        "diffsynth/diffusion/runner.py",
        steps=(
            "no file is needed: accelerate launch -m dvar launch examples/flux/model_training/train.py,",
            "or the script of another model, and its own flags",
        ),
    ),
)
