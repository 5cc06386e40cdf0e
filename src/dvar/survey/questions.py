"""The words that raters read: the questions, how to decide, and what each training task teaches."""

from __future__ import annotations

from dataclasses import dataclass

from dvar.survey.survey import Question

SOMETHING = "something"
THE_OBJECT = "the object"


@dataclass(frozen=True)
class QuestionText:
    """The text of one question.

    Args:
        name: Name of the question.
        sentence: The question itself.
        purpose: What the images are, and what the rater is to judge.
        steps: Name and instruction of each step of the decision.

    Source: Appendix G gives the order of decision: class, shape, colour, details; the prompt first with the object as
        "something", then with the object. The wording is ours.
    """

    name: str
    sentence: str
    purpose: str
    steps: tuple[tuple[str, str], ...]


QUESTION_TEXTS: dict[Question, QuestionText] = {
    "reconstruction": QuestionText(
        name="Likeness",
        sentence="Which image looks more like the reference object?",
        purpose="The reference images all show the same object. Two programs have learned it, and each has generated "
        "an image of it. Tell us which image is more faithful. The surroundings do not count.",
        steps=(
            (
                "Look",
                "Study the references. What kind of thing is it, and what makes it different from similar things?",
            ),
            ("Presence", "If only one image shows such an object, choose that one. If neither does, answer equal."),
            ("Kind", "Is the object in one image more clearly the same kind of thing? Choose that image."),
            ("Shape", "If not, is the shape closer in one image?"),
            ("Colour", "If not, are the colours closer in one image?"),
            ("Details", "If not, are patterns, parts or markings closer in one image? If still not, answer equal."),
        ),
    ),
    "customization": QuestionText(
        name="Description",
        sentence="Which image fits the description better?",
        purpose="Two programs have learned the object in the reference images. Each was asked for an image that "
        "matches a description. Tell us which image does so better. The description comes first, the object second.",
        steps=(
            (
                "Scene",
                f"Read the description with “{SOMETHING}” in place of the object. Ignore the references for now.",
            ),
            ("Choose", "If one image fits that description better, choose it, even if its object is not quite right."),
            ("Object", "If not, look at the references: kind of thing, shape, colours, pattern."),
            ("Both", "Choose the image that shows this object in the described scene. Small details do not matter."),
            ("Equal", "If both images do, or neither does, answer equal."),
        ),
    ),
}

# What each kind of training task teaches; shown once it has been answered.
LESSONS = {
    "broken": "One of the two images is scrambled, so the intact one is better.",
    "same": "Both images are the same, so neither is better. Answer equal whenever you see no difference.",
    "other": "One of the two images shows a different object, so the one with the reference object is better.",
}
