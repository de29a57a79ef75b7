"""Every panel in JupyterLab, wide and narrow, light and dark: nothing is cut off, and axe finds nothing serious."""

import pytest
from browser import jupyterlab
from screens import GALLERY, write_gallery

PANELS = ".jp-OutputArea-output > .widget-vbox"
# Contrast by WCAG's formula of each text in HTML, on the grounds behind it as a canvas puts them over each other.
# axe leaves out what it is not sure of. Disabled controls are exempt; figures' texts have one grey for both themes.
CONTRAST = """panels => {
    const canvas = Object.assign(document.createElement('canvas'), {width: 1, height: 1});
    const on = canvas.getContext('2d', {willReadFrequently: true});
    const fill = (colour, opacity) => {
        Object.assign(on, {fillStyle: colour, globalAlpha: opacity});
        on.fillRect(0, 0, 1, 1);
        const parts = [...on.getImageData(0, 0, 1, 1).data].slice(0, 3).map(x => x / 255);
        const [r, g, b] = parts.map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
    };
    const own = text => [...text.childNodes].some(node => node.nodeType === 3 && node.data.trim());
    const found = [];
    for (const text of document.querySelectorAll(`:is(${panels}) :not(svg *, :disabled)`)) {
        if (!own(text) || !text.checkVisibility({checkOpacity: true})) continue;
        const around = [];
        for (let e = text; e; e = e.parentElement) around.unshift(getComputedStyle(e));
        let ground = fill('white', 1);
        for (const style of around) ground = fill(style.backgroundColor, 1);
        const ink = fill(around.at(-1).color, around.reduce((all, style) => all * style.opacity, 1));
        found.push([Math.max(ink, ground) / Math.min(ink, ground), text.outerHTML.slice(0, 200)]);
    }
    return found;
}"""


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
        contrasts = page.evaluate(CONTRAST, PANELS)
        assert len(contrasts) > 300 and [pair for pair in contrasts if pair[0] < 4.5] == []
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
