"""Means, shares and their intervals, all of 95%: numpy alone."""

import math
from statistics import NormalDist

import numpy as np

TAILS = [(1 - 0.95) / 2, (1 + 0.95) / 2]
Z = NormalDist().inv_cdf(TAILS[1])


def interquartile_mean(values: np.ndarray) -> np.ndarray:
    """Mean of the middle half along the last axis: a quarter, rounded down, is dropped at each end.

    With fewer than four values nothing is dropped, and it is the mean.
    """
    values = np.sort(np.asarray(values, dtype=float), axis=-1)
    count = values.shape[-1]
    return values[..., count // 4 : count - count // 4].mean(-1)


def share_interval(right: float, count: int) -> tuple[float, float, float]:
    """(share, low, high) of ``right`` out of ``count``: Wilson's interval, never a point, also at 0 and 1."""
    if count < 1:
        raise ValueError("no answers to count")
    share, weight = right / count, Z**2 / count
    centre = (share + weight / 2) / (1 + weight)
    half = math.sqrt(weight * (share * (1 - share) + weight / 4)) / (1 + weight)
    return share, max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_interval(scores: np.ndarray, resamples: int = 10_000, seed: int = 0) -> tuple[float, float, float]:
    """(mean, low, high) of the mean over the first axis, by the percentile bootstrap over questions.

    Equal scores give a point, however few there are; ``share_interval`` is for right and wrong answers.
    """
    scores = np.asarray(scores, dtype=float)
    if len(scores) == 0:
        raise ValueError("no scores to average")
    per_question = scores.reshape(len(scores), -1).mean(1)
    rng, rows = np.random.default_rng(seed), max(1, 2**22 // len(scores))  # of resamples in memory at once
    sizes = [min(rows, resamples - start) for start in range(0, resamples, rows)]
    means = [per_question[rng.integers(0, len(scores), (size, len(scores)))].mean(1) for size in sizes]
    low, high = np.quantile(np.concatenate(means), TAILS)
    return float(per_question.mean()), float(low), float(high)


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p of McNemar's test: how often a fair coin parts these questions at least as unevenly."""
    count = gained + lost
    return min(1.0, 2 * sum(math.comb(count, k) for k in range(min(gained, lost) + 1)) / 2**count)


def paired_interval(gained: int, lost: int, count: int) -> tuple[float, float, float]:
    """(change, low, high) of the share of right answers when the same ``count`` questions are asked twice.

    Bonett and Price 2012: Wald's interval with one gain and one loss added, so that it is never a point.
    """
    if count < 1:
        raise ValueError("no answers to count")
    up, down = (gained + 1) / (count + 2), (lost + 1) / (count + 2)
    half = Z * math.sqrt((up + down - (up - down) ** 2) / (count + 2))
    return (gained - lost) / count, max(-1.0, up - down - half), min(1.0, up - down + half)
