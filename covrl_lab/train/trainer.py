"""The training loop: sample, score, weigh, update; an iterator of step records.

Every random draw of step s comes from (seed, s), and questions are a pure function of (seed, s), so a
checkpoint is the adapter, the optimiser and a step number, and a killed run resumes to the same numbers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm.auto import tqdm

from ..config import RunConfig
from ..runs.alarms import alarms
from ..runs.folder import read_jsonl, step_file, write_parquet
from ..types import ConfigError, Credit, Example, LogProbs, Prompt, TraceBatch
from .checkpoints import (
    append_line,
    check_run_dir,
    is_disk_full,
    keep_lines,
    load_checkpoint,
    save_checkpoint,
)
from .evaluation import evaluate, predict_answers, summarise
from .methods import METHODS
from .models import check_model, load_config
from .objectives import Totals, needs_posterior
from .opening import open_policy, open_task, task_settings
from .policy import Policy
from .records import StepRecord, step_record, trace_rows
from .sampling import draw_sources, sample_traces
from .scoring import join, micro_batches, own_prompts, pad_and_cat, reference, trace_logprobs
from .tasks import check_task

LOG = logging.getLogger(__name__)


class Trainer:
    """Train one configuration; ``for record in Trainer(config)`` runs it step by step.

    The constructor checks settings, task, model name and run folder without loading a model. Iterating
    loads the model, resumes from the last checkpoint if there is one, and yields a ``StepRecord`` a step.
    Leaving the loop saves a checkpoint, and iterating again resumes. A file ``STOP`` in the run folder stops
    the run after the current step.

    Raises ConfigError: a setting, task or model that cannot work, a prompt longer than the model's context,
    a run folder that holds another configuration, or too little disk space.
    """

    def __init__(self, config: RunConfig, progress: bool = True) -> None:
        self.config, self.progress = config, progress
        self.run_dir = Path(config.run_dir)
        check_model(config.model)
        check_task(config.task, **task_settings(config))
        check_run_dir(config)
        self.records: list[dict[str, Any]] = []  # one dictionary a finished step, those on disk too
        self.method = METHODS[config.method]
        self.policy: Policy | None = None
        self._accelerator = None
        self._unrecorded = False  # whether the weights have been updated since the last whole record
        self._alarms: set[str] = set()  # kinds that have been said
        self._trace_use: float | None = None  # trace dependence at the last evaluation, nats

    def setup(self) -> Trainer:
        """Load task, tokenizer and model, check prompt lengths, and resume; iterating does it, too."""
        if self.policy is not None:
            return self
        config = self.config
        self.task, self.prompter = open_task(config)
        self.held_out = self.task.held_out(config.eval_questions)
        self.max_context = load_config(config.model).get_text_config().max_position_embeddings
        self._prompts([*self.held_out, *self._questions(0), *self._questions(1)])
        self.policy = open_policy(config)
        self.optimizer = torch.optim.AdamW(
            [p for _, p in self.policy.trainable()], lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.run_dir.mkdir(parents=True, exist_ok=True)
        if not (self.run_dir / "config.json").exists():
            config.save(self.run_dir / "config.json")
        # What was written after the last whole checkpoint is dropped and written again.
        self.step, self.method_state = load_checkpoint(self.run_dir, self.policy, self.optimizer)
        self.saved_step, self._unrecorded = self.step, False
        self.records = keep_lines(self.run_dir / "metrics.jsonl", self.step)
        keep_lines(self.run_dir / "evaluations.jsonl", self.step)
        self._start_tracker()
        return self

    # --- the loop

    def __iter__(self) -> Iterator[StepRecord]:
        self.setup()
        config = self.config
        bar = tqdm(total=config.steps, initial=self.step, desc=config.method, disable=not self.progress)
        try:
            if self.step == 0 and not read_jsonl(self.run_dir / "evaluations.jsonl"):
                self.evaluate()
            while self.step < config.steps and not (self.run_dir / "STOP").exists():
                record = self._train_step()
                self.records.append(dataclasses.asdict(record))
                append_line(self.run_dir / "metrics.jsonl", self.records[-1])
                self._unrecorded = False
                if self.step % config.checkpoint_every == 0 or self.step == config.steps:
                    self.save_checkpoint()
                self._track(record)
                bar.update(1)
                bar.set_postfix(self._summary(record))
                yield record
        except (OSError, SafetensorError) as error:
            if not is_disk_full(error):
                raise
            self._unrecorded = True  # a file may be cut short, too
            raise ConfigError(
                f"no space left for {str(self.run_dir)!r}; free some and run again, it resumes from step "
                f"{self.saved_step}"
            ) from error
        finally:
            bar.close()
            if self._unrecorded:  # weights and files belong to different steps: resume from the checkpoint
                self.policy = None
            elif self.saved_step != self.step:
                self.save_checkpoint()
            if self.step == config.steps and self._accelerator is not None:
                self._accelerator.end_training()

    def run(self) -> Trainer:
        """Run to the end."""
        for _ in self:
            pass
        return self

    def save_checkpoint(self) -> Path:
        """Write a checkpoint of the current step; returns its folder."""
        folder = save_checkpoint(self.run_dir, self.step, self.policy, self.optimizer, self.method_state)
        self.saved_step = self.step
        return folder

    def _train_step(self) -> StepRecord:
        config, started = self.config, time.perf_counter()
        examples, prompts, batch = self.sample(self.step)
        sampled = time.perf_counter()
        self._set_learning_rate()
        old = credit = None
        for _ in range(config.updates_per_step):
            old, credit, losses = self.backward(prompts, batch, old, credit)
            norm = self._update()
        self.step, self.method_state = self.step + 1, credit.method_state
        rows = trace_rows(config, self.step, examples, batch, old, credit, self.prompter)
        write_parquet(rows, step_file(self.run_dir / "traces", self.step))
        seconds_update, accuracy = time.perf_counter() - sampled, None
        if self.step == config.steps or (config.eval_every and self.step % config.eval_every == 0):
            accuracy = self.evaluate()["accuracy"]
        return step_record(
            config,
            self.step,
            prompts,
            batch,
            old,
            credit,
            losses,
            norm=norm,
            learning_rate=self.optimizer.param_groups[0]["lr"],
            accuracy=accuracy,
            seconds_sampling=sampled - started,
            seconds_update=seconds_update,
        )

    # --- the parts of a step

    def _questions(self, step: int) -> list[Example]:
        count = self.config.questions_per_step
        return self.task.train(step * count, count, self.config.seed)

    def _prompts(self, examples: Sequence[Example]) -> list[Prompt]:
        """The prompts of some examples. ConfigError where one does not fit the model's context."""
        config, prompts = self.config, [self.prompter(e) for e in examples]
        for prompt, example in zip(prompts, examples, strict=True):
            self.prompter.check_length(
                prompt, config.max_trace_tokens, self.max_context, example.id, config.max_answer_tokens
            )
        return prompts

    def _generator(self, purpose: str, step: int) -> torch.Generator:
        digest = hashlib.sha256(f"{self.config.seed}/{purpose}/{step}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    def sample(self, step: int, draw: int = 0) -> tuple[list[Example], list[Prompt], TraceBatch]:
        """The questions of a step (from 0) and traces drawn for them by the current policy.

        ``draw`` other than 0 gives further, independent traces of the same questions.
        """
        config = self.config
        examples = self._questions(step)
        prompts = self._prompts(examples)
        generator = self._generator(f"rollouts-{draw}" if draw else "rollouts", step)
        from_prior = draw_sources(
            len(prompts),
            config.rollouts_per_question,
            self.method_state.get("alpha", config.alpha),
            config.source_split,
            generator,
        )
        batch = sample_traces(
            self.policy,
            self.prompter,
            prompts,
            from_prior,
            max_tokens=config.max_trace_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            generator=generator,
        ).to(self.policy.device)
        if "verifier_reward" in self.method.needs:
            rewards = self._verifier_rewards(examples, prompts, batch)
            batch = dataclasses.replace(batch, verifier_reward=rewards)
        return examples, prompts, batch

    def logprobs(self, prompts: Sequence[Prompt], batch: TraceBatch, rows: Tensor) -> LogProbs:
        """Log-probabilities of the rollouts at ``rows`` (row numbers) under the current policy."""
        return trace_logprobs(
            self.policy,
            own_prompts(prompts, batch, rows),
            batch.rows(rows),
            temperature=self.config.temperature,
            posterior=needs_posterior(self.config),
            no_trace="no_trace" in self.method.needs,
        )

    def _verifier_rewards(
        self, examples: Sequence[Example], prompts: Sequence[Prompt], batch: TraceBatch
    ) -> Tensor:
        """(N,) the task's score of the policy's own greedy answer after each trace."""
        own = [i // batch.group_size for i in range(len(batch))]
        contexts = [[*prompts[q].prior, *batch.trace(i), *prompts[q].seam] for i, q in enumerate(own)]
        answers = predict_answers(self.policy, self.prompter, contexts, self.config.max_answer_tokens)
        scores = [self.task.score(answer, examples[q]) for answer, q in zip(answers, own, strict=True)]
        return torch.tensor(scores, device=batch.mask.device)

    def _reference(
        self, prompts: Sequence[Prompt], batch: TraceBatch, parts: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """The log-probabilities under the frozen base that the method needs, for all rollouts."""
        needs = self.method.needs & {"ref_prior", "bare_answer"}
        found = [
            reference(
                self.policy,
                own_prompts(prompts, batch, rows),
                batch.rows(rows),
                needs,
                self.config.temperature,
            )
            for rows in (parts if needs else [])
        ]
        return {name: pad_and_cat([f[name] for f in found]) for name in needs}

    def backward(
        self,
        prompts: list[Prompt],
        batch: TraceBatch,
        old: LogProbs | None = None,
        credit: Credit | None = None,
    ) -> tuple[LogProbs, Credit, dict[str, float]]:
        """Add the gradient of the method's loss to the adapter's ``grad``; the weights stay.

        ``old`` and ``credit`` are those of the step's first update; those of the current policy where not
        given. Returns them, and the loss with its parts. The result does not depend on how
        ``max_packed_tokens`` cuts the step.
        """
        config, first = self.config, credit is None
        parts = micro_batches(prompts, batch, needs_posterior(config), config.max_packed_tokens)
        if old is None and len(parts) > 1:
            with torch.no_grad():
                old = join([self.logprobs(prompts, batch, rows) for rows in parts])
        frozen = self._reference(prompts, batch, parts) if first else {}
        self.optimizer.zero_grad(set_to_none=True)
        totals: Totals | None = None
        losses: dict[str, float] = {}
        for rows in parts:
            new = self.logprobs(prompts, batch, rows)
            if old is None:  # with a single part, this pass gives the old policy's numbers, too
                old = new.detach()
            if credit is None:
                old = dataclasses.replace(old, **frozen)
                credit = self.method.credit(batch, old, config, self.method_state)
            totals = totals or Totals.of(batch, credit, old.answer_mask)
            loss, measured = self.method.loss(
                new, old.rows(rows), batch.rows(rows), credit.rows(rows), totals, config
            )
            loss.backward()
            for name, value in {"loss": loss.detach(), **measured}.items():
                losses[name] = losses.get(name, 0.0) + float(value)
        return old, credit, losses

    def _update(self) -> float:
        """Clip the gradient and take an optimiser step; the norm before the clip."""
        parameters = [p for _, p in self.policy.trainable()]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm))
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"the gradient of step {self.step + 1} is not finite; lower learning_rate or kl_weight, "
                "or use dtype='float32' (the run resumes from its last checkpoint)"
            )
        self._unrecorded = True
        self.optimizer.step()
        return norm

    def _set_learning_rate(self) -> None:
        """Linear warm-up, then a cosine to zero at the last step, or constant."""
        c = self.config
        warmup = min(c.warmup_steps, c.steps)  # a run shorter than its warm-up still reaches the full rate
        factor = min(1.0, (self.step + 1) / max(1, warmup))
        if c.lr_schedule == "cosine" and self.step >= warmup:
            done = (self.step - warmup) / max(1, c.steps - warmup)
            factor = 0.5 * (1 + math.cos(math.pi * done))
        for group in self.optimizer.param_groups:
            group["lr"] = c.learning_rate * factor

    # --- evaluation and progress

    def evaluate(self) -> dict[str, float]:
        """Evaluate the current policy on the held-out questions; store and return the summary."""
        config = self.config
        results = evaluate(
            self.policy,
            self.prompter,
            self.task,
            self.held_out,
            max_trace_tokens=config.max_trace_tokens,
            max_answer_tokens=config.max_answer_tokens,
            samples=config.eval_samples,
            temperature=config.temperature,
            top_p=config.top_p,
            seed=config.seed,
            posterior=config.alpha < 1,
            progress=self.progress,
        )
        write_parquet(results, step_file(self.run_dir / "evaluations", self.step))
        summary = {"step": self.step, **summarise(results)}
        append_line(self.run_dir / "evaluations.jsonl", summary)
        self._trace_use = summary["trace_dependence"]
        return summary

    def _warn(self, bar: tqdm) -> None:
        """Say each sign that the run goes wrong once, above the progress bar and in the log."""
        found = alarms(self.records, read_jsonl(self.run_dir / "evaluations.jsonl"))
        for kind, alarm in found.items():
            if kind not in self._alarms:
                self._alarms.add(kind)
                LOG.warning("step %d: %s", self.step, alarm)
                if self.progress:
                    bar.write(f"step {self.step}: {alarm}")

    def _summary(self, record: StepRecord) -> dict[str, str]:
        """What the progress bar shows."""
        accuracy = next((r["accuracy"] for r in reversed(self.records) if r["accuracy"] is not None), None)
        shown = {"prior": record.reward_prior, "posterior": record.reward_posterior, "kl": record.kl}
        shown |= {"finished": record.finished_share, "accuracy": accuracy, "trace use": self._trace_use}
        return {name: f"{value:.2f}" for name, value in shown.items() if value is not None}

    def _start_tracker(self) -> None:
        """Start TensorBoard, wandb or trackio through Accelerate, where one is configured."""
        if self.config.tracker == "none":
            return
        from accelerate import Accelerator

        self._accelerator = Accelerator(
            log_with=self.config.tracker, project_dir=str(self.run_dir), cpu=self.policy.device.type == "cpu"
        )
        settings = {k: v for k, v in self.config.to_dict().items() if v is not None}
        self._accelerator.init_trackers("covrl_lab", config=settings)

    def _track(self, record: StepRecord) -> None:
        if self._accelerator is not None:
            values = {k: v for k, v in dataclasses.asdict(record).items() if v is not None}
            self._accelerator.log(values, step=record.step)
