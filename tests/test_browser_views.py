"""Side by side, the table of runs, stars and notes, figures saved, and hostile text, in a real JupyterLab."""

import difflib
import json
import re
import shutil
import struct

import nbformat
import numpy as np
import pandas as pd
import pytest
from browser import jupyterlab
from helpers import EXAMPLE_RUN, lines
from hostile import BAIT, HOSTILE
from nbconvert import HTMLExporter
from screens import RESULTS
from test_browser import number, saved_text, wait_until
from test_hostile import hidden, text_run

from covrl_lab import load_run, report
from covrl_lab.runs.folder import step_file, write_parquet
from covrl_lab.views.html import visible


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with jupyterlab(tmp_path_factory.mktemp("lab")) as lab:
        shutil.copytree(EXAMPLE_RUN, lab.folder / "run")
        for name in ("double_add-covrl-s0", "shop-grpo-s1"):
            shutil.copytree(RESULTS / "trials" / name, lab.folder / "trials" / name)
        shutil.copytree(EXAMPLE_RUN, lab.folder / "trials" / "example")  # the trials' evaluations lack texts
        other = shutil.copytree(EXAMPLE_RUN, lab.folder / "other")
        frame = load_run(other).traces(1).assign(step=30)  # the questions of step 1, said in another way
        frame["tokens"] = [[*tokens[:2], "or", *tokens[3:]] for tokens in frame["tokens"]]
        frame["logp"] = [0.5 * row for row in frame["logp"]]
        write_parquet(frame, step_file(other / "traces", 30))
        yield lab


def shown(lab, name, *cells):
    """The page with a notebook of these cells, run."""
    lab.write(f"{name}.ipynb", *cells)
    lab.open(f"{name}.ipynb")
    lab.run_all()
    return lab.page


@pytest.mark.parametrize(
    ("given", "places"),
    [
        ("'run'", [("run", [], "prior"), ("run", [], "posterior")]),
        ("'run', 'other', step_a=1, step_b=30", [("run", [1], "prior"), ("other", [30], "prior")]),
    ],
    ids=["sources", "runs and steps"],
)
def test_side_by_side_shows_what_difflib_and_the_files_say(lab, given, places):
    page = shown(lab, "side", f"from covrl_lab import TraceComparison\nTraceComparison({given})")
    panel = page.locator(".covrl-side-by-side")
    row = panel.locator(".covrl-table tbody tr").nth(5)
    question = row.get_attribute("data-id")
    row.click()
    sides = []
    for run, steps, source in places:
        frame = load_run(lab.folder / run).traces(*steps)
        frame["total"] = frame["answer_logp"].map(np.sum)
        sides.append(frame[(frame["example_id"] == question) & (frame["source"] == source)])
    a, b = (own["total"].mean() for own in sides)
    cells = [number(text) for text in row.locator("td").all_inner_texts()[2:]]
    assert cells == pytest.approx([a, b, b - a], abs=0.051)

    def agrees(a, b):
        """Whether the panel says what difflib finds in these two rows."""
        tokens = [list(row["tokens"]) for row in (a, b)]
        blocks = difflib.SequenceMatcher(None, *tokens, autojunk=False).get_matching_blocks()
        pairs = [(block.a + k, block.b + k) for block in blocks for k in range(block.size)]
        moved = sum(b["logp"][j] - a["logp"][i] for i, j in pairs)
        lengths = [len(found) for found in tokens]
        numbers = re.search(
            r"(\d+) tokens in common, of (\d+) in A and (\d+) in B.*?([+−]?[\d.]+) nats", panel.inner_text()
        )
        dotted = panel.locator(".covrl-list .only").count()
        told = [number(found) for found in numbers.groups()] if numbers else []
        return told == pytest.approx([len(pairs), *lengths, moved], abs=0.006) and dotted == sum(lengths) - 2 * len(
            pairs
        )

    best = [own.loc[own["total"].idxmax()] for own in sides]
    wait_until(page, lambda: agrees(*best))
    panel.get_by_label("trace", exact=True).nth(1).select_option(index=1)
    second = sides[1].sort_values("total", ascending=False).iloc[1]
    wait_until(page, lambda: agrees(best[0], second))
    assert not lab.errors and not lab.cell_errors() and not lab.requests


def test_the_table_of_runs_shows_accuracies_of_the_files_and_opens_panels(lab):
    page = shown(lab, "runs", "from covrl_lab import RunBrowser\nRunBrowser('trials')")
    panel = page.locator(".covrl-runs")
    for row in panel.locator(".covrl-table tbody tr").all():
        found = lines(lab.folder / row.get_attribute("data-id") / "evaluations.jsonl")
        before, after = (number(text) for text in row.locator("td").all_inner_texts()[1:3])
        assert (before, after) == pytest.approx([100 * found[k]["accuracy"] for k in (0, -1)], abs=0.051)
    assert panel.locator(".covrl-table tbody tr").count() == 3
    page.set_viewport_size({"width": 800, "height": 1000})
    page.wait_for_timeout(500)
    edge = panel.locator(".covrl-table .scroll").evaluate("box => box.getBoundingClientRect().right")
    for cell in panel.locator(".covrl-table tr > :nth-child(3)").all():
        box = cell.bounding_box()
        assert box["x"] + box["width"] <= min(edge, 800), "accuracies are in sight on a narrow page"
    page.set_viewport_size({"width": 1400, "height": 1000})
    panel.get_by_placeholder("search names").fill("example")
    row = panel.locator(".covrl-table tbody tr")
    wait_until(page, lambda: row.count() == 1)
    row.click()
    panel.get_by_role("button", name="Held-out questions").click()
    folder = lab.folder / "trials" / "example"
    steps = [line["step"] for line in lines(folder / "evaluations.jsonl")]
    scores = [
        pd.read_parquet(step_file(folder / "evaluations", step)).query("sample < 0").set_index("example_id")["score"]
        for step in (steps[0], steps[-1])
    ]
    gained = int(((scores[0] < 1) & (scores[1] == 1)).sum())
    cell = panel.locator(".covrl-evaluations [data-outcome=gained]")
    cell.wait_for()
    assert cell.inner_text() == str(gained) and gained > 0
    panel.get_by_role("button", name="Traces").click()  # another panel takes its place
    panel.locator(".covrl-explorer .covrl-list").first.wait_for()
    assert panel.locator(".covrl-evaluations").count() == 0
    assert not lab.errors and not lab.cell_errors() and not lab.requests


def test_a_star_and_a_note_stay_and_stand_in_the_report(lab):
    cell = "from covrl_lab import TraceExplorer\nTraceExplorer('run', 15)"
    page = shown(lab, "notes", cell)
    kept, note = lab.folder / "run" / "notes.json", HOSTILE[1]
    trace = page.locator(".covrl-explorer .covrl-trace").nth(1)
    trace.locator(".covrl-star").click()
    wait_until(page, kept.exists)
    (key,) = json.loads(kept.read_text())
    assert json.loads(kept.read_text()) == {key: {"starred": True, "note": ""}} and key.startswith("15/")
    row = page.locator(f".covrl-explorer .covrl-table tbody tr[data-id='{key.split('/')[1]}']")
    wait_until(page, lambda: "★" in row.inner_text())
    trace.locator(".covrl-note").click()
    page.keyboard.type(note)
    page.keyboard.press("Enter")
    wait_until(page, lambda: json.loads(kept.read_text())[key]["note"] == note)

    page = shown(lab, "notes", cell)  # another kernel
    trace = page.locator(".covrl-explorer .covrl-trace").nth(1)
    assert trace.locator(".covrl-note").input_value() == note
    assert trace.locator(".covrl-star").get_attribute("aria-pressed") == "true"
    rollout = int(key.split("/")[1])
    tokens = load_run(lab.folder / "run").traces(15).set_index("rollout")["tokens"][rollout]
    assert trace.locator("[role=option]").all_inner_texts() == [visible(t, spaces=True) for t in tokens]
    page.locator(".covrl-explorer select").nth(2).select_option("starred")
    rows = page.locator(".covrl-explorer .covrl-table").last.locator("tbody tr")
    wait_until(page, lambda: rows.count() == 1 and rows.get_attribute("data-id") == str(rollout))
    assert page.locator(".jp-Notebook .jp-Cell").count() == 1, "no letter of the note was a command of JupyterLab's"
    assert not lab.errors and not lab.cell_errors() and not lab.dialogs

    page.goto(report(lab.folder / "run", lab.folder / "report.html").as_uri())
    part = page.locator("h2:text-is('Starred traces') ~ h3").first
    assert part.inner_text().startswith(f"step 15, rollout {rollout}:")
    assert page.get_by_text(f"★ {note}", exact=True).count() == 1


def saves(page, plot, formats):
    """Save a figure by its tool bar; an SVG is one, and a PNG has twice the width of what is shown."""
    plot.scroll_into_view_if_needed()
    plot.hover()
    titles = plot.locator(".modebar-btn").evaluate_all("found => found.map(button => button.dataset.title)")
    saving = {"Download plot as a PNG"} | ({"Download plot as an SVG"} if "svg" in formats else set())
    assert set(titles) == {"Reset axes", "Zoom", "Pan"} | saving, "none that uploads"
    for form in formats:
        with page.expect_download() as saved:
            plot.locator(
                f'.modebar-btn[data-title="Download plot as a{"n SVG" if form == "svg" else " PNG"}"]'
            ).click()
        content = open(saved.value.path(), "rb").read()
        if form == "svg":
            assert (
                content.startswith(b"<svg") and b"</svg>" in content and saved.value.suggested_filename.endswith("svg")
            )
        else:
            shown = plot.evaluate("plot => [plot._fullLayout.width, plot._fullLayout.height]")
            assert content.startswith(b"\x89PNG") and list(struct.unpack(">II", content[16:24])) == [
                2 * x for x in shown
            ]


def test_figures_are_saved_as_svg_and_as_png_of_twice_the_size(lab):
    figure = "from covrl_lab import load_run, plot_training_curves\nrun = load_run('run')\n"
    figure += "plot_training_curves(run.metrics, run.evaluations)"
    page = shown(lab, "saved", "from covrl_lab import TraceExplorer\nTraceExplorer('run')", figure)
    live = page.locator(".covrl-explorer .covrl-plot.js-plotly-plot")
    live.wait_for()
    saves(page, live, ["png", "svg"])
    saves(page, page.locator(".js-plotly-plot:visible:not(.covrl-plot)").last, ["png"])
    assert not lab.errors and not lab.requests
    path = report(lab.folder / "run", lab.folder / "report.html")
    page.goto(path.as_uri())
    plot = page.locator(".js-plotly-plot").first
    plot.wait_for()
    saves(page, plot, ["png", "svg"])
    assert not lab.errors


def test_the_tool_bar_of_a_comparison_stands_beside_its_data(lab):
    """Also beside the lowest figures there are: one row each."""
    cell = "import pandas as pd\nfrom covrl_lab import plot_intervals\n"
    ends = "'low': [0.2], 'high': [0.6]"
    tables = {
        "iqm": "'method': ['a'], 'iqm': [0.4], 'iqm_low': [0.2], 'iqm_high': [0.9], 'lowest': [0.3], 'highest': [0.5]",
        "difference": f"'method': ['a'], 'minus': ['b'], 'difference': [0.4], {ends}, 'by_seed': [[0.1, 0.7]]",
        "probability": f"'method': ['a'], 'against': ['b'], 'probability': [0.5], {ends}",
    }
    cells = [f"{cell}plot_intervals(pd.DataFrame({{{table}}}), {name!r})" for name, table in tables.items()]
    page = shown(lab, "bars", *cells)
    plots = page.locator(".js-plotly-plot:visible")
    wait_until(page, lambda: plots.count() == len(tables))
    for width in (1400, 800):
        page.set_viewport_size({"width": width, "height": 1000})
        page.wait_for_timeout(1500)
        for plot in plots.all():
            plot.scroll_into_view_if_needed()
            plot.hover()
            room = plot.evaluate(
                """plot => { const box = plot.getBoundingClientRect(), {xaxis} = plot._fullLayout;
                    const bar = plot.querySelector('.modebar').getBoundingClientRect();
                    return [bar.left - (box.left + xaxis._offset + xaxis._length), box.bottom - bar.bottom]; }"""
            )
            assert min(room) >= 0, (width, room)
    page.set_viewport_size({"width": 1400, "height": 1000})


def test_hostile_text_stays_text_in_panels_reports_and_executed_notebooks(lab):
    """The run's name, its settings, its traces and its evaluations are hostile, and each page shows them as text."""
    name = HOSTILE[1].replace("/", "")
    # Chromium lays out a word in time that grows with the square of its length.
    run = text_run(lab.folder / "hostile" / name, [text[:20_000] for text in HOSTILE])
    cells = ["RunMonitor(path)", "EvaluationBrowser(path)", "TraceComparison(path)", "RunBrowser('hostile')"]
    names = ", ".join(cell.split("(")[0] for cell in cells)
    start = f"from pathlib import Path\nfrom covrl_lab import {names}\npath = next(Path('hostile').iterdir())\nNone"
    page = shown(lab, "hostile-views", start, *cells)
    for panel in ("monitor", "evaluations", "side-by-side", "runs"):
        page.locator(f".covrl-{panel}").wait_for()
    plot = page.locator(".covrl-evaluations .covrl-plot.js-plotly-plot")
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    for k in range(1, 10):  # hover boxes of the questions
        page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + k * box["height"] / 10)
        page.wait_for_timeout(50)
    stored = lab.folder / "hostile-views.ipynb"
    page.keyboard.press("Escape")
    page.keyboard.press("Control+s")
    wait_until(page, lambda: saved_text(stored).count("covrl") > 4)
    html = HTMLExporter().from_notebook_node(nbformat.reads(saved_text(stored), as_version=4))[0]
    (lab.folder / "hostile.html").write_text(html, encoding="utf-8")
    assert not lab.errors and not lab.cell_errors()
    for place in (None, lab.folder / "hostile.html", report(run, lab.folder / "hostile-report.html")):
        if place:
            page.goto(place.as_uri())
            page.wait_for_timeout(500)
            page.evaluate("document.querySelectorAll('details').forEach(found => { found.open = true; })")
        page.keyboard.press("Tab")
        text = page.locator("body" if place else ".jp-Notebook").inner_text()
        assert name in text and visible(HOSTILE[7]) in text and not hidden(text), (place, hidden(text))
        assert page.evaluate("window.__pwned === undefined"), place
        areas = ".jp-OutputArea, body > :not(script)" if place else ".jp-OutputArea"
        live = ("iframe", "object", "img[src*=bait]", "[onerror]", "[onload]", "[onfocus]", "a[href*=bait]")
        assert page.locator(areas).locator(", ".join(live)).count() == 0, place
    assert not lab.dialogs and not [address for address in lab.requests if BAIT in address]
