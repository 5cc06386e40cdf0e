"""The parts of tiny pipelines: tokenizers, text encoders, autoencoders and a U-Net, with random weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the contracts need NumPy alone: whatever is heavier is imported where it is used
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import (
        BertTokenizer,
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        Qwen2Tokenizer,
        T5EncoderModel,
        T5Tokenizer,
    )


WORDS = """
a an the my of in on at with and to one photo picture rendering drawing depiction painting illustration image style good
nice bright dark clean dirty small large big cool weird close up cropped red green blue yellow white black mug vase cat
dog house lamp chair boat bird robot sculpture toy object beach grass snow night table ktn pll ucd
""".split()  # noqa: SIM905 (sixty words read better as text)
ALPHABET = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
START, END = "<|startoftext|>", "<|endoftext|>"
PRINTABLE = [chr(code) for code in range(33, 127)]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    "{% if add_generation_prompt and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)


def tiny_tokenizer(words: Iterable[str] = WORDS) -> CLIPTokenizer:
    """Return a `CLIPTokenizer` whose byte pairs are merged until each of ``words`` is a single token."""
    from transformers import CLIPTokenizer

    spellings = {word: [*word[:-1], word[-1] + "</w>"] for word in dict.fromkeys(words)}
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for pieces in spellings.values() for pair in pairwise(pieces)):
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        spellings = {word: _merge_pair(pieces, best) for word, pieces in spellings.items()}
    pieces = [*ALPHABET, *(letter + "</w>" for letter in ALPHABET), *map("".join, merges), START, END]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


def _merge_pair(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Return a CLIP text encoder of 32 dimensions."""
    from transformers import CLIPTextModel

    return CLIPTextModel(_text_config(tokenizer)).eval()


def build_projected_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """Return a CLIP text encoder of 32 dimensions with a projection to 16."""
    from transformers import CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(_text_config(tokenizer)).eval()


def _text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_factor=5.0,
    )


def build_autoencoder(resolution: int, *, levels: int = 3, **config: Any) -> AutoencoderKL:
    """Return an autoencoder with latents of 4 channels, halved in size at every level but the first."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(*(8,) * (levels - 1), 16),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=resolution,
        **config,
    ).eval()


def build_unet(side: int, **config: Any) -> UNet2DConditionModel:
    """Return a U-Net for latents of ``side``, by default with conditions of 32 dimensions."""
    from diffusers import UNet2DConditionModel

    shared = {"sample_size": side, "in_channels": 4, "out_channels": 4, "block_out_channels": (16, 32)}
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "attention_head_dim": 8,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**{**shared, **blocks, **config}).eval()


def tiny_t5_tokenizer(words: Iterable[str] = WORDS) -> T5Tokenizer:
    """Return a `T5Tokenizer` in which each of ``words`` is one token and other text is spelled out."""
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces = dict.fromkeys(["\u2581", *(f"\u2581{word}" for word in words), *PRINTABLE])
    # The logarithms of probabilities: a word costs less than its letters.
    vocabulary = special + [(piece, -3.0 if len(piece) > 1 else -8.0) for piece in pieces]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=512)


def tiny_qwen_tokenizer() -> Qwen2Tokenizer:
    """Return a `Qwen2Tokenizer` whose tokens are bytes, with the marks of a chat and a template for them."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    marks = ["<|im_start|>", "<|im_end|>"]
    pieces = [*sorted(ByteLevel.alphabet()), END, *marks]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], model_max_length=1024, extra_special_tokens=marks)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_bert_tokenizer(words: Iterable[str] = WORDS) -> BertTokenizer:
    """Return a `BertTokenizer` in which each of ``words`` is one token and other text is spelled out."""
    from transformers import BertTokenizer

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, *words, *PRINTABLE, *(f"##{letter}" for letter in PRINTABLE)]
    return BertTokenizer(vocab={piece: index for index, piece in enumerate(dict.fromkeys(pieces))}, model_max_length=77)


def build_t5(tokenizer: T5Tokenizer, width: int = 32) -> T5EncoderModel:
    """Return the encoder of a T5."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=len(tokenizer), d_model=width, d_ff=64, d_kv=8, num_layers=1, num_heads=4)
    return T5EncoderModel(config).eval()


def build_qwen3(tokenizer: Qwen2Tokenizer, layers: int) -> Any:
    """Return a Qwen3 with ``layers`` layers of 16 dimensions."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=1024,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Qwen3ForCausalLM(config).eval()


def build_qwen_vl(tokenizer: Qwen2Tokenizer) -> Any:
    """Return a Qwen2.5-VL with two layers of 16 dimensions."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.2,
        "rope_parameters": {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1000000.0},
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval()


def build_ldm_bert(tokenizer: BertTokenizer) -> Any:
    """Return the text encoder of Latent Diffusion, of 32 dimensions."""
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    config = LDMBertConfig(
        vocab_size=len(tokenizer),
        d_model=32,
        encoder_layers=2,
        encoder_ffn_dim=64,
        encoder_attention_heads=2,
        head_dim=16,
        init_std=0.3,
    )
    return LDMBertModel(config).eval()
