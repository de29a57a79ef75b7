"""Two messages of a page at once: a kernel may answer them in two threads, and a panel must show the last word."""

import threading
import time
from types import SimpleNamespace

import pytest
from helpers import EXAMPLE_RUN

from covrl_lab import EstimatorPanel, EvaluationBrowser, MixingRatio, RunBrowser, TraceComparison, TraceExplorer, World
from covrl_lab.views import ablation
from covrl_lab.views.widgets import Plot, Table


def together(*messages):
    threads = [threading.Thread(target=message) for message in messages]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def explorer():
    panel = TraceExplorer(EXAMPLE_RUN)
    return panel, lambda: panel.search.set_trait("value", "1"), lambda: panel.source.set_trait("value", "prior")


def evaluations():
    panel = EvaluationBrowser(EXAMPLE_RUN)
    return panel, lambda: panel.show.set_trait("value", "gained"), lambda: panel.before.set_trait("value", 10)


def side_by_side():
    panel = TraceComparison(EXAMPLE_RUN)
    a, b = panel.a.source, panel.b.source
    return panel, lambda: a.set_trait("value", "posterior"), lambda: b.set_trait("value", "prior")


def mixing():
    panel = MixingRatio(EXAMPLE_RUN)
    a, b = (side.alpha for side in panel.sides)
    return panel, lambda: a.set_trait("value", 0.3), lambda: b.set_trait("value", 0.4)


def runs():
    panel = RunBrowser(EXAMPLE_RUN.parent)
    return panel, lambda: panel.search.set_trait("value", "a"), lambda: panel.table.set_trait("sort", ["name", True])


def theory():
    panel = EstimatorPanel("ratio", World(1))
    alpha, weight = panel.sliders["alpha"], panel.sliders["composite_weight"]
    return panel, lambda: alpha.set_trait("value", 0.3), lambda: weight.set_trait("value", 0.4)


@pytest.mark.parametrize("make", [explorer, evaluations, side_by_side, mixing, runs, theory])
def test_a_panel_answers_one_message_at_a_time(monkeypatch, make):
    panel, *messages = make()
    inside, counts = [], []

    def slowly(draw):
        def drawn(*args, **kwargs):
            inside.append(1)
            counts.append(len(inside))
            time.sleep(0.3)  # room for the other thread
            draw(*args, **kwargs)
            inside.pop()

        return drawn

    for kind, name in ((Table, "fill"), (Plot, "draw")):
        monkeypatch.setattr(kind, name, slowly(getattr(kind, name)))
    together(*messages)
    assert len(counts) >= 2 and max(counts) == 1


def test_a_grid_that_is_refused_while_the_one_before_is_listed_leaves_no_rows(tmp_path, monkeypatch):
    panel = ablation.Ablation(tmp_path, alphas="0.5", seeds="0", steps=2, model="tiny", task="arithmetic")
    listing, refused = threading.Event(), threading.Event()
    table = ablation.table

    def slow(sweep):
        listing.set()
        refused.wait(1)  # with one handler at a time it cannot come
        return table(sweep)

    def refuse():
        listing.wait()
        panel.fields["task"].value = "arithmetics"
        refused.set()

    monkeypatch.setattr(ablation, "table", slow)
    together(lambda: panel.fields["alphas"].set_trait("value", "0.3, 0.5"), refuse)
    assert panel.table.rows == [] and "arithmetics" in panel.cost.value and panel.launch_button.disabled


def test_an_estimate_of_a_grid_that_is_no_longer_chosen_changes_nothing(tmp_path, monkeypatch):
    panel = ablation.Ablation(tmp_path, alphas="0.5", seeds="0", steps=2, model="tiny", task="arithmetic")

    def plan(config):
        panel.fields["task"].value = "arithmetics"
        return SimpleNamespace(minutes=0.5)

    monkeypatch.setattr("covrl_lab.train.plan.plan", plan)
    panel.estimate()
    assert "unknown task" in panel.cost.value and panel.estimate_button.disabled
    panel.fields["task"].value = "arithmetic"
    assert "about 1.0 minutes" in panel.cost.value and not panel.estimate_button.disabled
