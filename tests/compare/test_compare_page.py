"""The page of a comparison: complete in itself, safe whatever runs are called, and readable where it is opened."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.commands import good, train
from support.made_runs import made_run, read_outs

from fmrun.compare.comparison import compare
from fmrun.compare.figures import COLOURS
from fmrun.compare.page import drawn, page
from fmrun.compare.pictures import Picture, pictures
from fmrun.runs.folder import Run
from fmrun.runtime.report import Reporter

PLAIN = {"feature_matching__weight": 0.0}
MATCHED = {"feature_matching__weight": 0.1, "feature_matching__balance": "gradient"}
EVIL = '<script>alert("&")</script>'


class Page(HTMLParser):
    """Tags and text of a page; fails for tags that are not closed in their order."""

    VOID = ("meta", "link", "img", "input", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID and not (self.get_starttag_text() or "").endswith("/>"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self._open or self._open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def runs(folder: Path) -> list[Run]:
    """Two groups of two seeds."""
    rows = read_outs(**{"fm/share": 0.1})
    return [
        *(made_run(folder, f"plain-seed{i}", kid={50: 0.4, 100: 0.2 + i / 9}, seed=i, **PLAIN) for i in range(2)),
        *(
            made_run(folder, f"matched-seed{i}", kid={50: 0.3, 100: 0.1}, rows=rows, seed=i, **MATCHED)
            for i in range(2)
        ),
    ]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def test_sections_follow_each_other_from_the_verdict_to_the_facts(folder: Path) -> None:
    made = [*runs(folder), made_run(folder, "lost", kid={50: 0.3}, state="diverged", **MATCHED, generator__width=9)]
    text = Page(page(compare(made))).text
    order = [
        "matched is ahead of plain",
        "Caution",
        "What differs in the configs config",
        "Scores",
        "KID (MobileNetV2) over seeds",
        "Over training",
        "The runs",
    ]
    places = [text.find(heading) for heading in order]
    assert -1 not in places
    assert places == sorted(places)
    assert re.search(r"run seeds state KID \(MobileNetV2\) ↓ @100", text)
    assert re.search(r"\(real images\) 0\.00", text)


def test_the_control_is_grey_and_the_others_take_their_turns(folder: Path) -> None:
    a, b, c, d = runs(folder)
    third = made_run(folder, "third", kid={100: 0.05}, **MATCHED, generator__width=9)
    for order in ([a, b, c, d, third], [c, d, third, a, b]):
        (figure,) = (figure for name, figure in drawn(compare(order)) if name == "loss/d")
        names = [text.get_text() for text in figure.legends[0].get_texts()]
        colours = [COLOURS.index(line.get_color()) for line in figure.axes[0].lines]
        assert dict(zip(names, colours, strict=True)) == {"plain": 0, "matched": 1, "third": 2}


def test_a_page_of_runs_that_all_failed_says_so(folder: Path) -> None:
    a = made_run(folder, "a", kid={50: 0.4}, state="diverged", **PLAIN)
    b = made_run(folder, "b", kid={50: 0.3}, state="failed", **MATCHED)
    here = Page(page(compare([a, b])))
    assert "Nothing yet says which run is better." in here.text
    assert "a: seed 0, diverged" in here.text
    assert "KID (MobileNetV2) over seeds" not in here.text


def test_it_has_no_script_and_asks_for_nothing_from_elsewhere(folder: Path) -> None:
    text = page(compare(runs(folder)))
    here = Page(text)
    policies = [a["content"] for tag, a in here.tags if tag == "meta" and a.get("http-equiv")]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    for tag, attrs in here.tags:
        assert tag != "script"
        assert not any(name.startswith("on") for name in attrs)
        for name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            assert (attrs.get(name) or "#").startswith(("#", "data:")), (tag, attrs)
    assert not re.search(r"url\((?!#)|@import", text)
    assert set(re.findall(r"https?://[^\"' ]+", text)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_what_users_write_is_text_and_nothing_else(folder: Path) -> None:
    rows = [row | {f"loss/{EVIL}": float(row["step"])} for row in read_outs()]
    made = [
        made_run(folder, "<i>a&$b$", rows=rows, **PLAIN, data__path=EVIL, state="diverged"),
        made_run(folder, "b", rows=rows, kid={10: 1.0}, **MATCHED, data__path="'\"><img src=x onerror=alert(1)>"),
    ]
    made[0].write_status(message=EVIL)
    text = page(compare(made), [Picture("<i>a&$b$", EVIL, b"")])
    here = Page(text)
    assert {tag for tag, _ in here.tags}.isdisjoint({"script", "i"})
    assert [a["src"] for tag, a in here.tags if tag == "img"] == ["data:image/png;base64,"]
    assert EVIL in here.text
    assert "<i>a&$b$: seed 0" in here.text
    assert EVIL not in text


def test_the_same_runs_give_the_same_page(folder: Path) -> None:
    made = runs(folder)
    assert page(compare(made)) == page(compare(made))


# ---- files for a paper


def test_figures_are_written_as_pdf_and_png(folder: Path) -> None:
    names = [run.name for run in runs(folder)]
    good("compare", *names, "--figures", "a/figures")
    written = {file.name for file in Path("a/figures").iterdir()}
    stems = {"intervals", "kid_mobilenet_v2", "loss-d", "loss-g_adv", "health-diversity"}  # the rest is constant
    assert written == {f"{stem}.{kind}" for stem in stems for kind in ("pdf", "png")}
    assert Path("a/figures/intervals.pdf").read_bytes().startswith(b"%PDF")
    assert Image.open("a/figures/intervals.png").width == 1666  # 400 points at 300 per inch


# ---- pictures


@pytest.fixture
def trained(workplace: Path) -> list[str]:
    train("--steps", "3", "--name", "one", "-s", "log.every=1")
    train("--steps", "3", "--name", "two", "-s", "log.every=1", "--seed", "5", "--lambda-feature", "0")
    return ["one", "two"]


def test_pictures_are_those_of_sample_for_the_same_seed(trained: list[str], workplace: Path) -> None:
    done = good("compare", *trained, "--html", "page.html")
    assert "page.html" in done.err
    here = Page(Path("page.html").read_text())
    shown = [attrs["src"] or "" for tag, attrs in here.tags if tag == "img"]
    for name in trained:
        good("sample", name, "--num", "36", "--out", f"{name}.png", "--device", "cpu")
    expected = [Path(f"{name}.png").read_bytes() for name in trained]
    assert [base64.b64decode(source.partition(",")[2]) for source in shown] == expected
    shutil.rmtree("runs/two/checkpoints")
    done = good("compare", *trained, "--html", "page.html")
    assert any("no picture of two" in warning for warning in done.warnings)
    assert sum(tag == "img" for tag, _ in Page(Path("page.html").read_text()).tags) == 1


def test_of_super_resolution_the_last_sheet_is_shown_as_it_lies_there(folder: Path) -> None:
    made = [made_run(folder, name, task="upscale", generator__width=w) for name, w in (("a", 4), ("b", 8))]
    for step in (10, 100):
        (made[0].samples / f"step-{step:08d}.png").write_bytes(b"sheet %d" % step)
    comparison = compare(made)
    (picture,) = pictures(comparison, device=torch.device("cpu"), report=Reporter(quiet_rank=True))
    assert (picture.group, picture.png) == ("a", b"sheet 100")
    assert "a, step 100: low resolution, bicubic, generated, original" in Page(page(comparison, [picture])).text


# ---- in a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

PROBE = """
addEventListener("load", () => {
  const seen = {}, root = document.documentElement;
  seen.width = innerWidth;
  seen.asked = performance.getEntriesByType("resource").map((e) => e.name).filter((name) => !name.startsWith("data:"));
  seen.overflow = root.scrollWidth - root.clientWidth;
  const shown = (query) => [...document.querySelectorAll(query)].filter((e) => e.getClientRects().length);
  const box = (e) => e.getBoundingClientRect();
  const outside = (e, whole) => box(e).left < whole.left - 1 || box(e).right > whole.right + 1 || box(e).bottom > whole.bottom + 1;
  seen.cut = [...shown("td, th, p, h1").filter((e) => outside(e, {left: 0, right: innerWidth, bottom: Infinity})),
    ...shown("figure svg text").filter((e) => outside(e, box(e.closest("svg"))))].map((e) => e.textContent);
  seen.small = shown("p, td, th, figcaption, svg text").filter((e) => {
    const svg = e.closest("svg"), scale = svg ? box(svg).width / svg.viewBox.baseVal.width : 1;
    return parseFloat(getComputedStyle(e).fontSize) * scale < 9.5;
  }).map((e) => e.textContent);
  const colour = (e, k) => getComputedStyle(e)[k].match(/[\\d.]+/g).map(Number);
  const light = (c) => { const [r, g, b] = c.slice(0, 3).map((v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const contrast = (a, b) => (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05);
  const paper = colour(document.body, "backgroundColor");
  seen.dark = light(paper) < 0.2;
  seen.text = Math.min(...shown("h1, p, td, th, figcaption").map((e) => contrast(colour(e, "color"), paper)),
    ...shown("svg text").map((e) => contrast(colour(e, "fill"), [255, 255, 255])));
  parent.postMessage(JSON.stringify(seen), "*");
});
"""

FRAME = """<!doctype html><meta name="color-scheme" content="light dark"><title>waiting</title>
<script>addEventListener("message", (event) => { document.title = event.data; });</script>
<iframe src="page.html" style="width:%dpx;height:844px;border:0"></iframe>"""
"""A window has at least 500 px; a frame can be as narrow as a phone."""


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with everything on it, and a script that looks at it."""
    folder = tmp_path_factory.mktemp("page")
    made = runs(folder / "runs")
    name = "a-rather-long-name-for-a-run-of-this-kind"
    made += [
        made_run(folder / "runs", f"{name}-{i}", **MATCHED, generator__width=i, state="stopped", kid={100: 0.3})
        for i in range(5, 9)
    ]
    names = [f"{stem}_mobilenet_v2" for stem in ("fid", "precision", "recall", "density", "coverage")]
    for run in made:
        record = run.evaluations()[-1]
        measured = dict.fromkeys((*names, "modes", "modes_kl"), 0.1234 + record["metrics"]["kid_mobilenet_v2"])
        run.add_evaluation(record | {"metrics": record["metrics"] | measured, "floor": measured})
    png = io.BytesIO()
    Image.fromarray(np.zeros((274, 274), np.uint8)).save(png, "PNG")
    text = page(compare(made), [Picture(name, "step 100", png.getvalue()) for name in ("plain", "matched")])
    text = text.replace("style-src", "script-src 'unsafe-inline'; style-src")
    (folder / "page.html").write_text(text.replace("</body>", f"<script>{PROBE}</script></body>"))
    return folder


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "light"), (390, "dark")])
def test_it_can_be_read_at_every_size_and_scheme(opened: Path, width: int, scheme: str) -> None:
    assert CHROMIUM is not None
    frame = opened / f"frame-{width}.html"
    frame.write_text(FRAME % width)
    command = (
        f"{CHROMIUM} --headless --no-sandbox --disable-gpu --hide-scrollbars --virtual-time-budget=3000 --dump-dom"
    )
    options = (f"--user-data-dir={opened / 'profile'}", "--window-size=1400,900", "--enable-logging=stderr")
    scheme_option = f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"
    done = subprocess.run(
        [*command.split(), *options, scheme_option, frame.as_uri()], capture_output=True, text=True, timeout=120
    )
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None, done.stderr
    assert title[1] != "waiting", done.stderr
    assert "CONSOLE" not in done.stderr
    seen: dict[str, Any] = json.loads(unescape(title[1]))
    assert seen["width"] == width
    assert seen["asked"] == []
    assert seen["overflow"] == 0
    assert seen["cut"] == []
    assert seen["small"] == []
    assert seen["dark"] == (scheme == "dark")
    assert seen["text"] >= 4.5  # WCAG 2.1, 1.4.3
