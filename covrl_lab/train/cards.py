"""Cards of shared runs. Names and settings are somebody's: in the text they are code, in YAML a library writes them."""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData

from .. import __version__
from ..config import RunConfig
from ..defaults import settings_read
from ..runs.folder import SHARED, TRACE_COLUMNS, Run, by_set
from .embedded import EMBEDDED
from .models import ALIASES

# The embedded model is this one after a 4-bit GGUF file.
EMBEDDED_ON_HUB, _EMBEDDED_LICENCE = "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"
PAPERS = {"covrl": "2512.12576", "covrl_published": "2512.12576", "jlb": "2503.19618", "verifree": "2505.21493"}
PAPERS |= {"latro": "2411.04282", "rlpr": "2506.18254", "ravr_like": "2510.25206", "grpo": "2402.03300"}
NO_SETTINGS = ("run_dir", "tracker", "memory_gib")  # of one machine
_PLAIN = re.compile(r"[\w ./,:@*+=()\"'-]+", re.ASCII)
FILES = {
    "adapter_model.safetensors": "the adapter, with `adapter_config.json` in PEFT's layout",
    SHARED: "step, every setting, versions; with it the folder is a checkpoint for covrl_lab",
    "report.html": "the page of the run, which opens without a network: curves, accuracy, traces token by token",
    "merged": "the whole model with the adapter added, for plain transformers",
    "adapter.gguf": "the adapter for llama.cpp: `llama-cli -m BASE.gguf --lora adapter.gguf`",
    "traces": "every stored trace of the run, a data set of its own (on the Hub: OWNER/NAME-traces)",
}
ALWAYS = list(FILES)[:3]
MERGED = (
    "`merged` is made from the *unquantised* base: added to 4-bit weights, most of the adapter would be rounded away. "
    "The run trained beside the base in NF4, so that its own numbers differ a little from the merged model's."
)


def code(value: Any) -> str:
    """A value as Markdown code, which no text can leave: signs that could be markup are character references."""
    text = value if isinstance(value, str) else json.dumps(value)
    if _PLAIN.fullmatch(text):
        return f"`{text}`"
    shown = json.dumps(text)[1:-1]  # line ends, controls and other scripts as \\uXXXX
    return f"<code>{re.sub('[^A-Za-z0-9 ]', lambda found: f'&#{ord(found[0])};', shown)}</code>"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table of cells that are Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def versions() -> dict[str, str]:
    names = ("torch", "transformers", "peft", "bitsandbytes", "gguf", "huggingface_hub")
    return {"covrl_lab": __version__, **{name: version(name) for name in names}}


def model_card(run: Run, config: RunConfig, step: int, name: str, extras: Sequence[str]) -> ModelCard:
    """The card of a run's adapter after ``step`` steps; ``extras``: names in ``FILES`` of what else is shared."""
    licence, sets = _licence(config.model), by_set(run.evaluations)
    on_hub = EMBEDDED_ON_HUB if config.model == EMBEDDED else config.model
    local = on_hub in ALIASES or os.path.exists(os.path.expanduser(on_hub))
    data = ModelCardData(
        base_model=None if local else on_hub,
        license=licence,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["covrl_lab", "lora", "reinforcement-learning", "reasoning", config.method],
        datasets=[config.task.removeprefix("hf/")] if config.task.startswith("hf/") else None,
        model_name=name,
        eval_results=list(_results(sets, config, step)) or None,
    )
    read, usual = settings_read(config.method, config.to_dict()), RunConfig(method=config.method)
    settings = {k: v for k, v in read.items() if v is not None and k not in NO_SETTINGS}  # they decided the numbers
    rows = [[code(k), code(v), "" if v == getattr(usual, k) else "yes"] for k, v in settings.items()]
    files = {k: v for k, v in FILES.items() if k in extras or k in ALWAYS}
    near = f" (nearly {code(on_hub)}: its weights went through a 4-bit file)" if on_hub != config.model else ""
    paper = PAPERS[config.method]
    parts = [
        f"# {code(name)}",
        f"A LoRA adapter for {code(config.model)}{near}, trained by reinforcement learning with `{config.method}` "
        f"(after [arXiv {paper}](https://arxiv.org/abs/{paper})) on {code(config.task)}: "
        f"{step} of {config.steps} steps, seed {config.seed}.",
        f"Licence of the base model: {code(licence) if licence else 'not stated'}.",
        table(["file", "what it is"], [[f"`{k}`", v] for k, v in files.items()]),
        *[MERGED] * ("merged" in extras and config.quantization == "nf4"),
        "## Results",
        "Held-out questions, greedy from the question alone; 95% intervals over questions.",
        _result_table(sets, step) if len(run.evaluations) else "Not evaluated.",
        "## Signs that something went wrong",
        "\n".join(f"- {code(text)}" for text in run.alarms.values()) or "None was found in the run's files.",
        "## How to load it",
        f"```python\n{loading(config, name)}\n```",
        "In a notebook, `covrl_lab.PromptBench(checkpoint=FOLDER)` asks it a question in the run's own prompts; FOLDER "
        "holds these files.",
        "## Settings",
        table(["setting", "value", "changed from the default"], rows),
        "## Written with",
        table(["package", "version"], [[code(k), code(v)] for k, v in versions().items()]),
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def loading(config: RunConfig, name: str) -> str:
    """Python that loads base and adapter as the run had them."""
    model, where = (json.dumps(text).replace("`", "\\u0060") for text in (config.model, name))
    if config.model in ALIASES:  # names of this library
        settings = f'quantization="{config.quantization}", dtype="{config.dtype}"'
        lines = ["from covrl_lab import load_policy", "from peft import PeftModel", ""]
        lines += [f"policy = load_policy({model}, {settings}, lora_rank=0)"]
        lines += ["base, tokenizer = policy.model, policy.tokenizer"]
    else:
        packed, dtype = config.quantization == "nf4", config.dtype.replace("auto", "bfloat16")  # as most are stored
        names = "AutoModelForCausalLM, AutoTokenizer" + ", BitsAndBytesConfig" * packed
        lines = ["import torch", "from peft import PeftModel", f"from transformers import {names}", ""]
        if packed:
            lines += ["packed = BitsAndBytesConfig(", "    load_in_4bit=True,", '    bnb_4bit_quant_type="nf4",']
            lines += ["    bnb_4bit_use_double_quant=True,", f"    bnb_4bit_compute_dtype=torch.{dtype},", ")"]
        options = f"dtype=torch.{dtype}" + ", quantization_config=packed" * packed
        lines += [f"base = AutoModelForCausalLM.from_pretrained({model}, {options})"]
        lines += [f"tokenizer = AutoTokenizer.from_pretrained({model})"]
    return "\n".join([*lines, f"model = PeftModel.from_pretrained(base, {where})"])


def trace_card(config: RunConfig, name: str, rows: int) -> DatasetCard:
    """The card of a run's traces."""
    data = DatasetCardData(
        pretty_name=f"Traces of {name}",
        task_categories=["text-generation"],
        tags=["covrl_lab", "reasoning", config.method],
        configs=[{"config_name": "default", "data_files": "data/*.parquet"}],
    )
    parts = [
        f"# Traces of {code(name)}",
        f"{rows:,} reasoning traces that {code(config.model)} wrote for {code(config.task)} while it was trained with "
        f"`{config.method}`, with their log-probabilities before each step's update. Temperature {config.temperature}.",
        "Licence: not stated; questions and answers are those of the task.",
        table(["column", "what it is"], [[f"`{k}`", text] for k, text in TRACE_COLUMNS.items()]),
    ]
    return DatasetCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def _licence(model: str) -> str | None:
    """What the base model's own card states; None where there is none, or none that can be read."""
    if model == EMBEDDED:
        return _EMBEDDED_LICENCE
    folder = Path(model).expanduser()
    with suppress(Exception):  # no network, no card, a damaged one
        if model not in ALIASES:
            found = ModelCard.load(folder / "README.md" if folder.is_dir() else model, ignore_metadata_errors=True)
            return found.data.license if isinstance(found.data.license, str) else None
    return None


def _results(sets: Mapping[str, pd.DataFrame], config: RunConfig, step: int) -> Iterable[EvalResult]:
    """The evaluation after ``step`` as the Hub reads it: of each set accuracy and avg@k, intervals as arguments."""
    for name, frame in list(sets.items())[len(sets) > 1 :]:
        for row in frame[frame["step"] == step].to_dict("records") if len(frame) else ():
            named = name or config.eval_task or config.task
            for metric in ("accuracy", "avg_at_k"):
                if (value := row.get(metric)) is not None and value == value:
                    interval = {"low_95": row[f"{metric}_low"], "high_95": row[f"{metric}_high"]}
                    told = {"metric_value": value, "metric_args": interval | {"questions": row["eval_questions"]}}
                    yield EvalResult("text-generation", named, dataset_name=named, metric_type=metric, **told)


def _result_table(sets: Mapping[str, pd.DataFrame], step: int) -> str:
    """Before training and the last evaluation up to ``step``, each set on its own."""
    rows = []

    def interval(row: Mapping[str, Any], name: str) -> str:
        if row.get(name) is None or row[name] != row[name]:
            return "–"
        return f"{row[name]:.1%} ({row[f'{name}_low']:.1%} to {row[f'{name}_high']:.1%})"

    for name, frame in sets.items():
        known = frame[frame["step"] <= step].to_dict("records")
        for row in known[:1] + known[1:][-1:]:
            nats = [f"{row[k]:.2f}" if k in row else "–" for k in ("answer_logprob", "trace_dependence")]
            counts = [f"{row['eval_questions']:.0f}", f"{row['eval_trace_tokens']:.1f}"]
            title = code(name) if name else "average" if len(sets) > 1 else "held-out"
            cells = [title, f"{row['step']:.0f}", interval(row, "accuracy"), interval(row, "avg_at_k")]
            rows.append([*cells, *nats, *counts])
    header = "set, after step, accuracy, avg@k, log p(y given x z) (nats), trace dependence (nats)".split(", ")
    return table([*header, "questions", "trace length (tokens)"], rows)
