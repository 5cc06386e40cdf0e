"""A check of the built site: ``python docs/build/check_site.py`` fails at a broken link or a page that needs a host."""

# The generator checks links between pages. This reads what it wrote: images, anchors and files too, and whatever a
# browser would fetch from another host.

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).parents[2]
FETCHED = {
    ("link", "href"),
    ("script", "src"),
    ("img", "src"),
    ("source", "src"),
    ("iframe", "src"),
    ("object", "data"),
}
"""Attributes whose address a browser loads by itself; that of any other link only when somebody follows it."""
SKIPPED = ("data:", "mailto:", "javascript:")


class Page(HTMLParser):
    """The addresses and anchors of one page.

    Attributes:
        links: Tag, attribute and address of each link.
        anchors: The names that a link can jump to.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[tuple[str, str, str]] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" or (tag == "a" and name == "name"):
                self.anchors.add(value or "")
            elif name in ("href", "src", "data") and value:
                self.links.append((tag, name, value))


def find_problems(site: Path) -> list[str]:
    """Return what is wrong with a built site, a line each."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    problems = [] if pages else [f"{site} has no page: build it first"]
    for path, page in pages.items():
        if path.name == "404.html":  # served for any address, so its links begin at the root of the site
            continue
        problems += [f"{path.relative_to(site)}: {problem}" for problem in _page_problems(path, page, pages)]
    return problems


def _page_problems(path: Path, page: Page, pages: dict[Path, Page]) -> Iterator[str]:
    for tag, attribute, address in page.links:
        if address.startswith(SKIPPED):
            continue
        parts = urlsplit(address)
        if parts.scheme or parts.netloc:
            if (tag, attribute) in FETCHED:
                yield f"<{tag} {attribute}> is fetched from another host: {address}"
            continue
        target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
        if not target.is_file():
            yield f"{address} is no file of the site"
        elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
            yield f"{address} names no anchor"


def list_pages(navigation: Any) -> Iterator[str]:
    """Yield the pages of a navigation of ``zensical.toml``, in its order."""
    if isinstance(navigation, str):
        yield navigation
    else:
        for item in navigation.values() if isinstance(navigation, dict) else navigation:
            yield from list_pages(item)


def navigation_problems(root: Path = ROOT) -> list[str]:
    """Return the pages that the navigation names and that do not exist, and those that it does not name."""
    config = tomllib.loads((root / "zensical.toml").read_text(encoding="utf-8"))["project"]
    docs = root / config["docs_dir"]
    named = list(list_pages(config["nav"]))
    there = {path.relative_to(docs).as_posix() for path in docs.rglob("*.md")}
    problems = [f"zensical.toml names {page}, which does not exist" for page in named if page not in there]
    problems += [
        f"zensical.toml names {page} twice" for page in sorted({page for page in named if named.count(page) > 1})
    ]
    return problems + [f"the navigation of zensical.toml lacks {page}" for page in sorted(there - {*named})]


def main() -> int:
    """Print every problem of ``site/`` and of the navigation, and return the exit status."""
    problems = navigation_problems() + find_problems((ROOT / "site").resolve())
    print("\n".join(problems) or "the site is complete, and nothing in it is fetched from another host")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
