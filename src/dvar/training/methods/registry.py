"""The registry of methods of personalisation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol

from dvar.config.fields import invalid_fields
from dvar.config.methods import CustomDiffusionConfig, DreamBoothLoraConfig, TextualInversionConfig
from dvar.config.training import TrainingConfig
from dvar.errors import RefusedInput
from dvar.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dvar.diffusion.backbone import Backbone


class TrainableMethod(Protocol):
    """The part of a method that the training loop uses: its parameters, and copies of its state."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that the optimizer updates."""
        ...

    @property
    def state(self) -> dict[str, Tensor]:
        """A copy of what is learned, on the CPU."""
        ...

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what ``state`` returned."""
        ...


class PersonalisationMethod(TrainableMethod, Protocol):
    """A method as a run uses it: trainable, and with prompts and exports of its own."""

    def expand(self, prompt: str) -> str:
        """Return ``prompt`` as the tokenizer must see it."""
        ...

    def files(self, state: Mapping[str, Tensor]) -> Mapping[str, Mapping[str, Tensor]]:
        """Return a ``state`` as the weight files that stock diffusers loads: file name to tensors by name."""
        ...

    @property
    def metadata(self) -> Mapping[str, str]:
        """The metadata of the weight files."""
        ...


@dataclass(frozen=True)
class MethodEntry:
    """A method of personalisation, as the registry holds it.

    Attributes:
        config_type: Its config class, which has its ``method`` name and its ``title``.
        build: Puts the method of a config, untrained, into a backbone whose weights are frozen, and returns it. It
            imports what it needs when it is called, so that the registry loads without torch. The method's weight
            files have the names in `dvar.training.run_layout.WEIGHTS`, so that stock diffusers loads them.
    """

    config_type: type[TrainingConfig]
    build: Callable[[Any, Backbone], PersonalisationMethod]

    @property
    def name(self) -> str:
        """The name on the command line and in files."""
        return self.config_type.method

    @property
    def title(self) -> str:
        """The name in prose."""
        return self.config_type.title


def build_textual_inversion(config: TextualInversionConfig, backbone: Backbone) -> PersonalisationMethod:
    """Return Textual Inversion, put into ``backbone`` and untrained."""
    from dvar.training.methods.textual_inversion import TextualInversion

    return TextualInversion(backbone, config.placeholder_token, str(config.initializer_token), config.num_vectors)


def build_dreambooth_lora(config: DreamBoothLoraConfig, backbone: Backbone) -> PersonalisationMethod:
    """Return DreamBooth-LoRA, put into ``backbone`` and untrained."""
    from dvar.training.methods.dreambooth_lora import DreamBoothLora

    return DreamBoothLora(
        backbone,
        config.placeholder_token,
        str(config.initializer_token),
        config.num_vectors,
        rank=config.rank,
        alpha=config.lora_alpha,
        targets=config.lora_targets,
        text_encoder=config.train_text_encoder,
        seed=config.seed,
        dora=config.use_dora,
        plus_ratio=config.lora_plus_ratio,
        text_ratio=config.text_encoder_lr / config.learning_rate if config.text_encoder_lr else 1.0,
    )


def build_custom_diffusion(config: CustomDiffusionConfig, backbone: Backbone) -> PersonalisationMethod:
    """Return Custom Diffusion, put into ``backbone`` and untrained."""
    from dvar.training.methods.custom_diffusion import CustomDiffusion

    tokens = dict(zip(config.placeholder_tokens, config.initializer_tokens, strict=True))
    return CustomDiffusion(backbone, tokens, config.num_vectors, part=config.freeze_model)


METHODS: Registry[MethodEntry] = Registry("method", "dvar.methods")
"""Every method by name. Other packages add a `MethodEntry` of theirs by an entry point of the group "dvar.methods"."""

for entry in (
    MethodEntry(TextualInversionConfig, build_textual_inversion),
    MethodEntry(DreamBoothLoraConfig, build_dreambooth_lora),
    MethodEntry(CustomDiffusionConfig, build_custom_diffusion),
):
    METHODS.register(entry.name, entry)


def build_method(config: TrainingConfig, backbone: Backbone) -> PersonalisationMethod:
    """Return the method of ``config``, put into ``backbone`` and untrained."""
    return METHODS.find(config.method).build(config, backbone)


def config_from_dict(settings: Mapping[str, Any]) -> TrainingConfig:
    """Return the config that `TrainingConfig.to_dict` returned, perhaps in another version of dvar.

    Unknown settings are dropped, and missing ones have their default.

    Raises:
        RefusedInput: The method is not registered, or a value is not one that its setting admits.
    """
    config_type = METHODS.find(str(settings.get("method", TextualInversionConfig.method))).config_type
    names = {item.name for item in fields(config_type)}
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()
    }
    config = config_type(**{name: value for name, value in values.items() if name in names})
    if problems := [f"the settings of a run: {problem}" for _, problem in invalid_fields(config)]:
        raise RefusedInput(problems)
    return config
