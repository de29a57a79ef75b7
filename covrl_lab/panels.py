"""Notebook panels: a table of numbers, and sliders that compute it anew on every move.

Needs the ``notebooks`` extra (ipywidgets). The first table is plain HTML, so that it also shows where no
kernel serves the sliders: in a stored notebook, on a web page, after a batch run.
"""

from __future__ import annotations

import html
import math
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets
import pandas as pd
from IPython.display import HTML, display

from . import figures
from .types import ConfigError, did_you_mean

if TYPE_CHECKING:
    from .world import World

# name -> (label, least, largest, step)
_SLIDERS = {
    "alpha": ("α", 0.05, 0.95, 0.05),
    "composite_weight": ("w", 0.05, 1.0, 0.05),
    "distance": ("distance", 0.0, 4.0, 0.1),
    "temperature": ("temperature", 0.25, 3.0, 0.05),
}
_DEPENDS = {
    "kl": ("composite_weight", "distance", "temperature"),
    "gradient": ("alpha", "composite_weight", "distance", "temperature"),
    "ratio": ("alpha", "composite_weight", "distance", "temperature"),
    "responsibility": ("composite_weight", "distance", "temperature"),
}
# column of the frame -> heading with unit, factor
_COLUMNS: dict[str, dict[str, tuple[str, float]]] = {
    "kl": {
        "estimator": ("estimator", 1),
        "exact": ("exact KL, nats", 1),
        "mean": ("mean of draws, nats", 1),
        "standard_error": ("its standard error, nats", 1),
        "deviation": ("deviation of one sample, nats", 1),
        "lowest": ("least value, nats", 1),
    },
    "gradient": {
        "part": ("gradient of", 1),
        "estimator": ("estimator", 1),
        "bias": ("bias, % of exact", 100),
        "noise": ("noise of one rollout, × exact", 1),
    },
    "ratio": {
        "bound_low": ("lower bound of p′/h", 1),
        "low": ("least here", 1),
        "high": ("largest here", 1),
        "bound_high": ("upper bound of p′/h", 1),
        "touched": ("touched by the clip, %", 100),
        "touched_positive": ("of A > 0, %", 100),
        "touched_negative": ("of A < 0, %", 100),
    },
    "responsibility": {
        "source": ("traces from", 1),
        "expected": ("mean ρ", 1),
        "lowest": ("least ρ of a token", 1),
        "highest": ("largest ρ of a token", 1),
    },
}


def _cell(value: Any, factor: float) -> str:
    if not isinstance(value, float):
        return html.escape(str(value))
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞"
    return f"{value * factor + 0.0:.4f}".replace("-0.0000", "0.0000").replace("-", "−")


class EstimatorPanel:
    """Sliders and the key numbers of one section: "kl", "gradient", "ratio" or "responsibility".

    ``sliders`` maps a setting's name to its slider, ``frame`` holds the present numbers (units as in the
    functions of ``estimators``), ``table`` is the widget that shows them from the first move on.
    ``world`` is the world at distance 1 and temperature 1.
    """

    def __init__(
        self,
        section: str,
        world: World,
        *,
        alpha: float = 0.5,
        composite_weight: float = 0.5,
        distance: float = 1.0,
        temperature: float = 1.0,
        clip_range: float = 0.3,
        samples: int = 1000,
        seed: int = 0,
    ):
        if section not in _DEPENDS:
            raise ConfigError(f"unknown section {section!r}{did_you_mean(section, _DEPENDS)}")
        self.section, self.world = section, world
        self.clip_range, self.samples, self.seed = clip_range, samples, seed
        given = {
            "alpha": alpha,
            "composite_weight": composite_weight,
            "distance": distance,
            "temperature": temperature,
        }
        self.sliders = {}
        for name in _DEPENDS[section]:
            label, low, high, step = _SLIDERS[name]
            self.sliders[name] = widgets.FloatSlider(
                value=given[name],
                min=min(low, given[name]),
                max=max(high, given[name]),
                step=step,
                description=label,
                continuous_update=section != "gradient",  # a quarter of a second each
                style={"description_width": "90px"},
            )
        self.table = widgets.HTML()
        self.widget = widgets.VBox([*self.sliders.values(), self.table])
        for slider in self.sliders.values():
            slider.observe(self._update, names="value")
        self.frame = self.compute()

    def compute(self) -> pd.DataFrame:
        """The numbers at the sliders' present values."""
        from . import estimators  # needs torch, which looking at runs does without

        at = {name: slider.value for name, slider in self.sliders.items()}
        world = self.world.between(at["distance"], at["temperature"])
        weight = at["composite_weight"]
        if self.section == "kl":
            return estimators.kl_estimators(world, weight, self.samples, self.seed)
        if self.section == "gradient":
            return estimators.gradient_quality(world, at["alpha"], weight, self.clip_range)
        if self.section == "ratio":
            return estimators.ratio_range(world, [at["alpha"]], weight, self.clip_range)
        return estimators.responsibilities(self.world, [at["distance"]], weight, at["temperature"])

    def html(self) -> str:
        """The table as plain HTML."""
        columns = {name: c for name, c in _COLUMNS[self.section].items() if name in self.frame}
        rows = [
            figures._row([_cell(row[name], factor) for name, (_, factor) in columns.items()])
            for row in self.frame.to_dict("records")
        ]
        return figures._table([heading for heading, _ in columns.values()], rows)

    def _update(self, change: Any = None) -> None:
        self.frame = self.compute()
        self.table.value = self._titled("now")

    def _titled(self, when: str) -> str:
        settings = ", ".join(f"{slider.description} {slider.value:g}" for slider in self.sliders.values())
        return f"<p>{when}: {settings}</p>{self.html()}"

    def _ipython_display_(self) -> None:
        """The table as it stands, which needs no kernel; below it the sliders with a table of their own."""
        display(HTML(self._titled("numbers at")))
        display(self.widget)
