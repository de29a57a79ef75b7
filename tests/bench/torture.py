"""``make torture``: runs are killed at random and at every write, and load is measured; prints a table.

    python -m tests.bench.torture --kills 200 --traces 100000 --runs 200 --steps 2000

Every killed run is resumed until it is done. Then its folder is compared with that of a run that nobody killed, byte
for byte, every file of it, and none may be left over. Clocks and memory in the metrics are left out, see ``finished``.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers import TRAINED, checkout_environment, contents, flags, made_up_run, make_trainer, numbers  # noqa: E402

from covrl_lab import TraceExplorer, load_run  # noqa: E402
from covrl_lab.files import locked  # noqa: E402
from covrl_lab.runs import compare  # noqa: E402
from covrl_lab.runs.folder import step_file  # noqa: E402

RUN = TRAINED | {"checkpoint_every": 2}
# Kills this process before or after its n-th write, rename or removal.
INJECTED = """
import os, shutil, signal, sys
from pathlib import Path
left = [int(sys.argv[1])]
def at_each(owner, name):
    working = getattr(owner, name)
    def call(*arguments, **more):
        for moment in (0, 1):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            if not moment:
                result = working(*arguments, **more)
        return result
    setattr(owner, name, call)
import covrl_lab.train.checkpoints as checkpoints
for owner, name in ((os, "replace"), (os, "unlink"), (shutil, "rmtree"), (Path, "write_bytes"), (Path, "write_text"),
                    (checkpoints, "save_file"), (checkpoints, "save_adapter")):
    at_each(owner, name)
from covrl_lab import RunConfig, Trainer
Trainer(RunConfig(**SETTINGS), progress=False).run()
"""


# These say when a run was worked on, by whom, and in how many attempts: they must be there, and may differ.
ATTEMPTS = {"lock", "log.txt", "done.json", "notebook.ipynb"}


def finished(folder: Path) -> dict[str, bytes]:
    """name -> bytes of every file below a folder; without the folder's own name, clocks and memory in them."""
    found = contents(folder)
    for name in found:
        path = folder / name
        if path.name == "metrics.jsonl":
            found[name] = "\n".join(numbers(path.parent)).encode()
        found[name] = b"" if path.name in ATTEMPTS else found[name].replace(str(folder).encode(), b"")
    return found


def difference(folder: Path, whole: dict[str, bytes]) -> list[str]:
    """Names of files that differ from those of the folder that nobody killed, are missing or are left over."""
    found = finished(folder)
    return sorted(name for name in found | whole if found.get(name) != whole.get(name))


def kill_runs(folder: Path, count: int) -> list[tuple[str, str]]:
    """Rows: half of the kills at random moments, half at writes, each followed by a resume to the end."""
    chance, whole, started = random.Random(0), folder / "whole", time.monotonic()
    train, quiet = [sys.executable, "-m", "covrl_lab", "train"], {"stdout": subprocess.DEVNULL}
    quiet |= {"stderr": subprocess.DEVNULL, "env": checkout_environment()}
    subprocess.run([*train, *flags(RUN | {"run_dir": str(whole)})], check=True, **quiet)
    took, whole = time.monotonic() - started, finished(whole)
    counts, bad = {"at random": 0, "at a write": 0}, []
    rounds = 0
    while sum(counts.values()) < count:
        rounds += 1
        run, kind = folder / f"killed{rounds}", list(counts)[rounds % 2]
        settings = RUN | {"run_dir": str(run)}
        while True:
            code = INJECTED.replace("SETTINGS", repr(settings))
            injected = kind == "at a write" and sum(counts.values()) < count
            command = [sys.executable, "-c", code, str(chance.randrange(1, 150))]
            if not injected:
                command = [*train, *flags(settings)]
            process = subprocess.Popen(command, **quiet)
            if kind == "at random" and sum(counts.values()) < count:
                try:
                    process.wait(chance.uniform(0.3 * took, took))  # most of the rest is spent on imports
                except subprocess.TimeoutExpired:
                    process.kill()
            if process.wait() == -signal.SIGKILL:
                counts[kind] += 1
            elif process.returncode:
                bad.append(f"exit {process.returncode}")
                break
            else:
                break
        bad += difference(run, whole)[:1]
        shutil.rmtree(run)
    said = f"{rounds} folders, {len(bad)} differ" + (f": {', '.join(bad[:5])}" if bad else "")
    return [(f"{counts['at random']} kills at random moments, {counts['at a write']} at writes", said)]


def kill_commands(folder: Path, count: int) -> list[tuple[str, str]]:
    """Rows: the other commands that write, or a sweep's workers, killed at random moments, then run to the end."""
    chance, rows, run, sweep = random.Random(1), [], folder / "evaluated", folder / "sweep"
    make_trainer(run, RUN).run()
    shared = flags({name: value for name, value in RUN.items() if name != "seed"})
    grid = ["sweep", str(sweep), "--grid=seed=0,1", "--workers=2", "--threads=1", *shared]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": checkout_environment()}

    def a_worker() -> list[int]:
        found = [json.loads(path.read_text())["pid"] for path in sweep.glob("*/lock") if locked(path)]
        return [chance.choice(found)] if found else []

    for what, place, made, arguments in (
        ("covrl-lab sweep", sweep, (".",), grid),
        ("a worker of covrl-lab sweep", sweep, (".",), [*grid, "--retry"]),
        ("covrl-lab evaluate", run, ("benchmarks", "benchmarks.jsonl"), ["evaluate", str(run), "--eval_questions=40"]),
        ("covrl-lab report", run, ("report.html",), ["report", str(run)]),
    ):
        command, kills, differ, times = [sys.executable, "-m", "covrl_lab", *arguments], 0, [], 0
        of_workers = what.startswith("a worker")
        started = time.monotonic()
        subprocess.run(command, check=True, **quiet)
        took, whole = time.monotonic() - started, finished(place)
        while kills < count:
            for path in (place / part for part in made):  # begin anew
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            code, times = None, times + 1
            while code != 0:
                process = subprocess.Popen(command, **quiet)
                if kills < count:
                    try:
                        process.wait(chance.uniform(0.3 * took, took))
                    except subprocess.TimeoutExpired:
                        for pid in a_worker() if of_workers else [process.pid]:
                            os.kill(pid, signal.SIGKILL)
                            kills += 1
                code = process.wait()
                if code not in (0, 1 if of_workers else -signal.SIGKILL):
                    raise RuntimeError(f"{' '.join(command)} ended with exit status {code}")
            differ += difference(place, whole)
        said = f"{times} folders of {len(whole)} files, "
        said += f"differ: {', '.join(differ)}" if differ else "no file differs"
        rows.append((f"{kills} kills of {what}", said))
    return rows


def many_traces(folder: Path, count: int) -> list[tuple[str, str]]:
    """Rows: a run folder of ``count`` traces in files of 16."""
    run = made_up_run(folder / "many", steps=1, length=64)
    table = pq.read_table(step_file(run.path / "traces", 1))
    place, rows = table.schema.get_field_index("step"), np.ones(table.num_rows, int)
    for step in range(2, count // 16 + 1):
        pq.write_table(table.set_column(place, "step", [step * rows]), step_file(run.path / "traces", step))
    found = []
    for name in ("first", "again"):
        started = time.process_time()
        TraceExplorer(run)
        found.append((f"explorer over {count:,} traces, {name}", f"{time.process_time() - started:.1f} s of one core"))
    return found


def many_runs(folder: Path, count: int) -> list[tuple[str, str]]:
    """A row: ``count`` runs compared."""
    whole = make_trainer(folder / "compared", RUN, seed=0).run().run_dir
    for seed in range(count):
        copy = shutil.copytree(whole, folder / "runs" / f"s{seed}")
        text = (copy / "config.json").read_text()
        (copy / "config.json").write_text(text.replace('"seed": 0', f'"seed": {seed}'))
    started = time.process_time()
    compare.performance(compare.scores(compare.find_runs(str(folder / "runs" / "*"))), compare.Resampling("both"))
    return [(f"{count} runs compared", f"{time.process_time() - started:.1f} s of one core")]


def many_steps(folder: Path, count: int) -> list[tuple[str, str]]:
    """Rows: memory, open files and time of a step over a long run of the tiny model."""

    def state() -> tuple[float, int]:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the allocator keeps for later comes and goes by 30 MiB
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 2**20, len(os.listdir("/proc/self/fd"))

    seconds, states = [], []
    settings = RUN | {"steps": count, "eval_every": 0, "checkpoint_every": 100, "max_trace_tokens": 6}
    for record in make_trainer(folder / "long", settings):
        seconds.append(record.seconds)
        if record.step % max(1, count // 10) == 0:
            states.append(state())
    tenth = max(1, count // 10)
    assert load_run(folder / "long").metrics["step"].is_monotonic_increasing
    return [
        (f"{count} steps: memory after a tenth, at the end", f"{states[0][0]:.0f}, {states[-1][0]:.0f} MiB"),
        ("open files", f"{states[0][1]}, {states[-1][1]}"),
        ("median step", f"{1e3 * np.median(seconds[:tenth]):.0f}, {1e3 * np.median(seconds[-tenth:]):.0f} ms"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    measures = {"kills": (kill_runs, 200), "others": (kill_commands, 20), "traces": (many_traces, 100_000)}
    measures |= {"runs": (many_runs, 200), "steps": (many_steps, 2000)}
    for name, (_, count) in measures.items():
        parser.add_argument(f"--{name}", type=int, default=count, help="0: leave it out")
    wanted = vars(parser.parse_args())
    with tempfile.TemporaryDirectory(prefix="torture") as folder:
        for name, (measure, _) in measures.items():
            for what, said in measure(Path(folder), wanted[name]) if wanted[name] else ():
                print(f"| {what} | {said} |", flush=True)


if __name__ == "__main__":
    main()
