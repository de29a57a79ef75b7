"""The script that checks a graphics card, here on a CPU and on tiny shapes."""

import json
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, checkout_environment

from covrl_lab.train import lora
from covrl_lab.train.models import load_policy
from tests.bench import gpu_check, speed
from tests.bench.benchmark import random_model


def run(tmp_path, *options):
    status = gpu_check.main(["--device", "cpu", "--out", str(tmp_path / "out.json"), *options])
    return status, json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))


def test_every_part_runs_and_passes_on_a_cpu(tmp_path):
    status, found = run(tmp_path)
    results = found["results"]
    assert status == 0 and tuple(results) == gpu_check.PARTS, {k: v.get("error") for k, v in results.items()}
    assert all(result["ok"] for result in results.values())
    assert results["twice"]["equal"] and results["scores"]["gaps"]["tiny"]["gradient"] < 1e-3
    assert [line["weights"] for line in results["speed"]["table"]] == ["unpacked", "kept"]
    unpacked, kept = (line["kernels"] for line in results["speed"]["table"])
    assert kept < unpacked < 300
    assert results["plan"]["planned_gib"] > 0 and results["long"]["peak_gib"] > 0
    table = speed.card_frame({"gpu_check": found})
    assert list(table.index) == list(gpu_check.PARTS) and table["ok"].all()
    assert "largest gap" in table.loc["scores", "found"] and "tokens/s" in table.loc["speed", "found"]
    assert str(tmp_path) not in json.dumps(found)  # nothing of this machine but its kind


def test_a_token_of_28_layers_is_at_most_1000_operations(tmp_path, monkeypatch):
    """As on CUDA: norms are one each, and weights that are kept unpacked are plain matrices."""
    monkeypatch.setattr(lora, "has_onednn_bfloat16", lambda: False)
    random_model(tmp_path, "tiny", num_hidden_layers=28)
    policy = load_policy(str(tmp_path), dtype="bfloat16", device="cpu")
    contexts = [[*range(3, 103), 110 + row % 8] for row in range(64)]
    norms = [module for module in policy.model.modules() if type(module).__name__ == "LlamaRMSNorm"]
    for norm in norms:
        norm.forward = torch.tanh  # one operation, and bounded
    assert len(norms) == 57 and all(group.kept for group in policy.lora)
    gpu_check.endless(policy)
    assert 900 < gpu_check.kernels(policy, contexts) <= 1000


def test_a_part_that_fails_is_named_and_the_others_run(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "timed", lambda function: 1 / 0)
    status, found = run(tmp_path, "--parts", "mask,twice")
    assert status == 1 and "ZeroDivisionError" in found["results"]["mask"]["error"]
    assert found["results"]["twice"]["ok"]


def test_a_bare_machine_runs_the_numbers_and_names_what_it_left_out(tmp_path):
    """With torch, transformers, peft and accelerate alone, in a process of its own."""
    missing = (
        "bitsandbytes gguf datasets reasoning_gym math_verify platformdirs pandas pyarrow plotly ipywidgets psutil"
    )
    out, parts = tmp_path / "out.json", "scores,decoding,twice,mask,plan"
    code = f"import sys; sys.modules.update(dict.fromkeys({missing.split()})); from tests.bench import gpu_check; "
    code += f"sys.exit(gpu_check.main(['--device', 'cpu', '--parts', {parts!r}, '--out', {str(out)!r}]))"
    done = subprocess.run([sys.executable, "-c", code], env=checkout_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text(encoding="utf-8"))
    assert {name: one["ok"] for name, one in found["results"].items()} == {
        "scores": True, "decoding": True, "twice": True, "mask": True, "plan": None,
    }  # fmt: skip
    assert "no package 'pandas'" in found["results"]["plan"]["error"]
    assert "no package 'bitsandbytes'" in found["settings"]["quantization"]


def test_what_there_is_no_time_for_is_left_out(tmp_path):
    status, found = run(tmp_path, "--minutes", "0")
    assert status == 0 and {one["error"] for one in found["results"].values()} == {"left out: no time"}


def test_a_notebook_without_a_card_shows_an_empty_table():
    assert list(speed.card_frame({}).columns) == ["ok", "seconds", "found"] and speed.card_frame({}).empty


def test_gaps_out_of_bounds_fail():
    assert not gpu_check.bounded({"tiny": {"value": 2e-3, "gradient": 0.0}})["ok"]
    assert not gpu_check.bounded({"tiny": {"value": float("nan"), "gradient": 0.0}})["ok"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_it_says_so(capsys):
    with pytest.raises(SystemExit):
        gpu_check.main([])
    assert "--device cpu" in capsys.readouterr().err


def test_the_list_of_what_needs_a_card_names_every_part():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    listed = text.split("### What only a graphics card can show")[1].split("\n#")[0]
    for part in gpu_check.PARTS:
        assert f"--parts {part}" in listed, part
