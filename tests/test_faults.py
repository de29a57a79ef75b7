"""Numerical faults in training: each is defined, counted in the metrics and shown, and none makes a silent update."""

import dataclasses
import json
import math

import pytest
import torch
from helpers import TRAINED, adapter_change, assert_one_sentence, make_trainer, move_adapter

from covrl_lab import RunConfig, load_run
from covrl_lab.runs.alarms import alarms
from covrl_lab.runs.folder import steps_in
from covrl_lab.train.methods import METHODS
from covrl_lab.types import ConfigError
from covrl_lab.views.explorer import TraceExplorer
from covrl_lab.views.monitor import numbers_html, snapshot, status_html
from covrl_lab.views.report import page

FEW = TRAINED | {"steps": 5, "eval_every": 0, "checkpoint_every": 2, "max_trace_tokens": 8, "eval_samples": 0}


def with_fault(trainer, steps, value, update=1):
    """The loss of an update of these steps (from 1) becomes ``value``; returns the adapter before each loss."""
    method, seen, before = trainer.method, [], []

    def loss(*arguments):
        loss, parts = method.loss(*arguments)
        seen.append(trainer.step + 1)
        before.append([p.detach().clone() for _, p in trainer.policy.trainable()])
        bad = seen[-1] in steps and seen.count(seen[-1]) == update
        return (loss * value if bad else loss), parts

    trainer.method = dataclasses.replace(method, loss=loss)
    return before


def stops(trainer, *words):
    with pytest.raises(ConfigError) as caught:
        trainer.run()
    assert_one_sentence(str(caught.value))
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_with_the_last_good_state(value, tmp_path):
    trainer = make_trainer(tmp_path / "run", FEW)
    with_fault(trainer, {4}, value)
    stops(trainer, "of step 4 is not finite", "raise max_skipped_steps")
    assert steps_in(tmp_path / "run" / "checkpoints") == [2, 3] and len(load_run(tmp_path / "run").metrics) == 3
    assert all(p.isfinite().all() for _, p in trainer.policy.trainable())
    # The same folder resumes with a higher limit; the update is left out and nothing else is.
    again = make_trainer(tmp_path / "run", FEW, max_skipped_steps=1)
    before = with_fault(again, {4}, value)
    again.run()
    assert all(map(torch.equal, before[0], before[1])), "step 4 moved the adapter"
    assert not all(torch.equal(a, p) for a, (_, p) in zip(before[1], again.policy.trainable(), strict=True))
    metrics = load_run(tmp_path / "run").metrics
    assert metrics["skipped"].tolist() == [0, 0, 0, 1, 0]
    assert metrics[["loss", "gradient_norm"]].isna().any(axis=1).tolist() == [False, False, False, True, False]
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    shot = snapshot(tmp_path / "run")
    assert "the updates of 1 steps were left out" in status_html(shot)
    assert 'data-column="skipped"' in numbers_html(shot) and 'data-column="equal_reward_share"' in numbers_html(shot)
    assert "were left out" in page(load_run(tmp_path / "run").forgiving())


@pytest.mark.slow
def test_the_number_of_skipped_steps_is_bounded_also_across_a_resume(tmp_path):
    trainer = make_trainer(tmp_path / "run", FEW, max_skipped_steps=1)
    with_fault(trainer, {2, 4}, math.nan)
    stops(trainer, "of step 4 is not finite")
    again = make_trainer(tmp_path / "run", FEW, max_skipped_steps=1)
    with_fault(again, {2, 4}, math.nan)
    stops(again, "of step 4 is not finite")


@pytest.mark.slow
def test_a_second_update_that_fails_goes_back_to_the_checkpoint(tmp_path):
    """The first has changed the weights, so they belong to no step."""
    trainer = make_trainer(tmp_path / "run", FEW, updates_per_step=2)
    with_fault(trainer, {4}, math.nan, update=2)
    stops(trainer, "of step 4 is not finite")
    assert trainer.policy is None and steps_in(tmp_path / "run" / "checkpoints") == [2]
    assert make_trainer(tmp_path / "run", FEW, updates_per_step=2).run().step == 5


def test_a_model_that_has_become_infinite_is_not_saved(tmp_path):
    trainer = make_trainer(tmp_path / "run", FEW)
    for record in trainer:
        if record.step == 3:
            for _, parameter in trainer.policy.trainable():
                parameter.data.fill_(math.inf)
            break
    assert trainer.saved_step == 3
    broken = [p.detach().clone() for _, p in trainer.policy.trainable()]
    assert all(p.isinf().all() for p in broken)
    stops(trainer, "the probabilities of the model 'tiny' are not finite after step 3", "resume from step 3")


def test_a_step_of_broken_weights_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path / "run", FEW)
    step = torch.optim.AdamW.step

    def breaking(optimizer, *arguments):
        step(optimizer, *arguments)
        if trainer.step == 2:  # the third step
            trainer.policy.trainable()[0][1].data.fill_(math.nan)

    monkeypatch.setattr(torch.optim.AdamW, "step", breaking)
    stops(trainer, "are not finite after step 3", "resume from step 2, the last checkpoint")
    assert steps_in(tmp_path / "run" / "checkpoints") == [2] and trainer.policy is None


# --- steps that are finite and yet unusual


def unfinished(batch, old):
    return dataclasses.replace(batch, finished=torch.zeros_like(batch.finished)), old


def one_token(batch, old):
    kept = {name: getattr(batch, name)[:, :1] for name in ("ids", "mask", "sampler_logprobs")}
    return dataclasses.replace(batch, **kept), None


def exploding(sign):
    def change(batch, old):
        return batch, dataclasses.replace(old, prior=torch.where(batch.mask, old.prior + sign * 90, 0.0))

    return change


FAULTS = {
    "all unfinished": unfinished,
    "one-token traces": one_token,
    "all rewards equal": lambda batch, old: (batch, old),
    "ratios of e^90": exploding(-1),
    "ratios of e^-90": exploding(1),
}


@pytest.fixture(scope="module")
def trainers(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            config = FEW | {"method": name, "max_trace_tokens": 20}
            made[name] = make_trainer(tmp_path_factory.mktemp(name) / "run", config).setup()
            move_adapter(made[name].policy)
        return made[name]

    return get


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", METHODS)
def test_loss_and_gradient_stay_finite(name, fault, trainers, monkeypatch):
    trainer = trainers(name)
    examples, prompts, batch = trainer.sample(0)
    old, _, _ = trainer.backward(prompts, batch)
    if fault == "all rewards equal":
        flat = dataclasses.replace(old, answer=torch.where(old.answer_mask, -1.0, 0.0))
        flat = dataclasses.replace(flat, bare_answer=None if old.bare_answer is None else flat.answer)
        if name == "grpo":
            batch = dataclasses.replace(batch, verifier_reward=torch.ones_like(batch.verifier_reward))
        batch, old = dataclasses.replace(batch, finished=torch.ones_like(batch.finished)), flat
    batch, old = FAULTS[fault](batch, old)
    old, credit, losses = trainer.backward(prompts, batch, old)
    assert all(math.isfinite(value) for value in losses.values()), losses
    gradients = [p.grad for _, p in trainer.policy.trainable()]
    assert all(g is None or g.isfinite().all() for g in gradients)
    for values in (credit.reward, credit.advantage, credit.answer_weight):
        assert values.isfinite().all()
    if fault == "all unfinished":
        assert not credit.answer_weight.any()
    if fault == "all rewards equal" and name in ("jlb", "verifree", "grpo"):
        assert not credit.advantage.any()


@pytest.mark.slow
def test_shares_of_unusual_traces_are_counted_and_alarmed(tmp_path, monkeypatch):
    """Every trace is one token long: nothing is reasoned, and every view still opens."""
    monkeypatch.setattr("covrl_lab.train.prompts.Prompter.ends", lambda *arguments: False)
    trainer = make_trainer(tmp_path / "run", FEW, max_trace_tokens=1, steps=3).run()
    metrics = load_run(tmp_path / "run").metrics
    assert metrics["one_token_share"].tolist() == [1, 1, 1]
    assert metrics["equal_reward_share"].tolist() == [1, 1, 1]
    assert adapter_change(trainer.policy) == 0
    found = load_run(tmp_path / "run").alarms
    assert {"one token", "unfinished"} <= set(found)
    assert page(load_run(tmp_path / "run").forgiving()) and TraceExplorer(tmp_path / "run").static()


def test_alarms_of_faults():
    fine = {"finished_share": 1.0, "gradient_norm": 2.0, "one_token_share": 0.4, "skipped": 0}
    assert alarms([fine] * 4, []) == {}
    assert list(alarms([fine | {"skipped": 1}] + [fine] * 40, [])) == ["not finite"]
    assert list(alarms([fine | {"one_token_share": 0.6}] * 3, [])) == ["one token"]
    assert alarms([fine | {"one_token_share": 0.6}] * 2 + [fine], []) == {}


def test_the_limit_of_skipped_steps_may_change_in_a_folder():
    one, other = RunConfig(max_skipped_steps=3), RunConfig()
    assert not one.differences(other) and one.run_id() == other.run_id()


@pytest.mark.slow
def test_a_run_whose_steps_were_all_left_out_resumes(tmp_path):
    """AdamW has no moments then, and its file is empty."""
    trainer = make_trainer(tmp_path / "run", FEW, max_skipped_steps=1)
    with_fault(trainer, {1, 2}, math.nan)
    stops(trainer, "of step 2 is not finite", "raise max_skipped_steps to resume")
    assert steps_in(tmp_path / "run" / "checkpoints") == [1]
    again = make_trainer(tmp_path / "run", FEW, max_skipped_steps=2)
    with_fault(again, {2}, math.nan)
    assert again.run().step == 5
    assert load_run(tmp_path / "run").metrics["skipped"].tolist() == [1, 1, 0, 0, 0]


@pytest.mark.slow
def test_an_evaluation_that_ends_a_step_left_out_leaves_no_checkpoint_without_its_line(tmp_path, monkeypatch):
    settings = FEW | {"eval_every": 3, "checkpoint_every": 5}
    trainer = make_trainer(tmp_path / "run", settings, max_skipped_steps=1)
    with_fault(trainer, {3}, math.nan)
    evaluate = trainer.evaluate

    def interrupted():
        if trainer.step == 3:
            raise KeyboardInterrupt
        return evaluate()

    monkeypatch.setattr(trainer, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert len(load_run(tmp_path / "run").metrics) == 2 and steps_in(tmp_path / "run" / "checkpoints") in ([], [2])
    again = make_trainer(tmp_path / "run", settings, max_skipped_steps=1)
    with_fault(again, {3}, math.nan)
    assert again.run().step == 5 and load_run(tmp_path / "run").metrics["skipped"].tolist() == [0, 0, 1, 0, 0]
