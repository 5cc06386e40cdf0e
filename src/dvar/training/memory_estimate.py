"""What a run will take of memory, estimated before its first step, and what it took."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dvar.diffusion.sampling import BATCH

if TYPE_CHECKING:
    from dvar.training.run import TrainingRun

# Numbers that an optimizer keeps for each that it trains, in float32: its moments; Prodigy also a start and a sum.
KEPT = {"adamw": 2.0, "adamw8bit": 0.5, "sam": 1.0, "prodigy": 4.0}


# Kernels that copy what they are given, here its places among the arguments, into a layout of their own, and what they
# make back from it: measured of oneDNN's, exact but for small lone pictures in float32, of which fewer are copied.
COPYING = {torch.ops.aten.convolution.default: (0, 1), torch.ops.aten.convolution_backward.default: (0, 2)}


@dataclass(frozen=True)
class Memory:
    """Bytes on the device: the networks' ``weights`` and the ``optimizer``'s state, which stay; and the most that live
    at once beside them in an ``update``, in an ``evaluation`` of the held batch, and while ``samples`` are drawn.
    """

    weights: int
    optimizer: int
    update: int
    evaluation: int
    samples: int

    @property
    def total(self) -> int:
        """What stays, and the most of the three that come in turn."""
        return self.weights + self.optimizer + max(self.update, self.evaluation, self.samples)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {_told(count)}" for name, count in asdict(self).items())
        return f"about {_told(self.total)} of memory besides PyTorch itself ({parts})"


def needed(job: TrainingRun) -> Memory:
    """Return what ``job`` will take.

    Its own passes run on tensors without numbers, which are of the true device and so meet the same kernels; nothing is
    computed and nothing of the run moves.  An estimate: of the work space inside kernels it has the copies that
    convolutions make alone, and it leaves out what a compiled U-Net spares, and the pictures' encoding.
    """
    config, backbone, parameters = job.config, job.backbone, job.method.parameters
    held = job.drawn(job.examples, "held", 0, 0, config.eval_batch_size)
    batch = job.training_draws(1, 0, config.train_batch_size)
    pictures = min(BATCH, config.num_validation_images)
    passes = pictures * (2 if config.guidance_scale > 1 else 1)
    noisy, ids = batch.noise[:1], batch.input_ids[:1]

    def update() -> Any:
        return torch.autograd.grad(job.weighed(batch).mean(), parameters)

    def samples() -> None:
        backbone.predict(noisy.expand(passes, -1, -1, -1), batch.timesteps[:1].expand(passes), ids.expand(passes, -1))
        with backbone.autocast():
            backbone.vae.decode(noisy.expand(pictures, -1, -1, -1))

    gradients = sum(part.nbytes for part in parameters)
    # What an earlier pass left while another runs: the first gradients, and under SAM the unmoved parameters too.
    beside = gradients * ((config.gradient_accumulation_steps > 1) + 2 * (config.optimizer == "sam"))
    with torch.compiler.set_stance("force_eager"):
        in_update = most_alive(update)
        with torch.no_grad():
            in_evaluation, in_samples = most_alive(lambda: job.losses(held)), most_alive(samples)
    return Memory(
        weights=sum({_place(part): part.untyped_storage().nbytes() for part in _kept(job)}.values()),
        optimizer=round(sum(4 * part.numel() for part in parameters) * KEPT[config.optimizer]),
        update=in_update + beside,
        evaluation=in_evaluation + gradients,
        samples=in_samples + gradients,
    )


def most_alive(run: Callable[[], Any]) -> int:
    """Return the most bytes of tensors made in ``run`` that live at once, told without computing them."""
    with FakeTensorMode(allow_non_fake_inputs=True), _Alive() as alive:
        run()
    return alive.most


def peak(device: torch.device) -> int | None:
    """Return the most bytes that this process has held: of a GPU's tensors, or of the machine's memory; None where the
    system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class _Alive(TorchDispatchMode):
    """Counts the bytes of each new storage that an operation returns until it is let go, and a convolution's copies."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if places := COPYING.get(func):
            made = sum(leaf.nbytes for leaf in tree_leaves(found) if isinstance(leaf, Tensor))
            self.most = max(self.most, self.now + made + max(sum(args[place].nbytes for place in places), made))
        if not any(returned.alias_info for returned in func._schema.returns):  # a view, or a change in place
            for leaf in tree_leaves(found):
                if isinstance(leaf, Tensor):
                    self._take(leaf.untyped_storage())
        return found

    def _take(self, storage: Any) -> None:
        if storage not in self._seen:
            self._seen.add(storage)
            self._move(storage.nbytes())
            weakref.finalize(storage, self._move, -storage.nbytes())

    def _move(self, count: int) -> None:
        self.now += count
        self.most = max(self.most, self.now)


def _kept(job: TrainingRun) -> Iterator[Tensor]:
    for network in job.backbone.modules:
        yield from network.parameters()
        yield from network.buffers()


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _told(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.1f} MiB"
