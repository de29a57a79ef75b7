"""The training loop: what a run folder holds, and that no cut of a step changes a number."""

import dataclasses
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import CLOCK, TINY_RUN, TRAINED, adapter_change, lines, make_trainer, move_adapter, unpacked

from covrl_lab.config import RunConfig
from covrl_lab.runs import folder
from covrl_lab.runs.folder import TRACE_COLUMNS, load_run, step_file, steps_in
from covrl_lab.train import step as step_module
from covrl_lab.train import trainer
from covrl_lab.train.models import load_policy
from covrl_lab.train.policy import load_adapter
from covrl_lab.train.prompts import Prompter
from covrl_lab.train.records import StepRecord, unlikely_share
from covrl_lab.train.scoring import micro_batches, packed_tokens, trace_logprobs
from covrl_lab.train.step import set_learning_rate
from covrl_lab.train.tasks import is_held_out, load_task
from covrl_lab.train.trainer import Trainer, bar_values
from covrl_lab.types import ConfigError, TraceBatch


def test_free_text_has_a_bound_beside_the_accuracy(tmp_path):
    """Without named sets, too: what no scorer can judge has log p(y|x), at least."""
    rows = [{"question": f"Why does thing {i} fall?", "answer": f"because {i} is heavy"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = {"task": str(tmp_path / "rows.jsonl"), "difficulty": None, "demonstrations": 0, "max_answer_tokens": 40}
    run = make_trainer(tmp_path / "run", TINY_RUN, **settings, steps=1, eval_questions=3, eval_samples=2).run()
    first, last = lines(tmp_path / "run" / "evaluations.jsonl")
    assert first["k"] == 2 and first["bound_1"] <= first["bound_k"] < 0 and first["accuracy"] == 0
    sampled = load_run(run.run_dir).predictions(0).query("sample >= 0")
    assert first["bound_1"] == pytest.approx(sampled["answer_logp"].mean())
    shown = bar_values(StepRecord(**run.records[-1]), [first, last])
    assert shown["answer"] == f"{last['bound_k']:.2f}"
    del last["bound_k"]
    assert bar_values(StepRecord(**run.records[-1]), [last])["answer"] == f"{last['answer_logprob']:.2f}"


def test_the_run_folder_is_complete(reference):
    run = reference.run_dir
    assert sorted(p.name for p in run.iterdir()) == [
        "checkpoints",
        "config.json",
        "evaluations",
        "evaluations.jsonl",
        "metrics.jsonl",
        "owner.lock",
        "policy.json",
        "traces",
    ]
    assert load_run(run).abilities == "scores: packed trees; decodes: plain steps; weights: not quantised; " + (
        "products: float32; attention: blocks of the tree"
    )
    assert RunConfig.load(run / "config.json") == reference.config
    assert steps_in(run / "traces") == list(range(1, 9))
    assert steps_in(run / "checkpoints") == [6, 8]  # the last two, the last step always
    assert sorted(p.name for p in (run / "checkpoints" / "step_00008").iterdir()) >= [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    unsafe = {p.suffix for p in run.rglob("*") if p.is_file() and p.name != "owner.lock"} - {
        ".json",
        ".jsonl",
        ".parquet",
        ".safetensors",
    }
    assert not unsafe and (run / "owner.lock").read_bytes() == b""


def test_a_long_run_keeps_what_views_list(tmp_path, monkeypatch):
    for module in (folder, trainer):
        monkeypatch.setattr(module, "CACHE_FROM", 2)
    run = load_run(make_trainer(tmp_path / "run", TINY_RUN, steps=2, eval_every=0).run().run_dir)
    expected = run.traces()
    for step in run.steps:  # what is kept is enough, as long as the files are those that were read
        file = step_file(run.path / "traces", step)
        times = file.stat().st_atime_ns, file.stat().st_mtime_ns
        file.write_bytes(b"")
        os.utime(file, ns=times)
    assert list(run.trace_columns()["trace"]) == list(expected["trace"])


def test_metrics_are_the_step_records(reference):
    metrics = lines(reference.run_dir / "metrics.jsonl")
    fields = [f.name for f in dataclasses.fields(StepRecord)]
    assert [m["step"] for m in metrics] == list(range(1, 9))
    assert all(list(m) == fields for m in metrics)
    assert metrics == reference.records
    optional = {f.name for f in dataclasses.fields(StepRecord) if "None" in str(f.type)}
    for m in metrics:
        assert all(math.isfinite(v) for k, v in m.items() if v is not None)
        assert all(m[k] is not None for k in fields if k not in optional)
        assert 0 < m["packed_tokens"] < m["padded_tokens"]
        assert m["seconds"] >= m["seconds_update"] > 0
    assert [m["step"] for m in metrics if m["accuracy"] is not None] == [4, 8]


def test_evaluations_before_during_and_after(reference):
    summaries = lines(reference.run_dir / "evaluations.jsonl")
    assert [s["step"] for s in summaries] == [0, 4, 8]
    assert steps_in(reference.run_dir / "evaluations") == [0, 4, 8]
    run = load_run(reference.run_dir)
    held_out = {e.id for e in reference.task.held_out(3)}
    for s in summaries:
        rows = run.predictions(s["step"])
        assert list(rows["sample"]) == [-1] * 3 + [0] * 3  # greedy, then one sample
        assert set(rows["example_id"]) == held_out and s["eval_questions"] == 3 and s["k"] == 1
        assert s["accuracy"] == rows["score"][:3].mean()
        assert 0 <= s["accuracy_low"] <= s["accuracy"] <= s["accuracy_high"] <= 1
        assert not rows[~rows["finished"]]["score"].any()
    trained = set(run.traces()["example_id"])
    assert not trained & held_out


def test_traces_have_a_row_a_rollout_and_lists_a_token(reference):
    traces = load_run(reference.run_dir).traces()
    assert list(traces.columns) == list(TRACE_COLUMNS)
    assert traces.groupby("step").size().tolist() == [12] * 8
    assert traces["rollout"].tolist() == list(range(12)) * 8
    # alpha = 1/2 of six, stratified: three traces of each source in every group, the prior's first.
    assert traces["source"].tolist() == (["prior"] * 3 + ["posterior"] * 3) * 16
    tokenizer = reference.policy.tokenizer
    for row in traces.itertuples():
        size = len(row.token_ids)
        assert 1 <= size <= 20
        assert {len(x) for x in (row.tokens, row.logp, row.logq, row.log_ratio)} == {size}
        assert tokenizer.decode(row.token_ids).split("\n")[0].strip() == row.trace
        assert len(row.answer_logp) == len(tokenizer(f" {row.answer}\n")["input_ids"])
        assert "".join(row.answer_tokens) == f" {row.answer}\n"
        assert max(row.logp.max(), row.logq.max(), row.answer_logp.max()) <= 0
        assert row.finished == ("\n" in tokenizer.decode(row.token_ids) and bool(row.trace))
        # The log-ratio of p' = (p + q)/2 to h = (p + q)/2.
        assert not row.log_ratio.any()
    assert 0.02 < traces["finished"].mean() < 0.9, "the tests of credit below need both kinds"


def recomputed(traces: pd.DataFrame, group: int, penalty: float) -> tuple[np.ndarray, np.ndarray]:
    """CoVRL's rewards and advantages from what is stored of each rollout, the formulas written out again."""
    total = traces["answer_logp"].map(np.sum).to_numpy().reshape(-1, group)
    done = traces["finished"].to_numpy().reshape(-1, group)
    reward = total.copy()
    for g in range(len(total)):
        worst = total[g][done[g]].min() if done[g].any() else total[g].min()
        reward[g][~done[g]] = worst - penalty
    deviation = np.sqrt(((reward - reward.mean(1, keepdims=True)) ** 2).mean(1, keepdims=True))
    return reward.ravel(), ((reward - reward.mean(1, keepdims=True)) / (deviation + 1e-4)).ravel()


def test_a_run_without_a_step_has_the_same_columns_and_no_trace(reference, tmp_path):
    make_trainer(tmp_path, steps=0).config.save(tmp_path / "config.json")
    traces = load_run(tmp_path).traces()
    assert traces.empty and list(traces.columns) == list(load_run(reference.run_dir).traces().columns)


def test_rewards_and_advantages_follow_from_what_is_stored(reference):
    traces = load_run(reference.run_dir).traces()
    reward, advantage = recomputed(traces, 6, penalty=1.0)
    np.testing.assert_allclose(traces["reward"], reward, rtol=1e-5)
    np.testing.assert_allclose(traces["advantage"], advantage, atol=1e-4)
    mixed = traces.groupby(np.arange(len(traces)) // 6)["finished"].transform("nunique") == 2
    assert mixed.any() and (traces["advantage"][mixed & ~traces["finished"]] < 0).all()
    gated = traces["finished"] & (traces["source"] == "prior") & (traces["advantage"] > 0)
    assert (traces["answer_weight"] == gated).all()


def test_metrics_summarise_the_stored_traces(reference):
    run = load_run(reference.run_dir)
    for step, metrics in zip(run.steps, run.metrics.to_dict("records"), strict=True):
        traces = run.traces(step)
        prior = traces["source"] == "prior"
        answer = traces["answer_logp"].map(np.sum)
        expected = {
            "reward": traces["reward"].mean(),
            "reward_prior": traces["reward"][prior].mean(),
            "reward_posterior": traces["reward"][~prior].mean(),
            "answer_logprob_prior": answer[prior].mean(),
            "answer_logprob_posterior": answer[~prior].mean(),
            "finished_share": traces["finished"].mean(),
            "trace_tokens": traces["token_ids"].map(len).mean(),
            "answer_term_share": (traces["answer_weight"] != 0).mean(),
            "answer_term_unlikely": 1.0,  # no trace of a random model makes its answer likely
            "effective_sample_share": 1.0,  # p' = h
        }
        for name, value in expected.items():
            assert metrics[name] == pytest.approx(value, rel=1e-5), (step, name)


def test_the_share_of_the_answer_term_on_unlikely_answers_by_hand():
    weight, answer = torch.tensor([1.0, 3.0, 0.0, 1.0]), torch.tensor([0.9, 0.4, 0.1, 0.6]).log()
    assert unlikely_share(weight, answer) == pytest.approx(0.6)
    assert unlikely_share(0 * weight, answer) is None


def test_the_sampler_is_measured_against_the_trainer(tmp_path, monkeypatch):
    """Mean over tokens of |log-probability when drawn - when scored|, by the stored rows; and an error is seen."""
    drawn, sample = {}, Trainer.sample

    def sampled(self, step, draw=0):
        examples, prompts, batch = sample(self, step, draw)
        wrong = batch.mask & ~batch.from_prior[:, None] & (step == 1)  # posterior traces of the second step
        found = batch.sampler_logprobs + 0.5 * wrong
        drawn[step + 1] = [row[keep].numpy() for row, keep in zip(found, batch.mask, strict=True)]
        return examples, prompts, dataclasses.replace(batch, sampler_logprobs=found)

    monkeypatch.setattr(Trainer, "sample", sampled)
    run = load_run(make_trainer(tmp_path / "run", steps=2, eval_every=0).run().run_dir)
    for step, found in run.metrics.set_index("step")["sampler_mismatch"].items():
        scored = [row.logp if row.source == "prior" else row.logq for row in run.traces(step).itertuples()]
        gaps = np.concatenate([np.abs(a - b) for a, b in zip(drawn[step], scored, strict=True)])
        assert found == pytest.approx(gaps.mean(), rel=1e-3, abs=1e-7)
        assert (0.1 < found < 0.5) if step == 2 else (0 < found < 1e-5)
    # A method that does not score traces after the posterior prompt: those of the prior.
    lone = make_trainer(tmp_path / "jlb", method="jlb", alpha=0.5, steps=1, eval_every=0).run()
    assert 0 < lone.records[0]["sampler_mismatch"] < 1e-5


@pytest.mark.parametrize("step", [1, 7])
def test_stored_traces_equal_a_fresh_scoring_of_their_ids(reference, step):
    """In plain padded rows, by the base model (step 1) or the checkpoint before the step."""
    policy = load_policy("tiny", quantization="none", dtype="float32", lora_rank=4, seed=3, device="cpu")
    if step > 1:
        load_adapter(policy, step_file(reference.run_dir / "checkpoints", step - 1, ""))
    traces = load_run(reference.run_dir).traces(step)
    examples = reference.task.train(2 * (step - 1), 2, 3)
    assert [e.id for e in examples for _ in range(6)] == traces["example_id"].tolist()
    ids = [torch.tensor(list(i)) for i in traces["token_ids"]]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    batch = TraceBatch(
        ids=padded,
        mask=torch.arange(padded.shape[1]) < torch.tensor([len(i) for i in ids])[:, None],
        from_prior=torch.tensor((traces["source"] == "prior").tolist()),
        finished=torch.tensor(traces["finished"].tolist()),
        group_size=6,
    )
    with torch.no_grad():
        fresh = trace_logprobs(unpacked(policy), [reference.prompter(e) for e in examples], batch)
    for i, row in enumerate(traces.itertuples()):
        size = len(row.token_ids)
        # float32 rounding of sums over the tiny model's width, in another order
        np.testing.assert_allclose(row.logp, fresh.prior[i, :size], atol=2e-4)
        np.testing.assert_allclose(row.logq, fresh.posterior[i, :size], atol=2e-4)
        np.testing.assert_allclose(row.answer_logp, fresh.answer[i][fresh.answer_mask[i]], atol=2e-4)


def test_the_adapter_moves_with_training_only(reference, tmp_path):
    fresh = make_trainer(tmp_path / "run").setup()
    assert adapter_change(fresh.policy) == 0
    assert adapter_change(reference.policy) > 0


def gradients(tmp_path, **settings) -> tuple[Trainer, StepRecord, dict[str, torch.Tensor]]:
    """The first step's record and gradient from an adapter that is not zero, so that both factors get one."""
    trainer = make_trainer(tmp_path, TRAINED | {"steps": 1, "max_grad_norm": 1e9, "eval_every": 0} | settings).setup()
    move_adapter(trainer.policy, seed=1, scale=0.1)
    (record,) = trainer
    return trainer, record, {name: p.grad.clone() for name, p in trainer.policy.trainable()}


def same_step(record, gradient, other, other_gradient):
    """The same sums in another order: float32 has 1e-7, sums of some hundred terms lose a little more."""
    largest = max(float(g.abs().max()) for g in gradient.values())
    for name, value in gradient.items():
        torch.testing.assert_close(other_gradient[name], value, rtol=1e-3, atol=2e-5 * largest)
    for name, value in dataclasses.asdict(record).items():
        if name not in CLOCK:
            expected = None if value is None else pytest.approx(value, rel=1e-4, abs=1e-6)
            assert getattr(other, name) == expected, name


def test_micro_batches_change_nothing(tmp_path, monkeypatch):
    counted = []

    def counting(*args):
        parts = micro_batches(*args)
        counted.append([p.index.tolist() for p in parts])
        return parts

    monkeypatch.setattr(step_module, "micro_batches", counting)
    whole, record, gradient = gradients(tmp_path / "whole")
    assert counted == [[list(range(12))]]
    assert record.gradient_norm > 0 and record.answer_term_share > 0, "a seed where all terms act"
    traces = load_run(whole.run_dir).traces()
    for tokens in (record.packed_tokens - 1, 280, 1):
        trainer, cut, cut_gradient = gradients(tmp_path / str(tokens), max_packed_tokens=tokens)
        assert sum(counted[-1], []) == list(range(12))  # every rollout once, in order
        same_step(record, gradient, cut, cut_gradient)
        stored = load_run(trainer.run_dir).traces()
        assert stored["trace"].tolist() == traces["trace"].tolist()
        for name in ("token_ids", "logp", "logq", "answer_logp"):
            np.testing.assert_allclose(np.hstack(stored[name]), np.hstack(traces[name]), atol=2e-4)
    # By question, then within the group; a single rollout is never cut.
    assert [len(c) for c in counted] == [1, 2, 3, 12]


@pytest.mark.parametrize("method", ["covrl", "covrl, alpha moves", "latro", "rlpr"])
def test_whole_groups_are_scored_once(tmp_path, monkeypatch, method):
    """Cut between questions: one pass, with gradients, where credit is a matter of the group; the same numbers."""
    passes, nodes, score = [], [], step_module.trace_logprobs
    spy = lambda *args, **settings: passes.append(torch.is_grad_enabled()) or score(*args, **settings)  # noqa: E731
    monkeypatch.setattr(step_module, "trace_logprobs", spy)
    split = lambda *args: nodes.append(packed_tokens(*args[:3])[0]) or micro_batches(*args)  # noqa: E731
    monkeypatch.setattr(step_module, "micro_batches", split)
    settings = {"method": method.split(",")[0]} | ({"alpha_rate": 0.5} if "moves" in method else {})
    whole, record, gradient = gradients(tmp_path / "whole", **settings)
    assert passes == [True]
    cut, measured, cut_gradient = gradients(tmp_path / "cut", **settings, max_packed_tokens=nodes[0] - 1)
    assert passes[1:] == ([True] * 2 if method != "rlpr" else [False] * 2 + [True] * 2)
    same_step(record, gradient, measured, cut_gradient)
    assert cut.method_state == pytest.approx(whole.method_state)


def test_an_untrained_posterior_is_scored_without_gradient(tmp_path, monkeypatch):
    """Apart from the tree, and not again once the old policy's scores are known: the same numbers."""
    settings, asked = {"method": "covrl", "posterior_weight": 0.0}, []
    with monkeypatch.context() as one_tree:
        one_tree.setattr(RunConfig, "trains_posterior", True)
        _, record, gradient = gradients(tmp_path / "tree", **settings)
    score = step_module.trace_logprobs
    spy = lambda *args, **given: asked.append(given["posterior"]) or score(*args, **given)  # noqa: E731
    monkeypatch.setattr(step_module, "trace_logprobs", spy)
    same_step(record, gradient, *gradients(tmp_path / "apart", **settings)[1:])
    same_step(record, gradient, *gradients(tmp_path / "cut", **settings, max_packed_tokens=1)[1:])
    assert asked == [True] + [True] * 12 + [False] * 12
    # Its nodes do not count for the tree that is trained, so that this one stays whole.
    limit = record.packed_tokens - 1
    same_step(record, gradient, *gradients(tmp_path / "few", **settings, max_packed_tokens=limit)[1:])
    assert asked[25:] == [True]


def test_traces_are_weighed_by_the_alpha_that_drew_them(tmp_path):
    """log p/h with the alpha of that step, not the one that the run set out with."""
    trainer = make_trainer(tmp_path, TRAINED | {"steps": 1, "eval_every": 0, "method": "covrl", "alpha_rate": 1.0})
    trainer.setup().method_state = {"alpha": (alpha := 0.8)}
    frame = load_run(trainer.run().run_dir).traces(1)
    assert (frame["source"] == "prior").mean() > 0.6
    for row in frame.itertuples():
        h = np.log(alpha * np.exp(row.logp) + (1 - alpha) * np.exp(row.logq))
        np.testing.assert_allclose(row.log_ratio, row.logp - h, atol=1e-5)  # float32


def test_a_second_update_sees_the_traces_with_another_policy(tmp_path):
    """With w = alpha the ratio p'_new / h_old is 1 until the first update has moved the weights."""
    narrow = {"clip_range": 1e-5, "clip_range_high": 1e-5, "learning_rate": 1e-3}
    one, first, _ = gradients(tmp_path / "one", updates_per_step=1, **narrow)
    two, second, _ = gradients(tmp_path / "two", updates_per_step=2, **narrow)
    assert first.clipped_share == 0
    assert second.clipped_share > 0
    assert second.reward == first.reward  # the credit is that of the sampling policy
    pairs = zip(one.policy.trainable(), two.policy.trainable(), strict=True)
    assert any(not torch.equal(a, b) for (_, a), (_, b) in pairs)


def test_the_gradient_is_clipped_to_its_norm(tmp_path):
    _, free, gradient = gradients(tmp_path / "free")
    _, held, clipped = gradients(tmp_path / "held", max_grad_norm=0.01)
    total = torch.sqrt(sum((g**2).sum() for g in gradient.values()))
    assert free.gradient_norm == pytest.approx(float(total), rel=1e-5)
    assert held.gradient_norm == free.gradient_norm > 0.01  # what is recorded is the norm before
    for name, value in gradient.items():
        torch.testing.assert_close(clipped[name], value * (0.01 / (total + 1e-6)), rtol=1e-4, atol=1e-9)


def test_the_learning_rate_follows_the_schedule(reference):
    # Two steps of warm-up, then (1 + cos(pi k / 6)) / 2 for k = 0..5.
    table = [0.5, 1.0, 1.0, 0.9330127, 0.75, 0.5, 0.25, 0.0669873]
    np.testing.assert_allclose([r["learning_rate"] for r in reference.records], 5e-3 * np.array(table))


@pytest.mark.parametrize(
    ("settings", "table"),
    [
        ({"lr_schedule": "constant", "warmup_steps": 4, "steps": 6}, [0.25, 0.5, 0.75, 1, 1, 1]),
        ({"lr_schedule": "constant", "warmup_steps": 0, "steps": 2}, [1, 1]),
        ({"lr_schedule": "cosine", "warmup_steps": 0, "steps": 4}, [1, 0.8535534, 0.5, 0.1464466]),
        ({"lr_schedule": "cosine", "warmup_steps": 4, "steps": 2}, [0.5, 1.0]),  # it still gets there
    ],
)
def test_learning_rate_tables(settings, table):
    config, rates = RunConfig(learning_rate=2.0, **settings), []
    for step in range(config.steps):
        optimizer = SimpleNamespace(param_groups=[{}, {}])
        set_learning_rate(optimizer, config, step)
        assert optimizer.param_groups[0] == optimizer.param_groups[1]
        rates.append(optimizer.param_groups[0]["lr"])
    np.testing.assert_allclose(rates, 2.0 * np.array(table), rtol=1e-6)


def test_a_policy_that_never_finishes_learns_nothing(tmp_path, monkeypatch):
    """Without a finished trace there is no advantage, no answer term and no KL, so no update at all."""
    monkeypatch.setattr(Prompter, "ends", lambda *args: False)
    trainer = make_trainer(tmp_path / "run", max_trace_tokens=3, steps=2, eval_every=0, nll_gate="none")
    for record in trainer:
        assert record.finished_share == 0 and record.answer_term_share == 0
        assert (record.gradient_norm, record.kl, record.policy_loss, record.nll) == (0, 0, 0, None)
    traces = load_run(trainer.run_dir).traces()
    assert not traces["advantage"].any() and not traces["answer_weight"].any()
    assert adapter_change(trainer.policy) == 0


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_an_alarm_is_said_once_and_before_the_first_step(tmp_path, monkeypatch, capsys):
    """With nobody's logging set up, as on the command line."""
    monkeypatch.setattr(trainer.LOG, "propagate", False)
    settings = TRAINED | {"steps": 4, "max_trace_tokens": 1, "run_dir": str(tmp_path / "run")}
    steps = iter(Trainer(RunConfig(**settings)))
    next(steps)
    began = capsys.readouterr().err
    assert began.count("of the traces end within the limit") == began.count("step 0: only") == 1
    list(steps)
    assert "of the traces end within the limit" not in capsys.readouterr().err
    assert list(load_run(tmp_path / "run").alarms) == ["unfinished", "one token"]


def test_a_file_evaluated_beside_the_task_has_its_columns(tmp_path):
    """So have data sets; other tasks have none."""
    rows = [{"problem": f"Say {i}?", "solution": i} for i in range(80)]
    ours, theirs = (
        write_rows(tmp_path / name, part) for name, part in (("a.jsonl", rows[:70]), ("b.jsonl", rows[70:]))
    )
    settings = {"question_column": "problem", "answer_column": "solution", "eval_task": f"{theirs}, arithmetic"}
    trainer = make_trainer(tmp_path / "run", TINY_RUN, task=ours, steps=1, **settings).setup()
    found = [{(e.question, e.answer) for e in one.examples} for one in trainer.eval_sets]
    assert found[0] <= {(row["problem"], str(row["solution"])) for row in rows[70:]}
    assert [len(questions) for questions in found] == [4, 4]
    usual = write_rows(tmp_path / "c.jsonl", [{"question": f"Name {i}?", "answer": i} for i in range(9)])
    more = settings | {"eval_task": usual}
    found = make_trainer(tmp_path / "usual", TINY_RUN, task=ours, steps=1, **more).setup().eval_sets[0]
    assert {e.question[:5] for e in found.examples} == {"Name "}
    neither = write_rows(tmp_path / "d.jsonl", [{"problem": "q", "answer": "1"}])
    with pytest.raises(ConfigError, match="d.jsonl' has columns .* but not 'question'"):
        make_trainer(tmp_path / "run", TINY_RUN, task=ours, **settings | {"eval_task": neither})


def test_training_makes_the_reference_answer_likelier(tmp_path):
    """Every question has the same answer, so the answer term alone must raise its likelihood quickly."""
    questions = [f"What is the word number {i}?" for i in range(40)]
    train = [q for q in questions if not is_held_out(q)][:4]
    held_out = [q for q in questions if is_held_out(q)][:1]
    task = write_rows(tmp_path / "word.jsonl", [{"question": q, "answer": "7"} for q in train + held_out])
    settings = {"task": task, "difficulty": None, "method": "jlb", "prompt_style": "few_shot"}
    settings |= {
        "nll_gate": "none",
        "nll_weight": 1.0,
        "learning_rate": 2e-2,
        "lr_schedule": "constant",
        "steps": 15,
    }
    trainer = make_trainer(tmp_path / "run", **settings, eval_every=0, eval_questions=1, checkpoint_every=100)
    values = [record.answer_logprob_prior for record in trainer]
    # Two tokens at random are 2 log(1/300) = -11 nats or worse. A run that learns ends near 0; one whose
    # gradient is lost or has the wrong sign stays or falls.
    assert np.mean(values[-3:]) > np.mean(values[:3]) + 5, values
    assert all(record["reward_posterior"] is None for record in trainer.records)  # alpha = 1: no posterior


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": "tyny"}, "unknown model 'tyny'.*'tiny'"),
        ({"task": "arithmetics"}, "unknown task 'arithmetics'.*'arithmetic'"),
        ({"task": "reasoning_gym/leg_count"}, "unknown reasoning-gym task 'leg_count'.*'leg_counting'"),
        ({"task": "nowhere.jsonl"}, "'nowhere.jsonl' does not exist"),
    ],
)
def test_unknown_names_are_refused(tmp_path, no_model, settings, words):
    with pytest.raises(ConfigError, match=words):
        make_trainer(tmp_path / "run", **{"difficulty": None} | settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "is empty; it needs one row per question"),
        ([{"question": "What?", "solution": "7"}], "columns .* but not 'answer'"),
        (
            [{"question": "What?", "answer": "7"}, {"question": "Who?", "answer": " "}],
            "row 2 .* empty 'answer'",
        ),
        ([{"question": "", "answer": "7"}], "row 1 .* empty 'question'"),
        (
            [{"question": "What is " + "x" * 9000 + f"{i}?", "answer": "7"} for i in range(20)],
            "context of 8192",
        ),
    ],
    ids=["no row", "no column", "no answer", "no question", "too long"],
)
def test_unusable_questions_are_refused(tmp_path, no_model, rows, words):
    task = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ConfigError, match=words) as caught:
        make_trainer(tmp_path / "run", task=task, difficulty=None, eval_questions=1).setup()
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("answer", "words"),
    [("7\n8", "ends an answer"), ("7" * 9000, "context of 8192")],  # a few-shot answer is one line
    ids=["lines", "length"],
)
def test_every_row_is_checked_before_the_model_loads(tmp_path, no_model, answer, words):
    """Not only those of the first steps: the row of the fifth question."""
    questions = [q for q in (f"Which number is {i}?" for i in range(60)) if not is_held_out(q)][:6]
    held_out = next(q for q in (f"Which number is {i}?" for i in range(60)) if is_held_out(q))
    rows = [{"question": q, "answer": "7"} for q in [*questions, held_out]]
    settings = {"difficulty": None, "questions_per_step": 1, "eval_questions": 1, "eval_every": 0, "steps": 6}
    task = write_rows(tmp_path / "rows.jsonl", rows)
    fifth = load_task(task).train(4, 1, TRAINED["seed"])[0]
    rows[questions.index(fifth.question)]["answer"] = answer
    write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ConfigError, match=words):
        make_trainer(tmp_path / "run", task=task, prompt_style="few_shot", **settings).setup()


@pytest.mark.parametrize(("method", "held_out"), [("covrl", True), ("grpo", False)])
def test_a_limit_that_cuts_reference_answers_is_refused(tmp_path, no_model, method, held_out):
    """Held-out answers are decoded up to max_answer_tokens; a verifier decodes training answers, too."""
    question = next(q for i in range(99) if is_held_out(q := f"What is {i}?") == held_out)
    rows = [{"question": f"Say {i}?", "answer": "7"} for i in range(60)]
    task = write_rows(tmp_path / "rows.jsonl", [*rows, {"question": question, "answer": "123456789"}])
    count = sum(is_held_out(row["question"]) for row in rows) + held_out
    shown = {"task": task, "difficulty": None, "prompt_style": "few_shot", "eval_questions": count}
    with pytest.raises(ConfigError, match=r"max_answer_tokens=4 would .* set max_answer_tokens to 11 or more"):
        make_trainer(tmp_path / "run", method=method, **shown).setup()


def test_tensorboard_gets_every_step(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (pip install covrl-lab[trackers])")
    make_trainer(tmp_path / "run", steps=2, eval_every=0, tracker="tensorboard").run()
    events = list((tmp_path / "run").rglob("events.out.tfevents.*"))
    assert events and all(p.stat().st_size > 0 for p in events)


def test_judging_traces_marks_them_and_changes_nothing_else(reference, tmp_path):
    """A shade of the answer's text as score, so that some are right: what is stored is the score of what is stored."""
    trainer = make_trainer(tmp_path / "judged", TRAINED | {"judge_traces": True}).setup()
    trainer.task = dataclasses.replace(trainer.task, score=lambda answer, example: float(len(answer) % 2))
    trainer.run()
    assert reference.config.differences(trainer.config) == {}  # a run begun without may resume with it
    plain, judged = (lines(run / "metrics.jsonl") for run in (reference.run_dir, trainer.run_dir))
    timed = {"seconds", "seconds_sampling", "seconds_update", "peak_memory_gib", "accuracy", "right_prior"}
    for before, after in zip(plain, judged, strict=True):
        differing = {name for name in before if before[name] != after[name]}
        assert differing <= timed | {"right_posterior"} and before["right_prior"] is None
        traces = load_run(trainer.run_dir).traces(after["step"])
        assert (traces["right"] == (traces["prediction"].str.len() % 2 == 1)).all()
        for source, own in traces.groupby("source"):
            assert after[f"right_{source}"] == pytest.approx(own["right"].mean(), abs=1e-6)  # float32
    assert 0 < np.mean([step["right_prior"] for step in judged]) < 1
