"""Every panel in JupyterLab, wide and narrow, light and dark: nothing is cut off, and axe finds nothing serious."""

import pytest
from browser import jupyterlab
from screens import GALLERY, write_gallery

PANELS = ".jp-OutputArea-output > .widget-vbox"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with jupyterlab(tmp_path_factory.mktemp("lab"), width=1600, height=1400) as lab:
        write_gallery(lab, "gallery", *GALLERY.values())
        yield lab


def serious(page, axe):
    """What axe calls serious or critical inside the panels: (rule, element, why)."""
    found = axe.run(page, context=PANELS).response["violations"]
    return {
        (rule["id"], node["html"][:160], node["failureSummary"][:300])
        for rule in found
        if rule["impact"] in ("serious", "critical")
        for node in rule["nodes"]
    }


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_panels_are_accessible_and_fit(lab, theme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page = lab.page
    page.set_viewport_size({"width": 1600, "height": 1400})  # a narrow tool bar hides the kernel's state
    lab.open("gallery.ipynb", theme)
    lab.run_all()
    page.wait_for_timeout(5000)
    assert lab.cell_errors() == [] and page.locator(PANELS).count() >= len(GALLERY)
    for width in (1600, 800):
        page.set_viewport_size({"width": width, "height": 1400})
        page.wait_for_timeout(1500)
        found = serious(page, axe)
        print(*sorted(found), sep="\n")
        assert found == set()
        cut = page.evaluate(
            f"""() => [...document.querySelectorAll('{PANELS} button, {PANELS} input, {PANELS} select')]
                .filter(e => e.offsetParent && !e.closest('.covrl-table'))
                .filter(e => e.getBoundingClientRect().right > innerWidth)
                .map(e => e.outerHTML.slice(0, 160))"""
        )
        assert cut == [], width
        sliders = page.locator(f"{PANELS} .slider-container").evaluate_all("found => found.map(e => e.offsetWidth)")
        assert sliders and min(sliders) > 60, (width, sliders)
    assert lab.errors == []
