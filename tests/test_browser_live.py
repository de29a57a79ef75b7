"""The run monitor and the prompt bench in a real JupyterLab."""

import pytest
from browser import jupyterlab
from helpers import TINY_RUN, start_training, until

from covrl_lab import load_run
from covrl_lab.train.probe import open_source, probe_question
from covrl_lab.views.bench import find_source
from covrl_lab.views.html import html_number

# A step takes about a second: a page that draws a figure for every one of hundreds a minute gets no rest.
SMALL = TINY_RUN | {
    "method": "covrl_published",
    "demonstrations": 3,
    "questions_per_step": 16,
    "rollouts_per_question": 8,
    "max_trace_tokens": 24,
    "eval_every": 0,
    "steps": 5000,
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with jupyterlab(tmp_path_factory.mktemp("lab"), height=1600) as lab:
        yield lab


@pytest.fixture
def running(lab):
    """A run that another process writes into the served folder."""
    process = start_training(SMALL | {"run_dir": lab.folder / "run"})
    yield process
    process.kill()
    process.wait(30)


def has_text(lab, selector, text, seconds=120):
    lab.page.wait_for_function(
        "([selector, text]) => (document.querySelector(selector)?.innerText || '').includes(text)",
        arg=[selector, text],
        timeout=1000 * seconds,
    )


def test_the_monitor_follows_and_stops_a_run(lab, running):
    from playwright.sync_api import expect  # waits where a bare assert would look once

    lab.write("monitor.ipynb", "from covrl_lab import RunMonitor\nRunMonitor('run')")
    lab.open("monitor.ipynb")
    lab.run_all()
    page = lab.page
    has_text(lab, ".covrl-monitor", "mean of last 5")  # a first step is there
    page.wait_for_selector(".covrl-monitor .js-plotly-plot .main-svg")
    page.locator('[data-jp-kernel-status="busy"]').wait_for(state="detached")
    page.locator(".covrl-monitor button", has_text="Stop after this step").click()
    until((lab.folder / "run" / "STOP").exists, "the file STOP")
    assert running.wait(420) == 0
    has_text(lab, ".covrl-monitor", "stopped after step ")

    run = load_run(lab.folder / "run")
    last = run.metrics.iloc[-1]
    assert (run.path / "STOP").exists() and 1 <= last["step"] < 5000
    assert f"stopped after step {last['step']:.0f} of 5000" in page.locator(".covrl-monitor").inner_text()
    said = {name: f"{last[name]:.4g}" for name in "reward_prior reward_posterior kl trace_tokens_prior".split()}
    said |= {
        "gradient_norm": f"{last['gradient_norm']:.4g}",
        "accuracy": f"{run.evaluations['accuracy'].iloc[-1]:.1%}",
    }
    for column, text in said.items():  # the page gets them after the sentence above
        expect(page.locator(f'.covrl-monitor [data-column="{column}"]')).to_have_text(text.replace("-", "−"))
    series = (
        "() => { const plot = document.querySelector('.covrl-monitor .js-plotly-plot');"
        " return plot?.calcdata?.[plot.data.findIndex(d => d.name === 'prior')]?.map(p => p.y) || []; }"
    )
    # The page draws the plot after the text beside it.
    page.wait_for_function(f"n => ({series})().length === n", arg=len(run.metrics), timeout=60_000)
    drawn = page.evaluate(series)
    assert len(drawn) == len(run.metrics) and drawn[-1] == pytest.approx(last["reward_prior"])

    # A restarted kernel shows the same, and the button lets the run go on.
    page.evaluate("document.querySelector('.covrl-monitor').classList.add('old')")
    page.get_by_role("menuitem", name="Kernel", exact=True).click()
    page.get_by_text("Restart Kernel and Run All Cells…", exact=True).click()
    page.locator(".jp-Dialog button.jp-mod-accept").click()
    has_text(lab, ".covrl-monitor:not(.old)", f"stopped after step {last['step']:.0f} of 5000")
    page.locator(".covrl-monitor button", has_text="Allow it to resume").click()
    page.wait_for_selector(".covrl-monitor button:has-text('Stop after this step')")
    assert not (run.path / "STOP").exists()
    assert lab.errors == [] and lab.requests == [] and lab.cell_errors() == []


def test_the_bench_samples_and_shows_what_the_files_and_the_model_give(lab, running):
    run = lab.folder / "run"
    while not (run / "metrics.jsonl").exists():  # at once after the test above; alone it takes seconds
        lab.page.wait_for_timeout(100)
    (run / "STOP").touch()
    assert running.wait(420) == 0
    lab.write(
        "bench.ipynb",
        "from covrl_lab import PromptBench\nPromptBench(checkpoint='run', k=2, max_tokens=6)",
    )
    lab.open("bench.ipynb")
    lab.run_all()
    page = lab.page
    question, answer = "What is 3 < 4 & <img src=x onerror=alert(1)>?", "yes"
    page.locator(".covrl-bench textarea").fill(question)
    page.get_by_label("answer y").fill(answer)
    page.get_by_role("button", name="Generate").click()
    has_text(lab, ".covrl-bench", "done")
    page.wait_for_selector(".covrl-bench .js-plotly-plot .main-svg")

    config, checkpoints, _ = find_source(run)
    policy, prompter = open_source(config, checkpoints[max(checkpoints)])
    frame = probe_question(policy, prompter, question, answer, 2, max_tokens=6)
    for source, own in frame.groupby("source"):
        cell = page.locator(f'.covrl-bench [data-cell="after training/{source}"]')
        assert cell.inner_text() == html_number(own["reward"].mean(), ".2f")
    shown = page.locator(".covrl-bench [role=listbox]")
    assert shown.count() == 2
    best = [frame.loc[own["reward"].idxmax()] for _, own in frame.groupby("source", sort=False)]
    for box, row in zip(shown.all(), best, strict=True):
        assert box.locator("[role=option]").count() == len(row["tokens"])

    # A click on a token gives its numbers and what each prompt would rather have written.
    shown.first.locator("[role=option]").first.click()
    has_text(lab, ".covrl-bench .covrl-detail", "prior prompt's first choices")
    numbers = page.locator(".covrl-bench .covrl-detail").inner_text()
    first = best[0]["alternatives"][0]["posterior"][0][1]
    assert f"{best[0]['logp'][0]:.3f}".replace("-", "−") in numbers.replace("-", "−")
    assert f"{first:.3f}".replace("-", "−") in numbers.replace("-", "−")

    with policy.base():
        before = probe_question(policy, prompter, question, answer, 2, max_tokens=6)
    cell = page.locator('.covrl-bench [data-cell="before training/prior"]').inner_text()
    assert cell == html_number(before.loc[before["source"] == "prior", "reward"].mean(), ".2f")
    page.get_by_role("button", name="before training").click()  # other traces: none is selected
    page.wait_for_function("!document.querySelector('.covrl-detail').innerText.includes('first choices')")
    page.locator(".covrl-bench textarea").fill(" ")
    page.get_by_role("button", name="Generate").click()
    has_text(lab, ".covrl-bench", "has an empty question")
    assert lab.errors == [] and lab.requests == [] and lab.dialogs == [] and lab.cell_errors() == []
