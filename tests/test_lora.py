"""The fused LoRA layer gives the numbers and gradients of PEFT's own layers."""

from functools import partial

import pytest
import torch
from helpers import move_adapter
from peft.tuners.lora import LoraLayer
from transformers import Qwen2Config, Qwen2ForCausalLM

from covrl_lab.train import limits, lora, models
from covrl_lab.train.shapes import shape_of


def both(monkeypatch, name="tiny", **settings):
    """The same policy with PEFT's layers and with ours, adapters alike and not zero."""
    found = []
    for fuse in (lambda *_: None, lora.fuse):
        monkeypatch.setattr(models, "fuse", fuse)
        policy = models.load_policy(name, lora_rank=4, **settings)
        move_adapter(policy, seed=1, scale=0.1)
        found.append(policy)
    return found


def states_and_gradients(policy):
    ids = torch.arange(3, 43).reshape(2, 20)
    hidden = policy.decoder(ids, use_cache=False).last_hidden_state.float()
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
    names, parameters = zip(*policy.trainable(), strict=True)
    return hidden.detach(), dict(zip(names, torch.autograd.grad((weights * hidden).sum(), parameters), strict=True))


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("kept", [0, 2**31], ids=["unpacked-each-time", "kept-dense"])
def test_fused_equals_peft(monkeypatch, quantization, kept):
    """To float32 rounding, of sums in another order."""
    monkeypatch.setattr(limits, "MAX_UNPACKED_BYTES", kept)
    plain, fused = both(monkeypatch, quantization=quantization, dtype="float32")
    (expected, slopes), (hidden, ours) = states_and_gradients(plain), states_and_gradients(fused)
    assert float((hidden - expected).norm() / expected.norm()) < 1e-5
    assert len(ours) == 28
    for name, slope in slopes.items():
        assert float(slope.norm()) > 0
        assert float((ours[name] - slope).norm() / slope.norm()) < 1e-5, name
    with fused.base(), plain.base(), torch.no_grad():
        base, own = (p.decoder(torch.tensor([[5, 6, 7]]), use_cache=False).last_hidden_state for p in (plain, fused))
    assert float((base - own).norm() / own.norm()) < 1e-5, "with the adapter off"
    with torch.no_grad():
        on = fused.decoder(torch.tensor([[5, 6, 7]]), use_cache=False).last_hidden_state
    assert float((on - own).norm() / own.norm()) > 0.01, "the adapter does nothing here"


@pytest.mark.parametrize("kept", [0, 2**31], ids=["unpacked-each-time", "kept-dense"])
def test_in_bfloat16_both_are_as_far_from_float32(monkeypatch, kept):
    """We round A, B and the inner product, PEFT rounds the sum: 1.02 and 1.03 times its error, measured."""
    monkeypatch.setattr(limits, "MAX_UNPACKED_BYTES", kept)
    _, exact = both(monkeypatch, quantization="nf4", dtype="float32")
    plain, fused = both(monkeypatch, quantization="nf4", dtype="bfloat16")
    (state, slopes), theirs, ours = map(states_and_gradients, (exact, plain, fused))

    def errors(found):
        gaps = torch.stack([(found[1][name] - slopes[name]).norm() for name in slopes])
        return float((found[0] - state).norm() / state.norm()), float(
            gaps.norm() / torch.stack([s.norm() for s in slopes.values()]).norm()
        )

    for own, reference in zip(errors(ours), errors(theirs), strict=True):
        print(f"relative error against float32: ours {own:.4f}, PEFT {reference:.4f}")
        assert 0 < own < 1.5 * reference


def test_layers_fed_alike_are_one_and_each_may_have_an_input_of_its_own(monkeypatch):
    """Four products a layer instead of seven; what a layer gives does not depend on what is asked first."""
    plain, fused = both(monkeypatch, quantization="nf4", dtype="float32")
    assert [len(group.layers) for group in fused.lora] == [3, 1, 2, 1] * 2
    x, other = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    ours, theirs = (policy.decoder.layers[0].self_attn for policy in (fused, plain))
    for name, given in [("v_proj", x), ("q_proj", x), ("k_proj", other), ("q_proj", x), ("q_proj", other)]:
        expected, found = (getattr(layers, name)(given).detach() for layers in (theirs, ours))
        assert float((found - expected).norm() / expected.norm()) < 1e-5, name


@pytest.mark.parametrize("biased", [("q_proj", "k_proj", "v_proj"), ("q_proj",)], ids=["all", "one"])
def test_biases_are_kept(monkeypatch, tmp_path, biased):
    """As in Qwen2, whose queries, keys and values have one, and in a model where only queries do."""
    sizes = {**models._TINY_SIZES, "vocab_size": 320}
    with models._own_seed(0):
        model = Qwen2ForCausalLM(Qwen2Config(**sizes))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(generator=generator)
    model.save_pretrained(tmp_path)
    models.load_tokenizer("tiny").save_pretrained(tmp_path)
    load = models._load_frozen

    def some_biases(*args):
        loaded = load(*args)
        for layer in loaded.model.layers:
            for name in {"q_proj", "k_proj", "v_proj"} - set(biased):
                getattr(layer.self_attn, name).bias = None
        return loaded

    monkeypatch.setattr(models, "_load_frozen", some_biases)
    for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 0.03)):  # a bfloat16 has 8 bits
        plain, fused = both(monkeypatch, name=str(tmp_path), quantization="nf4", dtype=dtype)
        assert len(fused.lora[0].layers) == len(biased)
        expected, ours = states_and_gradients(plain)[0], states_and_gradients(fused)[0]
        assert float((ours - expected).norm() / expected.norm()) < tolerance
        with torch.no_grad(), lora.cached_adapters(fused.lora, fused.dtype):
            cached = fused.decoder(torch.arange(3, 43).reshape(2, 20), use_cache=False).last_hidden_state.float()
        assert float((cached - expected).norm() / expected.norm()) < tolerance
        for group in fused.lora:
            group.weight.forward = partial(_without_bias, group.weight.forward)
        assert float((states_and_gradients(fused)[0] - expected).norm() / expected.norm()) > 0.1


def _without_bias(forward, x):
    return forward(x) - forward(torch.zeros_like(x))


def test_while_steady_the_adapter_is_read_once(monkeypatch):
    _, policy = both(monkeypatch, quantization="nf4", dtype="float32")
    ids = torch.tensor([[5, 6, 7]])

    def states():
        return policy.decoder(ids, use_cache=False).last_hidden_state.detach()

    with torch.no_grad():
        before = states()
        with lora.cached_adapters(policy.lora, policy.dtype):
            inside = states()  # sums in another order, as W and A are one matrix: 0.6e-6 measured
            assert float((inside - before).norm() / before.norm()) < 2e-6
            policy.trainable()[0][1].mul_(3)
            assert torch.equal(states(), inside)
        assert float((states() - before).abs().max()) > 1e-3  # after it, as it is now


@pytest.mark.parametrize("gib, kept", [(1e-4, False), (1e-2, True)])
def test_a_gpu_keeps_unpacked_weights_where_they_take_a_quarter_at_most(gib, kept):
    """Of 0.13 MiB in bfloat16; on a CPU the limit is one of bytes."""
    policy = models.load_policy("tiny", lora_rank=2, device="cpu")
    layers = [layer for layer in policy.model.modules() if isinstance(layer, LoraLayer)]
    size = 2 * sum(layer.in_features * layer.out_features for layer in layers)
    assert size == 2 * shape_of("tiny").parameters and (size <= gib * 2**30 / 4) == kept
    assert lora._has_room(layers, gib * 2**30)  # they are on a CPU
    for layer in layers:
        moved = torch.nn.ParameterDict({"one": torch.empty(1, device="meta")})
        layer.parameters = moved.parameters
    assert lora._has_room(layers, gib * 2**30) == kept
