"""Hybrid rollouts: each trace is drawn whole from the prior or from the posterior prompt.

Decoding grows the prefix tree of all contexts: shared prompts are computed and stored once, each step
appends one node per unfinished rollout, and finished rollouts are simply not fed any more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .tree import TreeCache, attention_mask, build_tree, final_logits, run_tree
from .types import Prompt, TraceBatch


def draw_sources(
    questions: int, group_size: int, alpha: float, split: str, generator: torch.Generator | None
) -> Tensor:
    """(N,) bool, True where the prior draws the trace; a share alpha of them.

    "bernoulli": each trace on its own, as in the paper (section on hybrid sampling). "stratified": every
    group gets floor(alpha G) or ceil(alpha G) prior traces, the fraction by chance: same law of each
    trace, less variance. Prior traces come first in their group.
    """
    if split == "bernoulli":
        return torch.rand(questions * group_size, generator=generator) < alpha
    share = torch.rand(questions, generator=generator)
    count = torch.floor(torch.tensor(alpha * group_size, dtype=torch.float64) + share.double())
    return (torch.arange(group_size) < count[:, None]).flatten()


@torch.no_grad()
def generate(
    policy,
    contexts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    ended: Callable[[Sequence[int]], bool],
    temperature: float = 1.0,
    top_p: float = 1.0,
    uniforms: Tensor | None = None,
) -> tuple[list[list[int]], list[bool], list[list[float]]]:
    """Continue each context by at most ``max_tokens`` ids until ``ended(ids)`` or an end-of-text token.

    uniforms (rows, max_tokens) in [0, 1) draw row i's t-th token by inverse CDF, so that a row's tokens
    do not depend on its neighbours; ``None`` decodes greedily. Returns ids, whether ``ended`` was met, and
    the tokens' log-probabilities under softmax(logits / temperature) without the top-p cut.
    """
    tree = build_tree(contexts)
    n, rows, device = len(tree), len(contexts), policy.device
    capacity = n + rows * max_tokens
    cache = TreeCache(capacity)
    last = torch.stack([path[-1] for path in tree.paths])
    hidden = run_tree(policy, tree, cache)[last.to(device)]
    # visible[i] marks the nodes that row i's next token attends to; positions are depths in the tree.
    visible = torch.zeros(rows, capacity, dtype=torch.bool)
    visible[:, :n] = tree.ancestors[last]
    key_position = torch.zeros(capacity, dtype=torch.int64)
    key_position[:n] = tree.position
    depth = tree.position[last]
    visible, key_position, depth = visible.to(device), key_position.to(device), depth.to(device)

    stop_ids = _end_of_text(policy)
    ids: list[list[int]] = [[] for _ in range(rows)]
    logprobs: list[list[float]] = [[] for _ in range(rows)]
    done = [False] * rows
    active = list(range(rows))
    for t in range(max_tokens):
        logp = torch.log_softmax(final_logits(policy, hidden) / temperature, dim=-1)
        token = _pick(logp, None if uniforms is None else uniforms[active, t].to(device), top_p)
        chosen = logp.gather(1, token[:, None])[:, 0].tolist()
        alive = []
        for k, (row, new) in enumerate(zip(active, token.tolist(), strict=True)):
            ids[row].append(new)
            logprobs[row].append(chosen[k])
            done[row] = ended(ids[row])
            if not done[row] and new not in stop_ids:
                alive.append(k)
        active = [active[k] for k in alive]
        if not active or t + 1 == max_tokens:
            break
        token, depth = token[alive], depth[alive] + 1
        start, end = cache.length, cache.length + len(active)
        visible = visible[alive]
        visible[torch.arange(len(active)), torch.arange(start, end)] = True
        key_position[start:end] = depth
        hidden = policy.decoder(
            input_ids=token[None],
            attention_mask=attention_mask(
                policy.decoder.config, visible[:, :end], depth, key_position[:end], policy.dtype
            ),
            position_ids=depth[None],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[0]
        cache.commit(len(active))
    return ids, done, logprobs


def _end_of_text(policy) -> set[int]:
    eos = policy.causal_lm.generation_config.eos_token_id
    eos = eos if isinstance(eos, list) else [eos]
    return {i for i in [*eos, policy.tokenizer.eos_token_id] if i is not None}


def _pick(logp: Tensor, uniform: Tensor | None, top_p: float) -> Tensor:
    """Greedy without ``uniform``, else the inverse CDF of the (top-p cut) distribution at it."""
    if uniform is None:
        return logp.argmax(dim=-1)
    probs = logp.double().exp()
    if top_p < 1:
        ordered, index = probs.sort(dim=-1, descending=True)
        # Keep tokens until their mass reaches top_p; the first is always kept.
        cut = ordered.cumsum(dim=-1) - ordered >= top_p
        probs = probs.scatter(-1, index, ordered.masked_fill(cut, 0.0))
    cdf = probs.cumsum(dim=-1)
    token = torch.searchsorted(cdf, (uniform.double() * cdf[:, -1])[:, None], right=True)[:, 0]
    return token.clamp_max(probs.shape[-1] - 1)


def sample_traces(
    policy,
    prompter,
    prompts: Sequence[Prompt],
    from_prior: Tensor,
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> TraceBatch:
    """Draw one trace per entry of ``from_prior`` (N,); rollout i belongs to prompt i // (N / B).

    A trace counts as finished when its end marker came within ``max_tokens`` and it is not empty; an
    end-of-text token before the marker leaves it unfinished.
    """
    group = len(from_prior) // len(prompts)
    contexts = [
        prompts[i // group].prior if prior else prompts[i // group].posterior
        for i, prior in enumerate(from_prior.tolist())
    ]
    ids, done, logprobs = generate(
        policy,
        contexts,
        max_tokens=max_tokens,
        ended=lambda z: prompter.ends(z, prompter.style.trace_end),
        temperature=temperature,
        top_p=top_p,
        uniforms=torch.rand(len(contexts), max_tokens, generator=generator, dtype=torch.float64),
    )
    finished = [d and bool(prompter.trace_text(z)) for d, z in zip(done, ids, strict=True)]
    padded = pad_sequence([torch.tensor(z) for z in ids], batch_first=True)
    lengths = torch.tensor([len(z) for z in ids])
    return TraceBatch(
        ids=padded,
        mask=torch.arange(padded.shape[1]) < lengths[:, None],
        from_prior=from_prior,
        finished=torch.tensor(finished),
        group_size=group,
        sampler_logprobs=pad_sequence([torch.tensor(r) for r in logprobs], batch_first=True),
    )
