"""03_train under papermill's own command line: parameters, YAML, resuming, and names it does not know."""

import dataclasses
import json
import os
import subprocess
import sys

import nbformat
import pytest
import yaml
from helpers import ROOT, TINY_RUN, checkout_environment, parameters

from covrl_lab import ConfigError, RunConfig, load_run

TRAIN = ROOT / "notebooks" / "03_train.ipynb"
SMALL = [w for name, value in (TINY_RUN | {"run_dir": "run"}).items() for w in ("-p", name, str(value))]


def papermill(folder, *arguments):
    """Run the command in ``folder``; (exit code, what it says, executed notebook)."""
    environment = checkout_environment(JUPYTER_PREFER_ENV_PATH="1")
    command = [sys.executable, "-m", "papermill", str(TRAIN), "out.ipynb", *arguments, "-k", "python3"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr, nbformat.read(folder / "out.ipynb", as_version=4)


def printed(notebook):
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", []) if o.output_type == "stream"]
    return "".join(o.text for o in outputs)


def test_every_setting_is_a_parameter_with_its_own_default():
    found = parameters(TRAIN)
    for field in dataclasses.fields(RunConfig):
        assert found.pop(field.name)[1] == field.default, field.name
    assert set(found) == {"progress", "cell_minutes"}


def test_parameters_yaml_and_resuming(tmp_path):
    (tmp_path / "params.yaml").write_text("learning_rate: 1e-5\nmethod: rlpr\nsteps: 3\n")
    arguments = [*SMALL, "-f", "params.yaml", "-p", "alpha", "0.3"]
    code, said, notebook = papermill(tmp_path, *arguments)
    assert code == 0 and "unknown parameter" not in said, said
    run = load_run(tmp_path / "run")
    expected = {"alpha": 0.3, "method": "rlpr", "steps": 3, "learning_rate": 1e-5}
    assert {name: run.config[name] for name in expected} == expected
    assert "a new run" in printed(notebook) and "3 of 3 steps" in printed(notebook)
    assert (tmp_path / "run" / "report.html").stat().st_size > 1000
    before = (tmp_path / "run" / "metrics.jsonl").read_text()

    code, said, notebook = papermill(tmp_path, *arguments)
    assert code == 0, said
    assert "resumed after step 3 of 3" in printed(notebook)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_the_papers_configuration_from_start_to_end(tmp_path):
    """Its file as it stands, but for the model, the sizes, and files in place of the Hub's data sets."""
    rows = [{"question": f"Name {i} cities.", "answer": f"{i} of them", "category": "Geography"} for i in range(12)]
    sums = [{"problem": f"What is $2 + {i}$?", "answer": str(2 + i)} for i in range(3)]
    wrong = {f"Incorrect Answer {i}": f"colour {i}" for i in (1, 2, 3)}
    boxes = [{"Question": f"Which colour has box {i}?", "Correct Answer": "red"} | wrong for i in range(2)]
    for name, table in {"web": rows, "math": sums, "gpqa": boxes}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    sets = ["math-500@math.jsonl", "gpqa-diamond@gpqa.jsonl"]
    ours = {"model": "tiny", "task": "webinstruct-nonmath@web.jsonl", "eval_task": f"{sets[0]}*4, {sets[1]}*2"}
    ours |= {"run_dir": "run", "steps": 2, "questions_per_step": 2, "max_trace_tokens": 12, "eval_max_trace_tokens": 9}
    given = [word for name, value in ours.items() for word in ("-p", name, str(value))]
    config = ROOT / "covrl_lab" / "configs" / "covrl-7b.yaml"
    code, said, notebook = papermill(tmp_path, "-f", str(config), *given)
    assert code == 0 and "2 of 2 steps" in printed(notebook), said
    run = load_run(tmp_path / "run")
    expected = yaml.safe_load(config.read_text("utf-8")) | ours
    assert {name: run.config[name] for name in expected} == expected
    traces = run.traces()
    assert len(traces) == 2 * 2 * 8 and set(traces["source"]) == {"prior", "posterior"}
    assert {"".join(tokens) for tokens in traces["answer_tokens"]} <= {f"> {row['answer']} </answer>" for row in rows}
    assert run.metrics["kl"].notna().all() and run.evaluations["step"].tolist() == [0, 2]
    for name, k in zip(sets, (4, 2), strict=True):
        assert (run.evaluations[f"{name}/k"] == k).all() and (run.evaluations[f"{name}/bound_k"] <= 0).all()
    assert (tmp_path / "run" / "report.html").exists()


def test_a_misspelt_parameter_is_refused_by_name_before_anything_loads(tmp_path):
    code, said, notebook = papermill(tmp_path, *SMALL, "-p", "alhpa", "0.3")
    assert code == 1
    assert said.strip().splitlines()[-1] == "ConfigError: unknown parameter 'alhpa'; did you mean 'alpha'?"
    assert not (tmp_path / "run").exists() and not printed(notebook)
    errors = [o for cell in notebook.cells for o in cell.get("outputs", []) if o.output_type == "error"]
    assert [error.traceback for error in errors] == [["ConfigError: " + errors[0].evalue]], "the sentence alone"

    # The cells up to there, in a plain interpreter: torch has not been imported.
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    first = next(i for i, source in enumerate(cells) if "from_namespace" in source)
    code = "\n".join(cells[: first + 1])
    check = f"import sys\ntry:\n    exec({code!r}, names := {{}})\n"
    check += "except ValueError as error:\n    print(error, 'torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", check], env=environment, capture_output=True, text=True)
    assert done.stdout == "unknown parameter 'alhpa'; did you mean 'alpha'? False\n", done.stderr


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"alhpa": 0.3}, "unknown parameter 'alhpa'; did you mean 'alpha'?"),
        ({"grid": [1, 2]}, "unknown parameter 'grid'"),
        ({"alpha": [0.3]}, "alpha must be a finite number"),
        ({"alpha": "much"}, "alpha must be a finite number"),
        ({"steps": 2.5}, "steps must be a whole number"),
    ],
)
def test_from_namespace_refuses(names, message):
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_namespace(names)


def test_from_namespace_takes_settings_and_leaves_the_rest():
    names = {"alpha": "1e-1", "difficulty": None, "progress": True, "In": ["x"], "Out": {}, "_i": "text"}
    names |= {"os": os, "papermill": papermill, "RunConfig": RunConfig, "config": RunConfig()}
    assert RunConfig.from_namespace(names, also=["progress"]) == RunConfig(alpha=0.1)


def test_a_fresh_run_folder_may_hold_the_notebook_that_papermill_writes(tmp_path):
    from covrl_lab import Trainer

    (tmp_path / "out.ipynb").write_text("{}")
    (tmp_path / "train.log").write_text("")
    (tmp_path / "config.json.99.tmp").write_text('{"mod')  # killed while it wrote its very first file
    Trainer(RunConfig(model="tiny", run_dir=str(tmp_path)))
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="not empty"):
        Trainer(RunConfig(model="tiny", run_dir=str(tmp_path)))
