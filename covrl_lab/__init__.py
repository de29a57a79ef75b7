"""covrl_lab: a research workbench for CoVRL, reinforcement learning for reasoning without a verifier."""

import logging
import os
from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# On some CPUs bitsandbytes warns at import that an optional kernel package is missing; results are the same.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# Threads that wait should soon sleep. Alone on two cores, a moment of spinning makes decoding a fifth faster;
# beside one other busy process, spinning for long makes a step several times slower. Read when torch is first
# imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

# Resolved on first use, so that looking at run folders never imports torch.
_HOME = {
    "ConfigError": "types",
    "Example": "types",
    "RunConfig": "config",
    "Sweep": "runs.sweep",
    "Trainer": "train.trainer",
    "check_parameters": "config",
    "load_policy": "train.models",
    "load_run": "runs.folder",
    "load_task": "train.tasks",
    "open_model": "train.opening",
    "probe": "train.probe",
    "report": "views.report",
}
__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
