"""Which extra of `dvar` installs which package."""

EXTRAS = {
    "PIL": "train",
    "accelerate": "train",
    "diffusers": "train",
    "peft": "train",
    "safetensors": "train",
    "torch": "train",
    "transformers": "train",
    "tensorboard": "tensorboard",
    "bitsandbytes": "optimizers",
    "prodigyopt": "optimizers",
    "h11": "survey",
    "itsdangerous": "survey",
    "starlette": "survey",
    "uvicorn": "survey",
    "gradio": "studio",
    "dvar_mini": "mini",
    "skia": "world",
    "matplotlib": "lab",
    "scipy": "lab",
    "lightning": "lightning",
    "ignite": "ignite",
    "keras": "keras",
    "ray": "ray",
    "optuna": "optuna",
}
"""Package, by the name it is imported under, to the extra that a user installs for it."""


def install_command(module: str) -> str:
    """Return the command that installs the package of ``module``: ``scipy.stats`` is part of ``dvar[lab]``."""
    package = module.partition(".")[0]
    return f"pip install 'dvar[{EXTRAS[package]}]'" if package in EXTRAS else f"pip install {package}"
