"""The report of a run: its numbers, its bytes, and what a real browser makes of it without a network."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from browser import browser
from helpers import EXAMPLE_RUN, ROOT

import covrl_lab
from covrl_lab import ConfigError, load_run
from covrl_lab.views import report as reporting
from covrl_lab.views.html import visible
from covrl_lab.views.report import report

HOSTILE = [
    "<script>hit()</script>",
    "<img src=x onerror=hit()>",
    "<svg onload=hit()>",
    "</script><script>hit()</script>",
    "</style><script>hit()</script>",
    "</code></td></table><iframe src='javascript:hit()'></iframe>",
    "<!-- <script>hit()</script>",
    "]]><script>hit()</script>",
    '" onmouseover="hit()" x="',
    "' onfocus='hit()' autofocus='",
    "<a href='javascript:hit()'>click</a>",
    "<meta http-equiv=refresh content='0;url=javascript:hit()'>",
    "<base href=https://example.org/>",
    "<link rel=stylesheet href=https://example.org/a.css>",
    "&lt;script&gt;hit()&lt;/script&gt;",
    "\\u003cscript\\u003ehit()\\u003c/script\\u003e",
    "$\\href{javascript:hit()}{x}$",
    "%{customdata[0]} {{7*7}} ${hit()}",
    "\x1b[31mred\x1b[0m \u202eright to left\u202c \u2028 \ufeff",
    "<plaintext><textarea><title>",
]


@pytest.fixture
def hostile(tmp_path):
    """The example run, with a hostile string in every text of every trace, and in its settings."""
    run = shutil.copytree(EXAMPLE_RUN, tmp_path / "<img src=x onerror=hit()>")
    for path in (run / "traces").iterdir():
        frame = pd.read_parquet(path).head(len(HOSTILE))
        frame["example_id"] = [HOSTILE[i // 7] for i in range(len(HOSTILE))]  # three questions
        for name in ("trace", "question", "answer"):
            frame[name] = HOSTILE
        frame["tokens"] = [[text] * len(row) for text, row in zip(HOSTILE, frame["tokens"], strict=True)]
        frame.to_parquet(path)
    for path in (run / "evaluations").iterdir():
        frame = pd.read_parquet(path).head(len(HOSTILE))
        for k, name in enumerate(("question", "answer", "trace", "prediction")):
            frame[name] = HOSTILE[k:] + HOSTILE[:k]
        frame["score"] = [float((i + (path.stem > "step_00020")) % 2) for i in range(len(frame))]  # all change
        frame.to_parquet(path)
    config = json.loads((run / "config.json").read_text())
    config |= {"model": HOSTILE[0], "task": HOSTILE[1], "method": HOSTILE[3], HOSTILE[2]: HOSTILE[4]}
    (run / "config.json").write_text(json.dumps(config))
    return run


def opened(chrome, path, scheme="light"):
    """(page, console errors, requests beyond the file) with the page open and no network."""
    context = chrome.new_context(color_scheme=scheme)
    context.set_offline(True)
    page, errors, requests = context.new_page(), [], []
    page.add_init_script("window.hits = 0; window.hit = () => { window.hits += 1; };")
    page.on("console", lambda m: errors.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("dialog", lambda dialog: (errors.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda r: requests.append(r.url) if not r.url.startswith(("file:", "blob:")) else None)
    page.goto(path.absolute().as_uri())
    return page, errors, requests


def test_the_report_opens_offline_and_draws(tmp_path):
    path = report(load_run(EXAMPLE_RUN), tmp_path / "report.html")
    with browser() as chrome:
        for scheme, ground in (("light", "rgb(255, 255, 255)"), ("dark", "rgb(21, 24, 28)")):
            page, errors, requests = opened(chrome, path, scheme)
            places = page.locator(".figure")
            assert places.count() == 4
            for k, place in enumerate(places.all()):
                drawn = place.locator(".heatmaplayer image" if k == 1 else ".point").count()
                assert place.locator(".main-svg").count() and drawn > (0 if k == 1 else 5)
            assert page.evaluate("getComputedStyle(document.body).backgroundColor") == ground
            curve = page.evaluate("document.querySelector('.figure').data[0]")
            metrics = load_run(EXAMPLE_RUN).metrics
            assert curve["name"] == "prior"
            drawn = page.evaluate("Array.from(document.querySelector('.figure').calcdata[0], p => p.y)")
            np.testing.assert_allclose(drawn, metrics["reward_prior"])
            place = page.locator(".figure .point").first
            place.scroll_into_view_if_needed()
            place.hover(force=True)
            assert errors == [] and requests == []


def test_hostile_text_stays_text(hostile, tmp_path):
    path = report(hostile, tmp_path / "report.html")
    with browser() as chrome:
        page, errors, requests = opened(chrome, path)
        page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
        text = re.sub(r"\s+", " ", page.inner_text("body"))
        for string in HOSTILE:
            assert re.sub(r"\s+", " ", visible(string)).strip() in text, string
        assert HOSTILE[1] in page.title()
        for place in page.locator(".figure .point").all()[:8]:
            place.hover(force=True)
        page.keyboard.press("Tab")
        assert page.evaluate("window.hits") == 0 and errors == [] and requests == []
        assert page.locator("img, iframe, base, link, textarea, plaintext, a[href]").count() == 0
        assert page.locator("script:not([type])").count() == 2
        assert page.locator("[onerror], [onload], [onmouseover], [onfocus]").count() == 0
        # Even text that became a script would not run.
        page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=hit()>')")
        page.evaluate("document.body.append(Object.assign(document.createElement('script'), {textContent: 'hit()'}))")
        page.wait_for_timeout(200)
        assert page.evaluate("window.hits") == 0 and len(errors) >= 2
        assert all("Content Security Policy" in error for error in errors)


def test_the_numbers_are_those_of_the_files(tmp_path):
    run = load_run(EXAMPLE_RUN)
    text = report(run, tmp_path / "report.html").read_text(encoding="utf-8")
    last, first = run.evaluations.iloc[-1], run.evaluations.iloc[0]
    assert f"<b>{last.accuracy:.1%}</b> after step 30" in text
    assert f"{last.accuracy_low:.1%} to {last.accuracy_high:.1%}" in text and f"{first.accuracy:.1%}" in text
    scores = {step: run.predictions(step).set_index("example_id")["score"] for step in (0, 30)}
    for kind, count in (("gained", (scores[30] > scores[0]).sum()), ("lost", (scores[30] < scores[0]).sum())):
        assert f'data-outcome="{kind}">{count}<' in text and f"<summary>{kind}: {count}" in text
    for name, value in run.config.items():
        assert f"{name} = <b>{value}</b>" in text, name
    frame = run.traces(30)
    own = frame[frame["source"] == "prior"]
    row = re.search(r"mean reward of prior traces.*?</tr>", text, re.DOTALL).group()
    assert f">{own['reward'].mean():.2f}<".replace("-", "−") in row
    assert "Traces of step 1<" in text and "Traces of step 30<" in text and "Traces of step 15<" not in text


def test_the_same_files_give_the_same_bytes(tmp_path):
    one, other = report(EXAMPLE_RUN, tmp_path / "one.html"), report(str(EXAMPLE_RUN), tmp_path / "other.html")
    assert one.read_bytes() == other.read_bytes()
    assert one.stat().st_size < 6_000_000
    assert str(ROOT) not in one.read_text(encoding="utf-8"), "a path of this machine"


def test_the_policy_names_the_very_scripts(tmp_path, monkeypatch):
    monkeypatch.setattr(reporting, "get_plotlyjs", lambda: "hit()")
    page = reporting.page(load_run(EXAMPLE_RUN))
    # echo -n 'hit()' | openssl dgst -sha256 -binary | base64
    assert (
        "script-src 'sha256-ChM/OVOQnhgXHONBjbjcCr6SlibTx7sFQNaNzVnqWpo=' 'sha256-" in page
        and "style-src 'unsafe-inline'" in page
    )
    assert "default-src 'none'" in page and "unsafe-eval" not in page
    assert page.count("<script>") == 2


@pytest.mark.parametrize("missing", ["traces", "evaluations.jsonl", "metrics.jsonl"])
def test_a_run_that_has_only_begun_has_a_report(tmp_path, missing):
    run = shutil.copytree(EXAMPLE_RUN, tmp_path / "run")
    shutil.rmtree(run / missing) if missing == "traces" else (run / missing).unlink()
    text = report(run).read_text(encoding="utf-8")
    assert (run / "report.html").exists() and "Configuration" in text
    assert ("Traces of step" in text) == (missing != "traces")
    assert ("<h2>Held-out accuracy" in text) == (missing != "evaluations.jsonl")


def test_command_line_and_errors(tmp_path):
    assert covrl_lab.report is report
    with pytest.raises(ConfigError, match="not a run folder"):
        report(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(ConfigError, match="not a run of covrl_lab"):
        report(tmp_path / "model")
    assert not (tmp_path / "model" / "report.html").exists()
    with pytest.raises(ConfigError, match="does not exist"):
        report(EXAMPLE_RUN, tmp_path / "nowhere" / "report.html")
    with pytest.raises(ConfigError, match=r"cannot be written \(Is a directory\); choose another file"):
        report(EXAMPLE_RUN, tmp_path / "model")
    command = [sys.executable, "-m", "covrl_lab", "report"]
    out = tmp_path / "out.html"
    done = subprocess.run([*command, EXAMPLE_RUN, out], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == f"Report: {out}\n" and out.exists()
    done = subprocess.run([*command, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "not a run folder" in done.stderr and "Traceback" not in done.stderr
