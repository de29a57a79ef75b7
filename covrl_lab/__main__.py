"""The command line: ``covrl-lab train | sweep | plan | compare | report``.

Settings are flags with the names of RunConfig's fields: ``covrl-lab train --method covrl --seed 1``.
Imports stand inside the commands, so that help and reports start without torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from .config import RunConfig, field_type
from .types import ConfigError, did_you_mean

_WORDS = {"None": None, "True": True, "False": False}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        """Exit with one sentence instead of a page of usage."""
        self.exit(2, f"{self.prog}: {message}\n")


def train(settings: dict[str, Any], options: argparse.Namespace) -> int:
    """Train one run, or resume it."""
    config = RunConfig.from_dict(settings)
    from .train.trainer import Trainer  # after the settings have been checked: torch takes seconds to import

    Trainer(config).run()
    print(f"Run folder: {config.run_dir}")
    return 0


def sweep(settings: dict[str, Any], options: argparse.Namespace) -> int:
    """Train a grid of runs, or resume it."""
    from .runs.sweep import Sweep, listed

    grid = {}
    for argument in options.grid:
        name, _, values = argument.partition("=")
        grid[name] = [_WORDS.get(value, value) for value in listed(values)]
    runs = Sweep(
        options.folder,
        settings or None,
        grid or None,
        notebook=options.notebook,
        threads=options.threads,
        timeout_minutes=options.timeout_minutes,
    )
    if options.retry:
        runs.retry()
    try:
        table = runs.run(workers=options.workers)
    except KeyboardInterrupt:
        print("interrupted; the same command resumes the sweep", file=sys.stderr)
        return 130
    print(table.to_string(index=False))
    return int((table["status"] != "done").any())


def plan(settings: dict[str, Any], options: argparse.Namespace) -> int:
    """Estimate memory and seconds a step, before a run."""
    from .train.plan import plan as estimate

    names = ("prompt_tokens", "question_tokens", "answer_tokens", "trace_tokens")
    tokens = {name: value for name in names if (value := getattr(options, name)) is not None}
    device = settings.pop("device", "auto")
    print(estimate(RunConfig.from_dict(settings), device=device, **tokens).table())
    return 0


def compare(settings: dict[str, Any], options: argparse.Namespace) -> int:
    """Tables that compare run folders: accuracy, paired differences, probability of improvement."""
    from .runs import compare as tables
    from .views.comparison import export, readable

    scores = tables.scores(tables.find_runs(", ".join(options.runs)))
    resampling = tables.Resampling(options.over)
    found = {"final_accuracy": tables.performance(scores, resampling)}
    if scores["method"].nunique() > 1:
        found["paired_differences"] = tables.paired_differences(scores, options.reference, resampling)
        found["improvement"] = tables.probability_of_improvement(scores, options.reference, resampling)
    for name, table in found.items():
        print(f"{name}\n{readable(table).to_string(index=False)}\n")
        if options.export:
            print(*export(table, options.export, name), "", sep="\n")
    return 0


def report(settings: dict[str, Any], options: argparse.Namespace) -> int:
    """Write one HTML file that shows a run."""
    from .views.report import report as write

    print(f"Report: {write(options.run_dir, options.out)}")
    return 0


def _parser() -> tuple[_Parser, dict[str, _Parser]]:
    """The parser and those of its commands."""
    parser = _Parser(prog="covrl-lab", description="Train and look at CoVRL runs.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    found = {}
    for command in (train, sweep, plan, compare, report):
        found[command.__name__] = own = commands.add_parser(
            command.__name__, help=command.__doc__, description=command.__doc__, allow_abbrev=False
        )
        own.set_defaults(run=command)
    own = found["sweep"]
    own.add_argument("folder", help="holds the runs; without further settings, they resume")
    own.add_argument("--grid", action="append", default=[], metavar="NAME=VALUE,VALUE")
    own.add_argument("--workers", type=int, default=1, help="runs at once")
    own.add_argument("--threads", type=int, help="of each run; default: cores / workers")
    own.add_argument("--timeout_minutes", type=float, help="of a run")
    own.add_argument("--notebook", help="papermill target; default: 03_train.ipynb")
    own.add_argument("--retry", action="store_true", help="also run again what failed")
    own = found["plan"]
    for name in ("prompt_tokens", "question_tokens", "answer_tokens", "trace_tokens"):
        own.add_argument(f"--{name}", type=int, metavar="int")
    own = found["compare"]
    own.add_argument("runs", nargs="+", help="run folders or patterns, optionally as 'NAME: PATTERN'")
    own.add_argument("--reference", default="", help="method to compare with; default: all pairs")
    own.add_argument("--over", default="both", help="what intervals draw anew: seeds, questions or both")
    own.add_argument("--export", metavar="FOLDER", help="also write the tables as CSV and Markdown")
    own = found["report"]
    own.add_argument("run_dir")
    own.add_argument("out", nargs="?", help="HTML file to write; default: report.html in the run folder")
    for name in ("train", "sweep", "plan"):
        for field in fields(RunConfig):
            kind, _, choices, _ = field_type(field)
            shown = "{" + ",".join(choices) + "}" if choices else kind.__name__
            found[name].add_argument(f"--{field.name}", default=argparse.SUPPRESS, metavar=shown)
    return parser, found


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments and run the command; a ConfigError is one line on stderr and exit status 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser, commands = _parser()
    if arguments and arguments[0].startswith("--") and arguments[0] != "--help":
        parser.error("a command comes first; to train a run use: covrl-lab train " + arguments[0] + " ...")
    options, unknown = parser.parse_known_args(arguments)
    own = commands[options.command]
    names = [field.name for field in fields(RunConfig)]
    settings = {name: _WORDS.get(v, v) for name, v in vars(options).items() if name in names}
    if options.command == "report":
        settings = {}  # its run_dir is the folder to show
    try:
        if unknown:
            name = unknown[0].lstrip("-").split("=")[0]
            valid = [flag.dest for flag in own._actions if flag.option_strings and flag.dest != "help"]
            raise ConfigError(f"unknown setting {name!r}{did_you_mean(name, valid)}")
        status = options.run(settings, options)
    except (ConfigError, RuntimeError) as error:
        if not isinstance(error, ConfigError) and options.command != "sweep":
            raise
        own.error(str(error))
    sys.exit(status)


if __name__ == "__main__":
    main()
