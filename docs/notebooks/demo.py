# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The demo: a word for one subject
#
# A bundled model, a picture book of 64 × 64 pixels, learns one subject that it has never seen, and stops by itself. It
# takes a few minutes on two cores: no GPU, no account, no download of a model. On Colab choose the runtime "CPU".

# %%
REPOSITORY = "ADDRESS"  # of the repository that this notebook comes from, as git clone takes it

import importlib.util
import subprocess
import sys

if importlib.util.find_spec("dvar") is None:
    subprocess.run(["git", "clone", "--quiet", "--depth=1", REPOSITORY, "dvar-repository"], check=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--editable", "dvar-repository[train,lab]"]
    subprocess.run(command, check=True)
    sys.path.insert(0, "dvar-repository/src")  # for this session, which began before the installation

# %% [markdown]
# ## The subject
#
# Four or five images are all that there is. The model knows cats, but not this one.

# %%
import dvar.mini
from PIL import Image


def side_by_side(paths, height=128):
    """Return images in one row."""
    images = [Image.open(path).convert("RGB").resize((height, height), Image.Resampling.NEAREST) for path in paths]
    row = Image.new("RGB", (len(images) * (height + 8) - 8, height), "white")
    for number, image in enumerate(images):
        row.paste(image, (number * (height + 8), 0))
    return row


subject = dvar.mini.concepts()["black_cat"]
side_by_side(sorted(subject.glob("*.png")))

# %% [markdown]
# ## Train until the rule says stop
#
# Every fifth step the loss is evaluated on a batch of 32 held draws: training images with fixed noise and fixed
# timesteps. The rule stops when that loss has settled; `max_train_steps` is the cap.

# %%
from dvar import TextualInversionConfig, personalise
from dvar.config.presets import configure

settings = {
    "instance_data_dir": str(subject),
    "placeholder_token": "<my-cat>",
    "initializer_token": "cat",
    "learning_rate": 4e-3,
    "eval_batch_size": 32,
    "probe_every": 5,
    "window": 100,
    "max_train_steps": 600,
    "validation_steps": 50,
    "num_validation_images": 3,
    "output_dir": "runs/notebook-demo",
    "overwrite": True,
}
result = personalise(configure(settings, TextualInversionConfig))
print(result.verdict)

# %% [markdown]
# ## What the training loss hides
#
# Above, the training loss, with new images, noise and timesteps at every step. Below, the same loss on the held batch.

# %%
import matplotlib.pyplot as plt

trace = dvar.Trace.read(result.folder / "trace.jsonl")
_, (upper, lower) = plt.subplots(2, 1, sharex=True, figsize=(8, 4.5), layout="constrained")
upper.plot(*trace.metric("train_loss"), color="0.6", linewidth=0.8)
upper.set_ylabel("training loss")
lower.plot(trace.steps, trace.values, color="tab:red")
lower.axvline(result.verdict.step, color="tab:blue", linestyle="--")
lower.set_ylabel("held loss")
lower.set_xlabel("step")
plt.show()

# %% [markdown]
# ## What the model generates on the way
#
# The same noise at each set, every fifty steps: one row for each. The first is the untouched model.

# %%
samples = sorted({path.parent for path in result.folder.glob("samples/**/*.png")}, key=lambda path: path.name)
for folder in samples[:: max(1, len(samples) // 4)]:
    print(folder.name)
    display(side_by_side(sorted(folder.glob("*.png"))[:3], height=96))

# %% [markdown]
# ## The subject in a new place
#
# No training image shows it there.

# %%
prompt = "a photo of <my-cat> in the snow"
command = [sys.executable, "-m", "dvar", "generate", str(result.folder), "--prompt", prompt, "--num_images", "4"]
print(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
side_by_side(sorted(result.folder.glob("generated/**/*.png"))[-4:])

# %% [markdown]
# `runs/notebook-demo/report.html` has all of this on one page. Train on images of your own: [the
# guide](../guides/train-your-images.md).
