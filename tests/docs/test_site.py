"""The documentation site: it builds without a warning, needs no other host, and its check sees what is broken."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any

import pytest
from docs_build import DOCS, ROOT, load_script

import dvar

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
COPIED = ("zensical.toml", "docs", "examples", "src", "CONTRIBUTING.md", "CHANGELOG.md")


@pytest.fixture(scope="module")
def check_site() -> ModuleType:
    return load_script("check_site")


def copy_project(folder: Path) -> Path:
    """Copy what the site is built from, without the models, and with the pages that programs write."""
    folder.mkdir()
    for name in COPIED:
        source = ROOT / name
        ignored = shutil.ignore_patterns("*.safetensors", "__pycache__", "concepts" if name == "src" else "")
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=ignored)
        else:
            shutil.copy(source, folder)
    for name in ("commands", "notebooks"):
        subprocess.run([sys.executable, str(folder / "docs" / "build" / f"{name}.py")], check=True, capture_output=True)
    return folder


def build(project: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    return subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with its built site."""
    folder = copy_project(tmp_path_factory.mktemp("site") / "project")
    answer = build(folder)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "No issues found" in answer.stdout + answer.stderr
    return folder


@pytest.mark.slow
def test_the_site_is_complete_and_needs_no_other_host(project: Path, check_site: ModuleType) -> None:
    assert check_site.find_problems((project / "site").resolve()) == []
    assert check_site.navigation_problems(project) == []
    assert (project / "site" / "traces.npz").stat().st_size == (DOCS / "traces.npz").stat().st_size


@pytest.mark.slow
def test_the_built_reference_has_every_public_name(project: Path, check_site: ModuleType) -> None:
    text = (project / "site" / "reference" / "index.html").read_text(encoding="utf-8")
    anchors = check_site.Page(text).anchors
    assert {f"dvar.{name}" for name in dvar.__all__ if name != "__version__"} <= anchors
    assert "dvar.Trace.record" in anchors
    assert "Deterministic Variance Evaluation" in text


def write_small_project(folder: Path, text: str) -> Path:
    """Write a site of two pages under the settings of the real one; ``text`` stands on the first."""
    config = (ROOT / "zensical.toml").read_text(encoding="utf-8")
    before, _, after = config.partition("nav = [")
    nav = 'nav = [{ "Home" = "index.md" }, { "Results" = "results.md" }]'
    config = before + nav + after.partition("\n]\n")[2].replace('paths = ["src"]', f"paths = [{str(ROOT / 'src')!r}]")
    (folder / "docs" / "assets").mkdir(parents=True)
    shutil.copy(DOCS / "assets" / "site.css", folder / "docs" / "assets")
    (folder / "zensical.toml").write_text(config, encoding="utf-8")
    (folder / "docs" / "index.md").write_text(f"# Home\n\n{text}\n", encoding="utf-8")
    (folder / "docs" / "results.md").write_text("# Results\n\n## There\n", encoding="utf-8")
    return folder


def is_refused(project: Path, check_site: ModuleType) -> bool:
    return build(project).returncode != 0 or bool(check_site.find_problems((project / "site").resolve()))


@pytest.mark.slow
def test_an_intact_page_passes(tmp_path: Path, check_site: ModuleType) -> None:
    text = "[a page](results.md)\n\n[a heading](results.md#there)\n\n::: dvar.FixedSteps"
    assert not is_refused(write_small_project(tmp_path, text), check_site)


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "[a page](nowhere.md)",
        "[a heading](results.md#nowhere)",
        '--8<-- "examples/nowhere.py"',
        "::: dvar.Nothing",
        "![an image](nowhere.png)",
    ],
)
def test_a_broken_page_fails(tmp_path: Path, check_site: ModuleType, text: str) -> None:
    assert is_refused(write_small_project(tmp_path, text), check_site)


@pytest.fixture
def served(project: Path) -> Iterator[str]:
    """The address of the site on this machine."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(project / "site")))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def page(served: str) -> Iterator[Any]:
    """A page of a browser that may reach the site alone, with every other address that it asks for in `asked`."""
    playwright = pytest.importorskip("playwright.sync_api")
    if BROWSER is None:
        pytest.skip("needs chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        opened = browser.new_page(viewport={"width": 390, "height": 844})
        opened.asked = []
        opened.on("request", lambda request: opened.asked.append(request.url))
        yield opened
        browser.close()


@pytest.mark.slow
def test_in_a_browser_the_site_asks_no_other_host_and_its_search_finds_pages(page: Any, served: str) -> None:
    for name in ("index.html", "reference/index.html", "results.html", "notebooks/demo.html"):
        page.goto(f"{served}/{name}")
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= 390, f"{name} is wider than a phone: {width} px"
    page.goto(f"{served}/index.html", wait_until="networkidle")
    page.keyboard.press("Control+k")
    page.get_by_placeholder("Search").fill("memorising")
    page.locator("a[href*='learned-and-memorising.html?h=memorising']").first.click(timeout=60_000)
    page.wait_for_url("**/concepts/learned-and-memorising.html*")
    assert [url for url in page.asked if not url.startswith((served, "data:", "blob:"))] == []


# --- a small site with one fault in each part: the check must be able to fail ----------------------------------------

CLEAN = """<html><head><link href="style.css"></head><body><h1 id="top">A</h1><a href="#top">up</a>
<a href="b.html#there">b</a><img src="c.png"><a href="https://example.org">elsewhere</a></body></html>"""


def write_small_site(folder: Path, page: str) -> Path:
    (folder / "a.html").write_text(page, encoding="utf-8")
    (folder / "b.html").write_text('<p id="there">b</p>', encoding="utf-8")
    for name in ("style.css", "c.png"):
        (folder / name).touch()
    return folder.resolve()


def test_a_clean_site_has_no_problems(tmp_path: Path, check_site: ModuleType) -> None:
    assert check_site.find_problems(write_small_site(tmp_path, CLEAN)) == []


@pytest.mark.parametrize(
    ("clean", "offence", "problem"),
    [
        ("c.png", "d.png", "d.png is no file of the site"),
        ("b.html#there", "b.html#nowhere", "names no anchor"),
        ("#top", "#bottom", "names no anchor"),
        ('href="style.css"', 'href="https://fonts.example.org/a.css"', "<link href> is fetched from another host"),
        ("<body>", '<body><script src="//cdn.example.org/x.js"></script>', "fetched from another host"),
    ],
)
def test_an_offence_in_a_site_is_found(
    tmp_path: Path, check_site: ModuleType, clean: str, offence: str, problem: str
) -> None:
    assert clean in CLEAN
    problems = check_site.find_problems(write_small_site(tmp_path, CLEAN.replace(clean, offence)))
    assert len(problems) == 1
    assert problem in problems[0]


def test_a_site_without_pages_is_a_problem(tmp_path: Path, check_site: ModuleType) -> None:
    assert check_site.find_problems(tmp_path)


def test_a_gap_in_the_navigation_is_found(tmp_path: Path, check_site: ModuleType) -> None:
    (tmp_path / "docs").mkdir()
    for name in ("index.md", "orphan.md"):
        (tmp_path / "docs" / name).touch()
    nav = 'nav = [{ "Home" = "index.md" }, { "More" = [{ "Lost" = "lost.md" }, { "Again" = "index.md" }] }]'
    (tmp_path / "zensical.toml").write_text(f'[project]\ndocs_dir = "docs"\n{nav}\n', encoding="utf-8")
    assert check_site.navigation_problems(tmp_path) == [
        "zensical.toml names lost.md, which does not exist",
        "zensical.toml names index.md twice",
        "the navigation of zensical.toml lacks orphan.md",
    ]
