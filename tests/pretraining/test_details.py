"""Accents, proportions and CMMD: what they read on images whose truth is known."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from dvar.mini.world.classes import CLASSES, WORDS
from dvar.mini.world.scene import COLOURS, sample_subject
from pretraining.details import (
    ACCENT,
    FIRST_SHAPE,
    accent_prompts,
    cmmd,
    nearest_colours,
    proportion_prompts,
    rise,
)


def test_the_middle_of_a_named_colour_is_read_as_it() -> None:
    middles = torch.tensor([colorsys.hsv_to_rgb(*middle) for middle, _ in COLOURS.values()])
    assert nearest_colours(middles).tolist() == list(range(len(COLOURS)))


def test_most_accents_of_subjects_are_read_from_their_parameters() -> None:
    rng = np.random.default_rng(0)
    subjects = [sample_subject(rng) for _ in range(300)]
    accents = torch.tensor(np.stack([subject.vector()[ACCENT] for subject in subjects]))
    named = torch.tensor([list(COLOURS).index(subject.colours[2]) for subject in subjects])
    assert (nearest_colours(accents) == named).float().mean() > 0.9


def test_the_shape_of_a_subject_is_where_proportions_are_read() -> None:
    subject = sample_subject(np.random.default_rng(1))
    assert tuple(subject.vector()[FIRST_SHAPE:]) == subject.shape


def test_prompts_name_what_they_ask_for() -> None:
    texts, nouns, accents = accent_prompts(50, 3)
    for text, noun, accent in zip(texts, nouns, accents, strict=True):
        name = list(CLASSES)[noun]
        assert f"{list(COLOURS)[accent]} {WORDS[name].accent}" in text
        assert f" {name} with " in text
    low, high, nouns, numbers = proportion_prompts(50, 3)
    for few, many, noun, number in zip(low, high, nouns, numbers, strict=True):
        proportion = WORDS[list(CLASSES)[noun]].shape[number]
        assert proportion is not None
        assert (proportion.low in few, proportion.high in many) == (True, True)
        assert few != many


def test_a_rise_counts_the_asked_parameter_alone() -> None:
    low, high = torch.zeros(4, 16), torch.full((4, 16), -1.0)
    numbers = torch.tensor([0, 1, 2, 5])
    high[[0, 1, 2], FIRST_SHAPE + numbers[:3]] = torch.tensor([0.2, 0.4, 0.6])
    assert list(rise(low, high, numbers).values()) == pytest.approx([75.0, 5.0])


def test_cmmd_is_zero_for_the_same_images_and_grows_with_the_distance() -> None:
    generator = torch.Generator().manual_seed(0)
    a = normalize(torch.randn(200, 8, generator=generator), dim=1)
    near, far = (normalize(a + torch.tensor([shift] + [0.0] * 7), dim=1) for shift in (0.2, 1.0))
    assert cmmd(a, a) == pytest.approx(0, abs=1e-9)
    assert 0 < cmmd(a, near) < cmmd(a, far)


def test_cmmd_of_two_single_images() -> None:
    """Orthogonal unit vectors are sqrt(2) apart: 2 (1 - exp(-2 / 200)) 1,000."""
    assert cmmd(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])) == pytest.approx(19.9003, abs=1e-3)
