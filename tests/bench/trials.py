"""The objective's trials: methods on tasks of one to three steps, each run resumable, results kept as small files.

    python -m tests.bench.trials                       # all runs, or what is left of them
    python -m tests.bench.trials --methods covrl grpo --tasks double_add --seeds 0 --workers 2
    python -m tests.bench.trials --more 300 --tasks round_sum      # runs that are there, on 300 questions more

A run is SmolLM2-135M in NF4, 30 steps of 8 questions x 4 traces, evaluated before and after on 112 held-out
questions. What is worth keeping is copied to notebooks/results/trials/TASK-METHOD-sSEED/. With --more, runs whose
checkpoints are still there answer questions that no run has seen, and so does the model before training.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pandas as pd

ROOT = Path(__file__).resolve().parents[2]
RUNS, KEPT = Path("runs/trials"), Path("notebooks/results/trials")  # below ROOT
SHARED = {"steps": 30, "eval_questions": 112, "eval_every": 0, "max_trace_tokens": 40}
TRAINED_POSTERIOR = {"method": "covrl", "posterior_weight": 1.0}  # the default until it had been tried without
METHODS = {
    "covrl": {"method": "covrl"},
    "published": {"method": "covrl_published"},
    "verifree": {"method": "verifree"},
    "rlpr": {"method": "rlpr"},
    "jlb": {"method": "jlb"},
    "grpo": {"method": "grpo"},
    # One part of the default removed at a time.
    "no_answer_term": {"method": "covrl", "nll_weight": 0.0},
    "prior_only": {"method": "covrl", "alpha": 1.0},
    "c_is_1": {"method": "covrl", "evidence_floor": 0.0},
    # With p(y|x,z)^2 for the evidence.
    "power_2": {"method": "covrl", "evidence_power": 2.0},
    "power_2_prior": {"method": "covrl", "evidence_power": 2.0, "alpha": 1.0},
    # With a posterior that is trained, too: other floors c, other mixtures.
    "posterior_trained": TRAINED_POSTERIOR,
    "no_logarithm": TRAINED_POSTERIOR | {"evidence_floor": 0.0},
    "quarter_floor": TRAINED_POSTERIOR | {"evidence_floor": 0.25},
    "no_norm_clip": TRAINED_POSTERIOR | {"max_grad_norm": 1000.0},
    "floor_of_a_guess": TRAINED_POSTERIOR | {"evidence_floor": 1.0},
    "alpha_adapts": TRAINED_POSTERIOR | {"alpha_rate": 0.3},
    "alpha_quarter": TRAINED_POSTERIOR | {"alpha": 0.25},
    "alpha_three_quarters": TRAINED_POSTERIOR | {"alpha": 0.75},
}
THINGS = "pen cup hat map toy bag box key pie fan".split()


def double_add(random: Random) -> tuple[str, str, str]:
    a, b = random.randint(3, 60), random.randint(2, 40)
    trace = f"{a} + {a} = {2 * a}. {2 * a} + {b} = {2 * a + b}."
    return f"Double {a} and then add {b}. What do you get?", trace, str(2 * a + b)


def compare_sums(random: Random) -> tuple[str, str, str]:
    while True:
        a, b, c, d = (random.randint(2, 30) for _ in range(4))
        s, t = a + b, c + d
        if s != t:
            high, low = max(s, t), min(s, t)
            trace = f"{a} + {b} = {s}. {c} + {d} = {t}. {high} is larger than {low}."
            return f"Which is larger, {a} + {b} or {c} + {d}? Give the larger sum.", trace, str(high)


def middle(random: Random) -> tuple[str, str, str]:
    ordered = sorted(random.sample(range(10, 99), 3))
    shuffled = ordered[:]
    random.shuffle(shuffled)
    question = "Put {}, {} and {} in order. Which number is in the middle?".format(*shuffled)
    return question, "In order: {}, {}, {}.".format(*ordered), str(ordered[1])


# Tasks of two and three steps that chose no setting: taken for the model's accuracy before training, 6 to 13%.
def smallest_plus(random: Random) -> tuple[str, str, str]:
    numbers, more = random.sample(range(10, 90), 3), random.randint(1, 9)
    low = min(numbers)
    question = "Take the smallest of {}, {} and {} and add {}. What do you get?".format(*numbers, more)
    return question, f"The smallest is {low}. {low} + {more} = {low + more}.", str(low + more)


def take_out(random: Random) -> tuple[str, str, str]:
    x, y = random.sample(THINGS, 2)
    a, b, c = random.randint(2, 20), random.randint(2, 20), random.randint(1, 5)
    question = f"A box has {a} {x}s and {b} {y}s. {c} {x}s are taken out. How many {x}s and {y}s are left in all?"
    return question, f"{a} + {b} = {a + b}. {a + b} - {c} = {a + b - c}.", str(a + b - c)


def round_sum(random: Random) -> tuple[str, str, str]:
    a, b = random.randint(11, 89), random.randint(11, 89)
    r, s = ((n + 5) // 10 * 10 for n in (a, b))
    trace = f"{a} becomes {r}. {b} becomes {s}. {r} + {s} = {r + s}."
    return f"Round {a} and {b} to the nearest ten, then add. What is the result?", trace, str(r + s)


FRESH = smallest_plus, take_out, round_sum
# Tasks whose good traces end with the answer.
ENDS_WITH_ANSWER = tuple("arithmetic chained shop double_add smallest_plus take_out round_sum".split())
GENERATED = {task.__name__: task for task in (double_add, compare_sums, middle, *FRESH)}
TASKS = {
    "arithmetic": {"task": "arithmetic"},
    "largest": {"task": "largest_of_three"},
    "chained": {"task": "chained_arithmetic", "difficulty": 1},
    "shop": {"task": "shop", "difficulty": 1},
} | {name: {"task": str(RUNS / f"{name}.jsonl"), "trace_column": "trace"} for name in GENERATED}


ROWS = 1500  # questions of a generated task


def write_tasks() -> None:
    """The generated tasks as JSON lines of question, trace and answer, the same on every machine.

    NAME.jsonl has the questions of training and evaluation, NAME_more.jsonl others.
    """
    RUNS.mkdir(parents=True, exist_ok=True)
    for name, make in GENERATED.items():
        found: dict[str, dict] = {}
        for i in range(4 * ROWS):
            question, trace, answer = make(Random(f"{name}/{i}"))
            found.setdefault(question, {"question": question, "trace": trace, "answer": answer})
        lines = [json.dumps(row) + "\n" for row in found.values()]
        for file, part in ((name, lines[:ROWS]), (f"{name}_more", lines[ROWS:])):
            (RUNS / f"{file}.jsonl").write_text("".join(part), encoding="utf-8")


SCORES = ["example_id", "sample", "answer", "prediction", "score", "finished", "trace_tokens"]
SCORES += ["answer_logp", "no_trace_logp"]
BOUNDS = ["step", "example_id", "source", "answer_logp", "no_trace_logp", "reward"]


def keep_columns(source: Path, target: Path, columns: list[str]) -> None:
    target.parent.mkdir(exist_ok=True)
    pd.read_parquet(source, columns=columns).to_parquet(target, index=False)


def all_traces(folder: Path) -> pd.DataFrame:
    return pd.concat(map(pd.read_parquet, sorted((folder / "traces").glob("*.parquet"))))


def keep_steps(folder: Path, target: Path) -> None:
    """How many traces lead to the answer by true equations, how many by false ones (excuses), and what they earn."""

    def kind(row) -> str:
        if sum(row.answer_logp) < math.log(0.5):
            return "does not lead to the answer"
        equations = re.findall(r"(\d+) ([-+]) (\d+) = (-?\d+)", row.trace)
        right = [int(a) + (int(b) if sign == "+" else -int(b)) == int(c) for a, sign, b, c in equations]
        return "no equation" if not right else "true steps" if all(right) else "excuse"

    traces = all_traces(folder)
    traces["kind"] = [kind(row) for row in traces.itertuples()]
    found = traces.groupby(["source", "kind"])["reward"].agg(traces="size", evidence="sum").reset_index()
    found.to_json(target, orient="records", indent=1)


def keep_following(folder: Path, target: Path) -> None:
    """Whether greedy answers are their traces' last number, and how much of the answer term other traces get."""

    def last(texts: pd.Series) -> pd.Series:
        return texts.str.findall(r"\d+").str[-1].fillna("")

    rows = []
    for file in sorted(folder.glob("evaluations/*.parquet")):
        greedy = pd.read_parquet(file).query("sample < 0")
        found, said = last(greedy["trace"]), greedy["prediction"].str.strip(" .")
        row = {"step": int(file.stem[-5:]), "answers_follow": float((found == said).mean())}
        rows.append(row | {"traces_right": float((found == greedy["answer"]).mean())})
    traces = all_traces(folder)
    wrong, weight = last(traces["trace"]) != traces["answer"], traces["answer_weight"]
    for row, steps in zip(rows, (traces["step"] <= 10, traces["step"] > 20), strict=True):  # at first, and in the end
        total = float(weight[steps].sum())
        row["answer_term_on_wrong_traces"] = float(weight[steps & wrong].sum()) / total if total else None
    target.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def lab(*arguments: str | Path) -> str:
    """Run a command of covrl-lab on one thread; the last line of its error, if there is one."""
    command, environment = [sys.executable, "-m", "covrl_lab", *arguments], os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


def run(name: str, settings: dict) -> str:
    """Train or resume one run, keep its small files; what to print of it."""
    folder = RUNS / name
    flags = [f"--{key}={value}" for key, value in (SHARED | settings | {"run_dir": folder}).items()]
    if problem := lab("train", *flags):
        return f"{name}: {problem}"
    kept = KEPT / name
    kept.mkdir(parents=True, exist_ok=True)
    for file in ("config.json", "metrics.jsonl", "evaluations.jsonl"):
        shutil.copy(folder / file, kept / file)
    for file in folder.glob("evaluations/*.parquet"):
        keep_columns(file, kept / "evaluations" / file.name, SCORES)
    if "-covrl-s" in name and not name.startswith(("largest", "middle")):  # these have no equations
        keep_steps(folder, kept / "steps.json")
    if name.startswith(ENDS_WITH_ANSWER):
        keep_following(folder, kept / "following.json")
    if name.endswith("-covrl-s0"):
        for step in (1, 2, 3):  # what the bounds are worth before anything is learned (notebook 08)
            file = f"traces/step_{step:05d}.parquet"
            keep_columns(folder / file, kept / file, BOUNDS)
    evaluations = [json.loads(line) for line in (kept / "evaluations.jsonl").read_text().splitlines()]
    return f"{name}: " + " to ".join(f"{e['accuracy']:.1%}" for e in evaluations)


def ask_more(name: str, questions: int, step: int) -> str:
    """Let a run that is there answer more questions, keep the scores; what to print of it."""
    folder, task = RUNS / name, name.split("-")[0]
    kept = KEPT / name / "benchmarks" / f"step_{step:05d}.parquet"
    if kept.exists() or not (folder / "checkpoints").exists():
        return f"{name}: {'there' if kept.exists() else 'no checkpoints here'}"
    asked = [f"--eval_task={RUNS / task}_more.jsonl", f"--eval_questions={questions}", f"--step={step}"]
    if problem := lab("evaluate", folder, *asked):
        return f"{name}: {problem}"
    (written,) = (folder / "benchmarks").glob(f"step_{step:05d}-*.parquet")
    keep_columns(written, kept, [*SCORES, "guess_score"])
    return f"{name}: {pd.read_parquet(kept)['score'].mean():.1%} on {questions} more"


def main() -> None:
    """Run what is asked for and not there yet."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS)[:6])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--more", type=int, default=0, help="questions to ask runs that are there")
    given = parser.parse_args()
    os.chdir(ROOT)
    write_tasks()
    left = {
        f"{task}-{method}-s{seed}": TASKS[task] | METHODS[method] | {"seed": seed}
        for seed in given.seeds
        for task in given.tasks
        for method in given.methods
    }
    if given.more:
        untrained = [(f"{task}-{given.methods[0]}-s{given.seeds[0]}", given.more, 0) for task in given.tasks]
        work, items = ask_more, untrained + [(name, given.more, SHARED["steps"]) for name in left]
    else:
        work, items = run, [item for item in left.items() if not (KEPT / item[0]).exists()]
    with ThreadPoolExecutor(given.workers) as pool:
        for line in pool.map(lambda item: work(*item), items):
            print(line, flush=True)


if __name__ == "__main__":
    main()
