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

# Public names by the module that holds them, which is imported on first use: looking at runs never imports torch.
_NAMES = {
    "config": "RunConfig check_parameters enter_project",
    "runs.folder": "load_run",
    "runs.stats": "bootstrap_interval",
    "runs.sweep": "Sweep",
    "runs.worker": "limit_cells",
    "theory.views": "EstimatorPanel plot_group_splits",
    "theory.world": "World",
    "train.benchmark": "evaluate_checkpoint",
    "train.models": "load_policy",
    "train.opening": "open_model",
    "train.plan": "measure_device plan",
    "train.probe": "probe",
    "train.sharing": "share",
    "train.tasks": "load_task",
    "train.trainer": "Trainer",
    "types": "ConfigError Example",
    "views.ablation": "Ablation describe_cost sweep_curves sweep_results",
    "views.bench": "PromptBench",
    "views.comparison": "export plot_against_alpha plot_intervals plot_value_by_use readable",
    "views.evaluations": "EvaluationBrowser",
    "views.explorer": "TraceExplorer",
    "views.figures": "plot_answer_logprobs plot_evaluation_curve plot_training_curves",
    "views.html": "accuracy_table reward_unit trace_table",
    "views.mixing": "MixingRatio",
    "views.monitor": "RunMonitor",
    "views.report": "report",
    "views.run_browser": "RunBrowser list_runs",
    "views.side_by_side": "TraceComparison",
    "views.token_figures": "plot_coherence plot_token_comparison",
    "views.token_view": "token_html",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}
# Modules whose functions are used by the module's name.
_MODULES = {"compare": "runs.compare", "estimators": "theory.estimators", "reweight": "runs.reweight"}
__all__ = [*_HOME, *_MODULES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f".{_MODULES[name]}", __name__)
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
