"""SVG elements and their escaping."""

from __future__ import annotations

from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup

from dvar.html.svg_elements import element, join

# a parser turns carriage returns and NUL into something else, as the standard asks
text = st.text(st.characters(exclude_characters="\r\0", exclude_categories=["Cs"]))


class _Parser(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.titles: list[str | None] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.titles += [value for name, value in attrs if name == "title"]

    def handle_data(self, data: str) -> None:
        self.text += data


@given(content=text, title=text)
def test_text_and_attributes_come_back_as_they_were_and_never_become_markup(content: str, title: str) -> None:
    parser = _Parser(element("text", content, title=title))
    assert (parser.tags, parser.text, parser.titles) == (["text"], content, [title])


def test_markup_inside_markup_is_not_escaped_again() -> None:
    assert element("g", element("text", "a < b"), " & ", None) == "<g><text>a &lt; b</text> &amp; </g>"


def test_joining_escapes_text_only() -> None:
    assert join(["<", Markup("<g>"), None]) == "&lt;<g>"


def test_attributes_are_named_as_svg_names_them() -> None:
    line = element("line", x1=0, class_="a", stroke_width=2, aria_label="it's", width=None)
    assert line == '<line x1="0" class="a" stroke-width="2" aria-label="it&#39;s"></line>'
