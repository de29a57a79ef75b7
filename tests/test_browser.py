"""The panels in JupyterLab itself: what a reader clicks, drags and sees, against the run folder's numbers."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from browser import jupyterlab
from helpers import EXAMPLE_RUN, ROOT, hostile_run
from hostile import BAIT, HOSTILE

from covrl_lab import RunConfig, load_run
from covrl_lab.train.opening import open_task
from covrl_lab.types import Example
from covrl_lab.views.html import visible

TOKEN = ".covrl-explorer .covrl-list [role=option]"
SELECTED = f"{TOKEN}[aria-selected=true]"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    for name in ("example_run", "story"):
        shutil.copytree(EXAMPLE_RUN.parent / name, folder / "notebooks" / "results" / name)
    with jupyterlab(folder, "02_traces.ipynb", height=1300) as lab:
        yield lab


@pytest.fixture(scope="module")
def traces(lab):
    """Notebook 02, run."""
    lab.open("02_traces.ipynb")
    lab.run_all()
    lab.page.wait_for_selector(".covrl-plot.js-plotly-plot")
    return lab.page


def number(text):
    return float(text.split()[0].replace("−", "-"))


def detail(page, name):
    """A number of the selected token, as the explorer shows it."""
    return number(page.locator(f".covrl-explorer .covrl-detail [data-name={name}]").inner_text())


def wait_until(page, check, seconds=90):
    """Repeat ``check`` until it holds; what the kernel computes comes a moment after the click."""
    for _ in range(10 * seconds):
        if check():
            return
        page.wait_for_timeout(100)
    raise AssertionError("did not happen")


def saved_text(notebook):
    """The text of a saved notebook; empty while JupyterLab is still writing it."""
    content = notebook.read_bytes()
    try:
        json.loads(content)
    except ValueError:
        return ""
    return content.decode()


def row_of(lab, question, source, place=0):
    """The ``place``-th likeliest trace of a question at step 1, from the file."""
    frame = load_run(lab.folder / "notebooks" / "results" / "example_run").traces(1)
    own = frame[(frame["question"] == question) & (frame["source"] == source)]
    order = own["answer_logp"].map(np.sum).sort_values(ascending=False, kind="stable").index
    return own.loc[order[place]]


def test_copies_step_aside_for_live_panels(traces):
    wait_until(traces, lambda: traces.locator(".covrl-table:visible").count() == 4)
    plots = traces.locator(".js-plotly-plot:visible")
    wait_until(traces, lambda: plots.count() == 4)  # the explorer's, the two settings' and the held-out questions'


def test_choosing_a_question_and_clicking_a_token_shows_its_numbers(lab, traces):
    rows = traces.locator(".covrl-table").first.locator("tbody tr")
    row = rows.nth(4)
    question = row.locator("td").nth(1).inner_text()
    row.click()
    prior, posterior = (row_of(lab, question, source) for source in ("prior", "posterior"))
    shown = [visible(t, spaces=True) for t in [*prior["tokens"], *posterior["tokens"]]]
    wait_until(traces, lambda: traces.locator(TOKEN).all_inner_texts() == shown)

    at = 5
    traces.locator(".covrl-explorer .covrl-list").nth(1).locator("[role=option]").nth(at).click()
    p, q = posterior["logp"][at], posterior["logq"][at]
    assert detail(traces, "logp") == pytest.approx(p, abs=6e-4)
    assert detail(traces, "logq") == pytest.approx(q, abs=6e-4)
    assert detail(traces, "log_gap") == pytest.approx(q - p, abs=6e-4)
    rho = np.exp(p) / (np.exp(p) + np.exp(q))
    assert detail(traces, "responsibility") == pytest.approx(rho, abs=6e-4)
    assert detail(traces, "ratio") == 1  # alpha = w
    assert detail(traces, "gradient_weight") == pytest.approx(posterior["advantage"], abs=6e-4)
    marker = "document.querySelector('.covrl-plot.js-plotly-plot').layout.shapes[0].x0"
    wait_until(traces, lambda: traces.evaluate(marker) == at + 1)

    def drawn() -> list[float]:
        return traces.evaluate("Array.from(document.querySelector('.covrl-plot.js-plotly-plot')._fullData[0].y)")

    # The plot follows the selection a moment later; until then it holds the trace drawn before.
    wait_until(traces, lambda: np.allclose(drawn()[: len(posterior["logp"])], posterior["logp"], atol=1e-5))
    np.testing.assert_allclose(drawn(), posterior["logp"], atol=1e-5)
    assert not lab.errors


def test_the_keyboard_moves_the_selection(lab, traces):
    first = traces.locator(".covrl-explorer .covrl-list").first
    first.locator("[role=option]").first.click()
    traces.keyboard.press("ArrowRight")
    traces.keyboard.press("ArrowRight")
    selected = traces.locator(SELECTED)
    assert selected.count() == 1 and selected.get_attribute("data-token") == "2"
    assert traces.evaluate("document.activeElement.getAttribute('aria-selected')") == "true"
    assert "log p" in selected.get_attribute("aria-label")
    traces.keyboard.press("End")
    last = first.locator("[role=option]").count() - 1
    assert traces.locator(SELECTED).get_attribute("data-token") == str(last)
    traces.keyboard.press("Home")
    assert traces.locator(SELECTED).get_attribute("data-token") == "0"
    assert first.locator("[tabindex='0']").count() == 1

    table = traces.locator(".covrl-table").first
    table.locator("tbody tr").nth(1).click()
    before = traces.locator(TOKEN).all_inner_texts()
    traces.keyboard.press("ArrowDown")
    question = table.locator("tbody tr").nth(2).locator("td").nth(1).inner_text()
    prior = row_of(lab, question, "prior")
    shown = [visible(t, spaces=True) for t in prior["tokens"]]
    wait_until(
        traces,
        lambda: (
            traces.locator(".covrl-explorer .covrl-list").first.locator("[role=option]").all_inner_texts() == shown
        ),
    )
    assert traces.locator(TOKEN).all_inner_texts() != before


def test_the_help_on_a_column_is_reached_by_keyboard(traces):
    table = traces.locator(".covrl-explorer .covrl-table").first
    head, note = table.get_by_role("button", name="posterior"), table.locator(".note")
    before = note.inner_text()
    table.get_by_role("button", name="prior", exact=True).focus()
    traces.keyboard.press("Tab")
    assert head.evaluate("button => button === document.activeElement")
    assert "of all its posterior traces, nats" in note.inner_text()
    traces.keyboard.press("Tab")
    assert note.inner_text() == before != head.get_attribute("title")


def test_text_copied_out_of_traces_is_their_own(lab, traces):
    lab.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    row = traces.locator(".covrl-table").first.locator("tbody tr").nth(2)
    row.click()
    question = row.locator("td").nth(1).inner_text()
    own = [list(row_of(lab, question, source)["tokens"]) for source in ("prior", "posterior")]
    wait_until(traces, lambda: traces.locator(TOKEN).count() == sum(map(len, own)))

    def copied(first, last):
        """The clipboard after a selection from one token to the end of another, and Ctrl+C."""
        traces.evaluate(
            """([selector, first, last]) => {
                const spans = document.querySelectorAll(selector);
                spans[first].focus();
                const [from, to] = [spans[first].firstChild, spans[last].lastChild];
                getSelection().setBaseAndExtent(from.firstChild ?? from, 0, to, to.childNodes.length || to.length);
            }""",
            [TOKEN, first, last],
        )
        traces.keyboard.press("Control+c")
        return traces.evaluate("navigator.clipboard.readText()")

    assert any(" " in text for text in own[0])
    prior = len(own[0])
    assert copied(0, prior - 1) == "".join(own[0])
    assert copied(1, 4) == "".join(own[0][1:5])
    assert copied(3, 3) == own[0][3]
    assert copied(2, prior + 3) == "".join(own[0][2:]) + "\n" + "".join(own[1][:4])


def test_prompts_and_saved_tokens_are_those_of_the_files(lab, traces):
    run = load_run(lab.folder / "notebooks" / "results" / "example_run")
    rows = traces.locator(".covrl-table").first.locator("tbody tr")
    rows.nth(3).click()
    question = rows.nth(3).locator("td").nth(1).inner_text()
    pair = [row_of(lab, question, source) for source in ("prior", "posterior")]
    wait_until(traces, lambda: traces.locator(TOKEN).count() == sum(len(row["tokens"]) for row in pair))

    with traces.expect_download() as saved:
        traces.get_by_role("button", name="Tokens as JSON").click()
    records = json.loads(saved.value.path().read_text(encoding="utf-8"))
    for record, row in zip(records, pair, strict=True):
        assert [record[name] for name in ("step", "rollout", "source")] == [1, row["rollout"], row["source"]]
        assert record["tokens"] == list(row["tokens"]) and record["token_ids"] == list(row["token_ids"])
        p, q = np.exp(row["logp"]), np.exp(row["logq"])
        expected = {"logp": row["logp"], "log_gap": row["logq"] - row["logp"], "responsibility": p / (p + q)}
        for name, values in expected.items():
            assert record["values"][name] == pytest.approx(list(values), abs=2e-6), name  # alpha = w = 1/2

    with traces.expect_download() as saved:
        traces.get_by_role("button", name="Rows as CSV").click()
    rows, frame = pd.read_csv(saved.value.path()), run.traces(1)
    assert list(rows["trace"]) == list(frame["trace"]) and list(rows["rollout"]) == list(frame["rollout"])
    assert rows["total"].to_numpy() == pytest.approx(frame["answer_logp"].map(np.sum).to_numpy())
    assert list(rows["length"]) == list(frame["tokens"].map(len))

    prompter = open_task(RunConfig.load(run.path / "config.json"))[1]
    prompt = prompter(Example(pair[0]["example_id"], pair[0]["question"], pair[0]["answer"]))
    expected = []
    for row in pair:
        own = (f"{row['source']} trace, {len(row['tokens'])} tokens", 0)
        expected += [(f"prior, {len(prompt.prior)} tokens", len(prompt.prior)), own]
        expected += [("seam", len(prompt.seam)), ("reference answer", len(prompt.answer))]
        expected += [(f"posterior, {len(prompt.posterior)} tokens", len(prompt.posterior)), own]
    traces.get_by_role("button", name="Show prompts").click()
    parts = """() => [...document.querySelectorAll('.covrl-explorer .widget-html p[dir=auto] > b')]
        .map(chip => [chip.innerText, chip.nextElementSibling.querySelectorAll('bdi').length])"""
    wait_until(traces, lambda: [tuple(part) for part in traces.evaluate(parts)] == expected)
    shown = traces.locator(".covrl-explorer .widget-html p[dir=auto]").first.inner_text().replace("\n", "")
    assert visible(prompter.tokenizer.decode(prompt.prior), spaces=True) in shown
    traces.get_by_role("button", name="Show prompts").click()
    wait_until(traces, lambda: traces.evaluate(parts) == [])


def test_search_sort_and_colour(lab, traces):
    table = traces.locator(".covrl-table").first
    box = traces.get_by_placeholder("search questions, answers, traces")
    question = table.locator("tbody tr").last.locator("td").nth(1).inner_text()
    box.fill(question)
    wait_until(traces, lambda: table.locator("tbody tr").count() == 1)
    box.fill("")
    wait_until(traces, lambda: table.locator("tbody tr").count() == 8)
    table.get_by_role("button", name="posterior").click()
    cells = table.locator("tbody tr td:nth-child(5)")
    wait_until(traces, lambda: (v := [number(x) for x in cells.all_inner_texts()]) == sorted(v, reverse=True))

    tokens = traces.locator(".covrl-explorer .covrl-list").nth(1).locator("[role=option]")
    colours = "found => found.map(span => span.style.backgroundColor)"
    before = tokens.evaluate_all(colours)
    traces.locator(".widget-dropdown select").nth(3).select_option("responsibility ρ of the prior")
    wait_until(traces, lambda: tokens.evaluate_all(colours) != before)
    assert traces.locator(".covrl-legend:visible").first.inner_text().startswith("responsibility")
    assert not lab.errors


def mixing_table(page):
    """label -> the numbers of A, B and their difference, from the live panel."""
    rows = page.locator(".widget-html table tbody tr").evaluate_all(
        "rows => rows.map(row => [...row.cells].map(cell => cell.innerText))"
    )
    return {label: values for label, *values in rows}


def expected_at(frame, alpha):
    """Effective traces, and expected reward, at w = 1/2: written out token by token."""
    weights, reward = [], []
    prior = frame["source"] == "prior"
    mass = np.where(prior, alpha / prior.sum(), (1 - alpha) / (~prior).sum())
    for row in frame.itertuples():
        p, q = np.exp(row.logp), np.exp(row.logq)
        weights.append(np.prod((p + q) / 2 / (alpha * p + (1 - alpha) * q)))
        reward.append(row.reward)
    share = np.dot(mass, weights) ** 2 / np.dot(mass, np.square(weights))
    return len(frame) * share, np.dot(mass, reward)


def test_dragging_alpha_shows_what_the_files_say(lab, traces, capsys):
    frame = load_run(lab.folder / "notebooks" / "results" / "example_run").traces(1)
    panel = traces.locator(".widget-vbox").filter(has_text="setting B").last
    readout = panel.locator(".widget-readout").first
    panel.scroll_into_view_if_needed()
    before = mixing_table(traces)
    assert [number(readout.inner_text())] == [0.25]
    lab.drag(panel.locator(".noUi-handle").first, 120)
    wait_until(traces, lambda: mixing_table(traces) != before)
    traces.wait_for_timeout(1500)
    alpha = number(readout.inner_text())
    assert alpha > 0.3
    found = mixing_table(traces)
    size, reward = expected_at(frame, alpha)
    assert number(found["effective traces, (ΣW)² / ΣW²"][1]) == pytest.approx(size, abs=0.06)
    assert number(found["expected reward"][1]) == pytest.approx(reward, abs=0.006)
    size, reward = expected_at(frame, 0.5)
    assert number(found["expected reward"][0]) == pytest.approx(reward, abs=0.006)
    assert number(found["effective traces, (ΣW)² / ΣW²"][0]) == pytest.approx(size, abs=0.06)
    assert not lab.errors and not lab.cell_errors()


def test_hostile_text_stays_text(lab, capsys):
    hostile_run(lab.folder / "hostile")
    lab.write(
        "hostile.ipynb",
        "from IPython.display import HTML, display\n"
        "from covrl_lab import MixingRatio, TraceExplorer, load_run, token_html\n"
        "run = load_run('hostile')\n"
        "explorer = TraceExplorer(run)\n"
        "for copy in explorer.static():\n    display(copy)",
        "display(HTML(token_html(run.traces(1))))",
        "explorer",
        "MixingRatio(run)",
    )
    lab.open("hostile.ipynb")
    lab.run_all()
    page = lab.page
    page.wait_for_selector(".covrl-plot.js-plotly-plot")
    shown = page.locator(".covrl-explorer .covrl-list").first.locator("[role=option]").all_inner_texts()
    # Runs of spaces inside a line are drawn as signs, so the text is the same as what visible says.
    # Where a token holds U+FFFD its characters are looked up in the trace, with the space before them.
    shown = [text.replace("\n", "").removeprefix("·" * ("\ufffd" in text)) for text in shown]
    assert shown == [visible(t, spaces=True) for t in HOSTILE]
    questions = page.locator(".covrl-table").first.locator("tbody tr td:nth-child(2)").all_inner_texts()
    assert questions == [visible(t) for t in HOSTILE[:8]]
    for k in (0, 1, 3, 10, 11):  # hover boxes of the widget and of plotly
        page.locator(".covrl-explorer .covrl-list").first.locator("[role=option]").nth(k).hover()
        tip, text = page.locator(".covrl-tip strong:visible"), visible(HOSTILE[k], spaces=True)
        wait_until(page, lambda tip=tip, text=text: tip.all_inner_texts() == [text])
        page.locator(".covrl-explorer .covrl-list").first.locator("[role=option]").nth(k).click()
        page.wait_for_timeout(300)
    plot = page.locator(".covrl-plot.js-plotly-plot").first
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    for k in range(12):
        page.mouse.move(box["x"] + box["width"] * (0.1 + 0.07 * k), box["y"] + 100)
        page.wait_for_timeout(100)
    assert page.locator(".js-plotly-plot .hoverlayer a, .js-plotly-plot .xtick a").count() == 0
    assert page.evaluate("window.__pwned === undefined")
    assert page.locator(".jp-OutputArea script, .jp-OutputArea iframe, .jp-OutputArea object").count() == 0
    assert not lab.dialogs and not [r for r in lab.requests if BAIT in r], lab.requests
    assert not lab.errors and not lab.cell_errors()


def copy_helpers(folder):
    """Put what makes runs up where a notebook of the served folder can import it."""
    for name in ("helpers.py", "hostile.py"):
        shutil.copy(ROOT / "tests" / name, folder / name)


def test_traces_of_two_thousand_tokens_stay_within_their_boxes_and_reach(lab):
    copy_helpers(lab.folder)
    shutil.rmtree(lab.folder / "long", ignore_errors=True)
    lab.write(
        "long.ipynb",
        "from pathlib import Path\n"
        "from helpers import made_up_run\n"
        "from covrl_lab import TraceExplorer\n"
        "run = made_up_run(Path('long'), steps=1, questions=1, rollouts=2, length=2000)\n"
        "explorer = TraceExplorer(run)",
        "explorer",
    )
    lab.open("long.ipynb")
    lab.run_all()
    page = lab.page
    page.wait_for_selector(".covrl-plot.js-plotly-plot")
    boxes = page.locator(".covrl-explorer .covrl-list")
    sizes = boxes.evaluate_all(
        """found => found.map(box => [
            box.querySelectorAll('[role=option]').length, box.querySelectorAll('*').length,
            box.clientHeight, box.scrollHeight])"""
    )
    for tokens, nodes, height, text in sizes:
        assert tokens == 2000 and nodes <= 3 * tokens and height <= 320 < text
    assert page.locator(".covrl-plot").bounding_box()["width"] < 1400, "the lines fit the page"

    inside = """box => { const here = box.querySelector('[aria-selected=true]').getBoundingClientRect(),
        around = box.getBoundingClientRect();
        return here.top >= around.top && here.bottom <= around.bottom; }"""
    selected, last = page.locator(SELECTED), boxes.nth(1)
    last.locator("[role=option]").first.click()
    for key, token in (("End", 1999), ("ArrowLeft", 1998), ("ArrowRight", 1999), ("ArrowRight", 1999)):
        page.keyboard.press(key)
        assert selected.get_attribute("data-token") == str(token), key
        assert last.evaluate(inside), key
    assert "2000 of 2000" in page.locator(".covrl-detail").inner_text()
    marker = "document.querySelector('.covrl-plot.js-plotly-plot').layout.shapes[0].x0"
    wait_until(page, lambda: page.evaluate(marker) == 2000)
    page.keyboard.press("ArrowUp")
    assert 1900 < int(selected.get_attribute("data-token")) < 1999 and last.evaluate(inside)
    page.keyboard.press("Home")
    assert selected.get_attribute("data-token") == "0" and last.evaluate(inside)
    assert not lab.errors and not lab.cell_errors()


INSIDE = """item => { const here = item.getBoundingClientRect(),
    around = item.closest('.scroll, .covrl-list').getBoundingClientRect();
    return here.top >= around.top && here.bottom <= around.bottom; }"""


def test_what_is_chosen_is_in_view_and_the_lines_can_be_clicked(lab):
    """40 questions, traces of 400 tokens whose prompts disagree most at token 381."""
    copy_helpers(lab.folder)
    shutil.rmtree(lab.folder / "late", ignore_errors=True)
    lab.write(
        "late.ipynb",
        "from pathlib import Path\n"
        "from helpers import made_up_run\n"
        "from covrl_lab import TraceExplorer\n"
        "from covrl_lab.runs.folder import step_file, write_parquet\n"
        "run = made_up_run(Path('late'), steps=1, questions=40, rollouts=2, length=400, right=True)\n"
        "frame = run.traces(1)\n"
        "frame['logq'] = [[-30.0 if t == 380 else q for t, q in enumerate(row)] for row in frame['logq']]\n"
        "frame.loc[::3, 'right'] = False\n"
        "frame['reward'], frame['advantage'] = [0.1 + k / 1000 for k in range(80)], -0.001\n"
        "write_parquet(frame, step_file(run.path / 'traces', 1))\n"
        "explorer = TraceExplorer(run, question='q35')",
        "explorer",
    )
    lab.open("late.ipynb")
    lab.run_all()
    page, frame = lab.page, load_run(lab.folder / "late").traces(1)
    page.wait_for_selector(".covrl-plot.js-plotly-plot")
    selected = page.locator(SELECTED)
    assert selected.get_attribute("data-token") == "380" and selected.evaluate(INSIDE)
    questions, rollouts = page.locator(".covrl-table").first, page.locator(".covrl-table").last
    chosen = questions.locator("tr[aria-selected=true]")
    assert chosen.get_attribute("data-id") == "1/q35" and chosen.evaluate(INSIDE)

    # 200 tokens are shown. A click on the lines at token 290, counted from 1 as in the text, takes them there.
    plot = page.locator(".covrl-plot.js-plotly-plot")
    plot.scroll_into_view_if_needed()
    seen = "document.querySelector('.covrl-plot.js-plotly-plot')._fullLayout.xaxis2.range"
    assert page.evaluate(seen) == [200.5, 400.5]
    x, y = page.evaluate(
        """() => { const plot = document.querySelector('.covrl-plot.js-plotly-plot');
            const box = plot.getBoundingClientRect(), {xaxis, yaxis} = plot._fullLayout;
            return [box.x + xaxis._offset + xaxis.c2p(290), box.y + yaxis._offset + yaxis._length / 2]; }"""
    )
    page.mouse.move(x, y)
    page.wait_for_timeout(300)
    page.mouse.click(x, y)
    wait_until(page, lambda: selected.get_attribute("data-token") == "289" and selected.evaluate(INSIDE))
    wait_until(page, lambda: page.evaluate(seen) == [189.5, 389.5])
    assert "290 of 400" in page.locator(".covrl-detail").inner_text()

    # Filters, in numbers of the file.
    marks = rollouts.locator("tbody td.mark span")
    own = frame[frame["example_id"] == "q35"].set_index("rollout")
    cells = [row.split("\t") for row in rollouts.locator("tbody tr").all_inner_texts()]
    shown = [int(row[0]) for row in cells]
    assert [row[5:7] for row in cells] == [[f"{own['reward'][k]:.3g}", "0.00"] for k in shown], "never -0.00"
    said = [{True: "right", False: "wrong"}[own["right"][rollout]] for rollout in shown]
    assert [mark.get_attribute("aria-label") for mark in marks.all()] == said
    page.locator(".widget-dropdown select").nth(2).select_option("wrong")
    wrong = frame[~frame["right"]]
    wait_until(page, lambda: questions.locator("tbody tr").count() == wrong["example_id"].nunique())
    page.get_by_placeholder("search questions").fill("question 2 of")
    wait_until(page, lambda: questions.locator("tbody tr").count() == 0)
    wait_until(page, lambda: page.locator(TOKEN).count() == 0 and page.locator(".covrl-plot .trace").count() == 0)
    assert "no trace fits" in questions.inner_text() and rollouts.locator("tbody tr").count() == 0
    page.get_by_placeholder("search questions").fill("question 33 of")
    wait_until(page, lambda: page.locator(TOKEN).count() == 800)
    with page.expect_download() as download:
        page.get_by_role("button", name="Rows as CSV").click()
    rows = pd.read_csv(download.value.path())
    assert list(rows["rollout"]) == list(wrong["rollout"][wrong["example_id"] == "q33"])
    assert not lab.errors and not lab.cell_errors()


def test_text_from_right_to_left_runs_so_in_traces_and_tables(lab):
    copy_helpers(lab.folder)
    shutil.rmtree(lab.folder / "rtl", ignore_errors=True)
    lab.write(
        "rtl.ipynb",
        "from pathlib import Path\n"
        "from helpers import made_up_run\n"
        "from covrl_lab import TraceExplorer\n"
        "words = ['אחת ', 'ועוד ', 'שתיים ', 'שלוש']\n"
        "texts = {'tokens': words, 'trace': ''.join(words), 'question': 'כמה הם אחת ועוד שתיים?'}\n"
        "explorer = TraceExplorer(made_up_run(Path('rtl'), steps=1, questions=2, rollouts=2, length=4, **texts))\n"
        "explorer",
    )
    lab.open("rtl.ipynb")
    lab.run_all()
    page = lab.page
    page.wait_for_selector(".covrl-plot.js-plotly-plot")
    direction = "found => getComputedStyle(found).direction"
    tokens = page.locator(".covrl-explorer .covrl-list").first.locator("[role=option]")
    assert [text.rstrip("·") for text in tokens.all_inner_texts()] == ["אחת", "ועוד", "שתיים", "שלוש"]
    places = [token.bounding_box()["x"] for token in tokens.all()]
    assert places == sorted(places, reverse=True), "the first token stands on the right"
    tokens.first.click()
    for key, token in (("ArrowLeft", 1), ("ArrowLeft", 2), ("ArrowRight", 1)):  # where the eye goes
        page.keyboard.press(key)
        assert page.locator(SELECTED).get_attribute("data-token") == str(token), key
    row = page.locator(".covrl-table").first.locator("tbody tr").first
    assert [row.locator("td").nth(k).evaluate(direction) for k in (1, 2)] == ["rtl", "ltr"]  # question, number
    trace = page.locator(".covrl-table").last.locator("tbody tr").first.locator("td").last
    assert trace.evaluate(direction) == "rtl"
    assert page.locator(".covrl-explorer .widget-html code[dir=auto]").first.evaluate(direction) == "rtl"


def test_a_plot_brings_plotly_to_a_page_that_has_none(lab):
    lab.write(
        "bare.ipynb",
        "import ipywidgets\n"
        "import plotly.graph_objects as go\n"
        "from covrl_lab.views.widgets import Plot\n"
        "plots = [Plot(), Plot()]\n"
        "for plot in plots:\n    plot.draw(go.Figure(go.Scatter(y=[1, 3, 2])))\n"
        "button = ipywidgets.Button(description='empty')\n"
        "button.on_click(lambda _: setattr(plots[0], 'figure', ''))\n"
        "ipywidgets.VBox([button, *plots])",
    )
    lab.open("bare.ipynb")
    assert lab.page.evaluate("window.Plotly === undefined")
    lab.run_all()
    page, drawn = lab.page, lab.page.locator(".covrl-plot .trace.scatter")
    wait_until(page, lambda: drawn.count() == 2)
    large = "[...document.querySelectorAll('script')].filter(s => s.textContent.length > 1e6).length"
    assert page.evaluate(large) == 1, "one answer does for both"
    assert page.evaluate("[...document.querySelector('.covrl-plot').data[0].y]") == [1, 3, 2]
    page.get_by_role("button", name="empty").click()
    wait_until(page, lambda: drawn.count() == 1)
    assert not lab.errors and not lab.requests and not lab.cell_errors()


def test_a_slider_move_redraws_soon(lab, capsys):
    """Printed, not asserted: from the slider's change to the new plot, 64 traces of 256 tokens."""
    lab.write(
        "speed.ipynb",
        "from pathlib import Path\n"
        "from helpers import made_up_run\n"
        "from covrl_lab import MixingRatio\n"
        "run = made_up_run(Path('speed'), steps=1, questions=16, rollouts=4, length=256)\n"
        "mixing = MixingRatio(run)",
        "mixing",
    )
    copy_helpers(lab.folder)
    shutil.rmtree(lab.folder / "speed", ignore_errors=True)
    lab.open("speed.ipynb")
    lab.run_all()
    page = lab.page
    page.wait_for_selector(".covrl-plot.js-plotly-plot")
    handle = page.locator(".noUi-handle").first
    handle.focus()
    times = []
    for _ in range(12):
        times.append(
            page.evaluate(
                """() => new Promise(done => {
                    const plot = document.querySelector('.covrl-plot');
                    const started = performance.now();
                    plot.once('plotly_afterplot', () => requestAnimationFrame(
                        () => done(performance.now() - started)));
                    document.querySelector('.noUi-handle').dispatchEvent(
                        new KeyboardEvent('keydown', { key: 'ArrowLeft', bubbles: true }));
                })"""
            )
        )
        page.wait_for_timeout(400)
    with capsys.disabled():
        print(f"\nslider to new plot in the browser: median {np.median(times):.0f} ms, most {max(times):.0f} ms")
    assert len(times) == 12 and not lab.errors


def test_copies_follow_the_panel_and_stand_alone_without_a_kernel(lab):
    """Saved after a click, the notebook holds what was clicked; opened again, it shows that and no error."""
    place = str(EXAMPLE_RUN)
    lab.write("copies.ipynb", f"from covrl_lab import TraceExplorer\nexplorer = TraceExplorer({place!r}, 1)\nexplorer")
    lab.open("copies.ipynb")
    lab.run_all()
    page = lab.page
    page.wait_for_selector(".covrl-plot.js-plotly-plot")
    first = page.locator(".covrl-table tbody tr[aria-selected=true], .covrl-table tbody tr.marked").first.inner_text()
    other = page.locator(".covrl-table").first.locator("tbody tr").nth(2)
    question = other.locator("td").nth(1).inner_text()
    assert question not in first
    other.click()
    copies = page.locator(".jp-OutputArea-child:not(:visible)")
    wait_until(page, lambda: any(question in text for text in copies.all_text_contents()))
    assert page.locator(".js-plotly-plot:visible").count() == 1  # the live one: copies drawn anew stay hidden
    page.keyboard.press("Control+s")
    stored = lab.folder / "copies.ipynb"
    wait_until(page, lambda: question in saved_text(stored))

    lab.open("copies.ipynb")  # with a kernel of its own, which does not know the widget
    page.wait_for_timeout(3000)
    assert page.locator(".jp-OutputArea-output:visible", has_text=question).count() == 1
    assert page.locator(".js-plotly-plot:visible").count() == 1
    for text in ("Error displaying widget", "Loading widget"):
        assert not page.get_by_text(text).locator("visible=true").count()


def test_a_grid_that_finishes_after_its_panel_was_shown_is_in_the_saved_copy(lab):
    copy_helpers(lab.folder)
    shutil.rmtree(lab.folder / "grid", ignore_errors=True)
    lab.write(
        "grid.ipynb",
        "from covrl_lab import Ablation\n"
        "panel = Ablation('grid', alphas='0.5', seeds='0', steps=1, model='tiny')\npanel",
        "import json\n"
        "from helpers import made_up_run\n"
        "(run_id,) = panel.sweep.runs\n"
        "run = made_up_run(panel.sweep.path(run_id), steps=1)\n"
        "panel.sweep.runs[run_id].save(run.path / 'config.json')\n"
        "step = {'step': 1, 'seconds': 1.0, 'reward_prior': -2.0, 'reward_posterior': -1.0, 'accuracy': None}\n"
        "count = (run.path / 'metrics.jsonl').write_text(json.dumps(step) + '\\n')\n"
        "panel.refresh()\n"
        "panel.show_traces(run_id)",
    )
    lab.open("grid.ipynb")
    lab.run_all()
    page, stored = lab.page, lab.folder / "grid.ipynb"
    page.wait_for_selector(".covrl-ablation .covrl-explorer .covrl-plot.js-plotly-plot")

    def saved():
        page.keyboard.press("Control+s")
        page.wait_for_timeout(500)
        return saved_text(stored).count('"application/vnd.plotly.v1+json"')

    wait_until(page, lambda: saved() == 3)  # two results, and the lines of the trace
    assert page.locator(".js-plotly-plot:visible").count() == 3, "copies stay hidden beside the live panel"
    assert not lab.cell_errors()
    lab.open("grid.ipynb")  # with a kernel of its own, which does not know the widget
    wait_until(page, lambda: page.locator(".js-plotly-plot:visible").count() == 3)
    assert page.locator(".jp-OutputArea-output:visible", has_text="question 0 of step 1").count() == 1
