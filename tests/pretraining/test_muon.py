"""Muon: the laws of its update."""

from __future__ import annotations

import pytest
import torch

from pretraining.muon import RMS, Muon, orthogonal


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 72), (1, 72, 8)])
def test_singular_values_come_near_one_and_singular_vectors_stay(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    update = orthogonal(matrices)
    values = torch.linalg.svdvals(update)
    assert values.max() < 1.3
    # A square random matrix has singular values near zero, which five steps do not lift; in between they are lifted.
    assert values.median() > 0.6
    u, _, vt = torch.linalg.svd(matrices, full_matrices=False)
    among = u.mT @ update @ vt.mT
    off_diagonal = among - torch.diag_embed(among.diagonal(dim1=1, dim2=2))
    assert off_diagonal.abs().max() < 0.05


@pytest.mark.parametrize("shape", [(6, 4), (8, 4, 3, 3)])
def test_an_update_is_as_large_as_adamws(shape: tuple[int, ...]) -> None:
    """rank r with unit singular values has a squared norm of r = min(shape); over rows * columns elements, times
    RMS^2 * max(shape), that is RMS^2."""
    parameter = torch.nn.Parameter(torch.zeros(shape))
    parameter.grad = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    Muon([parameter], lr=0.5).step()
    assert parameter.square().mean().sqrt().item() == pytest.approx(0.5 * RMS, rel=0.25)


def test_matrices_of_one_shape_do_not_mix() -> None:
    """Two that go through together move as each does alone."""

    def moved(numbers: list[int]) -> list[torch.Tensor]:
        parameters = [torch.nn.Parameter(torch.zeros(4, 6)) for _ in numbers]
        for parameter, number in zip(parameters, numbers, strict=True):
            parameter.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(number))
        Muon(parameters, lr=0.1).step()
        return [parameter.detach() for parameter in parameters]

    first, second = moved([1, 2])
    assert torch.allclose(first, moved([1])[0], atol=1e-3)
    assert torch.allclose(second, moved([2])[0], atol=1e-3)
    assert not torch.allclose(first, second, atol=1e-2)


def test_what_has_no_gradient_stays() -> None:
    still = torch.nn.Parameter(torch.ones(3, 3))
    Muon([still], lr=0.1).step()
    assert torch.equal(still, torch.ones(3, 3))
