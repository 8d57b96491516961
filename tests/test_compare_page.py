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
from commands import good, train
from made_runs import made_run, read_outs
from PIL import Image

from fmrun.compare.comparison import compare
from fmrun.compare.page import page
from fmrun.compare.pictures import BUDGET, pictures
from fmrun.report import Reporter
from fmrun.runs import Run

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
        if not self._open or self._open[-1] not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def of(self, kind: str) -> list[dict[str, str | None]]:
        """Attributes of the tags of a class."""
        return [attrs for _, attrs in self.tags if kind in (attrs.get("class") or "").split()]


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


def test_the_page_tells_who_won_and_shows_all_sections(folder: Path) -> None:
    here = Page(page(compare(runs(folder))))
    assert "matched is ahead of plain, but it could be chance: KID (MobileNetV2) 0.1 against 0.256" in here.text
    for heading in ("Summary", "What differs in their configs", "Over training", "Runs", "What the measures mean"):
        assert heading in here.text
    assert "feature_matching.weight is 0.1, not 0" in here.text
    assert len(here.of("chart")) == 4  # the share and the speed are the same throughout
    assert len(here.of("band")) == 8
    assert "The same throughout, in all runs that have it: fm/share 10 %, time/images_per_second 500." in here.text
    assert len(here.of("interval")) == 2


def test_scores_stand_beside_what_they_are_held_against(folder: Path) -> None:
    here = Page(page(compare(runs(folder))))
    assert len(here.of("floor")) == 2  # a line in each row of the plot
    assert "dotted: real images against real ones, 0.001" in here.text
    assert re.search(r"real images 0\.001", here.text)


def test_a_long_summary_is_several_tables_with_what_decides_first(folder: Path) -> None:
    rows = [row | {f"eval/{stem}": 1.0 for stem in ("fid", "recall", "density", "coverage")} for row in read_outs()]
    made = [made_run(folder, n, kid={100: 0.1}, rows=rows, generator__width=w) for n, w in (("a", 4), ("b", 8))]
    text = page(compare(made, metric="coverage"))
    tables = re.findall(r'<table class="cards.*?</table>', text.partition("What differs")[0])
    heads = [
        [re.sub("<.*?>", "", cell) for cell in re.findall("<th.*?</th>", t[: t.index("</thead>")])] for t in tables
    ]
    assert len(heads) == 2
    assert [head[0] for head in heads] == ["run", "run"]
    assert heads[0][1].startswith("coverage")
    assert max(map(len, heads)) <= 7


def test_a_page_of_runs_that_all_failed_says_so(folder: Path) -> None:
    a = made_run(folder, "a", kid={50: 0.4}, state="diverged", **PLAIN)
    b = made_run(folder, "b", kid={50: 0.3}, state="failed", **MATCHED)
    here = Page(page(compare([a, b])))
    assert "Nothing yet says which run is better." in here.text
    assert "missing for a, b" in here.text
    assert len(here.of("bad")) >= 2
    assert here.of("interval") == []


def test_it_asks_for_nothing_from_elsewhere(folder: Path) -> None:
    text = page(compare(runs(folder)))
    here = Page(text)
    policies = [a["content"] for tag, a in here.tags if tag == "meta" and a.get("http-equiv")]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"]
    for tag, attrs in here.tags:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert (attrs.get(name) or "#").startswith(("#", "data:")), (tag, attrs)
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|WebSocket", text)
    assert set(re.findall(r"https?://[^\"' ]+", text)) <= {"http://www.w3.org/2000/svg"}  # a name, not a place


def test_what_users_write_is_text_and_nothing_else(folder: Path) -> None:
    rows = [row | {f"loss/{EVIL}": float(row["step"])} for row in read_outs()]
    runs = [
        made_run(folder, "a", rows=rows, **PLAIN, data__path=EVIL, state="diverged"),
        made_run(folder, "b", rows=rows, kid={10: 1.0}, **MATCHED, data__path="'\"><img src=x onerror=alert(1)>"),
    ]
    runs[0].write_status(message=EVIL)
    text = page(compare(runs))
    here = Page(text)
    clean = Page(page(compare([made_run(folder, "c", **PLAIN), made_run(folder, "d", **MATCHED)])))
    count = [sum(tag == "script" and "type" not in attrs for tag, attrs in p.tags) for p in (here, clean)]
    assert count == [1, 1]
    assert not any(tag == "img" for tag, _ in here.tags)
    assert EVIL in here.text
    assert EVIL not in text


def test_data_of_a_chart_cannot_end_its_script(folder: Path) -> None:
    run = made_run(folder, "a", **PLAIN)
    odd = made_run(folder, "b", **MATCHED)
    renamed = run.path.rename(run.path.with_name("</script><b>"[:3].replace("/", "") + "script"))
    text = page(compare([Run(renamed), odd]))
    data = re.findall(r'<script type="application/json">(.*?)</script>', text)
    assert data
    assert all("<" not in d and json.loads(d)["groups"] for d in data)


def test_a_page_of_ten_long_runs_stays_small(folder: Path) -> None:
    rng = np.random.default_rng(0)
    keys = [*(f"fm/block{i}" for i in range(8)), "loss/d", "loss/g_adv", "fm/share", "health/diversity", "fm/distance"]
    made = []
    for i in range(10):
        rows = [{"step": 50 * s, **dict(zip(keys, rng.uniform(size=len(keys)), strict=True))} for s in range(1, 601)]
        run = made_run(folder, f"run-{i}", **MATCHED, generator__width=4 + i // 5, seed=i, kid={100: 0.1})
        run.metrics_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        Image.fromarray(rng.integers(0, 256, (532, 532, 3), dtype=np.uint8)).save(run.samples / "step-00000100.png")
        made.append(run)
    comparison = compare(made)
    drawn = pictures(comparison, seed=0, device=torch.device("cpu"), report=Reporter(quiet_rank=True))
    assert len(page(comparison, drawn).encode()) < 3_000_000


def test_a_group_keeps_its_colour_and_the_control_is_grey(folder: Path) -> None:
    a, b, c, d = runs(folder)
    third = made_run(folder, "third", kid={100: 0.05}, **MATCHED, generator__width=9)
    for order in ([a, b, c, d, third], [c, d, a, b, third]):
        shown = [x["class"] for x in Page(page(compare(order))).of("c0")]
        assert shown
        legend = re.findall(r'<label class="(c\d)">.*?</svg>(\S+?)</label>', page(compare(order)))
        assert {name: colour for colour, name in legend} == {"plain": "c0", "matched": "c1", "third": "c2"}


# ---- pictures


@pytest.fixture
def trained(workplace: Path) -> list[str]:
    train("--steps", "3", "--name", "one", "-s", "log.every=1")
    train("--steps", "3", "--name", "two", "-s", "log.every=1", "--seed", "5", "--lambda-feature", "0")
    return ["one", "two"]


def png(source: str | None) -> Image.Image:
    assert source is not None
    return Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,"))))


def test_pictures_are_those_of_sample_for_the_same_seed(trained: list[str], workplace: Path) -> None:
    done = good("compare", *trained, "--html", "page.html", "--seed", "4", "--device", "cpu")
    assert "page.html" in done.err
    here = Page(Path("page.html").read_text())
    shown = [attrs["src"] for tag, attrs in here.tags if tag == "img"]
    assert len(shown) == 2
    for name in trained:
        good("sample", name, "--num", "64", "--seed", "4", "--out", f"{name}.png", "--device", "cpu")
    expected = {Path(f"{name}.png").read_bytes() for name in trained}
    assert {base64.b64decode((s or "").partition(",")[2]) for s in shown} == expected


def test_where_checkpoints_are_gone_the_last_samples_are_shown(trained: list[str], workplace: Path) -> None:
    shutil.rmtree("runs/two/checkpoints")
    done = good("compare", *trained, "--html", "page.html")
    here = Page(Path("page.html").read_text())
    shown = [png(attrs["src"]) for tag, attrs in here.tags if tag == "img"]
    last = Image.open("runs/two/samples/step-00000003.png")
    assert any(np.array_equal(np.asarray(last), np.asarray(image)) for image in shown)
    assert "its checkpoints are gone" in here.text
    shutil.rmtree("runs/two/samples")
    done = good("compare", *trained, "--html", "page.html")
    assert any("neither a checkpoint nor a picture" in warning for warning in done.warnings)
    assert sum(tag == "img" for tag, _ in Page(Path("page.html").read_text()).tags) == 1


def test_sheets_of_photographs_are_cut_to_whole_rows(folder: Path) -> None:
    side, count = 132, 40
    sheet = np.random.default_rng(0).integers(0, 256, (count * side + 4, 4 * side + 4, 3), dtype=np.uint8)
    made = [made_run(folder, name, task="upscale", generator__width=w) for name, w in (("a", 4), ("b", 8))]
    for run in made:
        Image.fromarray(sheet).save(run.samples / "step-00000010.png")
        Image.fromarray(sheet).save(run.samples / "step-00000100.png")
    comparison = compare(made)
    drawn = pictures(comparison, seed=0, device=torch.device("cpu"), report=Reporter(quiet_rank=True))
    for picture in drawn:
        assert picture.step == 100
        rows = (picture.height - 4) / side
        assert rows == int(rows) > 1
        assert len(drawn) * picture.width * picture.height * 3 <= BUDGET
        assert np.array_equal(np.asarray(png(base64.b64encode(picture.png).decode())), sheet[: picture.height])
    assert "low resolution, bicubic, generated, original" in Page(page(comparison, drawn)).text


# ---- in a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")

PROBE = """
addEventListener("load", () => {
  const seen = {}, root = document.documentElement;
  seen.width = innerWidth;
  seen.asked = performance.getEntriesByType("resource").map((e) => e.name).filter((name) => !name.startsWith("data:"));
  seen.overflow = root.scrollWidth - root.clientWidth;
  const tables = [...document.querySelectorAll(".scroll")].filter((e) => e.getClientRects().length);
  seen.sideways = tables.filter((e) => e.scrollWidth > e.clientWidth).length;
  const first = tables[0].querySelector("tbody tr"), decides = first.children[1].getBoundingClientRect();
  seen.decides = [decides.left >= first.children[0].getBoundingClientRect().right - 1, decides.right <= innerWidth, first.children[1].dataset.name];
  seen.small = [...document.querySelectorAll("p, h1, td, th, .value, .chart text")].filter((e) => {
    const scale = e.closest(".chart") ? e.closest(".chart").getBoundingClientRect().width / 400 : 1;
    return e.getClientRects().length && parseFloat(getComputedStyle(e).fontSize) * scale < 9.5;
  }).map((e) => e.textContent);
  const colour = (e, k) => getComputedStyle(e)[k].match(/[\\d.]+/g).map(Number);
  const light = (c) => { const [r, g, b] = c.slice(0, 3).map((v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const contrast = (a, b) => (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05);
  const paper = colour(document.body, "backgroundColor"), card = colour(document.querySelector(".card"), "backgroundColor");
  seen.dark = light(paper) < 0.2;
  seen.text = Math.min(...[...document.querySelectorAll("h1, .lead, .quiet, td, .bad")].map((e) => contrast(colour(e, "color"), paper)));
  seen.lines = Math.min(...[...document.querySelectorAll(".legend .line")].map((e) => contrast(colour(e, "stroke"), card)));
  const chart = document.querySelectorAll(".chart")[1], box = chart.getBoundingClientRect();
  chart.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + box.width / 2, clientY: box.top + 50 }));
  seen.tip = document.getElementById("tip").textContent;
  seen.tipWithin = document.getElementById("tip").getBoundingClientRect().right <= innerWidth;
  document.querySelector('[data-group="0"]').click();
  seen.hidden = getComputedStyle(document.querySelector(".chart .g0")).display;
  const picture = document.querySelector(".picture a:not(.close)"), large = document.getElementById("large");
  picture.click();
  seen.open = large.open;
  const before = large.querySelector("h3").textContent;
  large.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
  seen.turned = [before, large.querySelector("h3").textContent];
  seen.larger = large.querySelector("img").getBoundingClientRect().width;
  seen.crisp = getComputedStyle(large.querySelector("img")).imageRendering;
  large.querySelector("button").click();
  seen.closed = !large.open;
  parent.postMessage(JSON.stringify(seen), "*");
});
"""

FRAME = """<!doctype html><meta name="color-scheme" content="light dark"><title>waiting</title>
<script>addEventListener("message", (event) => { document.title = event.data; });</script>
<iframe src="%s" style="width:%dpx;height:844px;border:0"></iframe>"""
"""A window has at least 500 px; a frame can be as narrow as a phone."""


def browse(path: Path, width: int, *options: str) -> tuple[dict[str, Any], str]:
    """What the script on the page saw at this width, and what the browser logged."""
    assert CHROMIUM is not None
    frame = path.with_name(f"frame-{width}.html")
    frame.write_text(FRAME % (path.name, width))
    done = subprocess.run(
        [
            *(
                CHROMIUM,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--hide-scrollbars",
                "--virtual-time-budget=3000",
            ),
            *("--enable-logging=stderr", f"--user-data-dir={path.parent / 'profile'}", "--window-size=1400,900"),
            *options,
            *("--dump-dom", frame.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None, done.stderr
    assert title[1] != "waiting", done.stderr
    return json.loads(unescape(title[1])), done.stderr


def with_probe(text: str, probe: str) -> str:
    return text.replace("</body>", f"<script>{probe}</script></body>")


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with everything on it."""
    folder = tmp_path_factory.mktemp("page")
    made = runs(folder / "runs")
    made.append(
        made_run(
            folder / "runs", "a-rather-long-name-for-a-run-of-this-kind", **MATCHED, generator__width=9, state="stopped"
        )
    )
    for run in made:
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (274, 274), dtype=np.uint8)).save(
            run.samples / "step-00000100.png"
        )
    names = [f"{stem}_mobilenet_v2" for stem in ("fid", "precision", "recall", "density", "coverage")]
    for run in made[:-1]:
        record = run.evaluations()[-1]
        measured = dict.fromkeys((*names, "modes", "modes_kl"), 0.1234 + record["metrics"]["kid_mobilenet_v2"])
        run.add_evaluation(record | {"metrics": record["metrics"] | measured, "floor": measured})
    comparison = compare(made)
    drawn = pictures(comparison, seed=0, device=torch.device("cpu"), report=Reporter(quiet_rank=True))
    path = folder / "page.html"
    path.write_text(page(comparison, drawn))
    return path


@needs_chromium
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_and_used_at_every_size_and_scheme(opened: Path, width: int, scheme: str) -> None:
    path = opened.with_name("probed.html")
    path.write_text(with_probe(opened.read_text(), PROBE))
    seen, log = browse(path, width, f"--blink-settings=preferredColorScheme={int(scheme == 'light')}")
    assert "CONSOLE" not in log
    assert seen["width"] == width
    assert seen["asked"] == []
    assert seen["overflow"] == 0
    assert seen["small"] == []
    assert seen["decides"] == [True, True, "KID (MobileNetV2) ↓"]
    if width == 1280:
        assert seen["sideways"] == 0
    assert seen["dark"] == (scheme == "dark")
    assert seen["text"] >= 4.5  # WCAG 2.1, 1.4.3
    assert seen["lines"] >= 3  # WCAG 2.1, 1.4.11
    assert seen["tip"].startswith("step ")
    assert "matched" in seen["tip"]
    assert seen["tipWithin"]
    assert seen["hidden"] == "none"
    assert seen["open"]
    assert seen["closed"]
    assert len(set(seen["turned"])) == 2
    assert seen["larger"] > 340
    assert seen["crisp"] == "pixelated"


WITHOUT_SCRIPT = """
addEventListener("load", async () => {
  const seen = {}, picture = document.querySelector(".picture"), link = picture.querySelector("a");
  const looks = () => [getComputedStyle(picture).position, getComputedStyle(picture.querySelector(".close")).display];
  const follow = (a) => new Promise((done) => { addEventListener("hashchange", done, { once: true }); a.click(); });
  seen.curves = [...document.querySelectorAll(".chart .line")].filter((e) => e.getBoundingClientRect().height).length;
  seen.promised = [...document.querySelectorAll(".scripted")].filter((e) => e.getClientRects().length).length;
  seen.before = looks();
  await follow(link);
  seen.large = looks();
  await follow(picture.querySelector(".close"));
  seen.after = looks();
  parent.postMessage(JSON.stringify(seen), "*");
});
"""


@needs_chromium
def test_it_is_whole_without_its_script(opened: Path) -> None:
    own = re.compile(r"<script>.*?</script>", re.DOTALL)
    text = opened.read_text()
    assert len(own.findall(text)) == 1
    path = opened.with_name("still.html")
    path.write_text(with_probe(own.sub("", text), WITHOUT_SCRIPT))
    seen, _ = browse(path, 390)
    assert seen["curves"] > 10
    assert seen["promised"] == 0
    assert (seen["before"], seen["large"], seen["after"]) == (
        ["static", "none"],
        ["fixed", "block"],
        ["static", "none"],
    )
