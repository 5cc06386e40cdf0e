"""All checks of a run, made in one place before a model is loaded or torch is imported."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import dvar.config.training as training_config
from dvar.config.fields import replace_invalid_fields
from dvar.config.training import TrainingConfig
from dvar.diffusion import model_files
from dvar.errors import ModelError, RefusedInput
from dvar.training import family_fit, packages, placeholder_tokens, rule, run_layout
from dvar.training.dataset import Concept, scan_concept
from dvar.training.placeholder_tokens import Tokenizer, load_tokenizer_of

_PROCESS_COUNTS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def preflight(config: TrainingConfig, load_tokenizer: Callable[[str], Tokenizer] | None = load_tokenizer_of) -> Concept:
    """Return the concept of ``config``, once everything that a run needs has been checked.

    Args:
        config: The config of the run.
        load_tokenizer: Loads the tokenizer of a base model; with None the placeholder tokens are not checked.

    Raises:
        RefusedInput: Something is wrong with the config, the process, the rule, the base model or what it is asked to
            learn, the CLIP, the run's folder, a package, the images, their captions or the placeholder tokens; every
            problem is named.
    """
    valid = replace_invalid_fields(config)
    concept, image_problems = scan_concept(valid)
    model_problems = model_files.problems(valid)
    problems = [
        *training_config.problems(config),
        *process_problems(os.environ),
        *rule.problems(config),
        *model_problems,
        *packages.problems(valid),
        *run_layout.problems(valid),
        *image_problems,
    ]
    fit_problems = family_fit.problems(valid) if load_tokenizer and not model_problems else []
    problems += fit_problems
    if load_tokenizer and not model_problems and not fit_problems:
        try:
            tokenizer = load_tokenizer(valid.pretrained_model_name_or_path)
            problems += placeholder_tokens.problems(valid, tokenizer, concept.prompts)
        except ModelError as error:
            problems.append(str(error))
    if problems:
        raise RefusedInput(problems)
    return concept


def process_problems(environment: Mapping[str, str]) -> list[str]:
    """Return what is wrong if a launcher has started several processes, by the variables that it sets."""
    for name in _PROCESS_COUNTS:
        if (count := environment.get(name, "1")) != "1":
            message = f"dvar train runs in one process, got {name}={count}"
            return [f"{message}: start it without torchrun, mpirun, or accelerate launch of several processes"]
    return []
