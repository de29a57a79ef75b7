"""What every token of stored traces was worth, at any settings: numpy on log p and log q, no model, no torch.

The definitions are those of ``objectives``, in whose symbols everything here is named. N traces, T tokens
of the longest; padding and what is not known are NaN.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any, Self

import numpy as np
import pandas as pd

from ..types import ConfigError

LOG_RATIO_CAP = 30.0  # nats, as in objectives

Values = Mapping[str, np.ndarray]  # what ``quantities`` gives

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
    def of(cls, config: Mapping[str, Any]) -> Self:
        """Those of a run (``Run.config``); the defaults where it does not say."""
        given = {f.name: config[f.name] for f in fields(cls) if config.get(f.name) is not None}
        return cls(**given, whole_traces=config.get("method") == "covrl" and "evidence_floor" in config)

    @classmethod
    def at(cls, config: Mapping[str, Any], frame: pd.DataFrame) -> Self:
        """Those of a step, whose traces are ``frame``: where alpha adapts, it is the prior's share of them."""
        own = cls.of(config)
        if not config.get("alpha_rate") or frame.empty:
            return own
        return replace(own, alpha=round(float(frame["source"].eq("prior").mean()), 2))

    @property
    def clip_bounds(self) -> tuple[float, float]:
        """The least and largest ratio that "ppo" leaves alone."""
        return 1 - self.clip_range, 1 + (self.clip_range if self.clip_range_high is None else self.clip_range_high)


@dataclass(frozen=True)
class Traces:
    """Stored traces as padded arrays."""

    logp: np.ndarray  # (N, T) nats
    logq: np.ndarray | None  # (N, T) nats; None where no trace was scored under the posterior prompt
    lengths: np.ndarray  # (N,) tokens
    from_prior: np.ndarray  # (N,) bool
    finished: np.ndarray  # (N,) bool
    advantage: np.ndarray | None = None  # (N,); None, as the reward, where the traces never earned any
    reward: np.ndarray | None = None  # (N,)
    posterior_advantage: np.ndarray | None = None  # (N,) the factor of log q; None where the method has none

    @classmethod
    def of(cls, frame: pd.DataFrame) -> Self:
        """From rows of ``Run.traces`` or ``trace_frame``."""
        lengths = np.array([len(row) for row in frame["logp"]], dtype=int)
        earned = {name: frame[name] for name in ("advantage", "reward", "posterior_advantage") if name in frame}
        return cls(
            logp=_pad(frame["logp"], lengths),
            logq=_pad(frame["logq"], lengths) if frame["logq"].notna().any() else None,
            lengths=lengths,
            from_prior=(frame["source"] == "prior").to_numpy(bool),
            finished=frame["finished"].to_numpy(bool),
            **{name: column.to_numpy(float) for name, column in earned.items()},
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
    rows = frame["answer_logp"].to_numpy()
    owner = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    return pd.Series(np.bincount(owner, np.concatenate([[], *rows]), len(rows)), frame.index)


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
    if traces.advantage is None:
        return found
    if s.whole_traces:
        clipped = np.zeros(ratio.shape)
        prior, posterior = (
            np.broadcast_to(0.0 if part is None else np.nan_to_num(part)[:, None], ratio.shape)
            for part in (traces.advantage, traces.posterior_advantage)
        )
        total = prior + posterior
    else:
        advantage = traces.advantage[:, None]
        clipped, slope = _clip(ratio, advantage, s)
        total = np.where(log_ratio > LOG_RATIO_CAP, 0.0, advantage * slope * ratio)
        prior, posterior = total * rho, total * (1 - rho)
    names = ("clipped", "gradient_weight", "gradient_weight_prior", "gradient_weight_posterior")
    weights = zip(names, (clipped, total, prior, posterior), strict=True)
    return found | {name: np.where(np.isnan(logp), np.nan, values) for name, values in weights}


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

    So stored traces speak for another alpha than the one that drew them. Of one source alone, all count alike.
    """
    prior = traces.from_prior
    if prior.all() or not prior.any():
        return np.full(len(prior), 1 / max(1, len(prior)))
    return np.where(prior, alpha / prior.sum(), (1 - alpha) / (~prior).sum())


def token_shares(traces: Traces, alpha: float) -> np.ndarray:
    """(N, T) share of each token in means over tokens, by ``trace_mass``; they sum to 1 over the mask."""
    mass = np.broadcast_to(trace_mass(traces, alpha)[:, None], traces.logp.shape)
    return mass / mass.sum(where=traces.mask)


def summarise_traces(traces: Traces, settings: Settings, values: Values | None = None) -> dict[str, float]:
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
    mass, mask, nothing = trace_mass(traces, settings.alpha), traces.mask, float("nan")
    shares = token_shares(traces, settings.alpha)

    def mean(rows: np.ndarray | None, keep: np.ndarray = mask) -> float:
        known = rows is not None and shares[keep].any()
        return float(np.average(rows[keep], weights=shares[keep])) if known else nothing

    def rewarded(keep: np.ndarray) -> float:
        return float(traces.reward[keep].mean()) if traces.reward is not None and keep.any() else nothing

    share, ratio = nothing, values.get("ratio")
    if ratio is not None and len(traces):
        log_weight = np.where(mask, np.log(ratio), 0.0).sum(1)
        trace_weight = np.exp(log_weight - log_weight.max())
        share = float((mass * trace_weight).sum() ** 2 / (mass * trace_weight**2).sum())
    prior, posterior = (
        mean(np.abs(values[name]) if name in values else None)
        for name in ("gradient_weight_prior", "gradient_weight_posterior")
    )
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
        "gradient_weight_prior": prior,
        "gradient_weight_posterior": posterior,
        "gradient_weight_prior_share": prior / (prior + posterior) if prior + posterior else nothing,
    }


def densities(
    traces: Traces, settings: Settings, values: Values | None = None
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Histograms over tokens: name -> (edges of equal bins, share of all tokens in each). Empty without log q.

    "log p", "log q", "log h" in nats; "ratio prior" and "ratio posterior" in log p'/h, by the source that
    drew the trace. Bins are the same for all settings, and what lies outside is counted in the outermost.
    """
    if traces.logq is None:
        return {}
    values = quantities(traces, settings) if values is None else values
    known, prior = traces.mask & np.isfinite(values["log_gap"]), traces.from_prior[:, None]
    shares = token_shares(traces, settings.alpha)

    def histogram(x: np.ndarray, keep: np.ndarray, low: float, high: float, bins: int) -> Any:
        counts, edges = np.histogram(np.clip(x[keep], low, high), bins, (low, high), weights=shares[keep])
        return edges, counts

    found = {
        label: histogram(values[name], known, -12, 0, 24)
        for label, name in (("log p", "logp"), ("log q", "logq"), ("log h", "log_hybrid"))
    }
    log_ratio = np.log(values["ratio"])
    for source, keep in (("prior", prior), ("posterior", ~prior)):
        # An odd number, so that a ratio of exactly 1 stands in the middle of a bin.
        found[f"ratio {source}"] = histogram(log_ratio, known & keep, -1.61, 1.61, 47)
    return found


def gradient_weights(traces: Traces, settings: Settings, values: Values | None = None) -> dict[tuple[str, str], float]:
    """(moved, drawn from) -> mean |gradient weight| a token on log p ("prior") or log q ("posterior").

    Over the sources these add up to the gradient weights of ``summarise_traces``.
    """
    values = quantities(traces, settings) if values is None else values
    if "gradient_weight_prior" not in values:
        return {}
    shares = token_shares(traces, settings.alpha)
    pulls = {moved: shares * np.abs(values[f"gradient_weight_{moved}"]) for moved in ("prior", "posterior")}
    return {
        (moved, source): float(pull[rows].sum(where=traces.mask[rows]))
        for moved, pull in pulls.items()
        for source, rows in (("prior", traces.from_prior), ("posterior", ~traces.from_prior))
    }


def value_by_use(traces: pd.DataFrame, shares: np.ndarray, evidence_floor: float = 0.5) -> pd.DataFrame:
    """Both bounds of CoVRL, in nats, when each trace is kept with probability ``share`` and else exchanged for none.

    traces: rows of ``Run.traces()`` of method ``covrl``, whole groups; their mean over questions is taken. Columns:
    share; published, E[log p(y|x,z)], one trace in the logarithm; group, E[log(c + mean_i e_i)] over all choices of
    kept traces, with c = p(y|x, no trace) ^ evidence_floor. A bound that falls with the share prefers not to reason.
    """
    published, group = [], []
    for _, rows in traces.groupby(["step", "example_id"]):
        log_bare = float(rows["no_trace_logp"].iloc[0])
        kept = np.array(list(product([False, True], repeat=len(rows))))
        evidence = np.where(kept, rows["reward"].to_numpy(), np.exp(log_bare)).mean(1)
        chance = np.where(kept, shares[:, None, None], 1 - shares[:, None, None]).prod(2)
        group.append(chance @ np.log(np.exp(evidence_floor * log_bare) + evidence))
        published.append(shares * answer_logprob(rows).mean() + (1 - shares) * log_bare)
    return pd.DataFrame({"share": shares, "published": np.mean(published, 0), "group": np.mean(group, 0)})
