"""The training loop: sample, score, weigh, update; an iterator of step records.

Every random draw of step s comes from (seed, s), and questions are a pure function of (seed, s), so a
checkpoint is the adapter, the optimiser and a step number, and a killed run resumes to the same numbers.
"""

import dataclasses
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from tqdm.auto import tqdm

from ..config import RunConfig
from ..files import Owner, append_line
from ..runs.alarms import alarms
from ..runs.folder import CACHE_FROM, Run, step_file, steps_done, write_parquet
from ..types import ConfigError, Credit, Example, LogProbs, NotFinite, Prompt, TraceBatch
from .checkpoints import check_run_dir, resume, save_checkpoint, write_problem
from .evaluation import evaluate_sets
from .methods import METHODS
from .models import check_model, context_length
from .opening import open_examples, open_policy, open_task
from .plan import fit
from .policy import Policy
from .ranks import Ranks
from .records import StepRecord, step_record, trace_rows
from .sampling import draw_sources, sample_traces
from .step import add_gradient, must_skip, set_learning_rate, step_generator, verifier_rewards
from .tasks import check_task, eval_config

LOG = logging.getLogger(__name__)


class Trainer:
    """Train one configuration; ``for record in Trainer(config)`` runs it step by step.

    The constructor checks settings, task, model name and run folder without loading a model. Iterating loads the model,
    resumes from the last checkpoint if there is one, and yields a ``StepRecord`` a step. Leaving the loop saves a
    checkpoint. A file ``STOP`` in the run folder stops the run after the current step.

    Raises ConfigError: a setting, task or model that cannot work, a prompt longer than the model's context,
    a run folder that holds another configuration or that another process trains, too little memory or disk space.
    """

    def __init__(self, config: RunConfig, progress: bool = True) -> None:
        self.config, self.ranks = config, Ranks.launched()
        self.progress = progress and not self.ranks.rank
        self.run_dir = Path(config.run_dir)
        check_model(config.model)
        check_task(config)
        for name, _ in config.eval_sets():
            if name != config.task:
                check_task(eval_config(config, name))
        check_run_dir(config)
        self.records: list[dict[str, Any]] = []  # one dictionary a finished step, those on disk too
        self.method = METHODS[config.method]
        self._judges = config.judge_traces or "verifier_reward" in self.method.needs
        self.policy: Policy | None = None
        self._trackers: list[Any] = []
        self._unrecorded = False  # whether the weights have been updated since the last whole record
        self._alarms: set[str] = set()  # kinds that have been said
        self._owner = nullcontext() if self.ranks.rank else Owner(self.run_dir)  # rank 0 writes

    def setup(self) -> Self:
        """Load task, tokenizer and model, check prompt lengths, and resume; iterating does it, too."""
        if self.policy is None:
            device = self.ranks.start(self.config.device)
            with self.ranks.together():
                self._load(device)
        return self

    def _load(self, device: str) -> None:
        config = self.config
        if (self.run_dir / Owner.NAME).exists():
            with self._owner:  # refused before anything is loaded
                pass
        with self.ranks.first():
            self.task, self.prompter = open_task(config)
        self.max_context = context_length(config.model)
        self.task, self.eval_sets = open_examples(config, self.task, self.prompter, self._judges, self.max_context)
        prompts = self._prompts([*self._questions(0), *self._questions(1)])
        own = dataclasses.replace(config, device=device)
        self.plan = fit(own, prompts[: config.questions_per_step], self.ranks.here)
        policy = open_policy(self.plan.config, made=self.plan)
        trained = [p for _, p in policy.trainable()]
        self.optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        with self.ranks.first(), self._owner:
            self.step, self.method_state, self.records, self._evaluations = resume(config, policy, self.optimizer)
        self._trackers = [] if self.ranks.rank else open_trackers(config, policy.device.type)
        self.policy, self.saved_step, self._unrecorded = policy, self.step, False

    # --- the loop

    def __iter__(self) -> Iterator[StepRecord]:
        self.setup()
        with self._owner:
            if any(self.ranks.gather([steps_done(self.run_dir) != self.step])):
                self.policy = None  # another process has trained meanwhile
                self.setup()
            try:
                with self.ranks.together():
                    yield from self._steps()
            finally:
                if self._unrecorded:  # weights and files belong to different steps: resume from the checkpoint
                    self.policy = None
                elif self.saved_step != self.step:
                    self.save_checkpoint()
                if self.step == self.config.steps:
                    for tracker in self._trackers:  # Accelerate's own end would end the process group, too
                        tracker.finish()

    def _steps(self) -> Iterator[StepRecord]:
        config = self.config
        bar = tqdm(total=config.steps, initial=self.step, desc=config.method, disable=not self.progress)
        try:
            if self.step == 0 and not self._evaluations:
                self.evaluate()
                announce(self, bar)
            while not any(self.ranks.gather([self.step >= config.steps or (self.run_dir / "STOP").exists()])):
                record = self._train_step()
                self.records.append(dataclasses.asdict(record))
                self.ranks.on_first(append_line, self.run_dir / "metrics.jsonl", self.records[-1])
                self._unrecorded = False
                if self.step % CACHE_FROM == 0:
                    self.ranks.on_first(Run(self.run_dir).forgiving().trace_columns)
                if self.step % config.checkpoint_every == 0 or self.step == config.steps:
                    self.save_checkpoint()
                for tracker in self._trackers:
                    tracker.log({k: v for k, v in self.records[-1].items() if v is not None}, step=record.step)
                bar.update(1)
                bar.set_postfix(bar_values(record, self._evaluations))
                announce(self, bar)
                yield record
        except NotFinite as error:  # of an earlier update's making: these weights are not saved
            self._unrecorded = True
            remedy = f"lower learning_rate and start anew, or resume from step {self.saved_step}, the last checkpoint"
            raise NotFinite(f"{error} after step {self.step}; {remedy}") from error
        except (OSError, SafetensorError) as error:
            self._unrecorded = True  # a file may be cut short, too
            problem = write_problem(self.run_dir, error)
            raise ConfigError(f"{problem} and run again, it resumes from step {self.saved_step}") from error
        finally:
            bar.close()

    def run(self) -> Self:
        """Run to the end."""
        for _ in self:
            pass
        return self

    def save_checkpoint(self) -> Path:
        """Write a checkpoint of the current step; returns its folder."""
        self.ranks.on_first(save_checkpoint, self.run_dir, self.step, self.policy, self.optimizer, self.method_state)
        self.saved_step = self.step
        return step_file(self.run_dir / "checkpoints", self.step, "")

    def _train_step(self) -> StepRecord:
        config, started, old, credit = self.config, time.perf_counter(), None, None
        examples, prompts, batch = self.sample(self.step)
        sampled = time.perf_counter()
        set_learning_rate(self.optimizer, config, self.step)
        for _ in range(config.updates_per_step):
            old, credit, losses = self.backward(prompts, batch, old, credit)
            norm = float(torch.nn.utils.clip_grad_norm_([p for _, p in self.policy.trainable()], config.max_grad_norm))
            if skipped := must_skip(config, losses["loss"], norm, self.records):
                break
            self._unrecorded = True
            self.optimizer.step()
        self._unrecorded = True  # also where the update was left out
        self.step += 1
        used = dataclasses.replace(config, alpha=self.method_state.get("alpha", config.alpha))
        self.method_state = self.method_state if skipped else self.method.next_state(batch, old, credit, config)
        rows = trace_rows(used, self.step, examples, batch, old, credit, self.prompter)
        self.ranks.on_first(write_parquet, rows, step_file(self.run_dir / "traces", self.step))
        seconds_update, accuracy = time.perf_counter() - sampled, None
        if self.step == config.steps or (config.eval_every and self.step % config.eval_every == 0):
            accuracy = self.evaluate()["accuracy"]
        measured = {"accuracy": accuracy, "seconds_sampling": sampled - started, "seconds_update": seconds_update}
        more = {"skipped": int(skipped), "gradient_norm": norm, "learning_rate": self.optimizer.param_groups[0]["lr"]}
        return step_record(used, self.step, prompts, batch, old, credit, losses, **measured, **more)

    # --- the parts of a step

    def _questions(self, step: int) -> list[Example]:
        count = self.config.questions_per_step
        return self.task.train(step * count, count, self.config.seed)

    def _prompts(self, examples: Sequence[Example]) -> list[Prompt]:
        """Their prompts. ConfigError where one does not fit the model's context."""
        limits = self.config.max_trace_tokens, self.max_context, self.config.max_answer_tokens
        return [self.prompter.fitting(example, *limits) for example in examples]

    def sample(self, step: int, draw: int = 0) -> tuple[list[Example], list[Prompt], TraceBatch]:
        """The questions of a step (from 0) and traces drawn for them by the current policy.

        ``draw`` other than 0 gives further, independent traces of the same questions.
        """
        config, examples = self.config, self._questions(step)
        prompts = self._prompts(examples)
        generator = step_generator(config.seed, f"rollouts-{draw}" if draw else "rollouts", step)
        alpha = self.method_state.get("alpha", config.alpha)
        sources = draw_sources(len(prompts), config.rollouts_per_question, alpha, config.source_split, generator)
        limits = {"max_tokens": config.max_trace_tokens, "temperature": config.temperature, "top_p": config.top_p}
        limits |= {"generator": generator, "ranks": self.ranks}
        batch = sample_traces(self.policy, self.prompter, prompts, sources, **limits).to(self.policy.device)
        if self._judges:
            drawn = examples, prompts, batch, config.max_answer_tokens
            answers, rewards = verifier_rewards(self.policy, self.prompter, self.task, *drawn, self.ranks)
            batch = dataclasses.replace(batch, verifier_reward=rewards, predictions=answers)
        return examples, prompts, batch

    def backward(
        self, prompts: Sequence[Prompt], batch: TraceBatch, old: LogProbs | None = None, credit: Credit | None = None
    ) -> tuple[LogProbs, Credit, dict[str, float]]:
        """Leave the gradient of the method's loss in the adapter's ``grad``; see ``step.add_gradient``."""
        self.optimizer.zero_grad(set_to_none=True)
        step = prompts, batch, self.method_state, old, credit
        found = add_gradient(self.plan.config, self.method, self.policy, *step, self.ranks)
        self.ranks.add_gradients([p for _, p in self.policy.trainable()])
        return found

    def evaluate(self) -> dict[str, float]:
        """Evaluate the current policy on the held-out questions; store and return the summary."""
        sets = self.eval_sets, self.config, self.progress, self.ranks
        results, summary = evaluate_sets(self.policy, self.prompter, *sets)
        self.ranks.on_first(write_parquet, results, step_file(self.run_dir / "evaluations", self.step))
        summary = {"step": self.step, **summary}
        self.ranks.on_first(append_line, self.run_dir / "evaluations.jsonl", summary)
        self._evaluations.append(summary)
        return summary


# --- live progress: a tracker's and the bar's


def open_trackers(config: RunConfig, device: str) -> list[Any]:
    """Accelerate's tracker of a run, to which every record goes; none with "none"."""
    if config.tracker == "none":
        return []
    from accelerate import Accelerator

    accelerator = Accelerator(log_with=config.tracker, project_dir=config.run_dir, cpu=device == "cpu")
    settings = {k: v for k, v in config.to_dict().items() if v is not None}
    accelerator.init_trackers("covrl_lab", config=settings)
    return accelerator.trackers


def bar_values(record: StepRecord, evaluations: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What the progress bar shows: the record's numbers, and the latest of ``evaluations``."""
    last = evaluations[-1] if evaluations else {}
    shown = {"prior": record.reward_prior, "posterior": record.reward_posterior, "kl": record.kl}
    shown |= {"finished": record.finished_share, "accuracy": last.get("accuracy")}
    # In nats; where answers have no scorer, the first says more than the accuracy does.
    shown |= {"answer": last.get("bound_k", last.get("answer_logprob")), "trace use": last.get("trace_dependence")}
    return {name: f"{value:.2f}" for name, value in shown.items() if value is not None}


def announce(trainer: Trainer, bar: tqdm) -> None:
    """Say each kind of alarm once, in the log and above the progress bar."""
    for kind, alarm in alarms(trainer.records, trainer._evaluations, trainer.config.method).items():
        if kind not in trainer._alarms:
            trainer._alarms.add(kind)
            if bar.disable or LOG.hasHandlers():  # else logging prints it where the bar does, too
                LOG.warning("step %d: %s", trainer.step, alarm)
            if not bar.disable:
                bar.write(f"step {trainer.step}: {alarm}", file=sys.stderr)
