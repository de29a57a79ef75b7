"""Teacher-forced log-probabilities of traces under both prompts and of answers, packed as a prefix tree.

For each rollout up to three sequences are scored: trace after the prior prompt, the same trace ids after
the posterior prompt, and seam + answer after prior prompt + trace, all of them in one tree (tree.py).
A model that cannot run a tree gets one padded row a sequence; so do the tests, as a reference.
"""

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from ..types import LogProbs, Prompt, TraceBatch
from .limits import MAX_LOGITS_BYTES
from .policy import Policy
from .tree import build_tree, count_nodes, cut, final_logits, logit_cap, logit_scale, run_tree


@dataclass(frozen=True)
class Segment:
    """A sequence of which the tokens ``start:`` are scored, with logits divided by ``temperature``."""

    ids: list[int]
    start: int
    temperature: float

    @classmethod
    def of(cls, context: Sequence[int], tokens: Sequence[int], temperature: float = 1.0) -> Self:
        """``tokens`` after ``context``."""
        return cls([*context, *tokens], len(context), temperature)

    @classmethod
    def of_answer(cls, prompt: Prompt, trace: Sequence[int]) -> Self:
        """The answer after a trace. It is a likelihood of the model itself: always at temperature 1."""
        return cls.of([*prompt.prior, *trace, *prompt.seam], prompt.answer)


class _HeadLogprobs(torch.autograd.Function):
    """log softmax(head(hidden) / temperature)[targets], (k,) float32, for hidden (k, size).

    The (k, vocabulary) logits never exist at once, but MAX_LOGITS_BYTES of them. d logp / d hidden is one vector a row,
    W'(onehot - softmax) / temperature, and is kept, (k, size), so that the backward pass needs no logits.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, targets: Tensor, temperature: Tensor, policy: Policy) -> Tensor:
        weight, needed = policy.head.weight, ctx.needs_input_grad[0]
        cap, scale, tempered = logit_cap(policy), logit_scale(policy), bool((temperature != 1).any())
        logprobs = torch.empty(len(hidden), device=hidden.device)
        slope = torch.empty_like(hidden) if needed else None
        rows = max(1, MAX_LOGITS_BYTES.get(hidden.device.type, MAX_LOGITS_BYTES["cpu"]) // (4 * len(weight)))
        for i in range(0, len(hidden), rows):
            part, target = slice(i, i + rows), targets[i : i + rows, None]
            logits = final_logits(policy, hidden[part])
            bent = 1 - (logits / cap) ** 2 if cap and needed else None  # d capped / d plain logit
            if tempered:
                logits /= temperature[part, None]
            chosen, top = logits.gather(1, target), logits.amax(1, keepdim=True)
            total = logits.sub_(top).exp_().sum(1, keepdim=True)
            logprobs[part] = (chosen - top - total.log())[:, 0]
            if needed:
                logits.scatter_add_(1, target, -total)  # now -total x (onehot - softmax)
                if bent is not None:
                    logits *= bent
                slope[part] = (logits.to(weight.dtype) @ weight) / (-total * temperature[part, None] / scale)
        if needed:
            ctx.save_for_backward(slope)
        return logprobs

    @staticmethod
    def backward(ctx, grad: Tensor):
        (slope,) = ctx.saved_tensors
        return (grad[:, None] * slope).to(slope.dtype), None, None, None


def score_segments(policy: Policy, segments: Sequence[Segment], limit: float = math.inf) -> list[Tensor]:
    """Each segment's (scored tokens,) log-probabilities, in one forward or, with a ``limit`` of its tokens, several."""
    if limit < math.inf:
        tokens = count_nodes if policy.packs else lambda rows: len(rows) * max(map(len, rows))  # padded
        parts = cut(segments, limit, lambda part: tokens([s.ids for s in part]))
        return [values for part in parts for values in score_segments(policy, part)]
    device = policy.device
    # ``before`` is the row of ``hidden`` (n, size) that predicts each of the k scored tokens.
    if policy.packs:
        tree = build_tree([s.ids[:-1] for s in segments])  # the last id predicts nothing
        hidden = run_tree(policy, tree)
        before = [path[s.start - 1 :] for s, path in zip(segments, tree.paths, strict=True)]
    else:  # rows padded on the right, as every trainer computes them
        rows = [torch.tensor(s.ids) for s in segments]
        ids = pad_sequence(rows, batch_first=True).to(device)
        mask = pad_sequence([torch.ones_like(r) for r in rows], batch_first=True).to(device)
        hidden = policy.decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state.flatten(0, 1)
        before = [i * ids.shape[1] + torch.arange(s.start - 1, len(s.ids) - 1) for i, s in enumerate(segments)]
    lengths = [len(s.ids) - s.start for s in segments]
    targets = torch.tensor([t for s in segments for t in s.ids[s.start :]])
    temperature = torch.tensor([s.temperature for s in segments], dtype=torch.float64)
    temperature = temperature.repeat_interleave(torch.tensor(lengths))
    # Rollouts that agree so far ask for the same number: each (state, token, temperature) is computed once.
    asked = torch.stack([torch.cat(before).double(), targets.double(), temperature])
    (states, targets, temperature), place = asked.unique(dim=1, return_inverse=True)
    states, targets = hidden[states.long().to(device)], targets.long().to(device)
    logprobs = _HeadLogprobs.apply(states, targets, temperature.float().to(device), policy)
    return list(logprobs[place.to(device)].split(lengths))


def own_prompts(prompts: Sequence[Prompt], batch: TraceBatch) -> list[Prompt]:
    """The prompt of each of the N rollouts, of the prompts of their B questions."""
    return [prompts[i // batch.group_size] for i in range(len(batch))]


def _segments(
    prompts: Sequence[Prompt], batch: TraceBatch, temperature: float, posterior: bool
) -> dict[str, list[Segment]]:
    rollouts = [(p, batch.trace(i)) for i, p in enumerate(own_prompts(prompts, batch))]
    segments = {"prior": [Segment.of(p.prior, z, temperature) for p, z in rollouts]}
    if posterior:
        segments["posterior"] = [Segment.of(p.posterior, z, temperature) for p, z in rollouts]
    return segments | {"answer": [Segment.of_answer(p, z) for p, z in rollouts]}


@torch.no_grad()
def answer_logprobs(policy: Policy, prompts: Sequence[Prompt], traces: Sequence[Sequence[int]]) -> Tensor:
    """log p(y|x,z) in nats, (k,), of k prompts' answers after k traces (token ids)."""
    segments = [Segment.of_answer(p, z) for p, z in zip(prompts, traces, strict=True)]
    return torch.stack([values.sum() for values in score_segments(policy, segments, policy.tokens_at_once)])


def trace_logprobs(
    policy: Policy,
    prompts: Sequence[Prompt],
    batch: TraceBatch,
    *,
    temperature: float = 1.0,
    posterior: bool = True,
    frozen_posterior: bool = False,
    no_trace: bool = False,
) -> LogProbs:
    """Score B prompts' N traces and reference answers; differentiable where gradients are enabled.

    Traces are scored under softmax(logits / temperature) over the whole vocabulary, answers at temperature 1.
    ``posterior=False`` leaves log q out, ``frozen_posterior`` computes it without gradient in forwards of its own,
    ``no_trace`` adds the answers after an empty trace, without gradient.
    """
    own = own_prompts(prompts, batch)
    segments = _segments(prompts, batch, temperature, posterior)
    if no_trace:
        segments["no_trace"] = [Segment.of_answer(p, p.empty_trace) for p in own]
    rows = {}
    if posterior and frozen_posterior:
        with torch.no_grad():
            rows["posterior"] = score_segments(policy, segments.pop("posterior"), policy.tokens_at_once)
    scores = score_segments(policy, [s for part in segments.values() for s in part])
    rows |= {name: scores[i * len(own) : (i + 1) * len(own)] for i, name in enumerate(segments)}
    width, device = batch.mask.shape[1], scores[0].device
    answer_mask = pad_sequence([torch.ones(len(p.answer), dtype=torch.bool) for p in own], batch_first=True)
    return LogProbs(
        prior=pad_rows(rows["prior"], width),
        posterior=pad_rows(rows["posterior"], width) if posterior else None,
        answer=pad_rows(rows["answer"]),
        answer_mask=answer_mask.to(device),
        no_trace=pad_rows(rows["no_trace"]).detach() if no_trace else None,
        answer_core=pad_rows([torch.tensor(p.answer_core) for p in own]).to(device),
    )


@torch.no_grad()
def reference(
    policy: Policy, prompts: Sequence[Prompt], batch: TraceBatch, needs: Set[str], temperature: float = 1.0
) -> dict[str, Tensor]:
    """Log-probabilities under the frozen base (adapter off), by name of the ``LogProbs`` field.

    "ref_prior" (N, T): the traces under the prior prompt. "bare_answer" (N, A): the answers right after the
    prior prompt, without a trace. What else ``needs`` holds is left out.
    """
    found, own = {}, own_prompts(prompts, batch)
    with policy.base():
        if "ref_prior" in needs:
            segments = [Segment.of(p.prior, batch.trace(i), temperature) for i, p in enumerate(own)]
            found["ref_prior"] = pad_rows(score_segments(policy, segments), batch.mask.shape[1])
        if "bare_answer" in needs:
            found["bare_answer"] = pad_rows(score_segments(policy, [Segment.of_answer(p, p.empty_trace) for p in own]))
    return found


def packed_tokens(prompts: Sequence[Prompt], batch: TraceBatch, posterior: bool = True) -> tuple[int, int]:
    """(tokens a packed forward computes, tokens plain padded rows would compute)."""
    segments = [s for part in _segments(prompts, batch, 1.0, posterior).values() for s in part]
    return count_nodes([s.ids[:-1] for s in segments]), sum(len(s.ids) for s in segments)


@dataclass(frozen=True)
class Part:
    """Some rollouts of a step: their (n,) row numbers, their n prompts, and their traces as groups of one."""

    index: Tensor
    prompts: list[Prompt]
    batch: TraceBatch


def micro_batches(
    prompts: Sequence[Prompt], batch: TraceBatch, posterior: bool, max_tokens: int, questions: slice = slice(None)
) -> list[Part]:
    """Cut some questions of a step into parts whose packed trees have at most ``max_tokens`` nodes.

    Parts are halved between questions first, because rollouts of one question share its prompt.
    """
    own = own_prompts(prompts, batch)

    def cut(index: Tensor) -> list[Part]:
        part = Part(index, [own[i] for i in index.tolist()], batch.rows(index))
        if len(index) == 1 or packed_tokens(part.prompts, part.batch, posterior)[0] <= max_tokens:
            return [part]
        half = len(index) // 2
        if half > batch.group_size:
            half -= half % batch.group_size
        return cut(index[:half]) + cut(index[half:])

    rows = torch.arange(len(batch)).view(-1, batch.group_size)[questions].flatten()
    return cut(rows) if len(rows) else []


def join(parts: Sequence[Any]) -> Any:
    """The ``LogProbs`` or ``Credit`` of micro-batches as those of the whole step, in row order."""

    def column(values: list[Any]) -> Any:
        if not isinstance(values[0], Tensor):  # None, or a method's state
            return values[0]
        return pad_rows([row for value in values for row in value]) if values[0].dim() > 1 else torch.cat(values)

    return type(parts[0])(**{f.name: column([getattr(part, f.name) for part in parts]) for f in fields(parts[0])})


def pad_rows(rows: Sequence[Tensor], width: int = 0) -> Tensor:
    """Rows under each other, padded on the right with zeros (False) to at least ``width`` columns."""
    padded = pad_sequence(rows, batch_first=True)
    return pad(padded, (0, max(0, width - padded.shape[1])))
