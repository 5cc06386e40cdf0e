"""The studio as an application: what it refuses, what its file routes give away, and its settings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import dvar
from fake_run import generate_trace, write_run

from dvar.studio.config import StudioConfig, problems
from dvar.training.run_layout import GENERATED, GENERATED_LIST

PASSWORD = "a long password of twelve"
VISIT = """
import json, sys
from pathlib import Path
from starlette.routing import Mount
from starlette.testclient import TestClient
from dvar.studio.app import build_app
from dvar.studio.config import LOOPBACK
from dvar.studio.pages import Studio

def walk(router):
    for route in router.routes:
        inner = getattr(route, "original_router", None) or (route.app if isinstance(route, Mount) else None)
        yield from walk(inner) if inner else ((method, route.path) for method in route.methods or ["GET"])

app = build_app(Studio(Path(sys.argv[1]), {}), LOOPBACK, sys.argv[2])
client = TestClient(app, "http://127.0.0.1", follow_redirects=False)
answers = [(*row, client.request(*row)) for row in sorted({*walk(app.app)})]
print(json.dumps([(method, path, answer.status_code, answer.text) for method, path, answer in answers]))
"""
OPEN = {
    *(("GET", path) for path in ("/", "/new", "/compare", "/replay", "/run")),
    *(("GET", path) for path in ("/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt")),
    *(("POST", path) for path in ("/login", "/login/")),
    ("HEAD", "/"),
}


def test_the_settings_are_those_of_this_machine_alone_by_default() -> None:
    assert problems(StudioConfig()) == []
    assert StudioConfig().host == "127.0.0.1"


def test_nothing_listens_elsewhere_without_a_password(tmp_path: Path) -> None:
    answer = dvar("studio", tmp_path, "--host", "0.0.0.0")
    assert answer.status == 2
    assert answer.err == (
        "dvar: password_file is missing: it is needed to listen on 0.0.0.0, which other machines can reach: "
        "name a file with a password\n"
    )


def test_a_short_password_a_missing_file_and_a_missing_folder_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "short").write_text("secret\n")
    answer = dvar("studio", tmp_path, "--password_file", tmp_path / "short", "--models_dir", tmp_path / "none")
    assert "must hold at least 12 characters, got 6: write a longer password into it" in answer.err
    assert "models_dir must be a folder" in answer.err
    assert "cannot be read (No such file" in dvar("studio", tmp_path, "--password_file", tmp_path / "none").err


def test_a_missing_gradio_is_refused_with_what_to_install(tmp_path: Path) -> None:
    hidden = "import sys; sys.modules['gradio'] = None"
    program = f"{hidden}; from dvar.cli.main import main; sys.exit(main(['studio', {str(tmp_path)!r}]))"
    process = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ}, timeout=300
    )
    assert (process.returncode, process.stderr) == (1, "dvar: this command needs gradio: pip install 'dvar[studio]'\n")


def test_gradio_is_imported_by_the_studio_alone() -> None:
    package = Path(dvar_package())
    users = [
        path.relative_to(package).parts[0]
        for path in package.rglob("*.py")
        if any(word in path.read_text(encoding="utf-8") for word in ("import gradio", "from gradio"))
    ]
    assert set(users) == {"studio"}


def dvar_package() -> str:
    """Return the folder of the package."""
    import dvar as package

    return str(Path(package.__file__).parent)


# --- the application itself -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library with one run."""
    root = tmp_path_factory.mktemp("runs")
    write_run(root / "mug", generate_trace(steps=100), sampled_every=0)
    return root


@pytest.fixture(scope="module")
def client(library: Path) -> Iterator[Any]:
    """A client of a studio with a password, which runs in a process of its own: Gradio leaves event loops open."""
    pytest.importorskip("gradio", reason="needs the extra: pip install 'dvar[studio]'")
    httpx = pytest.importorskip("httpx")
    password = library / ".password"
    password.write_text(PASSWORD)
    words = ["studio", str(library), "--port", "0", "--password_file", str(password)]
    process = subprocess.Popen([sys.executable, "-m", "dvar", *words], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        address = process.stdout.readline().split()[1]
        with httpx.Client(base_url=address, timeout=300) as opened:
            yield opened
    finally:
        process.kill()
        process.communicate()


def log_in(client: Any) -> None:
    answer = client.post("/login", data={"username": "dvar", "password": PASSWORD})
    assert answer.status_code == 200


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/config", "/gradio_api/info", "/gradio_api/file=x"])
def test_nothing_is_shown_before_the_password(client: Any, path: str) -> None:
    client.cookies.clear()
    assert client.get(path).status_code == 401
    wrong = client.post("/login", data={"username": "dvar", "password": "guess"})
    assert wrong.status_code == 400


@pytest.mark.slow
def test_no_route_but_those_of_the_login_answers_without_one(library: Path) -> None:
    pytest.importorskip("gradio", reason="needs the extra: pip install 'dvar[studio]'")
    words = [sys.executable, "-c", VISIT, str(library), PASSWORD]
    environment = {**os.environ, "HF_TOKEN": "hf_dummy", "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)
    assert process.returncode == 0, process.stderr
    answers = json.loads(process.stdout)
    assert {path for _, path, _, _ in answers} > {"/config", "/gradio_api/reset", "/gradio_api/queue/join"}
    refused = {301, 302, 303, 307, 308, 401, 403, 404}
    assert {(method, path) for method, path, status, _ in answers if status not in refused} <= OPEN
    for method, path, status, text in answers:
        if (method, path) in OPEN and text.startswith("<!doctype html>"):
            assert (status, '"auth_required":true' in text) == (200, True), path


@pytest.mark.slow
def test_no_history_of_the_calls_is_kept(client: Any) -> None:
    log_in(client)
    assert not client.get("/config").json().get("run_history")
    assert client.post("/gradio_api/run-history/connect", json={}).status_code in (403, 404)


@pytest.mark.slow
def test_the_file_routes_give_away_no_file_of_the_machine_and_none_of_a_run(client: Any, library: Path) -> None:
    log_in(client)
    for path in ("/etc/passwd", library / "mug" / "config.json", Path(__file__), "../../etc/passwd", library / "mug"):
        for route in ("/gradio_api/file=", "/gradio_api/file/", "/file="):
            answer = client.get(f"{route}{path}")
            assert answer.status_code in (403, 404), (route, path)


@pytest.mark.slow
def test_an_address_of_another_site_and_a_request_from_one_are_refused(client: Any) -> None:
    log_in(client)
    assert client.get("/config").status_code == 200
    assert client.get("/config", headers={"host": "evil.example"}).status_code == 400
    for headers in ({"origin": "http://evil.example"}, {"sec-fetch-site": "cross-site"}):
        answer = client.post("/gradio_api/queue/join", headers=headers, content="{}")
        assert answer.status_code == 403


@pytest.mark.slow
def test_the_browser_loads_nothing_from_elsewhere(client: Any) -> None:
    log_in(client)
    answer = client.get("/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "http" not in policy
    config = client.get("/config").json()
    assert config["analytics_enabled"] is False
    assert "fonts.googleapis.com" not in json.dumps(config.get("stylesheets"))


@pytest.mark.slow
def test_a_forged_upload_path_is_refused(tmp_path: Path) -> None:
    program = """
import os, sys
from pathlib import Path
from dvar.errors import RefusedInput
from dvar.studio.pages import uploaded_files
uploads = Path(os.environ["GRADIO_TEMP_DIR"])
assert uploaded_files(str(uploads / "a" / "image.png")) == [uploads / "a" / "image.png"]
for path in ("/etc/passwd", f"{uploads}/../x", "../x", str(uploads)):
    try:
        uploaded_files([path])
    except RefusedInput as error:
        print(error)
"""
    environment = {**os.environ, "GRADIO_TEMP_DIR": str(tmp_path.resolve())}
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert process.stdout.count("a file must have been uploaded here") == 4, process.stderr


@pytest.mark.slow
def test_the_rest_of_a_run_is_shown_where_its_list_of_generated_images_is_damaged(tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="needs the extra: pip install 'dvar[studio]'")
    folder = write_run(tmp_path / "mug", generate_trace(steps=100), method="textual-inversion")
    (folder / GENERATED).mkdir()
    (folder / GENERATED / GENERATED_LIST).write_text("{\n")
    program = """
import json, sys
from pathlib import Path
import gradio as gr
from dvar.studio.pages import Studio
from dvar.studio.run_page import add_run_page
with gr.Blocks() as page:
    add_run_page(Studio(Path(sys.argv[1]), {}), page)
refresh = next(event.fn for event in page.fns.values() if event.name == "refresh")
print(json.dumps([str(part) for part in refresh("mug", None, 1)]))
"""
    words = [sys.executable, "-c", program, str(tmp_path)]
    process = subprocess.run(words, capture_output=True, text=True, env={**os.environ}, timeout=300)
    assert process.returncode == 0, process.stderr
    _, head, message, charts, *_ = json.loads(process.stdout)
    assert "<h1>mug</h1>" in head
    assert "delete it and generate the images again" in message
    assert "<svg" in charts


@pytest.mark.slow
def test_passwords_cannot_be_guessed_at_will(client: Any) -> None:
    answers = {client.post("/login", data={"username": "dvar", "password": "guess"}).status_code for _ in range(21)}
    assert 429 in answers
