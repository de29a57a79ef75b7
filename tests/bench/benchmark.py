"""One run on one machine: our step against TRL's GRPOTrainer, against the machine's limits, and how it grows.

``python -m tests.bench.benchmark`` (or ``make bench``) measures every part and writes one JSON file a part to
``notebooks/results/speed``, which ``notebooks/07_speed.ipynb`` draws. A part that is already there with the
same settings on the same machine is not measured again unless ``--again`` is given; an interrupted part goes
on where it was.

    step      repetitions of one step of each trainer in turn, so that what disturbs the machine disturbs all;
              each trainer is its own process, which waits while another runs, and has its own peak memory
    limits    matrix rate and memory bandwidth, and the step's bare matrix products at its own sizes
    growth    seconds and memory of our step against rollouts, trace length and demonstrations
    memory    bytes that scoring allocates against vocabulary and packed tokens, counted, not sampled
    plan      what covrl_lab.train.plan says of two models, and what they took
    layout    traces under posterior prompts with demonstrations of their own (as used) or those of the prior,
              which both contexts would share

Equal work: every trainer gets the same questions under the same few-shot prior prompts (CoVRL half of them
under posterior prompts), the same NF4 model and LoRA shape, and writes exactly ``max_trace_tokens`` tokens a
trace: ends of traces are ignored in ours, and ``min_new_tokens`` holds TRL to it. "own ends" is our step
as used, where traces may end earlier. TRL runs with what is fastest for it here: one batch of all
rollouts, no gradient checkpointing, no reference model (beta 0), no logging, saving or evaluation, and a
reward function that returns text lengths. It does less: one prompt a trace, and no answer to score.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from itertools import accumulate
from operator import itemgetter
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from covrl_lab.config import RunConfig
from covrl_lab.files import write_whole
from covrl_lab.train.limits import fast_dtype, pick_device
from covrl_lab.train.plan import GIB, Device, fastest, measure_device, plan
from covrl_lab.train.shapes import shape_of
from covrl_lab.types import ConfigError, did_you_mean

PRIOR_ONLY = {"alpha": 1.0, "posterior_weight": 0.0}
STEP = {"task": "arithmetic", "prompt_style": "few_shot", "demonstrations": 3}
STEP |= {"questions_per_step": 8, "rollouts_per_question": 4, "max_trace_tokens": 28}
# name -> what it changes; "fixed" holds every trace to max_trace_tokens
VARIANTS: dict[str, dict[str, Any]] = {
    "covrl": {"fixed": True},
    "prior only": {"fixed": True, **PRIOR_ONLY},
    "covrl, own ends": {"fixed": False},
    "prior only, own ends": {"fixed": False, **PRIOR_ONLY},
    "trl": {},
}
GROWTH: dict[str, list[dict[str, Any]]] = {
    "rollouts": [{"rollouts_per_question": g} for g in (1, 2, 4, 8)],
    "demonstrations": [{"demonstrations": k} for k in (0, 2, 4, 8)],
    "trace tokens": [{"max_trace_tokens": t, "rollouts_per_question": 2} for t in (28, 64, 128, 256, 512)],
}
VOCABULARIES = [8_192, 32_768, 152_064]
MEMORY_ROLLOUTS = [16, 32, 64]
ROWS = [32, 512, 2048]  # of the bare matrix products: decoding, prompts, update
# What the larger of the two models that plans are checked on changes of the first.
LARGER = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 20}
LARGER |= {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64}


# --- storing


def machine(threads: int) -> dict[str, Any]:
    """What a reader must know of the machine; no names, no paths."""
    import torch

    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    versions = {
        package: importlib.metadata.version(package)
        for package in ("torch", "transformers", "peft", "bitsandbytes", "trl")
        if importlib.util.find_spec(package)
    }
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    name += f", {torch.backends.cpu.get_cpu_capability()}"  # a name such as "AMD EPYC" stands for many
    return {"cpu": name, "cores": os.cpu_count(), "threads": threads, "gpu": gpu, **versions}


def _dtype(config: RunConfig) -> Any:
    """Torch's dtype of a run's products on this machine."""
    import torch

    fast = fast_dtype(pick_device("auto"))
    return getattr(torch, fast if config.dtype == "auto" else config.dtype)


class Results:
    """One part's JSON file: settings, machine, and results by key, written whole after each."""

    def __init__(self, folder: Path, part: str, settings: dict[str, Any], again: bool = False) -> None:
        self.path = folder / f"{part}.json"
        head = {"settings": settings, "machine": machine(settings["threads"])}
        stored = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}
        same = not again and all(stored.get(name) == value for name, value in head.items())
        self.content = stored if same else {**head, "results": {}}

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the part's numbers."""
        return self.content["settings"]

    def __contains__(self, key: str) -> bool:
        return key in self.content["results"]

    def get(self, key: str, make: Callable[[], Any]) -> Any:
        """The stored result of this key, else what ``make`` returns, which is stored."""
        if key not in self:
            self.content["results"][key] = make()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, json.dumps(self.content, indent=1) + "\n")
        return self.content["results"][key]


# --- measuring one trainer, in a process of its own


class Clock:
    """Seconds inside some functions of an object or module, and CPU seconds, since the last ``read``."""

    def __init__(self, target: Any, **names: str) -> None:
        """``sampling="sample"`` adds the time of ``target.sample`` under "sampling"."""
        self.seconds: dict[str, float] = {}
        self.cpu = time.process_time()
        self.watch(target, **names)

    def watch(self, target: Any, **names: str) -> None:
        """Time further functions, those of ``target``."""
        for label, name in names.items():
            self.seconds[label] = 0.0
            setattr(target, name, self._timed(label, getattr(target, name)))

    def _timed(self, label: str, function: Callable) -> Callable:
        def timed(*args, **kwargs):
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[label] += time.perf_counter() - started

        return timed

    def read(self, total: float) -> dict[str, float]:
        """The parts, with what is left of ``total`` as "update"; starts again at zero."""
        parts, before = dict(self.seconds), self.cpu
        self.seconds, self.cpu = dict.fromkeys(parts, 0.0), time.process_time()
        cpu = self.cpu - before
        return {"seconds": total, **parts, "update": total - sum(parts.values()), "cpu_seconds": cpu}


def resident() -> float:
    """Resident memory of this process now, GiB."""
    import psutil  # comes with accelerate

    return psutil.Process().memory_info().rss / GIB


def _ours(channel, settings: dict[str, Any], fixed: bool) -> None:
    """Serve steps of our trainer over a pipe: a message in is a step, its measurements come back."""
    from covrl_lab.train import step as step_parts
    from covrl_lab.train.trainer import Trainer
    from covrl_lab.train.tree import count_nodes

    with tempfile.TemporaryDirectory() as folder:
        # The whole step as a user has it, trace files included; checkpoints and evaluations left out.
        quiet = {"steps": 10**6, "eval_every": 0, "eval_questions": 1, "checkpoint_every": 10**6}
        config = RunConfig(**settings, **quiet, run_dir=folder)
        trainer = Trainer(config, progress=False).setup()
        if fixed:
            trainer.prompter.ends = lambda ids, end: False
            trainer.policy.tokenizer.eos_token_id = None
            trainer.policy.causal_lm.generation_config.eos_token_id = None
        loaded, drawn, draw = resident(), [], trainer.sample

        def sample(step: int):
            drawn.append(draw(step))
            return drawn[-1]

        trainer.sample = sample
        clock = Clock(trainer, sampling="sample")
        clock.watch(step_parts, scoring="trace_logprobs")
        steps = iter(trainer)
        while channel.recv():
            clock.read(0)
            record = next(steps)
            _, prompts, batch = drawn.pop()
            rows = len(batch)
            own = [prompts[i // batch.group_size] for i in range(rows)]
            contexts = [p.prior if q else p.posterior for p, q in zip(own, batch.from_prior, strict=True)]
            generated, answers = int(batch.mask.sum()), sum(len(p.answer) for p in own)
            if fixed and generated != rows * config.max_trace_tokens:
                raise AssertionError(f"{generated} tokens were generated: a trace has ended early")
            both = config.composite_weight < 1 or config.alpha < 1
            channel.send(
                clock.read(record.seconds)
                | {
                    "rows": rows,
                    "generated": generated,
                    "scored": generated * (1 + both) + answers,
                    "prompt_tokens": count_nodes(contexts),
                    "prompt_tokens_as_rows": sum(map(len, contexts)),
                    "update_tokens": record.packed_tokens,
                    "update_tokens_as_rows": record.padded_tokens,
                    "loaded_gib": loaded,
                    "peak_gib": record.peak_memory_gib,
                }
            )


def _prompts(config: RunConfig, step: int) -> tuple[list, Any]:
    """The prompts of a step (from 0), and the tokenizer."""
    from covrl_lab.train.opening import open_task

    task, prompter = open_task(config)
    count = config.questions_per_step
    return [prompter(e) for e in task.train(step * count, count, config.seed)], prompter.tokenizer


def _trl(channel, settings: dict[str, Any], steps: int) -> None:
    """The same for TRL's GRPOTrainer, stopped between steps by a callback."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback
    from transformers.utils import logging
    from trl import GRPOConfig, GRPOTrainer

    from covrl_lab.train.embedded import EMBEDDED, embedded_model_path
    from covrl_lab.train.records import peak_memory_gib
    from covrl_lab.train.tree import count_nodes

    config = RunConfig(**settings)
    source = str(embedded_model_path()) if config.model == EMBEDDED else config.model
    cuda = torch.cuda.is_available()
    dtype = _dtype(config)
    quantized = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        source,
        dtype=dtype,
        device_map={"": "cuda" if cuda else "cpu"},
        quantization_config=quantized if config.quantization == "nf4" else None,
    )
    rows = config.questions_per_step * config.rollouts_per_question
    texts = []
    for step in range(steps):
        prompts, tokenizer = _prompts(config, step)
        texts += [tokenizer.decode(p.prior) for p in prompts]
    with tempfile.TemporaryDirectory() as folder:
        arguments = GRPOConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=rows,
            num_generations=config.rollouts_per_question,
            max_completion_length=config.max_trace_tokens,
            generation_kwargs={"min_new_tokens": config.max_trace_tokens},
            temperature=config.temperature,
            learning_rate=config.learning_rate,
            beta=0.0,
            bf16=dtype == torch.bfloat16,
            use_cpu=not cuda,
            gradient_checkpointing=False,
            shuffle_dataset=False,
            dataloader_pin_memory=cuda,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=model,
            args=arguments,
            reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
            train_dataset=Dataset.from_dict({"prompt": texts}),
            processing_class=tokenizer,
            peft_config=LoraConfig(
                r=config.lora_rank,
                lora_alpha=config.lora_alpha,
                lora_dropout=0.0,
                target_modules="all-linear",
                task_type="CAUSAL_LM",
            ),
        )
        loaded, drawn, draw = resident(), [], trainer._generate_and_score_completions

        def sample(inputs):
            drawn.append(draw(inputs))
            return drawn[-1]

        trainer._generate_and_score_completions = sample
        clock = Clock(trainer, sampling="_generate_and_score_completions", scoring="compute_loss")

        class Gate(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                control.should_training_stop = not channel.recv()
                clock.read(0)
                self.started = time.perf_counter()

            def on_step_end(self, args, state, control, **kwargs):
                measured, output = clock.read(time.perf_counter() - self.started), drawn.pop()
                prompt, mask = output["prompt_mask"], output["completion_mask"]
                ids = [p[m.bool()].tolist() for p, m in zip(output["prompt_ids"], prompt, strict=True)]
                traces = [t[m.bool()].tolist() for t, m in zip(output["completion_ids"], mask, strict=True)]
                channel.send(
                    measured
                    | {
                        "rows": rows,
                        "generated": int(mask.sum()),
                        "scored": int(mask.sum()),
                        "prompt_tokens": prompt.numel(),  # padding is computed, too
                        "prompt_tokens_as_rows": int(prompt.sum()),
                        "update_tokens": prompt.numel() + mask.numel(),
                        "update_tokens_as_rows": int(prompt.sum() + mask.sum()),
                        "update_tokens_needed": count_nodes([p + t for p, t in zip(ids, traces, strict=True)]),
                        "loaded_gib": loaded,
                        "peak_gib": peak_memory_gib(model.device),
                    }
                )

        trainer.add_callback(Gate())
        trainer.train()


def _serve(channel, name: str, settings: dict[str, Any], threads: int, steps: int) -> None:
    import torch

    torch.set_num_threads(threads)
    if name == "trl":
        _trl(channel, settings, steps)
        return
    fixed, changes = VARIANTS[name]["fixed"], {k: v for k, v in VARIANTS[name].items() if k != "fixed"}
    with suppress(KeyboardInterrupt):  # what the trainer makes of the signal that ends this process
        _ours(channel, settings | changes, fixed)


@contextmanager
def serving(name: str, settings: dict[str, Any], threads: int, steps: int) -> Iterator[Callable[[], dict]]:
    """A process that runs steps of one variant; yields the function that asks for the next one."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, name, settings, threads, steps), daemon=True)
    process.start()
    there.close()

    def step() -> dict:
        try:
            here.send(True)
            return here.recv()
        except (EOFError, OSError):
            raise ConfigError(f"the process of {name!r} ended; its message is above") from None

    try:
        yield step
    finally:
        process.terminate()
        process.join()


# --- the parts


def step_part(results: Results) -> None:
    """Repetitions of one step of each variant in turn, after one step each that is not counted."""
    settings, threads = results.settings["config"], results.settings["threads"]
    repeats, variants = results.settings["repeats"], results.settings["trainers"]
    missing = [r for r in map(str, range(repeats)) if r not in results]
    if not missing:
        return
    with ExitStack() as stack:
        steps = {name: stack.enter_context(serving(name, settings, threads, len(missing) + 1)) for name in variants}
        for step in tqdm(steps.values(), desc="step: models, first steps"):
            step()
        for r in tqdm(missing, desc="step: repetitions"):
            results.get(r, lambda: {name: step() for name, step in steps.items()})


def limits_part(results: Results) -> None:
    """The machine's rates, and the bare matrix products of the model at the step's own row counts."""
    results.get("machine limits", lambda: apart(_limits, results.settings))


def _limits(settings: dict[str, Any]) -> dict[str, Any]:
    import torch

    torch.set_num_threads(settings["threads"])
    config = RunConfig(**settings["config"])
    device, shape = measure_device(3.0), shape_of(config.model)
    place, dtype = "cuda" if torch.cuda.is_available() else "cpu", _dtype(config)
    layers = [
        torch.randn(out, size, dtype=dtype, device=place) for _ in range(shape.layers) for size, out in shape.matrices
    ]
    head = torch.randn(shape.vocabulary, shape.hidden, dtype=dtype, device=place)
    products = {}
    for rows in tqdm(settings["rows"], desc="limits: matrix products", leave=False):
        inputs = {n: torch.randn(rows, n, dtype=dtype, device=place) for n in {w.shape[1] for w in layers}}

        # One after the other, as in a forward: none is in cache. Few rows are decoding, which needs the head.
        weights = [*layers, head] if rows <= 64 else layers

        def once(inputs=inputs, weights=weights) -> None:
            for weight in weights:
                inputs[weight.shape[1]] @ weight.T

        products[str(rows)] = fastest(once, seconds=8.0)
    return {"rate": device.rate, "bandwidth": device.bandwidth, "products": products}


def growth_part(results: Results) -> None:
    """The faster of two steps of ours at each point, after one not counted; memory is the process's peak."""
    settings, threads = results.settings["config"], results.settings["threads"]

    def point(change: dict[str, Any]) -> dict[str, float]:
        with serving("covrl", settings | change, threads, 3) as step:
            step()
            return min((step() for _ in range(2)), key=itemgetter("seconds")) | {"value": next(iter(change.values()))}

    points = [
        (f"{name}: {i}", change) for name, all in results.settings["points"].items() for i, change in enumerate(all)
    ]
    for key, change in tqdm(points, desc="growth"):
        results.get(key, lambda change=change: point(change))


def memory_part(results: Results) -> None:
    """Bytes of scoring and its backward at equal hidden size."""
    points = [(v, r) for r in results.settings["rollouts"] for v in results.settings["vocabularies"]]
    for vocabulary, rollouts in tqdm(points, desc="memory"):
        results.get(f"{vocabulary}, {rollouts}", lambda v=vocabulary, r=rollouts: apart(_memory, v, r))


def _memory(vocabulary: int, rollouts: int) -> dict[str, int]:
    from covrl_lab.train.models import load_policy

    with tempfile.TemporaryDirectory() as folder:
        random_model(folder, "tiny", vocab_size=vocabulary)
        policy = load_policy(folder, quantization="none", lora_rank=8, device="cpu")
    tokens, run = scoring_run(policy, rollouts)
    return {"vocabulary": vocabulary, "packed_tokens": tokens, "bytes": peak_bytes(run)}


def random_model(folder: str, like: str, **changes: Any) -> None:
    """Save a model of random weights with the configuration and tokenizer of another, but for ``changes``."""
    import torch
    import transformers

    from covrl_lab.train.models import load_config, load_tokenizer

    transformers.utils.logging.disable_progress_bar()
    config = load_config(like)
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    load_tokenizer(like).save_pretrained(folder)


def scoring_run(policy, rollouts: int, trace_tokens: int = 32) -> tuple[int, Callable[[], None]]:
    """Packed tokens, and a function that scores random traces in groups of four and runs the backward."""
    import torch

    from covrl_lab.train.scoring import packed_tokens, trace_logprobs
    from covrl_lab.types import Prompt, TraceBatch

    generator = torch.Generator().manual_seed(0)

    def ids(*shape: int):
        return torch.randint(3, 250, shape, generator=generator)

    shared = ids(2, 40).tolist()
    prompts = [
        Prompt(*(tuple(root + ids(8).tolist()) for root in shared), seam=(1, 2), answer=(3, 4, 5))
        for _ in range(rollouts // 4)
    ]
    yes = torch.ones(rollouts, trace_tokens, dtype=torch.bool)
    batch = TraceBatch(ids(rollouts, trace_tokens), yes, yes[:, 0], yes[:, 0], group_size=4)

    def run() -> None:
        scores = trace_logprobs(policy, prompts, batch)
        (scores.prior.sum() + scores.posterior.sum() + scores.answer.sum()).backward()
        for _, parameter in policy.trainable():
            parameter.grad = None

    return packed_tokens(prompts, batch)[0], run


def peak_bytes(function: Callable[[], None]) -> int:
    """The most bytes a function holds at once on the CPU beyond what was there before, weights aside.

    Adds up the allocator's own events, so that the number is exact and the same in every run.
    """
    from torch.profiler import ProfilerActivity, profile

    function()  # what is allocated once and kept does not count
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def plan_part(results: Results) -> None:
    """Predicted against measured, on this machine: the embedded model, and a larger one of random weights."""
    config, threads = results.settings["config"], results.settings["threads"]
    device = Device(**apart(_measure, threads))
    for name, changes in tqdm({"embedded": None, "random 0.3B": LARGER}.items(), desc="plan"):

        def compare(changes=changes) -> dict[str, Any]:
            with tempfile.TemporaryDirectory() as folder:
                settings = dict(config)
                if changes:
                    apart(random_model, folder, config["model"], **changes)
                    settings["model"] = folder
                with serving("covrl", settings, threads, 2) as step:
                    step()
                    taken = step()
                planned = plan(RunConfig(**settings), device=device)
            return {
                "predicted": {"gib": planned.peak / GIB, "seconds": 60 * planned.minutes},
                "measured": {"gib": taken["peak_gib"], "seconds": taken["seconds"]},
                "parts": {"memory": planned.memory, "seconds": planned.seconds},
            }

        results.get(name, compare)


def layout_part(results: Results) -> None:
    """Answers after posterior traces, and packed tokens, with own and with shared demonstrations."""
    for task in results.settings["tasks"]:
        for layout in ("own", "shared"):
            results.get(f"{task}, {layout}", lambda a=task, b=layout: apart(_layout, results.settings, a, b))


def _layout(settings: dict[str, Any], task: str, layout: str) -> dict[str, float]:
    import torch

    from covrl_lab.train.scoring import packed_tokens, trace_logprobs
    from covrl_lab.train.trainer import Trainer

    torch.set_num_threads(settings["threads"])
    with tempfile.TemporaryDirectory() as folder:
        config = RunConfig(**settings["config"] | {"task": task, "questions_per_step": 16, "run_dir": folder})
        trainer = Trainer(config, progress=False).setup()
        if layout == "shared":
            trainer.prompter._posterior_root = trainer.prompter._prior_root
        answers, finished, packed = [], [], []
        for step in range(settings["steps"]):
            _, prompts, batch = trainer.sample(step)
            with torch.no_grad():
                logprobs = trace_logprobs(trainer.policy, prompts, batch, temperature=trainer.config.temperature)
            answers.append(logprobs.answer.sum(1)[~batch.from_prior])
            finished.append(batch.finished[~batch.from_prior])
            packed.append(packed_tokens(prompts, batch)[0])
    answers, finished = torch.cat(answers), torch.cat(finished).float()
    return {
        "traces": len(answers),
        "answer_logprob": float(answers.mean()),
        "standard_error": float(answers.std() / len(answers) ** 0.5),
        "finished_share": float(finished.mean()),
        "packed_tokens": sum(packed) / len(packed),
    }


def _measure(threads: int) -> dict[str, Any]:
    import torch

    torch.set_num_threads(threads)
    return dataclasses.asdict(measure_device(3.0))


def apart(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """``function(*args)`` in a process of its own, which starts and ends with it."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args, **kwargs).result()


# --- the command

PARTS = ("limits", "step", "growth", "memory", "plan", "layout")


def main() -> None:
    """Measure what is missing, then print what is stored."""
    from .speed import FOLDER, report  # it draws, which a machine that only measures need not be able to

    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.benchmark", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated; 'none' only prints")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--repeats", type=int, default=5, help="paired repetitions of the step")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each trainer")
    parser.add_argument("--again", action="store_true", help="measure also what is stored")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the JSON files lie")
    arguments = parser.parse_args()
    chosen = [] if arguments.parts == "none" else arguments.parts.split(",")
    for part in chosen:
        if part not in PARTS:
            parser.exit(2, f"{parser.prog}: unknown part {part!r}{did_you_mean(part, PARTS)}\n")
    trainers = list(VARIANTS)
    if importlib.util.find_spec("trl") is None:
        print('TRL is not installed (pip install -e ".[bench]"): only our own trainers are measured')
        trainers = [name for name in trainers if name != "trl"]
    config = STEP | {"model": arguments.model}
    settings = {
        "limits": {"config": config, "rows": ROWS},
        "step": {"config": config, "repeats": arguments.repeats, "trainers": trainers},
        "growth": {"config": config, "points": GROWTH},
        "memory": {"vocabularies": VOCABULARIES, "rollouts": MEMORY_ROLLOUTS},
        "plan": {"config": config, "larger": LARGER},
        "layout": {"config": config, "tasks": ["arithmetic", "last_letters"], "steps": 4},
    }
    for part in chosen:
        results = Results(arguments.folder, part, {"threads": arguments.threads, **settings[part]}, arguments.again)
        globals()[f"{part}_part"](results)
    print(report(arguments.folder))


if __name__ == "__main__":
    main()
