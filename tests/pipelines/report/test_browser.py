"""The page as a browser shows it: narrow and wide, light and dark, on paper, to a screen reader."""

import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipelines.__main__ import app
from pipelines.evaluation.metrics import summarise
from pipelines.report.page import write_report
from pipelines.report.pdf import BROWSERS
from tests.browser import Browser
from tests.pipelines.evaluation.metrics.test_summary import full_samples
from tests.pipelines.evaluation.test_verdict import scores_of
from tests.pipelines.report.test_page import write_run

HAS_BROWSER = any(map(shutil.which, BROWSERS))
needs_browser = pytest.mark.skipif(not HAS_BROWSER, reason="needs chromium or Chrome")

# Texts whose contrast with what lies behind them is under WCAG's 4.5, or 3 where they are large.
PALE = """
(() => {
  const parts = colour => colour.match(/[\\d.]+/g).map(Number);
  const light = colour => {
    const [r, g, b] = parts(colour).map(value => value / 255)
      .map(value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = element => {
    for (; element; element = element.parentElement) {
      const colour = getComputedStyle(element).backgroundColor;
      const alpha = parts(colour)[3];
      if (alpha === undefined || alpha === 1) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const pale = [];
  for (const element of document.querySelectorAll("body *")) {
    const words = [...element.childNodes].filter(node => node.nodeType === 3)
      .map(node => node.data.trim()).join(" ").trim();
    if (!words || !element.checkVisibility()) continue;
    const style = getComputedStyle(element);
    const [low, high] = [light(style.color), light(behind(element))].sort((a, b) => a - b);
    const large = parseFloat(style.fontSize) >= 24;
    if ((high + 0.05) / (low + 0.05) < (large ? 3 : 4.5)) pale.push(words.slice(0, 40));
  }
  return pale;
})()
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with all of its parts."""
    samples = full_samples()
    entry = summarise(samples, samples)
    attacked = {
        "relearn.steps": 5.0,
        "relearn.probability.0": 0.4,
        "relearn.probability.10": 0.6,
        "quantised_4bit.forget.probability": 0.5,
    }
    scores = scores_of(before=entry, after=entry | attacked, oracle=entry | attacked)
    tokens = {"oracle": [-6.0, -0.1], "before": [-0.1, 0.0], "after": [-5.0, -3.0]}
    scores |= {"tokens": tokens, "intervals": {"after": {"forget.rouge": [0.2, 0.7]}}}
    earlier = {"run": "runs/" + 80 * "x", "created": "2026-10-05T08:30:00Z", "manifest": 64 * "0"}
    manifest = {
        "created": "2026-10-06T08:30:00Z",
        "strengths": [{"strength": 0.004, "gap": -0.25}],
        "sets": {"forget": {"rows": 9, "digest": 64 * "a"}, "holdout": {"rows": 9}},
        "request": {"number": 2, "earlier": [earlier], "rows": []},
        "files": {"model/" + 80 * "y": 64 * "b"},
        "cost": {"solve_s": 3.0, "train_s": 4.0, "evaluate_s": 5.0},
    }
    return write_report(write_run(tmp_path_factory.mktemp("run"), scores, manifest))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@needs_browser
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_cut_off_pale_or_fetched(
    browser: Browser, page: Path, width: int, scheme: str
) -> None:
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.call("Emulation.setEmulatedMedia", features=[feature])
    browser.call(
        "Emulation.setDeviceMetricsOverride",
        width=width, height=800, deviceScaleFactor=1, mobile=False,
    )  # fmt: skip
    browser.open(page)
    browser.value("document.querySelectorAll('details').forEach(part => part.open = true)")
    assert browser.value("innerWidth") == width
    page_width, shown = browser.value(
        "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert page_width == shown, "nothing to scroll to on the right"
    assert browser.value("getComputedStyle(document.body).backgroundColor") == {
        "light": "rgb(255, 255, 255)", "dark": "rgb(21, 24, 29)"
    }[scheme]  # fmt: skip
    assert browser.value(PALE) == []
    assert browser.value("[...document.images].every(image => image.naturalWidth > 0)")
    requests = [
        event["params"]["request"]["url"]
        for event in browser.events
        if event["method"] == "Network.requestWillBeSent"
    ]
    outside = [url for url in requests if not url.startswith(("data:", page.as_uri()))]
    assert requests and outside == []
    told = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
    assert [event for event in browser.events if event["method"] in told] == []


@needs_browser
def test_a_screen_reader_and_a_keyboard_find_their_way(browser: Browser, page: Path) -> None:
    browser.open(page)
    headings = browser.value(
        "[...document.querySelectorAll('h1, h2, h3')].map(heading => +heading.tagName[1])"
    )
    assert headings[0] == 1 and headings.count(1) == 1
    for above, heading in pairwise(headings):
        assert heading <= above + 1, "no level is left out"
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    names: dict[str, list[str]] = {}
    for node in nodes:
        role = node.get("role", {}).get("value", "")
        names.setdefault(role, []).append(node.get("name", {}).get("value", ""))
    assert names["table"] == [
        "What attacks bring back, by model",
        "All scores, by model",
        "Strengths that were tried",
        "Requests that this model has answered",
    ]
    assert names["image"] and all(names["image"])
    assert {"Score", "before", "after", "oracle"} <= set(names["columnheader"])
    parts = browser.value("document.querySelectorAll('summary, a').length")
    reached: set[str] = set()
    for _ in range(parts):
        for kind in ("keyDown", "keyUp"):
            browser.call("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab")
        reached.add(browser.value("document.activeElement.textContent"))
    assert len(reached) == parts


@needs_browser
def test_a_report_is_printed(page: Path) -> None:
    told = CliRunner().invoke(app, ["report", str(page.parent), "--format", "pdf"])
    path = page.with_suffix(".pdf")
    assert (told.exit_code, told.output) == (0, f"Report: {path}\n")
    printed = path.read_bytes()
    assert printed.startswith(b"%PDF-")
    assert printed.count(b"/Type /Page\n") > 2


def test_without_a_browser_it_is_said_what_to_do(
    page: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    told = CliRunner().invoke(app, ["report", str(page.parent), "--format", "pdf"])
    assert told.exit_code == 2
    assert told.stderr.startswith("--format: pdf is printed by a browser, and none of these")
    assert len(told.stderr.splitlines()) == 1
    assert page.exists()
