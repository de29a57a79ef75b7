"""Traces as coloured tokens: the widget's data and the plain HTML."""

import numpy as np
import pytest
from helpers import EXAMPLE_RUN

from covrl_lab import load_run, reweight, token_html
from covrl_lab.types import ConfigError
from covrl_lab.views.token_view import TokenView


@pytest.fixture(scope="module")
def example():
    return load_run(EXAMPLE_RUN)


def test_token_html_gives_every_token_its_number(example):
    pair = example.traces(1).iloc[:2]
    page = token_html(pair, reweight.Settings(), "log_gap")
    assert page.count("<span style=") == pair["tokens"].map(len).sum() + 2  # two swatches
    gap = pair["logq"].iloc[0][3] - pair["logp"].iloc[0][3]
    assert f"log q − log p {gap:.3f} nats" in page
    with pytest.raises(ConfigError, match="did you mean 'logp'"):
        token_html(pair, colour="logp_")


def test_clipped_tokens_are_underlined_in_the_copy(example):
    frame = example.traces(1)
    settings = reweight.Settings(0.1, 0.5)
    clipped = np.nansum(reweight.quantities(reweight.Traces.of(frame), settings)["clipped"])
    assert clipped > 0
    assert token_html(frame, settings).count("border-bottom: 2px dashed") == clipped


def test_the_view_reports_alternatives_and_refuses_unknown_colours(example):
    pair = example.traces(1).iloc[:1]
    choices = [{"prior": [("\n", -0.1), ("<b>", -2.0)]}] * len(pair["tokens"].iloc[0])
    view = TokenView()
    view.show(pair, alternatives=[choices])
    assert view.traces[0]["alternatives"][0] == {"prior": [["↵", -0.1], ["<b>", -2.0]]}
    with pytest.raises(ConfigError, match="unknown colour"):
        TokenView(colour="red")
