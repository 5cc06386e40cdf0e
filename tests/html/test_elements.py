from __future__ import annotations

from html.parser import HTMLParser

from hypothesis import given, settings
from hypothesis import strategies as st

from dvar.html.elements import Html, element, join

# a parser turns carriage returns and NUL into something else, as the standard asks
text = st.text(st.characters(exclude_characters="\r\0", exclude_categories=["Cs"]))


class _Read(HTMLParser):
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


@settings(deadline=None)
@given(said=text, title=text)
def test_text_and_attributes_come_back_as_they_were_and_never_become_markup(said: str, title: str) -> None:
    read = _Read(element("p", said, title=title))
    assert (read.tags, read.text, read.titles) == (["p"], said, [title])


def test_markup_inside_markup_is_not_escaped_again() -> None:
    assert element("p", element("b", "a < b"), " & ", None) == "<p><b>a &lt; b</b> &amp; </p>"


def test_joining_escapes_text_only() -> None:
    assert join(["<", Html("<br>"), None]) == "&lt;<br>"


def test_attributes_are_named_as_html_names_them() -> None:
    shown = element("img", src="x", class_="a", aria_label="it's", hidden=True, open=False, width=None)
    assert shown == '<img src="x" class="a" aria-label="it&#x27;s" hidden>'
