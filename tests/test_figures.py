"""Figures hold the frames' numbers, name their units, and let no model text become markup."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import EXAMPLE_RUN

from covrl_lab import MixingRatio
from covrl_lab.runs.reweight import answer_logprob
from covrl_lab.train.probe import trace_frame
from covrl_lab.types import Example, LogProbs, TraceBatch
from covrl_lab.views.evaluations import change_html, question_html
from covrl_lab.views.figures import plot_answer_logprobs, plot_evaluation_curve, plot_training_curves
from covrl_lab.views.html import accuracy_table, help_on, helped, html_number, html_passage, trace_table, visible
from covrl_lab.views.report import _question
from covrl_lab.views.token_figures import plot_coherence, plot_token_comparison, plot_token_lines

HOSTILE = [
    "<script>alert(1)</script>",
    '<img src=x onerror="alert(1)">',
    "</style></code></table><b>",
    "a & b &lt;i&gt;",
    "\x1b[31mred\x1b[0m\x00",
    "abc\u202edcba\u2066\u200f\u200b",
    "<a href='javascript:alert(1)'>%{x} $\\frac12$</a>",
]
INVISIBLE = re.compile("[\x00-\x09\x0b-\x1f\x7f\u200b-\u200f\u202a-\u202e\u2066-\u2069]")


def trace_rows(texts=("9 + 3 = 12.",), questions=2):
    """Two prior and two posterior traces for each question, with numbers that name their own row."""
    rows = []
    for q in range(questions):
        for i in range(4):
            text = texts[(4 * q + i) % len(texts)]
            rows.append(
                {
                    "rollout": 4 * q + i,
                    "example_id": f"e{q}",
                    "question": f"{text} {q}?",
                    "answer": text,
                    "source": "prior" if i < 2 else "posterior",
                    "finished": i != 1,
                    "trace": text,
                    "tokens": [text, " ", "\n"],
                    "logp": [-1.0 - i, -0.5, -0.25],
                    "logq": [-0.5 - i, -0.25, -0.125],
                    "answer_logp": np.array([-1.0 - q, -0.1 * i]),
                }
            )
    return pd.DataFrame(rows)


def metrics(steps=3, **changes):
    columns = {
        "step": range(1, steps + 1),
        "reward_prior": np.linspace(-9, -6, steps),
        "reward_posterior": np.linspace(-7, -5, steps),
        "kl": np.linspace(0.01, 0.02, steps),
        "trace_tokens_prior": np.linspace(10, 12, steps),
        "trace_tokens_posterior": np.linspace(9, 8, steps),
        "finished_share": np.linspace(0.5, 0.9, steps),
        "accuracy": [None] * (steps - 1) + [0.5],
        "gradient_norm": np.linspace(1, 2, steps),
    }
    return pd.DataFrame(columns | changes)


def evaluations(values=(0.25, 0.5), **more):
    values = np.array(values)
    columns = {"step": 10 * np.arange(len(values)), "accuracy": values}
    columns |= {"accuracy_low": values - 0.1, "accuracy_high": values + 0.05, "eval_questions": 64}
    columns |= {"eval_finished_share": 0.75, "eval_trace_tokens": 11.5}
    return pd.DataFrame(columns | more)


def points(figure, name):
    """(x, y) of the one trace of that name that has a legend entry of its own or hover text."""
    (trace,) = [t for t in figure.data if t.name == name]
    return list(trace.x), list(trace.y)


def axis_titles(figure):
    return [axis.title.text for axis in [*figure.select_xaxes(), *figure.select_yaxes()]]


def all_figures(frame):
    yield plot_answer_logprobs(frame)
    yield plot_token_comparison(frame.iloc[0])
    yield plot_training_curves(metrics(), evaluations())
    yield plot_evaluation_curve({"a run": evaluations()})


# --- numbers


def test_answer_logprobs_are_sums_over_answer_tokens():
    frame = trace_rows()
    figure = plot_answer_logprobs(frame)
    x, y = points(figure, "posterior")
    np.testing.assert_allclose(x, [-1.2, -1.3, -2.2, -2.3])
    assert np.round(y).tolist() == [0, 0, 1, 1]
    np.testing.assert_allclose(points(figure, "mean, prior")[0], [-1.05, -2.05])
    (prior,) = [t for t in figure.data if t.name == "prior"]
    assert sorted(zip(prior.x, prior.marker.symbol, strict=True)) == [
        (-2.1, "circle-open"),
        (-2.0, "circle"),
        (-1.1, "circle-open"),
        (-1.0, "circle"),
    ]
    assert [label.split("<br>")[0] for label in figure.layout.yaxis.ticktext] == [
        "9 + 3 = 12. 0?",
        "9 + 3 = 12. 1?",
    ]


def test_a_verdict_stands_at_every_single_trace():
    """Right, wrong and not known: a wrong one is a cross, and the hover text says what the model answered."""
    known = [True, False, None, True, False, None, True, False]
    frame = trace_rows().assign(right=known, prediction=[f"<b>{i}" for i in range(8)])
    figure, found = plot_answer_logprobs(frame), {}
    for points in (t for t in figure.data if t.name in ("prior", "posterior")):
        for x, symbol, (_, _, said) in zip(points.x, points.marker.symbol, points.customdata, strict=True):
            found[round(x, 6)] = symbol, said
    for i, total in enumerate([-1.0, -1.1, -1.2, -1.3, -2.0, -2.1, -2.2, -2.3]):
        symbol, said = found[total]
        assert symbol.startswith("x" if known[i] is False else "circle"), i
        assert symbol.endswith("-open") == ("unfinished" in said) == (not frame["finished"][i])
        mark = {True: "✓ right", False: "✗ wrong", None: ""}[known[i]]
        assert said.startswith(f"<br>{mark}: it answered &lt;b&gt;{i}" if mark else ("<br>unfinished", "")), said
        title = plot_token_comparison(frame.iloc[i]).layout.title.text
        assert title.endswith(f"nats {mark}")
    assert "cross: wrong" in figure.layout.title.text
    assert "cross" not in plot_answer_logprobs(trace_rows()).layout.title.text


def test_answer_logprobs_shows_the_first_questions_and_takes_one_source():
    figure = plot_answer_logprobs(trace_rows(questions=6), questions=3)
    assert len(figure.layout.yaxis.ticktext) == 3
    only = trace_rows().query("source == 'prior'")
    assert {t.legendgroup for t in plot_answer_logprobs(only).data} == {"prior"}


def test_token_comparison_holds_both_lines_and_visible_tokens():
    row = trace_rows().iloc[3]
    figure = plot_token_comparison(row)
    assert points(figure, "log p, prior prompt") == ([1, 2, 3], row["logp"])
    assert points(figure, "log q, posterior prompt") == ([1, 2, 3], row["logq"])
    assert list(figure.layout.xaxis.ticktext) == ["9·+·3·=·12.", "·", "↵"]
    assert "-1.30 nats" in figure.layout.title.text


@pytest.mark.parametrize(("selected", "seen"), [(0, [0.5, 200.5]), (300, [200.5, 400.5]), (499, [300.5, 500.5])])
def test_of_a_long_trace_the_lines_show_a_part_around_the_selected_token(selected, seen):
    values = {name: [-0.1] * 500 for name in ("logp", "logq", "log_gap")}
    figure = plot_token_lines(["word"] * 500, values, "log_gap", "log q − log p, nats", selected)
    assert {axis.range for axis in figure.select_xaxes()} == {tuple(seen)}
    whole = figure.layout.xaxis2.rangeslider  # below the lower part
    assert (whole.visible, whole.range, figure.layout.xaxis.rangeslider.visible) == (True, (0.5, 500.5), None)
    assert len(figure.data[0].x) == 500
    short = plot_token_lines(["word"] * 200, {name: v[:200] for name, v in values.items()}, selected=99)
    assert short.layout.xaxis.range is None and short.layout.xaxis.rangeslider.visible is None


def test_token_comparison_of_a_long_trace_is_as_wide_as_the_notebook():
    row = trace_rows().iloc[3].copy()
    for name in ("tokens", "logp", "logq"):
        row[name] = list(row[name]) * 100
    figure = plot_token_comparison(row)
    assert (figure.layout.width, figure.layout.xaxis.ticktext) == (None, None)
    assert figure.layout.xaxis.range == (0.5, 200.5) and figure.layout.xaxis.rangeslider.visible


def test_token_comparison_without_posterior_scores():
    row = trace_rows().iloc[0].copy()
    row["logq"] = None
    assert [t.name for t in plot_token_comparison(row).data] == ["log p, prior prompt"]


def test_training_curves_hold_metrics_and_intervals():
    m, e = metrics(), evaluations()
    figure = plot_training_curves(m, e)
    drawn = [(list(t.x), list(t.y)) for t in figure.data]
    for column in m.columns.drop(["step", "accuracy"]):
        assert (list(m["step"]), list(m[column])) in drawn, column
    (accuracy,) = [t for t in figure.data if t.name == "held-out questions"]
    assert (list(accuracy.x), list(accuracy.y)) == (list(e["step"]), list(e["accuracy"]))
    np.testing.assert_allclose(accuracy.error_y.array, 0.05)
    np.testing.assert_allclose(accuracy.error_y.arrayminus, 0.1)


def test_training_curves_leave_out_what_a_method_does_not_have():
    none = [None] * 3
    m = metrics(kl=none, reward_posterior=none, trace_tokens_posterior=none)
    figure = plot_training_curves(m, reward_unit="probability")
    titles = [a.text for a in figure.layout.annotations]
    assert "KL(p′‖p)" not in titles and len(titles) == 5
    assert "posterior" not in [t.name for t in figure.data]
    assert "probability" in axis_titles(figure)
    accuracy = [t for t in figure.data if t.name == "held-out questions"]
    assert [list(t.x) for t in accuracy] == [[3]]


def test_training_curves_show_how_much_the_traces_are_used():
    e = evaluations().assign(trace_dependence=[6.0, 2.5])
    figure = plot_training_curves(metrics(), e)
    assert "Trace use" in [a.text for a in figure.layout.annotations]
    _, use = [t for t in figure.data if t.name == "held-out questions"]
    assert (list(use.x), list(use.y)) == (list(e["step"]), [6.0, 2.5]) and "nats" in use.hovertemplate


def test_training_curves_before_the_first_step():
    assert "no finished step" in plot_training_curves(pd.DataFrame()).layout.title.text
    only = plot_training_curves(pd.DataFrame(), evaluations((0.25,)))
    assert [t.name for t in only.data] == ["held-out questions"]


def test_training_curves_of_a_long_run_add_a_running_mean():
    m = metrics(80)
    raw, mean = [t for t in plot_training_curves(m).data if t.name == "posterior"][:2]
    np.testing.assert_allclose(raw.y, m["reward_posterior"])
    np.testing.assert_allclose(mean.y[4], m["reward_posterior"][2:6].mean())
    assert raw.line.width < mean.line.width and mean.showlegend and not raw.showlegend


def test_evaluation_curve_of_single_runs():
    e = evaluations()
    figure = plot_evaluation_curve({"covrl": e, "jlb": evaluations((0.3, 0.4))})
    assert points(figure, "covrl") == (list(e["step"]), list(e["accuracy"]))
    band = figure.data[0]
    np.testing.assert_allclose(band.y, [0.3, 0.55, 0.4, 0.15])
    assert figure.data[1].line.width == 3 and figure.data[1].line.color != figure.data[3].line.color


def test_evaluation_curve_averages_seeds():
    values = {0: (0.2, 0.4), 1: (0.3, 0.6), 2: (0.1, 0.8)}
    frame = pd.concat([evaluations(v, seed=seed) for seed, v in values.items()])
    figure = plot_evaluation_curve({"covrl": frame})
    np.testing.assert_allclose(points(figure, "covrl"), [[0, 10], [0.2, 0.6]])
    assert points(figure, "covrl, seed 2") == ([0, 10], [0.1, 0.8])
    (band,) = [t for t in figure.data if t.fill]
    np.testing.assert_allclose(band.y, [0.3, 0.8, 0.4, 0.1])


def test_accuracy_table_shows_intervals():
    text = accuracy_table(evaluations())
    assert "<b>25%</b> (15% to 30%)" in text and "<b>50%</b> (40% to 55%)" in text and "11.5" in text
    assert "by guessing" not in text and "bound" not in text
    text = accuracy_table(evaluations().assign(guess_accuracy=[0.08, None]))
    assert "by guessing" in text and ">8%</td>" in text and ">–</td>" in text
    text = accuracy_table(evaluations().assign(bound_k=[None, -3.456]))
    assert "bound at k, nats" in text and ">−3.46</td>" in text and ">–</td>" in text


def test_trace_frame_reads_a_batch():
    mask = torch.tensor([[True, True], [True, False]])
    batch = TraceBatch(
        ids=torch.tensor([[5, 6], [7, 0]]),
        mask=mask,
        from_prior=torch.tensor([True, False]),
        finished=torch.tensor([True, False]),
        group_size=2,
    )
    logprobs = LogProbs(
        prior=torch.tensor([[-1.0, -2.0], [-3.0, 0.0]], requires_grad=True),
        posterior=None,
        answer=torch.tensor([[-0.5, -0.5], [-4.0, -1.0]]),
        answer_mask=torch.ones(2, 2, dtype=torch.bool),
    )
    prompter = SimpleNamespace(
        answer=lambda example: [8, 9],
        trace_text=lambda ids: f"z{ids}",
        tokenizer=SimpleNamespace(decode=lambda ids: f"t{ids[0]}"),
    )
    frame = trace_frame([Example("e", "x?", "y")], batch, logprobs, prompter)
    assert frame["source"].tolist() == ["prior", "posterior"] and frame["finished"].tolist() == [True, False]
    assert frame["tokens"].tolist() == [["t5", "t6"], ["t7"]]
    assert frame["logp"].tolist() == [[-1.0, -2.0], [-3.0]] and frame["logq"].tolist() == [None, None]
    assert answer_logprob(frame).tolist() == [-1.0, -5.0] and frame["answer_tokens"].tolist() == [["t8", "t9"]] * 2


# --- appearance


def test_every_axis_has_a_title_and_backgrounds_are_transparent():
    for figure in all_figures(trace_rows()):
        titles = axis_titles(figure)
        # The rows of answer_logprobs are questions, written at their ticks.
        assert sum(title is None for title in titles) <= (figure.layout.yaxis.ticktext is not None)
        layout = figure.layout.template.layout
        assert layout.paper_bgcolor == layout.plot_bgcolor == "rgba(0, 0, 0, 0)"


def test_units_are_named():
    text = " ".join(title or "" for f in all_figures(trace_rows()) for title in axis_titles(f))
    for unit in ("nats", "nats a token", "tokens", "share of questions", "L2 norm"):
        assert unit in text


# --- text is never markup


class Tags(HTMLParser):
    """Collects tags, attributes and text of an HTML fragment."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.text = set(), set(), []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.parametrize("text", HOSTILE)
def test_trace_table_escapes(text):
    table = trace_table(trace_rows([text]))
    parsed = Tags()
    parsed.feed(table)
    assert parsed.tags <= {"table", "thead", "tbody", "tr", "th", "td", "b", "code", "div"}
    assert parsed.attributes <= {"style", "colspan", "dir"}
    assert not INVISIBLE.search(table)
    assert "\n".join(map(visible, text.split("\n"))) in parsed.text
    table.encode("utf-8")


def strings(value):
    """All strings inside nested lists and dictionaries."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (s for v in value.values() for s in strings(v))
    elif isinstance(value, list):
        yield from (s for v in value for s in strings(v))


@pytest.mark.parametrize("text", HOSTILE)
def test_figures_escape(text):
    frame = trace_rows([text])
    drawn = [plot_answer_logprobs(frame), plot_evaluation_curve({text: evaluations()})]
    drawn += [plot_token_comparison(row) for _, row in frame.iterrows()]
    for figure in drawn:
        spec = json.loads(figure.to_json())
        for trace in spec["data"]:
            trace.pop("legendgroup", None)  # a key, never shown
        for string in strings(spec):
            assert set(re.findall(r"<[^>]*>?", string)) <= {"<br>", "<b>", "</b>", "<extra>", "</extra>"}
            assert not INVISIBLE.search(string)
            assert "$" not in string  # would be read as TeX
        for trace in spec["data"]:
            template = trace.get("hovertemplate", "")
            assert "alert" not in template and "frac12" not in template  # text comes as data only


def test_visible_signs():
    assert visible("a b\t\n") == "a b⇥↵"
    assert visible("a b", spaces=True) == "a·b"
    assert visible("\x1b[1m\u202e") == "␛[1m⟨U+202E⟩"
    assert visible("\ud800") == "⟨U+D800⟩"  # half a character: no file or page could hold it
    assert visible("é 数 ا") == "é 数 ا"
    family, persian = "👩\u200d👩\u200d👧", "می\u200cخواهم"
    assert visible(family) == family and visible(persian) == persian
    assert visible("\u200d") == "⟨U+200D⟩"  # nothing else to see
    assert visible("a\u200fb\u200b") == "a⟨U+200F⟩b⟨U+200B⟩"


def test_symbols_have_help_where_they_stand():
    assert all(map(help_on, ("clip ±", "KL(p′‖p)", "answer term (NLL)", "mean ρ", "w", "α")))
    assert not any(map(help_on, ("gradient norm", "before clipping", "answer y", "weights")))
    assert 'title="responsibility' in helped("mean ρ") and helped("question") == "question"
    mixing = MixingRatio(EXAMPLE_RUN)
    for slider, said in zip(mixing.sides[0].controls, ("share of", "weight of", "limits", "limits"), strict=True):
        assert slider.tooltip.startswith(said)
    assert 'title="Kullback' in mixing.html()


def test_numbers_are_never_minus_nought():
    assert [html_number(x, ".1f") for x in (-0.04, -0.06, 0.0, -12.0)] == ["0.0", "−0.1", "0.0", "−12.0"]
    assert [html_number(x, ".3g") for x in (-0.0, 0.12345, 0.1, -11.346)] == ["0", "0.123", "0.1", "−11.3"]
    assert html_number(-0.0001, ".1%") == "0.0%"


def test_passages_keep_their_lines_and_fold_when_long():
    code = "def f(x):\n    return x  # <b>\u202e"
    shown = html_passage(code)
    assert "def f(x):\n    return x  # &lt;b&gt;⟨U+202E⟩" in shown and "white-space: pre-wrap" in shown
    assert 'dir="auto"' in shown and "<details" not in shown and "<b>" not in shown
    long = html_passage("word " * 100)
    assert long.startswith("<details><summary>") and "500 characters" in long and "word " * 100 in long
    assert "<details" in html_passage("line\n" * 9)


def test_every_view_that_prints_questions_and_traces_keeps_their_lines_and_folds_them():
    text = "def f(x):\n    return x\n" * 9
    rows = trace_rows([text]).assign(question=text, answer="1")
    held_out = pd.DataFrame({"question": [text], "answer": ["1"], "trace": [text], "prediction": ["2"], "step": [0]})
    held_out = held_out.assign(right=False, score=0.0, finished=True, trace_tokens=9)
    change = pd.DataFrame(
        {"question": [text], "answer": ["1"], "before": ["2"], "after": ["1"], "outcome": ["gained"]}
    )
    folds = {
        trace_table(rows): rows["example_id"].nunique() + len(rows),
        question_html(held_out): 2,
        change_html(change, 0, 1): 3,  # with the two lists' own
        _question(rows): 1,
    }
    for page, count in folds.items():
        assert page.count("<details>") == count and "return x\ndef f" in page
        assert "<b>def" not in page and "↵" not in re.sub("<summary>.*?</summary>", "", page)


def test_a_newline_in_hover_text_is_a_sign():
    frame = trace_rows(["one\ntwo"])
    (prior,) = [t for t in plot_answer_logprobs(frame).data if t.name == "prior"]
    assert prior.customdata[0][0] == "one↵two"


def test_figures_need_no_torch():
    code = "import sys, covrl_lab.views.figures; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_coherence_figure_has_a_line_a_trace_and_the_best_traces_tokens_on_its_axes():
    hostile = "<script>alert(1)</script>$x$"
    rows = [("prior", [-3.0, -2.0, -9.0]), ("prior", [-3.0, -2.5, -1.0]), ("posterior", [-3.0, -4.0, -0.5])]
    frame = pd.DataFrame(
        [
            {
                "source": source,
                "tokens": [f" {i}", hostile if i == 2 else "\n"],
                "coherence": np.array(values),
            }
            for i, (source, values) in enumerate(rows)
        ],
        index=[10, 11, 12],
    )
    figure = plot_coherence(frame)
    lines = [line for line in figure.data if line.y[0] is not None]
    assert sorted(list(line.y) for line in lines) == sorted(values for _, values in rows)
    assert [list(line.x) for line in lines] == [[0, 1, 2]] * 3
    bold = [list(line.y) for line in lines if line.showlegend]
    assert bold == [rows[1][1], rows[2][1]], "the traces that end best"
    assert figure.layout.xaxis2.ticktext == ("–", "·1", "↵")
    assert figure.layout.xaxis.ticktext[1] == "·2"
    assert "<script" not in str(figure) and "$x$" not in str(figure) and "&lt;script&gt;" in str(figure)
    other = plot_coherence(frame, chosen=[10, 12])
    assert other.layout.xaxis2.ticktext == ("–", "·0", "↵")
    alone = plot_coherence(frame[frame["source"] == "posterior"])
    assert "xaxis2" not in alone.layout and len(plot_coherence(frame.head(0)).data) == 0


@pytest.mark.parametrize("length", [64, 65])
def test_long_traces_have_no_tokens_on_the_axes_of_the_coherence_figure(length):
    """plotly.js took 20 seconds for those of 400."""
    rows = [
        {"source": source, "tokens": ["word"] * length, "coherence": [-1.0] * (length + 1)}
        for source in ("prior", "posterior")
    ]
    figure = plot_coherence(pd.DataFrame(rows))
    assert [axis.ticktext is not None for axis in figure.select_xaxes()] == ([True, True] if length == 64 else [False])
    assert {line.xaxis for line in figure.data} <= ({None, "x", "x2"} if length == 64 else {None})
