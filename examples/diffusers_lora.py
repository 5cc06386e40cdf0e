"""DVAR in a loop like diffusers' `train_text_to_image_lora.py`: accelerate, PEFT, a dataloader, epochs.

The lines that were added for DVAR are between "dvar:" and "end". The model is a tiny random one and learns nothing
useful; replace its folder with that of a real one. Run ``python examples/diffusers_lora.py``; it takes seconds.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

import dvar
from dvar.stopping.integrations.accelerate import judge_together
from dvar.testing import tiny_concept, tiny_pipeline

scratch = Path(tempfile.mkdtemp())
model, images, output_dir = tiny_pipeline(scratch / "model"), tiny_concept(scratch / "images"), scratch / "output"
train_batch_size, max_train_steps, num_train_epochs = 2, 1000, 1000

accelerator = Accelerator(gradient_accumulation_steps=2, mixed_precision="no")
torch.manual_seed(0)
noise_scheduler = DDPMScheduler.from_pretrained(model, subfolder="scheduler")
tokenizer = CLIPTokenizer.from_pretrained(model, subfolder="tokenizer")
text_encoder = CLIPTextModel.from_pretrained(model, subfolder="text_encoder").requires_grad_(False)
vae = AutoencoderKL.from_pretrained(model, subfolder="vae").requires_grad_(False)
unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet").requires_grad_(False)
unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
cast_training_params(unet, dtype=torch.float32)
for part in (text_encoder, vae, unet):
    part.to(accelerator.device)
optimizer = torch.optim.AdamW([weight for weight in unet.parameters() if weight.requires_grad], lr=1e-2)


def load_example(path: Path) -> dict[str, torch.Tensor]:
    pixels = np.asarray(Image.open(path).convert("RGB").resize((32, 32)), dtype=np.float32) / 127.5 - 1
    ids = tokenizer("a photo of a red ball", padding="max_length", max_length=77, return_tensors="pt").input_ids
    return {"pixel_values": torch.from_numpy(pixels).permute(2, 0, 1), "input_ids": ids[0]}


train_dataset = [load_example(path) for path in sorted(images.glob("*.png"))]
train_dataloader = torch.utils.data.DataLoader(train_dataset, batch_size=train_batch_size, shuffle=True)
unet, optimizer, train_dataloader = accelerator.prepare(unet, optimizer, train_dataloader)


# dvar: everything random about a batch, drawn once; and the loss per sample
def draw() -> dict[str, torch.Tensor]:
    samples = [train_dataset[index % len(train_dataset)] for index in range(8)]
    batch = {name: torch.stack([item[name] for item in samples]).to(accelerator.device) for name in samples[0]}
    latents = vae.encode(batch["pixel_values"]).latent_dist.sample() * vae.config.scaling_factor
    timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (8,), device=latents.device)
    return {
        "latents": latents,
        "noise": torch.randn_like(latents),
        "timesteps": timesteps,
        "input_ids": batch["input_ids"],
    }


def losses(held: dict[str, torch.Tensor]) -> torch.Tensor:
    noisy_latents = noise_scheduler.add_noise(held["latents"], held["noise"], held["timesteps"])
    states = text_encoder(held["input_ids"])[0]
    prediction = accelerator.unwrap_model(unet)(noisy_latents, held["timesteps"], states).sample
    return (prediction.float() - held["noise"].float()).square().mean(dim=(1, 2, 3))


probe = dvar.Probe.capture(losses, draw, [accelerator.unwrap_model(unet), text_encoder])
monitor = dvar.StopMonitor(dvar.Dvar(window=60, threshold=0.15), probe, output_dir / "trace.jsonl")
# end

global_step = 0
# dvar: the untouched model, or the one loaded from a checkpoint
verdict = judge_together(accelerator, monitor, global_step)
# end
for _epoch in range(num_train_epochs):
    unet.train()
    for batch in train_dataloader:
        with accelerator.accumulate(unet):
            latents = vae.encode(batch["pixel_values"]).latent_dist.sample() * vae.config.scaling_factor
            noise = torch.randn_like(latents)
            timesteps = torch.randint(
                0, noise_scheduler.config.num_train_timesteps, (len(latents),), device=latents.device
            )
            noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
            states = text_encoder(batch["input_ids"])[0]
            loss = F.mse_loss(unet(noisy_latents, timesteps, states).sample.float(), noise.float())
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            global_step += 1
            # dvar: after an update, not after a batch
            verdict = judge_together(accelerator, monitor, global_step)
            # end
        if global_step >= max_train_steps or verdict.stop:
            break
    if global_step >= max_train_steps or verdict.stop:
        break

print(verdict)
