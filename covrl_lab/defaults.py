"""What each method's settings are by default, and which of them it reads; papers beside them.

The credit functions are in ``train/methods.py``, the losses in ``train/objectives.py``.
"""

from typing import Any

# What holds unless a method says otherwise.
_COMMON = {
    "alpha": 1.0,
    "composite_weight": 1.0,
    "reward": "sum_logprob",
    "baseline": "leave_one_out",
    "advantage_scale": "none",
    "advantage_clip": 0.0,
    "clip": "none",
    "clip_range": 0.3,
    "clip_range_high": 0.3,
    "kl_weight": 0.0,
    "nll_weight": 1.0,
    "nll_gate": "none",
    "n_sample": 1,
    "loss_aggregation": "trace_sum",
    "reference_kl_weight": 0.0,
    "std_filter": 0.0,
    "alpha_rate": 0.0,
    "evidence_power": 1.0,
    "evidence_floor": 0.0,
    "posterior_weight": 0.0,
}
_CLIPPED = {"clip": "ppo", "clip_range": 0.2, "clip_range_high": 0.2}
# Rewards centred and scaled in their group, as GRPO has it.
_GRPO = _CLIPPED | {"baseline": "mean", "advantage_scale": "std", "loss_aggregation": "token_mean"}
_WIDE = {"clip_range": 0.3, "clip_range_high": 0.3}

_OWN: dict[str, dict[str, Any]] = {
    # CoVRL with the group bound (METHODS.md): the posterior's prompt proposes traces, the prior alone is trained.
    "covrl": _CLIPPED | {"alpha": 0.5, "evidence_floor": 0.5, "reward": "probability", "baseline": "none"},
    # arXiv 2512.12576. kl_weight and nll_weight are not stated there; METHODS.md says how ours were found.
    "covrl_published": _GRPO
    | _WIDE
    | {"alpha": 0.5, "composite_weight": 0.5, "kl_weight": 0.3, "nll_weight": 0.3, "nll_gate": "prior_positive"},
    # arXiv 2503.19618: advantages divided by their deviation and clipped to +-1; answer term 0 to 0.01 for
    # short answers, 1 for long ones.
    "jlb": {"advantage_scale": "std", "advantage_clip": 1.0, "nll_weight": 0.01, "loss_aggregation": "token_mean"},
    # arXiv 2505.21493: plain REINFORCE with leave-one-out baseline, answer term weighted by the reward.
    "verifree": {"reward": "probability", "nll_gate": "reward"},
    # arXiv 2411.04282: KL to the frozen base inside the reward, weight 0.05.
    "latro": {"reference_kl_weight": 0.05},
    # arXiv 2506.18254: GRPO on the mean token probability, clip 0.2 / 0.27, no answer term.
    "rlpr": _GRPO | {"reward": "mean_probability", "clip_range_high": 0.27, "nll_weight": 0.0, "std_filter": 0.5},
    # arXiv 2510.25206 (full text not public): our reading, the posterior-only bound, w -> 0.
    "ravr_like": _GRPO | {"alpha": 0.0, "composite_weight": 0.0, "kl_weight": 0.3, "nll_weight": 0.3},
    # arXiv 2402.03300, with a verifier: the upper reference.
    "grpo": _GRPO | {"reward": "verdict", "nll_weight": 0.0},
}
METHOD_DEFAULTS: dict[str, dict[str, Any]] = {name: _COMMON | own for name, own in _OWN.items()}

_CLIP = "clip clip_range clip_range_high"
_ADVANTAGE = "baseline advantage_scale advantage_clip"
_LIKELIHOOD = f"alpha reward {_ADVANTAGE} {_CLIP} nll_weight loss_aggregation unfinished_penalty"
_COMPOSITE = "composite_weight kl_weight kl_gradient"
# Settings that a method reads; any other is refused, so that no run records what had no effect.
METHOD_SETTINGS: dict[str, frozenset[str]] = {
    name: frozenset(settings.split())
    for name, settings in {
        "covrl": f"alpha alpha_rate evidence_power evidence_floor posterior_weight nll_weight {_CLIP}",
        "covrl_published": f"{_LIKELIHOOD} nll_gate {_COMPOSITE}",
        "jlb": f"{_LIKELIHOOD} nll_gate n_sample",
        "verifree": f"{_LIKELIHOOD} nll_gate",
        "latro": f"{_LIKELIHOOD} reference_kl_weight",
        "rlpr": f"alpha {_ADVANTAGE} {_CLIP} loss_aggregation std_filter",
        "ravr_like": f"{_LIKELIHOOD} nll_gate {_COMPOSITE}",
        "grpo": f"alpha {_ADVANTAGE} {_CLIP} loss_aggregation",
    }.items()
}
# What these are where nobody reads them; the others come from METHOD_DEFAULTS.
UNREAD = {"kl_gradient": "exact", "unfinished_penalty": 1.0}


def settings_read(method: str, settings: dict[str, Any]) -> dict[str, Any]:
    """``settings`` without those that belong to other methods only."""
    others = (METHOD_DEFAULTS[method].keys() | UNREAD.keys()) - METHOD_SETTINGS[method]
    return {name: value for name, value in settings.items() if name not in others}
