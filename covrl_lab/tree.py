"""A step's sequences packed into one prefix tree, run through a stock transformer in one forward.

All contexts of a step share their demonstrations, the rollouts of a group share their question, and a
trace under two prompts is two branches. Each distinct (prefix, token) pair is one node, computed once; a
node attends to its ancestors and itself, at the position of its depth, so its hidden state is exactly the
one a plain causal forward of its own sequence gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .types import ConfigError


@dataclass(frozen=True)
class TokenTree:
    """n nodes in an order where parents come before children.

    ids        (n,) int64 token ids
    position   (n,) int64 depth, 0 at the roots
    ancestors  (n, n) bool, True where row attends to column: its ancestors and itself
    paths      for each packed sequence, the (length,) int64 node of each of its tokens
    """

    ids: Tensor
    position: Tensor
    ancestors: Tensor
    paths: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.ids)


def build_tree(sequences: Sequence[Sequence[int]]) -> TokenTree:
    """Pack token-id sequences into one tree; shared prefixes become shared nodes."""
    children: dict[tuple[int, int], int] = {}
    ids: list[int] = []
    parent: list[int] = []
    paths = []
    for sequence in sequences:
        node, path = -1, []
        for token in sequence:
            key = (node, token)
            node = children.setdefault(key, len(ids))
            if node == len(ids):
                ids.append(token)
                parent.append(key[0])
            path.append(node)
        paths.append(torch.tensor(path, dtype=torch.int64))
    ancestors = np.zeros((len(ids), len(ids)), dtype=bool)
    position = np.zeros(len(ids), dtype=np.int64)
    for i, p in enumerate(parent):
        if p >= 0:
            ancestors[i] = ancestors[p]
            position[i] = position[p] + 1
        ancestors[i, i] = True
    return TokenTree(torch.tensor(ids), torch.from_numpy(position), torch.from_numpy(ancestors), tuple(paths))


def count_nodes(sequences: Sequence[Sequence[int]]) -> int:
    """Nodes of the tree of these sequences, without building its mask."""
    seen: dict[tuple[int, int], int] = {}
    for sequence in sequences:
        node = -1
        for token in sequence:
            node = seen.setdefault((node, token), len(seen))
    return len(seen)


def attention_mask(config, allowed: Tensor, query_position: Tensor, key_position: Tensor, dtype: torch.dtype):
    """The additive mask(s) a transformers decoder takes: (1, 1, queries, keys), or one per layer type.

    allowed is (queries, keys) bool; positions are token depths, which sliding windows are measured in.
    Models whose config names ``layer_types`` (Qwen, Gemma 3) take a dictionary of masks; others one mask,
    windowed if the config sets ``sliding_window``.
    """

    def additive(keep: Tensor) -> Tensor:
        mask = torch.zeros(keep.shape, dtype=dtype, device=keep.device)
        return mask.masked_fill_(~keep, torch.finfo(dtype).min)[None, None]

    def windowed() -> Tensor:
        return allowed & (query_position[:, None] - key_position[None, :] < config.sliding_window)

    layer_types = set(getattr(config, "layer_types", None) or ())
    if layer_types:
        makers = {"full_attention": lambda: allowed, "sliding_attention": windowed}
        if unknown := sorted(layer_types - set(makers)):
            raise ConfigError(
                f"layers of type {unknown[0]!r} are not supported; use a model with plain attention"
            )
        return {kind: additive(makers[kind]()) for kind in sorted(layer_types)}
    return additive(windowed() if getattr(config, "sliding_window", None) else allowed)


class TreeCache:
    """Keys and values of tree nodes, grown in place; the ``past_key_values`` of a transformers decoder.

    Every layer keeps all nodes: windows are the mask's business. Buffers of ``capacity`` nodes are
    allocated at the first update, so that decoding never copies what is already there.
    """

    is_compileable = False

    def __init__(self, capacity: int) -> None:
        self.capacity, self.length = capacity, 0
        self._layers: list[tuple[Tensor, Tensor]] = []

    def update(self, keys: Tensor, values: Tensor, layer: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append (1, heads, new, size) keys and values; return views of all of the layer's."""
        if layer == len(self._layers):
            shape = (*keys.shape[:2], self.capacity, keys.shape[3])
            self._layers.append((keys.new_empty(shape), values.new_empty((*shape[:3], values.shape[3]))))
        end = self.length + keys.shape[2]
        k, v = self._layers[layer]
        k[:, :, self.length : end] = keys
        v[:, :, self.length : end] = values
        return k[:, :, :end], v[:, :, :end]

    def commit(self, new: int) -> None:
        """Count ``new`` nodes as stored, once every layer has appended them."""
        self.length += new

    def get_seq_length(self, layer: int = 0) -> int:
        """Nodes stored, as transformers asks for it."""
        return self.length


def final_logits(policy, hidden: Tensor) -> Tensor:
    """The output head on hidden states (k, hidden): float32 logits (k, vocabulary), soft-capped for Gemma."""
    logits = policy.head(hidden).float()
    cap = getattr(policy.causal_lm.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def run_tree(policy, tree: TokenTree, cache: TreeCache | None = None) -> Tensor:
    """Forward a whole tree; returns hidden states (n, hidden) before the output head."""
    device = policy.device
    position = tree.position.to(device)
    mask = attention_mask(policy.decoder.config, tree.ancestors.to(device), position, position, policy.dtype)
    output = policy.decoder(
        input_ids=tree.ids.to(device)[None],
        attention_mask=mask,
        position_ids=position[None],
        past_key_values=cache,
        use_cache=cache is not None,
    )
    if cache is not None:
        cache.commit(len(tree))
    return output.last_hidden_state[0]
