"""A step's sequences packed into one prefix tree, run through a stock transformer in one forward.

Each distinct (prefix, token) pair is one node, computed once; a node attends to its ancestors and itself, at the
position of its depth, so its hidden state is exactly the one a plain causal forward of its own sequence gives.

Nodes are numbered depth first, so that a node's subtree is a range of numbers and the ancestors of BLOCK
neighbouring nodes are the block itself and the path to its first node. Attention computes those keys only:
work and memory grow with nodes x (depth + BLOCK), not with nodes squared.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby, pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..types import ConfigError
from .limits import BLOCK, MAX_MATMUL_KEYS
from .lora import linear

if TYPE_CHECKING:
    from .policy import Policy

FLEX_BLOCK = 128  # nodes of a block that FlexAttention computes or leaves out
ATTENTION = "covrl_tree"  # the name under which transformers knows ``attend``

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenTree:
    """n nodes, depth first.

    ids       (n,) int64 token ids
    position  (n,) int64 depth, 0 at the roots
    end       (n,) int64 first node after the node's subtree: j is i or an ancestor of i iff j <= i < end[j]
    paths     for each packed sequence, the (length,) int64 node of each of its tokens
    """

    ids: Tensor
    position: Tensor
    end: Tensor
    paths: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def path(self, node: int) -> Tensor:
        """The node's ancestors, from its root on, without the node."""
        return ((self.end[:node] > node).nonzero())[:, 0]


def _shared(ordered: Sequence[Sequence[int]]) -> Iterator[int]:
    """How many tokens each of the sequences, in lexicographic order, has in common with the one before."""
    yield 0
    for before, sequence in pairwise(ordered):
        differ = (i for i, (a, b) in enumerate(zip(before, sequence, strict=False)) if a != b)
        yield next(differ, min(len(before), len(sequence)))


def build_tree(sequences: Sequence[Sequence[int]]) -> TokenTree:
    """Pack token-id sequences into one tree; shared prefixes become shared nodes."""
    order = sorted(range(len(sequences)), key=sequences.__getitem__)
    ordered = [sequences[i] for i in order]
    ids, position, path = [], [], []
    paths: list[Tensor] = [torch.empty(0)] * len(sequences)
    for i, sequence, shared in zip(order, ordered, _shared(ordered), strict=True):
        path = path[:shared] + list(range(len(ids), len(ids) + len(sequence) - shared))
        ids.extend(sequence[shared:])
        position.extend(range(shared, len(sequence)))
        paths[i] = torch.tensor(path, dtype=torch.int64)
    end = [0] * len(ids)
    open_nodes: list[int] = []  # the path to the present node
    for node, depth in enumerate([*position, 0]):
        while len(open_nodes) > depth:
            end[open_nodes.pop()] = node
        open_nodes.append(node)
    return TokenTree(torch.tensor(ids), torch.tensor(position), torch.tensor(end), tuple(paths))


def count_nodes(sequences: Sequence[Sequence[int]]) -> int:
    """Nodes of the tree of these sequences, without building it."""
    ordered = sorted(sequences)
    return sum(map(len, ordered)) - sum(_shared(ordered))


def cut(items: list, limit: float, size: Callable[[list], int] = count_nodes) -> list[list]:
    """Halve a list until ``size`` of every part is at most ``limit``, or the part has one item."""
    if len(items) == 1 or size(items) <= limit:
        return [items]
    half = len(items) // 2
    return cut(items[:half], limit, size) + cut(items[half:], limit, size)


# --- attention


class TreeAttention:
    """A tree's attention for one forward (all layers): blocks of BLOCK queries, those with about as many keys together.

    order (b,) are the blocks of all parts, by their number of keys, and place (b,) is the way back; of each part, keys
    (b_i, m_i) are node numbers, masks (b_i, groups * BLOCK, m_i) additive. Keys are padded within a part.
    """

    def __init__(self, tree: TokenTree, policy: Policy) -> None:
        self.tree, self.device, self.dtype = tree, policy.device, policy.dtype
        self.config = policy.decoder.config
        blocks = torch.arange(-(-len(tree) // BLOCK) * BLOCK).reshape(-1, BLOCK)
        rows = [torch.cat([tree.path(int(block[0])), block]) for block in blocks]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        parts = [list(part) for _, part in groupby(order, lambda i: -(-len(rows[i]) // (2 * BLOCK)))]
        self.order = torch.tensor(order, device=self.device)
        self.place = self.order.argsort()
        self._query = [blocks[part] for part in parts]
        self._key = [pad_sequence([rows[i] for i in p], batch_first=True, padding_value=len(tree)) for p in parts]
        self.keys = [key.clamp_max(len(tree) - 1).to(self.device) for key in self._key]
        self._masks: dict[tuple[int | None, int], list[Tensor]] = {}

    def masks(self, window: int | None, groups: int) -> list[Tensor]:
        """For layers with this sliding window (tokens) and this many query heads a key head."""
        if (window, groups) not in self._masks:
            end, position = (pad(x, (0, 2 * BLOCK)).to(self.device) for x in (self.tree.end, self.tree.position))
            self._masks[window, groups] = found = []
            for nodes, keys in zip(self._query, self._key, strict=True):
                query, key = nodes.to(self.device)[:, :, None], keys.to(self.device)[:, None]
                allowed = (key <= query) & (query < end[key])
                if window:
                    allowed &= position[query] - position[key] < window
                found.append(additive(allowed, self.dtype).repeat(1, groups, 1))
        return self._masks[window, groups]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, layer: int) -> Tensor:
        """query (1, heads, n, size), key and value (1, key heads, n, size); (1, n, heads, size) out."""
        (heads, n, size), shared, blocks = query.shape[1:], key.shape[1], len(self.order)
        groups, plain = heads // shared, self.device.type == "cpu" and self.keys[-1].shape[1] <= MAX_MATMUL_KEYS
        rows = pad(query[0], (0, 0, 0, blocks * BLOCK - n)).reshape(shared, groups, blocks, BLOCK, size)
        # index_select and not an index: its backward pass is faster.
        rows = rows.transpose(1, 2).index_select(1, self.order).reshape(shared, blocks, groups * BLOCK, size)
        rows, found = rows.split([len(keys) for keys in self.keys], 1), []
        masks = self.masks(attention_window(self.config, layer), groups)
        for part, keys, mask in zip(rows, self.keys, masks, strict=True):
            k, v = (x[0].index_select(1, keys.flatten()).unflatten(1, keys.shape) for x in (key, value))
            if plain:
                scores = torch.matmul(part * scaling, k.mT).add_(mask)
                found.append(torch.matmul(scores.softmax(-1), v))
            else:
                # No fused kernel of a CPU takes a mask of three dimensions.
                found.append(scaled_dot_product_attention(part, k, v, attn_mask=mask[None], scale=scaling))
        out = torch.cat(found, 1).index_select(1, self.place)
        out = out.reshape(shared, blocks, groups, BLOCK, size).permute(1, 3, 0, 2, 4)
        return out.reshape(1, blocks * BLOCK, heads, size)[:, :n]


class FlexTree:
    """The same attention as one kernel that leaves out blocks of keys no query sees (FlexAttention), for CUDA.

    Queries from node a on need a block of keys iff it does not begin after them and one of its subtrees ends after a.
    Trees are padded, with nodes that see themselves only, to one of a few sizes, as a kernel is compiled for each.
    """

    def __init__(self, tree: TokenTree, policy: Policy) -> None:
        self.config, n, self.size = policy.decoder.config, len(tree), padded_size(len(tree))
        end = torch.cat([tree.end, torch.arange(n, self.size) + 1])
        self.end, self.position = end.to(policy.device), pad(tree.position, (0, self.size - n)).to(policy.device)
        self._masks: dict[int | None, BlockMask] = {}

    def mask(self, window: int | None) -> BlockMask:
        """For layers with this sliding window (tokens)."""
        if window not in self._masks:
            end, position = self.end, self.position

            def rule(batch, head, query, key):
                seen = (key <= query) & (query < end[key])
                return seen & (position[query] - position[key] < window) if window else seen

            first = torch.arange(0, self.size, FLEX_BLOCK, device=end.device)
            needed = (first <= first[:, None]) & (end.view(-1, FLEX_BLOCK).amax(1) > first[:, None])
            if window:
                low, high = position.view(-1, FLEX_BLOCK).aminmax(dim=1)
                needed &= low[:, None] - high < window
            order = needed.int().argsort(dim=1, descending=True, stable=True).int()
            count, sizes = needed.sum(1, dtype=torch.int32), (self.size, self.size)
            self._masks[window] = BlockMask.from_kv_blocks(
                count[None, None], order[None, None], BLOCK_SIZE=FLEX_BLOCK, mask_mod=rule, seq_lengths=sizes
            )
        return self._masks[window]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, layer: int) -> Tensor:
        """As ``TreeAttention``, for the padded tree."""
        kernel, mask = _flex_kernel(query.device.type), self.mask(attention_window(self.config, layer))
        return kernel(query, key, value, block_mask=mask, scale=scaling, enable_gqa=True).transpose(1, 2)


def padded_size(nodes: int) -> int:
    """The size of a tree for FlexAttention: at most a quarter more, or 255 nodes."""
    step = max(2 * FLEX_BLOCK, 2 ** (nodes.bit_length() - 3))
    return -(-nodes // step) * step


@cache
def _flex_kernel(device: str) -> Callable[..., Tensor]:
    torch._dynamo.config.recompile_limit = 256  # a few tens of sizes, with and without gradients
    return torch.compile(flex_attention, dynamic=False) if device == "cuda" else flex_attention


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where attention is allowed, the dtype's least number elsewhere."""
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)


def attention_window(config, layer: int) -> int | None:
    """The sliding window of a layer, in tokens, as transformers' configurations name it."""
    kinds = getattr(config, "layer_types", None)
    if kinds and kinds[layer] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None)


def attend(module, query, key, value, attention_mask, scaling=None, tree=None, **kwargs):
    """transformers' attention interface: that of ``tree`` where one is passed, else plain.

    query (batch, heads, n, size), key and value (batch, key heads, m, size); (batch, n, heads, size) out.
    """
    if kwargs.get("softcap") is not None:
        raise NotImplementedError("capped attention scores")
    if tree is not None:
        return tree(query, key, value, scaling, module.layer_idx), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


# --- forward


def forward(policy: Policy, ids: Tensor, position: Tensor, tree, cache=None) -> Tensor:
    """Hidden states (batch, n, hidden) of ids and positions (batch, n); each layer calls ``tree`` for attention."""
    # A mask of four dimensions is passed through as it is; ours is in ``tree``, so its content is not read.
    unread = torch.zeros(1, 1, 1, 1, dtype=policy.dtype, device=policy.device)
    kinds = set(getattr(policy.decoder.config, "layer_types", None) or ())
    output = policy.decoder(
        input_ids=ids.to(policy.device),
        attention_mask=dict.fromkeys(kinds, unread) if kinds else unread,
        position_ids=position.to(policy.device),
        use_cache=cache is not None,
        tree=tree,
        **{policy.cache_name: cache},
    )
    return output.last_hidden_state


def run_tree(policy: Policy, tree: TokenTree, cache: DynamicCache | None = None) -> Tensor:
    """Forward a whole tree; returns hidden states (n, hidden) before the output head."""
    if not policy.flex:
        return forward(policy, tree.ids[None], tree.position[None], TreeAttention(tree, policy), cache)[0]
    attention = FlexTree(tree, policy)
    ids = pad(tree.ids, (0, attention.size - len(tree)))
    return forward(policy, ids[None], attention.position[None], attention, cache)[0, : len(tree)]


def logit_cap(policy: Policy) -> float | None:
    """The soft cap of the final logits (Gemma), if there is one."""
    return getattr(policy.causal_lm.config, "final_logit_softcapping", None)


def logit_scale(policy: Policy) -> float:
    """The factor on the output head's logits: Cohere's ``logit_scale``, one over Granite's ``logits_scaling``."""
    config = policy.causal_lm.config
    return (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)


def final_logits(policy: Policy, hidden: Tensor) -> Tensor:
    """The output head on hidden states (k, hidden): float32 logits (k, vocabulary), on CUDA without gradients."""
    head, cap = policy.head, logit_cap(policy)
    if type(head) is not torch.nn.Linear or head.bias is not None:
        logits = head(hidden).float()
    elif hidden.is_cuda and hidden.dtype == torch.bfloat16:
        logits = torch.mm(hidden, head.weight.T, out_dtype=torch.float32)
    else:  # CPUs have no such product: their logits are rounded to bfloat16 first, as the model's own are
        logits = linear(hidden, head.weight).float()
    if (scale := logit_scale(policy)) != 1:
        logits = logits * scale
    return logits if cap is None else cap * torch.tanh(logits / cap)


@torch.no_grad()
def check_logits(policy: Policy) -> None:
    """ConfigError where ``final_logits`` are not the model's own: it does something to them that is not known here."""
    ids = torch.tensor([[7, 8, 9, 10, 11]], device=policy.device)
    theirs = policy.causal_lm(ids, use_cache=False).logits[0].float()
    ours = final_logits(policy, policy.decoder(ids, use_cache=False).last_hidden_state[0])
    if not (gap := float((ours - theirs).abs().max())) <= 0.02 * float(theirs.abs().max()):  # bfloat16 has 8 bits
        problem = f"{policy.name!r} changes its logits in a way that covrl_lab does not know: they differ by {gap:.2g}"
        raise ConfigError(f"{problem}, so that log-probabilities would be wrong; choose another model")


@torch.no_grad()
def enable_packing(policy: Policy) -> bool:
    """Switch a model's attention to ``attend`` if it then computes a small tree right; says so in the log if not.

    So an architecture need not be known here; nor need FlexAttention run, where ``policy.flex`` asks for it. Raises
    ConfigError where there is no memory for that.
    """
    lm = policy.causal_lm
    before, config = lm.config._attn_implementation, policy.decoder.config
    try:
        if unknown := set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
            raise NotImplementedError(f"layers of type {min(unknown)!r}")
        if policy.device.type == "cuda":
            torch.backends.cuda.enable_cudnn_sdp(False)  # it builds a plan for every new shape
        if policy.flex:
            try:
                _check_tree(policy, before)
                return True
            except (torch.OutOfMemoryError, torch.AcceleratorError):
                raise
            except Exception as error:  # no compiler, or heads of a size that it does not take
                policy.flex = False
                log.warning("FlexAttention does not run here (%s): a slower kernel is used", type(error).__name__)
        _check_tree(policy, before)
    except torch.AcceleratorError:  # a kernel failed: nothing on this device can be trusted from here on
        raise
    except Exception as error:  # whatever an unknown architecture does not understand
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
            problem = f"{policy.name!r} leaves no memory for a forward of a few tokens"
            raise ConfigError(f"{problem}; choose a smaller model, or quantization='nf4'") from error
        lm.set_attn_implementation(before)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        log.warning("%s cannot run as a prefix tree (%s): padded rows are used, which is slower", policy.name, reason)
        return False
    return True


def _check_tree(policy: Policy, usual: str) -> None:
    """NotImplementedError where packed sequences' hidden states are not those of plain rows under ``usual`` attention.

    A wrong neighbour changes states by a third of their size, rounding to bfloat16 by a few hundredths; but now and
    then rounding decides a whole state. Then other words are tried.
    """
    lm, size = policy.causal_lm, policy.head.weight.shape[0]
    for word in (size // 2, size // 3, size // 4):  # the first ids are special: alike, or never trained
        sequences = [[word + i for i in ids] for ids in ([0, 1, 2, 3, 4], [0, 1, 2, 5, 4, 3], [0, 6], [7, 1, 2])]
        lm.set_attn_implementation(usual)
        plain = (torch.tensor([s], device=policy.device) for s in sequences)
        rows = [policy.decoder(ids, use_cache=False).last_hidden_state[0] for ids in plain]
        lm.set_attn_implementation(ATTENTION)
        tree = build_tree(sequences)
        hidden = run_tree(policy, tree)
        gap = max(float((hidden[p] - r).norm() / r.norm()) for p, r in zip(tree.paths, rows, strict=True))
        if gap < 0.1:
            return
    raise NotImplementedError("attention that does not follow the tree")
