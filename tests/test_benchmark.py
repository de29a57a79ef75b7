"""What the benchmark counts and computes, and that scoring's memory does not grow with the vocabulary."""

import importlib.util
import json
from contextlib import contextmanager

import pytest
import torch

from covrl_lab import ConfigError
from covrl_lab.train.models import load_policy
from tests.bench import benchmark, speed
from tests.bench.benchmark import (
    Clock,
    Results,
    peak_bytes,
    random_model,
    scoring_run,
    serving,
)

SMALL = {"task": "arithmetic", "questions_per_step": 2, "rollouts_per_question": 3, "max_trace_tokens": 5}
SMALL |= {"demonstrations": 1}


# --- memory of scoring


@pytest.fixture(scope="module")
def policy_of(tmp_path_factory):
    """Policies that differ in their vocabulary only."""

    def make(vocabulary):
        folder = str(tmp_path_factory.mktemp("model"))
        random_model(folder, "tiny", vocab_size=vocabulary)
        return load_policy(folder, quantization="none", lora_rank=4, device="cpu")

    return make


def test_peak_bytes_sees_what_a_function_holds_and_frees():
    def run():
        for _ in range(3):
            a = torch.empty(2**20, dtype=torch.uint8)
            b = torch.empty(2**19, dtype=torch.uint8)
            del a, b

    assert peak_bytes(run) == 2**20 + 2**19


def test_scoring_memory_hardly_depends_on_the_vocabulary(policy_of):
    small, large = (peak_bytes(scoring_run(policy_of(vocabulary), rollouts=32)[1]) for vocabulary in (8_192, 152_064))
    assert large < 1.1 * small


def test_scoring_memory_is_linear_in_packed_tokens(policy_of):
    policy = policy_of(8_192)
    points = []
    for rollouts in (32, 64, 128):
        tokens, run = scoring_run(policy, rollouts)
        points.append((tokens, peak_bytes(run)))
    (n0, b0), (n1, b1), (n2, b2) = points
    assert n1 > 1.9 * n0 and n2 > 1.9 * n1
    assert (b2 - b1) / (n2 - n1) == pytest.approx((b1 - b0) / (n1 - n0), rel=0.1)


# --- one trainer in a process of its own


@pytest.mark.parametrize("variant", ["covrl", "prior only"])
def test_a_trainer_serves_steps_of_equal_length(variant):
    with serving(variant, SMALL | {"model": "tiny"}, threads=1, steps=2) as step:
        first, second = step(), step()
    for taken in (first, second):
        assert taken["rows"] == 6 and taken["generated"] == 6 * 5  # a tiny model's traces end earlier by themselves
        parts = taken["sampling"] + taken["scoring"] + taken["update"]
        assert parts == pytest.approx(taken["seconds"]) and min(taken["sampling"], taken["scoring"]) > 0
        assert taken["prompt_tokens"] < taken["prompt_tokens_as_rows"]
        assert taken["update_tokens"] < taken["update_tokens_as_rows"]
        assert taken["peak_gib"] >= taken["loaded_gib"] > 0
    # The answers are those of the step's own questions.
    assert first["scored"] > (2 if variant == "covrl" else 1) * first["generated"]


def test_a_trainer_that_fails_is_an_error_of_one_sentence(capfd):
    with serving("covrl", SMALL | {"model": "tiny", "lora_rank": -1}, threads=1, steps=1) as step:
        with pytest.raises(ConfigError, match="'covrl' ended"):
            step()
    assert "lora_rank" in capfd.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
def test_trl_serves_the_same_work(tmp_path):
    random_model(str(tmp_path), "tiny")
    settings = SMALL | {"model": str(tmp_path), "rollouts_per_question": 2}
    with serving("trl", settings, threads=1, steps=1) as step:
        theirs = step()
    with serving("prior only", settings, threads=1, steps=1) as step:
        ours = step()
    for name in ("rows", "generated", "prompt_tokens_as_rows"):
        assert theirs[name] == ours[name], name
    assert theirs["update_tokens_needed"] < theirs["update_tokens_as_rows"] <= theirs["update_tokens"]
    assert theirs["sampling"] + theirs["scoring"] + theirs["update"] == pytest.approx(theirs["seconds"])


def test_a_clock_adds_up_calls_and_leaves_the_rest(monkeypatch):
    class Thing:
        def a(self, x):
            now[0] += 2
            return x

        def b(self):
            now[0] += 5
            raise KeyError

    now = [0.0]
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(benchmark.time, "process_time", lambda: 2 * now[0])
    thing = Thing()
    clock = Clock(thing, sampling="a", scoring="b")
    assert thing.a("kept") == "kept" and thing.a(x=1) == 1
    with pytest.raises(KeyError):
        thing.b()
    parts = {"seconds": 20.0, "sampling": 4.0, "scoring": 5.0, "update": 11.0, "cpu_seconds": 18.0}
    assert clock.read(20.0) == parts
    assert clock.read(1.0)["update"] == 1.0


# --- storing and reading


def test_results_are_kept_until_settings_change(tmp_path):
    calls = []

    def make():
        calls.append(1)
        return {"n": len(calls)}

    settings = {"threads": 1, "config": {"steps": 3}}
    assert Results(tmp_path, "part", settings).get("a", make) == {"n": 1}
    assert Results(tmp_path, "part", settings).get("a", make) == {"n": 1}
    assert Results(tmp_path, "part", settings).get("b", make) == {"n": 2}
    assert set(json.loads((tmp_path / "part.json").read_text())["results"]) == {"a", "b"}
    assert Results(tmp_path, "part", settings, again=True).get("a", make) == {"n": 3}
    assert Results(tmp_path, "part", settings | {"config": {"steps": 4}}).get("a", make) == {"n": 4}


def test_a_stored_part_names_no_machine(tmp_path):
    Results(tmp_path, "part", {"threads": 1}).get("a", dict)
    stored = json.loads((tmp_path / "part.json").read_text())
    assert set(stored["machine"]) >= {"cpu", "cores", "threads", "gpu", "torch"}
    assert str(tmp_path) not in json.dumps(stored)


def test_ratios_are_taken_within_a_repetition():
    part = {
        "results": {
            str(r): {"covrl": {"seconds": a}, "prior only": {"seconds": b}}
            for r, (a, b) in enumerate([(1.0, 2.0), (30.0, 40.0), (9.0, 10.0)])
        }
    }
    (row,) = speed.ratio_frame(speed.step_frame(part)).itertuples()
    # 1/2, 3/4, 9/10; the ratio of the medians would be 0.9
    assert row.ratio == "CoVRL / prior only" and row.target == 1.4
    assert (row.median, row.lowest, row.highest, row.repetitions) == (0.75, 0.5, 0.9, 3)


STORED = {
    "limits": {"results": {"machine limits": {"rate": 1e9, "bandwidth": 1e30}}},
    "step": {
        "settings": {"config": {"model": "smollm2-135m"}},
        "results": {"0": {}},
    },
}
STORED["limits"]["results"]["machine limits"]["products"] = {"32": 0.1, "512": 0.6, "2048": 2.0}
STORED["step"]["results"]["0"]["covrl"] = {
    "seconds": 9.0,
    "sampling": 4.0,
    "scoring": 2.0,
    "update": 3.0,
    "rows": 32,
    "generated": 32 * 28,
    "scored": 1952,
    "prompt_tokens": 600,
    "prompt_tokens_as_rows": 32 * 130,
    "update_tokens": 2400,
    "update_tokens_as_rows": 15000,
}


def test_the_limit_by_hand():
    """SmolLM2-135M where bandwidth costs nothing: FLOPs of one step, divided by the rate."""
    p, head, width, layers = 30 * 3_538_944, 49_152 * 576, 576, 30
    prompts = 600 * (2 * p + 4 * 130 * width * layers)
    decoding = 28 * 32 * (2 * (p + head) + 4 * 144 * width * layers)
    update = 2 * 2400 * (2 * p + 4 * 158 * width * layers) + 4 * 1952 * head
    times = speed.limit_frame(STORED)
    assert times["limit"].tolist() == pytest.approx([(prompts + decoding) / 1e9, update / 1e9])
    assert times["measured"].tolist() == [4.0, 5.0]
    head_seconds = 4 * 1952 * head / 1e9
    products = [0.6 * 600 / 512 + 28 * 0.1, 2 * 2.0 * 2400 / 2048 + head_seconds]
    assert times["matrix products"].tolist() == pytest.approx(products)


def test_the_limit_of_half_the_tokens_is_half():
    """Bandwidth costs nothing here, so all seconds are FLOPs, which all belong to a token."""
    step = STORED["step"]["results"]["0"]["covrl"]
    names = ("rows", "generated", "scored", "prompt_tokens", "prompt_tokens_as_rows", "update_tokens")
    half = step | {name: step[name] // 2 for name in names}
    results = {"0": {"covrl": step, "prior only": half}}
    parts = STORED | {"step": STORED["step"] | {"results": results}}
    assert speed.limit_ratio(parts) == pytest.approx(2)


def test_distinct_tokens_of_other_trainers_are_their_own():
    step = STORED["step"]["results"]["0"]["covrl"]
    both = {"covrl": step, "trl": step | {"update_tokens": 5000, "update_tokens_needed": 1300}}
    table = speed.token_frame(speed.step_frame({"results": {"0": both}}))
    assert table.loc["covrl", ["update", "distinct"]].tolist() == [2400, 2400]
    assert table.loc["trl", ["update", "distinct"]].tolist() == [5000, 1300]


def test_figures_show_the_stored_numbers():
    frame = speed.step_frame(STORED["step"])
    assert [bar.x[0] for bar in speed.phase_figure(frame).data] == [4.0, 2.0, 3.0, 9.0]
    assert [bar.x[0] for bar in speed.token_figure(speed.token_frame(frame)).data] == [2400, 2400, 15000]
    limits = speed.limit_figure(speed.limit_frame(STORED))
    assert [bar.x[2] for bar in limits.data] == [4.0, 5.0]  # measured
    memory = {"results": {k: {"vocabulary": v, "packed_tokens": 10, "bytes": 3 * 2**20} for k, v in enumerate([8, 9])}}
    assert [line.y[0] for line in speed.memory_figure(speed.memory_frame(memory)).data] == [3.0, 3.0]
    plans = {"results": {"m": {k: {"gib": 1.0, "seconds": s} for k, s in (("predicted", 2), ("measured", 3))}}}
    assert [bar.y[0] for bar in speed.plan_figure(speed.plan_frame(plans)).data] == [1.0, 1.0, 2, 3]
    step = STORED["step"]["results"]["0"]["covrl"] | {"loaded_gib": 1.0, "peak_gib": 3.5, "value": 4}
    growth = speed.growth_frame({"results": {"rollouts: 0": step}})
    assert [line.y[0] for line in speed.growth_figure(growth).data] == [4.0, 2.0, 3.0, 2.5]


def test_plans_for_gpus_name_each_device():
    plans = speed.gpu_plans(["Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-14B"], max_trace_tokens=256)
    table = speed.plans_table(plans)
    assert len(table) == 12 and set(table["GiB there"]) == {16, 24, 32, 40, 80, 141}
    assert table.loc[("Qwen/Qwen2.5-7B", "H100 SXM, 80 GB"), "verdict"] == "fits"
    fixed = {"gradient_checkpointing": False, "max_packed_tokens": 4096, "rollouts_per_question": 8}
    table = speed.plans_table(speed.gpu_plans(["Qwen/Qwen2.5-7B"], max_trace_tokens=512, **fixed))
    advice = "set gradient_checkpointing=True, or lower max_packed_tokens"
    assert advice in table._repr_html_(), "a whole sentence, as a notebook shows it"


def test_the_command_measures_prints_and_refuses(tmp_path, capsys, monkeypatch):
    asked = []

    @contextmanager
    def fake(name, settings, threads, steps):
        def step():
            asked.append((name, settings.get("rollouts_per_question")))
            taken = {"seconds": len(asked), "cpu_seconds": 1.0}
            return STORED["step"]["results"]["0"]["covrl"] | taken | {"loaded_gib": 0.5, "peak_gib": 1.0}

        yield step

    monkeypatch.setattr(benchmark, "serving", fake)
    monkeypatch.setattr(benchmark, "VARIANTS", {k: benchmark.VARIANTS[k] for k in ("covrl", "prior only")})
    monkeypatch.setattr(benchmark, "GROWTH", {"rollouts": [{"rollouts_per_question": 9}]})
    flags = ["benchmark", "--model", "tiny", "--repeats", "2", "--threads", "1", "--folder", str(tmp_path)]
    monkeypatch.setattr("sys.argv", [*flags, "--parts", "step,growth"])
    benchmark.main()
    # One step each that is not counted, then in turn; growth: one more, and two of which the faster counts.
    assert asked == [("covrl", 4), ("prior only", 4)] * 3 + [("covrl", 9)] * 3
    stored = speed.load(tmp_path)
    assert stored["growth"]["results"]["rollouts: 0"]["seconds"] == 8
    # Seconds 3, 4 and 5, 6 by turn: the ratios are 3/4 and 5/6.
    line = [line for line in capsys.readouterr().out.splitlines() if "CoVRL / prior only" in line][0]
    assert [float(x) for x in line.split()[-5:-1]] == [0.792, 0.75, 0.833, 2]

    def broken(*args):
        raise AssertionError("measured again")

    monkeypatch.setattr(benchmark, "serving", broken)
    benchmark.main()
    assert "CoVRL / prior only" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", [*flags, "--parts", "stepp"])
    with pytest.raises(SystemExit) as exit:
        benchmark.main()
    assert exit.value.code == 2 and "did you mean 'step'?" in capsys.readouterr().err
