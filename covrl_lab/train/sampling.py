"""Hybrid rollouts: each trace is drawn whole from the prior or from the posterior prompt.

Prompts are computed once, as the prefix tree of all contexts, then every rollout continues its own row until
it is finished.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..types import NotFinite, Prompt, TraceBatch
from .lora import cached_adapters
from .policy import Policy
from .prompts import Prompter
from .tree import LayerStore, additive, attention_window, build_tree, final_logits, forward, run_tree

# Rows share a block while it has at most this many times the nodes of the longest prompt. A shared block
# multiplies every row with every node, also those off the row's path; up to about this factor, one large
# product is still faster than one small product a row.
MAX_NODES_PER_PATH = 2


def draw_sources(
    questions: int, group_size: int, alpha: float, split: str, generator: torch.Generator | None
) -> Tensor:
    """(N,) bool, True where the prior draws the trace; a share alpha of them.

    "bernoulli": each trace on its own, as in the paper (section on hybrid sampling). "stratified": every
    group gets floor(alpha G) or ceil(alpha G) prior traces, the fraction by chance. Each trace
    has the same distribution as before, but a baseline must not tell its source (``objectives.advantages``). Prior
    traces come first in their group.
    """
    if split == "bernoulli":
        return torch.rand(questions * group_size, generator=generator) < alpha
    share = torch.rand(questions, generator=generator)
    count = torch.floor(torch.tensor(alpha * group_size, dtype=torch.float64) + share.double())
    return (torch.arange(group_size) < count[:, None]).flatten()


class PackedRows:
    """Rows that grow by one token a step; what they share of their prompts is computed and stored once.

    A step's attention is that of ``forward``: each row's own tokens, (rows, key heads, size) a step, and b
    blocks of r rows that have the same m prompt nodes for keys, of which a row sees those on its path.
    Finished rows are dropped once they are a quarter of all. It stands in for transformers' cache.
    """

    is_compileable = False

    def __init__(self, policy: Policy, contexts: Sequence[Sequence[int]], max_tokens: int) -> None:
        self.policy, self.config = policy, policy.decoder.config
        self.tree, self.store = build_tree(contexts), LayerStore()
        last = torch.stack([path[-1] for path in self.tree.paths])
        self.hidden = run_tree(policy, self.tree, self.store)[last.to(policy.device)]
        self.length = 0  # tokens of its own that each row has
        rows = len(contexts)
        self.own = [
            tuple(x.new_empty(rows, len(x[0]), max_tokens, x.shape[-1]) for x in layer) for layer in self.store.layers
        ]
        # In the tree's order neighbours share the most.
        order = sorted(range(rows), key=lambda row: contexts[row])
        self.place = torch.tensor(order).argsort()  # of each unfinished row in the buffers
        self._share([self.tree.paths[row] for row in order])

    def _share(self, paths: list[Tensor]) -> None:
        """Halve the rows into blocks until each has at most MAX_NODES_PER_PATH x the longest path nodes."""
        self.paths, rows, longest = paths, len(paths), max(map(len, paths))
        self.block = 2 * rows
        while True:
            self.block = -(-self.block // 2)
            parts = [torch.cat(paths[i : i + self.block]).unique() for i in range(0, rows, self.block)]
            if self.block == 1 or max(map(len, parts)) <= MAX_NODES_PER_PATH * longest:
                break
        nodes = pad_sequence(parts, batch_first=True, padding_value=len(self.tree))  # (b, m)
        on_path = torch.zeros(len(parts) * self.block, len(self.tree) + 1, dtype=torch.bool)
        for row, path in enumerate(paths):
            on_path[row, path] = True
        seen = on_path.unflatten(0, (len(parts), self.block)).gather(2, nodes[:, None].expand(-1, self.block, -1))
        nodes, device = nodes.clamp_max(len(self.tree) - 1), self.policy.device
        self.seen = seen.to(device)
        # Tokens from a row's next one back to each of its prompt nodes, for sliding windows.
        lengths = torch.tensor([len(path) for path in paths] + [0] * (len(parts) * self.block - rows))
        self.back = (lengths.reshape(-1, self.block, 1) - self.tree.position[nodes][:, None]).to(device)
        self.lengths = lengths[:rows].to(device)
        flat = nodes.flatten().to(device)
        self.prompts = [
            tuple(x[0].index_select(1, flat).unflatten(1, nodes.shape).transpose(0, 1) for x in layer)
            for layer in self.store.layers
        ]

    def update(self, keys: Tensor, values: Tensor, layer: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append a layer's (rows, key heads, 1, size) keys and values; views of all the rows' own."""
        k, v = self.own[layer]
        k[:, :, self.length], v[:, :, self.length] = keys[:, :, 0], values[:, :, 0]
        return k[:, :, : self.length + 1], v[:, :, : self.length + 1]

    def get_seq_length(self, layer: int = 0) -> int:
        """Tokens stored, as transformers asks for it."""
        return self.length

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, layer: int) -> Tensor:
        """query (rows, heads, 1, size), own key, value (rows, key heads, t, size)."""
        prompt_key, prompt_value = self.prompts[layer]  # (b, key heads, m, size)
        own = (query * scaling).reshape(len(query), key.shape[1], -1, query.shape[-1])
        masks = self.masks[attention_window(self.config, layer)]
        scores = [self._blocks(own) @ prompt_key.mT, self._blocks(own @ key.mT)]
        scores = torch.cat([s.unflatten(2, (self.block, -1)) for s in scores], dim=-1)
        weights = (scores + masks).softmax(-1).flatten(2, 3)
        shared, own = weights.split([prompt_key.shape[2], key.shape[2]], dim=-1)
        out = self._rows(shared @ prompt_value) + self._rows(own) @ value
        return out.reshape(len(query), 1, query.shape[1], -1)

    def _blocks(self, x: Tensor) -> Tensor:
        """(rows, key heads, g, size) -> (b, key heads, r g, size): a block's rows as its queries."""
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 0, 0, len(self.seen) * self.block - len(x)))
        return x.unflatten(0, (-1, self.block)).transpose(1, 2).flatten(2, 3)

    def _rows(self, x: Tensor) -> Tensor:
        """(b, key heads, r g, size) -> (rows, key heads, g, size)"""
        return x.unflatten(2, (self.block, -1)).transpose(1, 2).flatten(0, 1)[: len(self.paths)]

    def step(self, token: Tensor, alive: Sequence[int]) -> Tensor:
        """Append token (k,) to the rows at ``alive`` of those alive before; their hidden states (k, size)."""
        policy, self.place = self.policy, self.place[alive]
        if len(self.place) <= 0.75 * len(self.paths):
            self.place, order = self.place.sort()
            kept = self.place.to(policy.device)
            self.own = [(k[kept], v[kept]) for k, v in self.own]
            self._share([self.paths[i] for i in self.place])
            self.place = order.argsort()
        fed = torch.zeros(len(self.paths), dtype=torch.int64, device=policy.device)
        place = self.place.to(policy.device)
        fed[place] = token
        windows = {attention_window(self.config, i) for i in range(len(self.own))}
        self.masks = {window: self._mask(window) for window in windows}
        hidden = forward(policy, fed[:, None], (self.lengths + self.length)[:, None], self, self)
        self.length += 1
        return hidden[place, 0]

    def _mask(self, window: int | None) -> Tensor:
        """Additive (b, 1, r, 1, m + t) of the prompt nodes and of the rows' own tokens."""
        own = torch.ones(self.length + 1, dtype=torch.bool, device=self.seen.device)
        seen = self.seen
        if window:
            seen = seen & (self.back + self.length < window)
            own = torch.arange(self.length, -1, -1, device=own.device) < window
        allowed = torch.cat([seen, own.expand(*seen.shape[:2], -1)], dim=-1)
        return additive(allowed, self.policy.dtype)[:, None, :, None]


class PlainRows:
    """The same with transformers' own cache and left-padded prompts, for models that cannot pack."""

    def __init__(self, policy: Policy, contexts: Sequence[Sequence[int]], max_tokens: int) -> None:
        self.policy, self.cache = policy, None
        width = max(map(len, contexts))
        ids = torch.tensor([[0] * (width - len(c)) + list(c) for c in contexts], device=policy.device)
        self.mask = torch.tensor([[0] * (width - len(c)) + [1] * len(c) for c in contexts], device=policy.device)
        self.place = torch.arange(len(contexts), device=policy.device)
        self.hidden = self._forward(ids)

    def _forward(self, ids: Tensor) -> Tensor:
        position = (self.mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        output = self.policy.decoder(
            input_ids=ids, attention_mask=self.mask, position_ids=position, past_key_values=self.cache, use_cache=True
        )
        self.cache = output.past_key_values
        return output.last_hidden_state[self.place, -1]

    def step(self, token: Tensor, alive: Sequence[int]) -> Tensor:
        """Append token (k,) to the rows at ``alive`` of those alive before; their hidden states (k, size)."""
        self.place = self.place[alive]
        fed = torch.zeros(len(self.mask), dtype=torch.int64, device=self.mask.device)
        fed[self.place] = token
        self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=1)
        return self._forward(fed[:, None])


@torch.no_grad()
def generate(
    policy: Policy,
    contexts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    ended: Callable[[Sequence[int]], bool],
    temperature: float = 1.0,
    top_p: float = 1.0,
    uniforms: Tensor | None = None,
    stop_ids: Iterable[int] = (),
) -> tuple[list[list[int]], list[bool], list[list[float]]]:
    """Continue each context by at most ``max_tokens`` ids until ``ended(ids)``, an end-of-text token or one of
    ``stop_ids``.

    uniforms (rows, max_tokens) in [0, 1) draw row i's t-th token by inverse CDF, so that a row's tokens
    do not depend on its neighbours; ``None`` decodes greedily. Returns ids, whether ``ended`` was met, and
    the tokens' log-probabilities under softmax(logits / temperature) without the top-p cut. NotFinite where they
    are not.
    """
    eos = policy.causal_lm.generation_config.eos_token_id
    stop_ids = {*stop_ids, *(eos if isinstance(eos, list) else [eos]), policy.tokenizer.eos_token_id}
    ids: list[list[int]] = [[] for _ in contexts]
    logprobs: list[list[float]] = [[] for _ in contexts]
    done = [False] * len(contexts)
    active = list(range(len(contexts)))
    with cached_adapters(policy.lora, policy.dtype):
        rows = (PackedRows if policy.packs else PlainRows)(policy, contexts, max_tokens)
        hidden = rows.hidden
        for t in range(max_tokens):
            logp = torch.log_softmax(final_logits(policy, hidden) / temperature, dim=-1)
            token = _pick(logp, None if uniforms is None else uniforms[active, t].to(policy.device), top_p)
            chosen = logp.gather(1, token[:, None])[:, 0].tolist()
            alive = []
            for k, (row, new) in enumerate(zip(active, token.tolist(), strict=True)):
                if not math.isfinite(chosen[k]):
                    raise NotFinite(f"the probabilities of the model {policy.name!r} are not finite")
                ids[row].append(new)
                logprobs[row].append(chosen[k])
                done[row] = ended(ids[row])
                if not done[row] and new not in stop_ids:
                    alive.append(k)
            active = [active[k] for k in alive]
            if not active or t + 1 == max_tokens:
                break
            hidden = rows.step(token[alive], alive)
    return ids, done, logprobs


def _pick(logp: Tensor, uniform: Tensor | None, top_p: float) -> Tensor:
    """Greedy without ``uniform``, else the inverse CDF of the (top-p cut) distribution at it."""
    if uniform is None:
        return logp.argmax(dim=-1)
    probs = logp.exp()
    if top_p < 1:
        ordered, index = probs.sort(dim=-1, descending=True)
        # Keep tokens until their mass reaches top_p; the first is always kept.
        cut = ordered.cumsum(dim=-1, dtype=torch.float64) - ordered >= top_p
        probs = probs.scatter(-1, index, ordered.masked_fill(cut, 0.0))
    cdf = probs.cumsum(dim=-1, dtype=torch.float64)
    token = torch.searchsorted(cdf, (uniform.double() * cdf[:, -1])[:, None], right=True)[:, 0]
    return token.clamp_max(probs.shape[-1] - 1)


def sample_traces(
    policy: Policy,
    prompter: Prompter,
    prompts: Sequence[Prompt],
    from_prior: Tensor,
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    tick: Callable[[int], object] = lambda done: None,
) -> TraceBatch:
    """Draw one trace per entry of ``from_prior`` (N,); rollout i belongs to prompt i // (N / B).

    A trace counts as finished when its end marker came within ``max_tokens`` and it is not empty; an
    end-of-text token before the marker leaves it unfinished. ``tick(1)`` is called at every decoded token;
    what it raises ends the sampling.
    """
    group = len(from_prior) // len(prompts)
    own = [prompts[i // group] for i in range(len(from_prior))]
    contexts = [p.prior if prior else p.posterior for p, prior in zip(own, from_prior.tolist(), strict=True)]

    def ended(trace: Sequence[int]) -> bool:
        tick(1)
        return prompter.ends(trace, prompter.style.trace_end)

    uniforms = torch.rand(len(contexts), max_tokens, generator=generator, dtype=torch.float64)
    settings = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "stop_ids": prompter.stop_ids}
    ids, done, logprobs = generate(policy, contexts, ended=ended, uniforms=uniforms, **settings)
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
