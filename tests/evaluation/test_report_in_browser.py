"""The report in a real browser: what a reader sees, points at, and types."""

import json
import math

import pytest

from rlkd_trl.evaluation.report import write_report
from rlkd_trl.evaluation.run_log import RunLog
from tests.evaluation.browser import CHROMIUM, Browser

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)"),
]

HOSTILE = """</p></script><script>document.title = "hacked"</script><img src=x onerror='document.title = "hacked"'>"""
REWARDS = [0.123456, -4.5, 7.25]
HISTORY = [
    {"step": 10, "reward": 0.1234567890123, "approx_kl": 1e-9, HOSTILE: 1.0},
    {"step": 20, "reward": math.nan, "approx_kl": 3e-9, HOSTILE: 2.0},
    {"step": 30, "reward": -7.5, "approx_kl": 2e-9, HOSTILE: 3.0},
]


def completion(step, total, *, prompt="the prompt", kind="rollout", ended=True, tokens=("a", " b", "</s>"), **more):
    text = "".join(tokens)
    return {
        **{"step": step, "kind": kind, "by": "student", "prompt": prompt, "text": text, "tokens": list(tokens)},
        **{"reward": REWARDS[: len(tokens)], "q": REWARDS[: len(tokens)], "total": total, "ended": ended, **more},
    }


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    held_out = {"prompt": HOSTILE, "kind": "held-out", "references": [HOSTILE], "tokens": (HOSTILE, "</s>")}
    completions = [
        completion(0, 1.0, **{**held_out, "by": "teacher"}),
        completion(0, 2.0, **held_out),
        *(completion(step, step % 97, ended=step % 2 == 0) for step in range(1, 9_999)),
    ]
    log = RunLog(HOSTILE, {HOSTILE: {"bleu": 1.0}}, HISTORY, config={"x": HOSTILE}, completions=completions)
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, {HOSTILE: log})
    with Browser() as browser:
        browser.open(path)
        yield browser


def text_of(page, selector):
    return page.run(f"document.querySelector({json.dumps(selector)}).textContent")


def choose(page, identifier, value):
    page.run(
        f"(() => {{ const e = document.getElementById({identifier!r}); e.value = {value!r};"
        " e.dispatchEvent(new Event('input', {bubbles: true})); })()"
    )


def test_hostile_text_is_shown_and_does_nothing(page):
    choose(page, "kind", "prompt 0")
    assert page.run("document.title") == HOSTILE == text_of(page, "h1")
    assert text_of(page, ".tokens span") == HOSTILE
    assert page.run("[...document.querySelectorAll('dd')].map((e) => e.textContent)") == [HOSTILE, HOSTILE]
    assert page.run("document.images.length") == 0 and page.run("document.scripts.length") == 2
    # A script that got in all the same would not run: the page allows its own by its hash only.
    script = "(() => { const s = document.createElement('script'); s.textContent = 'document.title = 1'; %s })()"
    page.run(script % "document.body.append(s);")
    assert page.run("document.title") == HOSTILE
    assert any("Content Security Policy" in problem for problem in page.problems)
    page.problems.clear()


def test_pointing_at_a_curve_and_arrow_keys_read_the_logged_numbers(page):
    page.hover(".chart svg", across=0.99)
    assert text_of(page, ".chart output") == "step 30: -7.5"
    page.run("document.querySelector('.chart svg').focus()")
    page.press("ArrowLeft")
    assert text_of(page, ".chart output") == "step 20: not finite"
    page.press("Home")
    assert text_of(page, ".chart output") == "step 10: 0.1234567890123"
    choose(page, "smoothing", "0.9")
    page.press("End")
    assert text_of(page, ".chart output") == "step 30: -7.5", "the logged number, not the smoothed one"
    assert not page.problems


def test_ten_thousand_texts_are_filtered_and_sorted_at_once(page):
    choose(page, "kind", "")
    assert text_of(page, "#found") == "10000 of 10000 texts"
    choose(page, "ended", "false")
    assert text_of(page, "#found") == "4999 of 10000 texts"  # the odd ones of 1 to 9998
    choose(page, "sort", "total")
    page.run("document.getElementById('descending').click()")
    assert "reward 96.000" in text_of(page, ".completion header")
    assert page.run("document.querySelectorAll('.completion').length") == 20
    page.run("document.getElementById('next').click()")
    assert text_of(page, "#page") == "page 2 of 250"
    choose(page, "search", "NO SUCH TEXT")
    assert text_of(page, "#found") == "0 of 10000 texts"
    choose(page, "search", "THE PROMPT")
    assert text_of(page, "#found") == "4999 of 10000 texts"
    assert not page.problems


def test_pointing_at_a_token_and_arrow_keys_read_its_numbers(page):
    choose(page, "search", "")
    choose(page, "ended", "true")
    choose(page, "kind", "rollout")
    page.hover(".tokens span", number=1)
    assert text_of(page, "#token") == "“ b”  reward -4.5   q -4.5"
    page.run("document.querySelector('.tokens').focus()")
    page.press("ArrowRight")
    assert text_of(page, "#token") == "“</s>”  reward 7.25   q 7.25"
    page.press("Home")
    assert text_of(page, "#token") == "“a”  reward 0.123456   q 0.123456"
    assert not page.problems


def test_nothing_is_wider_than_a_telephone(page):
    page.resize(400, 800)
    assert page.run("document.documentElement.scrollWidth <= innerWidth")
    page.resize(1280, 900)
    assert page.run("document.querySelector('.results').scrollWidth <= innerWidth")
