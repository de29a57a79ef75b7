"""Does a bound pay for reasoning? Its value where only a share of the traces is used, the others being empty."""

from __future__ import annotations

from itertools import product

import numpy as np
import pandas as pd


def value_by_use(traces: pd.DataFrame, shares: np.ndarray, evidence_floor: float = 0.5) -> pd.DataFrame:
    """Both bounds of CoVRL, in nats, when each trace is kept with probability ``share`` and else exchanged for none.

    traces: rows of ``Run.traces()`` of method ``covrl``, whole groups; their mean over questions is taken. Columns:
    share; published, E[log p(y|x,z)], one trace in the logarithm (arXiv 2512.12576); group, E[log(c + mean_i e_i)]
    over all choices of kept traces, with c = p(y|x, no trace) ^ evidence_floor (METHODS.md, "The group bound").
    A bound that falls with the share prefers a policy that does not reason.
    """
    published, group = [], []
    for _, rows in traces.groupby(["step", "example_id"]):
        log_bare = float(rows["no_trace_logp"].iloc[0])
        answer = np.array([np.sum(tokens) for tokens in rows["answer_logp"]])
        kept = np.array(list(product([False, True], repeat=len(rows))))
        evidence = np.where(kept, rows["reward"].to_numpy(), np.exp(log_bare)).mean(1)
        value = np.log(np.exp(evidence_floor * log_bare) + evidence)
        chance = np.where(kept, shares[:, None, None], 1 - shares[:, None, None]).prod(2)
        group.append(chance @ value)
        published.append(shares * answer.mean() + (1 - shares) * log_bare)
    if not group:
        raise ValueError("no traces to take the bounds of")
    return pd.DataFrame({"share": shares, "published": np.mean(published, 0), "group": np.mean(group, 0)})


def guessing_world(right: float = 0.25, group_size: int = 4) -> pd.DataFrame:
    """Every group of traces in a world of guesses, in equal numbers: rows for ``value_by_use``.

    Without a trace the answer has e^-5; a share ``right`` of the traces leaves it at 0.95, and the others, which are
    wrong and which the model trusts, at e^-12.
    """
    kinds = [np.log(0.95)] * round(right * group_size) + [-12.0] * round((1 - right) * group_size)
    rows = [
        {"step": 1, "example_id": number, "answer_logp": [log], "reward": np.exp(log), "no_trace_logp": -5.0}
        for number, group in enumerate(product(kinds, repeat=group_size))
        for log in group
    ]
    return pd.DataFrame(rows)
