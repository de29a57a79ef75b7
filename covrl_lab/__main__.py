"""The command line: ``covrl-lab train | sweep | plan | evaluate | compare | report | share``.

Settings are flags with the names of RunConfig's fields: ``covrl-lab train --method covrl --seed 1``. ``--config`` reads
more of them from a YAML file, or from one in ``covrl_lab/configs`` by its name; flags come before the file.
Imports stand inside the commands, so that help and reports start without torch.
"""

import argparse
import inspect
import os
import re
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from .config import RunConfig, field_type, unknown_name
from .files import readable
from .types import ConfigError

_WORDS = {"None": None, "True": True, "False": False}
_EVALUATED = [f.name for f in fields(RunConfig) if f.name.startswith("eval_") and f.name != "eval_every"]
_EVALUATED += ["max_answer_tokens", "device", "dtype"]  # what evaluate may change
_TOKENS = {  # of plan: counts it would estimate
    "prompt_tokens": "of what all prompts share: system text, demonstrations",
    "question_tokens": "of one question",
    "answer_tokens": "of one answer",
    "trace_tokens": "of the mean trace; default: max_trace_tokens",
}
_SHARED = {  # flags of share
    "merged": "also the merged model, for plain transformers",
    "gguf": "also the adapter for llama.cpp",
    "traces": "also all stored traces, as a data set",
    "private": "on the Hub: make new, private repositories",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        """Exit with one sentence instead of a page of usage."""
        self.exit(2, f"{self.prog}: {message}\n")


def train(settings: dict[str, Any], options: argparse.Namespace) -> None:
    """Train one run, or resume it."""
    config = RunConfig.from_dict(settings)
    from .train.checkpoints import repair  # after the settings have been checked: torch takes seconds to import
    from .train.trainer import Trainer

    if options.repair:
        print(*(repair(config.run_dir) or ["nothing to mend"]), sep="\n")
    if not Trainer(config).run().ranks.rank:
        print(f"Run folder: {config.run_dir}")


def sweep(settings: dict[str, Any], options: argparse.Namespace) -> int:
    """Train a grid of runs, or resume it."""
    from .runs.sweep import Sweep, listed

    grid = {}
    for argument in options.grid:
        name, _, values = argument.partition("=")
        grid[name] = [_WORDS.get(value, value) for value in listed(values)]
    more = {name: getattr(options, name) for name in ("notebook", "threads", "timeout_minutes")}
    runs = Sweep(options.folder, settings or None, grid or None, **more)
    if options.retry:
        runs.retry()
    try:
        table = runs.run(workers=options.workers)
    except RuntimeError as error:
        raise ConfigError(str(error)) from error
    print(table.to_string(index=False))
    return int((table["status"] != "done").any())


def plan(settings: dict[str, Any], options: argparse.Namespace) -> None:
    """Estimate memory and seconds a step before a run, here or on another --device, such as rtx4090 or h100-80."""
    from .train.plan import plan as estimate

    tokens = {name: value for name in _TOKENS if (value := getattr(options, name)) is not None}
    device = settings.pop("device", "auto")
    print(estimate(RunConfig.from_dict(settings), device=device, **tokens).table())


def evaluate(settings: dict[str, Any], options: argparse.Namespace) -> None:
    """Evaluate a stored checkpoint of a run on other questions; the run's own evaluations stay."""
    from .train.benchmark import evaluate_checkpoint

    record, path = evaluate_checkpoint(options.run_dir, settings, options.step)
    told = ((name, value) for name, value in record.items() if name != "settings")
    print(*(f"{name:48} {value:{'.4g' if isinstance(value, float) else ''}}" for name, value in told), sep="\n")
    print(f"Appended to: {path}")


def compare(settings: dict[str, Any], options: argparse.Namespace) -> None:
    """Tables that compare run folders: accuracy, paired differences, probability of improvement."""
    from .runs import compare as tables
    from .views.comparison import export, readable

    methods = tables.find_runs(", ".join(options.runs))
    scores = tables.scores(methods)
    print(tables.listed(methods), end="\n\n")
    resampling = tables.Resampling(options.over)
    found = {"final_accuracy": tables.performance(scores, resampling)}
    if scores["method"].nunique() > 1:
        found["paired_differences"] = tables.paired_differences(scores, options.reference, resampling)
        found["improvement"] = tables.probability_of_improvement(scores, options.reference, resampling)
    for name, table in found.items():
        print(f"{name}\n{readable(table).to_string(index=False)}\n")
        if options.export:
            print(*export(table, options.export, name), "", sep="\n")


def report(settings: dict[str, Any], options: argparse.Namespace) -> None:
    """Write one HTML file that shows a run."""
    from .views.report import report as write

    print(f"Report: {write(options.run_dir, options.out)}")


def share(settings: dict[str, Any], options: argparse.Namespace) -> None:
    """Share a run's adapter with a model card, in a folder or on the Hugging Face Hub."""
    from .train.sharing import share as write

    wanted = {name: getattr(options, name) for name in ("step", *_SHARED)}
    print(f"Shared: {write(options.run_dir, options.out, **wanted)}")


def described() -> dict[str, tuple[str, str]]:
    """What each setting is, from the comments in ``RunConfig``: name -> (section, text)."""
    found, section, above = {}, "", ""
    with suppress(OSError):  # an installation without sources
        for line in inspect.getsource(RunConfig).splitlines():
            if line.startswith("    # --- "):
                section = line[10:]
            elif line.startswith("    # "):
                above = line[6:]
            elif field := re.match(r"    (\w+): .*? = .*?(?:  # (.*))?$", line):
                found[field[1]], above = (section, field[2] or above), ""
    return found


def _parser() -> _Parser:
    parser = _Parser(prog="covrl-lab", description="Train and look at CoVRL runs.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    own = {}
    for command in (train, sweep, plan, evaluate, compare, report, share):
        text = command.__doc__
        own[command] = commands.add_parser(command.__name__, help=text, description=text, allow_abbrev=False)
        own[command].set_defaults(run=command, parser=own[command])
    own[train].add_argument("--repair", action="store_true", help="first mend damaged metrics and evaluations")
    add = own[sweep].add_argument
    add("folder", help="holds the runs; without further settings, they resume")
    add("--grid", action="append", default=[], metavar="NAME=VALUE,VALUE", help="what varies; repeatable")
    add("--workers", type=int, default=1, help="runs at once")
    add("--threads", type=int, help="of each run; default: cores / workers")
    add("--timeout_minutes", type=float, help="of a run")
    add("--notebook", help="papermill target; default: 03_train.ipynb")
    add("--retry", action="store_true", help="also run again what failed")
    add = own[compare].add_argument
    add("runs", nargs="+", help="run folders or patterns, optionally as 'NAME: PATTERN'")
    add("--reference", default="", help="method to compare with; default: all pairs")
    add("--over", default="both", help="what intervals draw anew: seeds, questions or both")
    add("--export", metavar="FOLDER", help="also write the tables as CSV and Markdown")
    add = own[report].add_argument
    add("run_dir")
    add("out", nargs="?", help="HTML file to write; default: report.html in the run folder")
    add = own[share].add_argument
    add("run_dir")
    add("out", help="a new folder, or hub:OWNER/NAME")
    add("--step", type=int, help="of the checkpoint; default: the last")
    for name, text in _SHARED.items():
        add(f"--{name}", action="store_true", help=text)
    add = own[evaluate].add_argument
    add("run_dir", help="a run folder, or hub:OWNER/NAME, kept in runs/hub")
    add("--step", type=int, help="of the checkpoint; default: the last; 0: before training")
    for name, text in _TOKENS.items():
        own[plan].add_argument(f"--{name}", type=int, metavar="int", help=text)
    about = described()
    for command in (train, sweep, plan, evaluate):
        if command is not evaluate:
            own[command].add_argument("--config", metavar="FILE", help="YAML file of settings, or covrl-7b")
        groups = {}
        for field in fields(RunConfig):
            if command is evaluate and field.name not in _EVALUATED:
                continue
            kind, _, choices, _ = field_type(field)
            shown = "{" + ",".join((kind.__name__,) * (kind is not str) + choices) + "}" if choices else kind.__name__
            section, text = about.get(field.name, ("settings", ""))
            if field.default is not None and command is not evaluate:
                text += f" (default: {field.default})"
            if section not in groups:
                groups[section] = own[command].add_argument_group(section)
            how = {"default": argparse.SUPPRESS, "metavar": shown, "help": text.replace("%", "%%")}
            groups[section].add_argument(f"--{field.name}", **how)
        places = "".join(f" {flag.dest}" for flag in own[command]._actions if not flag.option_strings)
        own[command].usage = f"%(prog)s{places} [--SETTING VALUE ...]"
    return parser


def _read_config(name: str) -> dict[str, Any]:
    """Settings of a YAML file, or of one that comes with the package."""
    import yaml

    own = Path(__file__).with_name("configs") / f"{name}.yaml"
    with readable(f"--config {name!r}", "give a YAML file, or covrl-7b", "holds no settings"):
        return dict(yaml.safe_load((own if own.is_file() else Path(name)).read_text(encoding="utf-8")))


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt(number)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments and run the command; a ConfigError is one line on stderr and exit status 2.

    Ctrl-C, SIGTERM and SIGHUP (what Slurm and a closing terminal send) end it alike: the trainer drops the step in
    hand and saves, and the exit status is 130, 143 or 129.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    if arguments and arguments[0].startswith("--") and arguments[0] != "--help":
        parser.error("a command comes first; to train a run use: covrl-lab train " + arguments[0] + " ...")
    options, unknown = parser.parse_known_args(arguments)
    given = {field.name: getattr(options, field.name, None) for field in fields(RunConfig)}
    settings = {name: _WORDS.get(value, value) for name, value in given.items() if value is not None}
    try:
        if unknown:
            name = unknown[0].lstrip("-").split("=")[0]
            valid = [flag.dest for flag in options.parser._actions if flag.option_strings and flag.dest != "help"]
            raise unknown_name("setting", name, valid)
        several = "RANK" in os.environ and int(os.environ.get("WORLD_SIZE") or 1) > 1
        if several and (options.command != "train" or options.repair):
            raise ConfigError("only train, without --repair, runs on several processes; use no launcher for this")
        for number in {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:  # Windows has no SIGHUP
            if signal.getsignal(number) is signal.SIG_DFL:  # nohup has it ignored
                signal.signal(number, _interrupt)
        if config := getattr(options, "config", None):
            settings = _read_config(config) | settings
        status = options.run(settings, options) or 0
    except (ConfigError, OSError) as error:
        options.parser.error(str(error))
    except KeyboardInterrupt as error:
        number = signal.Signals(error.args[0] if error.args else signal.SIGINT)
        resume = "; the same command resumes it" if options.command in ("train", "sweep") else ""
        print(f"{options.parser.prog}: ended by {number.name}{resume}", file=sys.stderr)
        status = 128 + number
    sys.exit(status)


if __name__ == "__main__":
    main()
