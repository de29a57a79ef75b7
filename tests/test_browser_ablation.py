"""The ablation panel of 04_mixing_ratio in a real JupyterLab: choose, launch, watch, cancel, retry, read."""

import re

import nbformat
import pytest
from browser import jupyterlab
from helpers import ROOT

from covrl_lab import RunConfig, load_run
from covrl_lab.runs.worker import status

PATIENCE = 180_000  # milliseconds
# What the panel's fields begin with, instead of half an hour of a real model.
SMALL = {"model": "tiny", "quantization": "none", "dtype": "float32", "task": "arithmetic", "max_trace_tokens": 16}
SMALL |= {"eval_every": 5, "eval_questions": 32}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with jupyterlab(tmp_path_factory.mktemp("lab"), "04_mixing_ratio.ipynb", height=1600) as lab:
        (lab.folder / "notebooks").symlink_to(ROOT / "notebooks")
        notebook = nbformat.read(lab.folder / "04_mixing_ratio.ipynb", as_version=4)
        (given,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
        given.source += "".join(f"\n{name} = {value!r}" for name, value in SMALL.items())
        nbformat.write(notebook, lab.folder / "04_mixing_ratio.ipynb")
        yield lab


def fill(page, label, value):
    box = page.locator(".covrl-ablation").get_by_label(label, exact=True)
    box.fill(value)
    box.press("Enter")
    box.press("Tab")


def test_choose_launch_watch_cancel_and_retry(lab):
    from playwright.sync_api import expect  # waits where a bare assert would look once

    page = lab.page
    panel = page.locator(".covrl-ablation")
    for _ in range(3):  # a page that changes its kernel while the cells run leaves "Loading widget..."
        lab.open("04_mixing_ratio.ipynb")
        lab.run_all()
        page.wait_for_timeout(10_000)
        if panel.count():
            break
    rows = panel.locator("tbody tr").filter(visible=True)

    # The grid in the fields: a wrong value is refused in words, three alphas make three rows.
    fill(page, "seeds", "0")
    fill(page, "steps", "3")
    fill(page, "α", "0.3, 1.5")
    panel.get_by_text("alpha must be between 0 and 1").wait_for()
    expect(rows).to_have_count(0, timeout=PATIENCE)  # the message comes before the table follows
    expect(panel.get_by_role("button", name="Launch")).to_be_disabled()
    fill(page, "α", "0.3, 0.5, 0.7")
    fill(page, "task", "arithmetics")
    panel.get_by_text("'arithmetics'").first.wait_for()
    expect(rows).to_have_count(0, timeout=PATIENCE)
    expect(panel.get_by_role("button", name="Launch")).to_be_disabled()
    expect(panel.locator(".js-plotly-plot:visible")).to_have_count(0)
    fill(page, "task", "arithmetic")
    panel.get_by_text("3 runs, 3 to do with 9 steps in all").wait_for()
    expect(rows).to_have_count(3, timeout=PATIENCE)
    panel.get_by_role("button", name="Estimate").click()
    panel.get_by_text("measuring this machine").wait_for()
    panel.get_by_text(re.compile(r"about \d+\.\d minutes")).wait_for(timeout=PATIENCE)
    assert not list(lab.folder.glob("runs/mixing_ratio/*")), "nothing starts before Launch"

    # The kernel stays free while runs work; one is cancelled on its way.
    panel.get_by_role("button", name="Launch").click()
    first, second, third = (rows.nth(i) for i in range(3))
    first.get_by_text("▸ running").wait_for(timeout=PATIENCE)
    first.click()
    panel.get_by_role("button", name="Cancel").click()
    first.get_by_text("⊘ cancelled").wait_for(timeout=PATIENCE)
    expect(page.locator('[data-jp-kernel-status="busy"]')).to_have_count(0)
    for row in (second, third):
        row.get_by_text("✓ done").wait_for(timeout=PATIENCE)
    panel.get_by_role("button", name="Retry").click()
    first.get_by_text("✓ done").wait_for(timeout=PATIENCE)

    # What the table and the figure show is what the run folders hold.
    panel.get_by_text("3 runs, 0 to do").wait_for()
    found = {}
    for path in lab.folder.glob("runs/mixing_ratio/*"):
        run = load_run(path)
        assert status(path) == ("done", "") and len(run.metrics) == 3
        assert RunConfig.load(path / "config.json").run_id() == path.name
        found[run.config["alpha"]] = run
    assert set(found) == {0.3, 0.5, 0.7}
    for row, run in zip((first, second, third), [found[alpha] for alpha in (0.3, 0.5, 0.7)], strict=True):
        accuracy, seconds = run.evaluations["accuracy"].iloc[-1], run.metrics["seconds"].sum()
        expected = [run.path.name, "covrl", f"{run.config['alpha']:.2f}", "0", "✓ done", f"{100 * accuracy:.1f}"]
        assert row.locator("td").all_inner_texts() == [*expected, f"{seconds:.1f}"]
    series = """() => {
        const plot = document.querySelector('.covrl-ablation .js-plotly-plot');
        return (plot?._fullData || []).filter(d => d.mode === 'lines+markers')
            .map(d => [d.name, d.customdata.map(row => row[0]), Array.from(d.y)]);
    }"""
    page.wait_for_function(f"({series})().some(([name, x]) => name === 'covrl' && x.length === 3)")
    drawn = page.evaluate(series)
    shown = {name: dict(zip(x, y, strict=True)) for name, x, y in drawn}
    for alpha, run in found.items():
        assert shown["covrl"][alpha] == pytest.approx(run.evaluations["accuracy"].iloc[-1])
        for source in ("prior", "posterior"):
            reward = run.metrics[f"reward_{source}"].iloc[-1]  # a fifth of three steps: the last one
            assert shown[f"covrl, {source} traces"][alpha] == pytest.approx(reward)

    # The traces of a run are a click away, and of the same grid nothing is left to launch.
    second.click()
    panel.get_by_role("button", name="Traces").click()
    panel.get_by_text(f"Traces of run {found[0.5].path.name}").wait_for(timeout=PATIENCE)
    panel.locator(".covrl-explorer").first.wait_for(timeout=PATIENCE)
    expect(panel.get_by_role("button", name="Launch")).to_be_disabled()
    assert lab.errors == [] and lab.requests == [] and lab.cell_errors() == []

    # On a narrow page every button is within it, and the traces stand right below the table's buttons.
    page.set_viewport_size({"width": 800, "height": 1600})
    page.wait_for_timeout(500)
    for name in ("Launch", "Stop all", "Estimate", "Retry", "Cancel", "Traces"):
        for box in filter(None, (button.bounding_box() for button in panel.get_by_role("button", name=name).all())):
            assert box["x"] + box["width"] <= 800
    alone = "rows => rows.map(row => (row.scrollLeft = 40, row.scrollLeft))"
    assert set(panel.locator(".covrl-table tr").evaluate_all(alone)) == {0}, "no row scrolls alone"
    button, explorer = (
        spot.bounding_box()
        for spot in (panel.get_by_role("button", name="Traces").first, panel.locator(".covrl-explorer"))
    )
    assert 0 < explorer["y"] - button["y"] < 120
