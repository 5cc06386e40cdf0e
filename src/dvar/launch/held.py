"""The held samples of a launched script, drawn from its own dataset by its own collate function."""

from __future__ import annotations

import copy
import itertools
import multiprocessing
import random
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import recursively_apply, send_to_device
from torch.utils.data import DataLoader, IterableDataset

from dvar.errors import RefusedInput, first_line
from dvar.stopping.probe import preserve_state

PATIENCE = 600.0
"""Seconds that a worker process may take for one item."""


@dataclass(frozen=True)
class HeldItems:
    """The held samples as the dataloader gives them: batches of one sample each, or whole batches.

    Attributes:
        items: The batches, on the CPU unless the collate function puts them elsewhere.
        device: Where the script expects a batch; None where the dataloader leaves it.
        size: Number of samples in an item.
    """

    items: tuple[Any, ...]
    device: Any
    size: int

    def copy(self, index: int) -> Any:
        """Return a batch as the script may get it, which may be changed in place; ``index`` goes round."""
        item = copy_item(self.items[index % len(self.items)])
        return item if self.device is None else send_to_device(item, self.device)


def copy_item(item: Any) -> Any:
    """Return a batch with copies of its tensors."""
    return recursively_apply(torch.clone, item)


def find_loader(iterable: Any) -> Any:
    """Return the dataloader that a training loop iterates over, also through a progress bar.

    Raises:
        RefusedInput: There is none, or its dataset cannot be asked for a sample.
    """
    loader = iterable
    while not hasattr(loader, "dataset") and hasattr(loader, "iterable"):
        loader = loader.iterable
    if not (hasattr(loader, "dataset") and hasattr(loader, "collate_fn")):
        raise RefusedInput(
            f"held samples are drawn from a dataloader, got a loop over {type(loader).__name__}: "
            "call a StopMonitor in the script instead"
        )
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise RefusedInput(
            f"held samples are drawn by their index, got the iterable dataset {type(dataset).__name__}: "
            "load it without streaming, or call a StopMonitor in the script"
        )
    return loader


def held_problems(loader: Any, count: int | None) -> list[str]:
    """Return what is wrong with a number of held samples that a user gives."""
    size = len(loader.dataset)
    if not size:
        return ["held samples are drawn from the dataset, which has 0 samples: check the path of the images"]
    if count is not None and count > size:
        return [f"dvar_held must be at most the {size} samples of the dataset, got {count}: hold fewer"]
    return []


def draw_held_items(loader: Any, count: int, seed: int, *, whole: bool) -> HeldItems:
    """Draw the held samples of this process, and leave the dataset and all generators as they are.

    They are drawn in a worker process, because a dataset may change itself when it is read; where that is not
    possible, from a copy of the dataset.

    Args:
        loader: The training dataloader.
        count: Number of samples; a dataset with fewer gives each of them.
        seed: Seed of their choice and of their augmentation.
        whole: Whether the batches are those of the dataloader, and not of one sample each.

    Raises:
        RefusedInput: Neither a worker process nor a copy of the dataset can give them.
    """
    chosen = _choose(loader, count, seed, whole)
    try:
        items = _draw_in_worker(loader, chosen, seed)
    except Exception as error:  # whatever the dataset raises; on some systems it must also be pickled
        items = _draw_from_copy(loader, chosen, seed, error)
    size = max(1, len(chosen[0])) if isinstance(chosen[0], list) else 1
    return HeldItems(tuple(items), getattr(loader, "device", None), size)


def _choose(loader: Any, count: int, seed: int, whole: bool) -> list[Any]:
    """Return the first indices that the sampler would give from this seed: lists for batches, else one by one."""
    sampler = loader.batch_sampler
    while hasattr(sampler, "skip_batches"):  # accelerate's, of a script that is resumed within an epoch
        sampler = sampler.batch_sampler
    with preserve_state([], seed):
        if sampler is None:  # each item of the dataset is a batch
            generator = torch.Generator().manual_seed(seed)
            return torch.randperm(len(loader.dataset), generator=generator)[:count].tolist()
        own = copy.deepcopy(sampler, {id(loader.dataset): loader.dataset})
        batches = [list(batch) for batch in itertools.islice(own, count)]
    if whole:
        return batches[: max(1, -(-count // max(len(batches[0]), 1)))]
    indices = list(dict.fromkeys(itertools.chain.from_iterable(batches)))
    return [[index] for index in indices[:count]]


def _draw_in_worker(loader: Any, chosen: Sequence[Any], seed: int) -> list[Any]:
    sampling: dict[str, Any] = (
        {"sampler": chosen, "batch_size": None} if loader.batch_sampler is None else {"batch_sampler": chosen}
    )
    worker = DataLoader(
        loader.dataset,
        collate_fn=loader.collate_fn,
        worker_init_fn=getattr(loader, "worker_init_fn", None),
        num_workers=1,
        prefetch_factor=1,
        timeout=PATIENCE,
        generator=torch.Generator().manual_seed(seed),
        # Forking needs no pickling; it is the default of PyTorch, but no longer that of Python.
        multiprocessing_context=multiprocessing.get_context("fork") if sys.platform == "linux" else None,
        **sampling,
    )
    with warnings.catch_warnings(), preserve_state([]):
        warnings.filterwarnings("ignore", message=".*fork.*")
        # A clone leaves shared memory, of which a container may have little.
        return [copy_item(item) for item in worker]


def _draw_from_copy(loader: Any, chosen: Iterable[Any], seed: int, reason: Exception) -> list[Any]:
    try:
        dataset, collate = copy.deepcopy((loader.dataset, loader.collate_fn))
        with preserve_state([], seed):
            return [
                collate([dataset[index] for index in part] if isinstance(part, list) else dataset[part])
                for part in chosen
            ]
    except Exception as error:
        raise RefusedInput(
            "held samples are drawn in a worker process or from a copy of the dataset, got "
            f"{first_line(reason)!r} there and {first_line(error)!r} here: define the dataset at the top of a module "
            "without open files, or call a StopMonitor in the script"
        ) from reason


def sample_seed(seed: int, sample: int) -> int:
    """Return the seed of everything that is drawn for one held sample."""
    return int(np.random.SeedSequence((seed, sample)).generate_state(1, np.uint32)[0])


def permute(count: int, seed: int, *key: int) -> list[int]:
    """Return a permutation of 0 to ``count`` - 1 that depends on seed and key alone."""
    order = list(range(count))
    random.Random(f"{seed} {key}").shuffle(order)
    return order
