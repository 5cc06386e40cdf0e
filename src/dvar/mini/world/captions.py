"""What a caption says of a picture: some of what is there, so that every word comes to mean one thing.

A caption mentions a random part of a picture's facts.  Two captions of one batch may both be true of one picture;
`facts` and `mentions` say so in numbers.
"""

from __future__ import annotations

import numpy as np

from dvar.mini.world.classes import CLASSES
from dvar.mini.world.places import PLACES
from dvar.mini.world.scene import COLOURS, PATTERNS, Scene, Subject
from dvar.mini.world.styles import STYLES

FACTS = ("class", "main colour", "pattern", "second colour", "place", "style", "size")
SIZES = ("small", "medium", "large")
_STYLE_WORDS = {
    "black and white": ("a black and white photo of {}", "a black and white picture of {}"),
    "sketch": ("a sketch of {}", "a pencil drawing of {}"),
    "pixel art": ("pixel art of {}", "a pixel art picture of {}"),
    "painting": ("a painting of {}", "an oil painting of {}"),
}
_PLAIN_WORDS = (
    "a photo of {}",
    "a picture of {}",
    "an image of {}",
    "a good photo of {}",
    "a rendering of {}",
    "a close-up photo of {}",
)
_PATTERN_NOUNS = {"striped": "stripes", "dotted": "dots", "checked": "checks"}


def size_of(scene: Scene) -> int:
    """Index into `SIZES`: the smallest and the largest quarter of scales have a word, the rest have none."""
    return 0 if scene.scale < 0.29 else 2 if scene.scale > 0.35 else 1


def facts(subject: Subject, scene: Scene) -> np.ndarray:
    """int16 [7], in the order of `FACTS`: what is true of the picture.  A plain subject's second colour is -2, true
    of no caption."""
    colours = list(COLOURS)
    second = -2 if subject.pattern == "plain" else colours.index(subject.colours[1])
    return np.array(
        [
            list(CLASSES).index(subject.noun),
            colours.index(subject.colours[0]),
            PATTERNS.index(subject.pattern),
            second,
            list(PLACES).index(scene.place),
            list(STYLES).index(scene.style),
            size_of(scene),
        ],
        dtype=np.int16,
    )


def caption(truth: np.ndarray, rng: np.random.Generator) -> tuple[str, np.ndarray]:
    """A caption of a picture with these `facts`, and what it mentions: int16 [7], -1 where it is silent."""
    noun, main, pattern, second, place, style, size = (int(value) for value in truth)
    mentioned = np.full(len(FACTS), -1, dtype=np.int16)
    names = list(COLOURS)

    def mention(*indices: int) -> None:
        mentioned[list(indices)] = truth[list(indices)]

    if rng.uniform() < 0.04:
        mention(4)
        return f"{_pick(rng, ('a photo', 'a picture'))} {list(PLACES.values())[place].words}", mentioned
    words = [list(CLASSES)[noun]]
    mention(0)
    tail = ""
    if rng.uniform() < 0.55 and PATTERNS[pattern] != "plain":
        mention(2)
        if rng.uniform() < 0.6:
            mention(3)
            tail = f" with {names[second]} {_PATTERN_NOUNS[PATTERNS[pattern]]}"
        else:
            words.insert(0, PATTERNS[pattern])
    elif rng.uniform() < 0.25 and PATTERNS[pattern] == "plain":
        mention(2)
        words.insert(0, "plain")
    # Colours cannot be told from a black and white picture or a sketch, so its captions leave them out.
    grey = list(STYLES)[style] in ("black and white", "sketch")
    if grey and mentioned[3] != -1:
        mentioned[3] = -1
        tail = f" with {_PATTERN_NOUNS[PATTERNS[pattern]]}"
    if not grey and rng.uniform() < 0.6:
        mention(1)
        words.insert(0, names[main])
    if SIZES[size] != "medium" and rng.uniform() < 0.3:
        mention(6)
        words.insert(0, SIZES[size])
    article = _pick(rng, ("the", "my", "one", "article", "article", "article", "article"))
    if article == "article":
        article = "an" if words[0][0] in "aeiou" else "a"
    text = f"{article} {' '.join(words)}{tail}"
    if rng.uniform() < 0.6:
        mention(4)
        text = f"{text} {list(PLACES.values())[place].words}"
    style_name = list(STYLES)[style]
    if style_name != "photo" and rng.uniform() < 0.85:
        mention(5)
        return _pick(rng, _STYLE_WORDS[style_name]).format(text), mentioned
    return (_pick(rng, _PLAIN_WORDS).format(text) if style_name == "photo" and rng.uniform() < 0.7 else text), mentioned


def agrees(mentioned: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """bool [captions, pictures]: whether all that a caption mentions ([captions, 7]) is true of a picture
    ([pictures, 7])."""
    said, true = mentioned[:, None, :], truth[None, :, :]
    return ((said == -1) | (said == true)).all(axis=-1)


def _pick(rng: np.random.Generator, choices: tuple[str, ...]) -> str:
    return choices[int(rng.integers(len(choices)))]
