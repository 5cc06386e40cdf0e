"""Templates of the HTML pages: escaping, missing names, and words."""

from __future__ import annotations

from pathlib import Path

import pytest
from jinja2 import UndefinedError
from markupsafe import Markup

from dvar.errors import RefusedInput
from dvar.html.templates import load_environment, pluralise, read_stylesheet, render, sentence_case, typeset, write_page


def test_text_in_a_template_is_escaped_and_markup_is_not() -> None:
    template = load_environment("dvar.runs").from_string("{{ text }} {{ markup }} {{ L_det }}")
    page = template.render(text="<b>", markup=Markup("<b>"))
    assert page == "&lt;b&gt; <b> <i>L</i><sub>det</sub>"


def test_a_name_that_a_template_needs_and_does_not_get_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="'title' is undefined"):
        render("dvar.runs", "replay.html")


def test_l_det_flags_and_percentages_are_typeset() -> None:
    assert typeset("L_det < 15 %") == "<i>L</i><sub>det</sub> &lt; 15\u00a0%"
    assert typeset("raise --max_train_steps") == "raise <code>--max_train_steps</code>"
    assert typeset(Markup("<b>L_det</b>")) == "<b><i>L</i><sub>det</sub></b>"


def test_words_of_a_page() -> None:
    assert (pluralise(1, "step"), pluralise(0, "step"), pluralise(4, "step")) == ("1 step", "0 steps", "4 steps")
    assert (sentence_case("a U-Net"), sentence_case("")) == ("A U-Net", "")


def test_the_stylesheet_loads_nothing() -> None:
    assert not any(word in read_stylesheet() for word in ("@import", "url(", "http"))


def test_a_page_is_written_completely_or_refused(tmp_path: Path) -> None:
    path = write_page(tmp_path / "page.html", "é\n")
    assert path.read_bytes() == "é\n".encode()
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(RefusedInput, match=r"missing.*choose another place"):
        write_page(tmp_path / "missing" / "page.html", "")
