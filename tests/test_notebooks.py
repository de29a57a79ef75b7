"""The notebooks take RunConfig's names, and hold no more than readers want; test_nbval.py runs them."""

import dataclasses
import json
import re
import shlex
import subprocess
import sys

import nbformat
import papermill
import pytest
import yaml
from helpers import NOTEBOOKS, ROOT, parameters
from notebook_noise import noise

from covrl_lab import ConfigError, RunConfig
from covrl_lab.config import field_type

OWN_NAMES = {
    "progress": "bool",  # show progress bars
    "step": "int",  # step whose traces to look at first
    "alphas": "str",  # a grid's values, separated by commas; likewise:
    "methods": "str",
    "seeds": "str",
    "sweep_dir": "str",  # holds the grid's run folders
    "workers": "int",  # runs at once
    "launch": "bool",  # run the grid without a click
    "results": "str",  # where finished runs lie
    "trials": "str",  # where the trials of the objective lie
    "story": "str",  # a run whose traces of every step explain what was learned
    "runs": "str",  # patterns of run folders to compare
    "reference": "str",  # label of the method that others are compared with
    "over": "str",  # what intervals draw anew
    "export_dir": "str",  # where tables go
    "cell_minutes": "float",  # time limit of a cell
    "distance": "float",  # of an enumerable world's posterior logits from its prior's
    "samples": "int",  # random draws for each point
}
FIELDS = {
    # A number or a word ("auto"): text to papermill, whose own type annotations hold one type only.
    field.name: ("str" if of.choices else of.kind.__name__) + " | None" * of.optional
    for field in dataclasses.fields(RunConfig)
    if (of := field_type(field))
}
HOOKS = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))["repos"][0]["hooks"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_parameters_are_literals_of_the_common_names(path):
    found = parameters(path)
    assert set(found) <= set(FIELDS | OWN_NAMES), "not a field of RunConfig"
    for name, (annotation, value) in found.items():
        kind, _, optional = (OWN_NAMES | FIELDS)[name].partition(" | ")
        assert annotation == kind, name
        assert type(value).__name__ == kind or (optional and value is None), name
    settings = {name: value for name, (_, value) in found.items() if name not in OWN_NAMES}
    if "composite_weight" in settings and settings.get("method") is None:
        settings["method"] = "covrl_published"  # the world of 06 is about its composite
    RunConfig.from_dict(settings)
    assert set(papermill.inspect_notebook(path)) == set(found), "papermill reads it otherwise"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_committed_is_light_and_anonymous(path):
    text = path.read_text(encoding="utf-8")
    nbformat.validate(nbformat.reads(text, as_version=4))
    assert noise(text) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_to_other_files_lead_somewhere(path):
    text = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown")
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert {*links, path.name} >= {other.name for other in NOTEBOOKS}, "each notebook links to all others"
    assert [link for link in links if link and not (path.parent / link).exists()] == []


@pytest.mark.parametrize("folder", ["", "notebooks"])
def test_a_run_folder_that_is_not_there_is_named_as_it_was_given(folder, monkeypatch):
    monkeypatch.chdir(ROOT / folder)
    cells = nbformat.read(ROOT / "notebooks" / "02_traces.ipynb", as_version=4).cells
    given, start, *_ = [cell.source for cell in cells if cell.cell_type == "code"]
    exec(given, names := {})
    with pytest.raises(ConfigError, match="^'runs/typo' is not a run folder"):
        exec(start, names | {"run_dir": "runs/typo"})


# --- the commit hooks


def hook(name, path):
    """What the commit hook ``name`` does to the notebook at ``path``: (exit code, what it says)."""
    (entry,) = [hook["entry"] for hook in HOOKS if hook["id"] == name]
    program, *arguments = shlex.split(entry)
    command = {"python": [sys.executable], "nbstripout": [sys.executable, "-m", "nbstripout"]}[program]
    done = subprocess.run([*command, *arguments, str(path)], cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def committed():
    """A notebook that may be committed, as JSON; its cell 1 has an output."""
    output = {"output_type": "stream", "name": "stdout", "text": ["42\n"]}
    code = {"cell_type": "code", "id": "b", "metadata": {}, "execution_count": 1, "source": ["print(42)"]}
    text = {"cell_type": "markdown", "id": "a", "metadata": {}, "source": ["See notebooks/results/run."]}
    spec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    metadata = {"kernelspec": spec, "language_info": {"name": "python"}}
    cells = [text, code | {"outputs": [output]}]
    return {"nbformat": 4, "nbformat_minor": 5, "metadata": metadata, "cells": cells}


def error(name):
    return {"output_type": "error", "ename": name, "evalue": "", "traceback": []}


def html(text):
    return {"output_type": "display_data", "metadata": {}, "data": {"text/html": [text]}}


DIRT = {
    "metadata.widgets": lambda nb: nb["metadata"].update(widgets={"state": {}}),
    "metadata.papermill": lambda nb: nb["metadata"].update(papermill={"duration": 3.1}),
    "no kernelspec": lambda nb: nb["metadata"].pop("kernelspec"),
    "cell 1: metadata.execution": lambda nb: nb["cells"][1]["metadata"].update(execution={"iopub": "12:00"}),
    "cell 1: metadata.papermill": lambda nb: nb["cells"][1]["metadata"].update(papermill={"duration": 1}),
    "cell 1: parameters that": lambda nb: nb["cells"][1]["metadata"].update(tags=["injected-parameters"]),
    "cell 1: an error, KeyError": lambda nb: nb["cells"][1]["outputs"].append(error("KeyError")),
    "cell 1: 200,001 bytes of HTML": lambda nb: nb["cells"][1]["outputs"].append(html("x" * 200_001)),
    "more than 1,000,000": lambda nb: nb["cells"][0]["source"].append("x" * 1_000_000),
    "cell 0: an absolute path, /home/ann": lambda nb: nb["cells"][0]["source"].append("in /home/ann/runs"),
    "an absolute path, C:": lambda nb: nb["cells"][1]["outputs"][0]["text"].append("C:\\Users\\ann\\runs"),
}


@pytest.mark.parametrize("complaint", DIRT)
def test_the_hook_refuses_a_dirty_notebook_and_says_why(complaint, tmp_path):
    path, notebook = tmp_path / "dirty.ipynb", committed()
    path.write_text(json.dumps(notebook), encoding="utf-8")
    assert noise(path.read_text("utf-8")) == []
    DIRT[complaint](notebook)
    path.write_text(json.dumps(notebook), encoding="utf-8")
    (line,) = noise(path.read_text("utf-8"))
    assert complaint in line


def test_the_hooks_clean_what_can_be_cleaned_and_refuse_the_rest(tmp_path):
    path, notebook = tmp_path / "dirty.ipynb", committed()
    path.write_text(json.dumps(notebook), encoding="utf-8")
    assert hook("notebook-noise", path) == (0, "")
    for complaint in ("metadata.widgets", "cell 1: metadata.execution", "cell 1: metadata.papermill"):
        DIRT[complaint](notebook)
    path.write_text(json.dumps(notebook), encoding="utf-8")
    code, said = hook("notebook-noise", path)
    assert code == 1 and len(said.splitlines()) == 3 and str(path) in said
    assert hook("nbstripout", path)[0] == 0
    assert json.loads(path.read_text("utf-8")) == committed(), "the outputs stay"

    DIRT["an absolute path, C:"](notebook)
    path.write_text(json.dumps(notebook), encoding="utf-8")
    hook("nbstripout", path)
    assert hook("notebook-noise", path)[0] == 1


@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if parameters(path)], ids=lambda path: path.stem)
def test_a_misspelt_parameter_is_refused_before_anything_loads(path):
    cells = nbformat.read(path, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    first = next(i for i, cell in enumerate(code) if "parameters" in cell.metadata.get("tags", []))
    name = next(iter(parameters(path)))
    script = (
        f"import sys\nnames = {{}}\nexec({code[first].source!r}, names)\nnames[{name + 'x'!r}] = 1\n"
        f"try:\n    exec({code[first + 1].source!r}, names)\n"
        "except ValueError as error:\n    print(error, {'torch', 'pandas'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == f"unknown parameter {name + 'x'!r}; did you mean {name!r}? set()\n", done.stderr
