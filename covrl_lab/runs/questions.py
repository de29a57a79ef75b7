"""Held-out questions through a run's evaluations: which were learned, gained and lost. Greedy answers only."""

import numpy as np
import pandas as pd

from ..types import ConfigError
from .folder import Run, steps_in

OUTCOMES = {(0, 1): "gained", (1, 0): "lost", (1, 1): "right at both", (0, 0): "wrong at both"}  # right at each


def history(run: Run) -> pd.DataFrame:
    """One row a question and evaluation: the columns of ``Run.predictions``, step, and right (a full score)."""
    steps = steps_in(run.path / "evaluations")
    frames = [frame.query("sample < 0").assign(step=step) for step in steps if len(frame := run.predictions(step))]
    if not frames:
        none = f"{run.path} has no evaluations yet; a run makes its first before its first step"
        raise ConfigError(next(iter((run.damage or {}).values()), none))
    found = pd.concat(frames)
    return found.assign(right=found["score"] >= 1).reset_index(drop=True)


def by_learning(history: pd.DataFrame) -> pd.DataFrame:
    """One row a question, the soonest learned first: example_id, question, answer, learned (in words).

    A question is learned with the first of the right answers that last to the end. Those whose last answer is
    wrong follow, the latest lost first, and then those that were never right. Not asked counts as wrong.
    """
    right = history.pivot(index="example_id", columns="step", values="right").astype(float).fillna(0)
    steps, often = right.columns, right.sum(axis=1)
    lasting = right.iloc[:, ::-1].cumprod(axis=1).sum(axis=1).astype(int)  # right answers at the end
    latest = (right * np.arange(1, len(steps) + 1)).max(axis=1)  # 0: never right
    words = ["", *(f"right from step {step}" for step in steps[:0:-1]), "always right"]
    learned = lasting.map(lambda count: words[count]).where(lasting > 0, np.where(often, "lost again", "never right"))
    order = pd.DataFrame({"lasting": lasting, "latest": latest, "often": often, "learned": learned})
    order = order.sort_values(["lasting", "latest", "often"], ascending=False, kind="stable")
    texts = history.drop_duplicates("example_id").set_index("example_id")[["question", "answer"]]
    return texts.loc[order.index].assign(learned=order["learned"]).reset_index()


def between(history: pd.DataFrame, before: int, after: int) -> pd.DataFrame:
    """``by_learning`` with the model's own answers ``before`` and ``after``, and outcome.

    outcome is one of ``OUTCOMES``; None for a question that was not asked at both steps.
    """
    order = by_learning(history)
    said, right = (history.pivot(index="example_id", columns="step", values=name) for name in ("prediction", "right"))
    said, right = (table.loc[order["example_id"], [before, after]] for table in (said.fillna(""), right))
    outcome = [OUTCOMES.get(pair) for pair in right.itertuples(index=False, name=None)]
    return order.assign(before=said.iloc[:, 0].to_numpy(), after=said.iloc[:, 1].to_numpy(), outcome=outcome)
