"""The prompt bench: its numbers are the probe's, and every way a click can end."""

import json
import re
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import plotly.io as pio
import pytest
from helpers import ASK, DEMONSTRATIONS, adapter_change, made_up_run, until

from covrl_lab import RunConfig, Trainer, list_runs, load_run
from covrl_lab.train import probe
from covrl_lab.train.models import load_policy
from covrl_lab.train.policy import load_adapter
from covrl_lab.train.probe import open_source, probe_question
from covrl_lab.train.prompts import Prompter
from covrl_lab.types import ConfigError
from covrl_lab.views.bench import PromptBench, find_source, summary_html
from covrl_lab.views.html import html_number

SMALL = {"quantization": "none", "dtype": "float32", "demonstrations": 1}


@pytest.fixture
def prompter(tiny_policy):
    return Prompter(tiny_policy.tokenizer, DEMONSTRATIONS)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder with checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("live") / "run"
    settings = SMALL | {"questions_per_step": 2, "rollouts_per_question": 2, "max_trace_tokens": 6}
    settings |= {"model": "tiny", "eval_questions": 2, "learning_rate": 0.05, "warmup_steps": 0}
    settings |= {"lr_schedule": "constant"}
    Trainer(RunConfig(**settings, steps=2, checkpoint_every=1, run_dir=str(folder)), progress=False).run()
    return folder


def opened(name, step=None, **settings):
    source = find_source(name, **settings)
    return open_source(source.config, source.checkpoints.get(step or max(source.checkpoints, default=None)))


def test_wrong_input_is_one_sentence(tiny_policy, prompter, tmp_path):
    for settings, message in (
        ({"question": " ", "answer": "1"}, "empty question"),
        ({"question": "x", "answer": ""}, "empty answer"),
        ({"question": "x" * 9000, "answer": "1"}, "more than the model's context"),
        (ASK | {"k": 0}, "1 or more"),
        (ASK | {"temperature": 0.0}, "above 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            probe_question(tiny_policy, prompter, **settings)
    with pytest.raises(ConfigError, match="needs its prompter"):
        PromptBench(tiny_policy)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match="holds no checkpoint yet"):
        find_source(tmp_path)


def test_a_run_a_checkpoint_and_a_model_are_sources(trained):
    first = trained / "checkpoints" / "step_00001"
    assert find_source(trained).checkpoints == {1: first, 2: trained / "checkpoints" / "step_00002"}
    assert find_source(first).checkpoints == {1: first}
    assert find_source("tiny", **SMALL).checkpoints == {}
    first, _ = opened(trained, step=1)
    last, prompter = opened(trained)
    expected = load_policy("tiny", quantization="none", dtype="float32")
    load_adapter(expected, trained / "checkpoints" / "step_00002")
    assert adapter_change(last) == adapter_change(expected) != adapter_change(first)
    assert len(prompter.demonstrations) == 1
    plain, _ = opened("tiny", **SMALL)
    assert not plain.trainable()


def test_the_bench_asks_before_and_after_training(trained):
    bench = PromptBench(checkpoint=trained, k=2, max_tokens=6, seed=3, **ASK)
    assert [step for _, step in bench.step.options] == [1, 2] and bench.step.value == 2
    bench.generate.click()
    bench.wait(300)
    assert "done" in bench.message.value and bench.bar.value == 100
    assert list(bench.frames) == ["before training", "after training"]
    policy, prompter = opened(trained)
    settings = {"k": 2, "max_tokens": 6, "seed": 3}
    after = probe_question(policy, prompter, **ASK, **settings)
    with policy.base():
        before = probe_question(policy, prompter, **ASK, **settings)
    for name, expected in (("before training", before), ("after training", after)):
        assert bench.frames[name]["logp"].tolist() == expected["logp"].tolist()
    assert before["logp"].tolist() != after["logp"].tolist()

    # The panel shows those numbers, the best trace of each source first.
    shown = dict(re.findall(r'<span data-cell="([^"]*)">([^<]*)</span>', bench.summary.value))
    mean = after.loc[after["source"] == "prior", "reward"].mean()
    assert shown["after training/prior"] == html_number(mean, ".2f") and len(shown) == 4
    assert bench.weights.value == "after training"
    for source, choice in bench.traces.items():
        own = after[after["source"] == source]
        assert choice.value == own["reward"].idxmax() and len(choice.options) == 2
    bench.weights.value = "before training"
    rewards = before.loc[before["source"] == "posterior", "reward"]
    assert bench.traces["posterior"].options[0][0].startswith(f"{html_number(rewards.max(), '.2f')} nats")

    # Another choice shows another trace, with its alternatives; a selected token is marked in the curve.
    label = bench.traces["prior"].options[1][1]
    bench.traces["prior"].value = label
    drawn, row = bench.tokens.traces[0], before.loc[label]
    np.testing.assert_allclose(drawn["values"]["logp"], row["logp"], atol=1e-6)
    np.testing.assert_allclose(
        [place["posterior"][0][1] for place in drawn["alternatives"]],
        [place["posterior"][0][1] for place in row["alternatives"]],
        atol=1e-6,
    )
    bench.tokens.selected = [0, 2]
    (line,) = json.loads(bench.curve.figure)["layout"]["shapes"]
    assert line["x0"] == 3

    bench.step.value = 1
    bench.generate.click()
    bench.wait(300)
    first, _ = opened(trained, step=1)
    expected = probe_question(first, prompter, **ASK, **settings)
    assert bench.frames["after training"]["logp"].tolist() == expected["logp"].tolist()


def test_a_checkpoint_that_has_gone_meanwhile_is_said_and_the_others_are_offered(trained, tmp_path):
    """A run that goes on keeps its last ones only."""
    run = shutil.copytree(trained, tmp_path / "run")
    bench = PromptBench(checkpoint=run, k=1, max_tokens=3, **ASK)
    bench.step.value = 1
    shutil.rmtree(run / "checkpoints" / "step_00001")
    bench.generate.click()
    bench.wait(300)
    assert bench.message.value.count("the checkpoint of step 1 is gone; choose one of [2]") == 1 and not bench.frames
    assert bench.step.value == 2
    bench.generate.click()
    bench.wait(300)
    assert "done" in bench.message.value and list(bench.frames) == ["before training", "after training"]


def test_a_given_policy_stays_as_it_is(tiny_policy, prompter):
    bench = PromptBench(tiny_policy, prompter, k=1, max_tokens=4, **ASK)
    assert bench.source.disabled
    bench.generate.click()
    bench.wait(60)
    assert list(bench.frames) == ["before training", "after training"]


def test_a_click_that_fails_or_is_cancelled_leaves_the_bench_usable(tiny_policy, prompter, monkeypatch):
    bench = PromptBench(model="no-such-model", k=1, max_tokens=4, **SMALL, **ASK)
    for value, message in (("no-such-model", "unknown model"), ("tiny", "done")):
        bench.source.value = value
        bench.generate.click()
        bench.wait(60)
        assert message in bench.message.value and not bench.generate.disabled and bench.cancel.disabled
    kept = bench.frames

    bench.question.value = "<img src=x onerror=alert(1)>" * 600
    bench.generate.click()
    bench.wait(60)
    assert "more than the model" in bench.message.value and bench.frames is kept

    bench.question.value = "What is 1 plus 1?"
    sampling, go_on = threading.Event(), threading.Event()

    def tick_first(policy, prompter, *args, **settings):
        sampling.set()
        assert go_on.wait(60)
        return real(policy, prompter, *args, **settings)

    real = probe.sample_traces
    monkeypatch.setattr(probe, "sample_traces", tick_first)
    bench.generate.click()
    assert sampling.wait(60) and bench.generate.disabled and not bench.cancel.disabled
    bench.cancel.click()
    go_on.set()
    bench.wait(60)
    assert "cancelled" in bench.message.value and bench.frames is kept

    monkeypatch.setattr(probe, "sample_traces", lambda *args, **settings: 1 / 0)
    bench.generate.click()
    bench.wait(60)
    assert "ZeroDivisionError: division by zero" in bench.message.value


def test_hostile_text_is_shown_as_text(tiny_policy, prompter):
    hostile = "<script>alert(1)</script>"
    bench = PromptBench(tiny_policy, prompter, question=hostile, answer=hostile, k=1, max_tokens=4)
    bench.generate.click()
    bench.wait(60)
    frame = bench.frames["after training"]
    frame["tokens"] = [[hostile] * len(tokens) for tokens in frame["tokens"]]
    frame["trace"] = hostile
    bench._show()
    page, figure = bench.static()
    for text in (page.data, summary_html({hostile: frame}), str(figure)):
        assert "<script" not in text and "&lt;script&gt;" in text


def test_what_a_notebook_stores_of_the_bench_follows_its_results(tiny_policy, prompter, monkeypatch):
    """The outputs of a cell that was run before the first click."""
    stored = []

    def display(bundle, raw=False, display_id=False):
        stored.append({})
        return SimpleNamespace(update=lambda bundle, raw, kept=stored[-1]: kept.update(bundle))

    monkeypatch.setattr("covrl_lab.views.widgets.display", display)
    monkeypatch.setattr(pio.renderers, "default", "plotly_mimetype")  # as in notebooks
    bench = PromptBench(tiny_policy, prompter, k=1, max_tokens=4, **ASK)
    bench._ipython_display_()
    bench.generate.click()
    bench.wait(60)
    plots = "application/vnd.plotly.v1+json"
    until(lambda: any(plots in output for output in stored), "a plot in a stored output", 30)
    (page,) = [output["text/html"] for output in stored if output.get("text/html")]
    assert bench.summary.value in page and "after training" in page


def test_a_run_that_is_not_there_is_said_before_any_hub_is_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for wrong in ("runs/nope", str(tmp_path / "nope")):
        with pytest.raises(ConfigError, match="there is no run"):
            PromptBench(checkpoint=wrong)
        with pytest.raises(ConfigError, match="there is no run folder"):
            find_source(wrong)
    assert find_source("owner/model").config.model == "owner/model"


def test_runs_are_offered_from_where_the_table_of_runs_finds_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = ["runs/here", "runs/grid/one", "notebooks/runs/theirs"]
    for name in made:
        RunConfig(model="tiny").save(made_up_run(tmp_path / name, steps=1).path / "config.json")
        (tmp_path / name / "checkpoints" / "step_00001").mkdir(parents=True)
    made_up_run(tmp_path / "runs" / "without", steps=1)
    bench = PromptBench(model="tiny", **SMALL)
    assert (
        {Path(name) for name in bench.source.options[2:]}
        == set(map(Path, made))
        <= {Path(run) for run in list_runs()["id"]}
    )
    bench.source.value = bench.source.options[2]
    assert bench.step.value == 1
    monkeypatch.chdir(tmp_path / "notebooks")  # where notebooks run
    assert {Path(name).resolve() for name in PromptBench(model="tiny", **SMALL).source.options[2:]} == {
        tmp_path / name for name in made
    }


def test_a_run_brings_its_own_question_until_something_is_typed(trained):
    asked = load_run(trained).predictions(0).iloc[0]
    bench = PromptBench(checkpoint=trained)
    fields = [bench.question, bench.answer, bench.max_tokens, bench.temperature]
    assert [field.value for field in fields] == [asked["question"], asked["answer"], 6, 1.0]

    # Another source brings others, but for what somebody has typed; an answer belongs to its question.
    bench.temperature.value = 0.5
    bench.source.value = "tiny"
    assert [field.value for field in fields] == ["What is 47 + 35?", "82", 28, 0.5]
    bench.answer.value = "83"
    bench.source.value = str(trained)
    assert [field.value for field in fields] == ["What is 47 + 35?", "83", 6, 0.5]
    given = PromptBench(checkpoint=trained, question="Why?", answer="So", max_tokens=9)
    assert [given.question.value, given.answer.value, given.max_tokens.value] == ["Why?", "So", 9]
