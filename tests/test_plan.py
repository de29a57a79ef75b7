"""The plan's memory arithmetic against tensors that exist, and its verdicts against each other."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from helpers import TINIES, make_trainer

from covrl_lab import ConfigError, RunConfig
from covrl_lab.train.models import load_config, load_policy
from covrl_lab.train.plan import (
    DEVICES,
    FEW_PACKED,
    GIB,
    PACKED,
    Device,
    Plan,
    Tokens,
    measure_device,
    memory_parts,
    plan,
    room_of,
)
from covrl_lab.train.sampling import PackedRows, generate
from covrl_lab.train.scoring import packed_tokens
from covrl_lab.train.shapes import SHAPES, Shape, shape_of
from covrl_lab.train.tree import count_nodes
from covrl_lab.types import Prompt, TraceBatch
from tests.bench.benchmark import peak_bytes

HERE = Device("a test's", memory=16 * GIB, rate=1e12, bandwidth=1e10, runtime=0, share=0.5, launch=0)


FIXED = {"gradient_checkpointing": False, "max_packed_tokens": 4096}


def storage(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("model", TINIES)
@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_weights_adapter_and_optimiser_take_what_the_plan_says(model, quantization, dtype):
    policy = load_policy(model, quantization=quantization, dtype=dtype, lora_rank=3, device="cpu")
    shape, width = shape_of(model), 2 if dtype == "bfloat16" else 4

    frozen = {id(p): p for p in policy.model.parameters() if not p.requires_grad}.values()
    actual = storage(*frozen)
    for state in (p.quant_state for p in frozen if hasattr(p, "quant_state")):
        nested = state.state2
        actual += storage(state.absmax, state.code, state.offset, nested.absmax, nested.code)
    assert shape.weight_bytes(quantization, width) == actual

    parameters = [p for _, p in policy.trainable()]
    optimizer = torch.optim.AdamW(parameters)
    sum(p.sum() for p in parameters).backward()
    optimizer.step()
    moments = [s[name] for s in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    actual = storage(*parameters, *(p.grad for p in parameters), *moments)
    config = RunConfig(model=model, quantization=quantization, dtype=dtype, lora_rank=3, **FIXED)
    tokens = Tokens.of(config, 10, 5, 3)
    assert memory_parts(config, shape, tokens, HERE)["adapter"] == actual


@pytest.mark.parametrize("model", TINIES)
def test_keys_and_values_take_what_the_plan_says(model):
    policy = load_policy(model, quantization="none", dtype="bfloat16", lora_rank=0, device="cpu")
    config = RunConfig(
        model=model, quantization="none", dtype="bfloat16", questions_per_step=2, rollouts_per_question=3,
        max_trace_tokens=7, gradient_checkpointing=False, max_packed_tokens=46,
    )  # fmt: skip
    tokens = Tokens.of(config, shared=10, question=5, answer=3)
    assert tokens.prompts == 46  # and of no more there is a forward
    contexts = [[*range(9, 19), *range(20 * q, 20 * q + 5)] for q in (1, 2)]
    rows = PackedRows(policy, dict(enumerate(c for c in contexts for _ in range(3))), max_tokens=7)
    rows.step(torch.empty(0), [], range(6))
    rows.step(torch.full((6,), 9))
    own = storage(*(t for layer in rows.own for t in layer))
    prompts = storage(*(t for layer in (*rows.layers, *rows.prompts) for t in layer))
    shape = shape_of(model)
    prompt = 2 * 2 * shape.layers * shape.kv_heads * shape.head_dim * tokens.prompts
    planned = memory_parts(config, shape, tokens, HERE)["keys and values"]
    # A layer's keys or values are moved at a time; prompts of other steps may be longer. Answers would take less here.
    assert 3 * tokens.prompts + 6 * config.max_answer_tokens < 3 * 1.5 * tokens.prompts + 6 * 7
    assert planned == (own + 3 * 1.5 * prompt) * (1 + 1 / (2 * shape.layers))
    assert prompts <= 3 * prompt  # as computed, and in the blocks of rows that share them


@pytest.mark.slow
@pytest.mark.parametrize(("traces", "length", "rows"), [(32, 48, 8), (64, 512, 32)])
def test_decoding_in_waves_takes_what_the_plan_says(traces, length, rows):
    """Allocations counted: traces with fewer seats, then answers after whole traces, as many as 512 tokens hold."""
    policy = load_policy("tiny", quantization="none", dtype="float32", lora_rank=0, device="cpu")
    policy.tokenizer.eos_token_id = policy.causal_lm.generation_config.eos_token_id = None
    config = RunConfig(
        model="tiny", quantization="none", dtype="float32", questions_per_step=8, rollouts_per_question=traces // 8,
        max_trace_tokens=length, gradient_checkpointing=False, max_packed_tokens=512,
    )  # fmt: skip
    cpu = dataclasses.replace(HERE, unpacks=False)
    tokens = Tokens.of(config, 30, 10, 5)
    made = Plan(config, cpu, memory_parts(config, shape_of("tiny"), tokens, cpu, rows), {})
    planned = max(made.bytes_of("contexts"), made.bytes_of("sampling"))
    draw = torch.Generator().manual_seed(0)
    questions = [torch.randint(3, 200, (10,), generator=draw).tolist() for _ in range(8)]
    prompts = [[*range(30), *question] for question in questions for _ in range(traces // 8)]
    traced = [prompt + torch.randint(3, 200, (length,), generator=draw).tolist() for prompt in prompts]

    def taken(contexts, tokens):
        return peak_bytes(lambda: generate(policy, contexts, max_tokens=tokens, ended=lambda ids: False))

    assert taken(traced, 4) > 2 * planned
    policy.rows_at_once, policy.tokens_at_once = rows, 512
    policy.room = room_of(config, tokens, rows)
    answers, sampled = taken(traced, 4), taken(prompts, length)
    assert 0.8 * planned < answers < planned
    # Where traces are long, they decide; else what is encoded at once does, and short traces fill few of their slots.
    least = 0.9 if length == 512 else 0.5
    assert least * made.bytes_of("sampling") < sampled < made.bytes_of("sampling")


CHANGES = {"both": {"posterior_weight": 1}, "frozen": {"posterior_weight": 0}, "prior": {"alpha": 1}}


@pytest.mark.parametrize("trained", CHANGES)
def test_token_counts_are_those_of_the_packed_trees(trained):
    """Prompts of one length that share nothing by accident, traces all different."""
    changes = CHANGES[trained]
    config = RunConfig(questions_per_step=3, rollouts_per_question=4, max_trace_tokens=6, **changes)
    fresh = iter(range(10, 10**6))

    def ids(count):
        return [next(fresh) for _ in range(count)]

    shared, other = ids(20), ids(20)
    questions = [ids(7) for _ in range(3)]
    prompts = [Prompt(tuple(shared + q), tuple(other + q + ids(5)), tuple(ids(2)), tuple(ids(5))) for q in questions]
    yes = torch.ones(12, 6, dtype=torch.bool)
    batch = TraceBatch(torch.tensor([ids(6) for _ in range(12)]), yes, yes[:, 0], yes[:, 0], group_size=4)

    tokens = Tokens.of(config, shared=20, question=7, answer=5)
    assert (tokens.rows, tokens.length) == (12, 6)
    both = packed_tokens(prompts, batch, posterior=True)[0]
    assert tokens.nodes == packed_tokens(prompts, batch, posterior=trained == "both")[0]
    assert tokens.frozen == (both - tokens.nodes if trained == "frozen" else 0)
    contexts = [p.prior for p in prompts] + ([] if trained == "prior" else [p.posterior for p in prompts])
    assert tokens.prompts == count_nodes(contexts)
    assert tokens.scored == 12 * (6 * (1 + (trained == "both")) + 5)


def test_built_in_shapes_have_the_published_parameter_counts():
    """Totals as the model cards give them, in billions."""
    published = {
        "smollm2-135m": 0.1345,
        "Qwen/Qwen2.5-0.5B": 0.494,
        "Qwen/Qwen2.5-1.5B": 1.54,
        "Qwen/Qwen2.5-3B": 3.09,
        "Qwen/Qwen2.5-7B": 7.62,
        "Qwen/Qwen2.5-14B": 14.77,
        "Qwen/Qwen3-8B": 8.19,
        "Qwen/Qwen3-14B": 14.77,
        "Qwen/Qwen3-8B-Base": 8.19,
        "Qwen/Qwen3-14B-Base": 14.77,
        "meta-llama/Llama-3.1-8B": 8.03,
    }
    assert set(published) == set(SHAPES)
    for model, billions in published.items():
        assert shape_of(model).weight_bytes("none", 1) / 1e9 == pytest.approx(billions, rel=5e-3), model


def test_a_shape_reads_what_transformers_writes():
    for model in TINIES:
        assert Shape.of(load_config(model).to_dict()) == shape_of(model)
    with pytest.raises(ConfigError, match="intermediate_size"):
        Shape.of({"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1})


def test_the_larger_phase_counts():
    parts = {"weights": 1.0, "adapter": 2.0, "runtime": 3.0, "keys and values": 10.0, "logits": 20.0}
    parts |= {"contexts": 7.0, "activations": 4.0, "masks": 5.0, "head": 6.0}
    made = Plan(RunConfig(), HERE, parts, {"decoding": 90.0, "update": 30.0})
    assert made.peak == 6 + 30 and made.minutes == 2.0
    assert dataclasses.replace(made, memory=parts | {"activations": 40.0}).peak == 6 + 51
    assert dataclasses.replace(made, memory=parts | {"contexts": 40.0}).peak == 6 + 40


def test_what_does_not_fit_says_what_to_lower():
    long = {"max_trace_tokens": 1024, "model": "Qwen/Qwen2.5-14B"}

    def advice(device=DEVICES["rtx4090"], **settings):
        return plan(device=device, **(FIXED | long | settings)).advice

    assert not plan(device="rtx4090", **FIXED, **long).fits and "gradient_checkpointing" in advice()
    assert advice(gradient_checkpointing=True) == "" and plan(
        device="rtx4090", **FIXED | {"gradient_checkpointing": True}, **long
    ).summary().endswith("; fits")
    assert "nf4" in advice(quantization="none")
    assert "smaller model" in advice(dataclasses.replace(HERE, memory=4 * GIB))
    assert "max_packed_tokens" in advice(gradient_checkpointing=True, max_packed_tokens=100_000)
    assert "max_trace_tokens" in advice(gradient_checkpointing=True, max_packed_tokens=256, max_trace_tokens=60_000)
    crowd = {"questions_per_step": 1000, "rollouts_per_question": 16, "max_packed_tokens": 512}
    assert advice(gradient_checkpointing=True, **crowd) == ""  # however many, a few are decoded at once
    line = plan(device="rtx4090", **FIXED, **long).summary()
    assert "does NOT fit" in line and "24 GiB" in line and "\n" not in line


def test_every_lever_moves_memory_and_time_the_right_way():
    device = dataclasses.replace(HERE, memory=40 * GIB)
    base = FIXED | {"model": "Qwen/Qwen2.5-7B", "max_trace_tokens": 128, "device": device}

    def sizes(**settings):
        made = plan(**(base | settings))
        return made.peak, made.minutes

    peak, minutes = sizes()
    less, more = sizes(gradient_checkpointing=True)
    assert less < peak and more > minutes
    assert sizes(max_packed_tokens=1024)[0] < peak
    assert sizes(quantization="none")[0] > peak and sizes(quantization="none")[1] < minutes
    assert sizes(rollouts_per_question=8)[1] > minutes and sizes(max_trace_tokens=256)[1] > minutes
    assert sizes(trace_tokens=32)[1] < minutes
    assert sizes(method="jlb")[1] < minutes  # one context instead of two


def test_the_decoding_time_by_hand():
    """One question, one rollout: reading the weights, keys and values once a token is the limit."""
    config = RunConfig(questions_per_step=1, rollouts_per_question=1, quantization="none", max_trace_tokens=10)
    device = dataclasses.replace(HERE, bandwidth=1e9)
    made = plan(config, device=device, prompt_tokens=1, question_tokens=1)
    # SmolLM2-135M: 30 layers of 3538944 parameters, embedding 49152 x 576, two bytes each.
    read = 2 * (30 * 3_538_944 + 49_152 * 576)
    # Before the trace 2 tokens, on average 5 more: 30 layers of 3 key heads of size 64, and as many values.
    read += 7 * 30 * 2 * 3 * 64 * 2
    assert made.seconds["decoding"] == pytest.approx(10 * read / 1e9)
    assert "dequantise" not in made.seconds


def test_the_command_prints_a_table_and_refuses_unknown_devices():
    def run(*flags):
        command = [sys.executable, "-m", "covrl_lab", "plan", "--model", "Qwen/Qwen2.5-7B", *flags]
        return subprocess.run(command, capture_output=True, text=True)

    done = run("--device", "a100-40", "--gradient_checkpointing", "True")
    assert done.returncode == 0, done.stderr
    assert "activations" in done.stdout and "A100" in done.stdout and "; fits" in done.stdout
    done = run("--device", "rtx4091")
    assert done.returncode == 2 and "did you mean 'rtx4090'?" in done.stderr
    done = run("--device", "a100-40", "--alpha", "2")
    assert done.returncode == 2 and "alpha" in done.stderr and "Traceback" not in done.stderr


# --- what is decided before a run


@pytest.mark.parametrize("gib", [16, 24, 32, 40, 80, 141])
@pytest.mark.parametrize("model", ["Qwen/Qwen2.5-7B", "Qwen/Qwen3-8B", "Qwen/Qwen3-14B"])
def test_long_traces_of_large_models_are_made_to_fit_every_card(model, gib):
    long = {"model": model, "rollouts_per_question": 8, "max_trace_tokens": 2048}
    (device,) = [d for d in DEVICES.values() if d.memory == gib * GIB]
    made = plan(device=device, **long)
    chosen = made.config
    assert made.fits and 1 <= made.rows <= 64
    assert type(chosen.gradient_checkpointing) is bool and chosen.max_packed_tokens in PACKED
    # The next larger choice would not have fitted, and one row more would not either.
    if chosen.gradient_checkpointing:
        assert not plan(device=device, **long, gradient_checkpointing=False, max_packed_tokens=FEW_PACKED).fits
    if made.rows < 64:
        tokens = Tokens.of(chosen, 110, 20, 5)
        more = memory_parts(chosen, shape_of(model), tokens, device, made.rows + 1)
        assert dataclasses.replace(made, memory=more).bytes_of("sampling") + made.bytes_of() > 0.95 * device.memory


def test_waves_take_less_memory_and_more_time():
    whole = plan(device=HERE, model="Qwen/Qwen2.5-7B", max_trace_tokens=4096, **FIXED)
    small = plan(device=dataclasses.replace(HERE, memory=12 * GIB), model="Qwen/Qwen2.5-7B", max_trace_tokens=4096)
    assert small.rows < whole.rows == 32
    assert small.memory["keys and values"] < whole.memory["keys and values"]
    assert small.seconds["decoding"] > whole.seconds["decoding"]


def test_rows_have_room_for_the_traces_of_evaluation_and_judging():
    """Longer ones take seats; what begins at once holds whole traces, up to a forward's tokens."""
    small, model = dataclasses.replace(HERE, memory=16 * GIB), {"model": "Qwen/Qwen2.5-7B", "max_trace_tokens": 512}
    settings = FIXED | model | {"gradient_checkpointing": True, "questions_per_step": 64}
    short, long = (plan(device=small, **settings, eval_max_trace_tokens=n) for n in (None, 4096))
    assert long.fits and 1 <= long.rows < short.rows / 4
    shape, tokens = shape_of("Qwen/Qwen2.5-7B"), Tokens.of(short.config, 110, 20, 5)
    token = 2 * 2 * shape.layers * shape.kv_heads * shape.head_dim
    for made, length in ((short, 512), (long, 4096)):
        begun = max(4096, tokens.context + length)
        answers = 3 * begun + made.rows * made.config.max_answer_tokens
        assert made.room == max(answers, 3 * 1.5 * tokens.prompts + made.rows * length)
        assert made.memory["keys and values"] == pytest.approx(token * made.room * (1 + 1 / (2 * shape.layers)))
        assert made.memory["contexts"] > 4 * begun * 2 * shape.intermediate


def test_on_a_cpu_auto_is_what_was_fixed_before_where_it_fits():
    cpu = dataclasses.replace(HERE, unpacks=False, launch=0)
    chosen = plan(device=cpu).config
    assert (chosen.gradient_checkpointing, chosen.max_packed_tokens) == (False, 4096)
    assert "launches" not in plan(device=cpu).seconds


def test_the_dtype_of_auto_is_the_devices():
    """Machines without products in bfloat16 compute, and are planned, in float32."""
    old = dataclasses.replace(HERE, dtype="float32")
    made, wanted = plan(device=old), plan(device=old, dtype="float32")
    assert made.config.dtype == "float32" and made.memory == wanted.memory and made.seconds == wanted.seconds
    assert plan(device=HERE).memory == plan(device=HERE, dtype="bfloat16").memory != made.memory
    assert plan(device=old, dtype="bfloat16").config.dtype == "bfloat16"


@pytest.mark.slow
def test_the_rate_is_measured_on_the_device_and_in_the_dtype_of_the_run(monkeypatch):
    asked = []

    def measured(**settings):
        asked.append(settings)
        return HERE

    monkeypatch.setattr("covrl_lab.train.plan.measure_device", measured)
    plan(device="cpu", dtype="float32")
    plan(RunConfig(device="cpu"))
    plan(device="cpu", config=RunConfig(device="cuda", dtype="bfloat16"))
    assert asked == [{"device": "cpu", "dtype": dtype} for dtype in ("float32", "auto", "bfloat16")]
    monkeypatch.undo()
    a, matrices = torch.randn, []
    monkeypatch.setattr(torch, "randn", lambda *size, **how: matrices.append(how) or a(*size, **how))
    assert measure_device(0.01, "cpu", "bfloat16").rate > 0
    assert (matrices[0]["dtype"], str(matrices[0]["device"])) == (torch.bfloat16, "cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="torch sees no CUDA GPU here"):
            plan(device="cuda")


def test_the_hosts_time_for_kernels_counts_where_they_are_short():
    short = plan(device=dataclasses.replace(DEVICES["h100-80"], launch=1e-3), **FIXED)
    assert short.seconds["launches"] > 0
    assert plan(device=dataclasses.replace(DEVICES["h100-80"], launch=1e-9), **FIXED).seconds["launches"] == 0


def test_the_tokens_of_given_prompts_are_those_of_their_tree():
    config = RunConfig(questions_per_step=2, rollouts_per_question=3, max_trace_tokens=5, posterior_weight=1)
    prompts = [Prompt((1, 2, 3, q), (1, 9, 9, q, 7), (4, 5), (6, 7, 8)) for q in (10, 11)]
    tokens = Tokens.of_prompts(config, prompts)
    assert (tokens.rows, tokens.context) == (6, 5)
    assert tokens.prompts == count_nodes([p for q in prompts for p in (q.prior, q.posterior)]) == 11
    assert tokens.nodes == 11 + 6 * (2 * 5 + 3) and tokens.rollout == 2 * (5 + 5) + 3
    tokens = Tokens.of_prompts(dataclasses.replace(config, posterior_weight=0), prompts)
    assert tokens.nodes == 5 + 6 * (5 + 3 + 1) and tokens.frozen == 6 + 6 * (5 - 1)


def test_the_trainer_refuses_what_cannot_fit_before_it_loads_a_model(tmp_path, no_model):
    trainer = make_trainer(tmp_path / "run", memory_gib=0.5)
    with pytest.raises(ConfigError, match=r"needs about 0\.8 GiB, and CPU.* has 0\.5: .*set memory_gib") as caught:
        trainer.setup()
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_the_trainer_takes_what_the_plan_chose(tmp_path):
    trainer = make_trainer(tmp_path / "run", memory_gib=16).setup()
    assert (trainer.plan.config.max_packed_tokens, trainer.plan.config.gradient_checkpointing) == (4096, False)
    assert trainer.policy.rows_at_once == trainer.plan.rows == 12 and trainer.policy.tokens_at_once == 4096
    assert trainer.policy.room == trainer.plan.room > 3 * 4096
    stored = RunConfig.load(tmp_path / "run" / "config.json")
    assert stored.max_packed_tokens == "auto" and stored == trainer.config
