"""Run folders of random traces, for tests of what reads them."""

import json

import numpy as np
import pandas as pd

from covrl_lab import load_run
from covrl_lab.runs.folder import step_file, write_parquet


def made_up_run(folder, steps=2, questions=4, rollouts=4, length=6, **changes):
    """A run folder of random traces, written without the trainer."""
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model": "tiny", "alpha": 0.5, "composite_weight": 0.5}))
    for step in range(1, steps + 1):
        rows = []
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
        write_parquet(pd.DataFrame(rows), step_file(folder / "traces", step))
    return load_run(folder)
