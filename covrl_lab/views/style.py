"""What all figures share: colours, the plotly template, lines and error bars."""

from typing import Any

import numpy as np
import plotly.graph_objects as go
import plotly.io as pio

# Colours that stay apart with the common colour-vision deficiencies and on light and dark grounds.
PRIOR, POSTERIOR, BOTH = "#1f77b4", "#d55e00", "#009e73"
SOURCE_COLOURS = {"prior": PRIOR, "posterior": POSTERIOR}
PALETTE = (PRIOR, POSTERIOR, BOTH, "#cc79a7", "#8a6fd1", "#b58900", "#56b4e9", "#7f7f7f")
GREY, GRID = "#7a7a7a", "rgba(128, 128, 128, 0.25)"

_AXIS = {
    "gridcolor": GRID,
    "zerolinecolor": GRID,
    "linecolor": GREY,
    "tickcolor": GREY,
    "automargin": True,
    "exponentformat": "power",  # else 1e-6 is "1μ", as of a metre
    "title": {"standoff": 8},
}
# Four buttons are as high as the lowest figure: more would stand in a second row, over the data.
_BAR = {"orientation": "v", "remove": "zoomin zoomout autoscale select lasso".split()}
TEMPLATE = go.layout.Template(
    layout={
        "paper_bgcolor": "rgba(0, 0, 0, 0)",
        "plot_bgcolor": "rgba(0, 0, 0, 0)",
        "font": {"color": GREY, "size": 12},
        "colorway": PALETTE,
        "xaxis": _AXIS,
        "yaxis": _AXIS,
        "margin": {"l": 60, "r": 40, "t": 60, "b": 50},  # r: room for the mode bar
        "modebar": _BAR | {"bgcolor": "rgba(0, 0, 0, 0)", "color": GREY, "activecolor": POSTERIOR},
        "title": {"x": 0, "xref": "paper", "xanchor": "left", "font": {"size": 14}},
        "legend": {"orientation": "h", "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom"},
        "hoverlabel": {"align": "left", "namelength": -1},
    }
)

# Of figures that a cell returns, as ``static/saving.js`` has it for panels and reports; JSON has no button for SVG.
pio.renderers["plotly_mimetype"].config = {
    "displaylogo": False,
    "showSendToCloud": False,  # a button that uploads the figure, on by default
    "toImageButtonOptions": {"format": "png", "scale": 2},
}


def text_colour(colour: str) -> str:
    """CSS for small text: ``colour`` mixed with the text's own, so darker on light grounds and lighter on dark ones.

    Its contrast is then at least 4.5, as WCAG 2 asks for; lines and marks need 3, which the colours have as they are.
    """
    return f"color-mix(in srgb, {colour} 70%, currentColor)"


def add_line(figure: go.Figure, x: Any, y: Any, name: str, colour: str, width: float = 2, **settings: Any) -> None:
    """Add a line with a marker at each point; lines of one name come and go together."""
    look = {"mode": "lines+markers", "legendgroup": name, "marker": {"size": 6}}
    figure.add_scatter(x=x, y=y, name=name, line={"color": colour, "width": width}, **(look | settings))


def error_bars(value: Any, low: Any, high: Any) -> dict[str, Any]:
    """Bars from ``low`` to ``high``, which plotly wants as distances from ``value``."""
    value, low, high = (np.asarray(x, float) for x in (value, low, high))
    return {"array": (high - value).clip(0), "arrayminus": (value - low).clip(0), "thickness": 1.5, "width": 4}
