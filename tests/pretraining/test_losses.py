"""The losses that train the CLIPs, against cases worked by hand."""

from __future__ import annotations

import math

import torch

from dvar.mini.world.captions import SUBJECT
from pretraining.clip import SPLITS, contrastive_loss, patch_loss, reading_loss


def test_facts_without_a_target_cost_nothing() -> None:
    logits = torch.zeros(2, sum(SPLITS))
    truth = torch.full((2, len(SPLITS)), -1)
    truth[0, 0] = 3
    # One fact asked of fifteen, from flat logits: ln 25 over fifteen facts.
    assert math.isclose(float(reading_loss(logits, truth)), math.log(SPLITS[0]) / len(SPLITS), rel_tol=1e-5)


def test_true_pairs_off_the_diagonal_are_no_negatives() -> None:
    similarity = torch.zeros(3, 3)
    agreement = torch.eye(3, dtype=torch.bool)
    assert math.isclose(float(contrastive_loss(similarity, agreement)), math.log(3), rel_tol=1e-5)
    agreement[0, 1] = True  # caption 0 is true of image 1: row 0 and column 1 have two candidates left
    expected = (math.log(2) + 2 * math.log(3)) / 3
    assert math.isclose(float(contrastive_loss(similarity, agreement)), expected, rel_tol=1e-5)


def test_patches_count_by_how_much_of_the_subject_they_show() -> None:
    truth = torch.full((1, SUBJECT), -2)
    truth[0, :3] = torch.tensor([1, 0, 2])  # the other facts are not asked for
    coverage = torch.tensor([[0.0, 1.0]])
    logits = torch.zeros(1, 2, sum(SPLITS[:SUBJECT]) + 1)
    flat = (math.log(2) + sum(math.log(n) for n in SPLITS[:3])) / (SUBJECT + 1)
    assert math.isclose(float(patch_loss(logits, truth, coverage)), flat, rel_tol=1e-5)
    elsewhere = logits.clone()
    elsewhere[0, 0, 5] = 9.0  # a patch without the subject may say what it likes of it
    assert math.isclose(float(patch_loss(elsewhere, truth, coverage)), flat, rel_tol=1e-5)
    right = logits.clone()
    right[0, 1, 1] = 9.0
    assert float(patch_loss(right, truth, coverage)) < flat - 0.2
