"""What a graphics card does with covrl_lab: the numeric tests on it, speed, memory, and the plan, as one JSON file.

``make gpu-check`` (or ``python -m tests.bench.gpu_check``) takes at most ten minutes on one card: each part
starts only while there is time, and what was left out is named. ``--device cpu`` runs the same on tiny shapes in less
than two minutes, so that the script itself is tested. Weights are random, of real shapes, and made on the spot:
nothing is fetched. The exit status is 1 if a part failed, and its error stands in the file.

A machine without a network that has torch (2.8 or later) and transformers (5.17 or later) with what they require needs
two packages more, which are pure Python: peft and accelerate. Elsewhere, beside this checkout:

    pip install --no-deps --target carried peft accelerate

Then copy the checkout there, and in it:

    PYTHONPATH=carried:. python -m tests.bench.gpu_check

Without bitsandbytes the larger model is bfloat16 and not in 4 bits; without pandas and pyarrow ``plan`` is left
out. Both are said in the file.

    scores      packed against padded rows, values and gradients, in float32
    other       the device against this machine's CPU, the same weights, in float32; logits of bfloat16 states
    decoding    recorded steps, waves and refills against plain steps, in float32
    twice       the same update twice: whether the gradients are equal to the bit, and which operations are not
    mask        seconds for the tree's mask against a forward of the tree
    speed       tokens/s and kernels a token: weights unpacked at every token or kept, steps recorded or not
    long        one rollout forward and backward: seconds and peak memory
    plan        two steps of a run against what ``covrl_lab.train.plan`` says of them
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

try:
    import bitsandbytes
except ImportError:
    bitsandbytes = None
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from covrl_lab.config import RunConfig
from covrl_lab.files import write_whole
from covrl_lab.train import lora, sampling
from covrl_lab.train.models import load_policy
from covrl_lab.train.plan import GIB, Tokens, make_plan, measure_device
from covrl_lab.train.policy import Policy
from covrl_lab.train.scoring import trace_logprobs
from covrl_lab.train.shapes import shape_of
from covrl_lab.train.tree import FlexTree, build_tree, final_logits, run_tree
from covrl_lab.types import Prompt, TraceBatch

from .benchmark import machine, peak_bytes, random_model

QUANTIZATION = "nf4" if bitsandbytes else "none"  # of the larger model
BOUND = 1e-3  # nats a token, and share of a gradient's norm, in float32
WORDS = 250  # ids below this are in every vocabulary here
TINIES = ("tiny", "tiny-qwen3", "tiny-gemma3")
# Layers as in Qwen2.5-7B, fewer of them by default.
LARGE = {"hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4, "head_dim": 128}
LARGE |= {"intermediate_size": 18944, "vocab_size": 152064, "tie_word_embeddings": False, "initializer_range": 0.02}
SIZES: dict[str, dict[str, Any]] = {
    "cuda": {
        "model": LARGE,
        "layers": 8,
        "rows": [32, 64],
        "tokens": 64,
        "long": 2048,
        "nodes": 4300,
        "step": (8, 8, 256),
    },
    "cpu": {"model": {}, "layers": 2, "rows": [8], "tokens": 8, "long": 64, "nodes": 400, "step": (2, 2, 8)},
}


class Check:
    """One machine's checks: its device, sizes, and the folder of the larger model."""

    def __init__(self, device: str, layers: int | None, folder: str) -> None:
        self.device, self.sizes, self.folder = device, SIZES[device], folder
        self.layers = layers or self.sizes["layers"]
        random_model(folder, "tiny", **self.sizes["model"], num_hidden_layers=self.layers)

    # --- numbers

    def scores(self) -> dict[str, Any]:
        found = {}
        for name in TINIES:
            policy, prompts, batch = small(name, self.device)
            packed, plain = (scored(p, prompts, batch) for p in (policy, padded(policy)))
            found[name] = apart(packed, plain)
            if self.device == "cuda":
                policy.flex = not policy.flex
                found[name + ", other kernel"] = apart(packed, scored(policy, prompts, batch))
        return bounded(found)

    def other(self) -> dict[str, Any]:
        found = {name: apart(*(scored(*small(name, d)) for d in ("cpu", self.device))) for name in TINIES}
        policy = load_policy("tiny", quantization="none", dtype="bfloat16", lora_rank=0, device=self.device)
        hidden = torch.randn(64, policy.head.in_features, generator=torch.Generator().manual_seed(0))
        hidden = hidden.to(self.device, torch.bfloat16)
        exact = hidden.double() @ policy.head.weight.double().T
        gap = float((final_logits(policy, hidden) - exact).abs().max())
        # A CPU rounds logits to bfloat16, so there the gap is not bounded.
        found["head, bfloat16"] = {"value" if self.device == "cuda" else "rounded": gap}
        return bounded(found)

    def decoding(self) -> dict[str, Any]:
        found = {}
        for name in TINIES:
            policy, prompts, _ = small(name, self.device)
            contexts = [c for p in prompts for c in (p.prior, p.posterior, p.prior[:-2])]
            graphs, policy.graphs = policy.graphs, False
            ids, _, logprobs = decode(policy, contexts, 24)
            for label, policy.graphs, policy.rows_at_once in (("recorded", graphs, None), ("waves", graphs, 3)):
                again, _, values = decode(policy, contexts, 24)
                gaps = [abs(a - b) for x, y in zip(logprobs, values, strict=True) for a, b in zip(x, y, strict=False)]
                found[f"{name}, {label}"] = {"value": max(gaps), "same ids": again == ids and policy.graphs == graphs}
        result = bounded(found)
        return result | {"ok": result["ok"] and all(one["same ids"] for one in found.values())}

    def twice(self) -> dict[str, Any]:
        policy, prompts, batch = small("tiny", self.device)
        (_, first), (_, second) = (scored(policy, prompts, batch) for _ in range(2))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.use_deterministic_algorithms(True, warn_only=True)
            scored(policy, prompts, batch)
            torch.use_deterministic_algorithms(False)
        named = sorted({str(w.message).split(" ")[0] for w in caught if "deterministic" in str(w.message)})
        return {"equal": all(torch.equal(first[n], second[n]) for n in first), "not deterministic": named, "ok": True}

    def mask(self) -> dict[str, Any]:
        policy, draw = self.large(), torch.Generator().manual_seed(0)
        branches = torch.randint(3, WORDS, (self.sizes["nodes"] // 50, 50), generator=draw).tolist()
        tree = build_tree([[*range(3, 103), *branch] for branch in branches])
        with torch.no_grad():
            seconds = {
                "mask": timed(lambda: FlexTree(tree, policy).mask(None)),
                "forward": timed(lambda: run_tree(policy, tree)),
            }
        return {
            "nodes": len(tree),
            **seconds,
            "ok": self.device == "cpu" or seconds["mask"] < 0.01 * seconds["forward"],
        }

    # --- speed and memory

    def large(self, keep: bool = True) -> Policy:
        """The larger model, with weights kept unpacked or not."""
        before, lora._has_room = lora._has_room, lambda layers, memory: keep
        try:
            policy = load_policy(self.folder, quantization=QUANTIZATION, device=self.device)
        finally:
            lora._has_room = before
        endless(policy)
        return policy

    def speed(self) -> dict[str, Any]:
        table = []
        for keep, label in ((False, "unpacked"), (True, "kept")) if bitsandbytes else ((True, "not quantised"),):
            policy = self.large(keep)
            for graphs in sorted({False, policy.graphs}):
                policy.graphs = graphs
                for rows in self.sizes["rows"]:
                    line = {"weights": label, "recorded": graphs, "rows": rows}
                    table.append(line | self._speed(policy, rows))
            del policy  # before the next one is loaded
        return {"layers": self.layers, "table": table, "ok": True}

    def _speed(self, policy: Policy, rows: int) -> dict[str, float]:
        contexts, tokens = [[*range(3, 103), 110 + row % 8] for row in range(rows)], self.sizes["tokens"]
        decode(policy, contexts, tokens)  # kernels are compiled
        short, double = (timed(lambda n=n: decode(policy, contexts, n)) for n in (tokens, 2 * tokens))
        return {"tokens/s": rows * tokens / (double - short), "kernels": kernels(policy, contexts)}

    def long(self) -> dict[str, Any]:
        policy, draw = self.large(), torch.Generator().manual_seed(0)
        ids = torch.randint(3, WORDS, (1, self.sizes["long"]), generator=draw)
        yes = torch.ones_like(ids, dtype=torch.bool)
        batch = TraceBatch(ids, yes, yes[:, 0], yes[:, 0], group_size=1).to(self.device)
        prompt = Prompt(tuple(range(3, 103)), tuple(range(4, 114)), seam=(1, 2), answer=(3, 4, 5))

        def run() -> None:
            scores = trace_logprobs(policy, [prompt], batch)
            (scores.prior.sum() + scores.posterior.sum() + scores.answer.sum()).backward()

        return {
            "tokens": ids.shape[1],
            "layers": self.layers,
            "seconds": timed(run),
            "peak_gib": peak(run, self.device),
            "ok": True,
        }

    def plan(self) -> dict[str, Any]:
        from covrl_lab.train.trainer import Trainer

        questions, rollouts, tokens = self.sizes["step"]
        with tempfile.TemporaryDirectory() as folder:
            config = RunConfig(
                model=self.folder, device=self.device, quantization=QUANTIZATION,
                questions_per_step=questions, rollouts_per_question=rollouts,
                max_trace_tokens=tokens, eval_every=0, eval_questions=1, checkpoint_every=10**6, run_dir=folder,
            )  # fmt: skip
            trainer = Trainer(config, progress=False).setup()
            endless(trainer.policy)
            trainer.prompter.ends = lambda ids, end: False
            if self.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            steps = iter(trainer)
            seconds = [next(steps).seconds for _ in range(2)]
            used = torch.cuda.max_memory_allocated() / GIB if self.device == "cuda" else None
            prompts = trainer._prompts(trainer._questions(0))
        measured = measure_device(0.5, self.device)
        planned = make_plan(config, shape_of(config.model), Tokens.of_prompts(config, prompts), measured)
        bytes_planned = (planned.peak - planned.memory["runtime"]) / GIB
        sizes = {"step": [questions, rollouts, tokens], "rows": planned.rows, "parts": planned.memory}
        return sizes | {
            "seconds": seconds,
            "planned_seconds": 60 * planned.minutes,
            "peak_gib": used,
            "planned_gib": bytes_planned,
            "ok": used is None or used < 1.1 * bytes_planned,
        }


# --- what the parts share


def small(name: str, device: str) -> tuple[Policy, list[Prompt], TraceBatch]:
    """A tiny float32 policy whose adapter does something, two prompts, and eight ragged traces."""
    policy = load_policy(name, quantization="none", dtype="float32", lora_rank=4, device=device)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in policy.trainable():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
    ids = torch.randint(3, WORDS, (8, 20), generator=draw)
    mask = torch.arange(20) < torch.tensor([20, 1, 7, 20, 13, 5, 2, 18])[:, None]
    batch = TraceBatch(ids * mask, mask, mask[:, 0], mask[:, 0], group_size=4).to(device)
    roots = [tuple(torch.randint(3, WORDS, (30,), generator=draw).tolist()) for _ in range(2)]
    prompts = [Prompt(roots[0] + (9 + q,), roots[1] + (9 + q, 40), seam=(5, 6), answer=(7, 8, 9)) for q in range(2)]
    return policy, prompts, batch


def padded(policy: Policy) -> Policy:
    """The same model in rows."""
    twin = load_policy(policy.name, quantization="none", dtype="float32", lora_rank=4, device=str(policy.device))
    with torch.no_grad():
        for (_, mine), (_, theirs) in zip(twin.trainable(), policy.trainable(), strict=True):
            mine.copy_(theirs)
    twin.packs = False
    return twin


def scored(policy: Policy, prompts: list[Prompt], batch: TraceBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """All log-probabilities, and the gradients of a sum in which each has a weight of its own."""
    scores = trace_logprobs(policy, prompts, batch, temperature=0.7)
    values = torch.cat([x.flatten() for x in (scores.prior, scores.posterior, scores.answer)])
    for _, parameter in policy.trainable():
        parameter.grad = None
    (values * torch.linspace(-1, 1, len(values), device=values.device)).sum().backward()
    return values.detach().cpu(), {name: p.grad.detach().cpu() for name, p in policy.trainable()}


def apart(one: tuple, other: tuple) -> dict[str, float]:
    """How far two results of ``scored`` are apart."""
    gradients = [float((one[1][n] - g).norm() / g.norm()) for n, g in other[1].items()]
    return {"value": float((one[0] - other[0]).abs().max()), "gradient": max(gradients)}


def bounded(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The gaps, and whether all are within BOUND."""
    gaps = [one[kind] for one in found.values() for kind in ("value", "gradient") if kind in one]
    return {"bound": BOUND, "gaps": found, "ok": all(gap < BOUND for gap in gaps)}


def endless(policy: Policy) -> None:
    """Let no token end a trace."""
    policy.tokenizer.eos_token_id = policy.causal_lm.generation_config.eos_token_id = None


def decode(policy: Policy, contexts: list, tokens: int) -> tuple:
    """Sampled rows of a fixed seed."""
    draw = torch.Generator().manual_seed(0)
    uniforms = torch.rand(len(contexts), tokens, generator=draw, dtype=torch.float64)
    return sampling.generate(policy, contexts, max_tokens=tokens, ended=lambda ids: False, uniforms=uniforms)


class _Operations(TorchDispatchMode):
    """Counts operations that are no views: about one kernel each."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        free = ("empty", "detach", "_local_scalar", "lift_fresh", "_unsafe_view")
        self.count += not operation.is_view and not any(word in operation.name() for word in free)
        return operation(*args, **(kwargs or {}))


def kernels(policy: Policy, contexts: list) -> float:
    """Operations a decoded token of all rows, as PyTorch starts them; a graph starts them by itself."""
    counted, before = [], (policy.graphs, policy.flex)
    policy.graphs = policy.flex = False
    for tokens in (4, 12):
        with _Operations() as operations:
            decode(policy, contexts, tokens)
        counted.append(operations.count)
    policy.graphs, policy.flex = before
    return (counted[1] - counted[0]) / 8


def timed(function: Callable[[], Any]) -> float:
    """Seconds of the second call."""
    for _ in range(2):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        started = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    return seconds


def peak(function: Callable[[], None], device: str) -> float:
    """GiB that a function takes beyond what was there."""
    if device == "cpu":
        return peak_bytes(function) / GIB
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    return (torch.cuda.max_memory_allocated() - before) / GIB


PARTS = ("scores", "other", "decoding", "twice", "mask", "speed", "long", "plan")


def main(arguments: list[str] | None = None) -> int:
    """Run the parts while there is time; write and print what they found."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gpu_check", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=SIZES, default="cuda")
    parser.add_argument("--layers", type=int, help="of the larger model; 28 is all of Qwen2.5-7B")
    parser.add_argument(
        "--minutes", type=float, default=10, help="a part starts only while three quarters are not over"
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated")
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"))
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "torch sees no CUDA GPU here; --device cpu tries the script itself\n")
    started, results = time.perf_counter(), {}
    with tempfile.TemporaryDirectory() as folder:
        check = Check(options.device, options.layers, folder)
        for part in options.parts.split(","):
            begun = time.perf_counter()
            if begun - started > 0.75 * 60 * options.minutes:
                results[part] = {"ok": None, "error": "left out: no time"}
                continue
            try:
                results[part] = getattr(check, part)()
            except ModuleNotFoundError as error:
                if (error.name or "").split(".")[0] in ("covrl_lab", "tests"):
                    raise
                results[part] = {"ok": None, "error": f"left out: no package {error.name!r} here"}
            except Exception as error:  # the other parts still say something
                results[part] = {
                    "ok": False,
                    "error": f"{type(error).__name__}: {error}",
                    "where": traceback.format_exc(),
                }
            results[part]["took"] = time.perf_counter() - begun
            print(part, json.dumps({k: v for k, v in results[part].items() if k != "where"}), flush=True)
    head = {
        "device": options.device,
        "machine": machine(torch.get_num_threads()),
        "quantization": QUANTIZATION if bitsandbytes else "none: no package 'bitsandbytes' here",
        "took": time.perf_counter() - started,
    }
    write_whole(
        options.out, json.dumps({"settings": head, "machine": head["machine"], "results": results}, indent=1) + "\n"
    )
    return int(any(result["ok"] is False for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
