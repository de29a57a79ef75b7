"""The browser of held-out questions in a real JupyterLab: a click and the keyboard, against the run folder's files."""

import shutil

from browser import jupyterlab
from helpers import EXAMPLE_RUN
from test_evaluations import STEPS, answers

from covrl_lab import load_run
from covrl_lab.runs.questions import by_learning, history


def test_a_click_on_the_heat_map_shows_what_the_file_says(tmp_path):
    shutil.copytree(EXAMPLE_RUN, tmp_path / "run")
    with jupyterlab(tmp_path) as lab:
        lab.write("browse.ipynb", "from covrl_lab import EvaluationBrowser\nEvaluationBrowser('run')")
        lab.open("browse.ipynb")
        lab.run_all()
        page, found = lab.page, answers(tmp_path / "run")
        panel = page.locator(".covrl-evaluations")
        plot = panel.locator(".covrl-plot.js-plotly-plot")
        plot.locator(".heatmaplayer image").wait_for()
        page.wait_for_function(  # the copy steps aside
            "[...document.querySelectorAll('.js-plotly-plot')].filter(d => d.checkVisibility()).length === 1"
        )
        place = 60
        ids = list(by_learning(history(load_run(tmp_path / "run")))["example_id"])

        def open_at(row, column):
            """Click the cell of the heat map."""
            plot.scroll_into_view_if_needed()
            x, y = plot.evaluate(
                """(plot, [row, column]) => {
                    const { xaxis, yaxis } = plot._fullLayout, box = plot.getBoundingClientRect();
                    return [box.left + xaxis._offset + xaxis.c2p(column), box.top + yaxis._offset + yaxis.c2p(row)];
                }""",
                [row, column],
            )
            page.mouse.move(x - 3, y)
            page.mouse.move(x, y)
            page.wait_for_timeout(300)
            page.mouse.click(x, y)

        def shown():
            cards = panel.locator(".covrl-question [data-step]")
            return {
                int(card.get_attribute("data-step")): (
                    card.locator(".covrl-said").inner_text(),
                    card.locator(".covrl-trace-text").inner_text(),
                    "✓" in card.inner_text(),
                )
                for card in cards.all()
            }

        def expected(example):
            rows = {step: found[step][example] for step in STEPS}
            return {step: (r["prediction"], r["trace"], r["score"] == 1) for step, r in rows.items()}

        open_at(place, 2)
        question = found[0][ids[place]]["question"]
        panel.locator(".covrl-question").get_by_text(question, exact=True).wait_for()
        assert shown() == expected(ids[place])

        panel.get_by_label("show", exact=True).select_option("lost")
        lost = [i for i in ids if found[0][i]["score"] == 1 and found[30][i]["score"] < 1]
        rows = panel.locator(".covrl-table tbody tr")
        page.wait_for_function("n => document.querySelectorAll('.covrl-table tbody tr').length === n", arg=len(lost))
        rows.first.click()
        page.keyboard.press("ArrowDown")
        panel.locator(".covrl-question").get_by_text(found[0][lost[1]]["question"], exact=True).wait_for()
        assert shown() == expected(lost[1])
        assert panel.locator("[data-outcome=lost]").inner_text() == str(len(lost))
        assert not lab.errors and not lab.cell_errors() and not lab.requests
