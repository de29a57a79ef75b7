"""Training on a pretended card (pretended_card.py): the CPU's numbers, and nothing that CUDA would refuse."""

import json

import pretended_card
import pytest
import torch
from helpers import TRAINED, make_trainer
from pretended_card import Card

from covrl_lab.train import lora, sampling
from covrl_lab.train.probe import probe_question

SMALL = {"steps": 2, "rollouts_per_question": 4, "max_trace_tokens": 8, "eval_questions": 1}
SMALL |= {"eval_every": 2, "checkpoint_every": 1, "device": "auto"}
SETTINGS = {
    # The default, as it would run there: 4 bits, recorded steps, FlexAttention.
    "qlora": {"quantization": "nf4", "method": "covrl"},
    "packed weights, padded rows": {"quantization": "nf4", "method": "latro"},
    "windows, and all else": {"method": "covrl", "model": "tiny-gemma3"},
}
MORE = {"alpha_rate": 0.5, "max_packed_tokens": 400, "updates_per_step": 2, "posterior_weight": 1.0, "top_p": 0.9}
SETTINGS["windows, and all else"] |= MORE | {"judge_traces": True, "eval_task": "arithmetic, last_letters*1"}


@pytest.fixture
def card():
    with pretended_card.pretended_card():
        yield


def test_the_pretended_card_refuses_what_cuda_does(card):
    on, off = torch.ones(3, 2, device="cuda"), torch.ones(3, 2)
    assert type(on) is Card and on.device == torch.device("cuda:0") and type(off) is torch.Tensor
    assert type(on[torch.tensor([0])]) is Card  # indices may come from the host
    for mixed in (lambda: on + off, lambda: off[on[:, 0].long()], lambda: torch.cat([on, off]), lambda: on @ off.T):
        with pytest.raises(RuntimeError, match="same device"):
            mixed()
    with pytest.raises(TypeError, match="Tensor.cpu"):
        on.numpy()
    assert type(on.cpu()) is type(on.to("cpu")) is torch.Tensor and type(off.to(on.device)) is Card
    waits = (on.tolist, on.cpu, on.sum().item, lambda: on[on > 0], lambda: on[torch.tensor([0])])
    for wait in (*waits, lambda: torch.tensor([1], device="cuda"), lambda: on.copy_(off)):
        with pytest.raises(RuntimeError, match="stream is capturing"):
            sampling.record(wait)
    graph, output = sampling.record(lambda: on * 2)
    on.copy_(off * 5)
    graph.replay()
    assert output.tolist() == [[10.0, 10.0]] * 3


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_on_a_pretended_card_has_the_numbers_of_the_cpu(tmp_path, monkeypatch, name):
    """From the settings to a checkpoint, resumed once. Kernels are the CPU's, so that rounding alone differs."""
    settings = TRAINED | SMALL | SETTINGS[name]
    packs = "padded" not in name
    if not packs:
        monkeypatch.setattr(lora, "has_room", lambda *_: False)
        monkeypatch.setattr("covrl_lab.train.policy.enable_packing", lambda policy: False)
    with pretended_card.pretended_card():
        next(iter(make_trainer(tmp_path / "card", settings, device="cuda")))
        trainer = make_trainer(tmp_path / "card", settings, device="cuda").run()
        trained = {type(p) for _, p in trainer.policy.trainable()}
        assert trained == {Card} and trainer.optimizer.state
        recorded = len(pretended_card.graphs)
    about = json.loads((tmp_path / "card" / "policy.json").read_text())
    assert about["attention"] == ("FlexAttention" if packs else "the model's own") and bool(recorded) == packs
    if settings["quantization"] == "nf4":
        assert ("every use" in about["weights"]) != packs
    here = make_trainer(tmp_path / "cpu", settings).run()
    same = ("loss", "reward", "trace_tokens", "gradient_norm", "answer_logprob_prior", "accuracy")
    for found, expected in zip(trainer.records, here.records, strict=True):
        for column in same:
            if expected[column] is None:  # not measured at this step
                assert found[column] is None
            else:
                assert found[column] == pytest.approx(expected[column], rel=1e-3, abs=1e-12), column


def test_the_bench_asks_a_policy_on_a_pretended_card(card, tmp_path):
    trainer = make_trainer(tmp_path / "run", method="covrl", device="cuda").setup()
    found = probe_question(trainer.policy, trainer.prompter, question="What is 2 + 3?", answer="5", k=2, max_tokens=6)
    assert len(found) == 4 and {len(row) for row in found["alternatives"]} <= set(range(1, 7))
