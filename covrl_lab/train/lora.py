"""The linear layer y = W x + s B (A x) of a frozen base with a LoRA adapter, as one differentiable piece.

PEFT's layers keep their parameters, their files and their switch; this replaces how they are computed.
Plain PEFT moves activations to float32 and back around every adapter product and adds the parts in separate
passes over memory; here A and B, which are small, move to the activations' dtype instead, and products add
into the result. In float32 both ways agree to rounding.

On a CPU the unpacked weights of a 4-bit base are kept, in the layout its bfloat16 instructions want, and
layers that are fed with the same x (queries, keys and values; gate and up) are one: W and A are those of the
layers under each other, B has theirs on its diagonal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import bitsandbytes as bnb
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.nn import functional as F

# A CPU keeps unpacked weights, for the forward and the backward pass, up to this size: the same numbers
# without unpacking them at every token. A GPU unpacks a layer at a time, as bitsandbytes does.
DENSE_BYTES = 4 * 2**30
FED_ALIKE = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


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


class _Weight:
    """The frozen (out, in) W of layers fed alike: ``forward`` x -> x W' + bias, ``backward`` dy -> dy W."""

    def __init__(self, layers: Sequence[torch.nn.Module], keep: bool) -> None:
        bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
        if keep:
            dense = torch.cat([_dense(layer) for layer in layers])
            self.forward, self.backward = _product(dense, bias), _product(dense.T)
        else:
            (layer,) = layers
            self.forward = lambda x: F.linear(x, _dense(layer), bias)
            self.backward = lambda dy: dy @ _dense(layer)


def _dense(layer: torch.nn.Module) -> Tensor:
    """The (out, in) weight in the dtype it computes in, unpacked if it is in 4 bits."""
    weight = layer.weight
    state = getattr(weight, "quant_state", None)
    return weight if state is None else bnb.functional.dequantize_4bit(weight.data, state)


def _product(weight: Tensor, bias: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """x -> x W' + bias, from a weight repacked once if the CPU has instructions for its dtype."""
    mkldnn = torch.ops.mkldnn
    if weight.dtype == torch.bfloat16 and mkldnn._is_mkldnn_bf16_supported():
        packed = mkldnn._reorder_linear_weight(weight.contiguous(), 128)
        return lambda x: mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return partial(F.linear, weight=weight, bias=bias)


class LoraGroup:
    """LoRA layers that are fed with the same x, computed together when the first of them is called."""

    def __init__(self, layers: Sequence[LoraLayer], keep: bool) -> None:
        self.layers = layers
        self.sizes = [layer.base_layer.out_features for layer in layers]
        self.weight = _Weight([layer.base_layer for layer in layers], keep)
        self.steady: tuple[Tensor, Tensor] | None = None
        self.x: Tensor | None = None
        self.waiting: dict[int, Tensor] = {}  # outputs for this x that are not asked for yet
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
        if x is not self.x or i not in self.waiting:
            self.x, self.waiting = x, dict(enumerate(self._compute(x).split(self.sizes, dim=-1)))
        y = self.waiting.pop(i)
        if not self.waiting:
            self.x = None
        return y

    def _compute(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        if self.layers[0].disable_adapters:
            y = self.weight.forward(rows)
        else:
            y = _LoraLinear.apply(rows, self.weight, *(self.steady or self.adapter(x.dtype)))
        return y.unflatten(0, x.shape[:-1])


def fuse(model: torch.nn.Module) -> list[LoraGroup]:
    """Let the LoRA layers of a PEFT model compute in one piece."""
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    packed = [getattr(layer.base_layer.weight, "quant_state", None) is not None for layer in layers]
    size = sum(4 * layer.in_features * layer.out_features for layer in layers)
    on_cpu = all(p.device.type == "cpu" for layer in layers for p in layer.parameters())
    keep = bool(layers) and all(packed) and on_cpu and size <= DENSE_BYTES
    return [LoraGroup(group, keep) for group in _groups(model, keep)]


def _groups(model: torch.nn.Module, fed_alike: bool) -> Iterator[list[LoraLayer]]:
    for parent in model.modules():
        children = {name: child for name, child in parent.named_children() if isinstance(child, LoraLayer)}
        for names in FED_ALIKE if fed_alike else ():
            found = [children[name] for name in names if name in children]
            if len(found) == len(names) and len({layer.base_layer.bias is None for layer in found}) == 1:
                yield [children.pop(name) for name in names]
        yield from ([child] for child in children.values())


@contextmanager
def steady(groups: Sequence[LoraGroup], dtype: torch.dtype) -> Iterator[None]:
    """Inside, the adapters do not change and need no gradients: they are brought into ``dtype`` once."""
    with torch.no_grad():
        for group in groups:
            group.steady = group.adapter(dtype)
    try:
        yield
    finally:
        for group in groups:
            group.steady = None
