"""Models: what is loaded is what was meant, in 4 bits or not, and a failure leaves nothing behind."""

import bitsandbytes as bnb
import pytest
import torch
from helpers import TINIES, move_adapter, text_gradients, text_ids, text_logits
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from covrl_lab.train.embedded import EMBEDDED
from covrl_lab.train.limits import fast_dtype
from covrl_lab.train.models import TINY, check_model, fuse_norms, load_config, load_policy, load_tokenizer
from covrl_lab.types import ConfigError

pytestmark = pytest.mark.usefixtures("offline")


@torch.no_grad()
def greedy(policy, tokens=12):
    ids = text_ids(policy)
    out = policy.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
    )
    return out[0, ids.shape[1] :].tolist()


def make_dense(policy):
    """Replace every 4-bit linear by a dense one that holds bitsandbytes' own dequantised weight."""
    replaced = 0
    for module in list(policy.model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, bnb.nn.Linear4bit):
                weight = bnb.functional.dequantize_4bit(child.weight.data, child.weight.quant_state)
                dense = torch.nn.Linear(child.in_features, child.out_features, bias=False)
                dense.weight = torch.nn.Parameter(weight.to(policy.dtype), requires_grad=False)
                setattr(module, name, dense)
                replaced += 1
    return replaced


@pytest.mark.parametrize(
    ("onednn", "supported", "avx512", "avx512_bf16", "native"),
    [
        (True, True, True, True, True),
        (True, True, True, False, False),  # it says that it can, and emulates
        (True, True, False, False, True),  # ARM
        (True, False, False, False, False),  # AVX2
        (False, None, False, False, False),  # macOS on ARM, which lacks the question, too
    ],
)
def test_auto_is_bfloat16_where_the_cpu_has_products_in_it(
    monkeypatch, onednn, supported, avx512, avx512_bf16, native
):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    asked = None if supported is None else lambda: supported
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", asked)
    policy = load_policy("tiny", quantization="none", device="cpu")
    assert policy.dtype == (torch.bfloat16 if native else torch.float32)
    assert policy.abilities()["products"] == ("bfloat16" if native else "float32")
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):  # what is asked for counts
        assert load_policy("tiny", quantization="none", dtype=name, device="cpu").dtype == dtype


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), "float32"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")])
def test_auto_is_float32_on_gpus_that_emulate_bfloat16(monkeypatch, capability, dtype):
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: capability if device.index == 1 else (8, 0)
    )
    assert fast_dtype(torch.device("cuda:1")) == dtype


@pytest.mark.parametrize("name", TINIES)
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_tiny_policies_load_without_files(name, quantization):
    policy = load_policy(name, quantization=quantization, dtype="bfloat16")
    assert policy.dtype == torch.bfloat16 and policy.device.type in ("cpu", "cuda")
    assert policy.max_context == 8192
    four_bit = [m for m in policy.decoder.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert bool(four_bit) == (quantization == "nf4")
    assert not isinstance(policy.head, bnb.nn.Linear4bit)
    assert policy.decoder is policy.causal_lm.model and policy.head is policy.causal_lm.lm_head
    names = [name for name, _ in policy.trainable()]
    assert names == sorted(names) and len(names) == 2 * 7 * 2  # A and B, seven projections, two layers
    assert all("lora_" in name for name in names)
    assert {parameter.dtype for _, parameter in policy.trainable()} == {torch.float32}
    assert text_logits(policy).shape[-1] == len(policy.tokenizer)
    assert not any(module.training for module in policy.model.modules())


def test_tiny_tokenizer_round_trips_any_text_and_keeps_digits_and_newlines_apart():
    tokenizer = load_tokenizer(TINY)
    text = "the sum of 12+34\n\nis 46 — naïve 中"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer("12\n\n3").input_ids) == ["1", "2", "Ċ", "Ċ", "3"]
    joined = tokenizer("the").input_ids
    assert joined != tokenizer("t").input_ids + tokenizer("he").input_ids  # seams must be made of ids
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|im_start|>user\nhi<|im_end|>\n"


def test_windows_of_tiny_gemma_are_exercised():
    policy = load_policy("tiny-gemma3", quantization="none", dtype="float32", lora_rank=0)
    windowed = text_logits(policy)
    policy.causal_lm.config.sliding_window = 4096
    for module in policy.decoder.modules():
        if hasattr(module, "sliding_window") and module.sliding_window:
            module.sliding_window = 4096
    assert not torch.allclose(windowed[:, -1], text_logits(policy)[:, -1], atol=1e-4)


def test_seed_sets_the_adapter_only_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = (load_policy(TINY, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    for (_, a), (_, b) in zip(first.trainable(), again.trainable(), strict=True):
        assert torch.equal(a, b)
    assert any(not torch.equal(a, b) for (_, a), (_, b) in zip(first.trainable(), other.trainable(), strict=True))
    assert torch.equal(first.head.weight, other.head.weight)


def test_a_local_folder_is_a_model(tmp_path):
    policy = load_policy(TINY, quantization="none", dtype="float32", lora_rank=0)
    policy.model.save_pretrained(tmp_path)
    policy.tokenizer.save_pretrained(tmp_path)
    local = load_policy(str(tmp_path), quantization="none", dtype="float32", lora_rank=0)
    assert torch.equal(text_logits(local), text_logits(policy))
    assert load_config(str(tmp_path)).vocab_size == len(local.tokenizer)
    assert load_policy(str(tmp_path)).trainable()


def test_missing_weights_are_refused(tmp_path):
    policy = load_policy(TINY, quantization="none", lora_rank=0)
    policy.model.save_pretrained(tmp_path)
    policy.tokenizer.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="1 weights missing, 'model.layers.1.mlp.up_proj.weight'"):
        load_policy(str(tmp_path), quantization="none")


def test_pickled_weights_are_refused(tmp_path):
    policy = load_policy(TINY, quantization="none", lora_rank=0)
    policy.model.config.save_pretrained(tmp_path)
    policy.tokenizer.save_pretrained(tmp_path)
    torch.save(policy.model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="could not load the model"):
        load_policy(str(tmp_path), quantization="none")


def test_sampling_does_not_change_the_gradients_of_a_4_bit_model():
    """Guards the fix in _load_frozen: without it, CPUs with AVX512-BF16 lose gradients after sampling."""
    policy = load_policy(TINY)
    move_adapter(policy)
    before = text_gradients(policy)
    greedy(policy)
    after = text_gradients(policy)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert min(float(grad.norm()) for grad in before.values()) > 0


@pytest.mark.parametrize("name", TINIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_4_bit_model_equals_its_dequantised_self(name, dtype):
    """Bounds: CPUs agree exactly; elsewhere float32 may differ by the order of sums, and bfloat16, which
    keeps 8 bits, by a few roundings of 2**-8. Lost gradients or repacked weights are far outside of both.
    """
    policy, dense = load_policy(name, dtype=dtype), load_policy(name, dtype=dtype)
    move_adapter(policy)
    move_adapter(dense)
    assert make_dense(dense) == 14
    bound = 1e-5 if dtype == "float32" else 2**-6
    expected = text_logits(dense).float()
    assert (text_logits(policy).float() - expected).abs().max() <= bound * expected.abs().max()
    got, want = text_gradients(policy), text_gradients(dense)
    for key in want:
        assert (got[key] - want[key]).norm() <= bound * want[key].norm(), key
    if dtype == "float32":
        assert greedy(policy) == greedy(dense)


def test_4_bit_rounding_is_real_and_small():
    """The quantised model is neither the dense one nor noise."""
    dense = text_logits(load_policy(TINY, quantization="none", dtype="float32", lora_rank=0))
    quantised = text_logits(load_policy(TINY, quantization="nf4", dtype="float32", lora_rank=0))
    error = float((dense - quantised).norm() / dense.norm())
    assert 1e-3 < error < 0.3


@pytest.mark.parametrize("name", TINIES)
def test_gradient_checkpointing_changes_memory_only(name):
    plain, checkpointed = load_policy(name), load_policy(name, gradient_checkpointing=True)
    move_adapter(plain)
    move_adapter(checkpointed)
    calls = []
    # The first module of a layer: the recomputation stops early, once it has all that it needs.
    checkpointed.decoder.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    want, got = text_gradients(plain), text_gradients(checkpointed)
    assert len(calls) == 2  # once forward, once again in the backward pass
    assert all(torch.equal(got[key], want[key]) for key in want)
    assert greedy(checkpointed) == greedy(plain)


@pytest.mark.parametrize("name, norms", [("tiny", 5), ("tiny-qwen3", 9), ("tiny-gemma3", 0)])
@torch.no_grad()
def test_usual_norms_run_as_one_kernel_and_others_as_they_are(name, norms):
    """Gemma's norms, which scale by one more than their weight, are not the usual ones."""
    policy = load_policy(name, quantization="none", dtype="float32", lora_rank=0)
    generator = torch.Generator().manual_seed(0)
    for part, parameter in policy.model.named_parameters():
        if "norm" in part:
            parameter.add_(torch.rand(parameter.shape, generator=generator))
    ids = torch.arange(3, 23)[None]
    before = policy.decoder(ids, use_cache=False).last_hidden_state
    fuse_norms(policy.model)
    fused = [module for module in policy.model.modules() if getattr(module.forward, "func", None) is F.rms_norm]
    assert len(fused) == norms
    torch.testing.assert_close(policy.decoder(ids, use_cache=False).last_hidden_state, before)
    for module in fused:
        module.forward.keywords["eps"] = 1.0
    assert not norms or not torch.allclose(policy.decoder(ids, use_cache=False).last_hidden_state, before, rtol=0.01)


@torch.no_grad()
def test_a_norm_of_another_kind_keeps_its_own_forward():
    policy = load_policy("tiny", quantization="none", dtype="float32", lora_rank=0)
    norm, kind = policy.decoder.norm, type(policy.decoder.norm)
    norm.__class__ = type("OtherRMSNorm", (kind,), {"forward": lambda self, x: 2 * kind.forward(self, x)})
    fuse_norms(policy.model)
    assert "forward" not in vars(norm)
    assert "forward" in vars(policy.decoder.layers[0].input_layernorm)


def test_check_model_accepts_names_folders_and_hub_ids(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for name in [EMBEDDED, *TINIES, str(tmp_path), "Qwen/Qwen3-0.6B", "owner/name.v1_2"]:
        check_model(name)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("smolm2-135m", "did you mean 'smollm2-135m'"),
        ("", "choose one of"),
        ("/no/such/folder", "unknown model"),
        ("./models/mine/final", "unknown model"),
        ("not a model", "unknown model"),
    ],
)
def test_check_model_refuses_what_cannot_be_a_model(name, sentence):
    with pytest.raises(ConfigError, match=sentence):
        check_model(name)


def test_check_model_explains_folders_that_are_no_model(tmp_path):
    with pytest.raises(ConfigError, match=r"no config\.json"):
        check_model(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="adapter, not a model"):
        check_model(str(tmp_path))


@pytest.mark.parametrize(
    "setting",
    [{"quantization": "nf5"}, {"dtype": "bf16"}, {"device": "gpu"}, {"lora_rank": -1}, {"lora_alpha": 0}],
)
def test_wrong_settings_are_one_sentence(setting):
    (name,) = setting
    with pytest.raises(ConfigError, match=name):
        load_policy(TINY, **setting)


@pytest.mark.parametrize("name", TINIES)
def test_a_bfloat16_model_without_quantisation_packs(name):
    """Its rounding is no reason to take padded rows."""
    assert load_policy(name, quantization="none", dtype="bfloat16").packs


def test_unreachable_hub_model_is_one_sentence():
    with pytest.raises(ConfigError, match="could not load the model 'nobody/nothing-here'"):
        load_tokenizer("nobody/nothing-here")
