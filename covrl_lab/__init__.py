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
    "Ablation": "views.ablation",
    "ConfigError": "types",
    "EstimatorPanel": "theory.views",
    "Example": "types",
    "MixingRatio": "views.mixing",
    "PromptBench": "views.bench",
    "RunConfig": "config",
    "RunMonitor": "views.monitor",
    "Sweep": "runs.sweep",
    "TraceExplorer": "views.explorer",
    "Trainer": "train.trainer",
    "World": "theory.world",
    "accuracy_table": "views.html",
    "bootstrap_interval": "runs.stats",
    "check_parameters": "config",
    "describe_cost": "views.sweep_cost",
    "export": "views.comparison",
    "limit_cells": "runs.worker",
    "load_policy": "train.models",
    "load_run": "runs.folder",
    "load_task": "train.tasks",
    "measure_device": "train.plan",
    "open_model": "train.opening",
    "plan": "train.plan",
    "plot_against_alpha": "views.comparison",
    "plot_answer_logprobs": "views.figures",
    "plot_coherence": "views.token_figures",
    "plot_evaluation_curve": "views.figures",
    "plot_gradient_quality": "theory.views",
    "plot_intervals": "views.comparison",
    "plot_kl_estimators": "theory.views",
    "plot_ratio_range": "theory.views",
    "plot_responsibility": "theory.views",
    "plot_token_comparison": "views.token_figures",
    "plot_training_curves": "views.figures",
    "probe": "train.probe",
    "readable": "views.comparison",
    "report": "views.report",
    "sweep_curves": "views.ablation",
    "sweep_results": "views.ablation",
    "token_html": "views.token_view",
    "trace_table": "views.html",
}
# Modules whose functions are used by the module's name.
_MODULES = {
    "compare": "runs.compare",
    "estimators": "theory.estimators",
    "reweight": "runs.reweight",
}
__all__ = [*_HOME, *_MODULES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f".{_MODULES[name]}", __name__)
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
