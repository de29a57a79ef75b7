"""Held-out questions through a run's evaluations: which were learned, gained and lost. Greedy answers only."""

from __future__ import annotations

import numpy as np
import pandas as pd

from ..types import ConfigError
from .folder import Run, steps_in

OUTCOMES = {(True, True): "right at both", (False, True): "gained", (True, False): "lost"}


def history(run: Run) -> pd.DataFrame:
    """One row a question and evaluation: the columns of ``Run.predictions``, step, and right (a full score)."""
    steps = steps_in(run.path / "evaluations")
    if not steps:
        raise ConfigError(f"{run.path} has no evaluations yet; wait for the first, or set eval_questions")
    found = pd.concat([run.predictions(step).query("sample < 0").assign(step=step) for step in steps])
    return found.assign(right=found["score"] >= 1).reset_index(drop=True)


def right_answers(history: pd.DataFrame) -> pd.DataFrame:
    """Whether each answer was right, 1 or 0: a row a question, a column a step; NaN where it was not asked."""
    return history.pivot(index="example_id", columns="step", values="right").astype(float)


def by_learning(history: pd.DataFrame) -> pd.DataFrame:
    """One row a question, the soonest learned first: example_id, question, answer, learned.

    A question is learned with the first of the right answers that last to the end. Those whose last answer is
    wrong follow, the latest lost first, and then those that were never right.
    """
    right = right_answers(history).fillna(0)
    lasting = right.iloc[:, ::-1].cumprod(axis=1).sum(axis=1).astype(int)  # right answers at the end
    latest = (right * np.arange(1, right.shape[1] + 1)).max(axis=1)  # 0: never right

    def words(count: int, last: float) -> str:
        if count == right.shape[1]:
            return "always right"
        return f"right from step {right.columns[-count]}" if count else "lost again" if last else "never right"

    learned = [words(*pair) for pair in zip(lasting, latest, strict=True)]
    order = pd.DataFrame({"lasting": lasting, "latest": latest, "often": right.sum(axis=1), "learned": learned})
    order = order.sort_values(["lasting", "latest", "often"], ascending=False, kind="stable")
    texts = history.drop_duplicates("example_id").set_index("example_id")[["question", "answer"]]
    return texts.loc[order.index].assign(learned=order["learned"]).reset_index()


def outcomes(history: pd.DataFrame, before: int, after: int) -> pd.Series:
    """example_id -> "gained", "lost", "right at both" or "wrong at both", of the questions asked at both steps."""
    pairs = right_answers(history)[[before, after]].dropna().astype(bool)
    found = [OUTCOMES.get(pair, "wrong at both") for pair in pairs.itertuples(index=False, name=None)]
    return pd.Series(found, pairs.index, dtype=str)
