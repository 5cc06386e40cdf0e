"""Checks of a launch and a config against FSDP: how the base model of a run can be sharded over its processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from dvar.config.training import TrainingConfig

RESHARD = "FSDP_RESHARD_AFTER_FORWARD"
_OTHERS = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}


def is_sharded(environment: Mapping[str, str]) -> bool:
    """Return whether a launcher asks several processes to shard the base model, by the variables of accelerate."""
    return _is_set(environment, "ACCELERATE_USE_FSDP") and environment.get("WORLD_SIZE", "1") != "1"


def reshards(environment: Mapping[str, str]) -> bool:
    """Return whether the weights of a block are given up again after its forward pass."""
    return environment.get(RESHARD, "true").lower() == "true"


def problems(environment: Mapping[str, str], config: TrainingConfig) -> list[str]:
    """Return why the run of ``config`` cannot be trained as a launcher asks for."""
    return list(_problems(environment, config))


def _problems(environment: Mapping[str, str], config: TrainingConfig) -> Iterator[str]:
    for name in (title for variable, title in _OTHERS.items() if _is_set(environment, variable)):
        yield f"several processes train with data parallelism or FSDP, got {name}: launch with --use_fsdp"
    if not is_sharded(environment):
        return
    if (version := environment.get("FSDP_VERSION", "1")) != "2":
        yield f"the base model is sharded by version 2 of FSDP, got version {version}: launch with --fsdp_version 2"
    if (reshard := environment.get(RESHARD, "true")).lower() not in ("true", "false"):
        remedy = "launch with --fsdp_reshard_after_forward true"
        yield f"fsdp_reshard_after_forward must be true or false, got {reshard}: {remedy}"
    if _is_set(environment, "FSDP_OFFLOAD_PARAMS"):
        yield "the shards of FSDP stay on the GPUs, got fsdp_offload_params true: launch with more processes instead"
    if _is_set(environment, "FSDP_ACTIVATION_CHECKPOINTING"):
        remedy = "drop it and train with --gradient_checkpointing"
        yield f"activations are recomputed by a setting of the run, got fsdp_activation_checkpointing true: {remedy}"
    values = {"compile": config.compile, "quantize": config.quantize != "no", "offload": config.offload}
    for name in (name for name, value in values.items() if value):
        rule = "FSDP shards a base model that is neither compiled nor quantised nor offloaded"
        yield f"{rule}, got {name} {getattr(config, name)}: drop it, or launch without --use_fsdp"


def _is_set(environment: Mapping[str, str], variable: str) -> bool:
    return environment.get(variable, "false").lower() in ("true", "1", "yes")
