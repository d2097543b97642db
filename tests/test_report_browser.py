"""The report in a real browser: headless Chromium. Where there is none these are skipped, and the reason says so."""

import json
import random
import struct

import pytest
from browser import NAMES, Browser, found
from runs_made import make_run, sample, write

from rlpost.report.command import write_report

REASON = f"needs a browser (none of {', '.join(NAMES)}): apt-get install chromium"
pytestmark = [pytest.mark.skipif(found() is None, reason=REASON), pytest.mark.slow, pytest.mark.timeout(600)]
SECTIONS = [
    "Summary",
    "Alarms",
    "Evaluation",
    "Learning",
    "Scaling",
    "Difficulty and curriculum",
    "Exploration",
    "Health",
    "Time and cost",
    "Rollouts",
    "Recipe",
    "Every figure",
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("runs") / "run", name="one", steps=40, samples=3)
    return write_report([folder], folder / "report.html")


def whole(browser, width, dark=False):
    """Every chart of the page drawn, in a window as high as the page."""
    for _ in range(2):
        browser.window(width, browser.run("document.documentElement.scrollHeight"), dark=dark)
        browser.wait("drawn()")


def samples(page):
    return [json.loads(line) for line in (page.parent / "samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_nothing_overlaps_or_leaves_the_window_and_all_can_be_read(browser, page, width, dark):
    browser.window(width, 900, dark=dark)
    browser.open(page)
    assert browser.ask("texts('h2')") == SECTIONS
    whole(browser, width, dark)
    assert browser.ask("overflow()") <= 0
    assert browser.ask("outside()") == []
    assert browser.ask("meeting()") == []
    contrast, what = browser.ask("contrast()")
    assert contrast >= 4.5, what
    assert (max(browser.ask("background()")) < 60) == dark
    assert struct.unpack(">I", browser.picture()[16:20]) == (width,)
    assert browser.errors == []


def test_the_page_asks_for_nothing(browser, page):
    before = len(browser.requests)
    browser.open(page)
    whole(browser, 1400)
    asked = {url for url in browser.requests[before:] if not url.startswith("data:image/png;base64,")}
    assert asked <= {page.resolve().as_uri(), "about:blank"}


def test_charts_have_their_points_tables_and_keys(browser, page):
    browser.window(1400, 900)
    browser.open(page)
    whole(browser, 1400)
    assert browser.ask("points('Reward')") == 40
    browser.ask("figure('Reward').querySelector('details').open = true")
    browser.wait("rows('Reward') === 40")
    browser.ask("figure('Reward').querySelector('svg').focus()")
    browser.press("End")
    browser.wait("tip('Reward').startsWith('step 40')")
    browser.press("ArrowLeft")
    browser.wait("tip('Reward').startsWith('step 39')")
    browser.choose("horizontal axis", "tokens")
    browser.wait("figure('Reward').querySelector('svg').ariaLabel.startsWith('Reward, by tokens')")


def test_rollouts_can_be_filtered_paged_and_read(browser, page):
    browser.window(1400, 900)
    browser.open(page)
    browser.wait("count() === '120 of 120 rollouts' && reader().includes('Step 40')")
    browser.run("document.querySelector('.list').focus()")
    browser.press("ArrowDown")
    browser.wait("reader().includes('2 of 120')")
    browser.press("End")
    browser.wait("reader().includes('120 of 120') && reader().includes('Step 1,')")
    assert browser.ask("all('.list .row').length") < 60, "only rows that are seen are there"
    browser.choose("to step", 5)
    browser.wait("count() === '15 of 120 rollouts'")
    browser.choose("least reward", 1)
    right = sum(row["reward"] == 1 and row["step"] < 5 for row in samples(page))
    browser.wait(f"count() === '{right} of 120 rollouts' && reader().includes('1 of {right}')")
    assert "not trained on" not in browser.ask("reader()")
    assert any("var(--pos)" in ink for ink in browser.ask("inks()")), "a positive advantage"
    browser.choose("colour tokens by", "logp_diff")
    browser.wait("inks().length > 2")


def test_text_of_a_model_is_shown_and_never_run(browser, tmp_path):
    tokens = ["</script>", "<script>window.hacked=1</script>", "<img src=x onerror=window.hacked=2>"]
    tokens += [" \U0001f4a9\u0301", "\u202e", "{{7*7}} ${alert(1)}"]
    hostile = "".join(tokens)
    folder = make_run(tmp_path / "run", name=hostile, samples=0)
    row = sample(3, random.Random(0), tokens) | {"hint": hostile, "level": 1, "role": "guided", "parts": {hostile: 0.5}}
    write(folder / "samples.jsonl", [row | dict.fromkeys(("prompt", "task", "answer", "finish_reason"), hostile)])
    browser.window(1400, 900)
    browser.open(write_report([folder], tmp_path / "report.html"))
    browser.wait("reader().includes('Step 4')")
    assert browser.ask("texts('.t')") == tokens
    assert browser.ask("texts('.read pre')")[:2] == [hostile, hostile]
    assert browser.ask("texts('h1')") == [hostile]
    assert browser.run("window.hacked === undefined") is True
    assert browser.ask("all('img:not(.fit img)').length") == 0
    assert browser.errors == []


def test_a_script_that_got_in_would_not_run(browser, page, tmp_path):
    """The policy in the head: a browser that were handed a script of somebody else would refuse it."""
    worse = tmp_path / "worse.html"
    worse.write_text(page.read_text().replace("</main>", "</main><script>window.hacked = 1</script>"))
    seen = len(browser.errors)
    browser.open(worse)
    assert browser.run("window.hacked === undefined") is True
    refused = browser.errors[seen:]
    del browser.errors[seen:]
    assert any("Content Security Policy" in text for text in refused)


def test_runs_side_by_side_with_seeds_together(browser, tmp_path):
    made = [("low-1", 1, 1e-6), ("low-2", 2, 1e-6), ("high", 1, 2e-6)]
    folders = [make_run(tmp_path / name, name=name, seed=seed, lr=lr) for name, seed, lr in made]
    browser.window(1400, 900)
    browser.open(write_report(folders, tmp_path / "report.html"))
    whole(browser, 1400)
    assert browser.ask("legend('Reward')") == ["low, 2 seeds", "high"]
    browser.run("document.querySelector('#controls [type=checkbox]').click()")
    browser.wait("legend('Reward').join() === 'low-1,low-2,high'")
    fields = browser.ask("texts('[aria-label=\"Fields that differ\"] tbody td:first-child')")
    assert sorted(fields) == ["engine.lr", "name", "seed"]
    assert browser.ask("overflow()") <= 0 and browser.errors == []


def test_a_thousand_steps_and_ten_thousand_rollouts_stay_fast(browser, tmp_path):
    """Compared with a page of few, so that a slow machine does not fail it."""
    browser.window(1400, 900)
    small = write_report([make_run(tmp_path / "small", steps=20)], tmp_path / "small.html")
    few = min(browser.open(small) for _ in range(3))
    folder = make_run(tmp_path / "large", steps=1000, samples=10)
    large = write_report([folder], folder / "report.html")
    many = min(browser.open(large) for _ in range(3))
    browser.wait("count() === '10000 of 10000 rollouts'")
    assert browser.ask("all('.list .row').length") < 60
    assert many < 10 * few + 2, f"{few:.2f} s with 20 steps, {many:.2f} s with 1000"
    browser.choose("text in problem, answer or task", "What is 7 +")
    wanted = sum("What is 7 +" in row["prompt"] for row in samples(large))
    browser.wait(f"count() === '{wanted} of 10000 rollouts'")
