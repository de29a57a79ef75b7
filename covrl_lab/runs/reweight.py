"""What every token of stored traces was worth, at any settings: numpy on log p and log q, no model, no torch.

The definitions are those of ``objectives``, in whose symbols everything here is named. N traces, T tokens
of the longest; padding and what is not known are NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ..types import ConfigError

LOG_RATIO_CAP = 30.0  # nats, as in objectives

# Quantities that views show, in reading order: name -> (label, unit).
LABELS = {
    "logp": ("log p", "nats"),
    "logq": ("log q", "nats"),
    "log_gap": ("log q − log p", "nats"),
    "log_hybrid": ("log h", "nats"),
    "log_composite": ("log p′", "nats"),
    "responsibility": ("responsibility ρ of the prior", ""),
    "ratio": ("importance ratio p′/h", ""),
    "clipped": ("held back by the clip", ""),
    "kl": ("KL contribution", "nats"),
    "gradient_weight": ("gradient weight", ""),
    "gradient_weight_prior": ("… of it on log p", ""),
    "gradient_weight_posterior": ("… of it on log q", ""),
}


@dataclass(frozen=True)
class Settings:
    """What the quantities depend on; fields as in ``RunConfig``."""

    alpha: float = 0.5
    composite_weight: float = 0.5
    clip: str = "ppo"  # "ppo", "soft" or "none"
    clip_range: float = 0.3
    clip_range_high: float | None = None  # None: as clip_range
    whole_traces: bool = False  # the group bound: weights P/H of whole traces, which advantages hold already

    def __post_init__(self) -> None:
        for name in ("alpha", "composite_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must lie between 0 and 1")
        if self.clip not in ("ppo", "soft", "none"):
            raise ConfigError(f"unknown clip {self.clip!r}; choose 'ppo', 'soft' or 'none'")
        if self.clip_range <= 0:
            raise ConfigError(f"clip_range is {self.clip_range}; it must be above 0")

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Settings:
        """Those of a run (``Run.config``); the defaults where it does not say."""
        names = ("alpha", "composite_weight", "clip", "clip_range", "clip_range_high")
        given = {name: config[name] for name in names if config.get(name) is not None}
        group_bound = config.get("method") == "covrl" and "evidence_floor" in config
        return cls(**given, whole_traces=group_bound)

    @property
    def clip_bounds(self) -> tuple[float, float]:
        """The least and largest ratio that "ppo" leaves alone."""
        high = self.clip_range if self.clip_range_high is None else self.clip_range_high
        return 1 - self.clip_range, 1 + high


@dataclass(frozen=True)
class Traces:
    """Traces as padded arrays.

    logp (N, T) nats; logq (N, T) or None; lengths (N,) tokens; from_prior and finished (N,) bool;
    advantage and reward (N,) or None where the traces never earned any; posterior_advantage (N,), the factor of
    log q, or None where the method has none.
    """

    logp: np.ndarray
    logq: np.ndarray | None
    lengths: np.ndarray
    from_prior: np.ndarray
    finished: np.ndarray
    advantage: np.ndarray | None = None
    reward: np.ndarray | None = None
    posterior_advantage: np.ndarray | None = None

    @classmethod
    def of(cls, frame: pd.DataFrame) -> Traces:
        """From rows of ``Run.traces`` or ``trace_frame``."""
        lengths = np.array([len(row) for row in frame["logp"]], dtype=int)
        scored = [row is not None for row in frame["logq"]]

        def column(name: str) -> np.ndarray | None:
            return frame[name].to_numpy(float) if name in frame else None

        return cls(
            logp=_pad(frame["logp"], lengths),
            logq=_pad(frame["logq"], lengths) if any(scored) else None,
            lengths=lengths,
            from_prior=(frame["source"] == "prior").to_numpy(bool),
            finished=frame["finished"].to_numpy(bool),
            advantage=column("advantage"),
            reward=column("reward"),
            posterior_advantage=column("posterior_advantage"),
        )

    @property
    def mask(self) -> np.ndarray:
        """(N, T) bool, True on trace tokens."""
        return np.arange(self.logp.shape[1]) < self.lengths[:, None]

    def __len__(self) -> int:
        return len(self.lengths)


def _pad(rows: Any, lengths: np.ndarray) -> np.ndarray:
    """(N, T), NaN behind the end of each row and in rows that are None."""
    padded = np.full((len(lengths), int(max(lengths, default=0))), np.nan)
    for i, row in enumerate(rows):
        if row is not None:
            padded[i, : lengths[i]] = row
    return padded


def answer_logprob(frame: pd.DataFrame) -> pd.Series:
    """log p(y|x,z) of every trace in nats: the sum over the reference answer's tokens."""
    return frame["answer_logp"].map(lambda tokens: float(np.sum(tokens))).astype(float)


def log_ratio_to_prior(d: np.ndarray, weight: float) -> np.ndarray:
    """log((weight p + (1 - weight) q) / p) from d = log q - log p."""
    if weight in (0, 1):
        return d * (1 - weight)
    with np.errstate(invalid="ignore"):  # padding
        return np.logaddexp(np.log(weight), d + np.log1p(-weight))


def quantities(traces: Traces, settings: Settings) -> dict[str, np.ndarray]:
    """Per-token quantities by name, each (N, T); what the traces do not allow is absent.

    logp, logq, log_gap         log p, log q, log q - log p, nats
    log_hybrid, log_composite   log h and log p', nats
    responsibility              rho = w p / p', the prior's share of a token's gradient
    ratio                       p'/h
    kl                          its estimate of KL(p'||p), nats; the loss leaves unfinished traces out
    clipped                     1 where the clip holds the gradient back, else 0
    gradient_weight             derivative of A f(p'/h) by log p', which is 0 under a PPO clip
    gradient_weight_prior       its part that moves log p: rho times it
    gradient_weight_posterior   its part that moves log q: 1 - rho times it

    With ``whole_traces`` the two parts are the trace's advantage and posterior advantage, the same on each token.
    Without log q only what alpha = 1 or w = 1 makes independent of it; without advantages no gradient.
    """
    s, logp = settings, traces.logp
    found = {"logp": logp}
    if traces.logq is not None:
        gap = traces.logq - logp
        found |= {"logq": traces.logq, "log_gap": gap}
    elif s.alpha == s.composite_weight == 1:
        gap = 0 * logp  # NaN stays NaN
    else:
        return found
    composite, hybrid = log_ratio_to_prior(gap, s.composite_weight), log_ratio_to_prior(gap, s.alpha)
    log_ratio = composite - hybrid
    ratio = np.exp(np.minimum(log_ratio, LOG_RATIO_CAP))
    rho = s.composite_weight * np.exp(-composite)
    found |= {"log_hybrid": logp + hybrid, "log_composite": logp + composite}
    found |= {"responsibility": rho, "ratio": ratio}
    if traces.logq is not None:
        u = np.minimum(composite, LOG_RATIO_CAP)
        importance = np.where(traces.from_prior[:, None], 0.0, np.minimum(-gap, LOG_RATIO_CAP))
        found["kl"] = np.exp(importance) * (np.exp(u) * composite - np.expm1(u))
    if traces.advantage is not None and s.whole_traces:
        prior, posterior = (
            np.where(np.isnan(logp), np.nan, 0.0 if part is None else np.nan_to_num(part)[:, None])
            for part in (traces.advantage, traces.posterior_advantage)
        )
        found |= {"clipped": 0 * logp, "gradient_weight": prior + posterior}
        found |= {"gradient_weight_prior": prior, "gradient_weight_posterior": posterior}
    elif traces.advantage is not None:
        clipped, slope = _clip(ratio, traces.advantage[:, None], s)
        gradient_weight = np.where(log_ratio > LOG_RATIO_CAP, 0.0, traces.advantage[:, None] * slope * ratio)
        gradient_weight = np.where(np.isnan(logp), np.nan, gradient_weight)
        found |= {"clipped": np.where(np.isnan(ratio), np.nan, clipped), "gradient_weight": gradient_weight}
        found |= {
            "gradient_weight_prior": gradient_weight * rho,
            "gradient_weight_posterior": gradient_weight * (1 - rho),
        }
    return found


def _clip(ratio: np.ndarray, advantage: np.ndarray, s: Settings) -> tuple[np.ndarray, np.ndarray]:
    """Where the clip holds the gradient back, and the slope f'(r) that is left."""
    if s.clip == "none":
        return np.zeros(ratio.shape, bool), np.ones_like(ratio)
    if s.clip == "soft":
        slope = np.cosh(np.minimum(np.abs(ratio - 1) / s.clip_range, 300.0)) ** -2  # cosh overflows at 710
        return np.abs(ratio - 1) > s.clip_range, slope
    low, high = s.clip_bounds
    clipped = ((advantage > 0) & (ratio > high)) | ((advantage < 0) & (ratio < low))
    return clipped, 1.0 - clipped


def trace_mass(traces: Traces, alpha: float) -> np.ndarray:
    """(N,) weights that sum to 1 and give the traces drawn from the prior the share ``alpha``.

    So stored traces speak for another alpha than the one that drew them. Where only one source is
    present, or neither, all traces count alike.
    """
    prior = traces.from_prior
    if prior.all() or not prior.any():
        return np.full(len(prior), 1 / max(1, len(prior)))
    return np.where(prior, alpha / prior.sum(), (1 - alpha) / (~prior).sum())


def summarise_traces(
    traces: Traces, settings: Settings, values: Mapping[str, np.ndarray] | None = None
) -> dict[str, float]:
    """What a step comes to at these settings; NaN where the traces do not say.

    Traces are weighed by ``trace_mass``; advantages stay those that the run computed.

    clipped_share                       of tokens
    effective_sample_share              (sum W)^2 / (N sum W^2) of the trace weights W = prod p'/h
    effective_sample_size               N times that, in traces
    reward, reward_prior, reward_posterior   means over traces, and by source
    kl                                  mean over tokens of finished traces, nats a token
    ratio_low, ratio_high               least and largest p'/h of a token
    gradient_weight_prior               mean |gradient weight| a token that reaches log p
    gradient_weight_posterior           the same for log q
    gradient_weight_prior_share         the first over their sum
    """
    values = quantities(traces, settings) if values is None else values
    mass, mask = trace_mass(traces, settings.alpha), traces.mask
    nothing = float("nan")

    def mean(rows: np.ndarray | None, keep: np.ndarray = mask) -> float:
        total = (mass[:, None] * keep).sum()
        if rows is None or not total:
            return nothing
        return float((mass[:, None] * np.where(keep, rows, 0.0)).sum() / total)

    def rewarded(keep: np.ndarray) -> float:
        return float(traces.reward[keep].mean()) if traces.reward is not None and keep.any() else nothing

    share, ratio = nothing, values.get("ratio")
    if ratio is not None and len(traces):
        log_weight = np.where(mask, np.log(ratio), 0.0).sum(1)
        weight = np.exp(log_weight - log_weight.max())
        share = float((mass * weight).sum() ** 2 / (mass * weight**2).sum())
    parts = {
        name: mean(np.abs(values[name]) if name in values else None)
        for name in ("gradient_weight_prior", "gradient_weight_posterior")
    }
    total = sum(parts.values())
    return {
        "clipped_share": mean(values.get("clipped")),
        "effective_sample_share": share,
        "effective_sample_size": share * len(traces),
        "reward": nothing if traces.reward is None else float((mass * traces.reward).sum()),
        "reward_prior": rewarded(traces.from_prior),
        "reward_posterior": rewarded(~traces.from_prior),
        "kl": mean(values.get("kl"), mask & traces.finished[:, None]),
        "ratio_low": nothing if ratio is None else float(np.nanmin(ratio)),
        "ratio_high": nothing if ratio is None else float(np.nanmax(ratio)),
        **parts,
        "gradient_weight_prior_share": parts["gradient_weight_prior"] / total if total else nothing,
    }


def densities(
    traces: Traces, settings: Settings, values: Mapping[str, np.ndarray] | None = None
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Histograms over tokens: name -> (edges of equal bins, share of all tokens in each).

    "log p", "log q", "log h" in nats; "ratio prior" and "ratio posterior" in log p'/h, by the source that
    drew the trace. Bins are the same for all settings, and what lies outside is counted in the outermost.
    Traces are weighed by ``trace_mass``. Empty without log q.
    """
    values = quantities(traces, settings) if values is None else values
    if traces.logq is None:
        return {}
    mask, prior = traces.mask, traces.from_prior[:, None]
    weight = np.broadcast_to(trace_mass(traces, settings.alpha)[:, None], mask.shape)
    weight = weight / weight[mask].sum()
    known = mask & np.isfinite(values["log_gap"])

    def histogram(x: np.ndarray, keep: np.ndarray, low: float, high: float, bins: int) -> Any:
        edges = np.linspace(low, high, bins + 1)
        place = ((np.clip(x[keep], low, high) - low) * (bins / (high - low))).astype(int)
        return edges, np.bincount(np.minimum(place, bins - 1), weight[keep], bins)

    found = {
        label: histogram(values[name], known, -12, 0, 24)
        for label, name in (("log p", "logp"), ("log q", "logq"), ("log h", "log_hybrid"))
    }
    log_ratio = np.log(values["ratio"])
    for source, keep in (("prior", prior), ("posterior", ~prior)):
        # An odd number, so that a ratio of exactly 1 stands in the middle of a bin.
        found[f"ratio {source}"] = histogram(log_ratio, known & keep, -1.61, 1.61, 47)
    return found


def gradient_weights(
    traces: Traces, settings: Settings, values: Mapping[str, np.ndarray] | None = None
) -> dict[tuple[str, str], float]:
    """(moved, drawn from) -> mean |gradient weight| a token on log p ("prior") or log q ("posterior").

    Over the sources these add up to the gradient weights of ``summarise_traces``.
    """
    values = quantities(traces, settings) if values is None else values
    if "gradient_weight_prior" not in values:
        return {}
    mask = traces.mask
    weight = trace_mass(traces, settings.alpha)[:, None] * mask
    return {
        (moved, source): float(
            (weight * np.where(mask, np.abs(values[f"gradient_weight_{moved}"]), 0.0))[rows].sum() / weight.sum()
        )
        for moved in ("prior", "posterior")
        for source, rows in (("prior", traces.from_prior), ("posterior", ~traces.from_prior))
    }
