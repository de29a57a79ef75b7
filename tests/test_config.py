"""The configuration: every setting that cannot work is refused in one sentence, before anything is loaded."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from covrl_lab.__main__ import main
from covrl_lab.config import ELSEWHERE, RunConfig, enter_project, field_type, unknown_name
from covrl_lab.defaults import METHOD_DEFAULTS, METHOD_SETTINGS, UNREAD
from covrl_lab.types import ConfigError, did_you_mean

TYPES = {field.name: field_type(field) for field in dataclasses.fields(RunConfig)}
NUMBERS = [name for name, of in TYPES.items() if of.kind in (int, float)]
AUTO = [name for name, of in TYPES.items() if of.choices == ("auto",)]
FLOATS = [name for name, of in TYPES.items() if of.kind is float]
CHOICES = {name: of.choices for name, of in TYPES.items() if of.choices}


def refused(**settings) -> str:
    """The message with which the settings are refused; it must be one sentence on one line."""
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_dict(settings)
    message = str(caught.value)
    assert "\n" not in message and not message.endswith(".") and ". " not in message
    return message


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"alpha": 1.5}, ["alpha", "between 0 and 1", "1.5"]),
        ({"alpha": -0.1}, ["alpha", "between 0 and 1"]),
        ({"composite_weight": 2}, ["composite_weight", "between 0 and 1"]),
        ({"top_p": 0}, ["top_p"]),
        ({"top_p": 1.01}, ["top_p"]),
        ({"temperature": 0}, ["temperature", "above 0"]),
        ({"learning_rate": 0}, ["learning_rate", "above 0"]),
        ({"clip_range": 0}, ["clip_range", "above 0"]),
        ({"max_grad_norm": 0}, ["max_grad_norm", "above 0"]),
        ({"kl_weight": -0.1}, ["kl_weight", "0 or more"]),
        ({"nll_weight": -1}, ["nll_weight", "0 or more"]),
        ({"unfinished_penalty": -1}, ["unfinished_penalty", "0 or more"]),
        ({"weight_decay": -1}, ["weight_decay", "0 or more"]),
        ({"steps": -1}, ["steps", "0 or more"]),
        ({"eval_every": -1}, ["eval_every", "0 or more"]),
        ({"questions_per_step": 0}, ["questions_per_step", "1 or more"]),
        ({"rollouts_per_question": 0}, ["rollouts_per_question", "1 or more"]),
        ({"max_trace_tokens": 0}, ["max_trace_tokens", "1 or more"]),
        ({"eval_questions": 0}, ["eval_questions", "1 or more"]),
        ({"updates_per_step": 0}, ["updates_per_step", "1 or more"]),
        ({"max_packed_tokens": 0}, ["max_packed_tokens", "1 or more"]),
        ({"checkpoint_every": 0}, ["checkpoint_every", "1 or more"]),
        ({"n_sample": 0}, ["n_sample", "1 or more"]),
        ({"lora_rank": 0}, ["lora_rank", "1 or more"]),
        ({"lora_alpha": 0}, ["lora_alpha", "1 or more"]),
        ({"seed": -1}, ["seed", "0 to"]),
        # Settings that only together make no sense.
        ({"method": "jlb", "rollouts_per_question": 1}, ["rollouts_per_question", "leave_one_out"]),
        ({"method": "jlb", "alpha": 0}, ["alpha", "above 0", "composite_weight"]),
        ({"composite_weight": 0, "alpha": 0.5, "clip": "none"}, ["alpha", "composite_weight"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_a_value_out_of_range_is_refused_by_name(settings, words):
    message = refused(**settings)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("settings", "near"),
    [
        ({"method": "covlr"}, "'covrl'"),
        ({"method": "JLB"}, "jlb"),  # too far from any name: all of them are listed
        ({"quantization": "nf8"}, "'nf4'"),
        ({"dtype": "float23"}, "'float32'"),
        ({"source_split": "stratifed"}, "'stratified'"),
        ({"lr_schedule": "cosin"}, "'cosine'"),
        ({"tracker": "tensorbord"}, "'tensorboard'"),
        ({"alpah": 0.5}, "'alpha'"),
        ({"learningrate": 1e-3}, "'learning_rate'"),
        ({"rollouts_per_questions": 4}, "'rollouts_per_question'"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest_valid_one(settings, near):
    message = refused(**settings)
    assert "unknown" in message and near in message


def test_a_misspelt_keyword_is_answered_like_any_unknown_name():
    with pytest.raises(ConfigError, match="unknown setting 'alhpa'; did you mean 'alpha'?"):
        RunConfig(alhpa=0.3)


def test_the_command_line_asks_for_a_command():
    done = python("-m", "covrl_lab", "--method", "jlb")
    assert done.returncode == 2
    assert done.stderr == ("covrl-lab: a command comes first; to train a run use: covrl-lab train --method ...\n")


@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_is_checked_and_every_valid_one_named(name):
    assert all(valid in refused(**{name: "?"}) for valid in sorted(CHOICES[name])[:12])


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"alpha": "half"}, "a finite number"),
        ({"alpha": float("nan")}, "a finite number"),
        ({"learning_rate": "inf"}, "a finite number"),
        ({"alpha": True}, "a finite number"),
        ({"temperature": None}, "a finite number"),
        ({"steps": 2.5}, "a whole number"),
        ({"steps": "ten"}, "a whole number"),
        ({"steps": True}, "a whole number"),
        ({"steps": [4]}, "a whole number"),
        ({"seed": None}, "a whole number"),
        ({"seed": float("inf")}, "a whole number"),
        ({"task": 3}, "text"),
        ({"task": None}, "text"),
        ({"gradient_checkpointing": 1}, "True or False"),
        ({"gradient_checkpointing": "yes"}, "True or False or 'auto', not"),
        ({"max_packed_tokens": "many"}, "a whole number or 'auto', not"),
    ],
    ids=str,
)
def test_a_wrong_type_is_refused(settings, kind):
    (name,) = settings
    message = refused(**settings)
    assert message.startswith(f"{name} must be {kind}")


def test_numbers_may_come_as_papermill_delivers_them():
    # YAML 1.1 reads 1e-5 as text: a sign after the e needs a dot before it to make a number.
    config = RunConfig(learning_rate="1e-5", alpha="0.3", steps="12", seed=7.0, nll_weight=1, difficulty="3")
    assert (config.learning_rate, config.alpha, config.steps) == (1e-5, 0.3, 12)
    assert (config.seed, config.nll_weight, config.difficulty) == (7, 1.0, 3)
    for name in NUMBERS:
        value = getattr(config, name)
        assert value is None or type(value) is (float if name in FLOATS else int) or (name in AUTO and value == "auto")
    same = RunConfig(learning_rate=1e-5, alpha=0.3, steps=12, seed=7, nll_weight=1.0, difficulty=3)
    assert config == same and config.run_id() == same.run_id()


def test_paths_are_text(tmp_path):
    assert RunConfig(run_dir=tmp_path / "run").run_dir == str(tmp_path / "run")


@pytest.mark.parametrize("method", METHOD_DEFAULTS)
def test_a_method_alone_is_a_whole_configuration(method):
    config = RunConfig(method=method)
    for name, value in METHOD_DEFAULTS[method].items():
        assert getattr(config, name) == value
    assert all(getattr(config, name) is not None for name in METHOD_DEFAULTS[method])


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("jlb", {"kl_weight": 0.3}),
        ("grpo", {"nll_weight": 0.1}),
        ("covrl", {"composite_weight": 0.3}),
        ("covrl", {"kl_gradient": "published"}),
        ("rlpr", {"unfinished_penalty": 2.0}),
        ("verifree", {"std_filter": 0.1}),
        ("covrl_published", {"evidence_floor": 1.0}),
    ],
    ids=str,
)
def test_a_setting_that_the_method_does_not_read_is_refused(method, settings):
    (name,) = settings
    message = refused(method=method, **settings)
    assert message.startswith(f"method={method!r} does not use {name}, so")
    assert "it uses: " in message and name not in message.split("it uses: ")[1].split(", ")


@pytest.mark.parametrize("method", METHOD_DEFAULTS)
def test_what_a_method_records_can_be_read_back(method, tmp_path):
    config = RunConfig(method=method, run_dir=str(tmp_path))
    config.save(tmp_path / "config.json")
    assert RunConfig.load(tmp_path / "config.json") == config


def test_a_run_of_an_earlier_version_keeps_its_method(tmp_path):
    """What was called covrl then is covrl_published now; a lone clip_range moves both bounds."""
    settings = RunConfig(method="covrl_published", clip_range=0.1).to_dict() | {"method": "covrl"}
    assert settings["clip_range_high"] == 0.1
    for name in ("evidence_floor", "posterior_weight", "alpha_rate"):
        del settings[name]
    (tmp_path / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert RunConfig.load(tmp_path / "config.json").method == "covrl_published"


def test_a_run_from_before_a_setting_keeps_its_numbers_and_its_name(tmp_path):
    """What evidence_power was before it could be set, and the id of then, whatever the default is now."""
    config = RunConfig(method="covrl", evidence_power=1.0)
    settings = config.to_dict()
    del settings["evidence_power"]
    (tmp_path / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert RunConfig.load(tmp_path / "config.json") == config
    assert config.run_id() == "62a253cd"
    assert RunConfig(method="covrl", evidence_power=1.5).run_id() != config.run_id()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rollouts_per_question": 1, "method": "grpo"}, "rollouts_per_question must be 2 or more"),
        (
            {"method": "covrl_published", "alpha": 0.0, "kl_weight": 0.3},
            "alpha must be above 0 with nll_gate",
        ),
        ({"method": "latro", "reward": "probability"}, "reward must be 'sum_logprob' or 'mean_logprob'"),
    ],
    ids=str,
)
def test_settings_that_teach_nothing_or_the_wrong_thing_are_refused(settings, message):
    assert refused(**settings).startswith(message)


def test_how_a_step_is_cut_names_no_other_run():
    """Runs from before "auto" keep their names, and memory never decides numbers."""
    assert AUTO == ["gradient_checkpointing", "max_packed_tokens"]
    fixed = RunConfig(gradient_checkpointing=False, max_packed_tokens=4096, memory_gib=8)
    assert fixed.run_id() == RunConfig().run_id() and fixed.differences(RunConfig()) == {}
    assert RunConfig(max_packed_tokens="2048").max_packed_tokens == 2048
    assert RunConfig(max_packed_tokens=2048).differences(RunConfig()) == {"max_packed_tokens": (2048, 4096)}
    assert RunConfig(gradient_checkpointing=True).run_id() != RunConfig().run_id()
    assert RunConfig(dtype="bfloat16").run_id() == RunConfig().run_id() != RunConfig(dtype="float32").run_id()


def test_method_defaults_give_way_to_explicit_values():
    assert RunConfig(method="jlb").alpha == 1.0
    assert RunConfig(method="covrl").alpha == 0.5
    assert RunConfig(method="covrl_published").composite_weight == 0.5
    assert RunConfig(method="jlb", alpha=0.25).alpha == 0.25
    zero = RunConfig(method="covrl_published", alpha=0.0, kl_weight=0, nll_weight=0)  # zero is a value, not a gap
    assert (zero.alpha, zero.kl_weight) == (0.0, 0.0)


def test_a_configuration_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig().alpha = 0.1


def test_json_round_trip(tmp_path):
    config = RunConfig(method="jlb", learning_rate=3e-4, task="last_letters", run_dir=str(tmp_path))
    config.save(tmp_path / "config.json")
    assert RunConfig.load(tmp_path / "config.json") == config
    stored = json.loads((tmp_path / "config.json").read_text())
    assert list(stored) == [f.name for f in dataclasses.fields(RunConfig)]
    assert stored["alpha"] == 1.0  # the value used, not null
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_a_broken_config_file_is_one_sentence(tmp_path):
    (tmp_path / "config.json").write_text('{"alpha": 0.')
    with pytest.raises(ConfigError, match="config.json"):
        RunConfig.load(tmp_path / "config.json")


def test_the_run_id_names_what_decides_the_numbers():
    base = RunConfig()
    assert base.run_id() == RunConfig(run_dir="elsewhere").run_id()
    assert base.run_id() == RunConfig(tracker="tensorboard", checkpoint_every=1).run_id()
    changed = [
        {"alpha": 0.4},
        {"seed": 1},
        {"steps": 41},
        {"method": "jlb"},
        {"task": "last_letters"},
        {"learning_rate": 1e-3},
        {"quantization": "none"},
    ]
    ids = [RunConfig(**c).run_id() for c in changed]
    assert len({base.run_id(), *ids}) == 1 + len(changed)
    assert base.run_dir == f"runs/arithmetic-covrl-{base.run_id()}"
    assert RunConfig(task="reasoning_gym/leg_counting").run_dir.startswith("runs/reasoning_gym-leg_counting-")
    assert RunConfig(task="some/where/questions.jsonl").run_dir.startswith("runs/questions-covrl-")


def test_differences_name_both_values_and_skip_what_changes_no_number():
    mine, theirs = RunConfig(alpha=0.5, seed=1), RunConfig(alpha=0.3, seed=1, run_dir="x", tracker="wandb")
    assert mine.differences(theirs) == {"alpha": (0.5, 0.3)}
    assert mine.differences(RunConfig(seed=1, checkpoint_every=3)) == {}
    assert RunConfig().differences(RunConfig(method="jlb"))["alpha"] == (0.5, 1.0)


# --- the command line, in processes of their own


def python(*args: str, **kwargs) -> subprocess.CompletedProcess:
    root = Path(__file__).resolve().parents[1]
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, cwd=root, timeout=120, **kwargs)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--alpha", "1.5"], ["alpha must be between 0 and 1"]),
        (["--alpah", "0.5"], ["unknown setting 'alpah'", "'alpha'"]),
        (["--alph", "0.5"], ["unknown setting 'alph'", "'alpha'"]),  # no guessing from a beginning
        (["--alpha"], ["--alpha", "expected one argument"]),
        (["jlb"], ["unknown setting 'jlb'"]),
    ],
)
def test_the_command_line_refuses_in_one_sentence_without_torch(flags, words):
    done = python("-X", "importtime", "-m", "covrl_lab", "train", *flags)
    imported = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "|" in line]
    message = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2 and done.stdout == ""
    assert "covrl_lab.config" in imported and not {"torch", "transformers", "pandas"} & set(imported)
    assert len(message) == 1 and all(word in message[0] for word in words), message
    assert message[0].startswith("covrl-lab train: ")


def test_the_run_id_is_the_same_in_another_process():
    code = "from covrl_lab.config import RunConfig; print(RunConfig(alpha='0.3', seed=5).run_id())"
    done = python("-c", code, env={"PYTHONHASHSEED": "123", "PATH": ""})
    assert done.stdout.strip() == RunConfig(alpha=0.3, seed=5).run_id(), done.stderr


def settings_table() -> str:
    """The Markdown table of METHODS.md: every method's default of each setting it reads."""
    names = [name for name in METHOD_DEFAULTS["covrl"] if any(name in read for read in METHOD_SETTINGS.values())]
    names += [name for name in UNREAD if name not in names]
    lines = ["| setting | " + " | ".join(f"`{method}`" for method in METHOD_DEFAULTS) + " |"]
    lines.append("|---" * (1 + len(METHOD_DEFAULTS)) + "|")
    for name in names:
        values = [
            (METHOD_DEFAULTS[method] | UNREAD).get(name) if name in METHOD_SETTINGS[method] else "·"
            for method in METHOD_DEFAULTS
        ]
        shown = [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
        lines.append(f"| `{name}` | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def test_methods_md_shows_the_settings_that_each_method_reads():
    text = Path(__file__).parent.with_name("METHODS.md").read_text("utf-8")
    assert settings_table() in text, f"METHODS.md should hold this table:\n{settings_table()}"


@pytest.mark.parametrize(
    "start, environment, end",
    [
        ("notebooks", {}, "."),  # as JupyterLab starts a notebook of the checkout
        (".", {}, "."),  # as papermill does
        ("notebooks/own", {}, "notebooks/own"),
        ("other/notebooks", {}, "other/notebooks"),  # no checkout above it
        ("notebooks", {"COVRL_LAB_PARENT": "1"}, "notebooks"),  # a run of a sweep that was started there
    ],
)
def test_a_notebook_of_the_checkout_works_where_commands_do(start, environment, end, tmp_path, monkeypatch):
    for folder in ("covrl_lab", "notebooks/own", "other/notebooks"):
        (tmp_path / folder).mkdir(parents=True)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path / start)
    enter_project()
    assert Path.cwd() == tmp_path / end
    enter_project()
    assert Path.cwd() == tmp_path / end, "the cell may run twice"


def test_help_says_what_every_setting_is_and_its_default(monkeypatch, capsys):
    """From the comments beside the fields; another program's words for some of them stand here in full."""
    monkeypatch.setenv("COLUMNS", "300")

    def help_of(command):
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0
        return capsys.readouterr().out

    said = help_of("train")
    for field in dataclasses.fields(RunConfig):
        (text,) = re.findall(rf"^  --{field.name} \S+\s+(?!--)(\S.*)$", said, re.M)
        default = "" if field.default is None else f" (default: {field.default})"
        assert text.endswith(default) and len(text) > len(default) + 5, field.name
    assert re.search(r"--alpha float +share of traces drawn from the prior prompt$", said, re.M)
    assert re.search(r"--composite_weight float\s+w of the composite p' = w p \+ \(1 - w\) q$", said, re.M)
    assert re.search(r"verdict}\s+made of p\(y\|x,z\), in nats or as a probability; verdict: whether", said)
    assert re.search(r"--steps int +training steps \(default: 40\)$", said, re.M)
    sections = re.findall(r"^(\w.*):$", said, re.M)
    named = ["model", "task and prompts", "method", "sampling", "optimisation", "evaluation and output"]
    assert sections == ["options", *named]
    evaluate = set(re.findall(r"^  --(\w+)", help_of("evaluate"), re.M))
    assert {"eval_task", "eval_questions", "max_answer_tokens", "dtype"} < evaluate
    assert not evaluate & {"eval_every", "steps", "alpha"}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("lr", "learning_rate"),
        ("num_generations", "rollouts_per_question"),
        ("max_steps", "steps"),
        ("r", "lora_rank"),
    ],
)
def test_a_name_from_other_libraries_leads_to_ours(theirs, ours):
    assert refused(**{theirs: 1}) == f"unknown setting {theirs!r}; did you mean {ours!r}?"
    for text in (did_you_mean(theirs, ["red", "blue"]), str(unknown_name("setting", theirs, ["red", "blue"]))):
        assert "did you mean" not in text, "only where it is valid"


def test_names_of_other_libraries_are_none_of_ours():
    others = [name for names in ELSEWHERE.values() for name in names.split()]
    assert set(ELSEWHERE) <= set(TYPES) and not set(others) & set(TYPES) and len(others) == len(set(others))
