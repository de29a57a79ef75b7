"""The linear layer y = W x + s B (A x) of a frozen base with a LoRA adapter, as one differentiable piece.

PEFT's layers keep their parameters, their files and their switch; this replaces how they are computed.
Plain PEFT moves activations to float32 and back around every adapter product and adds the parts in separate
passes over memory; here A and B, which are small, move to the activations' dtype instead, and products add
into the result. In float32 both ways agree to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import bitsandbytes as bnb
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.nn import functional as F

# On a CPU the dequantised weights of a 4-bit base are kept up to this size: the same numbers without
# unpacking them at every token. A GPU unpacks a layer at a time, as bitsandbytes does.
DENSE_BYTES = 2 * 2**30


class _LoraLinear(torch.autograd.Function):
    """x (n, in), a (r, in), b (out, r) -> (n, out); gradients for x, a and b, the weight is frozen."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Callable[[], Tensor], bias, a: Tensor, b: Tensor, scaling: float):
        small_a, small_b = a.to(x.dtype), (scaling * b).to(x.dtype)
        inner = x @ small_a.T
        y = F.linear(x, weight(), bias).addmm_(inner, small_b.T)
        ctx.weight, ctx.scaling = weight, scaling
        ctx.save_for_backward(x, inner, small_a, small_b)
        ctx.dtypes = a.dtype, b.dtype
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, inner, small_a, small_b = ctx.saved_tensors
        dinner = dy @ small_b
        da = (dinner.T @ x).to(ctx.dtypes[0])
        db = ctx.scaling * (dy.T @ inner).to(ctx.dtypes[1])
        dx = (dy @ ctx.weight()).addmm_(dinner, small_a) if ctx.needs_input_grad[0] else None
        return dx, None, None, da, db, None


def _forward(
    layer: LoraLayer, plain: Callable[..., Tensor], weight: Callable[[], Tensor], x: Tensor
) -> Tensor:
    if layer.disable_adapters:
        return plain(x)
    (name,) = layer.active_adapters
    y = _LoraLinear.apply(
        x.flatten(0, -2),
        weight,
        layer.base_layer.bias,
        layer.lora_A[name].weight,
        layer.lora_B[name].weight,
        layer.scaling[name],
    )
    return y.unflatten(0, x.shape[:-1])


def _dense(layer: torch.nn.Module) -> Tensor:
    """The (out, in) weight in the dtype it computes in, unpacked if it is in 4 bits."""
    weight = layer.weight
    state = getattr(weight, "quant_state", None)
    return weight if state is None else bnb.functional.dequantize_4bit(weight.data, state)


def fuse(model: torch.nn.Module) -> None:
    """Let every LoRA layer of a PEFT model compute in one piece."""
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    packed = [layer for layer in layers if getattr(layer.base_layer.weight, "quant_state", None) is not None]
    size = sum(2 * layer.in_features * layer.out_features for layer in packed)
    keep = size <= DENSE_BYTES and all(p.device.type == "cpu" for layer in packed for p in layer.parameters())
    for layer in layers:
        weight = partial(_dense, layer.base_layer)
        if keep and layer in packed:
            dense = _dense(layer.base_layer)
            weight = partial(lambda kept: kept, dense)
        layer.forward = partial(_forward, layer, layer.forward, weight)
