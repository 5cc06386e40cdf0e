"""All checks of a run, made in one place before a model is loaded or torch is imported."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import dvar.config.training as training_config
from dvar.config.fields import replace_invalid_fields
from dvar.config.training import TrainingConfig
from dvar.diffusion import model_files
from dvar.errors import ModelError, RefusedInput, UnreachableModel
from dvar.training import family_fit, packages, placeholder_tokens, publish, rule, run_layout, sample_prompts, shard_fit
from dvar.training.dataset import Concept, scan_concept
from dvar.training.placeholder_tokens import Tokenizer, load_tokenizer_of

_PROCESS_COUNTS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_OF_LAUNCHERS = ("RANK", "MASTER_ADDR", "MASTER_PORT")


def preflight(
    config: TrainingConfig, load_tokenizer: Callable[[TrainingConfig], Tokenizer] | None = load_tokenizer_of
) -> Concept:
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
        *process_problems(os.environ, valid),
        *shard_fit.problems(os.environ, valid),
        *rule.problems(config),
        *model_problems,
        *packages.problems(valid),
        *(run_layout.problems(valid) if is_main_process(os.environ) else ()),  # for it alone writes there
        *publish.problems(valid),
        *(image_problems if valid.resolution == config.resolution else ()),  # by the size that was asked for
    ]
    fit_problems = family_fit.problems(valid) if load_tokenizer and not model_problems else []
    problems += fit_problems or sample_prompts.problems(valid)
    if load_tokenizer and not model_problems and not fit_problems:
        try:
            tokenizer = load_tokenizer(valid)
            problems += placeholder_tokens.problems(
                valid, tokenizer, concept.prompts, placeholder_tokens.load_long_tokenizer_of(valid)
            )
        except ModelError as error:
            if isinstance(error, UnreachableModel) and not problems:
                raise  # which another attempt may find reachable
            problems.append(str(error))
    if problems:
        raise RefusedInput(problems)
    return concept


def is_main_process(environment: Mapping[str, str]) -> bool:
    """Return whether this is the main one of the processes that a launcher has started, or the only one."""
    return environment.get("RANK", "0") == "0"


def process_problems(environment: Mapping[str, str], config: TrainingConfig) -> list[str]:
    """Return what is wrong if a launcher has started several processes, by the variables that it sets."""
    name, count = _count_processes(environment)
    missing = [variable for variable in _OF_LAUNCHERS if variable not in environment]
    if count > 1 and (name != "WORLD_SIZE" or missing):
        rule = f"several processes need a launcher that sets {', '.join(_OF_LAUNCHERS)}, got {name}={count}"
        return [f"{rule} without: start them by accelerate launch or torchrun"]
    samples = config.train_batch_size * config.gradient_accumulation_steps
    if samples % count:
        rule = f"{count} processes share the samples of a step evenly, and there are {samples}"
        return [f"{rule}: choose a train_batch_size or gradient_accumulation_steps that {count} divides"]
    if count > 1 and family_fit.drops_out(config):  # whose masks are drawn for a pass, and not for a sample
        rule = "a text encoder with dropout that learns a word would learn another one in several processes"
        return [f"{rule}, got {count}: start one"]
    return []


def launcher_problems(environment: Mapping[str, str], command: str) -> list[str]:
    """Return what is wrong if a launcher has started several processes of a command that starts its own."""
    name, count = _count_processes(environment)
    rule = f"{command} starts processes itself, got {name}={count}"
    return [f"{rule}: start it without a launcher"] if count > 1 else []


def _count_processes(environment: Mapping[str, str]) -> tuple[str, int]:
    """Return how many processes a launcher has started, and the variable that says so."""
    for name in _PROCESS_COUNTS:
        if (count := environment.get(name, "1")) != "1" and count.isdigit():
            return name, int(count)
    return "", 1
