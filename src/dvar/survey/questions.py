"""The words of a survey, ours: what is asked, how to decide and what the training tasks teach.

Source: Appendix G gives the order of decision: class, shape, colour, details; the prompt first with the object as
"something", then with the object.
"""

from __future__ import annotations

from dataclasses import dataclass

from dvar.survey.survey import Question

SOMETHING = "something"
THE_OBJECT = "the object"


@dataclass(frozen=True)
class QuestionText:
    """How one question is put: its name and sentence, why it is asked, and the steps of deciding."""

    name: str
    asks: str
    task: str
    steps: tuple[tuple[str, str], ...]


WORDING: dict[Question, QuestionText] = {
    "reconstruction": QuestionText(
        name="Likeness",
        asks="Which picture looks more like the reference object?",
        task="The reference pictures all show one object. Two programs have learned it and drawn it. Tell us who drew "
        "it more faithfully. The surroundings do not count.",
        steps=(
            ("Look", "Study the references. What kind of thing is it, and what sets it apart from others of its kind?"),
            ("Presence", "If only one picture shows such an object, choose that one. If neither does, answer equal."),
            ("Kind", "Is one of them more clearly the same kind of thing? Choose it."),
            ("Shape", "If not: is the shape nearer in one of them?"),
            ("Colour", "If not: are the colours nearer in one of them?"),
            ("Details", "If not: are patterns, parts or markings better in one of them? If still not, answer equal."),
        ),
    ),
    "customization": QuestionText(
        name="Description",
        asks="Which picture fits the description better?",
        task="Two programs have learned the object of the reference pictures, and were asked to draw it as the "
        "description says. Tell us who did as asked. The description comes first, the object second.",
        steps=(
            ("Scene", f"Read the description with “{SOMETHING}” in place of the object. Forget the references."),
            ("Choose", "If one picture fits that better, choose it, even if its object is not quite right."),
            ("Object", "If not, look at the references: kind of thing, shape, colours, pattern."),
            ("Both", "Choose the picture that has this object in the described scene. Small details do not matter."),
            ("Equal", "If both have it, or neither has, answer equal."),
        ),
    ),
}

LESSONS = {
    "broken": "One of the two pictures is cut to pieces, so the whole one is better.",
    "same": "Both pictures are the same, so neither is better: equal is a good answer whenever you see no difference.",
    "other": "One of the two shows another object, so the one with the reference object is better.",
}
"""What each kind of training task teaches, said once it was answered."""
