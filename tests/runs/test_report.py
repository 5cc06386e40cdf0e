"""The report of a run, as one page."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from fake_run import CONFIG, falling_loss, generate_trace, write_run

from dvar.errors import RefusedInput
from dvar.runs.report import write_report
from dvar.stopping.diagnosis import Reason
from dvar.stopping.trace import Trace
from dvar.stopping.verdict import Verdict
from dvar.training.run_layout import ATTENTION, EMBEDS, LORA

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """A page as its reader meets it; refuses tags that do not nest."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.pieces: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(self.source)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.pieces.append((self._open[-1] if self._open else "", data))

    @property
    def text(self) -> str:
        """The visible text, with white space collapsed as in a browser."""
        text = "".join(data for tag, data in self.pieces if tag != "style")
        return " ".join(text.split())

    def of(self, tag: str) -> list[str]:
        return [data for holder, data in self.pieces if holder == tag]

    def with_class(self, name: str) -> list[tuple[str, dict[str, str | None]]]:
        return [element for element in self.elements if name in (element[1].get("class") or "").split()]


def read_report(folder: Path, trace: Trace, **run: Any) -> Page:
    return Page(write_report(write_run(folder, trace, **run)))


def test_the_page_of_a_stopped_run_holds_every_section_in_order(run_folder: Path) -> None:
    path = write_report(run_folder)
    page = Page(path)
    assert path == run_folder / "report.html"
    assert page.of("h1") == ["<thing>"]
    assert page.of("h2") == [
        "The losses",
        "The stopping rule",
        "<thing> during training",
        "Held inputs",
        "How to use it",
    ]
    assert page.of("summary") == ["Settings", "Versions"]
    assert "learned from 4 images, starting from “mug”" in page.text


def test_the_verdict_is_quoted_in_full(run_folder: Path) -> None:
    verdict = json.loads((run_folder / "result.json").read_text())["verdict"]
    page = Page(write_report(run_folder))
    assert f"Stopped at step 224: {verdict['sentence'].partition(': ')[2]}" in page.text
    # 160 / sqrt(0.15) = 413.1, and 413 - 224 = 189
    assert "in a straight line passes the threshold at step 413; this run stopped 189 steps earlier." in page.text
    assert "Next: Check the sample images, then use the result as shown below." in page.text


def test_key_numbers(run_folder: Path) -> None:
    text = Page(write_report(run_folder)).text
    assert "steps 224 of at most 1000" in text
    # 224 * 0.21 + 225 * 0.12 + 225 * 0.01 = 47.04 + 27 + 2.25 = 76.29 s
    assert "time 1 min 16 s train 62 % · probe 35 % · other 3 %" in text
    # (47.04 + 2.25) / 224 * 1000 = 220.04 s to the cap without the probe, less 76.29 s
    assert "time saved 2 min 24 s 1000 steps without the probe take about 3 min 40 s" in text


def test_stop_and_window_are_marked_on_both_losses_and_the_stop_on_the_ratio(run_folder: Path) -> None:
    page = Page(write_report(run_folder))
    lines = [attributes for tag, attributes in page.with_class("stop") if tag == "line"]
    assert len(lines) == 3
    assert len({attributes["x1"] for attributes in lines}) == 1
    assert len(page.with_class("window")) == 2
    assert page.of("text").count("stop 224") == 2
    assert "threshold 15 %" in page.of("text")
    assert len(page.with_class("panel")) == 3
    assert len(page.with_class("spark")) == 8


def test_single_inputs_are_ordered_by_timestep(run_folder: Path) -> None:
    timesteps = re.findall(r"t = (\d+)", Page(write_report(run_folder)).text)
    assert timesteps == ["37", "130", "266", "411", "555", "702", "843", "981"]


def test_images_are_in_the_page_with_what_they_show(run_folder: Path) -> None:
    page = Page(write_report(run_folder))
    images = [attributes for tag, attributes in page.elements if tag == "img"]
    # 3 + 3 at the top, 5 steps of 4 images, 4 references beside them
    assert len(images) == 30
    assert all((image["src"] or "").startswith("data:image/png;base64,") for image in images)
    assert all(image["class"] == "pixels" and image["alt"] for image in images)
    assert [head for head in page.of("th") if head.startswith("step ")] == [
        "step 0",
        "step 60",
        "step 120",
        "step 180",
        "step 224",
    ]


def test_the_word_is_shown_as_it_was_exported(tmp_path: Path) -> None:
    trace = generate_trace(
        lambda step: 0.03 if step == 60 else math.nan if step == 90 else falling_loss(step), steps=90
    )
    verdict = Verdict(True, Reason.NON_FINITE, 90, "rule", {"non_finite_step": 90, "ratio": 1.0})
    page = read_report(tmp_path, trace, verdict=verdict, sampled_every=30)
    images = [(image["alt"] or "", image["src"]) for tag, image in page.elements if tag == "img"]
    final = [source for alt, source in images if alt == "<thing> after training"]
    assert final == [source for alt, source in images if alt.endswith("step 60")][:3]


def test_of_many_steps_the_first_and_the_last_are_among_the_six_shown(tmp_path: Path) -> None:
    page = read_report(tmp_path, generate_trace(), sampled_every=10)
    heads = [head for head in page.of("th") if head.startswith("step ")]
    assert (len(heads), heads[0], heads[-1]) == (6, "step 0", "step 224")


def test_large_images_are_shrunk_so_that_the_page_stays_small(tmp_path: Path) -> None:
    page = read_report(tmp_path, generate_trace(), sampled_every=40, images=8, side=512)
    images = [attributes for tag, attributes in page.elements if tag == "img"]
    assert all((image["src"] or "").startswith("data:image/jpeg;base64,") for image in images)
    assert not page.with_class("pixels")
    assert len(page.source) < 2_000_000


def test_a_long_run_gives_a_small_page(tmp_path: Path) -> None:
    noise = generate_trace(lambda step: 0.04, steps=1000)
    assert noise.last_step == 1000
    assert len(read_report(tmp_path, noise, sampled_every=0).source) < 300_000


def test_the_page_asks_nothing_of_the_network_and_runs_nothing(run_folder: Path) -> None:
    page = Page(write_report(run_folder))
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form", "video", "audio", "image", "use"}
    for _, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        assert "style" not in attributes
        for name in {"src", "srcset", "href", "xlink:href", "data", "action"} & attributes.keys():
            assert (attributes[name] or "").startswith("data:image/")
    assert not re.search(r"https?:|url\(|@import", page.source)
    policy = next(attributes["content"] for _, attributes in page.elements if attributes.get("http-equiv"))
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_whatever_a_user_wrote_is_shown_and_never_executed(tmp_path: Path) -> None:
    nasty = "</style><script>alert(1)</script><img src=x onerror=alert(1)>&lt;\"'"
    names = [
        "placeholder_token",
        "initializer_token",
        "pretrained_model_name_or_path",
        "validation_prompt",
        "output_dir",
    ]
    settings = {name: f"{name} {nasty}" for name in names}
    page = read_report(
        tmp_path, generate_trace(), prompt=f"prompt {nasty}", versions={nasty: nasty}, **{nasty: [nasty]}, **settings
    )
    tags = [tag for tag, _ in page.elements]
    assert "script" not in tags
    assert tags.count("style") == 1
    assert all("onerror" not in attributes for _, attributes in page.elements)
    for name in ["prompt", *names]:
        assert f"{name} {nasty}" in page.text


def test_equal_runs_give_equal_bytes_wherever_and_whenever_they_lie(tmp_path: Path) -> None:
    first = write_run(tmp_path / "here", generate_trace())
    second = shutil.copytree(first, tmp_path / "there" / "else")
    for path in second.rglob("*"):
        os.utime(path, (0, 0))
    page = write_report(first).read_bytes()
    assert write_report(second).read_bytes() == page
    assert write_report(first).read_bytes() == page


def test_the_code_on_the_page_is_valid(tmp_path: Path) -> None:
    page = read_report(tmp_path, generate_trace(), output_dir="runs/my \"mug\" 'o'", placeholder_token="<o'mug>")
    command, program = page.of("code")[-2:]
    prompt = "a photo of <o'mug> on the beach"
    assert shlex.split(command) == ["dvar", "generate", "runs/my \"mug\" 'o'", "--prompt", prompt]
    compile(program, "report", "exec")
    assert "import dvar.mini\n" in program
    assert json.dumps(prompt) in program


def test_another_model_is_loaded_by_its_name(tmp_path: Path) -> None:
    page = read_report(tmp_path, generate_trace(), pretrained_model_name_or_path="someone/model")
    assert 'from_pretrained("someone/model")' in page.of("code")[-1]
    assert "dvar.mini" not in page.of("code")[-1]


def test_a_model_without_t5_is_loaded_without_it(tmp_path: Path) -> None:
    index = {"_class_name": "StableDiffusion3Pipeline", "text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text(json.dumps(index))
    page = read_report(tmp_path, generate_trace(), pretrained_model_name_or_path=str(tmp_path / "model"))
    absent = "text_encoder_3=None, tokenizer_3=None"
    assert f"from_pretrained({json.dumps(str(tmp_path / 'model'))}, {absent})\n" in page.of("code")[-1]


@pytest.mark.parametrize(
    ("method", "title", "subject", "learned", "loading"),
    [
        (
            {"method": "dreambooth-lora", "placeholder_token": None, "instance_prompt": "a photo of sks mug"},
            "DreamBooth-LoRA",
            "a photo of sks mug",
            "A low-rank change of the denoising network's attention for the bundled model, learned from 4 images",
            ["load_lora_weights"],
        ),
        (
            {"method": "custom-diffusion", "class_noun": "mug"},
            "Custom Diffusion",
            "<thing> mug",
            "A new word and new keys and values of cross-attention for the bundled model",
            ["load_textual_inversion", "load_state_dict"],
        ),
    ],
)
def test_a_run_of_another_method_says_what_it_learned_and_how_to_load_it(
    tmp_path: Path, method: dict[str, Any], title: str, subject: str, learned: str, loading: list[str]
) -> None:
    files = {"load_textual_inversion": EMBEDS, "load_lora_weights": LORA, "load_state_dict": ATTENTION}
    folder = write_run(tmp_path, generate_trace(), weights=[files[line] for line in loading], **method)
    page = Page(write_report(folder))
    assert title in page.text
    assert page.of("h1") == [subject]
    assert learned in page.text
    program = page.of("code")[-1]
    assert [line for line in files if line in program] == loading
    compile(program, "report", "exec")
    assert f"{subject} on the beach" in program


def test_the_weights_of_the_lowest_step_are_named_where_they_are_saved(tmp_path: Path) -> None:
    trace = generate_trace(lambda step: 0.03 if step == 100 else falling_loss(step))
    best_weights = "learned_embeds-steps-100.safetensors"
    assert "are saved too" not in Page(write_report(write_run(tmp_path / "one", trace))).text
    assert best_weights in Page(write_report(write_run(tmp_path / "two", trace, best_weights=[best_weights]))).text


def test_a_result_that_names_no_other_weights_has_a_page(run_folder: Path) -> None:
    path = run_folder / "result.json"
    result = json.loads(path.read_text())
    assert result.pop("best_weights")
    path.write_text(json.dumps(result))
    assert write_report(run_folder).exists()


def test_a_run_that_stops_after_a_straight_line_would_says_what_that_means(tmp_path: Path) -> None:
    trace = generate_trace(lambda step: falling_loss(step // 6))
    assert trace.last_step > 413
    assert (
        "at step 413; this run stopped no earlier, so its ratio alone does not show"
        in read_report(tmp_path, trace).text
    )


def test_a_straight_line_runs_to_the_cap_with_a_warning(tmp_path: Path) -> None:
    page = read_report(tmp_path, generate_trace(lambda step: 0.0426 * (1 - 3e-4 * step)))
    assert "Still falling: " in page.text
    assert "The cap ended this run before the stopping rule did" in page.text
    assert "No warning signs" not in page.text


def test_a_run_that_reached_its_cap_says_so_and_claims_no_saving(tmp_path: Path) -> None:
    page = read_report(tmp_path, generate_trace(lambda step: 0.0426))
    assert "Stopped at step 1000: the cap of 1000 steps is reached" in page.text
    assert "The cap ended this run before the stopping rule did" in page.text
    assert "time saved" not in page.of("dt")
    assert not page.with_class("window")


def test_an_unfinished_run_says_how_to_continue_and_claims_no_result(tmp_path: Path) -> None:
    page = read_report(tmp_path, generate_trace(steps=120), finished=False)
    assert "No stop at step 120: warming up, 120 of 160 steps" in page.text
    assert "120 of at most 1000 steps are recorded. If it is no longer training" in page.text
    assert "--resume_from_checkpoint latest" in page.of("code")
    assert not page.with_class("stop")
    assert "How to use it" not in page.of("h2")
    assert "time saved" not in page.of("dt")


def test_a_run_without_samples_has_no_grid(tmp_path: Path) -> None:
    page = read_report(tmp_path, generate_trace(), sampled_every=0, images=0)
    assert "img" not in [tag for tag, _ in page.elements]
    assert "<thing> during training" not in page.of("h2")


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path) -> None:
    page = read_report(tmp_path, Trace(), finished=False, sampled_every=0, images=0)
    assert "Nothing has been recorded yet." in page.text
    assert page.of("h2") == ["The losses"]


def test_a_loss_that_is_not_finite_ends_the_run_and_is_marked(tmp_path: Path) -> None:
    trace = generate_trace(lambda step: math.nan if step == 90 else falling_loss(step), steps=90)
    verdict = Verdict(True, Reason.NON_FINITE, 90, "rule", {"non_finite_step": 90, "ratio": 1.0})
    page = read_report(tmp_path, trace, verdict=verdict)
    assert "Stopped at step 90: the loss is not finite at step 90" in page.text
    assert "The exported weights are those of step " in page.text
    assert "Dotted lines: a loss was not finite at step 90." in page.text
    assert len(page.with_class("lost")) == 2
    assert "time saved" not in page.of("dt")
    assert not re.search(r"\bnan\b", page.source.partition("</style>")[2])


@pytest.mark.parametrize(
    "loss",
    [
        lambda step: math.nan,
        lambda step: math.inf,
        lambda step: 0.0,
        lambda step: 1e-300,
        lambda step: -1.0,
        lambda step: 1e300,
    ],
    ids=["nan", "inf", "zero", "tiny", "negative", "huge"],
)
@pytest.mark.parametrize("steps", [0, 1, 200])
def test_no_curve_is_too_strange_for_a_page(tmp_path: Path, loss: Callable[[int], float], steps: int) -> None:
    page = read_report(tmp_path, generate_trace(loss, steps=steps), finished=False, sampled_every=0)
    numbers = [
        value
        for _, attributes in page.elements
        for name, value in attributes.items()
        if name in {"x1", "y1", "cx", "cy", "d"}
    ]
    assert numbers
    assert not any(re.search("nan|inf", value or "") for value in numbers)


def test_an_image_that_cannot_be_read_or_is_missing_leaves_an_empty_frame(run_folder: Path) -> None:
    (run_folder / "samples" / "step-000060" / "01.png").write_bytes(b"no image")
    (run_folder / "samples" / "step-000120" / "03.png").unlink()
    page = Page(write_report(run_folder))
    assert len(page.with_class("none")) == 2


def test_a_trace_torn_by_a_crash_is_shown_up_to_its_last_complete_line(run_folder: Path) -> None:
    lines = (run_folder / "trace.jsonl").read_text().splitlines()
    (run_folder / "trace.jsonl").write_text("\n".join([*lines[:100], lines[100][:20]]))
    (run_folder / "result.json").unlink()
    with pytest.warns(UserWarning, match="torn"):
        page = Page(write_report(run_folder))
    assert "98 of at most 1000 steps are recorded" in page.text


def test_a_run_probed_now_and_then_has_the_same_page(tmp_path: Path) -> None:
    page = read_report(tmp_path, generate_trace(probe_every=10))
    assert "Stopped at step 230:" in page.text
    assert len(page.with_class("panel")) == 3


def test_a_report_is_written_to_the_requested_file(run_folder: Path, tmp_path: Path) -> None:
    path = write_report(run_folder, tmp_path / "page.html")
    assert path == tmp_path / "page.html"
    assert path.read_bytes() == write_report(run_folder).read_bytes()
    with pytest.raises(RefusedInput, match="choose another place"):
        write_report(run_folder, tmp_path / "missing" / "page.html")


def test_a_folder_without_a_run_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(RefusedInput, match=r"config\.json"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_settings_are_all_listed(run_folder: Path) -> None:
    page = Page(write_report(run_folder))
    assert set(CONFIG) - {"versions"} <= set(page.of("th"))
    assert {"dvar", "torch"} <= set(page.of("th"))
