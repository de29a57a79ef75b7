"""Teacher-forced log-probabilities of traces under both prompts and of answers, packed as a prefix tree.

For each rollout up to three sequences are scored: trace after the prior prompt, the same trace ids after
the posterior prompt, and seam + answer after prior prompt + trace. ``trace_logprobs`` packs all of
them into one tree (see tree.py) and applies the output head only at scored positions, a chunk at a time.
``packed=False`` is the plain reference: one padded row per sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..types import LogProbs, Prompt, TraceBatch
from .policy import Policy
from .tree import build_tree, count_nodes, final_logits, logit_cap, run_tree

MAX_LOGITS_BYTES = 32 * 2**20  # float32 logits that exist at once


@dataclass(frozen=True)
class Segment:
    """A sequence of which the tokens ``start:`` are scored, with logits divided by ``temperature``."""

    ids: list[int]
    start: int
    temperature: float


class _HeadLogprobs(torch.autograd.Function):
    """log softmax(head(hidden) / temperature)[targets] and, in the same pass, each row's own gradient.

    A row's log-probability depends on its own hidden state only, so d logp / d hidden is one vector a row:
    W'(onehot - softmax) / temperature. Keeping it (k, size) spares the backward pass the (k, vocabulary)
    logits and their recomputation.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, targets: Tensor, temperature: Tensor, policy: Policy) -> Tensor:
        weight, needed = policy.head.weight, ctx.needs_input_grad[0]
        cap = logit_cap(policy)
        logprobs = torch.empty(len(hidden), device=hidden.device)
        slope = torch.empty_like(hidden) if needed else None
        rows = max(1, MAX_LOGITS_BYTES // (4 * len(weight)))
        for i in range(0, len(hidden), rows):
            part, target = slice(i, i + rows), targets[i : i + rows, None]
            logits = final_logits(policy, hidden[part])
            bent = 1 - (logits / cap) ** 2 if cap and needed else None  # d capped / d plain logit
            logits /= temperature[part, None]
            chosen, top = logits.gather(1, target), logits.amax(1, keepdim=True)
            total = logits.sub_(top).exp_().sum(1, keepdim=True)
            logprobs[part] = (chosen - top - total.log())[:, 0]
            if needed:
                logits.scatter_add_(1, target, -total)  # now -total x (onehot - softmax)
                if bent is not None:
                    logits *= bent
                slope[part] = (logits.to(weight.dtype) @ weight) / (-total * temperature[part, None])
        if needed:
            ctx.save_for_backward(slope)
        return logprobs

    @staticmethod
    def backward(ctx, grad: Tensor):
        (slope,) = ctx.saved_tensors
        return (grad[:, None] * slope).to(slope.dtype), None, None, None


def token_logprobs(policy: Policy, hidden: Tensor, targets: Tensor, temperature: Tensor) -> Tensor:
    """log softmax(head(hidden) / temperature)[targets], (k,) float32, for hidden (k, size).

    The (k, vocabulary) logits never exist at once, but MAX_LOGITS_BYTES of them.
    """
    return _HeadLogprobs.apply(hidden, targets, temperature, policy)


def score_segments(policy: Policy, segments: Sequence[Segment], packed: bool = True) -> list[Tensor]:
    """Each segment's (scored tokens,) log-probabilities, all in one forward.

    ``packed=False``, or a model that cannot run a tree: one padded row a segment.
    """
    return (_score_packed if packed and policy.packs else _score_rows)(policy, segments)


def _read(segment: Segment) -> list[int]:
    """The ids a forward needs: all but the last, which predicts nothing."""
    return segment.ids[:-1]


def _score_packed(policy: Policy, segments: Sequence[Segment]) -> list[Tensor]:
    tree = build_tree([_read(s) for s in segments])
    before = torch.cat([path[s.start - 1 :] for s, path in zip(segments, tree.paths, strict=True)])
    return _scored(policy, segments, run_tree(policy, tree), before)


def _score_rows(policy: Policy, segments: Sequence[Segment]) -> list[Tensor]:
    """The same numbers from right-padded rows, as every trainer computes them; the tests' reference."""
    device = policy.device
    rows = [torch.tensor(s.ids) for s in segments]
    ids = pad_sequence(rows, batch_first=True).to(device)
    mask = pad_sequence([torch.ones_like(r) for r in rows], batch_first=True).to(device)
    hidden = policy.decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    width = ids.shape[1]
    before = [i * width + torch.arange(s.start - 1, len(s.ids) - 1) for i, s in enumerate(segments)]
    return _scored(policy, segments, hidden.flatten(0, 1), torch.cat(before))


def _scored(policy: Policy, segments: Sequence[Segment], hidden: Tensor, before: Tensor) -> list[Tensor]:
    """hidden (n, size); before (k,) is its row that predicts each of the segments' scored tokens."""
    lengths = [len(s.ids) - s.start for s in segments]
    targets = torch.tensor([t for s in segments for t in s.ids[s.start :]])
    temperature = torch.tensor([s.temperature for s in segments], dtype=torch.float64)
    temperature = temperature.repeat_interleave(torch.tensor(lengths))
    # Rollouts that agree so far ask for the same number: each (state, token, temperature) is computed once.
    asked = torch.stack([before.double(), targets.double(), temperature])
    (before, targets, temperature), place = asked.unique(dim=1, return_inverse=True)
    logprobs = token_logprobs(
        policy,
        hidden[before.long().to(hidden.device)],
        targets.long().to(hidden.device),
        temperature.float().to(hidden.device),
    )
    return list(logprobs[place.to(hidden.device)].split(lengths))


def _segments(
    prompts: Sequence[Prompt],
    batch: TraceBatch,
    temperature: float,
    posterior: bool,
    answers: bool = True,
    no_trace: bool = False,
) -> dict[str, list[Segment]]:
    out: dict[str, list[Segment]] = {"prior": []}
    for i in range(len(batch)):
        p, z = prompts[i // batch.group_size], batch.trace(i)
        out["prior"].append(Segment([*p.prior, *z], len(p.prior), temperature))
        if posterior:
            out.setdefault("posterior", []).append(Segment([*p.posterior, *z], len(p.posterior), temperature))
        if answers:
            out.setdefault("answer", []).append(_answer_segment(p, z))
        if no_trace:
            out.setdefault("no_trace", []).append(_answer_segment(p, p.empty_trace))
    return out


def _answer_segment(prompt: Prompt, trace: Sequence[int]) -> Segment:
    """The answer after a trace. It is a likelihood of the model itself: always at temperature 1."""
    context = [*prompt.prior, *trace, *prompt.seam]
    return Segment([*context, *prompt.answer], len(context), 1.0)


@torch.no_grad()
def answer_logprobs(policy: Policy, prompts: Sequence[Prompt], traces: Sequence[Sequence[int]]) -> Tensor:
    """log p(y|x,z) in nats, (k,), of k prompts' answers after k traces (token ids)."""
    segments = [_answer_segment(p, z) for p, z in zip(prompts, traces, strict=True)]
    return torch.stack([values.sum() for values in score_segments(policy, segments)])


def _pad(rows: list[Tensor], width: int) -> Tensor:
    """Rows under each other, padded with zeros to ``width`` columns."""
    padded = pad_sequence(rows, batch_first=True)
    return torch.nn.functional.pad(padded, (0, width - padded.shape[1]))


def trace_logprobs(
    policy: Policy,
    prompts: Sequence[Prompt],
    batch: TraceBatch,
    *,
    temperature: float = 1.0,
    posterior: bool = True,
    no_trace: bool = False,
    packed: bool = True,
) -> LogProbs:
    """Score B prompts' N traces and reference answers; differentiable where gradients are enabled.

    Trace log-probabilities are those of the sampling distribution softmax(logits / temperature) over the
    whole vocabulary; answers are scored at temperature 1. ``posterior=False`` leaves log q out,
    ``no_trace`` adds the answers after an empty trace, without gradient.
    ``packed=False`` uses plain padded rows.
    """
    groups = _segments(prompts, batch, temperature, posterior, no_trace=no_trace)
    flat = [s for segments in groups.values() for s in segments]
    scores = iter(score_segments(policy, flat, packed))
    rows = {name: [next(scores) for _ in segments] for name, segments in groups.items()}
    width = batch.mask.shape[1]
    answer = pad_sequence(rows["answer"], batch_first=True)
    lengths = torch.tensor([len(r) for r in rows["answer"]], device=answer.device)
    core = [torch.tensor(prompts[i // batch.group_size].answer_core) for i in range(len(batch))]
    return LogProbs(
        prior=_pad(rows["prior"], width),
        posterior=_pad(rows["posterior"], width) if posterior else None,
        no_trace=pad_sequence(rows["no_trace"], batch_first=True).detach() if no_trace else None,
        answer_core=pad_sequence(core, batch_first=True).to(answer.device),
        answer=answer,
        answer_mask=torch.arange(answer.shape[1], device=answer.device) < lengths[:, None],
    )


@torch.no_grad()
def reference(
    policy: Policy,
    prompts: Sequence[Prompt],
    batch: TraceBatch,
    needs: frozenset[str],
    temperature: float = 1.0,
) -> dict[str, Tensor]:
    """Log-probabilities under the frozen base (adapter off), by name of the ``LogProbs`` field.

    "ref_prior" (N, T): the traces under the prior prompt. "bare_answer" (N, A): the answers right after the
    prior prompt, without a trace.
    """
    found = {}
    with policy.base():
        if "ref_prior" in needs:
            segments = _segments(prompts, batch, temperature, posterior=False, answers=False)["prior"]
            found["ref_prior"] = _pad(score_segments(policy, segments), batch.mask.shape[1])
        if "bare_answer" in needs:
            segments = [_answer_segment(p, p.empty_trace) for p in prompts]
            rows = pad_sequence(score_segments(policy, segments), batch_first=True)
            found["bare_answer"] = rows.repeat_interleave(batch.group_size, dim=0)
    return found


def packed_tokens(prompts: Sequence[Prompt], batch: TraceBatch, posterior: bool = True) -> tuple[int, int]:
    """(tokens a packed forward computes, tokens plain padded rows would compute)."""
    flat = [s for g in _segments(prompts, batch, 1.0, posterior).values() for s in g]
    return count_nodes([_read(s) for s in flat]), sum(len(s.ids) for s in flat)


# --- micro-batches


def own_prompts(prompts: Sequence[Prompt], batch: TraceBatch, rows: torch.Tensor) -> list[Prompt]:
    """The prompt of each of the rollouts at ``rows``."""
    return [prompts[i // batch.group_size] for i in rows.tolist()]


def micro_batches(
    prompts: Sequence[Prompt], batch: TraceBatch, posterior: bool, max_tokens: int
) -> list[torch.Tensor]:
    """Cut a step into parts whose packed trees have at most ``max_tokens`` nodes; each part's row numbers.

    Parts are halved between questions first, because rollouts of one question share its prompt. A single
    rollout is never cut.
    """

    def cut(rows: torch.Tensor) -> list[torch.Tensor]:
        own = own_prompts(prompts, batch, rows)
        if len(rows) == 1 or packed_tokens(own, batch.rows(rows), posterior)[0] <= max_tokens:
            return [rows]
        half = len(rows) // 2
        if half > batch.group_size:
            half -= half % batch.group_size
        return cut(rows[:half]) + cut(rows[half:])

    return cut(torch.arange(len(batch)))


def join(parts: Sequence[LogProbs]) -> LogProbs:
    """The log-probabilities of micro-batches as those of the whole step, in row order."""
    names = [f.name for f in fields(LogProbs)]
    columns = {name: [getattr(part, name) for part in parts] for name in names}
    return LogProbs(**{n: None if c[0] is None else pad_and_cat(c) for n, c in columns.items()})


def pad_and_cat(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Stack (rows, width) tensors of different widths, padded on the right with zeros (False)."""
    width = max(p.shape[1] for p in parts)
    return torch.cat([torch.nn.functional.pad(p, (0, width - p.shape[1])) for p in parts])
