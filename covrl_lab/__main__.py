"""``python -m covrl_lab --method covrl --seed 1``: train one run; the flags are the fields of RunConfig."""

import argparse
from dataclasses import fields

from .config import RunConfig
from .types import ConfigError


def main() -> None:
    """Parse the flags, run or resume, and print where the run folder is."""
    parser = argparse.ArgumentParser(prog="python -m covrl_lab", description=__doc__, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # without 60 lines of usage
    for field in fields(RunConfig):
        parser.add_argument(f"--{field.name}", default=argparse.SUPPRESS, metavar=field.type.split(" |")[0])
    known, unknown = parser.parse_known_args()
    settings = vars(known) | {flag.lstrip("-").split("=")[0]: None for flag in unknown[:1]}
    for name, value in settings.items():
        settings[name] = {"None": None, "True": True, "False": False}.get(value, value)
    try:
        config = RunConfig.from_dict(settings)
        from .train.trainer import Trainer  # only now: importing torch takes seconds

        Trainer(config).run()
    except ConfigError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    print(f"Run folder: {config.run_dir}")


if __name__ == "__main__":
    main()
