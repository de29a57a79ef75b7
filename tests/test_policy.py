"""The adapter: what it changes, that it can be taken off, stored and restored exactly."""

import pytest
import torch
from helpers import adapter_change, move_adapter, text_gradients, text_ids, text_logits
from peft import PeftModel

from covrl_lab.train.limits import fast_dtype
from covrl_lab.train.models import TINY, load_policy
from covrl_lab.train.policy import load_adapter, save_adapter
from covrl_lab.types import ConfigError

pytestmark = pytest.mark.usefixtures("offline")


def test_rank_zero_is_the_plain_frozen_model(tmp_path):
    policy = load_policy(TINY, lora_rank=0)
    assert policy.trainable() == [] and adapter_change(policy) == 0.0
    with policy.base():
        text_logits(policy)
    with pytest.raises(ConfigError, match="no adapter"):
        save_adapter(policy, tmp_path)
    with pytest.raises(ConfigError, match="no adapter"):
        load_adapter(policy, tmp_path)


def test_a_new_adapter_changes_nothing():
    policy = load_policy(TINY, lora_rank=4, lora_alpha=12)
    assert adapter_change(policy) == 0.0
    move_adapter(policy)
    assert adapter_change(policy) > 0.0


def test_a_policy_says_how_it_computes(monkeypatch):
    kept = load_policy(TINY).abilities()
    assert kept == {
        "scores": "packed trees",
        "decodes": "plain steps",
        "weights": "dequantised once and kept",
        "products": fast_dtype(torch.device("cpu")),
        "attention": "blocks of the tree",
    }
    monkeypatch.setattr("covrl_lab.train.limits.MAX_UNPACKED_BYTES", 0)
    assert load_policy(TINY).abilities() == kept | {"weights": "dequantised at every use"}
    policy = load_policy(TINY, quantization="none")
    assert policy.abilities() == kept | {"weights": "not quantised"}
    policy.flex = policy.graphs = True
    assert policy.abilities()["decodes"] == "recorded steps (CUDA graphs)"
    assert policy.abilities()["attention"] == "FlexAttention"
    policy.packs = policy.graphs = False
    rows = {"scores": "padded rows", "weights": "not quantised", "attention": "the model's own"}
    assert policy.abilities() == kept | rows


def test_base_is_the_model_without_adapter_and_keeps_pending_gradients():
    policy = load_policy(TINY)
    plain = load_policy(TINY, lora_rank=0)
    move_adapter(policy)
    want = text_gradients(policy)
    assert not torch.equal(text_logits(policy), text_logits(plain))
    ids = text_ids(policy)
    for _, parameter in policy.trainable():
        parameter.grad = None
    loss = policy.causal_lm(ids, labels=ids, use_cache=False).loss
    with policy.base():
        assert torch.equal(text_logits(policy), text_logits(plain))
        assert torch.equal(policy.causal_lm(ids).logits, text_logits(plain))
    loss.backward()  # the graph was made before the adapter went off and on again
    assert all(torch.equal(parameter.grad, want[name]) for name, parameter in policy.trainable())
    assert len(policy.trainable()) == 28


def test_adapter_round_trip_is_exact_and_loads_in_plain_peft(tmp_path):
    policy = load_policy(TINY, quantization="none", dtype="float32")
    move_adapter(policy)
    save_adapter(policy, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}
    fresh = load_policy(TINY, quantization="none", dtype="float32", seed=9)
    same_objects = [parameter for _, parameter in fresh.trainable()]
    load_adapter(fresh, tmp_path)
    for (_, a), (_, b), c in zip(policy.trainable(), fresh.trainable(), same_objects, strict=True):
        assert torch.equal(a, b) and b is c
    plain = load_policy(TINY, quantization="none", dtype="float32", lora_rank=0)
    by_peft = PeftModel.from_pretrained(plain.model, str(tmp_path)).eval()
    with torch.no_grad():
        assert torch.equal(by_peft(text_ids(plain)).logits, text_logits(policy))


def test_adapter_that_does_not_fit_is_refused_and_changes_nothing(tmp_path):
    policy = load_policy(TINY)
    move_adapter(policy)
    save_adapter(policy, tmp_path)
    smaller = load_policy(TINY)
    del smaller.decoder.layers[1]
    for other, reason in [
        (load_policy(TINY, lora_rank=8), "r=16"),
        (load_policy(TINY, lora_alpha=16), "lora_alpha=32"),
        (smaller, "does not fit 'tiny': 14 tensors differ"),
    ]:
        before = [parameter.clone() for _, parameter in other.trainable()]
        with pytest.raises(ConfigError, match=reason):
            load_adapter(other, tmp_path)
        assert all(torch.equal(a, b) for a, (_, b) in zip(before, other.trainable(), strict=True))
    with pytest.raises(ConfigError, match=r"adapter.* cannot be read"):
        load_adapter(policy, tmp_path / "nowhere")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ConfigError, match=r"adapter.* cannot be read"):
        load_adapter(policy, tmp_path)
