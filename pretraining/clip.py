"""Stage 2: the two CLIPs.  One conditions the U-Net, the other (another seed and width) only scores pictures.

``--name clip`` trains both towers for a short while: that is enough for the words, and its text tower conditions
the U-Net from then on.  ``--name vision`` goes on with all but that tower; ``--name judge`` trains the other CLIP.

The usual symmetric contrastive loss, except that a caption which happens to be true of another picture of the batch
is no negative of it: what captions mention and what pictures show is known.  The same knowledge tutors both towers:
linear heads, thrown away afterwards, read the facts off each pooled state, and off each patch of the picture where
the subject is.  Before them the towers stayed for long at the place, which fills most pixels.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPConfig, CLIPModel

from dvar.mini.world.captions import ANSWERS, FACTS, SUBJECT, agrees
from pretraining.pictures import as_tensor, captions_for, draw_pictures, fingerprint
from pretraining.training import Training, arguments, load_average
from pretraining.words import LENGTH, load_tokenizer

WIDTHS = {"clip": 192, "judge": 128}
SHARED = 128
PATCH = 8
SPLITS = [ANSWERS[fact] for fact in FACTS]


def build(width: int, vocabulary: int) -> CLIPModel:
    end = vocabulary - 1
    shared = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": width // 32,
        "projection_dim": SHARED,
    }
    text = {**shared, "vocab_size": vocabulary, "num_hidden_layers": 3, "max_position_embeddings": LENGTH}
    text |= {"bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end, "hidden_act": "quick_gelu"}
    vision = {**shared, "num_hidden_layers": 5, "image_size": 64, "patch_size": PATCH, "hidden_act": "quick_gelu"}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=SHARED))


class Tutored(nn.Module):
    """A CLIP with a linear reader of `FACTS` on each tower, and one on each patch of a picture: of the subject's facts,
    and of whether the subject is there."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.clip = build(width, vocabulary)
        self.of_picture = nn.Linear(SHARED, sum(SPLITS))
        self.of_text = nn.Linear(SHARED, sum(SPLITS))
        self.of_patches = nn.Linear(width, sum(SPLITS[:SUBJECT]) + 1)


def reading_loss(logits: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Mean over the facts of cross-entropy; negative entries of ``truth`` [n, 15] are not asked for."""
    losses = [
        F.cross_entropy(part, wanted, ignore_index=-1, reduction="sum") / (wanted >= 0).sum().clamp(min=1)
        for part, wanted in zip(logits.float().split(SPLITS, dim=1), truth.clamp(min=-1).T, strict=True)
    ]
    return torch.stack(losses).mean()


def contrastive_loss(similarity: torch.Tensor, agreement: torch.Tensor) -> torch.Tensor:
    """``similarity`` [captions, pictures] scaled; true pairs off the diagonal are left out of both denominators."""
    off_diagonal = agreement & ~torch.eye(len(agreement), dtype=torch.bool, device=agreement.device)
    logits = similarity.masked_fill(off_diagonal, -1e4)
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def patch_loss(logits: torch.Tensor, truth: torch.Tensor, coverage: torch.Tensor) -> torch.Tensor:
    """``logits`` [n, patches, answers + 1]: what each patch says of the subject's facts ``truth`` [n, 12], weighed by
    how much of the subject it shows, ``coverage`` [n, patches], which it must tell too."""
    *parts, there = logits.float().split([*SPLITS[:SUBJECT], 1], dim=2)
    weight = coverage / coverage.sum()
    losses = [F.binary_cross_entropy_with_logits(there.squeeze(2), coverage)]
    for part, wanted in zip(parts, truth.T, strict=True):
        asked = wanted.clamp(min=-1)[:, None].expand(-1, part.shape[1])
        each = F.cross_entropy(part.flatten(0, 1), asked.flatten(), ignore_index=-1, reduction="none")
        losses.append((each * weight.flatten()).sum())
    return torch.stack(losses).mean()


def prepare(name: str, vocabulary: int) -> Tutored:
    """The model that a name stands for, before its training; ``vision`` begins where ``clip`` ended and keeps that
    text tower, which the U-Net knows."""
    if name != "vision":
        return Tutored(WIDTHS[name], vocabulary)
    model = load_average("clip", Tutored(WIDTHS["clip"], vocabulary)).requires_grad_(True).train()
    model.clip.text_model.requires_grad_(False)
    return model


def load(name: str, vocabulary: int) -> CLIPModel:
    """The trained CLIP, frozen, without its tutors; ``vision`` is whole, text tower and all."""
    return load_average(name, prepare(name, vocabulary)).clip


def main() -> None:
    chosen = arguments(steps=4000, batch=96)
    name = chosen.name or "clip"
    tokenizer = load_tokenizer()
    torch.manual_seed(chosen.seed + (0 if name == "clip" else 1))
    model = prepare(name, len(tokenizer))
    if chosen.device == "cpu":
        model.clip.set_attn_implementation("eager")  # the fused kernel is slow on CPUs at 65 tokens: half of a step
    stream = {"clip": 2000, "judge": 3000, "vision": 2500}[name] + chosen.seed
    training = Training(name, model, chosen, lr=1e-3, data=fingerprint(stream))
    for step in training:
        pictures = draw_pictures(stream, step, chosen.batch)
        texts, mentioned = captions_for(pictures.facts, np.random.default_rng([17, chosen.seed, step]))
        ids = tokenizer(texts, padding=True, return_tensors="pt").to(chosen.device)
        agreement = torch.from_numpy(agrees(mentioned, pictures.facts)).to(chosen.device)
        with torch.autocast(chosen.device, torch.bfloat16):
            output = model.clip(**ids, pixel_values=as_tensor(pictures.pixels, chosen.device))
            of_picture = model.of_picture(output.vision_model_output.pooler_output)
            of_text = model.of_text(output.text_model_output.pooler_output)
            of_patches = model.of_patches(output.vision_model_output.last_hidden_state[:, 1:])
        similarity = model.clip.logit_scale.exp() * output.text_embeds.float() @ output.image_embeds.float().T
        shown = torch.from_numpy(pictures.facts).long().to(chosen.device)
        said = torch.from_numpy(mentioned).long().to(chosen.device)
        coverage = F.avg_pool2d(torch.from_numpy(pictures.masks()), PATCH).flatten(1).to(chosen.device)
        loss = contrastive_loss(similarity, agreement) + reading_loss(of_picture, shown) + reading_loss(of_text, said)
        training.update(loss + 2 * patch_loss(of_patches, shown[:, :SUBJECT], coverage))
        with torch.no_grad():
            model.clip.logit_scale.clamp_(max=4.6052)
        if training.step % 50 == 0:
            best = similarity.argmax(1).cpu()
            right = agreement.cpu()[torch.arange(len(best)), best].float().mean()
            wanted = zip(FACTS, of_picture.split(SPLITS, dim=1), shown.T, strict=True)
            seen = {fact: (part.argmax(1) == truth).float().mean() for fact, part, truth in wanted}
            training.log(loss=loss, right=right, scale=model.clip.logit_scale.exp(), **seen)


if __name__ == "__main__":
    main()
