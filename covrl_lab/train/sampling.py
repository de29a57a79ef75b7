"""Hybrid rollouts: each trace is drawn whole from the prior or from the posterior prompt.

Prompts are computed once, as the prefix tree of all contexts, then every rollout continues its own row until
it is finished.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from ..types import NotFinite, Prompt, TraceBatch
from .lora import cached_adapters
from .policy import Policy
from .prompts import Prompter
from .ranks import ALONE, Ranks
from .tree import additive, attention_window, build_tree, count_nodes, cut, final_logits, forward, run_tree

log = logging.getLogger(__name__)
# Rows share a block while it has at most this many times the nodes of the longest prompt: up to about this factor one
# large product, also with nodes off a row's path, is faster than one small product a row.
MAX_NODES_PER_PATH = 2
FAULTS = (torch.OutOfMemoryError, torch.AcceleratorError)  # after which nothing is tried again
BUCKET = 64  # tokens that a row has room for at first
WIDTH = 16  # tokens by which attention to them grows at a time: oneDNN compiles, and keeps, a kernel for every shape
# By device: the share of the seats that is left before seats are given up (on CUDA a graph is recorded then), and
# the tokens between two looks at what was decoded (on CUDA each look waits for the device).
CROWDED, LOOK_EVERY = {"cpu": 0.75, "cuda": 0.5}, {"cpu": 1, "cuda": 8}


def draw_sources(
    questions: int, group_size: int, alpha: float, split: str, generator: torch.Generator | None
) -> Tensor:
    """(N,) bool, True where the prior draws the trace; a share alpha of them.

    "bernoulli": each trace on its own, as in the paper. "stratified": every group gets floor(alpha G) or
    ceil(alpha G) prior traces, the fraction by chance; they come first in their group.
    """
    if split == "bernoulli":
        return torch.rand(questions * group_size, generator=generator) < alpha
    share = torch.rand(questions, generator=generator)
    count = torch.floor(torch.tensor(alpha * group_size, dtype=torch.float64) + share.double())
    return (torch.arange(group_size) < count[:, None]).flatten()


def waves(policy: Policy, contexts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
    """Rows that are decoded together, in lexicographic order of their contexts: all, or as many as there is room for.

    ``policy.room`` counts the tokens that have keys and values: nodes as computed, nodes in the blocks of the rows that
    share them (no more than a longest context for each seat, or twice the nodes if all were as long), and new tokens.
    The rows that fill a last block, at most the root of the seats, are not counted: few blocks leave more than that.
    """

    def needed(part: list[int]) -> float:
        chosen, seats = [contexts[row] for row in part], min(len(part), policy.rows_at_once or len(part))
        longest = max(map(len, chosen))
        if not policy.packs:  # these begin together, in one forward
            return len(part) * longest if seats == len(part) else math.inf
        nodes = count_nodes(chosen)
        padded = nodes + sum(longest - len(context) for context in set(map(tuple, chosen)))
        return nodes + min(seats * longest, 2 * padded) + seats * max_tokens

    order = sorted(range(len(contexts)), key=contexts.__getitem__)
    return cut(order, policy.room if policy.packs else policy.tokens_at_once, needed)


class PackedRows:
    """Rows that grow by one token a step; what they share of their prompts is computed and stored once.

    A row attends to its own t tokens, and in each of b blocks r rows have the same m prompt nodes for keys, of which a
    row sees those on its path. Heads come first, then rows, so that both are plain products. It stands in for
    transformers' cache.

    The rows of a step have seats, in the order of their contexts. Every seat writes its own keys and values to the
    same slot of a ring of ``capacity`` slots, which doubles up to the most tokens a row may have. Between two changes
    of seats or capacity all shapes stay: CUDA records the step once, as a graph, and repeats it. Rows that have ended
    keep their seats until others take them, or until no more than a share CROWDED of all go on.
    """

    is_compileable = False

    def __init__(self, policy: Policy, contexts: Mapping[int, Sequence[int]], max_tokens: int) -> None:
        self.policy, self.config, self.max_tokens = policy, policy.decoder.config, max_tokens
        device, hidden, paths, stored = policy.device, [], [], []
        self.position = torch.zeros(0, dtype=torch.int64)  # depths of the prompts' nodes
        for part in cut(list(contexts.values()), policy.tokens_at_once):
            tree, cache = build_tree(part), DynamicCache()
            hidden += run_tree(policy, tree, cache)[torch.stack([path[-1] for path in tree.paths]).to(device)]
            paths += [path + len(self.position) for path in tree.paths]
            self.position = torch.cat([self.position, tree.position])
            stored.append([x[:, :, : len(tree)] for layer in cache.layers for x in (layer.keys, layer.values)])
            del cache  # what is joined below goes at once
        self.paths, self.hidden = dict(zip(contexts, paths, strict=True)), dict(zip(contexts, hidden, strict=True))
        # By layer, keys and values of the nodes (1, key heads, n, size).
        joined = [torch.cat([part.pop(0) for part in stored], 2) for _ in range(len(stored[0]))]
        self.layers = list(zip(joined[::2], joined[1::2], strict=True))
        self.masks: dict[tuple, tuple[Tensor, Tensor]] = {}  # of this step
        self.seats: list[int] = []  # their contexts
        self.place: list[int] = []  # the seats of the rows that go on
        self.capacity, self.written, self.slot = 0, 0, torch.zeros(1, dtype=torch.int64, device=device)
        self.length = torch.zeros(0, dtype=torch.int64, device=device)  # tokens of its own that each row has
        self.own = [[x.new_zeros(len(x[0]), 0, 0, x.shape[-1]) for x in layer] for layer in self.layers]
        self.prompts: list[list[Tensor]] = [[]] * len(self.own)
        self.record: tuple | None = None  # CUDA graph of a step, and its output

    def _seat(self, new: Sequence[int] = ()) -> None:
        """Let the rows at ``place`` stay, and new contexts follow them."""
        kept = torch.tensor(self.place, dtype=torch.int64, device=self.policy.device)
        self.seats = [self.seats[i] for i in self.place] + list(new)
        self.place, paths = list(range(len(self.seats))), [self.paths[row] for row in self.seats]
        nodes = self._share(paths)
        self.length = pad(self.length[kept], (0, self.rows - len(kept)))
        self.fed = torch.zeros(self.rows, 1, dtype=torch.int64, device=kept.device)
        self.index = torch.arange(len(self.seats), device=kept.device)
        self._move(kept, self.capacity)
        for i, layer in enumerate(self.layers):
            place = nodes[None, :, :, None].expand(layer[0].shape[1], -1, -1, layer[0].shape[3])
            self.prompts[i] = [
                x[0, :, None].expand(-1, len(nodes), -1, -1).gather(2, place).flatten(0, 1) for x in layer
            ]

    def _move(self, kept: Tensor, capacity: int) -> None:
        """Put keys, then values, of the rows ``kept`` in buffers for all rows and ``capacity`` tokens, layer by layer.

        Zeros and not just any numbers behind them: slots that nobody has written are masked, not left out.
        """
        self.record = None
        for layer in self.own:
            for i, x in enumerate(layer):
                layer[i] = x.new_zeros(len(x), self.rows, capacity, x.shape[3])
                torch.index_select(x, 1, kept, out=layer[i][:, : len(kept), : self.capacity])
        self.capacity = capacity

    def _share(self, paths: list[Tensor]) -> Tensor:
        """Halve the rows into blocks until each has at most MAX_NODES_PER_PATH x the longest path nodes; these (b, m).

        The last block is filled with rows that nobody reads. Sets ``rows``, all of them.
        """
        longest, total = max(map(len, paths)), len(self.position)
        self.block = 2 * len(paths)
        while True:
            self.block = -(-self.block // 2)
            parts = [torch.cat(paths[i : i + self.block]).unique() for i in range(0, len(paths), self.block)]
            if self.block == 1 or max(map(len, parts)) <= MAX_NODES_PER_PATH * longest:
                break
        self.rows = len(parts) * self.block
        nodes = pad_sequence(parts, batch_first=True, padding_value=total)  # (b, m)
        on_path = torch.zeros(self.rows, total + 1, dtype=torch.bool)
        for row, path in enumerate(paths):
            on_path[row, path] = True
        seen = on_path.unflatten(0, (-1, self.block)).gather(2, nodes[:, None].expand(-1, self.block, -1))
        nodes, device = nodes.clamp_max(total - 1), self.policy.device
        self.seen = seen.to(device)
        self.unseen = additive(self.seen, self.policy.dtype)
        # Tokens from a row's next one back to each of its prompt nodes, for sliding windows.
        self.lengths = torch.tensor([len(path) for path in paths] + [0] * (self.rows - len(paths)))
        self.back = (self.lengths.view(-1, self.block, 1) - self.position[nodes][:, None]).to(device)
        self.lengths = self.lengths.to(device)
        return nodes.to(device)

    def update(self, keys: Tensor, values: Tensor, layer: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append a layer's (rows, key heads, 1, size) keys and values; all of them, (key heads, rows, t, size)."""
        for own, x in zip(self.own[layer], (keys, values), strict=True):
            own.index_copy_(2, self.slot, x.transpose(0, 1))
        k, v = self.own[layer]
        return k[:, :, : self.width], v[:, :, : self.width]

    def get_seq_length(self, layer: int = 0) -> int:
        """Tokens stored, as transformers asks for it."""
        return self.width - 1

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, layer: int) -> Tensor:
        """query (rows, heads, 1, size), own key, value (key heads, rows, t, size)."""
        prompt_key, prompt_value = self.prompts[layer]  # (key heads b, m, size)
        (heads, rows, _, size), nodes = key.shape, prompt_key.shape[1]
        groups = query.shape[1] // heads
        shared_mask, own_mask = self._mask(attention_window(self.config, layer), heads, groups)
        own = query.reshape(rows, heads, groups, size).transpose(0, 1).reshape(heads * rows, groups, size)
        shared = own.view(len(prompt_key), -1, size)  # a block's rows as its queries
        shared = torch.baddbmm(shared_mask, shared, prompt_key.mT, alpha=scaling)
        own = torch.baddbmm(own_mask, own, key.flatten(0, 1).mT, alpha=scaling)
        weights = torch.cat([shared.view(heads * rows, groups, nodes), own], dim=-1).softmax(-1)
        out = torch.bmm(weights[..., nodes:], value.flatten(0, 1)).view(len(prompt_key), -1, size)
        out.baddbmm_(weights[..., :nodes].reshape(len(prompt_key), -1, nodes), prompt_value)
        return out.view(heads, rows, groups, size).transpose(0, 1).reshape(rows, 1, -1)

    def step(self, token: Tensor, alive: Sequence[int] | None = None, new: Sequence[int] = ()) -> Tensor:
        """Append token (k,) to the rows at ``alive`` of those before (None: all), then begin with contexts ``new``.

        Returns the hidden states (k + new, size) that predict the next token of each.
        """
        if alive is not None:
            self.place = [self.place[k] for k in alive]
            if not new and len(self.place) <= CROWDED.get(self.policy.device.type, 0.75) * len(self.seats):
                self._seat()
            self.index = torch.tensor(self.place, dtype=torch.int64, device=self.policy.device)
        hidden = [self._append(token)] if self.place else []
        if new:
            self._seat(new)
            hidden.append(torch.stack([self.hidden[row] for row in new]))
        return torch.cat(hidden) if len(hidden) > 1 else hidden[0]

    def _append(self, token: Tensor) -> Tensor:
        if self.written == self.capacity < self.max_tokens:
            every = torch.arange(self.rows, device=self.fed.device)
            self._move(every, min(max(BUCKET, 2 * self.capacity), self.max_tokens))
        self.fed[self.index, 0] = token
        self.slot.fill_(self.written % self.capacity)
        width = self.capacity if self.policy.graphs else -(-(self.written + 1) // WIDTH) * WIDTH
        self.width = min(width, self.capacity)
        if self.policy.graphs and self.record is None:
            try:
                self.record = record(self._forward)
            except RuntimeError as error:
                # A fault may stand behind the error of ending its capture; 900 to 908 are captures that CUDA refuses.
                faults = [e for e in (error, error.__context__) if isinstance(e, FAULTS)]
                if not all(900 <= getattr(e, "error_code", 0) <= 908 for e in faults):
                    raise
                self.policy.graphs = False
                log.warning("decoding is not recorded as a CUDA graph, which is slower: %s", error)
        if self.record:
            self.record[0].replay()
        hidden = self.record[1] if self.record else self._forward()
        self.length += 1
        self.written += 1
        return hidden[self.index, 0]

    def _forward(self) -> Tensor:
        """Hidden states (rows, 1, size) after one more token in every row."""
        self.masks.clear()
        return forward(self.policy, self.fed, (self.lengths + self.length)[:, None], self, self)

    def _mask(self, window: int | None, heads: int, groups: int) -> tuple[Tensor, Tensor]:
        """Additive, of prompt nodes (key heads b, r g, m) and of the rows' own tokens (key heads rows, g, t)."""
        if (window, heads, groups) not in self.masks:
            age = (self.slot - torch.arange(self.width, device=self.slot.device)) % self.capacity
            own, seen = age <= self.length[:, None], self.unseen  # (rows, t), (b, r, m)
            if window:
                own = own & (age < window)
                near = self.back + self.length.view(-1, self.block, 1) < window
                seen = additive(self.seen & near, self.policy.dtype)
            own = additive(own, self.policy.dtype)
            seen = seen[None, :, :, None].expand(heads, -1, -1, groups, -1).flatten(2, 3).flatten(0, 1)
            own = own[None, :, None].expand(heads, -1, groups, -1).flatten(0, 1)
            self.masks[window, heads, groups] = seen, own
        return self.masks[window, heads, groups]


def record(function: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A CUDA graph of a function, and the tensor that each replay writes. RuntimeError where both differ."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is made at the first call is no part of the graph
        expected = [function() for _ in range(2)][-1].clone()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        output = function()
    graph.replay()
    if not float((output - expected).float().norm()) <= 0.05 * float(expected.float().norm()):
        raise RuntimeError("a graph gives other numbers")
    return graph, output


class PlainRows:
    """The same with transformers' own cache and left-padded prompts, for models that cannot pack."""

    def __init__(self, policy: Policy, contexts: Mapping[int, Sequence[int]], max_tokens: int) -> None:
        self.policy, self.cache, contexts = policy, None, list(contexts.values())
        width = max(map(len, contexts))
        ids = torch.tensor([[0] * (width - len(c)) + list(c) for c in contexts], device=policy.device)
        self.mask = torch.tensor([[0] * (width - len(c)) + [1] * len(c) for c in contexts], device=policy.device)
        self.place = torch.arange(len(contexts), device=policy.device)
        self.hidden = self._forward(ids)

    def _forward(self, ids: Tensor) -> Tensor:
        position = (self.mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        kept = {self.policy.cache_name: self.cache, "use_cache": True}
        output = self.policy.decoder(input_ids=ids, attention_mask=self.mask, position_ids=position, **kept)
        self.cache = getattr(output, self.policy.cache_name)
        return output.last_hidden_state[self.place, -1]

    def step(self, token: Tensor, alive: Sequence[int] | None = None, new: Sequence[int] = ()) -> Tensor:
        """As ``PackedRows.step``; all contexts begin at once."""
        if new:
            return self.hidden
        if alive is not None:
            self.place = self.place[alive]
        fed = torch.zeros(len(self.mask), dtype=torch.int64, device=self.mask.device)
        fed[self.place] = token
        self.mask = pad(self.mask, (0, 1), value=1)
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
    """Continue each context by at most ``max_tokens`` ids until ``ended(ids)``, an end of text or one of ``stop_ids``.

    uniforms (rows, max_tokens) in [0, 1) draw row i's t-th token by inverse CDF; ``None`` decodes greedily. Returns
    ids, whether ``ended`` was met, and the tokens' log-probabilities under softmax(logits / temperature) without the
    top-p cut. NotFinite where they are not.
    """
    eos = policy.causal_lm.generation_config.eos_token_id
    stop_ids = {*stop_ids, *(eos if isinstance(eos, list) else [eos]), policy.tokenizer.eos_token_id}
    ids: list[list[int]] = [[] for _ in contexts]
    logprobs: list[list[float]] = [[] for _ in contexts]
    done, device = [False] * len(contexts), policy.device
    uniforms = None if uniforms is None else uniforms.to(device)

    def decode(wave: list[int]) -> None:
        rows = (PackedRows if policy.packs else PlainRows)(policy, {row: contexts[row] for row in wave}, max_tokens)
        seats = policy.rows_at_once or len(wave)
        active, waiting, drawn = wave[:seats], wave[seats:], []
        hidden = rows.step(torch.empty(0), [], active)
        index = torch.tensor(active, device=device)
        time = torch.zeros_like(index)
        while active:
            logp = torch.log_softmax(final_logits(policy, hidden) / temperature, dim=-1)
            uniform = None if uniforms is None else uniforms[index, time.clamp_max(max_tokens - 1)]
            token = _pick(logp, uniform, top_p)
            drawn.append(torch.stack([token.double(), logp.gather(1, token[:, None])[:, 0].double()]))
            time += 1
            if len(drawn) < LOOK_EVERY.get(device.type, 1):
                hidden = rows.step(token)
                continue
            (tokens, nats), drawn, alive = torch.stack(drawn, 2).tolist(), [], []
            for k, row in enumerate(active):
                for new, logprob in zip(map(int, tokens[k]), nats[k], strict=True):
                    if not math.isfinite(logprob):
                        raise NotFinite(f"the probabilities of the model {policy.name!r} are not finite")
                    ids[row].append(new)
                    logprobs[row].append(logprob)
                    done[row] = ended(ids[row])
                    if done[row] or new in stop_ids or len(ids[row]) == max_tokens:
                        break  # what was decoded after the end is dropped
                else:
                    alive.append(k)
            begin = waiting[: seats - len(alive)] if len(alive) <= CROWDED.get(device.type, 0.75) * seats else []
            waiting = waiting[len(begin) :]
            if alive or begin:
                hidden = rows.step(token[alive], alive, begin)
            active, time = [active[k] for k in alive] + begin, pad(time[alive], (0, len(begin)))
            index = torch.tensor(active, dtype=torch.int64, device=device)

    with cached_adapters(policy.lora, policy.dtype):
        for wave in waves(policy, contexts, max_tokens):
            decode(wave)  # one wave's keys and values are gone before the next one's
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
    ranks: Ranks = ALONE,
) -> TraceBatch:
    """Draw one trace per entry of ``from_prior`` (N,); rollout i belongs to prompt i // (N / B).

    A trace counts as finished when its end marker came within ``max_tokens`` and it is not empty. ``tick(1)`` is called
    at every decoded token; what it raises ends the sampling.
    """
    group = len(from_prior) // len(prompts)
    own = [prompts[i // group] for i in range(len(from_prior))]
    contexts = [p.prior if prior else p.posterior for p, prior in zip(own, from_prior.tolist(), strict=True)]

    def ended(trace: Sequence[int]) -> bool:
        tick(1)
        return prompter.ends(trace, prompter.style.trace_end)

    uniforms = torch.rand(len(contexts), max_tokens, generator=generator, dtype=torch.float64)
    settings = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "stop_ids": prompter.stop_ids}

    def drawn(questions: slice) -> list[tuple]:
        rows = slice(questions.start * group, questions.stop * group)
        found = generate(policy, contexts[rows], ended=ended, uniforms=uniforms[rows], **settings)
        return list(zip(*found, strict=True))

    ids, done, logprobs = zip(*ranks.map(len(prompts), drawn), strict=True)
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
