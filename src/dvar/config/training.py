"""What the config classes of all methods share: fields, derived values, conflicts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from dvar.config.buckets import list_buckets
from dvar.config.fields import (
    BATCH,
    COUNT,
    IMAGE_COUNT,
    NOT_NEGATIVE,
    POSITIVE,
    SAMPLING_STEPS,
    SEED,
    Range,
    invalid_fields,
    replace_invalid_fields,
    setting,
)
from dvar.config.objective import ObjectiveConfig, objective_conflicts
from dvar.config.templates import PLAIN_PROMPTS, TEMPLATES
from dvar.stopping.cadence import PerOctave, is_due
from dvar.stopping.octave import FIRST_STEP, MIN_OCTAVE_RECORDS

BUNDLED_MODEL, FLOW_MODEL = "mini", "mini-flow"
BUNDLED_MODELS = {BUNDLED_MODEL: "the bundled model", FLOW_MODEL: "mini-flow, the second bundled model"}
"""What pages call the models that come with dvar, by name; the second is a transformer of flow matching."""
Sampler = Literal["model", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DDIMScheduler"]
"""Schedulers of diffusers that images can be generated with, beside the model's own."""
Conflicts = Iterator[tuple[set[str], str]]
"""(fields concerned, problem) for values that are valid by themselves and cannot be used, alone or together."""

FREE_FIELDS = frozenset(
    (
        *("preset", "instance_data_dir", "class_data_dir", "concepts_list", "output_dir", "overwrite"),
        *("resume_from_checkpoint", "report_to", "checkpointing_steps", "checkpoints_total_limit", "extend", "keep"),
        *("offload", "push_to_hub", "hub_model_id"),
    )
)
"""Fields that decide where a run reads and writes, not what it computes: they may differ when it is resumed."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(ObjectiveConfig):
    """The settings that all methods share; a step is one update of the optimizer.

    A method subclasses it, adds its fields, and overrides the properties in which it differs, with a field where the
    user sets one.

    Attributes:
        method: The name of the method.
        title: The name of the method in prose.
        tags: Tags of the model card.

    Source: The defaults are the paper's, with its released command lines; `dvar.config.presets` names each source.
    Deviates: The arithmetic is float32 by default, where the released commands use fp16, because what the rule must
        see of L_det is in its third digit.
    """

    method: ClassVar[str]
    title: ClassVar[str]
    tags: ClassVar[tuple[str, ...]] = ()

    instance_data_dir: str | None = setting(
        None, "Folder with the images of the concept.", section="Data", alias="train_data_dir"
    )
    resolution: int = setting(
        512, "Side of the square training images in pixels, a multiple of 8.", Range(8, most=8192)
    )
    aspect_ratio_buckets: str | None = setting(
        None,
        "Sizes by aspect ratio instead of one square: 'auto', or height,width pairs such as 512,768;768,512.",
    )
    center_crop: bool = setting(True, "Crop the middle square; otherwise squeeze the whole image into a square.")
    random_flip: bool = setting(True, "Mirror each image left to right half of the time.")

    pretrained_model_name_or_path: str = setting(
        BUNDLED_MODEL,
        "Hub id, diffusers folder or .safetensors file of the base model, or a bundled one: 'mini' or 'mini-flow'.",
        section="Model",
    )
    revision: str | None = setting(None, "Branch, tag or commit of a hub id; the main branch by default.")
    variant: str | None = setting(None, "Variant of the weight files, such as fp16; the plain ones by default.")
    single_file_config: str | None = setting(
        None, "Folder or hub id with the configs and tokenizers of a single file; found by its kind by default."
    )
    clip_model: str | None = setting(
        None, "Hub id or folder of the CLIP for --initializer clip and --best_by clip; the bundled model has its own."
    )
    mixed_precision: Literal["no", "fp16", "bf16"] = setting(
        "no",
        "Arithmetic of the frozen model; bf16 adds noise to L_det, under Textual Inversion 12 % of its early fall.",
    )
    allow_tf32: bool = setting(
        False, "Compute float32 in TensorFloat-32 on a GPU: faster, with 10 of the 23 bits of precision."
    )
    gradient_checkpointing: bool = setting(False, "Recompute activations in the backward pass: less memory, more time.")
    attention_slicing: bool = setting(False, "Compute attention in slices: less memory, more time.")
    quantize: Literal["no", "nf4", "int8"] = setting(
        "no", "Store the frozen denoising network in 4 bits (nf4) or 8 (int8), by bitsandbytes."
    )
    offload: bool = setting(False, "Keep idle networks on the CPU: less memory of a GPU, more time.")
    compile: bool = setting(
        False, "Compile the denoising network: minutes before the first step, then faster steps on a GPU."
    )

    preset: str | None = setting(
        None,
        "Named settings to start from: 'mini' for the bundled model, 'lean' for others; 'paper' probes at every step, "
        "'smoke' only checks that everything runs, in 20 steps.",
        section="Method",
    )
    placeholder_token: str | None = setting("<thing>", "New word that stands for the concept in prompts.")
    initializer_token: str | None = setting(None, "Known word whose embedding the new one starts from, such as mug.")
    initializer: Literal["manual", "random", "clip", "clip-worst"] = setting(
        "manual", "How the known word is chosen: given, drawn from the vocabulary, or the best or the worst by a CLIP."
    )
    num_vectors: int = setting(1, "Embedding vectors of the new word.", Range(1, most=75))
    train_batch_size: int = setting(2, "Images in one forward pass of training.", BATCH)
    gradient_accumulation_steps: int = setting(1, "Forward passes in one step.", BATCH)
    optimizer: Literal["adamw", "adamw8bit", "sam", "prodigy"] = setting(
        "adamw", "AdamW, AdamW with 8-bit state, SAM over SGD, or Prodigy."
    )
    sam_rho: float = setting(0.05, "Radius in which SAM looks for the steepest point.", POSITIVE)
    learning_rate: float = setting(1e-2, "Learning rate of the optimizer.", POSITIVE)
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = setting("constant", "How the learning rate changes over the steps.")
    lr_warmup_steps: int = setting(0, "Steps over which the learning rate rises from 0.", NOT_NEGATIVE)
    adam_beta1: float = setting(0.9, "Decay of AdamW's mean of gradients.", Range(0, 1))
    adam_beta2: float = setting(0.999, "Decay of AdamW's mean of squared gradients.", Range(0, 1))
    adam_weight_decay: float = setting(1e-2, "Weight decay of AdamW.", NOT_NEGATIVE)
    adam_epsilon: float = setting(1e-8, "Guard of AdamW against division by zero.", POSITIVE)
    max_grad_norm: float | None = setting(
        None, "Norm to which a larger gradient is scaled down; none by default.", POSITIVE
    )
    seed: int = setting(0, "Seed of all randomness.", SEED)

    rule: Literal["dvar", "paper", "octave"] = setting(
        "dvar",
        "Rule that ends the run: 'dvar'; 'paper', which stops at the threshold alone; or 'octave', which stops when "
        "the last doubling of the steps brought little.",
        section="Stopping",
    )
    probe_every: int = setting(1, "Steps between two evaluations of the held batch.", COUNT)
    probes_per_octave: int | None = setting(
        None,
        f"Evaluations in each doubling of the steps from step {FIRST_STEP // 2} on, in place of --probe_every; for the "
        "rule octave.",
        Range(MIN_OCTAVE_RECORDS, most=64),
    )
    eval_batch_size: int = setting(8, "Inputs in the held batch.", BATCH)
    eval_timesteps: Literal["uniform", "stratified"] = setting(
        "uniform", "Timesteps of the held batch: each drawn from all, or one from each of as many equal parts of them."
    )
    window: int = setting(310, "DVAR's N: steps over which the recent variance is taken.")
    threshold: float = setting(0.15, "DVAR's alpha: stop when recent / whole variance is below it.")
    max_train_steps: int = setting(6100, "The cap: training ends here unless the rule ends it before.", COUNT)

    validation_prompt: str | None = setting(
        None, "Prompt of the sample images; by default a plain one with the concept.", section="Sampling"
    )
    sample_prompts: str | None = setting(
        None, "Text file of prompts of the sample images, one a line; after it --n NEGATIVE and --d SEED, as kohya's."
    )
    validation_steps: int = setting(500, "Steps between two sets of sample images.", COUNT)
    num_validation_images: int = setting(8, "Images of each prompt in a set.", IMAGE_COUNT)
    num_inference_steps: int = setting(50, "Denoising steps of an image.", SAMPLING_STEPS)
    guidance_scale: float = setting(7.5, "Classifier-free guidance of the sample images.", NOT_NEGATIVE)
    validation_scheduler: Sampler = setting(
        "model", "Scheduler of the sample images: the model's own, or one that needs fewer steps, say 20."
    )

    checkpointing_steps: int = setting(500, "Steps between two checkpoints.", COUNT, section="Output")
    checkpoints_total_limit: int | None = setting(None, "Newest checkpoints to keep; all of them by default.", COUNT)
    resume_from_checkpoint: str | None = setting(None, "Resume from 'latest', or from a checkpoint by its name.")
    extend: bool = setting(False, "Resume under a higher cap than the checkpoint's; with a constant learning rate.")
    keep: Literal["last,best", "last", "best"] = setting(
        "last,best", "Which steps to export: the last one, the best one beside it, or one of the two alone."
    )
    best_by: Literal["l_det", "clip", "stop"] = setting(
        "l_det", "What makes a step the best: the lowest L_det, the best CLIP score of its samples, or being the last."
    )
    report_to: Literal["none", "tensorboard", "wandb"] = setting(
        "none", "Tracker that receives each step; trace.jsonl and report.html hold the curves in any case."
    )
    output_dir: str = setting("runs/run", "Folder of the run.")
    push_to_hub: bool = setting(False, "Upload the weights, the model card and the samples to the hub at the end.")
    hub_model_id: str | None = setting(None, "Id on the hub to push to; by default the name of the output folder.")
    overwrite: bool = setting(False, "Replace another run in the output folder.")

    @property
    def placeholder_tokens(self) -> tuple[str, ...]:
        """The new tokens that are learned; none where a method trains without."""
        return () if self.placeholder_token is None else (self.placeholder_token,)

    @property
    def initializer_tokens(self) -> tuple[str, ...]:
        """The known tokens from which the placeholder tokens start, in their order."""
        return (str(self.initializer_token),)

    @property
    def subject(self) -> str:
        """The name of the concept in prompts."""
        return self.placeholder_token or str(self.instance_prompt)

    @property
    def kind(self) -> str:
        """The kind of the concept, as a noun: object, style, mug."""
        return self.learnable_property

    @property
    def learned(self) -> str:
        """A description of what is trained."""
        return "a new word"

    @property
    def learnable_property(self) -> str:
        """Whether the concept is an "object" or a "style"."""
        return "object"

    @property
    def instance_prompt(self) -> str | None:
        """The caption of all instance images; None where they have captions from templates."""
        return None

    @property
    def concepts_list(self) -> str | None:
        """The JSON file of several concepts; None where the fields describe the only one."""
        return None

    @property
    def random_rescale(self) -> bool:
        """Whether images are shown smaller or larger at random."""
        return False

    @property
    def class_prompt(self) -> str | None:
        """The caption of all class images."""
        return None

    @property
    def class_data_dir(self) -> str | None:
        """The folder with class images; None where the base model generates them."""
        return None

    @property
    def num_class_images(self) -> int:
        """The number of class images to generate."""
        return 0

    @property
    def effective_prior_weight(self) -> float:
        """The weight of the loss on class images; 0 where there are none."""
        return 0.0

    @property
    def pivot_step(self) -> int:
        """The step after which the new word is frozen, and from which the rule judges; 0 where it is never frozen."""
        return 0

    @property
    def earliest_stop(self) -> int:
        """The step before which the rule cannot end the run, counted from the one from which it judges."""
        return FIRST_STEP if self.rule == "octave" else self.window

    def is_probed(self, step: int) -> bool:
        """Return whether the held batch is evaluated at ``step``; at the cap it always is."""
        if self.probes_per_octave is None:
            return step % self.probe_every == 0 or step == self.max_train_steps
        since = step - self.pivot_step if step > self.pivot_step else step
        return is_due(PerOctave(self.probes_per_octave, FIRST_STEP // 2), since) or step == self.max_train_steps

    @property
    def plain_prompt(self) -> str:
        """The prompt of a plain image of the concept."""
        return self.instance_prompt or PLAIN_PROMPTS.get(self.learnable_property, "{}").format(self.placeholder_token)

    @property
    def sample_prompt(self) -> str:
        """The prompt of the sample images."""
        return self.validation_prompt or self.plain_prompt

    @property
    def caption_templates(self) -> tuple[str, ...]:
        """The captions of instance images that have none of their own.

        Source: The paper trains Textual Inversion and DreamBooth-LoRA on sentences around the placeholder token,
            without a class noun; diffusers trains LoRA alone on one sentence of the user's.
        """
        if self.instance_prompt:
            return (self.plain_prompt,)
        return tuple(template.format(self.placeholder_token) for template in TEMPLATES[self.learnable_property])

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values, with the name of the method, as config.json and checkpoints hold it."""
        return {"method": self.method, **asdict(self)}

    def conflicts(self) -> Conflicts:
        """Yield what is wrong with the fields of this method; `problems` adds what is wrong with the shared ones."""
        yield from ()


def problems(config: TrainingConfig) -> list[str]:
    """Return everything wrong with the fields of ``config``, one line each.

    Whether the rule can stop the run is not judged here: `dvar.training.rule.problems`.
    """
    invalid = dict(invalid_fields(config))
    conflicts = _conflicts(replace_invalid_fields(config))
    return [*invalid.values(), *(problem for names, problem in conflicts if invalid.keys().isdisjoint(names))]


def _conflicts(config: TrainingConfig) -> Conflicts:
    """Yield what is wrong with the fields together, those of all methods and those of this one."""
    if not config.instance_data_dir and not config.concepts_list:
        yield {"instance_data_dir"}, "instance_data_dir is missing: name the folder with the concept's images"
    yield from _token_conflicts(config)
    yield from _clip_conflicts(config)
    yield from config.conflicts()
    yield from _optimizer_conflicts(config)
    yield from objective_conflicts(config)
    if config.resolution % 8:
        multiple = 8 * round(config.resolution / 8)
        yield {"resolution"}, f"resolution must be a multiple of 8, got {config.resolution}: try {multiple}"
    yield from _bucket_conflicts(config)
    if config.sample_prompts and config.validation_prompt:
        message = "sample_prompts and validation_prompt exclude each other, got both: drop one of them"
        yield {"sample_prompts", "validation_prompt"}, message
    if config.overwrite and config.resume_from_checkpoint:
        message = "overwrite and resume_from_checkpoint exclude each other, got both: drop one of them"
        yield {"overwrite", "resume_from_checkpoint"}, message
    if config.extend and not config.resume_from_checkpoint:
        message = "extend needs a resume_from_checkpoint, got none: add --resume_from_checkpoint latest"
        yield {"extend", "resume_from_checkpoint"}, message


def _bucket_conflicts(config: TrainingConfig) -> Conflicts:
    """Yield what is wrong with the sizes of images by their aspect ratio."""
    names = {"aspect_ratio_buckets", "resolution"}
    if config.aspect_ratio_buckets is None:
        return
    try:
        list_buckets(config.aspect_ratio_buckets, config.resolution)
    except ValueError as error:
        yield names, f"{error}: correct it"
    if config.random_rescale:
        message = "aspect_ratio_buckets are for images that are shown whole, and random_rescale rescales squares"
        yield names, f"{message}: add --no_random_rescale"


def _token_conflicts(config: TrainingConfig) -> Conflicts:
    """Yield what is wrong with the placeholder tokens and how they are initialised."""
    token, tokens, initializer = config.placeholder_token, config.placeholder_tokens, config.initializer_token
    if token is not None:
        if not initializer and config.initializer == "manual":
            yield {"initializer_token"}, "initializer_token is missing: give one word for the concept, such as mug"
        if any(part.split() != [part] for part in tokens):
            message = f"placeholder_token must be one word without spaces, got {token!r}: try '<thing>'"
            yield {"placeholder_token"}, message
        elif (prompt := config.validation_prompt) and not any(part in prompt for part in tokens):
            yield missing_token("validation_prompt", " or ".join(tokens), prompt)
    if config.initializer != "manual" and token is None:
        message = f"initializer {config.initializer} needs a placeholder_token, got none: give the new word"
        yield {"initializer", "placeholder_token"}, message
    if config.initializer != "manual" and initializer != type(config).initializer_token:
        message = f"initializer_token is for initializer manual, got {initializer!r} with {config.initializer}"
        yield {"initializer", "initializer_token"}, f"{message}: drop one of them"


def missing_token(name: str, token: str, prompt: str) -> tuple[set[str], str]:
    """Return the conflict of a prompt without a placeholder token."""
    message = f"{name} must contain the placeholder token {token}, got {prompt!r}: put it in"
    return {"placeholder_token", name}, message


def _clip_conflicts(config: TrainingConfig) -> Conflicts:
    """Yield what is wrong with the CLIP, or with judging the best step by it."""
    choices = {"initializer": config.initializer, "best_by": config.best_by}
    uses = [f"{name} {choice}" for name, choice in choices.items() if choice.startswith("clip")]
    if uses and not config.clip_model and config.pretrained_model_name_or_path not in BUNDLED_MODELS:
        message = f"clip_model is missing: {uses[0]} needs the folder or hub id of a CLIP"
        yield {*choices, "clip_model"}, f"{message}, such as openai/clip-vit-base-patch32"
    if config.clip_model and not uses:
        message = f"clip_model is for initializer clip or best_by clip, got {config.clip_model!r} with neither: drop it"
        yield {*choices, "clip_model"}, message
    # A trained step must be scored before the rule can stop.
    if config.best_by == "clip" and config.validation_steps > config.earliest_stop:
        bound = "the first stop" if config.rule == "octave" else "the window"
        message = f"validation_steps must be at most {bound} ({config.earliest_stop}) where best_by is clip, since"
        yield (
            {"best_by", "validation_steps", "window", "rule"},
            f"{message} samples are scored, got {config.validation_steps}: lower it",
        )


def _optimizer_conflicts(config: TrainingConfig) -> Conflicts:
    """Yield what is wrong with the learning rate and its schedule."""
    cap, warmup = config.max_train_steps, config.lr_warmup_steps
    if config.optimizer == "prodigy" and config.learning_rate < 0.1:
        message = f"learning_rate scales the rate that prodigy finds and is meant to be 1, got {config.learning_rate:g}"
        yield {"learning_rate", "optimizer"}, f"{message}: add --learning_rate 1"
    if warmup and config.lr_scheduler == "constant":
        message = f"lr_warmup_steps must be 0 when lr_scheduler is constant, got {warmup}: use constant_with_warmup"
        yield {"lr_warmup_steps", "lr_scheduler"}, message
    if warmup >= cap:
        message = f"lr_warmup_steps must be below max_train_steps ({cap}), got {warmup}: shorten the warm-up"
        yield {"lr_warmup_steps", "max_train_steps"}, message
