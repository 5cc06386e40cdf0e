"""DVAR in a loop like diffusers' `textual_inversion.py`: one new word is learned, everything else is frozen.

The lines that were added for DVAR are between "dvar:" and "end". The model is a tiny random one and learns nothing
useful; replace its folder with that of a real one. Run ``python examples/diffusers_textual_inversion.py``; it takes
seconds.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTokenizer

import dvar
from dvar.stopping.integrations.accelerate import judge_together
from dvar.testing import tiny_concept, tiny_pipeline

scratch = Path(tempfile.mkdtemp())
model, images, output_dir = tiny_pipeline(scratch / "model"), tiny_concept(scratch / "images"), scratch / "output"
placeholder_token, initializer_token = "<my-ball>", "ball"
train_batch_size, max_train_steps, num_train_epochs, repeats = 2, 1000, 1000, 10

accelerator = Accelerator(gradient_accumulation_steps=1, mixed_precision="no")
torch.manual_seed(0)
noise_scheduler = DDPMScheduler.from_pretrained(model, subfolder="scheduler")
tokenizer = CLIPTokenizer.from_pretrained(model, subfolder="tokenizer")
text_encoder = CLIPTextModel.from_pretrained(model, subfolder="text_encoder").requires_grad_(False)
vae = AutoencoderKL.from_pretrained(model, subfolder="vae").requires_grad_(False)
unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet").requires_grad_(False)

tokenizer.add_tokens([placeholder_token])
placeholder_id = tokenizer.convert_tokens_to_ids(placeholder_token)
initializer_id = tokenizer.encode(initializer_token, add_special_tokens=False)[0]
text_encoder.resize_token_embeddings(len(tokenizer))
embeddings = text_encoder.get_input_embeddings().weight.requires_grad_(True)
with torch.no_grad():
    embeddings[placeholder_id] = embeddings[initializer_id]
optimizer = torch.optim.AdamW([embeddings], lr=1e-2)


def load_example(path: Path) -> dict[str, torch.Tensor]:
    pixels = np.asarray(Image.open(path).convert("RGB").resize((32, 32)), dtype=np.float32) / 127.5 - 1
    caption = f"a photo of a {placeholder_token}"
    ids = tokenizer(caption, padding="max_length", max_length=77, return_tensors="pt").input_ids
    return {"pixel_values": torch.from_numpy(pixels).permute(2, 0, 1), "input_ids": ids[0]}


train_dataset = [load_example(path) for path in sorted(images.glob("*.png"))] * repeats
train_dataloader = torch.utils.data.DataLoader(train_dataset, batch_size=train_batch_size, shuffle=True)
text_encoder, optimizer, train_dataloader = accelerator.prepare(text_encoder, optimizer, train_dataloader)
for part in (unet, vae):
    part.to(accelerator.device)
embeddings = accelerator.unwrap_model(text_encoder).get_input_embeddings().weight
orig_embeds_params = embeddings.data.clone()


# dvar: everything random about a batch, drawn once; and the loss per sample
def draw() -> dict[str, torch.Tensor]:
    batch = torch.utils.data.default_collate(train_dataset[:8])
    latents = vae.encode(batch["pixel_values"].to(accelerator.device)).latent_dist.sample() * vae.config.scaling_factor
    timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (8,), device=latents.device)
    return {
        "latents": latents,
        "noise": torch.randn_like(latents),
        "timesteps": timesteps,
        "input_ids": batch["input_ids"].to(latents.device),
    }


def losses(held: dict[str, torch.Tensor]) -> torch.Tensor:
    noisy_latents = noise_scheduler.add_noise(held["latents"], held["noise"], held["timesteps"])
    states = accelerator.unwrap_model(text_encoder)(held["input_ids"])[0]
    prediction = unet(noisy_latents, held["timesteps"], states).sample
    return (prediction.float() - held["noise"].float()).square().mean(dim=(1, 2, 3))


probe = dvar.Probe.capture(losses, draw, [accelerator.unwrap_model(text_encoder), unet])
monitor = dvar.StopMonitor(dvar.Dvar(window=60, threshold=0.15), probe, output_dir / "trace.jsonl")
# end

global_step = 0
# dvar: the untouched model, or the one loaded from a checkpoint
verdict = judge_together(accelerator, monitor, global_step)
# end
for _epoch in range(num_train_epochs):
    text_encoder.train()
    for batch in train_dataloader:
        with accelerator.accumulate(text_encoder):
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
            with torch.no_grad():  # only the placeholder token is learned
                others = torch.arange(len(tokenizer)) != placeholder_id
                embeddings[others] = orig_embeds_params[others]
        if accelerator.sync_gradients:
            global_step += 1
            # dvar: after an update, and after the lines that restore the other embeddings
            verdict = judge_together(accelerator, monitor, global_step)
            # end
        if global_step >= max_train_steps or verdict.stop:
            break
    if global_step >= max_train_steps or verdict.stop:
        break

learned = embeddings[placeholder_id : placeholder_id + 1].detach().cpu().clone()
save_file({placeholder_token: learned}, output_dir / "learned_embeds.safetensors")
print(verdict)
