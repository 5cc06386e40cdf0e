"""Where a base model is: a folder, a file, or a repository of the hub at some revision."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from dvar import mini
from dvar.config.training import BUNDLED_MODELS, TrainingConfig
from dvar.diffusion import single_file
from dvar.errors import ModelError, UnreachableModel, first_line

CONFIG_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*/*.json", "*/*.txt", "*/*.model", "*/*.jinja"]
"""What describes a model beside its weights: configs and tokenizers."""


@dataclass(frozen=True)
class ModelSource:
    """The place of a base model.

    Attributes:
        name: A diffusers folder, a single .safetensors file, or a hub id.
        revision: The branch, tag or commit of a hub id; the main branch by default.
        variant: The variant of the weight files, such as "fp16".
        single_file_config: The folder or hub id with the configs and tokenizers of a single file; by default a hub id
            by what the file holds.
    """

    name: str
    revision: str | None = None
    variant: str | None = None
    single_file_config: str | None = None

    @classmethod
    def of(cls, config: TrainingConfig) -> ModelSource:
        """Return where the base model of ``config`` is; "mini" is the bundled one."""
        name = config.pretrained_model_name_or_path
        path = mini.path(name) if name in BUNDLED_MODELS else Path(name).expanduser()
        return cls(str(path) if path.exists() else name, config.revision, config.variant, config.single_file_config)

    @property
    def is_file(self) -> bool:
        """Whether the model is a single file."""
        return Path(self.name).is_file()

    @property
    def config_folder(self) -> Path:
        """The folder with the model's configs and tokenizers, fetched from the hub where it is there.

        Raises:
            ModelError: They are neither here nor in the cache nor can be fetched.
        """
        if Path(self.name).is_dir():
            return Path(self.name)
        if not self.is_file:
            return fetch_configs(self.name, self.revision)
        kind = single_file.find_kind(Path(self.name))
        configs = self.single_file_config or kind.configs
        if not configs:
            message = f"{self.name} is of a {kind.title} and does not say whether it predicts noise, as those of 512 px"
            remedy = "name a folder or hub id with its configs by --single_file_config"
            raise ModelError(f"{message} do, or velocity, as those of 768 px: {remedy}")
        folder = Path(configs).expanduser()
        try:
            return folder if folder.is_dir() else fetch_configs(configs, None)
        except ModelError as error:
            message = f"{self.name} has no configs of its own, and {error}"
            raise type(error)(f"{message}; or name a folder with them by --single_file_config") from error

    def fetch(self) -> Path:
        """Return the folder with the model's configs and weights, fetched from the hub where it is there.

        Raises:
            UnreachableModel: The connection broke.
            ModelError: As `config_folder`.
        """
        if Path(self.name).is_dir():
            return Path(self.name)
        fetch_configs(self.name, self.revision)  # which says in one line what is wrong
        from diffusers import DiffusionPipeline
        from huggingface_hub import errors

        try:
            return Path(
                DiffusionPipeline.download(
                    self.name,
                    revision=self.revision,
                    variant=self.variant,
                    use_safetensors=True,
                    local_files_only=not _is_reachable(self.name, self.revision),
                )
            )
        except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, ConnectionError, TimeoutError) as error:
            message = f"{self.name} cannot be fetched whole ({first_line(error)})"
            raise UnreachableModel(f"{message}: try again, or name a folder") from error

    def __str__(self) -> str:
        return self.name


def as_source(name: str | Path | ModelSource) -> ModelSource:
    """Return a model that is given by name as a source."""
    return name if isinstance(name, ModelSource) else ModelSource(str(name))


@cache
def fetch_configs(name: str, revision: str | None) -> Path:
    """Return the folder with the configs and tokenizers of a model on the hub, cached or fetched.

    Raises:
        UnreachableModel: It is neither in the cache nor reachable.
        ModelError: There is no such model, or it may not be read.
    """
    from huggingface_hub import errors, snapshot_download

    at = f" at revision {revision}" if revision else ""
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=CONFIG_FILES))
    except errors.GatedRepoError as error:
        raise ModelError(f"{name} is gated: accept its terms on the hub, then log in with hf auth login") from error
    except errors.RepositoryNotFoundError as error:
        message = f"there is no model {name} on the hub, or it is private"
        raise ModelError(f"{message}: correct the id, or log in with hf auth login") from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"{name} has no revision {revision}: name a branch, a tag or a commit of it") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        message = f"{name}{at} is not in the cache and there is no network"
        raise UnreachableModel(f"{message}: connect once, or name a folder") from error
    except (OSError, ValueError, errors.HfHubHTTPError) as error:
        message = f"{name}{at} cannot be fetched ({first_line(error)})"
        raise UnreachableModel(f"{message}: try again, or name a folder") from error
    if not (folder / "model_index.json").exists():
        raise ModelError(f"{name}{at} is no diffusers pipeline, it lacks model_index.json: name another, or a folder")
    return folder


def _is_reachable(name: str, revision: str | None) -> bool:
    """Return whether the hub answers; without asking again, as a download would for half a minute."""
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(name, revision=revision, timeout=10)
    except Exception:  # of whichever library makes its requests: then the cache has to do
        return False
    return True
