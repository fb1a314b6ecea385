"""``pgl report``: the page's numbers and pictures, what it escapes, and the page in a real browser."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pgl.cache.volumes import VolumeCache
from pgl.cli import main
from pgl.pictures.examples import choose_pairs
from pgl.pictures.style import window
from pgl.pretrain import pretrain
from pgl.report import pairs as pairs_module
from pgl.report import report_line, write_report
from pgl.report.curves import MOST_POINTS, charts_of_run, charts_of_runs, smoothed
from pgl.report.pairs import characters, pictures_of
from pgl.report.sprites import difference_sprite, fitted, grey_sprite
from pgl.runs.facts import read_run

from .browser import Browser, find_chromium
from .run_files import training_line, validation_line, write_run
from .training_data import make_cache, small_config

HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">&amp;"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    before = torch.get_num_threads()
    try:
        return pretrain(small_config(make_cache(folder / "cache"), folder / "run", steps=4))
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def page(run: Path) -> Path:
    path, lacking = write_report(run, run.parent / "page.html", pairs=2)
    assert lacking == []
    return path


def data_of(page: Path) -> dict[str, Any]:
    found = re.search(
        r'<script type="application/json" id="data">(.*?)</script>', page.read_text("utf-8"), re.S
    )
    assert found is not None
    parsed: dict[str, Any] = json.loads(found[1])
    return parsed


def pixels(sprite: dict[str, Any]) -> np.ndarray:
    """The slices of a sprite, as a browser decodes them: [D, H, W] of grey or [D, H, W, 3]."""
    file = base64.b64decode(sprite["source"].removeprefix("data:image/png;base64,"))
    image = Image.open(io.BytesIO(file))
    values = np.asarray(image.convert("RGB") if image.mode == "P" else image)
    return values.reshape(sprite["slices"], sprite["height"], sprite["width"], *values.shape[2:])


# --- curves ---


def chart(charts: list[dict[str, Any]], title: str) -> dict[str, Any]:
    return next(chart for chart in charts if chart["title"] == title)


def test_the_curves_hold_the_runs_numbers(tmp_path):
    lines = [validation_line(0, 0.05), *(training_line(s, 2 - s / 10) for s in range(1, 4))]
    lines.append(validation_line(3, 0.2))
    charts = charts_of_run(read_run(write_run(tmp_path / "run", lines)))
    training, _, validation = chart(charts, "Loss")["curves"]
    assert training["points"] == [[1, 1.9], [2, 1.8], [3, 1.7]]
    assert validation["points"] == [[0, 1.0], [3, 1.0]]
    matching = chart(charts, "Matching accuracy")
    assert matching["curves"][0]["points"] == [[0, 0.05], [3, 0.2]]
    assert {line["name"]: line["y"] for line in matching["lines"]} == {"untrained": 0.05, "chance": 0.03}
    assert chart(charts, "Feature spread")["zone"]["below"] == 0.0  # the run's own threshold


def test_a_number_that_is_not_finite_is_a_gap(tmp_path):
    lines = [training_line(1), training_line(2, math.nan), training_line(3, math.inf), training_line(4)]
    training, *_ = chart(charts_of_run(read_run(write_run(tmp_path / "run", lines))), "Loss")["curves"]
    assert [y for _, y in training["points"]] == [1.0, None, None, 1.0]


def test_a_straight_line_is_its_own_running_mean_but_for_its_end():
    straight = [[step, 3.0 - step / 50] for step in range(100)]
    assert np.allclose(smoothed(straight)[:95], straight[:95], atol=1e-5)


def test_a_jagged_line_is_smooth_up_to_its_last_point():
    jagged = [[step, 1.0 + (-1) ** step] for step in range(100)]
    assert np.ptp([y for _, y in smoothed(jagged)[10:]]) < 0.5


def test_a_long_run_is_averaged_to_few_points_that_keep_its_mean(tmp_path):
    rng = np.random.default_rng(0)
    losses = rng.uniform(0, 2, 5000)
    lines = [training_line(s + 1, float(loss)) for s, loss in enumerate(losses)]
    training, *_ = chart(charts_of_run(read_run(write_run(tmp_path / "run", lines))), "Loss")["curves"]
    points = training["points"]
    assert len(points) <= MOST_POINTS and points[-1][0] == 5000
    assert points[0][1] == pytest.approx(losses[:5].mean(), rel=1e-5)
    assert np.mean([y for _, y in points]) == pytest.approx(losses.mean(), rel=1e-4)


def test_several_runs_share_axes_and_keep_their_colours(tmp_path):
    names = ["first", "second"]
    runs = [
        read_run(write_run(tmp_path / name, [validation_line(0, accuracy), training_line(1)]))
        for name, accuracy in zip(names, (0.1, 0.3), strict=True)
    ]
    for compared in charts_of_runs(runs, names):
        assert [(curve["name"], curve["colour"]) for curve in compared["curves"]] == [
            ("first", 0),
            ("second", 1),
        ]
    matching = chart(charts_of_runs(runs, names), "Matching accuracy")
    assert [curve["points"] for curve in matching["curves"]] == [[[0, 0.1]], [[0, 0.3]]]


# --- sprites and pairs ---


def test_a_grey_sprite_is_the_windowed_volume():
    hu = torch.linspace(-300, 400, 3 * 5 * 7).view(3, 5, 7)
    shown = pixels(grey_sprite(hu, 10_000))
    assert np.array_equal(shown, np.rint(window(hu.numpy()) * 255).astype(np.uint8))


def test_a_difference_is_white_where_there_is_none_and_red_where_the_first_is_denser():
    first, second = torch.zeros(1, 1, 3), torch.tensor([[[0.0, -250.0, 250.0]]])
    none, denser, lighter = pixels(difference_sprite(first, second, 100))[0, 0].astype(int)
    assert none.min() >= 240
    assert denser[0] > denser[2] + 50 and lighter[2] > lighter[0] + 50


@pytest.mark.parametrize("shape", [(64, 192, 192), (3, 500, 400), (300, 20, 20), (1, 1, 1)])
def test_a_volume_is_fitted_into_its_budget_and_keeps_its_mean(shape):
    volume = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    small = fitted(volume, 60_000)
    assert small.numel() <= 60_000
    assert float(small.mean()) == pytest.approx(float(volume.mean()), abs=0.01)


def test_pictures_that_would_make_the_page_too_large_are_made_smaller(run, monkeypatch):
    large = pictures_of(run, 2)
    whole = characters(large.pairs) + characters(large.slab)
    limit = int(0.7 * whole)
    monkeypatch.setattr(pairs_module, "MOST_CHARACTERS", limit)
    small = pictures_of(run, 2)
    assert characters(small.pairs) + characters(small.slab) <= limit
    before, after = (of.pairs[0]["views"][0]["sprite"] for of in (large, small))
    assert pixels(before).size == 4 * 16 * 16  # all of the view
    assert 0 < pixels(after).size < pixels(before).size


def test_all_pictures_of_a_pair_show_the_same_depth(tmp_path):
    # In a volume whose value is its own depth, each picture tells the depth that it shows.
    depth = np.broadcast_to(np.arange(14)[:, None, None] * 20.0 - 120, (14, 40, 44)).astype(np.int16)
    cache = make_cache(tmp_path / "cache", {"ramp": depth})
    folder = pretrain(small_config(cache, tmp_path / "run", steps=2))
    seen = 0
    for pair in pictures_of(folder, 6).pairs:
        slices = pair["shared"][0]["slices"]
        for k in range(slices):
            t = (k + 0.5) / slices
            values = [pixels(sprite)[k].mean() for sprite in pair["shared"]]
            for view in pair["views"]:
                at = view["depth"][0] + t * view["depth"][1]
                shown = pixels(view["sprite"])[min(max(math.floor(at), 0), view["slices"] - 1)].mean()
                # Half a slice of the view, 1.4 voxels at most, of 20 HU each; a voxel's border repeats.
                values.append(shown)
                seen += 1
            assert np.ptp(values) < 1.4 * 20 / 400 * 255
    assert seen > 30


def test_the_region_is_drawn_where_the_geometry_placed_it(run):
    config = small_config(run.parent / "cache", run, steps=4)
    chosen = choose_pairs(VolumeCache(config.data), config, 2)
    for number, pair in enumerate(pictures_of(run, 2).pairs):
        for v, view in enumerate(pair["views"]):
            d1, h1, w1, d2, h2, w2 = chosen.placed[number + 2 * v].tolist()
            flips = chosen.batch.pairs.flips[number, v].tolist()
            assert view["region"] == pytest.approx([w1 / 16, h1 / 16, (w2 - w1) / 16, (h2 - h1) / 16])
            assert view["mark"] == [int(flips[2]), int(flips[1])]
            ends = [view["depth"][0], sum(view["depth"])]
            assert ends == pytest.approx([d2, d1] if flips[0] else [d1, d2])
        before, after = pair["features"]
        assert not np.array_equal(pixels(before[0]), pixels(after[0]))


def test_a_whole_u_net_shows_its_decoders_features(run, tmp_path):
    config = small_config(run.parent / "cache", tmp_path / "run", steps=2)
    config.method.features, config.method.feature_level = "decoder", 0
    config.method.aligned_size = (4, 8, 8)
    pictures = pictures_of(pretrain(config), 1)
    assert pixels(pictures.pairs[0]["features"][1][0]).shape == (4, 8, 8, 3)
    slab = pixels(pictures.slab["features"][1])
    assert slab.shape[1:3] == (40, 44)  # as fine as the volume
    assert np.ptp(slab) > 100


# --- the page as a file ---


class Tags(HTMLParser):
    """The tags of a page with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


def test_the_page_refers_to_nothing_outside_of_itself(page):
    text = page.read_text("utf-8")
    for tag, attributes in Tags(text).seen:
        for name in ("src", "href", "srcset", "action", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, value)
    assert "default-src 'none'" in text
    style = re.search(r"<style>(.*?)</style>", text, re.S)
    assert style is not None and "url(" not in style[1] and "@import" not in style[1]
    assert len(text) < 6e6


def test_text_from_files_is_never_markup(tmp_path):
    folder = write_run(
        tmp_path / "<b>run</b>",
        [validation_line(0, 0.05), training_line(2), validation_line(2, 0.2)],
        log=[f"WARNING {HOSTILE}"],
        starts=[{"time": HOSTILE, "command": ["pgl", HOSTILE], HOSTILE: 1}],
        cases=[HOSTILE, "\udcff.nii"],
    )
    text = write_report(folder, tmp_path / "page.html", pairs=0)[0].read_text("utf-8")
    tags = [tag for tag, _ in Tags(text).seen]
    assert "img" not in tags and "b" not in tags
    assert tags.count("script") == 2
    assert "&lt;img src=x" in text and "\\udcff.nii" in text


def test_a_run_without_its_cache_has_a_page_that_says_so(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    words = ["report", str(tmp_path / "run"), "--data", str(tmp_path / "nowhere")]
    assert main(words) == 0
    out = capsys.readouterr().out
    path = tmp_path / "run" / "report.html"
    assert out.startswith(f"{path}: open it in a browser\n  without pictures: ")
    assert "nowhere" in out and "--data" in out
    assert "This page is without pictures" in path.read_text("utf-8")
    assert data_of(path)["pairs"] == [] and len(data_of(path)["charts"]) == 6


def test_several_runs_are_compared_with_the_settings_that_differ(tmp_path, capsys):
    folders = []
    for name, steps in (("short", 50), ("long", 100)):
        lines = [validation_line(0, 0.05), training_line(steps), validation_line(steps, steps / 200)]
        folders.append(str(write_run(tmp_path / name, lines, steps)))
    page = tmp_path / "compared.html"
    assert main(["report", *folders, "--output", str(page)]) == 0
    text = page.read_text("utf-8")
    assert "2 pretraining runs compared" in text
    assert "<code>train.steps</code>" in text and "<code>train.batch_size</code>" not in text
    assert "0.2500 at step 50" in text and "0.5000 at step 100" in text


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "missing RUN"),
        (["a", "b"], 2, "several runs need --output"),
        (["a", "--pairs", "-1"], 2, "--pairs must be at least 0"),
        (["nowhere"], 1, "no run at nowhere"),
    ],
)
def test_what_cannot_be_reported_is_one_line(words, code, message, capsys):
    assert main(["report", *words]) == code
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_nothing_measured_is_said(tmp_path):
    with pytest.raises(ValueError, match="nothing was measured yet"):
        write_report(write_run(tmp_path / "run", []))


def test_the_line_for_the_end_of_a_run_never_fails(run, tmp_path):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("report.html"))
    assert report_line(tmp_path / "run") == f"report: {tmp_path / 'run' / 'report.html'}"
    (tmp_path / "run" / "metrics.jsonl").unlink()
    line = report_line(tmp_path / "run")
    assert line.startswith("no report.html: no ") and "metrics.jsonl" in line and "pgl report" in line


# --- the page in a browser ---

needs_browser = pytest.mark.skipif(
    find_chromium() is None, reason="no Chromium: install one, or name it in PGL_CHROMIUM"
)
FRAME = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser(1280, 900) as opened:
        yield opened


def shown(browser: Browser) -> list[str]:
    """What each canvas of the first pair shows."""
    script = "[...document.querySelectorAll('.pair')[0].querySelectorAll('canvas')].map(c => c.toDataURL())"
    pictures: list[str] = browser.run(script)
    return pictures


def middle_of(browser: Browser, selector: str) -> tuple[float, float]:
    """Scroll an element into view; the middle of it in what is seen."""
    browser.run(f"document.querySelector({selector!r}).scrollIntoView({{block: 'center'}})")
    browser.run(FRAME)
    box = browser.run(
        f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])"
        f"(document.querySelector({selector!r}).getBoundingClientRect())"
    )
    return box[0], box[1]


def no_complaint_and_no_request(browser: Browser, page: Path) -> None:
    assert browser.run("document.documentElement.dataset.ready") == "true"
    assert browser.complaints == []
    asked = [address for address in browser.requests if not address.startswith("data:")]
    assert asked == [page.resolve().as_uri()]


@needs_browser
@pytest.mark.parametrize(
    ("width", "dark"), [(1280, False), (390, True)], ids=["desktop", "phone in the dark"]
)
def test_the_page_opens_without_a_complaint_or_a_request_and_fits(page, width, dark):
    with Browser(width, 844, mobile=width < 500, dark=dark) as browser:
        browser.open(page)
        no_complaint_and_no_request(browser, page)
        assert browser.run("document.documentElement.scrollWidth") == width
        assert browser.run("document.querySelectorAll('.chart path').length") >= 8
        # Every canvas shows something: it is not one colour.
        assert browser.run(
            "[...document.querySelectorAll('canvas')].every(c => new Set(new Uint32Array(c.getContext('2d')"
            ".getImageData(0, 0, c.width, c.height).data.buffer)).size > 1)"
        )
        light = browser.run(
            "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0] > 128"
        )
        assert light != dark
        assert browser.run(CONTRASTS) >= 4.5  # WCAG's AA for text


# The least contrast of any text with what lies behind it, by WCAG's formula.
CONTRASTS = """(() => {
  const light = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map(Number).map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if (!colour.startsWith('rgba(0, 0, 0, 0')) return colour;
    }
    return 'rgb(255, 255, 255)';
  };
  const texts = [...document.querySelectorAll('main *')].filter(e =>
    [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()) && e.tagName !== 'NOSCRIPT');
  return Math.min(...texts.map(e => {
    const style = getComputedStyle(e);
    const [a, b] = [light(e instanceof SVGElement ? style.fill : style.color), light(behind(e))];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  }));
})()"""


@needs_browser
def test_the_slider_changes_every_picture_of_its_pair(browser, page):
    browser.open(page)
    before = shown(browser)
    assert len(before) == 9  # two views, two shared, their difference, features of two networks
    browser.run(
        "(s => { s.value = 0; s.dispatchEvent(new Event('input')); })"
        "(document.querySelector('.pair > label.slider input'))"
    )
    first = shown(browser)
    browser.run(
        "(s => { s.value = s.max; s.dispatchEvent(new Event('input')); })"
        "(document.querySelector('.pair > label.slider input'))"
    )
    last = shown(browser)
    assert all(a != b for a, b in zip(first, last, strict=True))
    assert last != before
    no_complaint_and_no_request(browser, page)


@needs_browser
def test_the_slice_shown_is_the_one_that_the_slider_says(browser, page):
    browser.open(page)
    sprite = data_of(page)["pairs"][0]["views"][0]["sprite"]
    for k in range(sprite["slices"]):
        browser.run(
            f"(s => {{ s.value = {k}; s.dispatchEvent(new Event('input')); }})"
            "(document.querySelector('.pair figure label.slider input'))"
        )
        seen = browser.run(
            "(c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]"
            ".filter((_, i) => i % 4 == 0))(document.querySelector('.pair canvas'))"
        )
        assert np.array_equal(np.reshape(seen, pixels(sprite)[k].shape), pixels(sprite)[k])
        label = browser.run("document.querySelector('.pair figure label.slider output').textContent")
        assert label == f"slice {k + 1} of {sprite['slices']}"


@needs_browser
def test_the_wheel_turns_slices_only_after_a_click_and_keys_do_too(browser, page):
    browser.open(page)
    x, y = middle_of(browser, ".pair canvas")
    before, scrolled = shown(browser), browser.run("scrollY")
    browser.mouse("mouseWheel", x, y, deltaX=0, deltaY=120)
    browser.run("new Promise(done => setTimeout(done, 300))")
    assert shown(browser) == before
    assert browser.run("scrollY") > scrolled  # the page's own wheel

    x, y = middle_of(browser, ".pair canvas")
    browser.click(x, y)
    scrolled = browser.run("scrollY")
    slices = [browser.run("document.querySelector('.pair figure input').value")]
    for act in (
        lambda: browser.mouse("mouseWheel", x, y, deltaX=0, deltaY=120),
        lambda: browser.press("ArrowUp"),
        lambda: browser.press("ArrowUp"),
    ):
        act()
        browser.run("new Promise(done => setTimeout(done, 100))")
        slices.append(browser.run("document.querySelector('.pair figure input').value"))
    start = int(slices[0])
    assert [int(value) for value in slices] == [start, start + 1, start, start - 1]
    assert browser.run("scrollY") == scrolled
    no_complaint_and_no_request(browser, page)


@needs_browser
def test_pointing_at_a_curve_reads_the_numbers_of_that_step(browser, page, run):
    browser.open(page)
    losses = {line["step"]: line["loss"] for line in read_run(run).train}
    middle_of(browser, ".chart svg")
    left, top, width, height = browser.run(
        "(({x, y, width, height}) => [x, y, width, height])"
        "(document.querySelector('.chart svg').getBoundingClientRect())"
    )
    browser.mouse("mouseMoved", left + width - 2, top + height / 2)
    at_end = browser.run("document.querySelector('.chart .legend').textContent")
    assert at_end.startswith("step 4") and f"{losses[4]:.4g}" in at_end
    browser.run("document.querySelector('.chart svg').focus()")
    browser.press("ArrowLeft")
    before = browser.run("document.querySelector('.chart .legend').textContent")
    assert before.startswith("step 3") and f"{losses[3]:.4g}" in before


@needs_browser
def test_hostile_names_do_nothing_in_the_browser(browser, tmp_path):
    lines = [validation_line(0, 0.05), training_line(2), training_line(4), validation_line(4, 0.2)]
    more = {"log": [f"WARNING {HOSTILE}"], "starts": [{"time": HOSTILE}], "cases": [HOSTILE]}
    folders = [write_run(tmp_path / name, lines, **more) for name in ("<i>one", "two&amp;")]
    single = write_report(folders[0], tmp_path / "single.html", pairs=0)[0]
    several = write_report(folders, tmp_path / "several.html")[0]
    for path in (single, several):
        browser.open(path)
        no_complaint_and_no_request(browser, path)
        assert browser.run("document.title") != "owned"
        assert browser.run("document.querySelectorAll('img, i').length") == 0
    names = browser.run("document.querySelector('.legend').textContent")
    assert "<i>one" in names and "two&amp;" in names
