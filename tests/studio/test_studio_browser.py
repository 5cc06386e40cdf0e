"""The studio in a real browser: from dropped images to a downloaded file, on a desktop and on a phone."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fake_run import generate_trace, write_run

from dvar import mini
from dvar.studio.draft import Draft
from dvar.studio.library import find_run
from dvar.training.run_layout import SAVE_REQUEST, checkpoint_paths

pytest.importorskip("gradio", reason="needs the extra: pip install 'dvar[studio]'")

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed on this machine"),
]
TIMEOUT = 300.0
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
PAGES = {"": "Runs", "new": "New run", "compare": "Compare", "replay": "Replay a log"}


@contextmanager
def serve_studio(root: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Serve the studio of a folder in a process of its own; yield the process and its address."""
    words = [sys.executable, "-m", "dvar", "studio", str(root), "--port", "0", *flags]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env={**os.environ})
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        match = re.match(r"studio    (http://127\.0\.0\.1:\d+/)$", line)
        assert match, line
        yield process, match[1]
    finally:
        process.kill()
        process.communicate(timeout=TIMEOUT)


@pytest.fixture
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


def open_page(browser: Any, size: dict[str, int], **options: Any) -> tuple[Any, list[str]]:
    """Return a page of this size, and the list of the faults that will be seen on it."""
    page = browser.new_context(viewport=size, **options).new_page()
    page.set_default_timeout(1000 * TIMEOUT)
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda request: faults.extend(is_elsewhere(request.url)))
    return page, faults


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until what the studio has been asked to write is on the disk."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def is_elsewhere(url: str) -> list[str]:
    return [] if url.startswith(("http://127.0.0.1:", "data:", "blob:")) else [f"it loads {url}"]


def find_barriers(page: Any) -> list[str]:
    """Return what axe finds of barriers for people who use a keyboard or a screen reader."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python")
    violations = axe.Axe().run(page).response["violations"]
    return [f"{row['id']}: {node['html'][:120]}" for row in violations for node in row["nodes"]]


def assert_well_made(page: Any) -> None:
    """Fail if the page, once it has loaded, has a barrier or is wider than the window."""
    page.wait_for_function("!document.querySelector('p.loading')")
    assert find_barriers(page) == []
    width = page.viewport_size["width"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing overflows"


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_is_free_of_barriers(tmp_path: Path, browser: Any, size: dict[str, int], scheme: str) -> None:
    write_run(tmp_path / "mug", generate_trace(), method="textual-inversion")
    write_run(tmp_path / "cat", generate_trace(steps=300), finished=False, method="textual-inversion")
    with serve_studio(tmp_path) as (_, address):
        page, faults = open_page(browser, size, color_scheme=scheme)
        for path, title in PAGES.items():
            page.goto(address + path)
            page.get_by_role("heading", level=1, name=title).wait_for()
            if path in ("", "compare"):
                page.get_by_text("Stop at step").first.wait_for()
            assert_well_made(page)
        page.goto(f"{address}run?name=mug")
        page.get_by_role("slider", name="Recorded steps").last.wait_for()
        assert_well_made(page)
    assert faults == []


def test_from_dropped_images_to_a_downloaded_file(tmp_path: Path, browser: Any) -> None:
    images = sorted(mini.concepts()["red_striped_mug"].glob("*.png"))
    with serve_studio(tmp_path) as (process, address):
        page, faults = open_page(browser, PHONE, accept_downloads=True)
        page.goto(f"{address}new")
        page.get_by_label("Name of the run").wait_for()
        page.wait_for_function("document.querySelector('textarea, input')")
        page.locator("input[type=file]").first.set_input_files([str(path) for path in images])
        page.get_by_text("The class noun is missing").wait_for()
        page.get_by_label("Name of the run").fill("my-mug")
        page.get_by_label("Class noun").fill("mug")
        page.get_by_label("Caption of 00.png").fill("<thing> in the <b>snow</b> ${1+1}")
        wait_for(lambda: "snow" in Draft(tmp_path).caption(Draft(tmp_path).images[0]))
        page.get_by_role("button", name="Fill captions").click()
        page.get_by_role("button", name="Numbers of the preset").click()
        page.get_by_label("Cap, in steps").fill("90")
        page.get_by_label("Window of the rule").fill("80")
        page.get_by_role("button", name="Check").click()
        page.get_by_text("Ready to start").wait_for()
        assert_well_made(page)
        page.reload()
        page.get_by_label("Caption of 00.png").wait_for()
        assert page.get_by_label("Caption of 00.png").input_value() == "<thing> in the <b>snow</b> ${1+1}"
        assert page.get_by_label("Name of the run").input_value() == "my-mug"
        page.get_by_role("button", name="Start").focus()
        page.keyboard.press("Enter")
        page.wait_for_url("**/run?name=my-mug")
        page.get_by_text("Is training").wait_for()
        page.get_by_text("not before step 80").wait_for()
        page.get_by_role("button", name="Save now").click()
        page.get_by_text("saves a checkpoint").wait_for()
        page.wait_for_function("Number(document.querySelector('.numbers .value').textContent) >= 2")
        page.get_by_role("button", name="Stop now").click()
        page.get_by_text("Is paused").wait_for()
        assert len(checkpoint_paths(tmp_path / "my-mug")) >= 2
        assert not (tmp_path / "my-mug" / SAVE_REQUEST).exists()
        page.get_by_role("button", name="Go on").click()
        page.get_by_text("Is training").wait_for()
        process.send_signal(signal.SIGKILL)
        process.wait(TIMEOUT)
    assert find_run(tmp_path, "my-mug").state == "training", "a run survives the studio"

    with serve_studio(tmp_path) as (_, address):
        page.goto(f"{address}run?name=my-mug")
        page.get_by_text("Has finished").wait_for()
        slider = page.get_by_role("slider", name="Recorded steps").last
        slider.focus()
        page.keyboard.press("Home")
        page.get_by_text("Step 0, the untouched model").wait_for()
        page.get_by_role("button", name="Measure likeness").click()
        page.get_by_role("meter", name="Likeness").wait_for()
        page.get_by_role("button", name="Take this step").click()
        page.get_by_text("the step that was taken").wait_for()
        page.get_by_role("button", name="Generate").click()
        page.locator("figcaption").first.wait_for()
        assert_well_made(page)
        page.get_by_role("button", name="Make the file").click()
        link = page.locator("a[download]").first
        link.wait_for()
        with page.expect_download() as download:
            link.click()
        with zipfile.ZipFile(download.value.path()) as archive:
            assert "learned_embeds.safetensors" in archive.namelist()
        page.goto(address)
        page.get_by_role("link", name="my-mug").click()
        page.get_by_role("heading", level=1, name="my-mug").wait_for()
    assert faults == []


def test_a_log_is_replayed_by_dropping_it(tmp_path: Path, browser: Any) -> None:
    run = write_run(tmp_path / "mug", generate_trace(), method="textual-inversion")
    with serve_studio(tmp_path) as (_, address):
        page, faults = open_page(browser, DESKTOP)
        page.goto(f"{address}replay")
        page.get_by_label("Window, in steps").fill("160")
        page.locator("input[type=file]").first.set_input_files(str(run / "trace.jsonl"))
        page.get_by_role("img", name="Loss, ratio and stops of trace.jsonl").wait_for()
        page.get_by_text("Stop at step").first.wait_for()
        assert_well_made(page)
    assert faults == []


def test_a_password_opens_the_studio(tmp_path: Path, browser: Any) -> None:
    (tmp_path / "password").write_text("a long password of twelve\n")
    with serve_studio(tmp_path / "runs", "--password_file", str(tmp_path / "password")) as (_, address):
        page, faults = open_page(browser, PHONE)
        page.goto(address)
        page.get_by_label("username").fill("dvar")
        page.get_by_label("password").fill("a long password of twelve")
        page.get_by_role("button", name="Login").click()
        page.get_by_role("heading", level=1, name="Runs").wait_for()
        page.get_by_text("No runs yet").wait_for()
        assert_well_made(page)
    assert faults == []
