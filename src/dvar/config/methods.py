"""The configs of the three methods of the paper."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from typing import Literal

from dvar.config.fields import COUNT, IMAGE_COUNT, NOT_NEGATIVE, POSITIVE, Range, setting
from dvar.config.training import Conflicts, TrainingConfig, missing_token


@dataclass(frozen=True, kw_only=True)
class TextualInversionConfig(TrainingConfig):
    """The settings of ``dvar train textual-inversion``."""

    method = "textual-inversion"
    title = "Textual Inversion"
    tags = ("textual_inversion",)

    placeholder_token: str = setting("<thing>", "New word that stands for the concept in prompts.")
    output_dir: str = setting("runs/textual-inversion", "Folder of the run.")
    learnable_property: Literal["object", "style"] = setting(
        "object", "What is learned from the images.", section="Data"
    )


@dataclass(frozen=True, kw_only=True)
class DreamBoothLoraConfig(TrainingConfig):
    """The settings of ``dvar train dreambooth-lora``; without a placeholder token, ``instance_prompt`` is required."""

    method = "dreambooth-lora"
    title = "DreamBooth-LoRA"
    tags = ("dreambooth", "lora")

    placeholder_token: str | None = setting(
        None, "New word that stands for the concept in prompts; without it, LoRA alone is trained."
    )
    learning_rate: float = setting(1e-3, "Learning rate of the optimizer.", POSITIVE)
    max_train_steps: int = setting(1000, "The cap: training ends here unless the rule ends it before.", COUNT)
    window: int = setting(440, "DVAR's N: steps over which the recent variance is taken.")
    threshold: float = setting(0.4, "DVAR's alpha: stop when recent / whole variance is below it.")
    validation_steps: int = setting(100, "Steps between two sets of sample images.", COUNT)
    guidance_scale: float = setting(6.0, "Classifier-free guidance of the sample images.", NOT_NEGATIVE)
    output_dir: str = setting("runs/dreambooth-lora", "Folder of the run.")
    instance_prompt: str | None = setting(
        None,
        "Caption of every instance image, such as 'a photo of sks dog'; by default sentences around the new word.",
        section="Data",
    )
    learnable_property: Literal["object", "style"] = setting(
        "object", "What is learned from the images; it chooses the sentences."
    )
    with_prior_preservation: bool = setting(False, "Train on class images too, so that the class does not drift.")
    class_prompt: str | None = setting(None, "Caption of every class image, such as 'a photo of dog'.")
    class_data_dir: str | None = setting(
        None, "Folder with class images; by default the base model generates them before training."
    )
    num_class_images: int = setting(100, "Class images to generate where no folder is given.", IMAGE_COUNT)
    rank: int = setting(
        4, "Rank of the low-rank change of each attention matrix.", Range(1, most=4096), section="Method"
    )
    lora_alpha: int | None = setting(
        None, "The low-rank change is scaled by alpha / rank; alpha is the rank by default.", COUNT
    )
    lora_targets: Literal["attention", "cross-attention", "attention+gates"] = setting(
        "attention",
        "Which matrices of the denoising network change: those of diffusers' script for the model, those of "
        "cross-attention alone, or the feed-forward gates too, as in the released code.",
    )
    use_dora: bool = setting(False, "Learn the length of each adapted row apart from its direction: DoRA.")
    lora_plus_ratio: float | None = setting(
        None, "LoRA+: how many times as fast the second factors learn as the first; 16 is usual.", Range(1)
    )
    train_text_encoder: bool = setting(False, "Learn a low-rank change of the text encoder's attention too.")
    train_text_encoder_ti: bool = setting(
        False, "Pivotal tuning: freeze the new word on the way; the rule judges what comes after."
    )
    train_text_encoder_ti_frac: float | None = setting(
        None, "Part of the cap in which pivotal tuning learns the word; half by default.", Range(0, 1, above=True)
    )
    text_encoder_lr: float | None = setting(
        None, "Learning rate of the new word and of the text encoder; learning_rate by default.", POSITIVE
    )
    prior_loss_weight: float = setting(1.0, "Weight of the loss on class images.", POSITIVE)

    @property
    def learned(self) -> str:
        """A description of what is trained."""
        change = (
            "a low-rank change of the denoising network's"
            + " and the text encoder's" * self.train_text_encoder
            + " attention"
        )
        return f"a new word and {change}" if self.placeholder_token else change

    @property
    def effective_prior_weight(self) -> float:
        """The weight of the loss on class images; 0 where there are none."""
        return self.prior_loss_weight if self.with_prior_preservation else 0.0

    @property
    def pivot_step(self) -> int:
        """The step after which the new word is frozen, and from which the rule judges; 0 where it is never frozen.

        Source: diffusers' train_dreambooth_lora_sdxl_advanced.py, which learns word and LoRA up to a part of its
            epochs, by default half of them, and LoRA alone from then on.
        """
        if not self.train_text_encoder_ti:
            return 0
        return int((self.train_text_encoder_ti_frac or 0.5) * self.max_train_steps)

    def conflicts(self) -> Conflicts:
        """Yield what is wrong with the fields of this method."""
        token, prompt = self.placeholder_token, self.instance_prompt
        if token is None and not prompt:
            message = "placeholder_token is missing: give a new word, or train LoRA alone on an --instance_prompt"
            yield {"placeholder_token", "instance_prompt"}, message
        if token is None and self.initializer_token:
            message = f"initializer_token needs a placeholder_token, got {self.initializer_token!r} without one"
            yield {"placeholder_token", "initializer_token"}, f"{message}: give the new word"
        if token is None and self.num_vectors > 1:
            message = f"num_vectors must be 1 without a placeholder_token, got {self.num_vectors}: give the new word"
            yield {"placeholder_token", "num_vectors"}, message
        if token and prompt and token not in prompt:
            yield missing_token("instance_prompt", token, prompt)
        if self.with_prior_preservation and not (self.class_prompt or "").strip():
            message = "class_prompt is missing: with_prior_preservation needs the caption of the class images"
            yield {"class_prompt", "with_prior_preservation"}, f"{message}, such as 'a photo of dog'"
        for name in ("lora_plus_ratio", "text_encoder_lr"):
            if getattr(self, name) and self.optimizer == "prodigy":
                message = f"{name} needs an optimizer with learning rates of ours, and prodigy finds one for all"
                yield {name, "optimizer"}, f"{message}: drop one of them"
        if self.text_encoder_lr and token is None and not self.train_text_encoder:
            message = f"text_encoder_lr needs a placeholder_token or train_text_encoder, got {self.text_encoder_lr:g}"
            yield {"text_encoder_lr", "placeholder_token"}, f"{message} without either: add one of them"
        yield from self._pivot_conflicts()
        for name in ("class_prompt", "class_data_dir"):
            if (value := getattr(self, name)) and not self.with_prior_preservation:
                message = f"{name} needs with_prior_preservation, got {value!r} without it: add the flag or drop it"
                yield {name, "with_prior_preservation"}, message

    def _pivot_conflicts(self) -> Conflicts:
        """Yield what is wrong with the fields of pivotal tuning."""
        name, fraction = "train_text_encoder_ti_frac", self.train_text_encoder_ti_frac
        if fraction is not None and not self.train_text_encoder_ti:
            message = f"{name} is for pivotal tuning, got {fraction:g} without it: add --train_text_encoder_ti"
            yield {name, "train_text_encoder_ti"}, message
        if not self.train_text_encoder_ti:
            return
        if self.placeholder_token is None:
            message = "train_text_encoder_ti learns a new word first, got no placeholder_token: give the new word"
            yield {"train_text_encoder_ti", "placeholder_token"}, message
        if self.train_text_encoder:
            message = "train_text_encoder_ti and train_text_encoder exclude each other, got both: drop one of them"
            yield {"train_text_encoder_ti", "train_text_encoder"}, message
        if not self.pivot_step:
            message = f"{name} of max_train_steps must be a step at least, got less than 1 of {self.max_train_steps}"
            yield {name, "max_train_steps"}, f"{message}: raise one of them"


@dataclass(frozen=True, kw_only=True)
class CustomDiffusionConfig(TrainingConfig):
    """The settings of ``dvar train custom-diffusion``; prompts name the concept by placeholder token and class noun.

    With a ``concepts_list`` there are several concepts, each with its images, its class, and as a rule its token.
    """

    method = "custom-diffusion"
    title = "Custom Diffusion"
    tags = ("custom-diffusion",)

    placeholder_token: str = setting(
        "<new1>", "New word that stands for the concept in prompts; several are joined by +.", alias="modifier_token"
    )
    initializer_token: str | None = setting(
        "ktn", "Known word whose embedding the new one starts from; several are joined by +."
    )
    center_crop: bool = setting(False, "Crop the middle square; otherwise squeeze the whole image into a square.")
    learning_rate: float = setting(4e-5, "Learning rate of the optimizer.", POSITIVE)
    max_grad_norm: float | None = setting(1.0, "Norm to which a larger gradient is scaled down.", POSITIVE)
    max_train_steps: int = setting(500, "The cap: training ends here unless the rule ends it before.", COUNT)
    window: int = setting(180, "DVAR's N: steps over which the recent variance is taken.")
    validation_steps: int = setting(100, "Steps between two sets of sample images.", COUNT)
    guidance_scale: float = setting(6.0, "Classifier-free guidance of the sample images.", NOT_NEGATIVE)
    output_dir: str = setting("runs/custom-diffusion", "Folder of the run.")
    class_noun: str | None = setting(
        None, "Class of the concept, such as mug; it follows the new word in prompts.", section="Data"
    )
    instance_prompt: str | None = setting(
        None, "Caption of every instance image; by default 'photo of a <new1> mug', with the new word and the class."
    )
    concepts_list: str | None = setting(
        None, "JSON file of several concepts, in diffusers' format, instead of the folders and prompts of one."
    )
    random_rescale: bool = setting(
        True, "Show images smaller or larger, with captions that say so and a loss on the image's own area."
    )
    class_data_dir: str | None = setting(
        None, "Folder with class images; by default the base model generates them before training."
    )
    num_class_images: int = setting(200, "Class images to generate where no folder is given.", IMAGE_COUNT)
    prior_loss_weight: float = setting(
        1.0, "Weight of the loss on class images; 0 trains without them.", NOT_NEGATIVE, section="Method"
    )
    freeze_model: Literal["crossattn_kv", "crossattn"] = setting(
        "crossattn_kv", "What is not frozen: keys and values of cross-attention, or all of it."
    )

    @property
    def placeholder_tokens(self) -> tuple[str, ...]:
        """The new tokens that are learned."""
        return tuple(self.placeholder_token.split("+"))

    @property
    def initializer_tokens(self) -> tuple[str, ...]:
        """The known tokens from which the placeholder tokens start, in their order."""
        return tuple(str(self.initializer_token).split("+"))

    @property
    def subject(self) -> str:
        """The name of the concept in prompts."""
        return (
            ", ".join(self.placeholder_tokens) if self.concepts_list else f"{self.placeholder_token} {self.class_noun}"
        )

    @property
    def kind(self) -> str:
        """The kind of the concept, as a noun."""
        return "group of subjects" if self.concepts_list else str(self.class_noun)

    @property
    def learned(self) -> str:
        """A description of what is trained."""
        part = {"crossattn_kv": "keys and values of cross-attention", "crossattn": "cross-attention"}
        word = "new words" if len(self.placeholder_tokens) > 1 else "a new word"
        return f"{word} and new {part[self.freeze_model]}"

    @property
    def class_prompt(self) -> str | None:
        """The caption of all class images."""
        return f"photo of a {self.class_noun}"

    @property
    def effective_prior_weight(self) -> float:
        """The weight of the loss on class images; 0 where there are none."""
        return self.prior_loss_weight

    @property
    def plain_prompt(self) -> str:
        """The prompt of a plain image of the concept."""
        if self.concepts_list:
            return str(self.validation_prompt)
        return self.instance_prompt or f"photo of a {self.subject}"

    @property
    def caption_templates(self) -> tuple[str, ...]:
        """The caption of instance images that have none of their own.

        Source: The paper trains Custom Diffusion on one sentence with the placeholder token and the class noun.
        """
        return (self.plain_prompt,)

    def conflicts(self) -> Conflicts:
        """Yield what is wrong with the fields of this method."""
        token, prompt, tokens = self.placeholder_token, self.instance_prompt, self.placeholder_tokens
        if any(part and part in other for part, other in permutations(tokens, 2)):
            message = f"placeholder_token must join words of which none is part of another, got {token}: rename one"
            yield {"placeholder_token"}, message
        initializer_given = self.initializer == "manual" and self.initializer_token
        if initializer_given and len(self.initializer_tokens) != len(tokens):
            message = f"initializer_token must give one word for each of {token}, got {self.initializer_token}"
            yield {"initializer_token", "placeholder_token"}, f"{message}: join them by +, as in ktn+pll"
        if self.quantize != "no":
            message = f"quantize freezes the weights that custom-diffusion trains, got {self.quantize}: drop it"
            yield {"quantize"}, message
        if self.concepts_list:
            yield from self._conflicts_of_several_concepts()
            return
        if len(tokens) > 1:
            message = f"placeholder_token must be one word without a concepts_list, got {token}: name the list"
            yield {"placeholder_token", "concepts_list"}, f"{message}, or give one word"
        if not (self.class_noun or "").strip():
            yield {"class_noun"}, "class_noun is missing: give the class of the concept, such as mug"
        if prompt and token not in prompt:
            yield missing_token("instance_prompt", token, prompt)
        if self.class_data_dir and not self.prior_loss_weight:
            message = f"class_data_dir needs a prior_loss_weight above 0, got {self.class_data_dir}: drop one of them"
            yield {"class_data_dir", "prior_loss_weight"}, message

    def _conflicts_of_several_concepts(self) -> Conflicts:
        """Yield what is wrong with the fields beside a ``concepts_list``."""
        for name in ("instance_data_dir", "class_noun", "instance_prompt", "class_data_dir"):
            if value := getattr(self, name):
                message = f"{name} is for one concept and concepts_list for several, got both ({value})"
                yield {name, "concepts_list"}, f"{message}: drop one of them"
        if not self.validation_prompt:
            message = "validation_prompt is missing: with a concepts_list, write what the sample images show"
            yield (
                {"validation_prompt", "concepts_list"},
                f"{message}, such as '{self.placeholder_tokens[0]} cat on a beach'",
            )


PAPER_METHODS: dict[str, type[TrainingConfig]] = {
    config_type.method: config_type
    for config_type in (TextualInversionConfig, DreamBoothLoraConfig, CustomDiffusionConfig)
}
"""The config classes of the paper's three methods, by name; `dvar.training.methods.registry` has further ones."""
