"""The optimizers: their updates, their state in a checkpoint, and SAM computed by hand."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from dvar.config.methods import TextualInversionConfig
from dvar.training.loop import Learner
from dvar.training.optimizers import load_state, make_optimizer, perturb, read_state

PACKAGES = {"adamw": "torch", "sam": "torch", "prodigy": "prodigyopt", "adamw8bit": "bitsandbytes"}
INSTALLED = [name for name, package in PACKAGES.items() if importlib.util.find_spec(package)]


def build_config(name: str, **settings: Any) -> TextualInversionConfig:
    rate = 1.0 if name == "prodigy" else 0.05
    return TextualInversionConfig(**{"optimizer": name, "learning_rate": rate, **settings})


def create_parameters() -> list[nn.Parameter]:
    """Two that are large enough for states of 8 bits, which share their tables, a small one, and one that is zero."""
    random = torch.Generator().manual_seed(0)
    return [
        nn.Parameter(torch.randn(4, 2048, generator=random)),
        nn.Parameter(torch.randn(2, 4096, generator=random)),
        nn.Parameter(torch.randn(3, generator=random)),
        nn.Parameter(torch.zeros(5)),
    ]


def update_weights(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    for weight in weights:
        weight.grad = weight.detach() - 1 + 0.1 * torch.randn(weight.shape, generator=random)
    optimizer.step()


@pytest.mark.parametrize("name", INSTALLED)
@pytest.mark.parametrize("interruption", [0, 1, 4])
def test_a_restored_optimizer_continues_bit_for_bit(name: str, interruption: int) -> None:
    reference, resumed = create_parameters(), create_parameters()
    optimizer = make_optimizer(build_config(name), reference)
    for step in range(8):
        update_weights(optimizer, reference, step)
    saved_optimizer = make_optimizer(build_config(name), resumed)
    for step in range(interruption):
        update_weights(saved_optimizer, resumed, step)
    tensors, facts = read_state(saved_optimizer)
    assert bool(tensors) == (interruption > 0)
    tensors, facts = load(save(tensors)), json.loads(json.dumps(facts, allow_nan=False))  # as a checkpoint keeps them
    resumed_optimizer = make_optimizer(build_config(name), resumed)
    load_state(resumed_optimizer, tensors, facts)
    for step in range(interruption, 8):
        update_weights(resumed_optimizer, resumed, step)
    for expected, actual in zip(reference, resumed, strict=True):
        assert torch.equal(expected, actual)
    assert not torch.equal(reference[0], create_parameters()[0])
    expected_state, state = read_state(optimizer), read_state(resumed_optimizer)
    assert expected_state[1] == state[1]
    assert expected_state[0].keys() == state[0].keys()
    for path, tensor in expected_state[0].items():
        assert tensor.dtype == state[0][path].dtype
        assert torch.equal(tensor, state[0][path])


@pytest.mark.parametrize("name", INSTALLED)
def test_an_optimizer_approaches_the_minimum_and_prints_nothing(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    parts = create_parameters()
    before = float((parts[0].detach() - 1).square().mean())
    optimizer = make_optimizer(build_config(name), parts)
    for number in range(150):
        update_weights(optimizer, parts, number)
    assert float((parts[0].detach() - 1).square().mean()) < 0.8 * before
    assert capsys.readouterr() == ("", "")


def test_adamw_receives_its_settings() -> None:
    settings = {"adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-3, "adam_weight_decay": 0.5}
    expected = {"lr": 0.05, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.5}
    for name in {"adamw", "prodigy"} & {*INSTALLED}:
        group = make_optimizer(build_config(name, **settings, learning_rate=0.05), create_parameters()).param_groups[0]
        assert {key: group[key] for key in expected} == expected


# SAM


class Bowl:
    """A method of two numbers."""

    def __init__(self, *values: float) -> None:
        self.rows = nn.Parameter(torch.tensor(values))

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [self.rows]

    @property
    def state(self) -> dict[str, Tensor]:
        return {"rows": self.rows.detach().clone()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            self.rows.copy_(state["rows"])


def bowl_losses(method: Bowl) -> Any:
    """The loss w1^2 / 2 + 2 w2^2 in two halves, one of each sample of a step; its gradient is (w1, 4 w2)."""
    return lambda step, first, count: torch.stack(
        [(method.rows[0].square(), 4 * method.rows[1].square())[index % 2] for index in range(first, first + count)]
    )


@pytest.mark.parametrize(("batch", "parts"), [(2, 1), (1, 2)])
def test_sam_steps_by_the_gradient_at_the_perturbed_weights(batch: int, parts: int) -> None:
    method = Bowl(3.0, 1.0)
    settings = build_config(
        "sam", learning_rate=0.1, sam_rho=0.5, train_batch_size=batch, gradient_accumulation_steps=parts
    )
    learner = Learner(method, settings, {})
    update = learner.update(bowl_losses(method), 1)
    # At (3, 1) the gradient is (3, 4) of norm 5, so SAM looks at (3, 1) + 0.5 (3, 4) / 5 = (3.3, 1.4), where the
    # gradient is (3.3, 5.6); a step of 0.1 from (3, 1) ends at (2.67, 0.44).  The plain one would end at (2.7, 0.6).
    torch.testing.assert_close(method.rows.detach(), torch.tensor([2.67, 0.44]))
    assert update.train_loss == pytest.approx(9 / 2 + 2)
    assert update.grad_norm == pytest.approx((3.3**2 + 5.6**2) ** 0.5)
    learner.update(bowl_losses(method), 2)
    # There the gradient is (2.67, 1.76), of norm 3.19789, and at (2.67, 0.44) + 0.5 (2.67, 1.76) / 3.19789 it is
    # (3.08746, 2.86073); momentum adds 0.9 of the first: (6.05746, 7.90073), and a tenth of it is the step.
    torch.testing.assert_close(method.rows.detach(), torch.tensor([2.064254, -0.350073]), rtol=1e-5, atol=1e-5)


def test_a_perturbation_follows_the_gradient_direction_and_is_undone() -> None:
    part = nn.Parameter(torch.tensor([1e8, 1.0, 0.3]))  # an addition and a subtraction would not give 1.0 back
    still = nn.Parameter(torch.ones(2))
    before = part.detach().clone()
    for scale in (1.0, 65536.0):
        part.grad = torch.tensor([4.0, 0.0, 3.0]) * scale
        with perturb([part, still], 0.05):
            torch.testing.assert_close(part.detach()[1:], torch.tensor([1.0, 0.3 + 0.05 * 3 / 5]))
            assert torch.equal(still, torch.ones(2))
        assert torch.equal(part, before)
    with pytest.raises(RuntimeError), perturb([part], 0.05):
        raise RuntimeError
    assert torch.equal(part, before)


def test_sam_does_not_perturb_without_a_gradient() -> None:
    part = nn.Parameter(torch.ones(2))
    part.grad = torch.zeros(2)
    with perturb([part], 0.05):
        assert torch.equal(part, torch.ones(2))
