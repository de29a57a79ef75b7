"""The linear layer y = W x + s B (A x) of a frozen base with a LoRA adapter, as one differentiable piece.

PEFT's layers keep their parameters, their files and their switch; this replaces how they are computed. Plain PEFT moves
activations to float32 and back around every adapter product; here A and B, which are small, move to the activations'
dtype instead, and products add into the result. In float32 both ways agree to rounding.

Where there is room, the unpacked weights of a 4-bit base are kept. Layers with the same input x (queries, keys and
values; gate and up) are computed together then: their W and A are stacked, and B is block-diagonal.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.nn import functional as F

from .limits import has_onednn_bfloat16, has_room

# Layers of one module that get the same input.
SHARED_INPUT = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
FEW_ROWS = 128  # up to which CPUs compute W x' faster than x W' in float32, some of them three times as fast


class _Weight:
    """The frozen (out, in) W of layers with one input: ``forward`` x W' + bias, ``backward`` dy W.

    A W that is kept as a plain matrix has room for a cached A (r, in) ``below`` it: ``both`` is x W' + bias, then x A'.
    """

    below: Tensor | None = None

    def __init__(self, layers: Sequence[torch.nn.Module], keep: bool, rank: int) -> None:
        if not keep:
            (layer,) = layers
            self.forward = partial(_linear, layer)
            self.backward = lambda dy: dy @ _dense(layer)
            return
        bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
        dense = [_dense(layer) for layer in layers]
        if dense[0].device.type == "cpu" and dense[0].dtype == torch.bfloat16 and has_onednn_bfloat16():
            weight = torch.cat(dense)
            self.forward, self.backward = _repacked(weight, bias), _repacked(weight.T)
            return
        whole = torch.cat([*dense, dense[0].new_zeros(rank, dense[0].shape[1])])
        weight, self.below = whole.split([len(whole) - rank, rank])
        self.forward, self.backward = partial(F.linear, weight=weight, bias=bias), partial(F.linear, weight=weight.T)
        self.both = partial(linear, weight=whole, bias=None if bias is None else F.pad(bias, (0, rank)))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W' + bias for x (n, in), faster than PyTorch's own for few rows on a CPU, and equal to it but for rounding."""
    if len(x) > FEW_ROWS or x.device.type != "cpu" or x.dtype != torch.float32:
        return F.linear(x, weight, bias)
    return (weight @ x.T if bias is None else torch.addmm(bias[:, None], weight, x.T)).T


def _linear(layer: torch.nn.Module, x: Tensor) -> Tensor:
    """x W' + bias. bitsandbytes has products with packed weights for few rows on a GPU, and unpacks them for many."""
    if (state := getattr(layer.weight, "quant_state", None)) is None:
        return F.linear(x, layer.weight, layer.bias)
    from bitsandbytes import matmul_4bit  # only 4-bit weights need it

    return matmul_4bit(x, layer.weight.data, state, bias=layer.bias)


def _dense(layer: torch.nn.Module) -> Tensor:
    """The (out, in) weight in the dtype it computes in, unpacked if it is in 4 bits."""
    weight = layer.weight
    if (state := getattr(weight, "quant_state", None)) is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit  # only 4-bit weights need it

    return dequantize_4bit(weight.data, state)


def _repacked(weight: Tensor, bias: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """x -> x W' + bias, from a weight repacked once for the CPU's products in bfloat16."""
    mkldnn = torch.ops.mkldnn
    packed = mkldnn._reorder_linear_weight(weight.contiguous(), 128)
    return lambda x: mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


class _LoraLinear(torch.autograd.Function):
    """x (n, in), a (r, in), b (out, r) -> (n, out); gradients for x, a and b, the weight is frozen."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: _Weight, a: Tensor, b: Tensor):
        inner = x @ a.T
        y = weight.forward(x).addmm_(inner, b.T)
        ctx.weight = weight
        ctx.save_for_backward(x, inner, a, b)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, inner, a, b = ctx.saved_tensors
        dinner = dy @ b
        dx = ctx.weight.backward(dy).addmm_(dinner, a) if ctx.needs_input_grad[0] else None
        return dx, None, dinner.T @ x, dy.T @ inner


class LoraGroup:
    """LoRA layers with the same input x, computed together when the first of them is called."""

    def __init__(self, layers: Sequence[LoraLayer], keep: bool) -> None:
        self.layers = layers
        self.sizes = [layer.base_layer.out_features for layer in layers]
        rank = sum(sum(layer.r.values()) for layer in layers)
        self.weight, self.kept = _Weight([layer.base_layer for layer in layers], keep, rank), keep
        self.cached: tuple[Tensor, Tensor] | None = None
        self.x: Tensor | None = None
        self.waiting: dict[int, Tensor] = {}  # outputs for this x that no layer has returned yet
        for i, layer in enumerate(layers):
            layer.forward = partial(self._output, i)

    def adapter(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A (r, in) and s B (out, r), in the activations' dtype; r is the sum of the layers' ranks."""
        found = []
        for layer in self.layers:
            (name,) = layer.active_adapters
            found.append((layer.lora_A[name].weight, layer.scaling[name] * layer.lora_B[name].weight))
        a, b = zip(*found, strict=True)
        return torch.cat(a).to(dtype), torch.block_diag(*b).to(dtype)

    def _output(self, i: int, x: Tensor) -> Tensor:
        if len(self.layers) == 1:
            return self._compute(x)
        if x is not self.x or i not in self.waiting:
            self.x, self.waiting = x, dict(enumerate(self._compute(x).split(self.sizes, dim=-1)))
        y = self.waiting.pop(i)
        if not self.waiting:
            self.x = None
        return y

    def _compute(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if self.layers[0].disable_adapters:
            y = self.weight.forward(rows)
        else:
            a, b = self.cached or self.adapter(x.dtype)
            if torch.is_grad_enabled():
                y = _LoraLinear.apply(rows, self.weight, a, b)
            elif self.cached and self.weight.below is not None:
                y, inner = self.weight.both(rows).split([len(b), len(a)], dim=1)
                y.addmm_(inner, b.T)
            else:  # without autograd's own cost, which counts for few rows
                y = self.weight.forward(rows).addmm_(rows @ a.T, b.T)
        return y.view(*x.shape[:-1], -1)


def fuse(model: torch.nn.Module, memory: float | None = None) -> list[LoraGroup]:
    """Let the LoRA layers of a PEFT model compute in one piece; ``memory`` in bytes is that of its GPU, if not all."""
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    packed = [getattr(layer.base_layer.weight, "quant_state", None) is not None for layer in layers]
    keep = bool(layers) and all(packed) and _has_room(layers, memory)
    groups = []
    for parent in model.modules():
        children = {name: child for name, child in parent.named_children() if isinstance(child, LoraLayer)}
        for names in SHARED_INPUT if keep else ():
            found = [children[name] for name in names if name in children]
            if len(found) == len(names) and len({layer.base_layer.bias is None for layer in found}) == 1:
                groups.append([children.pop(name) for name in names])
        groups += [[child] for child in children.values()]
    return [LoraGroup(group, keep) for group in groups]


def _has_room(layers: Sequence[LoraLayer], memory: float | None) -> bool:
    """Whether a second, unpacked copy of the weights may be kept."""
    numbers, device = sum(x.in_features * x.out_features for x in layers), next(layers[0].parameters()).device
    if device.type != "cpu":
        memory = memory or torch.cuda.get_device_properties(device).total_memory
    return has_room(numbers, layers[0].base_layer.compute_dtype.itemsize, None if device.type == "cpu" else memory)


@contextmanager
def cached_adapters(groups: Sequence[LoraGroup], dtype: torch.dtype) -> Iterator[None]:
    """Inside, adapters are cast to ``dtype`` once and cached; they must not change and get no gradients."""
    with torch.no_grad():
        for group in groups:
            group.cached = group.adapter(dtype)
            if group.weight.below is not None:
                group.weight.below.copy_(group.cached[0])
    try:
        yield
    finally:
        for group in groups:
            group.cached = None
