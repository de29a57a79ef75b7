"""What once tripped people up, each as met in JupyterLab: text, runs that died, typing errors, sliders."""

import shutil
import textwrap

import pytest
from browser import jupyterlab
from helpers import EXAMPLE_RUN, ROOT, TINY_RUN, lines, made_up_run, start_training, until
from test_browser import mixing_table, number, wait_until
from test_browser_views import shown
from test_world import kl_by_hand, token_probs

from covrl_lab import World, load_run

FAMILY, PERSIAN = "👩\u200d👧", "می\u200cروم"  # joined by characters that cannot be seen
CODE = "What does this print?\nfor x in [1, 2]:\n    print(x * x)"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with jupyterlab(tmp_path_factory.mktemp("lab"), height=1300) as lab:
        yield lab


def test_questions_keep_their_lines_and_characters_are_whole(lab):
    tokens = ["12 ", "\ufffd", "\ufffd 4", f" {FAMILY}", f" {PERSIAN}", "\n"]  # ÷ is two bytes, a token each
    text = {"trace": f"12 ÷ 4 {FAMILY} {PERSIAN}\n", "tokens": tokens}
    made_up_run(lab.folder / "code", steps=1, question=CODE, **text)
    made_up_run(lab.folder / "long", steps=1, question=CODE + " and why?" * 200, **text)
    page = shown(lab, "text", "from covrl_lab import TraceExplorer\nTraceExplorer('code')", "TraceExplorer('long')")
    page.locator(".covrl-explorer").nth(1).locator("[role=option]").first.wait_for()
    code, long = (page.locator(".covrl-explorer").nth(k) for k in (0, 1))
    passage = code.locator("code[dir=auto]").first
    assert passage.inner_text() == CODE
    assert passage.evaluate("found => getComputedStyle(found).fontWeight") == "400"
    heights = passage.evaluate("found => [found.offsetHeight, parseFloat(getComputedStyle(found).fontSize)]")
    assert heights[0] > 3 * heights[1], "three lines"
    folded = long.locator("details").first
    assert not folded.locator("code[dir=auto]").is_visible() and "characters)" in folded.inner_text()
    folded.locator("summary").click()
    assert folded.locator("code[dir=auto]").is_visible()

    written = code.locator(".covrl-list").first.locator("[role=option]").all_inner_texts()
    assert [token.strip("· ") for token in written] == ["12", "⟨C3⟩", "÷·4", FAMILY, PERSIAN, "↵"]
    listed = code.locator(".covrl-table").last.inner_text()
    assert FAMILY in listed and PERSIAN in listed and "U+200" not in listed and "\ufffd" not in listed
    assert not lab.errors and not lab.cell_errors()


def test_the_monitor_says_what_became_of_a_run_and_in_which_unit(lab):
    run = lab.folder / "killed"
    process = start_training(TINY_RUN | {"method": "grpo", "steps": 5000, "eval_every": 0, "run_dir": run})
    until(lambda: len(lines(run / "metrics.jsonl")) > 1 if (run / "metrics.jsonl").exists() else False)
    process.kill()
    process.wait(30)
    (run / "STOP").touch()
    (lab.folder / "foreign").mkdir()
    (lab.folder / "foreign" / "config.json").write_text('{"hidden_size": 64}', encoding="utf-8")
    typo = lab.folder / "runs" / "typo"
    start = "from covrl_lab import RunMonitor\n"
    page = shown(lab, "monitors", start + "RunMonitor('killed')", "RunMonitor('foreign')", "RunMonitor('runs/typo')")
    killed, foreign, missing = (page.locator(".covrl-monitor").nth(k) for k in range(3))
    killed.get_by_role("button", name="Allow it to resume").click()
    killed.get_by_text("its process has ended, after").wait_for()
    said = killed.inner_text()
    assert "left" not in said.split("its process has ended")[1].split("\n")[0]
    reward = killed.locator("tr", has=page.locator('[data-column="reward_prior"]')).inner_text()
    assert "share" in reward and "nats" not in reward, "grpo's rewards are verdicts"
    axes = "[...document.querySelectorAll('.covrl-monitor .ytitle')].map(title => title.textContent)"
    wait_until(page, lambda: "share" in page.evaluate(axes))
    assert "not a run of covrl_lab" in foreign.inner_text()
    assert str(typo) in missing.inner_text(), "where it looks, in full"
    assert not lab.errors and not lab.cell_errors()


def test_a_slip_is_answered_in_one_sentence(lab):
    nope = lab.folder / "runs" / "nope"
    cells = {
        "RunConfig(alhpa=0.3)": "unknown setting 'alhpa'; did you mean 'alpha'?",
        "PromptBench(checkpoint='runs/nope')": f"there is no run or checkpoint '{nope}'; check the path",
        "TraceExplorer('runs/typo')": "'runs/typo' is not a run folder (it has no config.json); check the path",
    }
    names = "from covrl_lab import PromptBench, RunConfig, TraceExplorer\n"
    for cell, sentence in cells.items():  # Run All ends at an error
        shown(lab, "slips", names + cell)
        wait_until(lab.page, lab.cell_errors)
        assert [error.strip() for error in lab.cell_errors()] == [f"ConfigError: {sentence}"]


def test_a_slider_of_the_estimators_moves_the_plot(lab):
    page = shown(lab, "slider", "from covrl_lab import EstimatorPanel, World\nEstimatorPanel('kl', World(1))")
    drawn = """() => { const plot = document.querySelector('.covrl-plot.js-plotly-plot');
        const exact = plot?._fullData?.find(one => one.name.startsWith('exact'));
        return exact ? [Array.from(exact.x).indexOf(1), Array.from(exact.y)] : null; }"""

    def shows(w):
        place, values = page.evaluate(drawn) or (0, [0])
        return values[place] == pytest.approx(kl_by_hand(*token_probs(World(1), 1.0, 1.0), w))

    wait_until(page, lambda: shows(0.5))
    handle, readout = page.locator(".noUi-handle").first, page.locator(".widget-readout").first
    lab.drag(handle, 60)
    wait_until(page, lambda: number(readout.inner_text()) > 0.5)
    wait_until(page, lambda: shows(number(readout.inner_text())))
    assert not lab.errors and not lab.cell_errors()


def test_without_a_posterior_nothing_is_left_to_slide(lab):
    made_up_run(lab.folder / "prior", source="prior", logq=None)
    start = "from covrl_lab import MixingRatio, TraceExplorer\n"
    page = shown(lab, "prior", start + "MixingRatio('prior')", "TraceExplorer('prior')")
    page.locator(".covrl-explorer .js-plotly-plot .main-svg").first.wait_for()
    assert page.get_by_text("nothing to mix").locator("visible=true").count() == 1
    assert page.locator(".noUi-handle:visible").count() == 0
    assert page.locator(".js-plotly-plot:visible").count() == 1, "the explorer's lines alone"
    assert page.locator(".gtitle").first.text_content() == "The prior trace under the prior prompt"
    assert "both prompts" not in page.locator(".covrl-explorer").inner_text()
    assert not lab.errors and not lab.cell_errors()


def test_on_a_narrow_page_the_sliders_stand_beside_their_numbers(lab):
    shutil.copytree(EXAMPLE_RUN, lab.folder / "example")
    page = shown(lab, "narrow", "from covrl_lab import MixingRatio\nMixingRatio('example')")
    page.set_viewport_size({"width": 800, "height": 1300})
    page.locator(".js-plotly-plot:visible").first.wait_for()
    wait_until(page, lambda: mixing_table(page))
    last = page.locator(".noUi-handle").last.bounding_box()
    table = page.locator(".widget-html table:visible").bounding_box()
    assert 0 < table["y"] - last["y"] < 150, "the numbers stand right below B's sliders, before any plot"
    page.set_viewport_size({"width": 1400, "height": 1300})


def test_a_notebook_works_where_commands_do_and_leads_to_the_others(lab):
    """In notebooks/ of a checkout: a run of ``covrl-lab train`` in the folder above is found by its name there."""
    (lab.folder / "covrl_lab").mkdir()
    (lab.folder / "notebooks").mkdir()
    shutil.copytree(EXAMPLE_RUN, lab.folder / "runs" / "mine")
    for name in ("02_traces", "07_speed"):
        shutil.copy(ROOT / "notebooks" / f"{name}.ipynb", lab.folder / "notebooks")
    start = "from covrl_lab import RunConfig, enter_project, load_run\nenter_project()\n"
    seen = "print(load_run('runs/mine').steps, RunConfig(run_dir='runs/other').run_dir)"
    page = shown(lab, "notebooks/own", start + seen)
    printed = page.locator(".jp-OutputArea-output").inner_text().strip()
    assert printed == f"{load_run(EXAMPLE_RUN).steps} runs/other"

    lab.open("notebooks/07_speed.ipynb")  # as committed, with its outputs
    advice = page.locator("td", has_text="set gradient_checkpointing").first
    assert advice.inner_text() == "set gradient_checkpointing=True, or lower max_packed_tokens"
    assert advice.evaluate("found => found.scrollWidth <= found.clientWidth"), "none of it is cut off"
    page.locator("a", has_text="Traces").first.click()
    page.locator(".jp-NotebookPanel:visible", has_text="TraceExplorer").wait_for()


def test_a_widget_whose_script_comes_late_shows_what_the_kernel_said_meanwhile_and_says_after(lab):
    """As on a busy machine; anywidget drops what it is told then, and all that follows."""
    table = """
        from covrl_lab.views.widgets import Table, table_column
        class Late(Table):
            _esm = "await new Promise((done) => setTimeout(done, 4000));" + Table._esm
        table = Late(columns=[table_column("said", "said", "text")])
        table.observe(lambda change: table.set_trait("rows", [{"id": "b", "said": "after"}]), names="picked")
        table
    """
    page = shown(lab, "late", textwrap.dedent(table), 'table.rows = [{"id": "a", "said": "meanwhile"}]')
    page.locator(".covrl-table tbody tr", has_text="meanwhile").click()
    page.locator(".covrl-table tbody tr", has_text="after").wait_for()
    assert page.locator(".covrl-table tbody tr").count() == 1 and not lab.errors
