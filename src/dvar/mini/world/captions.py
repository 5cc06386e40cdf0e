"""Captions of the bundled world's images, and the facts that they mention."""

# A caption mentions a random part of an image's facts, so that every word comes to mean one thing.  Two captions of one
# batch may both be true of one image; `facts` and what a caption mentions say so in numbers.

from __future__ import annotations

import numpy as np

from dvar.mini.world.classes import CLASSES, WORDS
from dvar.mini.world.places import PLACES
from dvar.mini.world.scene import COLOURS, PATTERNS, Scene, Subject
from dvar.mini.world.styles import STYLES

FACTS = (
    *("class", "main colour", "pattern", "second colour", "accent colour", "pattern size"),
    *("shape 0", "shape 1", "shape 2", "shape 3", "shape 4", "shape 5"),
    *("place", "style", "size"),
)
SUBJECT = FACTS.index("place")
"""Number of facts, the first ones, that are about the subject itself."""
SIZES = ("small", "medium", "large")
PATTERN_SIZES = ("fine", "medium", "bold")
THIRDS = (1 / 3, 2 / 3)
"""Where a parameter in [0, 1] begins to be called medium, and large."""
UNSAYABLE = -2
"""A fact that no caption can be true of: a plain subject's second colour, a shape parameter without words."""
ANSWERS = {
    "class": len(CLASSES),
    **dict.fromkeys(("main colour", "second colour", "accent colour"), len(COLOURS)),
    "pattern": len(PATTERNS),
    "place": len(PLACES),
    "style": len(STYLES),
    **dict.fromkeys(("size", "pattern size", *FACTS[6:SUBJECT]), 3),
}
"""Number of answers that each fact has."""
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
    """Return the index into `SIZES`: the smallest and the largest quarter of scales are small and large."""
    return 0 if scene.scale < 0.29 else 2 if scene.scale > 0.35 else 1


def facts(subject: Subject, scene: Scene) -> np.ndarray:
    """Return what is true of an image, int16 [15] in the order of `FACTS`; `UNSAYABLE` where there are no words."""
    colours = list(COLOURS)
    plain = subject.pattern == "plain"
    has_words = [proportion is not None for proportion in WORDS[subject.noun].shape]
    return np.array(
        [
            list(CLASSES).index(subject.noun),
            colours.index(subject.colours[0]),
            PATTERNS.index(subject.pattern),
            UNSAYABLE if plain else colours.index(subject.colours[1]),
            colours.index(subject.colours[2]),
            UNSAYABLE if plain else np.digitize(subject.pattern_scale, THIRDS),
            *np.where(has_words, np.digitize(subject.shape, THIRDS), UNSAYABLE),
            list(PLACES).index(scene.place),
            list(STYLES).index(scene.style),
            size_of(scene),
        ],
        dtype=np.int16,
    )


def caption(truth: np.ndarray, rng: np.random.Generator) -> tuple[str, np.ndarray]:
    """Return a random caption of an image with these `facts`, and what it mentions: int16 [15], -1 where nothing."""
    fact = dict(zip(FACTS, (int(value) for value in truth), strict=True))
    noun, pattern = list(CLASSES)[fact["class"]], PATTERNS[fact["pattern"]]
    place, style = list(PLACES.values())[fact["place"]].words, list(STYLES)[fact["style"]]
    names = list(COLOURS)
    mentioned = np.full(len(FACTS), -1, dtype=np.int16)

    def mention(name: str) -> str:
        mentioned[FACTS.index(name)] = fact[name]
        return name

    if rng.uniform() < 0.04:
        mention("place")
        return f"{_pick(rng, ('a photo', 'a picture'))} {place}", mentioned
    # Colours cannot be seen in a black and white image or a sketch, so its captions leave them out.
    grey = style in ("black and white", "sketch")
    words = [noun]
    parts: list[str] = []
    mention("class")
    if rng.uniform() < (0.25 if pattern == "plain" else 0.55):
        mention("pattern")
        if pattern == "plain" or rng.uniform() < 0.4:
            words.insert(0, pattern)
        else:
            marks = [_PATTERN_NOUNS[pattern]]
            if not grey:
                marks.insert(0, names[fact[mention("second colour")]])
            if fact["pattern size"] != 1 and rng.uniform() < 0.4:
                marks.insert(0, PATTERN_SIZES[fact[mention("pattern size")]])
            parts.append(" ".join(marks))
    main = names[fact[mention("main colour")]] if not grey and rng.uniform() < 0.6 else ""
    accent = names[fact[mention("accent colour")]] if not grey and rng.uniform() < 0.5 else ""
    before = main and accent and rng.uniform() < 0.5  # the noun, so that one word in their place can mean all of it
    if before:
        words.insert(0, f"{main} and {accent}")
    else:
        words[:0] = [main] if main else []
        parts += [with_article(f"{accent} {WORDS[noun].accent}")] if accent else []
    extremes = [i for i in rng.permutation(6) if fact[f"shape {i}"] in (0, 2)]
    room = 3 - len(parts) - bool(before)
    for i in extremes[: min(rng.binomial(3, 0.35), room)]:
        proportion = WORDS[noun].shape[i]
        word = proportion.low if fact[mention(f"shape {i}")] == 0 else proportion.high
        if proportion.part:
            parts.append(with_article(f"{word} {proportion.part}"))
        else:
            words.insert(0, word)
    if fact["size"] != 1 and rng.uniform() < 0.3:
        words.insert(0, SIZES[fact[mention("size")]])
    article = _pick(rng, ("the", "my", "one", "", "", "", ""))
    text = f"{article} {' '.join(words)}" if article else with_article(" ".join(words))
    if parts:
        text = f"{text} with {' and '.join(parts[i] for i in rng.permutation(len(parts)))}"
    if rng.uniform() < 0.6:
        mention("place")
        text = f"{text} {place}"
    if style != "photo" and rng.uniform() < 0.85:
        mention("style")
        return _pick(rng, _STYLE_WORDS[style]).format(text), mentioned
    return (_pick(rng, _PLAIN_WORDS).format(text) if style == "photo" and rng.uniform() < 0.7 else text), mentioned


def agrees(mentioned: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return whether everything that a caption mentions is true of an image, bool [captions, images].

    Args:
        mentioned: As from `caption`, [captions, 15].
        truth: As from `facts`, [images, 15].
    """
    claims, true = mentioned[:, None, :], truth[None, :, :]
    agreement: np.ndarray = ((claims == -1) | (claims == true)).all(axis=-1)
    return agreement


def with_article(words: str) -> str:
    """Return the words after "a" or "an"; several parts, such as long legs, take none."""
    if words.endswith(("s", "feet")):
        return words
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _pick(rng: np.random.Generator, choices: tuple[str, ...]) -> str:
    return choices[int(rng.integers(len(choices)))]
