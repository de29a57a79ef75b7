"""The notebooks take RunConfig's names, and the quickstart runs through papermill, again, and as HTML."""

import ast
import dataclasses
import os
import re
from pathlib import Path

import nbformat
import numpy as np
import papermill
import pytest
from nbconvert import HTMLExporter

from covrl_lab import RunConfig
from covrl_lab.world import World

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
QUICKSTART = ROOT / "notebooks" / "01_quickstart.ipynb"
ESTIMATORS = ROOT / "notebooks" / "06_estimators.ipynb"
OWN_NAMES = {
    "progress": "bool",  # show progress bars
    "results": "str",  # where finished runs lie
    "distance": "float",  # of an enumerable world's posterior logits from its prior's
    "samples": "int",  # random draws for each point
}
FIELDS = {field.name: field.type for field in dataclasses.fields(RunConfig)}
SMALL = {
    "quantization": "none",
    "dtype": "float32",
    "demonstrations": 1,
    "steps": 2,
    "questions_per_step": 2,
    "rollouts_per_question": 2,
    "max_trace_tokens": 6,
    "eval_questions": 4,
}


def parameters(path):
    """name -> (annotation, value) of a notebook's one parameters cell."""
    cells = nbformat.read(path, as_version=4).cells
    (cell,) = [c for c in cells if "parameters" in c.metadata.get("tags", [])]
    found = {}
    for node in ast.parse(cell.source).body:
        assert isinstance(node, ast.AnnAssign), f"not a typed literal: {ast.unparse(node)}"
        line = cell.source.splitlines()[node.end_lineno - 1]
        assert "#" in line, f"{node.target.id} has no comment"
        found[node.target.id] = (ast.unparse(node.annotation), ast.literal_eval(node.value))
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_parameters_are_literals_of_the_common_names(path):
    found = parameters(path)
    assert set(found) <= set(FIELDS | OWN_NAMES), "not a field of RunConfig"
    for name, (annotation, value) in found.items():
        assert annotation == (OWN_NAMES | FIELDS)[name].split(" |")[0], name
        assert type(value).__name__ == annotation, name
    RunConfig.from_dict({name: value for name, (_, value) in found.items() if name not in OWN_NAMES})


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_committed_is_light_and_anonymous(path):
    text = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    assert len(text) < 1_000_000
    assert notebook.metadata.kernelspec.name == "python3"
    assert "widgets" not in notebook.metadata
    assert not re.search(r"/(home|root|Users|tmp|work)/|[A-Z]:\\\\", text), "an absolute path"
    assert not [o for c in notebook.cells for o in c.get("outputs", []) if o.output_type == "error"]


def run(folder, model, out="out.ipynb"):
    """Execute the quickstart in ``folder``; returns the executed notebook."""
    settings = SMALL | {"model": model}
    assert set(settings) <= set(parameters(QUICKSTART)), "papermill would only warn"
    return papermill.execute_notebook(
        QUICKSTART,
        folder / out,
        settings,
        cwd=folder,
        kernel_name="python3",
        execution_timeout=300,
        start_timeout=60,
        progress_bar=False,
    )


def printed(notebook):
    """Everything the notebook wrote as text."""
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    return "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")


def plots(notebook):
    """The plotly figures in a notebook's outputs."""
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", []) if "data" in o]
    return [d for o in outputs if (d := o.data.get("application/vnd.plotly.v1+json"))]


@pytest.fixture
def environment(monkeypatch):
    """What the kernels inherit: this checkout, this environment's own kernel, one thread."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("PLOTLY_RENDERER", raising=False)
    return monkeypatch


def test_quickstart_runs_and_runs_again_as_html(environment, tmp_path):
    first = run(tmp_path, "tiny-qwen3")
    assert "step   2" in printed(first) and "2 of 2 steps" in printed(first)
    assert len(plots(first)) == 4
    assert f"run folder: {tmp_path.name}/runs/quickstart/run" in printed(first)
    assert (tmp_path / "runs/quickstart/run/checkpoints/step_00002").is_dir()
    assert "widgets" not in first.metadata

    environment.setenv("PLOTLY_RENDERER", "plotly_mimetype+notebook")
    again = run(tmp_path, "tiny-qwen3", "again.ipynb")
    assert "steps done: 2 of 2" in printed(again) and "step   1" not in printed(again)
    numbers = [[trace.get("y") for trace in plot["data"]] for plot in plots(first)]
    assert [[trace.get("y") for trace in plot["data"]] for plot in plots(again)] == numbers
    page, _ = HTMLExporter().from_notebook_node(again)
    assert len(re.findall(r'<div[^>]*class="plotly-graph-div"', page)) == len(numbers)
    assert "plotly.js v" in page  # the library itself, so that the page draws without a network


def test_quickstart_runs_on_another_architecture(environment, tmp_path):
    notebook = run(tmp_path, "tiny-gemma3")
    assert "2 of 2 steps" in printed(notebook) and len(plots(notebook)) == 4


def test_estimators_run_headless_and_print_the_exact_kl(environment, tmp_path):
    settings = {"alpha": 0.7, "composite_weight": 0.25, "distance": 1.5, "temperature": 2.0, "samples": 50}
    assert set(settings) <= set(parameters(ESTIMATORS)), "papermill would only warn"
    notebook = papermill.execute_notebook(
        ESTIMATORS,
        tmp_path / "out.ipynb",
        settings | {"seed": 3},
        cwd=tmp_path,
        kernel_name="python3",
        execution_timeout=120,
        start_timeout=60,
        progress_bar=False,
    )

    # By hand, from the world's tables alone.
    world = World(1, seed=3)
    prior, posterior = (table[0][0].detach().numpy() for table in (world.prior, world.posterior))
    p, q = (np.exp(x / 2) / np.exp(x / 2).sum() for x in (prior, prior + 1.5 * (posterior - prior)))
    composite = 0.25 * p + 0.75 * q
    kl = (composite * np.log(composite / p)).sum()
    assert f"exact KL(p'||p) = {kl:.6f} nats" in printed(notebook)

    assert len(plots(notebook)) == 5
    shown = [o.data for cell in notebook.cells for o in cell.get("outputs", []) if "data" in o]
    tables = [data["text/html"] for data in shown if "<table" in data.get("text/html", "")]
    assert len(tables) == 4 and f"<td>{kl:.4f}</td>" in re.sub(r"<td[^>]*>", "<td>", tables[0])
    assert all("w 0.25" in table for table in tables), "not at the given settings"
