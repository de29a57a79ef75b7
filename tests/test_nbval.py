"""Every notebook runs through papermill at a smoke size, then again under nbval.

nbval executes the notebook that papermill wrote and compares what comes out. By default nothing may fail
(lax) and cells tagged ``nbval-check-output`` must give the same output; a notebook in STRICT must give the
same output in every cell. Notebooks that run as they are committed must give their committed outputs in
tagged cells.
"""

import os
import re
import subprocess
import sys

import nbformat
import numpy as np
import papermill
import pytest
from helpers import NOTEBOOKS, ROOT, TINY_RUN, checkout_environment, parameters
from nbconvert import HTMLExporter

from covrl_lab.theory.world import World

SMALL = {name: value for name, value in TINY_RUN.items() if name != "model"} | {"steps": 2}
ESTIMATORS = {"alpha": 0.7, "composite_weight": 0.25, "distance": 1.5, "temperature": 2.0, "samples": 50}
# Parameters of a run that takes seconds; {}: as committed, from the files in notebooks/results.
SMOKE = {
    "01_quickstart": SMALL | {"model": "tiny-qwen3"},
    "02_traces": {},
    "03_train": SMALL | {"model": "tiny-gemma3"},
    "04_mixing_ratio": SMALL | {"model": "tiny", "alphas": "0.3, 0.7", "seeds": "0", "eval_every": 1, "launch": True},
    "05_compare": {},
    "06_estimators": ESTIMATORS | {"seed": 3},
    "07_speed": {},
    "08_results": {},
}
STRICT = {"05_compare", "06_estimators", "08_results"}


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """A folder like a checkout, with the committed results; kernels get this checkout, their own environment."""
    for name, value in checkout_environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
    monkeypatch.delenv("PLOTLY_RENDERER", raising=False)
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    (tmp_path / "covrl_lab").mkdir()
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "results").symlink_to(ROOT / "notebooks" / "results")
    return tmp_path


def nbval(folder, strict=False):
    """Run nbval on the notebooks in ``folder``/notebooks; returns its exit code and report."""
    mode = "--nbval" if strict else "--nbval-lax"
    options = ["-c", os.devnull, "--rootdir", ".", "-p", "no:cacheprovider", "-rf", "-q", "--color=no"]
    command = [
        sys.executable,
        "-m",
        "pytest",
        mode,
        "--nbval-current-env",
        "--nbval-cell-timeout=300",
        *options,
    ]
    notebooks = sorted(path.name for path in folder.glob("notebooks/*.ipynb"))
    done = subprocess.run(
        [*command, *notebooks], cwd=folder / "notebooks", capture_output=True, text=True, timeout=500
    )
    return done.returncode, done.stdout + done.stderr


def printed(notebook):
    """Everything the notebook wrote as text."""
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    return "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")


def shown(notebook, kind):
    """The outputs of one MIME type."""
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", []) if "data" in o]
    return [o.data[kind] for o in outputs if kind in o.data]


def plots(notebook):
    return shown(notebook, "application/vnd.plotly.v1+json")


def tagged(notebook):
    """Source and outputs, without execution counts, of the cells that nbval compares."""
    cells = [cell for cell in notebook.cells if "nbval-check-output" in cell.metadata.get("tags", [])]
    return [(c.source, [o | {"execution_count": None} for o in c.outputs]) for c in cells]


# --- what else must be in a notebook that ran at its smoke size


def quickstart(notebook, folder):
    assert "step   2" in printed(notebook) and "2 of 2 steps" in printed(notebook)
    assert len(plots(notebook)) == 4 and "widgets" not in notebook.metadata
    assert "run folder: runs/quickstart/run" in printed(notebook)
    assert (folder / "runs/quickstart/run/checkpoints/step_00002").is_dir()
    page, _ = HTMLExporter().from_notebook_node(notebook)
    assert len(re.findall(r'<div[^>]*class="plotly-graph-div"', page)) == 4
    assert "plotly.js v" in page  # the library itself, so that the page draws without a network


def train(notebook, folder):
    assert "2 of 2 steps" in printed(notebook) and len(plots(notebook)) >= 1


def mixing_ratio(notebook, folder):
    assert len(list(folder.glob("runs/mixing_ratio/**/metrics.jsonl"))) == 2 and len(plots(notebook)) >= 3


def compare(notebook, folder):
    assert len(plots(notebook)) == 4
    assert "| CoVRL | arithmetic | 3 | 200 |" in (folder / "runs/compare/final_accuracy.md").read_text("utf-8")


def estimators(notebook, folder):
    """The exact KL by hand, from the world's tables alone, at the parameters given."""
    world = World(1, seed=3)
    prior, posterior = (table[0][0].detach().numpy() for table in (world.prior, world.posterior))
    p, q = (np.exp(x / 2) / np.exp(x / 2).sum() for x in (prior, prior + 1.5 * (posterior - prior)))
    composite = 0.25 * p + 0.75 * q
    kl = (composite * np.log(composite / p)).sum()
    assert f"exact KL(p'||p) = {kl:.6f} nats" in printed(notebook)
    assert len(plots(notebook)) == 5
    tables = [text for text in shown(notebook, "text/html") if "<table" in text]
    assert len(tables) == 4 and f"<td>{kl:.4f}</td>" in re.sub(r"<td[^>]*>", "<td>", tables[0])
    assert all("w 0.25" in table for table in tables), "not at the given settings"


CHECKS = {
    "01_quickstart": quickstart,
    "03_train": train,
    "04_mixing_ratio": mixing_ratio,
    "05_compare": compare,
    "06_estimators": estimators,
}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_runs_again(path, folder, monkeypatch):
    assert path.stem in SMOKE, f"give {path.name} its smoke parameters in SMOKE"
    settings = SMOKE[path.stem]
    assert set(settings) <= set(parameters(path)), "papermill would only warn"
    with monkeypatch.context() as patch:
        if path.stem == "01_quickstart":  # as in make demo: plots that its HTML page can show
            patch.setenv("PLOTLY_RENDERER", "plotly_mimetype+notebook")
        notebook = papermill.execute_notebook(
            path,
            folder / "notebooks" / path.name,
            settings,
            cwd=folder / "notebooks",  # as JupyterLab starts it
            kernel_name="python3",
            execution_timeout=300,
            start_timeout=60,
            progress_bar=False,
        )
    if path.stem in CHECKS:
        CHECKS[path.stem](notebook, folder)
    assert not (folder / "notebooks" / "runs").exists(), "it did not write where commands write"
    if not settings:
        assert tagged(notebook) == tagged(nbformat.read(path, as_version=4)), "run it and commit its outputs"

    metrics = {path: path.read_bytes() for path in folder.glob("runs/**/metrics.jsonl")}
    code, report = nbval(folder, strict=path.stem in STRICT)
    assert code == 0, report
    assert {path: path.read_bytes() for path in metrics} == metrics, "a finished run was trained again"


def test_nbval_sees_an_altered_output(folder):
    """Outputs that are right pass; one digit altered by hand in a tagged cell fails, in that cell alone."""
    notebook = nbformat.read(ROOT / "notebooks/05_compare.ipynb", as_version=4)
    nbformat.write(notebook, folder / "notebooks" / "right.ipynb")
    place, cell = next(
        (i, cell)
        for i, cell in enumerate(c for c in notebook.cells if c.cell_type == "code")
        if "nbval-check-output" in cell.metadata.get("tags", [])
    )
    (output,) = cell.outputs
    assert "42.2%" in output.data["text/plain"]
    output.data["text/plain"] = output.data["text/plain"].replace("42.2%", "42.3%", 1)
    nbformat.write(notebook, folder / "notebooks" / "wrong.ipynb")

    code, report = nbval(folder)
    failed = re.findall(r"^FAILED (\S+)::Cell (\d+)", report, re.MULTILINE)
    assert code == 1 and failed == [("wrong.ipynb", str(place))], report
