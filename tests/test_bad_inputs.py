"""A catalogue of bad inputs as data: each ends in one sentence, and none in a dependency's traceback."""

import json
import logging
import os
import shutil
import sys
from random import Random

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import TINY_RUN, assert_one_sentence, flags, make_trainer, numbers

from covrl_lab import RunConfig, load_run, load_task
from covrl_lab.__main__ import main
from covrl_lab.runs import compare
from covrl_lab.runs.folder import read_table
from covrl_lab.train.checkpoints import find_checkpoint, repair
from covrl_lab.train.models import load_config, load_policy, load_tokenizer
from covrl_lab.types import ConfigError
from covrl_lab.views.explorer import TraceExplorer
from covrl_lab.views.monitor import snapshot, status_html, traces_html
from covrl_lab.views.report import page

ROWS = [{"question": f"Say {i}?", "answer": str(i)} for i in range(100)]


def sentence_of(action, *words) -> str:
    """The one sentence of the ConfigError that ``action`` ends in, which holds the words."""
    with pytest.raises(ConfigError) as caught:
        action()
    message = str(caught.value)
    assert_one_sentence(message)
    assert all(word in message for word in words), message
    return message


# --- settings: refused before a model is loaded

SETTINGS = [
    ({"lora_rank": 10**9}, "lora_rank must be 1 or more and at most 1,000"),
    ({"lora_rank": "10**9"}, "lora_rank must be a whole number"),
    ({"lora_alpha": 10**12}, "lora_alpha must be"),
    ({"learning_rate": 1e300}, "learning_rate must be above 0, from 1e-12 to 10"),
    ({"learning_rate": 5e-324}, "learning_rate must be"),
    ({"learning_rate": -1}, "learning_rate must be above 0"),
    ({"learning_rate": "1e400"}, "learning_rate must be a finite number"),
    ({"learning_rate": [1e-4]}, "learning_rate must be a finite number"),
    ({"temperature": 1e-300}, "temperature must be above 0"),
    ({"temperature": 1e300}, "temperature must be above 0"),
    ({"temperature": float("nan")}, "temperature must be a finite number"),
    ({"top_p": -0.1}, "top_p must be"),
    ({"top_p": float("nan")}, "top_p must be a finite number"),
    ({"steps": 10**30}, "steps must be 0 or more and at most 1,000,000"),
    ({"steps": 10**5000}, "steps must be a whole number"),
    ({"steps": "9" * 5000}, "steps must be a whole number"),
    ({"steps": {}}, "steps must be a whole number"),
    ({"questions_per_step": 10**6}, "questions_per_step must be"),
    ({"rollouts_per_question": 10**6}, "rollouts_per_question must be"),
    ({"questions_per_step": 1000, "rollouts_per_question": 1000}, "in memory together"),
    ({"max_trace_tokens": 10**9}, "max_trace_tokens must be"),
    ({"max_answer_tokens": 10**9}, "max_answer_tokens must be"),
    ({"max_packed_tokens": 10**12}, "max_packed_tokens must be"),
    ({"updates_per_step": 10**6}, "updates_per_step must be"),
    ({"eval_questions": 10**9}, "eval_questions must be"),
    ({"eval_samples": 10**9}, "eval_samples must be"),
    ({"n_sample": 10**9, "method": "jlb"}, "n_sample must be"),
    ({"nll_weight": -1}, "nll_weight must be 0 or more"),
    ({"nll_weight": float("nan")}, "nll_weight must be a finite number"),
    ({"nll_weight": 1e300}, "nll_weight must be 0 or more and at most 1e6"),
    ({"posterior_weight": -1e-9}, "posterior_weight must be 0 or more"),
    ({"posterior_weight": float("inf")}, "posterior_weight must be a finite number"),
    ({"weight_decay": 1e9}, "weight_decay must be"),
    ({"max_grad_norm": 1e-300}, "max_grad_norm must be"),
    ({"clip_range": 1e300}, "clip_range must be"),
    ({"evidence_floor": float("nan")}, "evidence_floor must be a finite number"),
    ({"alpha_rate": 2}, "alpha_rate must be between 0 and 1"),
    ({"alpha": "NaN"}, "alpha must be a finite number"),
    ({"seed": 2**32}, "seed must be from 0 to 2**32 - 1"),
    ({"seed": -1}, "seed must be from 0 to 2**32 - 1"),
    ({"difficulty": 10**9}, "difficulty must be a whole number from 1 to 5"),
    ({"demonstrations": 1000}, "demonstrations must be 0 to 8"),
    ({"checkpoint_every": -1}, "checkpoint_every must be"),
    ({"warmup_steps": 10**12}, "warmup_steps must be"),
    ({"gradient_checkpointing": "True"}, "gradient_checkpointing must be True or False"),
    ({"method": "x" * 100_000}, "unknown method"),
    ({"method": ["covrl"]}, "unknown method"),
    ({"dtype": "float16"}, "unknown dtype 'float16'"),
    ({"quantization": None}, "unknown quantization None"),
    ({"task": "a\0b"}, "without NUL, not 'a\\x00b'"),
    ({"task": ""}, "unknown task ''"),
    ({"task": "x" * 5000}, "task must be text of at most 1,000 characters"),
    ({"task": "x" * 500 + ".csv"}, "does not exist"),
    ({"task": "hf/../.."}, "must have the form hf/OWNER/NAME"),
    ({"task": "hf/a/.."}, "must have the form hf/OWNER/NAME"),
    ({"task": "hf//"}, "must have the form hf/OWNER/NAME"),
    ({"task": "hf/a/b/c"}, "must have the form hf/OWNER/NAME"),
    ({"task": "reasoning_gym/../x"}, "unknown reasoning-gym task"),
    ({"task": "/.jsonl"}, "unknown task '/.jsonl'"),
    ({"task": "no/such/file.parquet"}, "does not exist"),
    ({"task": ".jsonl"}, "unknown task '.jsonl'"),
    ({"model": "a\0b"}, "model must be text of at most 1,000 characters without NUL"),
    ({"model": "\ud800"}, "without NUL, not '\\ud800'"),
    ({"model": ""}, "unknown model ''"),
    ({"model": "m" * 500}, "unknown model"),
    ({"model": "../.."}, "it has no config.json"),
    ({"model": "~nobody-here/model"}, "unknown model '~nobody-here/model'"),
    ({"model": "owner/name/more"}, "unknown model"),
    ({"model": "/"}, "it has no config.json"),
    ({"run_dir": ""}, "run_dir must be the name of a folder"),
    ({"run_dir": "a\0b"}, "run_dir must be text of at most 1,000 characters without NUL"),
    ({"run_dir": "d/" * 5000}, "run_dir must be text of at most 1,000 characters"),
    ({"run_dir": 3}, "run_dir must be text"),
    ({"device": "meta"}, "device='meta' is not known"),
    ({"device": ""}, "device='' is not known"),
    ({"device": "gpu"}, "device='gpu' is not known"),
    ({"device": "cpu:x"}, "device='cpu:x' is not known"),
    ({"lora_rank": 65}, "lora_rank=65 is above 64, the width of 'tiny'"),
    ({"max_trace_tokens": 8192}, "more than the model's context of 8192"),
    ({"eval_questions": 10_000, "difficulty": 1}, "different held-out questions, not 10000"),
]
if os.name == "posix":  # elsewhere other words
    SETTINGS.append(({"run_dir": "d" * 300}, "cannot be a run_dir (File name too long)"))
if sys.platform == "linux":
    SETTINGS.append(({"run_dir": "/proc/self/run"}, "'/proc/self'"))


@pytest.mark.parametrize(("settings", "words"), SETTINGS, ids=[words[:50] for _, words in SETTINGS])
def test_a_setting_that_cannot_work(settings, words, tmp_path, monkeypatch):
    monkeypatch.setattr("covrl_lab.train.models.AutoModelForCausalLM", None)
    base = TINY_RUN | {"run_dir": str(tmp_path / "run")} | settings
    from covrl_lab import Trainer

    sentence_of(lambda: Trainer(RunConfig(**base), progress=False).setup(), words)
    assert not (tmp_path / "run").exists()


# --- data files

DEEP = '{"question": ' + "[" * 100_000 + "]" * 100_000 + ', "answer": "1"}'
LONG = [*ROWS[:79], {"question": "word " * 40_000, "answer": "1"}, *ROWS[80:]]


def row(**cells) -> str:
    return json.dumps({"question": "Say?", "answer": "1"} | cells)


DATA = [
    ("x.csv", "", "is empty"),
    ("x.jsonl", "", "is empty"),
    ("x.jsonl", "\n\n \n", "is empty"),
    ("x.json", "", "cannot be read"),
    ("x.json", "[]", "is empty"),
    ("x.json", "null", "must hold a list of objects"),
    ("x.json", "[1, 2]", "must hold a list of objects"),
    ("x.json", "[" * 100_000, "cannot be read (maximum recursion depth"),
    ("x.parquet", b"", "cannot be read"),
    ("x.parquet", b"PAR1" + b"\0" * 100 + b"PAR1", "cannot be read"),
    ("x.parquet", "question,answer\n1,2\n", "cannot be read"),
    ("x.jsonl", DEEP, "line 1 of data file", "cannot be read (maximum recursion depth"),
    ("x.jsonl", f"{row()}\n{{broken", "line 2 of data file", "cannot be read"),
    ("x.jsonl", f"{row()}\n[1]", "must hold a list of objects"),
    ("x.jsonl", f"{row()}\n{row(answer=['1'])}", "row 2 of", "has ['1'] in 'answer'"),
    ("x.jsonl", f"{row()}\n{row(answer={'a': 1})}", "row 2 of", "has {'a': 1} in 'answer'"),
    ("x.jsonl", f"{row()}\n{row(question=['q'])}", "row 2 of", "has ['q'] in 'question'"),
    ("x.jsonl", f"{row()}\n{row(answer=float('nan'))}", "row 2 of", "has nan in 'answer'"),
    ("x.jsonl", f"{row()}\n{row(answer=float('inf'))}", "row 2 of", "has inf in 'answer'"),
    ("x.jsonl", f"{row()}\n{row(answer=None)}", "row 2 of", "empty 'answer'"),
    ("x.jsonl", f"{row()}\n{row(answer=' #### ')}", "row 2 of", "empty 'answer'"),
    ("x.jsonl", f"{row()}\n{row(question='a' + chr(0))}", "row 2 of", "has 'a\\x00' in"),
    ("x.jsonl", f"{row()}\n{row(answer=chr(0xD800))}", "row 2 of", "has '\\ud800' in 'answer'"),
    ("x.jsonl", f"{row()}\n" + '{"question": "q"}', "row 2 of", "empty 'answer'"),
    ("x.jsonl", '{"question": "q", "answer": ' + "9" * 5000 + "}", "line 1 of data file", "Exceeds the limit"),
    ("x.jsonl", b'{"question": "\xff", "answer": "1"}', "cannot be read", "can't decode byte"),
    ("x.jsonl", row().encode("utf-16"), "cannot be read"),
    ("x.csv", f"question,answer\nq,{'9' * 200_000}\n", "field larger than field limit"),
    ("x.csv", "question,answer\nq,1\nr,1,2\n", "row 2 of", "has more cells than there are columns"),
    ("x.csv", "question,answer,answer\nq,1,2\n", "has two columns 'answer'"),
    ("x.csv", "question,answer\nq\n", "row 1 of", "empty 'answer'"),
    ("x.csv", "question,answer\nq,a\0b\n", "row 1 of", "has 'a\\x00b' in 'answer'"),
    ("x.csv", "question\nq\n", "not 'answer'"),
    ("x.csv", "question|answer\nq|1\n", "not 'question'"),
    ("x.csv", "\0\0\0", "not 'question'"),
    ("x.parquet", {"question": ["q", "r"], "answer": [["1"], ["2"]]}, "row 1 of", "has ['1'] in 'answer'"),
    ("x.parquet", {"question": ["q", "r"], "answer": [1.0, float("nan")]}, "row 2 of", "has nan in 'answer'"),
    ("x.parquet", {"question": [b"q"], "answer": ["1"]}, "row 1 of", "has b'q' in 'question'"),
    ("x.parquet", {"question": ["q"], "answer": [{"a": 1}]}, "row 1 of", "has {'a': 1} in 'answer'"),
    ("x.parquet", {"question": [], "answer": []}, "is empty"),
    ("x.jsonl", "\n".join(map(json.dumps, LONG)), "row 80", "more than the model's context of 8192"),
    (
        "x.jsonl",
        "\n".join([*map(json.dumps, ROWS), row(question="Say two?", answer="1\n2")]),
        "row 101",
        "'\\n', which ends an answer",
    ),
    ("x.jsonl", "\n".join(map(json.dumps, ROWS[:3])), "held-out questions"),
]


@pytest.mark.parametrize("case", DATA, ids=lambda case: f"{case[0]} {case[1]!r:.30} {case[-1]:.40}")
def test_a_data_file_that_cannot_work(case, tmp_path, monkeypatch):
    name, content, *words = case
    if isinstance(content, dict):
        pq.write_table(pa.table(content), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.setattr("covrl_lab.train.trainer.open_policy", None)  # too late
    settings = {"task": str(tmp_path / name), "demonstrations": 0, "prompt_style": "few_shot", "steps": 100}
    sentence_of(lambda: make_trainer(tmp_path / "run", TINY_RUN, **settings).setup(), name.split(".")[0], *words)
    assert not (tmp_path / "run").exists()


# --- model folders


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """The tiny model as files."""
    folder = tmp_path_factory.mktemp("model")
    policy = load_policy("tiny", quantization="none", dtype="float32", lora_rank=0)
    policy.model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    return folder


def edit(name, **values):
    """A change of a JSON file: values by name, None takes the name away."""

    def change(folder):
        settings = json.loads((folder / name).read_text())
        settings = {k: v for k, v in (settings | values).items() if v is not None}
        (folder / name).write_text(json.dumps(settings))

    return change


def put(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def cut(name):
    return lambda folder: damage(folder, name, "cut")


def remove(name):
    return lambda folder: (folder / name).unlink()


MODELS = [
    ("config removed", remove("config.json"), "it has no config.json"),
    ("config empty", put("config.json", b""), "could not load the model"),
    ("config no JSON", put("config.json", b"\xff\xfe{"), "could not load the model"),
    ("config a list", put("config.json", b"[]"), "could not load the model"),
    ("config an empty object", put("config.json", b"{}"), "could not load the model"),
    ("config of an unknown kind", edit("config.json", model_type="nothing"), "could not load the model"),
    ("config of a model without text", edit("config.json", model_type="vit"), "could not load the model"),
    ("config with a text for a size", edit("config.json", hidden_size="wide"), "could not load the model"),
    ("config with a size of 0", edit("config.json", num_attention_heads=0), "could not load the model"),
    ("config with a negative size", edit("config.json", num_hidden_layers=-1), "could not load the model"),
    ("wider than its weights", edit("config.json", hidden_size=128), "the model"),
    ("more layers than weights", edit("config.json", num_hidden_layers=4), "weights missing"),
    ("a smaller vocabulary", edit("config.json", vocab_size=10), "the model"),
    ("weights removed", remove("model.safetensors"), "could not load the model"),
    ("weights cut", cut("model.safetensors"), "could not load the model"),
    ("weights empty", put("model.safetensors", b""), "could not load the model"),
    ("weights no safetensors", put("model.safetensors", b"\x80\x04pickle" * 100), "could not load the model"),
    ("tokenizer empty", put("tokenizer.json", b""), "could not load the model"),
    ("tokenizer cut", cut("tokenizer.json"), "could not load the model"),
    ("tokenizer an empty object", put("tokenizer.json", b"{}"), "could not load the model"),
    ("tokenizer settings broken", put("tokenizer_config.json", b"{"), "could not load the model"),
    ("chat template broken", put("chat_template.jinja", b"{% for %}"), "the model's chat template cannot be read"),
]


@pytest.mark.parametrize(("change", "words"), [case[1:] for case in MODELS], ids=[case[0] for case in MODELS])
def test_a_model_folder_that_cannot_work(change, words, model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    change(folder)

    def use():
        settings = {"model": str(folder), "demonstrations": 0, "prompt_style": "chat"}
        make_trainer(tmp_path / "run", TINY_RUN, **settings).setup()

    sentence_of(use, words)


def test_the_model_folder_itself_works(model_folder):
    assert load_config(str(model_folder)).hidden_size == 64 and len(load_tokenizer(str(model_folder))) > 250


# --- the command line

COMMANDS = [
    ([], "the following arguments are required: command"),
    (["trian"], "invalid choice: 'trian'"),
    (["--steps", "1"], "a command comes first"),
    (["train", "--steps", "many"], "steps must be a whole number"),
    (["train", "--steps"], "expected one argument"),
    (["train", "--alpah", "1"], "unknown setting 'alpah'; did you mean 'alpha'?"),
    (["train", "extra"], "unknown setting 'extra'"),
    (["train", "--task", "hf/../.."], "must have the form hf/OWNER/NAME"),
    (["train", "--run_dir", "{file}"], "is a file"),
    (["train", "--run_dir", "{file}/run"], "is a file"),
    (["train", "--run_dir", "{full}"], "not empty and not a run folder"),
    (["train", "--device", "gpu", "--run_dir", "{new}", "--model", "tiny"], "device='gpu' is not known"),
    (["sweep"], "the following arguments are required: folder"),
    (["sweep", "{new}"], "holds no runs of a sweep"),
    (["sweep", "{new}", "--grid", "alpha"], "grid 'alpha' needs a list of values"),
    (["sweep", "{new}", "--grid", "alpha="], "grid 'alpha' needs a list of values"),
    (["sweep", "{new}", "--grid", "alpah=1"], "unknown setting 'alpah'"),
    (["sweep", "{new}", "--grid", "alpha=2"], "alpha must be between 0 and 1"),
    (["sweep", "{new}", "--grid", "run_dir=a,b"], "leave run_dir out"),
    (["sweep", "{new}", "--run_dir", "x"], "leave run_dir out"),
    (["sweep", "{new}", "--steps", "1", "--workers", "0"], "workers must be"),
    (["sweep", "{new}", "--steps", "1", "--workers", "-3"], "workers must be"),
    (["sweep", "{new}", "--steps", "1", "--workers", "two"], "invalid int value: 'two'"),
    (["sweep", "{new}", "--steps", "1", "--threads", "0"], "threads must be"),
    (["sweep", "{new}", "--steps", "1", "--timeout_minutes", "nan"], "timeout_minutes must be"),
    (["sweep", "{new}", "--steps", "1", "--timeout_minutes", "-1"], "timeout_minutes must be"),
    (["sweep", "{new}", "--steps", "1", "--notebook", "none.ipynb"], "there is no notebook 'none.ipynb'"),
    (["sweep", "{file}", "--steps", "1"], "{file}"),
    (["plan", "--device", "abacus"], "unknown device 'abacus'"),
    (["plan", "--device", "h100-80", "--model", "nothing"], "unknown model 'nothing'"),
    (["plan", "--device", "h100-80", "--prompt_tokens", "-1"], "prompt_tokens must be"),
    (["plan", "--device", "h100-80", "--trace_tokens", "0"], "trace_tokens must be"),
    (["plan", "--device", "h100-80", "--answer_tokens", "x"], "invalid int value: 'x'"),
    (["plan", "--device", "h100-80", "--steps", "-1"], "steps must be"),
    (["compare"], "the following arguments are required: runs"),
    (["compare", "{new}"], "no run folder matches"),
    (["compare", "["], "no run folder matches"),
    (["compare", ""], "names no run folder"),
    (["compare", ","], "names no run folder"),
    (["compare", "{run}", "--over", "sedes"], "unknown over 'sedes'; did you mean 'seeds'?"),
    (["compare", "{run}", "{copy}"], "leave one out"),
    (["compare", "{run}", "--export", "{file}"], "{file}"),
    (["compare", "a: {run}", "b: {copy}", "--reference", "c"], "unknown method 'c'"),
    (["report"], "the following arguments are required: run_dir"),
    (["report", "{new}"], "is not a run folder"),
    (["report", "{file}"], "is not a run folder"),
    (["report", "a\0b"], "is not a run folder"),
    (["report", "{run}", "{new}/report.html"], "does not exist; make it or choose another file"),
    (["report", "{run}", "{full}"], "{full}"),
    (["report", "d" * 300], "is not a run folder"),
]


@pytest.mark.parametrize(("arguments", "words"), COMMANDS, ids=lambda value: str(value)[:60])
def test_a_command_that_cannot_work(arguments, words, whole_run, tmp_path, capsys, monkeypatch):
    places = {"file": tmp_path / "file", "new": tmp_path / "new", "full": tmp_path / "full", "run": whole_run}
    places["copy"] = tmp_path / "copy"
    places["file"].write_text("mine")
    places["full"].mkdir()
    (places["full"] / "thesis.txt").write_text("mine")
    if "{copy}" in str(arguments):
        shutil.copytree(whole_run, places["copy"])
    monkeypatch.setattr("covrl_lab.runs.sweep._Driver.start", lambda driver: pytest.fail("a sweep was started"))
    with pytest.raises(SystemExit) as ended:
        main([argument.format(**places) for argument in arguments])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and error.startswith("covrl-lab"), error
    assert words.format(**places) in error
    assert places["file"].read_text() == "mine" and not places["new"].exists()


# --- damaged run folders

RUN = TINY_RUN | {"steps": 4, "checkpoint_every": 2, "eval_every": 2, "device": "cpu", "difficulty": 1}
NEWEST = "checkpoints/step_00004"


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    return make_trainer(tmp_path_factory.mktemp("whole") / "run", RUN).run().run_dir


def flip(content: bytes) -> bytes:
    """One bit: of a quotation mark in text, of the stored values in a Parquet file, elsewhere in the middle."""
    footer = 8 + int.from_bytes(content[-8:-4], "little") if content[-4:] == b"PAR1" else 0
    middle = (len(content) - footer) // 2
    text = {b"{": b'"', b"P": b"arithmetic"}.get(content[:1])
    at = content.find(text, middle if text == b'"' else 0) if text else middle
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


DAMAGE = {
    "cut": lambda content: content[: len(content) // 2],
    "emptied": lambda content: b"",
    "deleted": lambda content: None,
    "flipped": flip,
}
# file -> the doors that name it, and what is not seen: a checkpoint without checksums may be of an older version.
FILES = {
    "config.json": ("resume report explorer monitor compare", "deleted"),
    "metrics.jsonl": ("report monitor", ""),
    "evaluations.jsonl": ("report monitor compare", ""),
    "policy.json": ("report monitor", "deleted"),
    "traces/step_00004.parquet": ("report explorer monitor", ""),
    "evaluations/step_00004.parquet": ("compare", ""),
    f"{NEWEST}/adapter_model.safetensors": ("resume", ""),
    f"{NEWEST}/adapter_config.json": ("resume", ""),
    f"{NEWEST}/optimizer.safetensors": ("resume", ""),
    f"{NEWEST}/memory.json": ("resume", ""),
    f"{NEWEST}/checksums.json": ("resume", "deleted"),
}


def damage(run, name, how) -> None:
    content = DAMAGE[how]((run / name).read_bytes())
    if content is None:
        (run / name).unlink()
    else:
        (run / name).write_bytes(content)


def open_resume(run):
    make_trainer(run, RUN)
    return " ".join(find_checkpoint(run)[1])


def open_monitor(run):
    shot = snapshot(run)
    return traces_html(shot) + status_html(shot)


def open_explorer(run):
    return TraceExplorer(run).static()[0].data


def open_compare(run):
    return compare.scores(compare.find_runs(str(run))).to_string()


DOORS = {
    "resume": open_resume,
    "report": lambda run: page(load_run(run).forgiving()),
    "explorer": open_explorer,
    "monitor": open_monitor,
    "compare": open_compare,
}


@pytest.mark.slow
@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_damage_is_named_at_every_door(name, how, whole_run, tmp_path, monkeypatch):
    """Each door gives what is whole or one sentence, and those that read the file name it."""
    monkeypatch.setattr("covrl_lab.views.report.get_plotlyjs", lambda: "")
    run = shutil.copytree(whole_run, tmp_path / "run")
    damage(run, name, how)
    doors, unseen = FILES[name]
    for door, look in DOORS.items():
        try:
            found = look(run)
        except ConfigError as error:
            found = str(error)
            assert_one_sentence(found)
        if door in doors.split() and how != unseen:
            assert name.split("/")[-1].removesuffix(".parquet") in found, (door, found[:2000])


def test_a_flipped_bit_anywhere_in_a_parquet_file(whole_run, tmp_path):
    """The file reads as before or is refused in one sentence. Of a stored value no flip passes unseen."""
    path, random = tmp_path / "step_00004.parquet", Random(0)
    whole, content = (whole_run / "traces" / path.name), (whole_run / "traces" / path.name).read_bytes()
    expected, footer = read_table(whole).to_pandas(), len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    for at in random.sample(range(len(content)), 150):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << random.randrange(8)]) + content[at + 1 :])
        try:
            found = read_table(path).to_pandas()
        except ConfigError as error:
            assert_one_sentence(str(error))
        else:
            assert at >= footer or found.equals(expected)


def test_missing_traces_are_named_where_a_checkpoint_has_passed_them(whole_run, tmp_path):
    """Not to a script, which reads what there is, nor in folders without checkpoints, whose traces were chosen."""
    run = shutil.copytree(whole_run, tmp_path / "run")
    for step in (2, 3):
        damage(run, f"traces/step_{step:05d}.parquet", "deleted")
    said = load_run(run).forgiving().alarms["traces"]
    assert said == f"{str(run / 'traces' / 'step_00002.parquet')!r} and 1 more are missing; restore them"
    assert load_run(run).traces()["step"].unique().tolist() == [1, 4]
    shutil.rmtree(run / "checkpoints")
    assert "traces" not in load_run(run).forgiving().alarms


LINES = [
    ("a line that is no JSON", 3, "not json", "line 3 cannot be read"),
    ("an empty line", 3, "", "line 3 cannot be read"),
    ("a line of another kind", 3, "[1, 2]", "line 3 cannot be read"),
    ("a line without numbers", 3, '{"step": 3}', "line 3 cannot be read"),
    ("a text for a number", 3, '{"step": 3, "seconds": "1", "finished_share": 1}', "line 3 cannot be read"),
    ("bytes that are no text", 3, b"\xff\xfe", "line 3 cannot be read"),
    ("a missing line", 3, None, "line 3 is of step 4, after step 2"),
    ("a deep line", 3, "[" * 100_000, "line 3 cannot be read"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("content", "words"), [c[2:] for c in LINES], ids=[c[0] for c in LINES])
def test_a_hole_in_the_metrics_is_repaired_from_the_checkpoint_before(content, words, whole_run, tmp_path, caplog):
    run = shutil.copytree(whole_run, tmp_path / "run")
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    lines[2] = b"" if content is None else (content if isinstance(content, bytes) else content.encode()) + b"\n"
    (run / "metrics.jsonl").write_bytes(b"".join(lines))
    sentence_of(lambda: load_run(run).metrics, "metrics.jsonl", words)
    assert words in load_run(run).forgiving().alarms["metrics.jsonl"]
    with caplog.at_level(logging.WARNING):
        resumed = make_trainer(run, RUN).run()
    said = [record.message for record in caplog.records if "resumes from step 2" in record.message]
    assert len(said) == 1 and words in said[0]
    assert numbers(resumed.run_dir) == numbers(whole_run)
    assert load_run(run).metrics["step"].tolist() == [1, 2, 3, 4] and find_checkpoint(run) == (4, [])


@pytest.mark.parametrize("bad", ["not json", "", "[1, 2]", "[" * 100_000, "\udcff"], ids=lambda bad: ascii(bad[:9]))
def test_a_damaged_line_of_benchmarks(bad, whole_run, tmp_path):
    """The others are shown; one that is cut short at the end is no damage, as somebody may be writing it."""
    run = shutil.copytree(whole_run, tmp_path / "run")
    path, line = run / "benchmarks.jsonl", '{"step": 4, "settings": {}, "accuracy": 0.5}\n'
    path.write_text(f"{line}{line}{bad}", errors="surrogateescape")
    assert len(load_run(run).benchmarks) == 2 == len(load_run(run).forgiving().benchmarks)
    path.write_text(f"{line}{bad}\n{line}", errors="surrogateescape")
    said = sentence_of(lambda: load_run(run).benchmarks, f"line 2 of {str(path)!r} cannot be read", "delete that line")
    forgiving = load_run(run).forgiving()
    assert len(forgiving.benchmarks) == 2 and forgiving.damage == {"benchmarks.jsonl": said}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.safetensors", "memory.json"])
@pytest.mark.parametrize("sums", [True, False], ids=["checksums", "an older version"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(name, sums, whole_run, tmp_path, caplog):
    run = shutil.copytree(whole_run, tmp_path / "run")
    damage(run, f"{NEWEST}/{name}", "cut")
    if not sums:
        for folder in (run / "checkpoints").iterdir():
            (folder / "checksums.json").unlink()
    with caplog.at_level(logging.WARNING):
        resumed = make_trainer(run, RUN).run()
    assert [name in r.message for r in caplog.records if "resumes from step 2" in r.message] == [True]
    assert numbers(resumed.run_dir) == numbers(whole_run)
    mine, whole = ((folder / NEWEST / "checksums.json").read_text() for folder in (run, whole_run))
    assert mine == whole  # adapter_config.json, too, is the same to the last byte


def test_without_a_whole_checkpoint_nothing_is_trained_anew(whole_run, tmp_path):
    run = shutil.copytree(whole_run, tmp_path / "run")
    for step in ("step_00002", "step_00004"):
        damage(run, f"checkpoints/{step}/optimizer.safetensors", "flipped")
    before = (run / "metrics.jsonl").read_bytes()
    sentence_of(
        lambda: make_trainer(run, RUN),
        "step_00004/optimizer.safetensors",
        "; restore it, as no older checkpoint will do, or remove",
    )
    assert (run / "metrics.jsonl").read_bytes() == before


def test_lines_before_every_checkpoint_are_mended_on_request(whole_run, tmp_path):
    """Metrics lose the first line, evaluations theirs of step 2: no checkpoint will do, until they are mended."""
    run = shutil.copytree(whole_run, tmp_path / "run")
    for name, line in (("metrics.jsonl", 0), ("evaluations.jsonl", 1)):
        lines = (run / name).read_text().splitlines(keepends=True)
        (run / name).write_text("".join(lines[:line] + lines[line + 1 :]))
    sentence_of(lambda: make_trainer(run, RUN), "mend it with covrl-lab train --repair")
    assert [said.rpartition(": ")[2] for said in repair(run)] == ["[1]", "[2]"]
    assert repair(run) == []
    whole = load_run(whole_run)
    mended = load_run(run)
    assert mended.evaluations.equals(whole.evaluations), "made anew from the generations"
    assert mended.metrics["lost"].tolist()[0] == 1 and mended.metrics["step"].tolist() == [1, 2, 3, 4]
    assert numbers(run)[1:] == numbers(whole_run)[1:]
    assert make_trainer(run, RUN).setup().step == 4


def test_the_flag_repair_mends_and_trains_on(whole_run, tmp_path, capsys):
    run = shutil.copytree(whole_run, tmp_path / "run")
    damage(run, "metrics.jsonl", "cut")  # its first half: no checkpoint will do
    lost = (run / "metrics.jsonl").read_bytes().count(b"\n")
    (run / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes().partition(b"\n")[2])

    def train(*more):
        with pytest.raises(SystemExit) as ended:
            main(["train", *more, *flags(RUN | {"run_dir": run})])
        return ended.value.code, *capsys.readouterr()

    code, _, error = train()
    assert code == 2 and "mend it with covrl-lab train --repair" in error
    code, said, _ = train("--repair")
    assert code == 0 and f"lines made anew: [1, {', '.join(map(str, range(lost + 1, 5)))}]" in said
    assert said.endswith(f"Run folder: {run}\n") and load_run(run).metrics["step"].tolist() == [1, 2, 3, 4]
    assert train("--repair")[1].startswith("nothing to mend\n")


def test_a_run_without_its_checkpoints_says_that_it_begins_again(whole_run, tmp_path, caplog):
    run = shutil.copytree(whole_run, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    with caplog.at_level(logging.WARNING):
        assert make_trainer(run, RUN).setup().step == 0
    assert f"{str(run)!r} holds no checkpoint, so the run begins again" in caplog.messages


@pytest.mark.parametrize("value", ["many", [1], {}], ids=str)
@pytest.mark.parametrize("name", ["steps", "eval_every", "alpha", "clip_range"])
def test_a_setting_of_another_kind_in_a_run_folder(name, value, whole_run, tmp_path):
    run = shutil.copytree(whole_run, tmp_path / "run")
    edit("config.json", **{name: value})(run)
    for look in DOORS.values():
        sentence_of(lambda look=look: look(run), "config.json", name)


def test_files_of_older_versions_still_open(whole_run, tmp_path):
    """Parquet files without checksums of their pages, checkpoints without theirs."""
    run = shutil.copytree(whole_run, tmp_path / "run")
    frames = {path: pd.read_parquet(path) for path in run.rglob("*.parquet")}
    for path, frame in frames.items():
        frame.to_parquet(path, index=False)
    for folder in (run / "checkpoints").iterdir():
        (folder / "checksums.json").unlink()
    assert load_run(run).traces().equals(load_run(whole_run).traces())
    assert make_trainer(run, RUN).setup().step == 4


def test_a_run_with_a_damaged_end_is_shown_in_its_sweep(tmp_path):
    from covrl_lab.runs.worker import status

    (tmp_path / "failed.json").write_text('{"reas')
    how, reason = status(tmp_path)
    assert how == "failed" and "failed.json" in reason and "delete it to run again" in reason


def test_load_task_refuses_what_the_trainer_refuses(tmp_path):
    (tmp_path / "x.jsonl").write_text(row(answer=[1]))
    sentence_of(lambda: load_task(str(tmp_path / "x.jsonl")), "row 1 of", "has [1] in 'answer'")
