"""Hybrid rollouts: each trace is drawn whole from the prior or from the posterior prompt.

Prompts are computed once, as the prefix tree of all contexts, then every rollout continues its own row until
it is finished.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .lora import steady
from .tree import LayerStore, additive, attention_window, build_tree, final_logits, run_tree
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


class PackedRows:
    """Rows that grow by one token a step: prompts are computed once as a tree, then given to every row.

    Each layer's keys and values are (rows, key heads, width + max_tokens, size) buffers, prompts ending at
    ``width``. Finished rows are dropped from the buffers once they are a quarter of them. It stands in for
    transformers' cache.
    """

    is_compileable = False

    def __init__(self, policy, contexts: Sequence[Sequence[int]], max_tokens: int) -> None:
        self.policy = policy
        tree, store = build_tree(contexts), LayerStore()
        last = torch.stack([path[-1] for path in tree.paths])
        self.hidden = run_tree(policy, tree, store)[last.to(policy.device)]
        lengths = torch.tensor([len(path) for path in tree.paths])
        self.width = self.length = int(lengths.max())
        nodes = torch.stack([torch.nn.functional.pad(p, (self.width - len(p), 0)) for p in tree.paths])
        self.layers = [
            tuple(self._spread(x[0], nodes.to(x.device), max_tokens) for x in layer) for layer in store.layers
        ]
        self.offset = (self.width - lengths).to(policy.device)  # unused places at the start of each row
        self.place = torch.arange(len(contexts))  # of each unfinished row in the buffers

    @staticmethod
    def _spread(states: Tensor, nodes: Tensor, max_tokens: int) -> Tensor:
        heads, size = states.shape[0], states.shape[2]
        buffer = states.new_zeros(len(nodes), heads, nodes.shape[1] + max_tokens, size)
        buffer[:, :, : nodes.shape[1]] = states[:, nodes].transpose(0, 1)
        return buffer

    def update(self, keys: Tensor, values: Tensor, layer: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append a layer's (rows, key heads, 1, size) keys and values; views of all of them."""
        k, v = self.layers[layer]
        k[:, :, self.length], v[:, :, self.length] = keys[:, :, 0], values[:, :, 0]
        return k[:, :, : self.length + 1], v[:, :, : self.length + 1]

    def get_seq_length(self, layer: int = 0) -> int:
        """Tokens stored, as transformers asks for it."""
        return self.length

    def step(self, token: Tensor, alive: Sequence[int]) -> Tensor:
        """Append token (k,) to the rows at ``alive`` of those alive before; their hidden states (k, size)."""
        policy, self.place = self.policy, self.place[alive]
        if len(self.place) <= 0.75 * len(self.offset):
            kept = self.place.to(policy.device)
            self.layers = [(k[kept], v[kept]) for k, v in self.layers]
            self.offset, self.place = self.offset[kept], torch.arange(len(kept))
        fed = torch.zeros(len(self.offset), dtype=torch.int64, device=policy.device)
        place = self.place.to(policy.device)
        fed[place] = token
        output = policy.decoder(
            input_ids=fed[:, None],
            attention_mask=self._masks(),
            position_ids=(self.length - self.offset)[:, None],
            past_key_values=self,
            use_cache=True,
        )
        self.length += 1
        return output.last_hidden_state[place, 0]

    def _masks(self) -> Tensor | dict[str, Tensor]:
        """The additive mask (rows, 1, 1, places) a decoder takes, or one for each of its layer types."""
        config = self.policy.decoder.config
        places = torch.arange(self.length + 1, device=self.offset.device)
        used = places >= self.offset[:, None]

        def mask(window: int | None) -> Tensor:
            near = used & (self.length - places < window) if window else used
            return additive(near, self.policy.dtype)[:, None, None]

        if kinds := getattr(config, "layer_types", None):
            return {kind: mask(attention_window(config, kinds.index(kind))) for kind in set(kinds)}
        return mask(attention_window(config, 0))


class PlainRows:
    """The same with transformers' own cache and left-padded prompts, for models that cannot pack."""

    def __init__(self, policy, contexts: Sequence[Sequence[int]], max_tokens: int) -> None:
        self.policy, self.cache = policy, None
        width = max(map(len, contexts))
        ids = torch.tensor([[0] * (width - len(c)) + list(c) for c in contexts], device=policy.device)
        self.mask = torch.tensor(
            [[0] * (width - len(c)) + [1] * len(c) for c in contexts], device=policy.device
        )
        self.place = torch.arange(len(contexts), device=policy.device)
        self.hidden = self._forward(ids)

    def _forward(self, ids: Tensor) -> Tensor:
        position = (self.mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        output = self.policy.decoder(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=position,
            past_key_values=self.cache,
            use_cache=True,
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
    stop_ids = _end_of_text(policy)
    ids: list[list[int]] = [[] for _ in contexts]
    logprobs: list[list[float]] = [[] for _ in contexts]
    done = [False] * len(contexts)
    active = list(range(len(contexts)))
    with steady(policy.lora, policy.dtype):
        rows = (PackedRows if policy.packs else PlainRows)(policy, contexts, max_tokens)
        hidden = rows.hidden
        for t in range(max_tokens):
            logp = torch.log_softmax(final_logits(policy, hidden) / temperature, dim=-1)
            token = _pick(logp, None if uniforms is None else uniforms[active, t].to(policy.device), top_p)
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
            hidden = rows.step(token[alive], alive)
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
