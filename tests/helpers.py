"""What several test files share: run settings, made-up run folders, hostile text, tiny steps of a policy.

Imports torch inside functions only: notebooks of the browser tests import this file.
"""

import ast
import copy
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
from hostile import HOSTILE

from covrl_lab import RunConfig, load_run
from covrl_lab.runs.folder import step_file, write_parquet
from covrl_lab.types import Demonstration

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE_RUN = ROOT / "notebooks" / "results" / "example_run"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
DEMONSTRATIONS = [Demonstration("2 plus 3?", "2 and 3 more is 5.", "5")]
ASK = {"question": "What is 14 plus 9?", "answer": "23"}
TINIES = ["tiny", "tiny-qwen3", "tiny-gemma3"]
CLOCK = {"seconds", "seconds_sampling", "seconds_update", "peak_memory_gib"}  # no two runs share these

# A step of this takes a fraction of a second.
TINY_RUN = {
    "model": "tiny",
    "quantization": "none",
    "dtype": "float32",
    "demonstrations": 1,
    "questions_per_step": 2,
    "rollouts_per_question": 2,
    "max_trace_tokens": 6,
    "eval_questions": 4,
}
# Eight steps in which some traces finish, with evaluations and checkpoints on the way.
TRAINED = {
    "method": "covrl_published",
    "model": "tiny",
    "quantization": "none",
    "dtype": "float32",
    "device": "cpu",
    "lora_rank": 4,
    "task": "arithmetic",
    "difficulty": 1,
    "demonstrations": 1,
    "steps": 8,
    "questions_per_step": 2,
    "rollouts_per_question": 6,
    "max_trace_tokens": 20,  # a random model ends one trace in ten within these
    "learning_rate": 5e-3,
    "warmup_steps": 2,
    "eval_every": 4,
    "eval_questions": 3,
    "eval_samples": 1,
    "max_answer_tokens": 4,
    "checkpoint_every": 3,
    "seed": 3,
}


# --- processes


def checkout_environment(**more):
    """This process's environment, in which others import this checkout and use one thread."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    changes = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    return os.environ | changes | more


def flags(settings):
    """Settings as arguments of the command line."""
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def heed_signals():
    """For ``preexec_fn``, as in a terminal: nohup and shells in the background leave some ignored, to children, too."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def start_training(settings):
    """``covrl-lab train`` in another process."""
    command = [sys.executable, "-m", "covrl_lab", "train", *flags(settings)]
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, env=checkout_environment(), stdout=quiet, stderr=quiet)


def until(happened, what="a condition", seconds=420):
    """Wait until ``happened()`` is true, and return it; the limit only ends a test that hangs."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := happened():
            return found
        time.sleep(0.02)
    raise AssertionError(f"never happened: {what}")


# --- messages


def assert_one_sentence(message):
    """A ConfigError's text: one line, no full stop at its end, and nothing of Python's own."""
    assert message and "\n" not in message and len(message) < 1500, message[:2000]
    assert "Traceback" not in message and " object at 0x" not in message, message


# --- run folders


def lines(path):
    """The records of a JSON-lines file in which every line is whole."""
    text = Path(path).read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def numbers(run_dir):
    """The lines of metrics.jsonl without clock and memory, as text: equal means identical."""
    records = lines(Path(run_dir) / "metrics.jsonl")
    return [json.dumps({k: v for k, v in r.items() if k not in CLOCK}) for r in records]


def contents(folder):
    """name -> bytes of all files below a folder, but for the mark of who trains it now."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "owner.lock"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def make_trainer(run_dir, base=TRAINED, **settings):
    """A trainer that has loaded nothing yet."""
    from covrl_lab.train.trainer import Trainer

    return Trainer(RunConfig(**base | settings, run_dir=str(run_dir)), progress=False)


def _write_run(folder, traces, **settings):
    """A run folder with the traces of each step; returns the run."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"model": "tiny", "alpha": 0.5, "composite_weight": 0.5} | settings
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    for step, rows in traces.items():
        write_parquet(pd.DataFrame(rows), step_file(folder / "traces", step))
    return load_run(folder)


def made_up_run(folder, steps=2, questions=4, rollouts=4, length=6, **changes):
    """A run folder of random traces, written without the trainer."""
    rng = np.random.default_rng(0)
    traces = {}
    for step in range(1, steps + 1):
        rows = traces[step] = []
        for i in range(questions * rollouts):
            logp = -rng.exponential(1.0, length)
            rows.append(
                {
                    "step": step,
                    "rollout": i,
                    "example_id": f"q{i // rollouts}",
                    "question": f"question {i // rollouts} of step {step}",
                    "answer": str(i // rollouts),
                    "source": "prior" if i % 2 == 0 else "posterior",
                    "finished": True,
                    "trace": "word " * length,
                    "tokens": ["word "] * length,
                    "token_ids": list(range(length)),
                    "logp": logp.tolist(),
                    "logq": np.minimum(logp + rng.standard_normal(length), 0).tolist(),
                    "log_ratio": [0.0] * length,
                    "answer_logp": (-rng.exponential(1.0, 2)).tolist(),
                    "reward": float(rng.standard_normal()),
                    "advantage": float(rng.standard_normal()),
                    "answer_weight": 0.0,
                }
                | changes
            )
    return _write_run(folder, traces)


def random_frame(n=12, longest=30, seed=0, spread=3.0):
    """Rows as in ``Run.traces``, lengths 1 to ``longest``, gaps of a few nats and some of none."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        length = int(rng.integers(1, longest + 1))
        logp = -rng.exponential(2.0, length)
        logq = np.minimum(logp + spread * rng.standard_normal(length) * (rng.random(length) < 0.7), -1e-6)
        rows.append(
            {
                "source": ("prior", "posterior")[i % 2],
                "finished": bool(rng.random() < 0.7),
                "logp": list(logp),
                "logq": list(logq),
                "advantage": float(rng.standard_normal()) if i else 0.0,
                "reward": float(-rng.exponential(5.0)),
            }
        )
    return pd.DataFrame(rows)


def hostile_run(folder, texts=HOSTILE):
    """A run folder of one step whose questions, answers, traces, tokens and settings are the texts."""
    rows = []
    for i, question in enumerate(texts[:8]):
        for source in ("prior", "posterior"):
            count = len(texts)
            rows.append(
                {
                    "step": 1,
                    "rollout": len(rows),
                    "example_id": f"q{i}",
                    "question": question,
                    "answer": texts[-1 - i],
                    "source": source,
                    "finished": True,
                    "trace": " ".join(texts),
                    "tokens": texts,
                    "token_ids": list(range(count)),
                    "logp": [-0.1 * k for k in range(count)],
                    "logq": [-0.2 * k for k in range(count)],
                    "log_ratio": [0.0] * count,
                    "answer_logp": [-1.0],
                    "reward": -1.0,
                    "advantage": 1.0 if source == "prior" else -1.0,
                    "answer_weight": 1.0,
                }
            )
    return _write_run(folder, {1: rows}, model=texts[0])


# --- notebooks and models


def parameters(path):
    """name -> (annotation, value) of a notebook's one parameters cell."""
    cells = nbformat.read(path, as_version=4).cells
    (cell,) = [c for c in cells if "parameters" in c.metadata.get("tags", [])]
    found = {}
    for node in ast.parse(cell.source).body:
        assert isinstance(node, ast.AnnAssign), f"not a typed literal: {ast.unparse(node)}"
        lines = cell.source.splitlines()[node.lineno - 1 : node.end_lineno]
        assert any("#" in line for line in lines), f"{node.target.id} has no comment"
        found[node.target.id] = (ast.unparse(node.annotation), ast.literal_eval(node.value))
    return found


def select(rows, index, **changes):
    """The rows ``index`` of a batch type, with further fields replaced."""
    from torch import Tensor

    values = {f.name: getattr(rows, f.name) for f in dataclasses.fields(rows)}
    picked = {name: v[index] for name, v in values.items() if isinstance(v, Tensor)}
    return dataclasses.replace(rows, **(picked | changes))


def move_adapter(policy, seed=0, scale=0.05):
    """Give both LoRA factors random values, so that gradients reach both and the adapter does something."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in policy.trainable():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return generator


def unpacked(policy):
    """The same policy, but scored and sampled in plain padded rows."""
    twin = copy.copy(policy)
    twin.packs = False
    return twin


def adapter_change(policy):
    """How far the adapter moves the base: the Frobenius norm of all its ``scaling * B @ A`` together."""
    import torch
    from peft.tuners.lora import LoraLayer

    total = torch.zeros(())
    for layer in policy.model.modules():
        if isinstance(layer, LoraLayer):
            total = total + layer.get_delta_weight("default").detach().square().sum()
    return float(total.sqrt())


TEXT = "Question: what is 12 + 34?\nThe answer is the sum of these two numbers.\n"


def text_ids(policy):
    """(1, tokens) a short text."""
    return policy.tokenizer(TEXT, return_tensors="pt").input_ids.to(policy.device)


def text_logits(policy):
    """Logits of the short text."""
    import torch

    with torch.no_grad():
        return policy.causal_lm(text_ids(policy), use_cache=False).logits


def text_gradients(policy):
    """LoRA gradients of the text's log-likelihood, by parameter name."""
    ids = text_ids(policy)
    for _, parameter in policy.trainable():
        parameter.grad = None
    policy.causal_lm(ids, labels=ids, use_cache=False).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in policy.trainable()}
