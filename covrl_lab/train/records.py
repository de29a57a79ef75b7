"""What a step measures: its line of ``metrics.jsonl`` and its rows of ``traces``."""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
from torch import Tensor

from ..config import RunConfig
from ..types import Credit, Example, LogProbs, Prompt, TraceBatch
from .objectives import log_mixture, responsibility
from .probe import trace_frame
from .prompts import Prompter
from .scoring import packed_tokens


@dataclass(frozen=True)
class StepRecord:
    """What one step measured; a line of ``metrics.jsonl``. A mean over no trace is None.

    Rewards and log-probabilities are in nats (or probabilities, where the method's reward is one), KL in nats a token,
    seconds are wall-clock. ``*_prior`` and ``*_posterior`` are means over traces by source.
    """

    step: int
    loss: float | None  # what is not finite is None
    policy_loss: float | None
    nll: float | None  # weighted by c_y: nats an answer token of all traces (token_mean), or a trace
    kl: float | None
    reward: float
    reward_prior: float | None
    reward_posterior: float | None
    answer_logprob_prior: float | None  # log p(y|x,z), also after unfinished traces
    answer_logprob_posterior: float | None
    right_prior: float | None  # share of traces after which the model's own answer is right, where it is judged
    right_posterior: float | None
    prior_share: float  # traces that the prior prompt drew: alpha as it was used
    finished_share: float
    trace_tokens: float
    trace_tokens_prior: float | None
    trace_tokens_posterior: float | None
    one_token_share: float  # traces of a single token
    equal_reward_share: float | None  # questions whose traces all earn the same; None with one trace each
    answer_term_share: float  # traces in the answer term
    answer_term_unlikely: float | None  # share of its weight on traces with p(y|x,z) < 1/2
    clipped_share: float  # tokens whose gradient the clip holds back
    effective_sample_share: float  # (sum W)^2 / (N sum W^2) of the trace weights W = prod p'/h
    responsibility_prior: float | None  # mean rho on traces of each source
    responsibility_posterior: float | None
    log_ratio_extreme_share: float  # tokens with |log q - log p| above 10 nats
    sampler_mismatch: float | None  # mean |log-probability when drawn - when scored|, nats a token
    gradient_norm: float | None  # before the clip
    skipped: int  # 1 where loss or gradient was not finite, and the update was left out
    learning_rate: float
    accuracy: float | None  # greedy held-out accuracy after this step, where it was evaluated
    seconds: float
    seconds_sampling: float
    seconds_update: float
    packed_tokens: int  # tokens a scoring forward computed, and what padded rows would have
    padded_tokens: int
    peak_memory_gib: float | None  # None where the system does not report it


def step_record(
    config: RunConfig,
    step: int,
    prompts: Sequence[Prompt],
    batch: TraceBatch,
    old: LogProbs,
    credit: Credit,
    losses: Mapping[str, float],
    **measured: float | None,
) -> StepRecord:
    """The record of step ``step`` (from 1). ``old`` are the log-probabilities before its update.

    ``measured`` are the fields that the training loop knows, such as gradient_norm.
    """

    def mean(values: Tensor, keep: Tensor | None = None) -> float | None:
        values = values.float() if keep is None else values[keep].float()
        return float(values.mean()) if values.numel() else None

    lengths, prior, by_source = batch.mask.sum(1), batch.from_prior, {}
    traces = {"reward": credit.reward, "answer_logprob": old.answer.sum(1), "trace_tokens": lengths}
    traces["right"] = None if batch.verifier_reward is None else batch.verifier_reward >= 1
    for name, values in traces.items():
        for source, keep in (("prior", prior), ("posterior", ~prior)):
            by_source[f"{name}_{source}"] = None if values is None else mean(values, keep)
    weight = log_ratio(old, config).sum(1).double()
    weight = (weight - weight.max()).exp()
    rho = gap = None
    scored, known = old.prior, batch.mask & prior[:, None]  # under the prompt that drew the trace
    if old.posterior is not None:
        rho = responsibility(old, config.composite_weight)
        gap = (old.posterior - old.prior).abs() > 10
        scored, known = torch.where(prior[:, None], old.prior, old.posterior), batch.mask
    drawn = batch.sampler_logprobs
    groups = credit.reward.view(-1, batch.group_size)
    packed, padded = packed_tokens(prompts, batch, config.needs_posterior)
    record = StepRecord(
        step=step,
        loss=losses["loss"],
        policy_loss=losses["policy"],
        nll=losses["nll"] if config.nll_weight and (credit.answer_weight != 0).any() else None,
        kl=losses.get("kl"),
        reward=mean(credit.reward),
        prior_share=mean(prior),
        finished_share=mean(batch.finished),
        trace_tokens=mean(lengths),
        one_token_share=mean(lengths == 1),
        equal_reward_share=mean(groups.amax(1) == groups.amin(1)) if batch.group_size > 1 else None,
        answer_term_share=mean(credit.answer_weight != 0),
        answer_term_unlikely=unlikely_share(credit.answer_weight, old.answer.sum(1)) if config.nll_weight else None,
        clipped_share=losses["clipped_share"],
        effective_sample_share=float(weight.sum() ** 2 / (len(batch) * (weight**2).sum())),
        responsibility_prior=None if rho is None else mean(rho, batch.mask & prior[:, None]),
        responsibility_posterior=None if rho is None else mean(rho, batch.mask & ~prior[:, None]),
        log_ratio_extreme_share=0.0 if gap is None else mean(gap, batch.mask),
        sampler_mismatch=None if drawn is None else mean((scored - drawn).abs(), known),
        seconds=measured["seconds_sampling"] + measured["seconds_update"],
        packed_tokens=packed,
        padded_tokens=padded,
        peak_memory_gib=peak_memory_gib(batch.mask.device),
        **by_source,
        **measured,
    )
    wrong = [name for name, value in vars(record).items() if isinstance(value, float) and not math.isfinite(value)]
    return replace(record, **dict.fromkeys(wrong))


def unlikely_share(weight: Tensor, answer_logprob: Tensor) -> float | None:
    """The share of ``weight`` (N,) on traces after which the answer is not likely, p(y|x,z) < 1/2; None of none."""
    total = float(weight.sum())
    return float(weight[answer_logprob < math.log(0.5)].sum()) / total if total else None


def log_ratio(old: LogProbs, config: RunConfig) -> Tensor:
    """log p'/h of each token, (N, T) nats, before the update."""
    return log_mixture(old, config.composite_weight) - log_mixture(old, config.alpha)


def trace_rows(
    config: RunConfig,
    step: int,
    examples: Sequence[Example],
    batch: TraceBatch,
    old: LogProbs,
    credit: Credit,
    prompter: Prompter,
) -> pd.DataFrame:
    """One row a rollout of step ``step`` (from 1), with the columns of ``Run.traces``."""
    frame = trace_frame(examples, batch, old, prompter)
    frame.insert(0, "step", step)
    ratios = zip(log_ratio(old, config), batch.mask, strict=True)
    frame["log_ratio"] = [row[keep].tolist() for row, keep in ratios]
    columns = {name: getattr(credit, name) for name in ("reward", "advantage", "answer_weight")}
    columns["posterior_advantage"] = credit.posterior_advantage
    columns["no_trace_logp"] = None if old.no_trace is None else old.no_trace.sum(1)
    for name, values in columns.items():
        frame[name] = float("nan") if values is None else values.tolist()
    frame["prediction"] = batch.predictions
    frame["right"] = None if batch.verifier_reward is None else (batch.verifier_reward >= 1).tolist()
    frame["answer_tokens"] = frame.pop("answer_tokens")  # last, as files of earlier versions lack it
    return frame


def peak_memory_gib(device: torch.device) -> float | None:
    """The process's peak so far: GPU memory allocated, or resident memory on a CPU. None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource  # Unix only
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes on macOS, KiB on Linux
