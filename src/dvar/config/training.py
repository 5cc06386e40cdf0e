"""Frozen settings of each method, with their help, ranges and checks.  Pure: no picture and no model is opened here.

A settings class states every default once: the command line shows it, a preset overrides it, a TOML file overrides the
preset and a flag overrides the file (`dvar.config.presets.configure`).  The defaults are the paper's.
A method's class has the fields that all share and its own; what is done with settings is done by functions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from itertools import permutations
from typing import Any, Literal

from dvar.config.fields import COUNT, NOT_NEGATIVE, POSITIVE, Config, Range, faults, setting, sound
from dvar.errors import RefusedInput

BUNDLED_MODEL = "mini"
Sampler = Literal["model", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DDIMScheduler"]
"""Schedulers of diffusers that pictures can be drawn by, beside the model's own."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Config):
    """What every method is set by; a step is one update of the optimizer.  Fields alone: a method's class adds its own.

    Source: the defaults are the paper's, with its released command lines; `dvar.config.presets` names each source.
    Deviates: float32 arithmetic by default, where the released commands use fp16, because what the rule must see of
    L_det lies in its third digit.
    """

    pretrained_model_name_or_path: str = setting(
        BUNDLED_MODEL, "A hub id, a diffusers folder, or 'mini', the bundled model.", section="Model and pictures"
    )
    instance_data_dir: str | None = setting(None, "Folder with the pictures of the subject.", alias="train_data_dir")
    placeholder_token: str | None = setting("<thing>", "New word that will stand for the subject.")
    initializer_token: str | None = setting(None, "Known word whose embedding the new word starts from, such as mug.")
    initializer: Literal["manual", "random", "clip"] = setting(
        "manual", "Where that known word comes from: given, drawn from the vocabulary, or found by a CLIP."
    )
    clip_model: str | None = setting(
        None, "Folder or hub id of the CLIP that finds it, and scores samples; the bundled model has one of its own."
    )
    num_vectors: int = setting(1, "Embedding vectors behind the new word.", COUNT)
    resolution: int = setting(512, "Side of the square training pictures in pixels, a multiple of 8.", Range(8))
    center_crop: bool = setting(True, "Crop the middle square; otherwise squeeze the whole picture into a square.")
    random_flip: bool = setting(True, "Mirror each picture left to right half of the time.")

    preset: str | None = setting(
        None,
        "Named settings to start from: 'mini' for the bundled model, 'lean' for others; 'paper' probes at every step.",
        section="Training",
    )
    train_batch_size: int = setting(2, "Pictures in one forward pass of training.", COUNT)
    gradient_accumulation_steps: int = setting(1, "Forward passes in one step.", COUNT)
    gradient_checkpointing: bool = setting(False, "Recompute activations going backward: less memory, more time.")
    attention_slicing: bool = setting(False, "Compute attention in slices: less memory, more time.")
    compile: bool = setting(False, "Compile the U-Net: minutes before the first step, then faster ones on a GPU.")
    optimizer: Literal["adamw", "adamw8bit", "sam", "prodigy"] = setting(
        "adamw", "AdamW, the same with a state of 8 bits, SGD by the gradient at the steepest point near, or Prodigy."
    )
    sam_rho: float = setting(0.05, "How far SAM looks for that point.", POSITIVE)
    learning_rate: float = setting(1e-2, "Learning rate of the optimizer.", POSITIVE)
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = setting("constant", "How the learning rate changes over the steps.")
    lr_warmup_steps: int = setting(0, "Steps over which the learning rate rises from 0.", NOT_NEGATIVE)
    adam_beta1: float = setting(0.9, "AdamW's memory of the gradient.", Range(0, 1))
    adam_beta2: float = setting(0.999, "AdamW's memory of the squared gradient.", Range(0, 1))
    adam_weight_decay: float = setting(1e-2, "AdamW's decay of what is trained.", NOT_NEGATIVE)
    adam_epsilon: float = setting(1e-8, "AdamW's guard against division by zero.", POSITIVE)
    max_grad_norm: float | None = setting(
        None, "Norm to which a larger gradient is scaled down; none by default.", POSITIVE
    )
    max_train_steps: int = setting(6100, "The cap: training ends here if the rule has not ended it before.", COUNT)
    mixed_precision: Literal["no", "fp16", "bf16"] = setting("no", "Arithmetic of the frozen model.")
    seed: int = setting(0, "Seed of everything that is drawn.", NOT_NEGATIVE)

    probe_every: int = setting(1, "Steps between two evaluations of the fixed batch.", COUNT, section="Stopping")
    eval_batch_size: int = setting(8, "Inputs in the fixed batch.", COUNT)
    window: int = setting(310, "DVAR's N: steps over which the recent variance is taken.")
    threshold: float = setting(0.15, "DVAR's alpha: stop when recent / whole variance is below it.")

    validation_prompt: str | None = setting(
        None, "Prompt of the sample pictures; a plain one of the subject by default.", section="Sample pictures"
    )
    validation_steps: int = setting(500, "Steps between two sets of sample pictures.", COUNT)
    num_validation_images: int = setting(8, "Pictures in a set of samples.", COUNT)
    num_inference_steps: int = setting(50, "Denoising steps of a sample picture.", COUNT)
    guidance_scale: float = setting(7.5, "Classifier-free guidance of the sample pictures.", NOT_NEGATIVE)
    validation_scheduler: Sampler = setting(  # noqa: RUF009 (an alias hides that it cannot change)
        "model", "What draws them: the model's own scheduler, or one that needs fewer steps, say 20."
    )

    checkpointing_steps: int = setting(500, "Steps between two checkpoints.", COUNT, section="The run")
    checkpoints_total_limit: int | None = setting(None, "Newest checkpoints to keep; all of them by default.", COUNT)
    resume_from_checkpoint: str | None = setting(None, "Go on from 'latest', or from a checkpoint by its name.")
    report_to: Literal["none", "tensorboard", "wandb"] = setting(
        "none", "Tracker to tell of each step; trace.jsonl and report.html hold the curves in any case."
    )
    extend: bool = setting(False, "Go on under a higher cap than the checkpoint's; with a constant learning rate.")
    keep: Literal["last,best", "last", "best"] = setting(
        "last,best", "Which steps are exported: the last, the best beside it, or one of the two alone."
    )
    best_by: Literal["l_det", "clip", "stop"] = setting(
        "l_det",
        "What makes a step the best: the lowest L_det, the samples most like the pictures by CLIP, or being the last.",
    )
    output_dir: str = setting("runs/run", "Folder of the run.")
    overwrite: bool = setting(False, "Replace another run found in the output folder.")


Conflicts = Iterator[tuple[set[str], str]]
"""(settings concerned, what is wrong) for well-formed values that cannot be carried out, alone or together."""

_PLAIN = {"object": "a photo of {}", "style": "a picture in the style of {}"}


@dataclass(frozen=True, kw_only=True)
class TextualInversionConfig(TrainingConfig):
    """Every setting of ``dvar train textual-inversion``.

    ``subject`` is what prompts call the subject, ``plain_prompt`` the prompt of a plain picture of it, ``kind`` what it
    is, ``learned`` what is trained for it.
    """

    method = "textual-inversion"
    title = "Textual Inversion"
    tags = ("textual_inversion",)
    learned = "a new word"

    placeholder_token: str = setting("<thing>", "New word that will stand for the subject.")
    output_dir: str = setting("runs/textual-inversion", "Folder of the run.")
    learnable_property: Literal["object", "style"] = setting(
        "object", "What is learned from the pictures.", section="Model and pictures"
    )

    @property
    def subject(self) -> str:
        return self.placeholder_token

    @property
    def plain_prompt(self) -> str:
        return _PLAIN.get(self.learnable_property, "{}").format(self.placeholder_token)

    @property
    def kind(self) -> str:
        return self.learnable_property

    def conflicts(self) -> Conflicts:
        """What is wrong beyond what all methods refuse."""
        yield from ()


@dataclass(frozen=True, kw_only=True)
class DreamBoothLoraConfig(TrainingConfig):
    """Every setting of ``dvar train dreambooth-lora``; without a new word ``instance_prompt`` names the subject.

    ``subject``, ``plain_prompt``, ``kind`` and ``learned`` are as in `TextualInversionConfig`.
    """

    method = "dreambooth-lora"
    title = "DreamBooth-LoRA"
    tags = ("dreambooth", "lora")

    placeholder_token: str | None = setting(
        None, "New word that will stand for the subject; without it LoRA alone is trained."
    )
    learning_rate: float = setting(1e-3, "Learning rate of the optimizer.", POSITIVE)
    max_train_steps: int = setting(1000, "The cap: training ends here if the rule has not ended it before.", COUNT)
    window: int = setting(440, "DVAR's N: steps over which the recent variance is taken.")
    threshold: float = setting(0.4, "DVAR's alpha: stop when recent / whole variance is below it.")
    validation_steps: int = setting(100, "Steps between two sets of sample pictures.", COUNT)
    guidance_scale: float = setting(6.0, "Classifier-free guidance of the sample pictures.", NOT_NEGATIVE)
    output_dir: str = setting("runs/dreambooth-lora", "Folder of the run.")
    instance_prompt: str | None = setting(
        None,
        "Caption of every picture, such as 'a photo of sks dog'; plain sentences around the new word by default.",
        section="Model and pictures",
    )
    learnable_property: Literal["object", "style"] = setting(
        "object", "What is learned from the pictures: it chooses the plain sentences."
    )
    class_prompt: str | None = setting(None, "Caption of every class picture, such as 'a photo of dog'.")
    class_data_dir: str | None = setting(
        None, "Folder with pictures of the class; by default the model draws them before training."
    )
    num_class_images: int = setting(100, "Class pictures that the model draws when it has no folder of them.", COUNT)
    rank: int = setting(4, "Rank of the low-rank change of each attention matrix.", COUNT, section="Training")
    lora_alpha: int | None = setting(None, "The low-rank change is scaled by this over the rank; 1 by default.", COUNT)
    lora_targets: Literal["attention", "cross-attention", "attention+gates"] = setting(
        "attention", "Which matrices of the U-Net change; the released code takes the feed-forward gates too."
    )
    train_text_encoder: bool = setting(False, "Learn a low-rank change of the text encoder's attention too.")
    with_prior_preservation: bool = setting(False, "Train on pictures of the class too, so that it does not drift.")
    prior_loss_weight: float = setting(1.0, "Weight of the loss on class pictures.", POSITIVE)

    @property
    def subject(self) -> str:
        return self.placeholder_token or str(self.instance_prompt)

    @property
    def plain_prompt(self) -> str:
        if self.instance_prompt:
            return self.instance_prompt
        return _PLAIN.get(self.learnable_property, "{}").format(self.placeholder_token)

    @property
    def kind(self) -> str:
        return self.learnable_property

    @property
    def learned(self) -> str:
        change = "a low-rank change of the U-Net's" + " and the text encoder's" * self.train_text_encoder + " attention"
        return f"a new word and {change}" if self.placeholder_token else change

    def conflicts(self) -> Conflicts:
        """What is wrong beyond what all methods refuse."""
        word, prompt = self.placeholder_token, self.instance_prompt
        if word is None and not prompt:
            said = "placeholder_token is missing: give a new word, or train LoRA alone on an --instance_prompt"
            yield {"placeholder_token", "instance_prompt"}, said
        if word is None and self.initializer_token:
            said = (
                f"initializer_token needs a placeholder_token, got {self.initializer_token!r} alone: give the new word"
            )
            yield {"placeholder_token", "initializer_token"}, said
        if word is None and self.num_vectors > 1:
            said = f"num_vectors must be 1 without a placeholder_token, got {self.num_vectors}: give the new word"
            yield {"placeholder_token", "num_vectors"}, said
        if word and prompt and word not in prompt:
            said = f"instance_prompt must hold the new word {word}, got {prompt!r}: put it in"
            yield {"placeholder_token", "instance_prompt"}, said
        if self.with_prior_preservation and not (self.class_prompt or "").strip():
            said = "class_prompt is missing: with_prior_preservation needs the caption of the class pictures"
            yield {"class_prompt", "with_prior_preservation"}, f"{said}, such as 'a photo of dog'"
        for name in ("class_prompt", "class_data_dir"):
            if (given := getattr(self, name)) and not self.with_prior_preservation:
                said = f"{name} needs with_prior_preservation, got {given!r} alone: add the flag or drop it"
                yield {name, "with_prior_preservation"}, said


@dataclass(frozen=True, kw_only=True)
class CustomDiffusionConfig(TrainingConfig):
    """Every setting of ``dvar train custom-diffusion``; a prompt names the subject by the new word and its class.

    With a ``concepts_list`` there are several subjects, each with pictures, a class and as a rule a word of its own.
    ``subject``, ``plain_prompt``, ``kind`` and ``learned`` are as in `TextualInversionConfig`.
    """

    method = "custom-diffusion"
    title = "Custom Diffusion"
    tags = ("custom-diffusion",)

    placeholder_token: str = setting(
        "<new1>", "New word that will stand for the subject; several are joined by +.", alias="modifier_token"
    )
    initializer_token: str | None = setting(
        "ktn", "Known word whose embedding the new word starts from; several are joined by +."
    )
    center_crop: bool = setting(False, "Crop the middle square; otherwise squeeze the whole picture into a square.")
    learning_rate: float = setting(4e-5, "Learning rate of the optimizer.", POSITIVE)
    max_grad_norm: float | None = setting(1.0, "Norm to which a larger gradient is scaled down.", POSITIVE)
    max_train_steps: int = setting(500, "The cap: training ends here if the rule has not ended it before.", COUNT)
    window: int = setting(180, "DVAR's N: steps over which the recent variance is taken.")
    validation_steps: int = setting(100, "Steps between two sets of sample pictures.", COUNT)
    guidance_scale: float = setting(6.0, "Classifier-free guidance of the sample pictures.", NOT_NEGATIVE)
    output_dir: str = setting("runs/custom-diffusion", "Folder of the run.")
    class_noun: str | None = setting(
        None, "Class of the subject, such as mug; it follows the new word in prompts.", section="Model and pictures"
    )
    instance_prompt: str | None = setting(
        None, "Caption of every picture; 'photo of a <new1> mug' by default, with the new word and the class."
    )
    concepts_list: str | None = setting(
        None, "JSON file of several subjects, as diffusers reads it, in place of the folders and prompts of one."
    )
    random_rescale: bool = setting(
        True, "Show pictures smaller or larger, with captions that say so and a loss on what is theirs alone."
    )
    class_data_dir: str | None = setting(
        None, "Folder with pictures of the class; by default the model draws them before training."
    )
    num_class_images: int = setting(200, "Class pictures that the model draws when it has no folder of them.", COUNT)
    prior_loss_weight: float = setting(
        1.0, "Weight of the loss on class pictures; 0 trains without them.", NOT_NEGATIVE, section="Training"
    )
    freeze_model: Literal["crossattn_kv", "crossattn"] = setting(
        "crossattn_kv", "What is not frozen: keys and values of cross-attention, or all of it."
    )

    @property
    def subject(self) -> str:
        return ", ".join(words(self)) if self.concepts_list else f"{self.placeholder_token} {self.class_noun}"

    @property
    def plain_prompt(self) -> str:
        if self.concepts_list:
            return str(self.validation_prompt)
        return self.instance_prompt or f"photo of a {self.subject}"

    @property
    def kind(self) -> str:
        return "group of subjects" if self.concepts_list else str(self.class_noun)

    @property
    def learned(self) -> str:
        part = {"crossattn_kv": "keys and values of cross-attention", "crossattn": "cross-attention"}
        word = "new words" if len(words(self)) > 1 else "a new word"
        return f"{word} and new {part[self.freeze_model]}"

    def conflicts(self) -> Conflicts:
        """What is wrong beyond what all methods refuse."""
        word, prompt, known = self.placeholder_token, self.instance_prompt, words(self)
        if any(one and one in other for one, other in permutations(known, 2)):
            said = f"placeholder_token must join words of which none is part of another, got {word}: rename one"
            yield {"placeholder_token"}, said
        if self.initializer == "manual" and self.initializer_token and len(initializers(self)) != len(known):
            said = f"initializer_token must give one word for each of {word}, got {self.initializer_token}"
            yield {"initializer_token", "placeholder_token"}, f"{said}: join them by +, as in ktn+pll"
        if self.concepts_list:
            yield from self._conflicts_of_several()
            return
        if len(known) > 1:
            said = f"placeholder_token {word} is several words, which need a concepts_list: name the file, or one word"
            yield {"placeholder_token", "concepts_list"}, said
        if not (self.class_noun or "").strip():
            yield {"class_noun"}, "class_noun is missing: name the class of the subject, such as mug"
        if prompt and word not in prompt:
            said = f"instance_prompt must hold the new word {word}, got {prompt!r}: put it in"
            yield {"placeholder_token", "instance_prompt"}, said
        if self.class_data_dir and not self.prior_loss_weight:
            said = f"class_data_dir needs a prior_loss_weight above 0, got {self.class_data_dir}: drop one of them"
            yield {"class_data_dir", "prior_loss_weight"}, said

    def _conflicts_of_several(self) -> Conflicts:
        for name in ("instance_data_dir", "class_noun", "instance_prompt", "class_data_dir"):
            if given := getattr(self, name):
                said = f"{name} is for one subject and concepts_list for several, got both ({given}): drop one of them"
                yield {name, "concepts_list"}, said
        if not self.validation_prompt:
            said = "validation_prompt is missing: with a concepts_list, write what the sample pictures show"
            yield {"validation_prompt", "concepts_list"}, f"{said}, such as '{words(self)[0]} cat on a beach'"


AnyConfig = TextualInversionConfig | DreamBoothLoraConfig | CustomDiffusionConfig
CONFIGS: dict[str, type[AnyConfig]] = {
    known.method: known for known in (TextualInversionConfig, DreamBoothLoraConfig, CustomDiffusionConfig)
}
"""The settings class of each method, by the method's name."""


def written(config: AnyConfig) -> dict[str, Any]:
    """The settings as plain values with their method's name, as config.json and checkpoints keep them."""
    return {"method": config.method, **asdict(config)}


def restored(kept: Mapping[str, Any]) -> AnyConfig:
    """The settings that `written` returned, perhaps in another version: unknown ones are dropped, missing ones default.

    Raises: `RefusedInput` when they are of a method that is not known here.
    """
    name = kept.get("method", TextualInversionConfig.method)
    if name not in CONFIGS:
        raise RefusedInput([f"the run is of method {name!r}, and only {', '.join(CONFIGS)} are known: update dvar"])
    names = {item.name for item in fields(CONFIGS[name])}
    return CONFIGS[name](**{key: value for key, value in kept.items() if key in names})


def words(config: AnyConfig) -> tuple[str, ...]:
    """The new words that are learned; none where a method trains without."""
    word = config.placeholder_token
    return _parts(config, word) if word is not None else ()


def initializers(config: AnyConfig) -> tuple[str, ...]:
    """The known words that the new ones start from, in their order."""
    return _parts(config, str(config.initializer_token))


def prior_weight(config: AnyConfig) -> float:
    """The weight of the loss on class pictures; 0 where a run has none."""
    match config:
        case CustomDiffusionConfig():
            return config.prior_loss_weight
        case DreamBoothLoraConfig():
            return config.prior_loss_weight if config.with_prior_preservation else 0.0
    return 0.0


def sample_prompt(config: AnyConfig) -> str:
    """The prompt of the sample pictures: the one asked for, or a plain one for what is learned."""
    return config.validation_prompt or config.plain_prompt


def settings_problems(config: AnyConfig) -> list[str]:
    """Everything wrong with these settings by themselves, a line each; empty when in order.

    The rule's own settings are the rule's to judge: `dvar.training.dataset.rule_problems`.
    """
    wrong = dict(faults(config))
    conflicts = [said for names, said in _conflicts(sound(config)) if wrong.keys().isdisjoint(names)]
    return [*wrong.values(), *conflicts]


def _parts(config: AnyConfig, joined: str) -> tuple[str, ...]:
    return tuple(joined.split("+")) if isinstance(config, CustomDiffusionConfig) else (joined,)


def _conflicts(config: AnyConfig) -> Conflicts:
    """What is wrong together, of all methods and of this one."""
    word, cap, warmup = config.placeholder_token, config.max_train_steps, config.lr_warmup_steps
    if not config.instance_data_dir and not (isinstance(config, CustomDiffusionConfig) and config.concepts_list):
        yield {"instance_data_dir"}, "instance_data_dir is missing: name the folder with the subject's pictures"
    if word is not None:
        if not config.initializer_token and config.initializer == "manual":
            yield {"initializer_token"}, "initializer_token is missing: give one word for the subject, such as mug"
        if any(part.split() != [part] for part in words(config)):
            said = f"placeholder_token must be one word without spaces, got {word!r}: try '<thing>'"
            yield {"placeholder_token"}, said
        elif (prompt := config.validation_prompt) and not any(part in prompt for part in words(config)):
            said = f"validation_prompt must hold the new word {' or '.join(words(config))}, got {prompt!r}: put it in"
            yield {"placeholder_token", "validation_prompt"}, said
    yield from _initializer_conflicts(config)
    yield from _clip_conflicts(config)
    yield from config.conflicts()
    if config.optimizer == "prodigy" and config.learning_rate < 0.1:
        said = f"learning_rate scales the rate that prodigy finds and is meant to be 1, got {config.learning_rate:g}"
        yield {"learning_rate", "optimizer"}, f"{said}: add --learning_rate 1"
    if config.resolution % 8:
        near = 8 * round(config.resolution / 8)
        yield {"resolution"}, f"resolution must be a multiple of 8, got {config.resolution}: try {near}"
    if warmup and config.lr_scheduler == "constant":
        said = f"lr_warmup_steps must be 0 when lr_scheduler is constant, got {warmup}: use constant_with_warmup"
        yield {"lr_warmup_steps", "lr_scheduler"}, said
    if warmup >= cap:
        said = f"lr_warmup_steps must be below max_train_steps ({cap}), got {warmup}: shorten the warm-up"
        yield {"lr_warmup_steps", "max_train_steps"}, said
    if config.overwrite and config.resume_from_checkpoint:
        said = "overwrite and resume_from_checkpoint exclude each other, got both: drop one of them"
        yield {"overwrite", "resume_from_checkpoint"}, said
    if config.extend and not config.resume_from_checkpoint:
        said = "extend needs a resume_from_checkpoint, got it alone: add --resume_from_checkpoint latest"
        yield {"extend", "resume_from_checkpoint"}, said


def _initializer_conflicts(config: AnyConfig) -> Conflicts:
    """What is wrong with the way in which the first word is to be found."""
    way, token = config.initializer, config.initializer_token
    if way != "manual" and config.placeholder_token is None:
        said = f"initializer {way} needs a placeholder_token, got none: give the new word"
        yield {"initializer", "placeholder_token"}, said
    if way != "manual" and token != type(config).initializer_token:
        said = f"initializer_token is for initializer manual, got {token!r} with {way}: drop one of them"
        yield {"initializer", "initializer_token"}, said


def _clip_conflicts(config: AnyConfig) -> Conflicts:
    """What is wrong with the CLIP of these settings, or with judging the best step by it."""
    asked = {"initializer": config.initializer, "best_by": config.best_by}
    asking = [f"{name} clip" for name, way in asked.items() if way == "clip"]
    if asking and not config.clip_model and config.pretrained_model_name_or_path != BUNDLED_MODEL:
        said = f"clip_model is missing: {asking[0]} needs the folder or hub id of a CLIP"
        yield {*asked, "clip_model"}, f"{said}, such as openai/clip-vit-base-patch32"
    if config.clip_model and not asking:
        said = f"clip_model is for initializer clip or best_by clip, got {config.clip_model!r} with neither: drop it"
        yield {*asked, "clip_model"}, said
    # The rule cannot stop within its window, so that a trained step is then always scored before it does.
    if config.best_by == "clip" and config.validation_steps > config.window:
        said = f"validation_steps must be at most the window ({config.window}) where best_by is clip, since samples are"
        yield {"best_by", "validation_steps", "window"}, f"{said} scored, got {config.validation_steps}: lower it"
