"""DVAR in a loop like `train_network.py` of sd-scripts (kohya): LoRA layers are hooked into the U-Net.

The lines that were added for DVAR are between "dvar:" and "end". The model is a tiny random one and learns nothing
useful; replace its folder with that of a real one. Run ``python examples/kohya_lora.py``; it takes seconds.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

import dvar
from dvar.stopping.integrations.accelerate import judge_together
from dvar.testing import tiny_concept, tiny_pipeline

scratch = Path(tempfile.mkdtemp())
model, images, output_dir = tiny_pipeline(scratch / "model"), tiny_concept(scratch / "images"), scratch / "output"
train_batch_size, max_train_steps, noise_offset = 2, 1000, 0.05

accelerator = Accelerator(gradient_accumulation_steps=2, mixed_precision="no")
torch.manual_seed(0)
noise_scheduler = DDPMScheduler.from_pretrained(model, subfolder="scheduler")
tokenizer = CLIPTokenizer.from_pretrained(model, subfolder="tokenizer")
text_encoder = CLIPTextModel.from_pretrained(model, subfolder="text_encoder").requires_grad_(False)
vae = AutoencoderKL.from_pretrained(model, subfolder="vae").requires_grad_(False)
unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet").requires_grad_(False)


class LoRANetwork(nn.Module):
    """Two low-rank layers beside each attention projection; `apply_to` hooks them in."""

    def __init__(self, unet: nn.Module, network_dim: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        for name, layer in unet.named_modules():
            if name.endswith(("to_q", "to_k", "to_v")):
                down, up = nn.Linear(layer.in_features, network_dim, False), nn.Linear(network_dim, layer.out_features)
                nn.init.zeros_(up.weight), nn.init.zeros_(up.bias)
                self.layers[f"lora_unet_{name.replace('.', '_')}"] = nn.Sequential(down, up)

    def apply_to(self, unet: nn.Module) -> None:
        for name, layer in unet.named_modules():
            if (key := f"lora_unet_{name.replace('.', '_')}") in self.layers:
                layer.register_forward_hook(lambda layer, given, out, pair=self.layers[key]: out + pair(given[0]))


network = LoRANetwork(unet)
network.apply_to(unet)
optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)


@torch.no_grad()
def load_cached(path: Path) -> dict[str, torch.Tensor]:
    """Return what --cache_latents and --cache_text_encoder_outputs store of an image and its caption."""
    pixels = np.asarray(Image.open(path).convert("RGB").resize((32, 32)), dtype=np.float32) / 127.5 - 1
    pixel_values = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    ids = tokenizer("a photo of a red ball", padding="max_length", max_length=77, return_tensors="pt").input_ids
    return {
        "latents": vae.encode(pixel_values).latent_dist.sample()[0] * vae.config.scaling_factor,
        "text_encoder_outputs": text_encoder(ids)[0][0],
        "loss_weights": torch.tensor(1.0),
    }


train_dataset = [load_cached(path) for path in sorted(images.glob("*.png"))]
train_dataloader = torch.utils.data.DataLoader(train_dataset, batch_size=train_batch_size, shuffle=True)
unet, network, optimizer, train_dataloader = accelerator.prepare(unet, network, optimizer, train_dataloader)


# dvar: everything random about a batch, drawn once; and the loss per sample, without weights and noise offset
def draw() -> dict[str, torch.Tensor]:
    samples = [train_dataset[index % len(train_dataset)] for index in range(8)]
    batch = {name: part.to(accelerator.device) for name, part in torch.utils.data.default_collate(samples).items()}
    timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (8,), device=accelerator.device)
    return {**batch, "noise": torch.randn_like(batch["latents"]), "timesteps": timesteps}


def sample_losses(held: dict[str, torch.Tensor]) -> torch.Tensor:
    noisy_latents = noise_scheduler.add_noise(held["latents"], held["noise"], held["timesteps"])
    noise_pred = accelerator.unwrap_model(unet)(noisy_latents, held["timesteps"], held["text_encoder_outputs"]).sample
    return (noise_pred.float() - held["noise"].float()).square().mean(dim=(1, 2, 3))


modules = [accelerator.unwrap_model(unet), accelerator.unwrap_model(network)]
probe = dvar.Probe.capture(sample_losses, draw, modules)
monitor = dvar.StopMonitor(dvar.Dvar(window=60, threshold=0.15), probe, output_dir / "trace.jsonl")
# end

global_step = 0
# dvar: the untouched model, or the one loaded with --resume
verdict = judge_together(accelerator, monitor, global_step)
# end
while global_step < max_train_steps and not verdict.stop:
    network.train()
    for batch in train_dataloader:
        with accelerator.accumulate(network):
            noise = torch.randn_like(batch["latents"])
            noise += noise_offset * torch.randn(*noise.shape[:2], 1, 1, device=noise.device)
            timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (len(noise),), device=noise.device)
            noisy_latents = noise_scheduler.add_noise(batch["latents"], noise, timesteps)
            noise_pred = unet(noisy_latents, timesteps, batch["text_encoder_outputs"]).sample
            loss = (noise_pred.float() - noise.float()).square().mean(dim=(1, 2, 3))
            accelerator.backward((loss * batch["loss_weights"]).mean())
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if accelerator.sync_gradients:
            global_step += 1
            # dvar: after an update, not after a batch
            verdict = judge_together(accelerator, monitor, global_step)
            # end
        if global_step >= max_train_steps or verdict.stop:
            break

save_file(accelerator.unwrap_model(network).state_dict(), output_dir / "last.safetensors")
print(verdict)
