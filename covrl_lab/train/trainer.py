"""The training loop: sample, score, weigh, update; an iterator of step records.

Every random draw of step s comes from (seed, s), and questions are a pure function of (seed, s), so a
checkpoint is the adapter, the optimiser and a step number, and a killed run resumes to the same numbers.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import math
import os
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from ..config import RunConfig
from ..files import write_whole
from ..runs.folder import read_jsonl, step_file, steps_in, trace_frame, write_parquet
from ..types import ConfigError, Credit, Example, LogProbs, Prompt, TraceBatch
from .evaluation import evaluate, predict_answers, summarise
from .methods import METHODS
from .models import check_model, load_adapter, load_config, load_policy, load_tokenizer, save_adapter
from .objectives import Totals, log_mixture, needs_posterior, responsibility
from .prompts import Prompter
from .sampling import draw_sources, sample_traces
from .scoring import packed_tokens, reference, score
from .tasks import check_task, load_task

BESIDE = {".ipynb", ".ipynb_checkpoints", ".html", ".log", ".tmp", ".yaml"}  # may lie in a fresh run folder
FREE_BYTES = 200 * 2**20  # a run folder of the embedded model with its checkpoints stays below this


@dataclass(frozen=True)
class StepRecord:
    """What one step measured; a line of ``metrics.jsonl``. A mean over no trace is None.

    Rewards and log-probabilities are in nats (or probabilities, where the method's reward is one), KL in
    nats a token, seconds are wall-clock. ``*_prior`` and ``*_posterior`` are means over traces by source.
    """

    step: int
    loss: float
    policy_loss: float
    nll: float | None  # weighted by c_y: nats an answer token of all traces (token_mean), or a trace
    kl: float | None
    reward: float
    reward_prior: float | None
    reward_posterior: float | None
    answer_logprob_prior: float | None  # log p(y|x,z), also after unfinished traces
    answer_logprob_posterior: float | None
    finished_share: float
    trace_tokens: float
    trace_tokens_prior: float | None
    trace_tokens_posterior: float | None
    answer_term_share: float  # traces in the answer term
    clipped_share: float  # tokens whose gradient the clip holds back
    effective_sample_share: float  # (sum W)^2 / (N sum W^2) of the trace weights W = prod p'/h
    responsibility_prior: float | None  # mean rho on traces of each source
    responsibility_posterior: float | None
    log_ratio_extreme_share: float  # tokens with |log q - log p| above 10 nats
    gradient_norm: float
    learning_rate: float
    accuracy: float | None  # greedy held-out accuracy after this step, where it was evaluated
    seconds: float
    seconds_sampling: float
    seconds_update: float
    packed_tokens: int  # tokens a scoring forward computed, and what padded rows would have
    padded_tokens: int
    peak_memory_gib: float


class Trainer:
    """Train one configuration; ``for record in Trainer(config)`` runs it step by step.

    The constructor checks settings, task, model name and run folder without loading a model. Iterating
    loads the model, resumes from the last checkpoint if there is one, and yields a ``StepRecord`` a step;
    leaving the loop saves a checkpoint, and iterating again goes on. A file ``STOP`` in the run folder
    stops the run after the current step.

    Raises ConfigError: a setting, task or model that cannot work, a prompt longer than the model's context,
    a run folder that holds another configuration, or too little disk space.
    """

    def __init__(self, config: RunConfig, progress: bool = True) -> None:
        self.config, self.progress = config, progress
        self.run_dir = Path(config.run_dir)
        check_model(config.model)
        check_task(config.task, **self._task_settings())
        self._check_run_dir()
        self.records: list[dict[str, Any]] = []  # one dictionary a finished step, those on disk too
        self.method = METHODS[config.method]
        self.policy = None
        self._unrecorded = False  # whether the weights have been updated since the last whole record

    def _task_settings(self) -> dict[str, Any]:
        names = ("difficulty", "demonstrations", "question_column", "answer_column", "trace_column")
        return {n: getattr(self.config, n) for n in (*names, "dataset_config", "dataset_split")}

    def _check_run_dir(self) -> None:
        parent = next(p for p in (self.run_dir, *self.run_dir.absolute().parents) if p.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            problem = "cannot be written" if parent.is_dir() else "is a file"
            raise ConfigError(f"{str(parent)!r} {problem}, so it cannot hold a run; choose another run_dir")
        existing = self.run_dir / "config.json"
        if existing.exists():
            different = self.config.differences(RunConfig.load(existing))
            if different:
                name, (mine, theirs) = next(iter(different.items()))
                raise ConfigError(
                    f"{str(self.run_dir)!r} holds a run with another configuration ({name} is {theirs!r} "
                    f"there, {mine!r} here); choose another run_dir"
                )
        elif self.run_dir.exists() and any(
            (p.suffix or p.name) not in BESIDE for p in self.run_dir.iterdir()
        ):
            raise ConfigError(
                f"{str(self.run_dir)!r} is not empty and not a run folder; choose another run_dir"
            )
        if shutil.disk_usage(parent).free < FREE_BYTES:
            raise ConfigError(
                f"less than {FREE_BYTES // 2**20} MiB are free for {str(self.run_dir)!r}; free some space"
            )

    # --- loading and resuming

    def setup(self) -> Trainer:
        """Load task, tokenizer and model, check prompt lengths, and resume; done by iterating, too."""
        if self.policy is not None:
            return self
        config = self.config
        self.task = load_task(config.task, **self._task_settings())
        self.held_out = self.task.held_out(config.eval_questions)
        self.prompter = Prompter(load_tokenizer(config.model), self.task.demonstrations, config.prompt_style)
        self.max_context = load_config(config.model).get_text_config().max_position_embeddings
        self._prompts([*self.held_out, *self._questions(0), *self._questions(1)])
        self.policy = load_policy(
            config.model,
            quantization=config.quantization,
            dtype=config.dtype,
            lora_rank=config.lora_rank,
            lora_alpha=config.lora_alpha,
            seed=config.seed,
            device=config.device,
            gradient_checkpointing=config.gradient_checkpointing,
        )
        self.optimizer = torch.optim.AdamW(
            [p for _, p in self.policy.trainable()],
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
        )
        self.run_dir.mkdir(parents=True, exist_ok=True)
        if not (self.run_dir / "config.json").exists():
            config.save(self.run_dir / "config.json")
        self._resume()
        self._start_tracker()
        return self

    def _resume(self) -> None:
        """Go back to the last whole checkpoint; what was written after it is written again."""
        for half in self.run_dir.glob("*/*.tmp"):  # checkpoints, and files of traces and evaluations
            shutil.rmtree(half) if half.is_dir() else half.unlink()
        saved = steps_in(self.run_dir / "checkpoints")
        self.step = saved[-1] if saved else 0
        self.memory: dict[str, float] = {}  # what a method carries from step to step
        if saved:
            folder = step_file(self.run_dir / "checkpoints", self.step, "")
            load_adapter(self.policy, folder)
            self._load_optimizer(folder)
            self.memory = json.loads((folder / "memory.json").read_text(encoding="utf-8"))
        self.saved_step = self.step
        self.records = self._keep_lines("metrics.jsonl", self.step)
        self._keep_lines("evaluations.jsonl", self.step)
        self._unrecorded = False

    def _keep_lines(self, name: str, last_step: int) -> list[dict[str, Any]]:
        """Drop the lines of later steps from a JSON-lines file; return the ones kept."""
        path = self.run_dir / name
        if not path.exists():
            return []
        lines = [record for record in read_jsonl(path) if record["step"] <= last_step]
        write_whole(path, "".join(json.dumps(r) + "\n" for r in lines))
        return lines

    def _load_optimizer(self, folder: Path) -> None:
        stored = load_file(folder / "optimizer.safetensors")
        for name, parameter in self.policy.trainable():
            state = {k: stored[f"{name}/{k}"] for k in ("step", "exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {
                k: v if k == "step" else v.to(parameter.device) for k, v in state.items()
            }

    def save_checkpoint(self) -> Path:
        """Write adapter and optimiser, whole and then renamed, and keep only the last two checkpoints."""
        folder = self.run_dir / "checkpoints"
        final = step_file(folder, self.step, "")
        temporary = final.with_name(final.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_adapter(self.policy, temporary)
        state = {
            f"{name}/{key}": value.contiguous()
            for name, parameter in self.policy.trainable()
            for key, value in self.optimizer.state[parameter].items()
        }
        save_file(state, temporary / "optimizer.safetensors")
        (temporary / "memory.json").write_text(json.dumps(self.memory), encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        self.saved_step = self.step
        for old in steps_in(folder)[:-2]:
            shutil.rmtree(step_file(folder, old, ""))
        return final

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
                self._append("metrics.jsonl", self.records[-1])
                self._unrecorded = False
                if self.step % config.checkpoint_every == 0 or self.step == config.steps:
                    self.save_checkpoint()
                self._track(record)
                bar.update(1)
                bar.set_postfix(self._summary(record))
                yield record
        except (OSError, SafetensorError) as error:
            # safetensors passes the system's error on as text only.
            full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
            if full or f"os error {errno.ENOSPC}" in str(error):
                self._unrecorded = True  # a file may be cut short, too
                raise ConfigError(
                    f"no space left for {str(self.run_dir)!r}; free some and run again, it goes on from step "
                    f"{self.saved_step}"
                ) from error
            raise
        finally:
            bar.close()
            if self._unrecorded:  # weights and files are not the same step's: go on from the last checkpoint
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

    def _questions(self, step: int) -> list[Example]:
        count = self.config.questions_per_step
        return self.task.train(step * count, count, self.config.seed)

    def _prompts(self, examples: Sequence[Example]) -> list[Prompt]:
        """The prompts of some examples. ConfigError where one does not fit the model's context."""
        prompts = [self.prompter(e) for e in examples]
        for prompt, example in zip(prompts, examples, strict=True):
            self.prompter.check_length(
                prompt,
                self.config.max_trace_tokens,
                self.max_context,
                example.id,
                self.config.max_answer_tokens,
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
            len(prompts), config.rollouts_per_question, config.alpha, config.source_split, generator
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
        if "verdict" in self.method.needs:
            batch = dataclasses.replace(batch, verdict=self._verdicts(examples, prompts, batch))
        return examples, prompts, batch

    def score(self, prompts: Sequence[Prompt], batch: TraceBatch, rows: torch.Tensor) -> LogProbs:
        """Log-probabilities of the rollouts at ``rows`` under the current policy."""
        return score(
            self.policy,
            own_prompts(prompts, batch, rows),
            batch.rows(rows),
            temperature=self.config.temperature,
            posterior=needs_posterior(self.config),
        )

    def _verdicts(self, examples: list[Example], prompts: list[Prompt], batch: TraceBatch) -> torch.Tensor:
        """(N,) the task's score of the policy's own greedy answer after each trace."""
        own = [i // batch.group_size for i in range(len(batch))]
        contexts = [[*prompts[q].prior, *batch.trace(i), *prompts[q].seam] for i, q in enumerate(own)]
        answers = predict_answers(self.policy, self.prompter, contexts, self.config.max_answer_tokens)
        scores = [self.task.score(answer, examples[q]) for answer, q in zip(answers, own, strict=True)]
        return torch.tensor(scores, device=batch.mask.device)

    def _reference(
        self, prompts: list[Prompt], batch: TraceBatch, parts: list[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """What the method wants of the frozen base, for all rollouts."""
        found = []
        for rows in parts if self.method.needs & {"ref_prior", "bare_answer"} else []:
            own = own_prompts(prompts, batch, rows)
            found.append(
                reference(self.policy, own, batch.rows(rows), self.method.needs, self.config.temperature)
            )
        return {name: _pad_and_cat([f[name] for f in found]) for name in (found[0] if found else ())}

    def backward(
        self,
        prompts: list[Prompt],
        batch: TraceBatch,
        old: LogProbs | None = None,
        credit: Credit | None = None,
    ) -> tuple[LogProbs, Credit, dict[str, float]]:
        """Put the gradient of the method's loss on the adapter; weights stay.

        ``old`` and ``credit`` are those of the step's first update; the current policy's where not given.
        Returns them, and the loss with its parts. The result does not depend on how ``max_packed_tokens``
        cuts the step.
        """
        config, first = self.config, credit is None
        parts = micro_batches(prompts, batch, needs_posterior(config), config.max_packed_tokens)
        if old is None and len(parts) > 1:
            with torch.no_grad():
                old = join([self.score(prompts, batch, rows) for rows in parts])
        frozen = self._reference(prompts, batch, parts) if first else {}
        self.optimizer.zero_grad(set_to_none=True)
        totals: Totals | None = None
        losses: dict[str, float] = {}
        for rows in parts:
            new = self.score(prompts, batch, rows)
            if old is None:  # one part: this pass is also the old policy's
                old = new.detach()
            if credit is None:
                old = dataclasses.replace(old, **frozen)
                credit = self.method.credit(batch, old, config, self.memory)
            totals = totals or Totals.of(batch, credit, old.answer_mask)
            loss, measured = self.method.loss(
                new, old.rows(rows), batch.rows(rows), credit.rows(rows), totals, config
            )
            loss.backward()
            for name, value in {"loss": loss.detach(), **measured}.items():
                losses[name] = losses.get(name, 0.0) + float(value)
        return old, credit, losses

    def _train_step(self) -> StepRecord:
        config, started = self.config, time.perf_counter()
        examples, prompts, batch = self.sample(self.step)
        sampled = time.perf_counter()
        self._set_learning_rate()
        old = credit = None
        for _ in range(config.updates_per_step):
            old, credit, losses = self.backward(prompts, batch, old, credit)
            norm = self._update()
        self.step, self.memory = self.step + 1, credit.memory
        self._store_traces(examples, batch, old, credit)
        accuracy = None
        if self.step == config.steps or (config.eval_every and self.step % config.eval_every == 0):
            before = time.perf_counter()
            accuracy = self.evaluate()["accuracy"]
            spent = time.perf_counter() - before  # evaluation is not part of the step's time
            started, sampled = started + spent, sampled + spent
        return self._record(batch, prompts, old, credit, losses, norm, accuracy, started, sampled)

    def _update(self) -> float:
        parameters = [p for _, p in self.policy.trainable()]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm))
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"the gradient of step {self.step + 1} is not finite; lower learning_rate or kl_weight, "
                "or use dtype='float32' (the run goes on from its last checkpoint)"
            )
        self._unrecorded = True
        self.optimizer.step()
        return norm

    def _set_learning_rate(self) -> None:
        """Linear warm-up, then a cosine to zero at the last step, or constant."""
        c = self.config
        factor = min(1.0, (self.step + 1) / max(1, c.warmup_steps))
        if c.lr_schedule == "cosine" and self.step >= c.warmup_steps:
            done = (self.step - c.warmup_steps) / max(1, c.steps - c.warmup_steps)
            factor = 0.5 * (1 + math.cos(math.pi * done))
        for group in self.optimizer.param_groups:
            group["lr"] = c.learning_rate * factor

    # --- evaluation, records and files

    def evaluate(self) -> dict[str, float]:
        """Evaluate the current policy on the held-out questions, store and return the summary."""
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
            progress=self.progress,
        )
        write_parquet(results, step_file(self.run_dir / "evaluations", self.step))
        summary = {"step": self.step, **summarise(results)}
        self._append("evaluations.jsonl", summary)
        return summary

    def _append(self, name: str, record: dict[str, Any]) -> None:
        with (self.run_dir / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def _store_traces(
        self, examples: list[Example], batch: TraceBatch, old: LogProbs, credit: Credit
    ) -> None:
        frame = trace_frame(examples, batch, old, self.prompter)
        log_ratio = self._log_ratio(old)
        frame.insert(0, "step", self.step)
        frame["log_ratio"] = [row[keep].tolist() for row, keep in zip(log_ratio, batch.mask, strict=True)]
        for name in ("reward", "advantage", "answer_weight"):
            frame[name] = getattr(credit, name).tolist()
        write_parquet(frame, step_file(self.run_dir / "traces", self.step))

    def _log_ratio(self, old: LogProbs) -> torch.Tensor:
        """log p'/h a token, (N, T), before the update."""
        return log_mixture(old, self.config.composite_weight) - log_mixture(old, self.config.alpha)

    def _record(self, batch, prompts, old, credit, losses, norm, accuracy, started, sampled) -> StepRecord:
        config, now = self.config, time.perf_counter()
        prior, posterior = batch.from_prior, ~batch.from_prior

        def mean(values: torch.Tensor, keep: torch.Tensor | None = None) -> float | None:
            values = values.float() if keep is None else values[keep].float()
            return float(values.mean()) if values.numel() else None

        lengths, answer = batch.mask.sum(1), old.answer.sum(1)
        weight = self._log_ratio(old).sum(1).double()
        weight = (weight - weight.max()).exp()
        rho = gap = None
        if old.posterior is not None:
            rho = responsibility(old, config.composite_weight)
            gap = (old.posterior - old.prior).abs() > 10
        packed, padded = packed_tokens(prompts, batch, needs_posterior(config))
        return StepRecord(
            step=self.step,
            loss=losses["loss"],
            policy_loss=losses["policy"],
            nll=losses["nll"] if config.nll_weight and (credit.answer_weight != 0).any() else None,
            kl=losses.get("kl"),
            reward=mean(credit.reward),
            reward_prior=mean(credit.reward, prior),
            reward_posterior=mean(credit.reward, posterior),
            answer_logprob_prior=mean(answer, prior),
            answer_logprob_posterior=mean(answer, posterior),
            finished_share=mean(batch.finished),
            trace_tokens=mean(lengths),
            trace_tokens_prior=mean(lengths, prior),
            trace_tokens_posterior=mean(lengths, posterior),
            answer_term_share=mean(credit.answer_weight != 0),
            clipped_share=losses["clipped_share"],
            effective_sample_share=float(weight.sum() ** 2 / (len(batch) * (weight**2).sum())),
            responsibility_prior=None if rho is None else mean(rho, batch.mask & prior[:, None]),
            responsibility_posterior=None if rho is None else mean(rho, batch.mask & posterior[:, None]),
            log_ratio_extreme_share=0.0 if gap is None else mean(gap, batch.mask),
            gradient_norm=norm,
            learning_rate=self.optimizer.param_groups[0]["lr"],
            accuracy=accuracy,
            seconds=now - started,
            seconds_sampling=sampled - started,
            seconds_update=now - sampled,
            packed_tokens=packed,
            padded_tokens=padded,
            peak_memory_gib=peak_memory_gib(self.policy.device),
        )

    def _summary(self, record: StepRecord) -> dict[str, str]:
        """What the progress bar shows."""
        shown = {"prior": record.reward_prior, "posterior": record.reward_posterior, "kl": record.kl}
        shown |= {"finished": record.finished_share, "accuracy": self._last_accuracy()}
        return {name: f"{value:.2f}" for name, value in shown.items() if value is not None}

    def _last_accuracy(self) -> float | None:
        return next((r["accuracy"] for r in reversed(self.records) if r["accuracy"] is not None), None)

    # --- trackers (tensorboard, wandb, trackio), through Accelerate

    _accelerator = None

    def _start_tracker(self) -> None:
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


def own_prompts(prompts: Sequence[Prompt], batch: TraceBatch, rows: torch.Tensor) -> list[Prompt]:
    """The prompt of each of the rollouts at ``rows``."""
    return [prompts[i // batch.group_size] for i in rows.tolist()]


def micro_batches(
    prompts: Sequence[Prompt], batch: TraceBatch, posterior: bool, max_tokens: int
) -> list[torch.Tensor]:
    """Row numbers of the rollouts, cut so that each part's packed tree has at most ``max_tokens`` nodes.

    Halves by question first, so that a part shares as many prompts as it can; a single rollout is never cut.
    """

    def cut(rows: torch.Tensor) -> list[torch.Tensor]:
        own = own_prompts(prompts, batch, rows)
        if len(rows) == 1 or packed_tokens(own, batch.rows(rows), posterior)[0] <= max_tokens:
            return [rows]
        half = len(rows) // 2
        if half > batch.group_size:
            half -= half % batch.group_size
        return cut(rows[:half]) + cut(rows[half:])

    return cut(torch.arange(len(batch)))


def join(parts: Sequence[LogProbs]) -> LogProbs:
    """Put micro-batches' log-probabilities together again, in row order."""
    names = [f.name for f in dataclasses.fields(LogProbs)]
    columns = {name: [getattr(part, name) for part in parts] for name in names}
    return LogProbs(**{n: None if c[0] is None else _pad_and_cat(c) for n, c in columns.items()})


def _pad_and_cat(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows of different widths under each other, padded with zeros (False)."""
    width = max(p.shape[1] for p in parts)
    return torch.cat([torch.nn.functional.pad(p, (0, width - p.shape[1])) for p in parts])


def peak_memory_gib(device: torch.device) -> float:
    """The process's peak so far: GPU memory allocated, or resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
