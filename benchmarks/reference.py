"""The training loop of widespread scripts, as the reference of `benchmarks/step.py`."""

# Images are opened and encoded at each step, captions tokenized and encoded, the complete embedding table is in
# the optimizer and restored after it, the loss is read from the device at each step, and, as in the paper's code, the
# held batch is evaluated after each step.

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from peft import LoraConfig
from PIL import Image

from dvar.config.methods import CustomDiffusionConfig, DreamBoothLoraConfig, TextualInversionConfig
from dvar.config.training import TrainingConfig
from dvar.diffusion.backbone import Backbone
from dvar.diffusion.backbones.stable_diffusion import StableDiffusion


class ImageDataset(torch.utils.data.Dataset):
    """Images with their captions, prepared at every access."""

    def __init__(self, paths: list[Path], captions: list[str], tokenizer: object, size: int, flip: float) -> None:
        self.paths, self.captions, self.tokenizer = paths, captions, tokenizer
        self.size, self.flip, self.random = size, flip, np.random.default_rng(0)

    def __len__(self) -> int:
        return 10_000

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        image = Image.open(self.paths[index % len(self.paths)]).convert("RGB")
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side)).resize((self.size, self.size), Image.BICUBIC)
        if self.random.random() < self.flip:
            image = image.transpose(Image.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
        caption = self.captions[int(self.random.integers(len(self.captions)))]
        ids = self.tokenizer(
            caption, padding="max_length", truncation=True, max_length=self.tokenizer.model_max_length,
            return_tensors="pt",
        ).input_ids[0]  # fmt: skip
        return {"pixel_values": pixels, "input_ids": ids}


class Reference:
    """A plain loop over one method; `step` makes an update, `probe` evaluates the held batch."""

    def __init__(
        self, config: TrainingConfig, backbone: Backbone, captions: list[str], class_folder: Path | None
    ) -> None:
        self.config, self.backbone, self.device = config, backbone, backbone.device
        tokenizer, text, unet = backbone.tokenizer, backbone.text_encoder, backbone.unet
        self.noise = DDPMScheduler.from_config(backbone.scheduler.config)
        weights: list[torch.nn.Parameter] = []
        self.table: torch.Tensor | None = None
        if config.placeholder_token:
            tokenizer.add_tokens(config.placeholder_token)
            text.resize_token_embeddings(len(tokenizer))
            table = text.get_input_embeddings().weight
            row = tokenizer.encode(config.initializer_token, add_special_tokens=False)[0]
            self.new = tokenizer.convert_tokens_to_ids(config.placeholder_token)
            table.data[self.new] = table.data[row]
            table.requires_grad_(True)
            self.table, self.before = table, table.detach().clone()
            weights.append(table)
        if isinstance(config, DreamBoothLoraConfig):
            shape = {"r": config.rank, "lora_alpha": config.rank, "init_lora_weights": "gaussian"}
            unet.add_adapter(LoraConfig(target_modules=list(StableDiffusion.targets["attention"]), **shape))
            weights += [weight for weight in unet.parameters() if weight.requires_grad]
        if isinstance(config, CustomDiffusionConfig):
            for name, weight in unet.named_parameters():
                if ".attn2.to_k" in name or ".attn2.to_v" in name:
                    weights.append(weight.requires_grad_(True))
        for weight in weights:
            weight.data = weight.data.float()
        self.trained = weights
        self.optimizer = torch.optim.AdamW(weights, lr=config.learning_rate, weight_decay=config.adam_weight_decay)
        self.schedule = torch.optim.lr_scheduler.ConstantLR(self.optimizer, factor=1.0, total_iters=0)
        self.data = self._loader(Path(config.instance_data_dir), captions, config.train_batch_size)
        self.prior = (
            self._loader(class_folder, [f"a {config.class_noun}"], config.train_batch_size) if class_folder else None
        )
        held_batch = next(self._loader(Path(config.instance_data_dir), captions, config.eval_batch_size))
        with torch.no_grad():
            self.held = self._noised(held_batch)

    def _loader(self, folder: Path, captions: list[str], batch: int):
        paths = sorted(path for path in folder.iterdir() if path.suffix in (".png", ".jpg"))
        flip = 0.5 if self.config.random_flip else 0.0
        dataset = ImageDataset(paths, captions, self.backbone.tokenizer, self.config.resolution, flip)
        return iter(torch.utils.data.DataLoader(dataset, batch_size=batch, shuffle=True))

    def _noised(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        pixels = batch["pixel_values"].to(self.device)
        latents = self.backbone.vae.encode(pixels).latent_dist.sample() * self.backbone.vae.config.scaling_factor
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, self.noise.config.num_train_timesteps, (len(latents),), device=self.device).long()
        noisy = self.noise.add_noise(latents, noise, timesteps)
        target = (
            noise
            if self.noise.config.prediction_type == "epsilon"
            else self.noise.get_velocity(latents, noise, timesteps)
        )
        return noisy, timesteps, batch["input_ids"].to(self.device), target

    def _loss(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, ids: torch.Tensor, target: torch.Tensor
    ) -> torch.Tensor:
        with self.backbone.autocast():
            predicted = self.backbone.unet(noisy, timesteps, self.backbone.text_encoder(ids)[0]).sample
        return F.mse_loss(predicted.float(), target.float(), reduction="none").mean((1, 2, 3))

    def step(self) -> float:
        batch = next(self.data)
        if self.prior:
            class_batch = next(self.prior)
            batch = {name: torch.cat([batch[name], class_batch[name]]) for name in batch}
        loss = self._loss(*self._noised(batch)).mean() * (2 if self.prior else 1)
        loss.backward()
        if not isinstance(self.config, TextualInversionConfig):
            if self.table is not None:
                self.table.grad[torch.arange(len(self.table)) != self.new] = 0
            torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        if self.table is not None:
            with torch.no_grad():
                fixed_rows = torch.arange(len(self.table)) != self.new
                self.table[fixed_rows] = self.before[fixed_rows]
        return loss.detach().item()

    def probe(self) -> float:
        with torch.no_grad():
            return self._loss(*self.held).mean().item()
