"""Every panel in JupyterLab as a picture, at two widths and in both themes.

    python tests/screens.py            # all, to notebooks/results/screens
    python tests/screens.py runs bench # some; "report" is the beginning of a run's report

Needs Chromium and the tests extra, as the browser tests do; ``GALLERY`` is also what they check for accessibility.
"""

import shutil
import sys
import tempfile
from itertools import product
from pathlib import Path

from browser import jupyterlab
from helpers import ROOT

from covrl_lab import report

WIDTHS = (800, 1600)
RESULTS = ROOT / "notebooks" / "results"
# name -> code of a cell that shows the panel, in a folder with the runs "story", "example_run" and "trials/..."
GALLERY = {
    "runs": "RunBrowser('trials', 'story/..')",
    "explorer": "TraceExplorer('story')",
    "side-by-side": "TraceComparison('story')",
    "evaluations": "EvaluationBrowser('story')",
    "mixing": "MixingRatio('example_run')",
    "monitor": "RunMonitor('story')",
    "ablation": "Ablation('grid', alphas='0.5, 1', seeds='0, 1', steps=2, model='tiny')",
    "bench": "PromptBench(model='tiny')",
    "estimators": "EstimatorPanel('kl', World(1))",
}


def write_gallery(lab, name, *cells):
    """A notebook of ``cells``, with the runs that they show beside it."""
    if not (lab.folder / "story").exists():
        for run in ("story", "example_run", "trials"):
            shutil.copytree(RESULTS / run, lab.folder / run)
    lab.write(f"{name}.ipynb", *(f"from covrl_lab import {cell.split('(')[0]}, World\n{cell}" for cell in cells))


def show(lab, name, theme, width):
    """Open the panel ``name`` of ``GALLERY`` and wait until it is drawn; its outermost element."""
    lab.page.set_viewport_size({"width": 1600, "height": 2600})  # a narrow tool bar hides the kernel's state
    lab.open(f"{name}.ipynb", theme)
    lab.run_all()
    lab.page.set_viewport_size({"width": width, "height": 2600})
    if (button := lab.page.get_by_role("button", name="Generate")).count():  # the bench has nothing to show before
        button.click()
        lab.page.wait_for_selector(".covrl-bench .js-plotly-plot .main-svg")
    lab.page.wait_for_timeout(3000)
    return lab.page.locator(".jp-OutputArea-output > .widget-vbox").first


def main(names):
    target = RESULTS / "screens"
    with tempfile.TemporaryDirectory() as folder, jupyterlab(Path(folder)) as lab:
        for name in names or [*GALLERY, "report"]:
            if name == "report":
                lab.page.set_viewport_size({"width": 1150, "height": 1990})
                lab.page.goto(report(RESULTS / "story", Path(folder) / "report.html").absolute().as_uri())
                lab.page.wait_for_timeout(3000)
                lab.page.screenshot(path=target / "report-light.png")
                continue
            write_gallery(lab, name, GALLERY[name])
            for theme, width in product(("light", "dark"), WIDTHS):
                path = target / f"{name}-{theme}{'-800' * (width == 800)}.png"
                panel = show(lab, name, theme, width)
                if name == "ablation":  # finished, with its figures
                    if (launch := panel.get_by_role("button", name="Launch")).is_enabled():
                        launch.click()
                    panel.get_by_text("4 runs, 0 to do").wait_for(timeout=600_000)
                    lab.page.wait_for_timeout(5000)
                panel.screenshot(path=path)
                print(path.name, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
