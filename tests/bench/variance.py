"""Gradient variance of the methods at equal numbers of rollouts, on one language-model batch.

``python -m tests.bench.variance`` prints the table; ``--help`` lists its settings.

For each method the same questions get fresh traces ``repeats`` times. With g_r the LoRA gradient of repeat r,
S their mean and V = sum_r |g_r - S|^2 / (repeats - 1) the total variance, the table shows the noise-to-signal
ratio V / |E g|^2 with |E g|^2 estimated without bias by |S|^2 - V / repeats. It does not depend on a method's
scale, which V alone does.
"""

from __future__ import annotations

import argparse
import tempfile

import pandas as pd
import torch
from tqdm.auto import tqdm

from covrl_lab.config import RunConfig
from covrl_lab.defaults import METHOD_DEFAULTS
from covrl_lab.train.trainer import Trainer


def gradient_noise(trainer: Trainer, repeats: int, progress: bool = True) -> dict[str, float]:
    """Noise-to-signal ratio and its parts for one set-up trainer; no weight changes.

    Keys: signal (|E g|^2 estimate), variance (V), noise_to_signal (V / signal; infinite where the signal
    cannot be told from zero), rollouts (of one gradient).
    """
    total = squares = None
    for r in tqdm(range(repeats), desc=trainer.config.method, disable=not progress, leave=False):
        _, prompts, batch = trainer.sample(step=0, draw=r)
        trainer.backward(prompts, batch)
        gradient = torch.cat([p.grad.flatten() for _, p in trainer.policy.trainable()]).double()
        total = gradient if total is None else total + gradient
        squares = float(gradient.square().sum()) + (squares or 0.0)
    mean = total / repeats
    variance = (squares - repeats * float(mean.square().sum())) / (repeats - 1)
    signal = float(mean.square().sum()) - variance / repeats
    return {
        "rollouts": trainer.config.questions_per_step * trainer.config.rollouts_per_question,
        "signal": signal,
        "variance": variance,
        "noise_to_signal": variance / signal if signal > 0 else float("inf"),
    }


def main() -> None:
    """Measure every method and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--task", default="arithmetic")
    parser.add_argument("--questions", type=int, default=4, help="questions in the batch")
    parser.add_argument("--rollouts", type=int, default=4, help="traces of each question")
    parser.add_argument("--repeats", type=int, default=12, help="gradients a method")
    arguments = parser.parse_args()
    rows = {}
    for method in METHOD_DEFAULTS:
        with tempfile.TemporaryDirectory() as folder:
            config = RunConfig(
                model=arguments.model,
                task=arguments.task,
                method=method,
                questions_per_step=arguments.questions,
                rollouts_per_question=arguments.rollouts,
                eval_questions=1,
                run_dir=folder,
            )
            rows[method] = gradient_noise(Trainer(config, progress=False).setup(), arguments.repeats)
    table = pd.DataFrame(rows).T
    table["against jlb"] = table["noise_to_signal"] / table["noise_to_signal"]["jlb"]
    print(table.map("{:.3g}".format).to_string())


if __name__ == "__main__":
    main()
