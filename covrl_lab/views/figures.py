"""Data frames to plotly figures and HTML tables: no files, no model, no torch.

Frames come from a run folder (``traces.Run``) or from ``traces.trace_frame``. Text that a model or a data
set wrote is made visible and escaped wherever it enters hover text, tick labels or HTML. Backgrounds are
transparent and lines mid-grey, so that figures fit light and dark themes.
"""

from __future__ import annotations

import html
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

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
    "title": {"standoff": 8},
}
TEMPLATE = go.layout.Template(
    layout={
        "paper_bgcolor": "rgba(0, 0, 0, 0)",
        "plot_bgcolor": "rgba(0, 0, 0, 0)",
        "font": {"color": GREY, "size": 12},
        "colorway": PALETTE,
        "xaxis": _AXIS,
        "yaxis": _AXIS,
        "margin": {"l": 60, "r": 40, "t": 60, "b": 50},  # r: room for the mode bar
        "modebar": {
            "orientation": "v",
            "bgcolor": "rgba(0, 0, 0, 0)",
            "color": GREY,
            "activecolor": POSTERIOR,
        },
        "title": {"x": 0, "xref": "paper", "xanchor": "left", "font": {"size": 14}},
        "legend": {"orientation": "h", "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom"},
        "hoverlabel": {"align": "left", "namelength": -1},
    }
)


# --- text


def visible(text: str, spaces: bool = False) -> str:
    """The same text with control, direction and other invisible characters shown by a sign.

    New lines become ↵, tabs ⇥, an escape ␛, U+202E ⟨U+202E⟩, and with ``spaces`` a space becomes ·.
    """
    signs = {"\n": "↵", "\t": "⇥"} | ({" ": "·"} if spaces else {})

    def sign(character: str) -> str:
        if character in signs:
            return signs[character]
        if unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp"):
            return character
        code = ord(character)
        return chr(0x2400 + code) if code < 0x20 else f"⟨U+{code:04X}⟩"

    return "".join(map(sign, str(text)))


def _label(text: str, width: int = 60, lines: int = 8, spaces: bool = False) -> str:
    """Text for plotly, which reads a little HTML and TeX: visible, wrapped, cut after ``lines``, escaped."""
    wrapped = textwrap.wrap(visible(text, spaces), width, max_lines=lines, placeholder=" …")
    # Quotes stay: plotly knows no entity for them, and text never becomes an attribute.
    return "<br>".join(html.escape(line, quote=False).replace("$", "&#36;") for line in wrapped)


def _table(header: Sequence[str], rows: Sequence[str]) -> str:
    style = "border-collapse: collapse; background: transparent"
    heads = "".join(f'<th style="text-align: left; padding: 2px 12px 2px 0">{name}</th>' for name in header)
    return f'<table style="{style}"><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def _row(cells: Sequence[str]) -> str:
    style = "text-align: left; vertical-align: top; padding: 2px 12px 2px 0"
    return "<tr>" + "".join(f'<td style="{style}">{cell}</td>' for cell in cells) + "</tr>"


# --- traces


def answer_logprob(frame: pd.DataFrame) -> pd.Series:
    """log p(y|x,z) of every trace in nats: the sum over the reference answer's tokens."""
    return frame["answer_logp"].map(lambda tokens: float(np.sum(tokens))).astype(float)


def trace_table(frame: pd.DataFrame) -> str:
    """HTML table of traces, grouped by question: source, trace, log p(y|x,z) in nats, finished."""
    if frame.empty:
        return "<p>no traces</p>"
    rows = []
    for _, group in frame.assign(total=answer_logprob(frame)).groupby("example_id", sort=False):
        question, answer = (html.escape(visible(group[name].iloc[0])) for name in ("question", "answer"))
        rows.append(
            '<tr><th colspan="4" style="text-align: left; padding: 10px 0 2px 0">'
            f'<code>{question}</code> <span style="font-weight: normal">reference answer</span> '
            f"<code>{answer}</code></th></tr>"
        )
        for row in group.itertuples():
            source = html.escape(row.source)
            colour = SOURCE_COLOURS.get(row.source, GREY)
            rows.append(
                _row(
                    [
                        f'<b style="color: {colour}">{source}</b>',
                        # <code>: no page's formula renderer looks for dollars in it.
                        f'<code style="overflow-wrap: anywhere">{html.escape(visible(row.trace))}</code>',
                        f"{row.total:.2f}",
                        "yes" if row.finished else "no",
                    ]
                )
            )
    return _table(["drawn from", "trace z", "log p(y|x,z), nats", "finished"], rows)


def answer_logprobs(frame: pd.DataFrame, questions: int = 8) -> go.Figure:
    """log p(y|x,z) in nats of prior against posterior traces, one row for each of the first questions.

    A point is a trace (hollow: unfinished), a bar the mean of a question's traces from one source.
    """
    frame = frame.assign(total=answer_logprob(frame))
    groups = [group for _, group in frame.groupby("example_id", sort=False)][:questions]
    figure = go.Figure(layout={"template": TEMPLATE})
    for source, colour in SOURCE_COLOURS.items():
        offset = -0.17 if source == "prior" else 0.17
        parts = []
        for i, group in enumerate(groups):
            part = group[group["source"] == source]
            stagger = np.linspace(-0.1, 0.1, len(part) + 2)[1:-1]  # equal traces stay apart
            parts += [part.assign(row=i + offset, place=i + offset + stagger)] if len(part) else []
        if not parts:
            continue
        # Finished first: the legend shows the first point's symbol.
        rows = pd.concat(parts).sort_values("finished", ascending=False, kind="stable")
        figure.add_scatter(
            x=rows["total"],
            y=rows["place"],
            mode="markers",
            name=source,
            legendgroup=source,
            marker={
                "color": colour,
                "size": 9,
                "opacity": 0.8,
                "symbol": ["circle" if done else "circle-open" for done in rows["finished"]],
            },
            customdata=[
                [_label(trace), np.exp(total), "" if done else "<br>unfinished"]
                for trace, total, done in zip(rows["trace"], rows["total"], rows["finished"], strict=True)
            ],
            hovertemplate="%{customdata[0]}<br>log p(y|x,z) = %{x:.2f} nats, p = %{customdata[1]:.2g}"
            f"%{{customdata[2]}}<extra>{source}</extra>",
        )
        figure.add_scatter(
            x=[part["total"].mean() for part in parts],
            y=[part["row"].iloc[0] for part in parts],
            mode="markers",
            name=f"mean, {source}",
            legendgroup=source,
            showlegend=False,
            marker={"symbol": "line-ns", "size": 20, "line": {"color": colour, "width": 3}},
            hovertemplate=f"mean of {source} traces: %{{x:.2f}} nats<extra></extra>",
        )
    figure.update_xaxes(title_text="log p(y | x, z), nats (right: the reference answer is more probable)")
    figure.update_yaxes(
        tickvals=list(range(len(groups))),
        ticktext=[
            f"{_label(g['question'].iloc[0], 40, 3)}<br>y = {_label(g['answer'].iloc[0], 40, 2)}"
            for g in groups
        ],
        range=[len(groups) - 0.5, -0.5],
        zeroline=False,
    )
    return figure.update_layout(
        title_text="A point is a trace (hollow: unfinished), a bar the mean",
        height=150 + 80 * max(1, len(groups)),
    )


def token_comparison(row: Any) -> go.Figure:
    """One trace (a row of ``Run.traces``): log p and log q in nats of every token, over the tokens' text."""
    tokens = [_label(token, spaces=True) for token in row["tokens"]]
    places, logp, logq = list(range(len(tokens))), list(row["logp"]), row["logq"]
    figure = go.Figure(layout={"template": TEMPLATE})
    lines = [("log p, prior prompt", logp, PRIOR)]
    if logq is not None:
        lines.append(("log q, posterior prompt", list(logq), POSTERIOR))
    for name, values, colour in lines:
        figure.add_scatter(
            x=places,
            y=values,
            mode="lines+markers",
            name=name,
            line={"color": colour, "width": 2},
            marker={"size": 6},
            customdata=tokens,
            hovertemplate="%{y:.2f} nats at <b>%{customdata}</b>",
        )
    fits = len(tokens) * max((len(visible(t)) for t in row["tokens"]), default=0) <= 100
    total = float(np.sum(row["answer_logp"]))
    figure.update_xaxes(
        title_text="trace token (· space, ↵ end of line)",
        tickvals=places,
        ticktext=tokens,
        tickangle=0 if fits else -90,
        tickfont={"family": "monospace", "size": 13 if len(tokens) <= 64 else 10},
        showgrid=False,
    )
    figure.update_yaxes(title_text="log-probability, nats a token")
    return figure.update_layout(
        title_text=f"A {html.escape(row['source'])} trace, log p(y|x,z) = {total:.2f} nats",
        hovermode="x unified",
        legend={"x": 0, "xanchor": "left"},
        margin={"t": 80},
        height=400,
        width=None if len(tokens) <= 80 else 12 * len(tokens),  # pixels; None: as wide as the notebook
    )


def token_lines(
    texts: Sequence[str],
    values: Mapping[str, Sequence[float]],
    name: str = "",
    label: str = "",
    selected: int | None = None,
) -> go.Figure:
    """One trace along its tokens: log p and log q in nats, below them the quantity ``name`` of ``values``.

    values: name -> one number a token, as in ``tokens.quantities``; label: its axis title. The dotted line
    stands at token ``selected`` (from 0).
    """
    below = name in values and name not in ("logp", "logq")
    figure = make_subplots(2 if below else 1, 1, shared_xaxes=True, vertical_spacing=0.06)
    hover = [f"{t}: {_label(text, spaces=True)}" for t, text in enumerate(texts, 1)]
    lines = [("log p", "logp", PRIOR, "circle", 1), ("log q", "logq", POSTERIOR, "diamond", 1)]
    lines += [(label, name, BOTH, "square", 2)] if below else []
    for title, key, colour, symbol, row in lines:
        if key in values:
            figure.add_scatter(
                y=list(values[key]),
                mode="lines+markers" if len(texts) <= 200 else "lines",
                name=title,
                showlegend=row == 1,
                line={"color": colour, "width": 2},
                marker={"size": 6, "symbol": symbol},
                customdata=hover,
                hovertemplate="%{y:.3f} at %{customdata}",
                row=row,
                col=1,
            )
    if selected is not None:
        figure.add_vline(x=selected, line={"color": GREY, "width": 2, "dash": "dot"})
    few = len(texts) <= 64
    figure.update_xaxes(showgrid=False, zeroline=False)
    figure.update_xaxes(
        title_text="trace token (· space, ↵ end of line)" if few else "trace token, from 0",
        tickvals=list(range(len(texts))) if few else None,
        ticktext=[_label(text, 12, 1, spaces=True) for text in texts] if few else None,
        tickangle=0 if sum(map(len, texts)) <= 70 else -90,
        tickfont={"family": "monospace"},
        row=2 if below else 1,
        col=1,
    )
    figure.update_yaxes(title_text="nats a token", row=1, col=1)
    if below:
        figure.update_yaxes(title_text=textwrap.fill(label, 18).replace("\n", "<br>"), row=2, col=1)
    return figure.update_layout(
        template=TEMPLATE,
        hovermode="x",
        height=340 if below else 240,
        margin={"t": 30, "b": 40},
        legend={"x": 0, "xanchor": "left"},
    )


def mixing(
    settings: Mapping[str, str],
    densities: Sequence[Mapping[str, tuple[np.ndarray, np.ndarray]]],
    bounds: Sequence[tuple[float, float] | None],
    pulls: Sequence[Mapping[tuple[str, str], float]],
) -> go.Figure:
    """One column for each setting: token densities, ratios with the clip's bounds, pull on p and q.

    settings: name -> description of it; densities and pulls as ``tokens.densities`` and ``tokens.pulls``;
    bounds: least and largest ratio inside the clip, or None.
    """
    columns, wide = len(densities), len(densities) > 1
    layout: dict[str, Any] = {"template": TEMPLATE, "height": 560, "barmode": "stack", "bargap": 0.4}
    layout |= {
        "margin": {"t": 60, "l": 70, "r": 30, "b": 45},
        "legend": {"y": 1.03, "x": 0, "xanchor": "left", "traceorder": "normal"},
    }
    data: list[dict[str, Any]] = []
    annotations, shapes = [], []
    # Plain dictionaries, checked once by go.Figure: built by subplot calls this takes five times as long.
    for column, (title, density, bound, pull) in enumerate(
        zip(settings.items(), densities, bounds, pulls, strict=True)
    ):
        left, right = (
            column / columns + 0.05 * (column > 0),
            (column + 1) / columns - 0.05 * (column + 1 < columns),
        )
        axes = [str(3 * column + row + 1) if column or row else "" for row in range(3)]
        for row, (bottom, top) in enumerate(((0.72, 1.0), (0.33, 0.59), (0.0, 0.16))):
            layout[f"xaxis{axes[row]}"] = {"domain": [left, right], "anchor": f"y{axes[row]}"}
            layout[f"yaxis{axes[row]}"] = {"domain": [bottom, top], "anchor": f"x{axes[row]}"}
        if wide:
            text = f"<b>{_label(title[0])}</b>  {_label(title[1])}"
            place = {"x": left, "y": 1.13, "xref": "paper", "yref": "paper", "xanchor": "left"}
            annotations.append({"text": text, "showarrow": False, **place})
        first = column == 0
        for name, colour, dash in (
            ("log p", PRIOR, "solid"),
            ("log q", POSTERIOR, "dot"),
            ("log h", BOTH, "solid"),
        ):
            edges, share = density.get(name, ([], []))
            data.append(
                _steps(edges, share, axes[0], name, colour, first)
                | {
                    "line": {
                        "shape": "hv",
                        "color": colour,
                        "dash": dash,
                        "width": 3 if name == "log h" else 1.5,
                    }
                }
            )
        for source, colour in SOURCE_COLOURS.items():
            edges, share = density.get(f"ratio {source}", ([], []))
            data.append(
                _steps(np.exp(edges), share, axes[1], f"{source} traces", colour, first)
                | {
                    "fill": "tozeroy",
                    "fillcolor": _faint(colour),
                    "line": {"shape": "hv", "color": colour, "width": 1.5},
                }
            )
        if bound is not None:
            box = {"type": "rect", "xref": f"x{axes[1]}", "yref": f"y{axes[1]} domain", "y0": 0, "y1": 1}
            shapes.append(
                box
                | {"x0": max(0.2, bound[0]), "x1": min(5, bound[1]), "fillcolor": BOTH, "opacity": 0.15}
                | {"line": {"width": 0}}
            )
        for source, colour in SOURCE_COLOURS.items():
            data.append(
                {
                    "type": "bar",
                    "orientation": "h",
                    "x": [pull.get((moved, source), 0.0) for moved in ("prior", "posterior")],
                    "y": ["on log p", "on log q"],
                    "xaxis": f"x{axes[2]}",
                    "yaxis": f"y{axes[2]}",
                    "marker": {"color": colour},
                    "showlegend": False,
                    "hovertemplate": f"%{{x:.3f}} %{{y}} from {source} traces<extra></extra>",
                }
            )
        log = {"type": "log", "range": [-4, 0], "dtick": 1, "tickformat": ".2~%", "ticklabelstandoff": 4}
        layout[f"xaxis{axes[0]}"] |= {
            "title": {"text": "nats a token"},
            "range": [-12, 0],
            "tickvals": [-10, -8, -6, -4, -2, 0],
        }
        layout[f"yaxis{axes[0]}"] |= log | {"title": {"text": "tokens" if first else ""}}
        layout[f"xaxis{axes[1]}"] |= {
            "type": "log",
            "range": [np.log10(0.2), np.log10(5)],
            "tickvals": [0.3, 0.5, 0.7, 1, 1.3, 2, 4],
            "title": {"text": "importance ratio p′/h (shaded: inside the clip)"},
        }
        layout[f"yaxis{axes[1]}"] |= log | {"title": {"text": "tokens" if first else ""}}
        layout[f"xaxis{axes[2]}"] |= {
            "title": {"text": "mean |gradient weight| a token"},
            "rangemode": "tozero",
        }
        layout[f"yaxis{axes[2]}"] |= {"autorange": "reversed", "ticklabelstandoff": 4}
    pulled = [
        sum(v for (moved, _), v in pull.items() if moved == m) for pull in pulls for m in SOURCE_COLOURS
    ]
    for column in range(columns):  # one scale, so that the settings compare
        axis = str(3 * column + 3)
        layout[f"xaxis{axis}"]["range"] = [0, 1.05 * max(pulled, default=1.0) or 1.0]
    return go.Figure({"data": data, "layout": layout | {"annotations": annotations, "shapes": shapes}})


def _faint(colour: str) -> str:
    """A colour as "#1f77b4", a quarter opaque."""
    r, g, b = (int(colour[k : k + 2], 16) for k in (1, 3, 5))
    return f"rgba({r}, {g}, {b}, 0.25)"


def _steps(x: Any, share: Any, axis: str, name: str, colour: str, legend: bool) -> dict[str, Any]:
    """A histogram as one stepped line, which draws faster than its bars."""
    share = np.append(share, share[-1:])  # the last bin's right edge
    return {
        "type": "scatter",
        "mode": "lines",
        "x": x,
        "y": np.where(share > 0, share, 1e-5),  # below the axis: a logarithm has no zero
        "xaxis": f"x{axis}",
        "yaxis": f"y{axis}",
        "name": name,
        "showlegend": legend,
        "hovertemplate": "from %{x:.3g}: %{y:.2%} of tokens",
    }


# --- runs


def training_curves(
    metrics: pd.DataFrame, evaluations: pd.DataFrame | None = None, reward_unit: str = "nats"
) -> go.Figure:
    """Small multiples over a run's steps: what rises when it learns, and what else might make it rise.

    metrics and evaluations are ``Run.metrics`` and ``Run.evaluations``; a quantity that the method does not
    have (KL without a posterior) gets no panel. The bars on accuracy are 95% intervals, those of
    ``evaluation.summarise``. From 60 steps on, each step is a faint line and the bold one a centred mean over
    a twentieth of the run.
    """
    sources = SOURCE_COLOURS.items()
    panels = [
        ("Reward by source", reward_unit, {f"reward_{s}": (s, c) for s, c in sources}),
        ("KL(p′‖p)", "nats a token", {"kl": ("all traces", BOTH)}),
        ("Trace length", "tokens", {f"trace_tokens_{s}": (s, c) for s, c in sources}),
        ("Finished traces", "share", {"finished_share": ("all traces", BOTH)}),
        ("Held-out accuracy", "share of questions", {"accuracy": ("held-out questions", PRIOR)}),
        ("Gradient norm", "L2 norm before clipping", {"gradient_norm": ("all traces", BOTH)}),
    ]
    frames = {"accuracy": evaluations} if evaluations is not None and len(evaluations) else {}
    drawn = []
    for title, unit, series in panels:
        kept = {}
        for column, (name, colour) in series.items():
            frame = frames.get(column, metrics)
            if column in frame and frame[column].notna().any():
                kept[column] = (frame.dropna(subset=[column]), name, colour)
        if kept:
            drawn.append((title, unit, kept))
    if not drawn:
        return go.Figure(layout={"template": TEMPLATE, "title": {"text": "no finished step yet"}})

    columns = min(3, len(drawn))
    rows = -(-len(drawn) // columns)
    figure = make_subplots(
        rows,
        columns,
        subplot_titles=[title for title, _, _ in drawn],
        horizontal_spacing=0.09,
        vertical_spacing=0.2 if rows > 1 else 0,
    )
    named = set()
    for i, (_, unit, series) in enumerate(drawn):
        place = {"row": i // columns + 1, "col": i % columns + 1}
        for column, (frame, name, colour) in series.items():
            noisy = len(frame) > 60
            shown = {"legendgroup": name, "x": frame["step"], "name": name}
            in_legend = name in SOURCE_COLOURS and name not in named
            figure.add_scatter(
                y=frame[column],
                mode="lines" if noisy else "lines+markers",
                opacity=0.35 if noisy else 1,
                line={"color": colour, "width": 1 if noisy else 2},
                marker={"size": 5},
                error_y=_interval(frame, column),
                hovertemplate=f"step %{{x}}: %{{y:.3g}} {unit}{_spread(frame, column)}<extra>{name}</extra>",
                customdata=_bounds(frame, column),
                showlegend=in_legend and not noisy,
                **shown,
                **place,
            )
            if noisy:
                window = len(frame) // 20
                figure.add_scatter(
                    y=frame[column].rolling(window, center=True, min_periods=1).mean(),
                    mode="lines",
                    line={"color": colour, "width": 2.5},
                    hovertemplate=f"mean of {window} steps: %{{y:.3g}} {unit}<extra>{name}</extra>",
                    showlegend=in_legend,
                    **shown,
                    **place,
                )
            named.add(name)
        figure.update_yaxes(title_text=unit, **place)
        if unit.startswith("share"):
            figure.update_yaxes(tickformat=".0%", rangemode="tozero", **place)
        last = max(frame["step"].max() for frame, _, _ in series.values())
        figure.update_xaxes(title_text="step", dtick=1 if last <= 8 else None, **place)
    return figure.update_layout(
        template=TEMPLATE, height=60 + 260 * rows, legend={"y": 1.08}, margin={"t": 70, "b": 40}
    )


def _bounds(frame: pd.DataFrame, column: str) -> np.ndarray | None:
    """(rows, 2) low and high of a column's interval, or None where it has none."""
    names = [f"{column}_low", f"{column}_high"]
    return frame[names].to_numpy(float) if set(names) <= set(frame) else None


def _spread(frame: pd.DataFrame, column: str) -> str:
    """The part of a hover template that shows ``_bounds``."""
    return "" if _bounds(frame, column) is None else " (95%: %{customdata[0]:.3g} to %{customdata[1]:.3g})"


def _interval(frame: pd.DataFrame, column: str) -> dict[str, Any] | None:
    """Error bars from ``_bounds``."""
    bounds = _bounds(frame, column)
    if bounds is None:
        return None
    value = frame[column].to_numpy(float)
    return {
        "array": (bounds[:, 1] - value).clip(0),
        "arrayminus": (value - bounds[:, 0]).clip(0),
        "thickness": 1,
        "width": 3,
    }


def evaluation_curve(runs: Mapping[str, pd.DataFrame], value: str = "accuracy") -> go.Figure:
    """Held-out accuracy against step, a bold line with a band for every entry of ``runs``.

    An entry is one run's ``Run.evaluations``, and the band its 95% interval over questions; or
    several such frames put together, told apart by a column ``seed``: then thin lines are the seeds, the
    bold line their mean, and the band goes from the lowest seed to the highest.
    """
    figure = go.Figure(layout={"template": TEMPLATE})
    for k, (name, frame) in enumerate(runs.items()):
        if value not in frame or not frame[value].notna().any():
            continue
        colour, label = PALETTE[k % len(PALETTE)], _label(name, 40, 2)
        frame = frame.dropna(subset=[value]).sort_values("step")
        seeds = list(frame.groupby("seed")) if "seed" in frame else []
        shared = {"legendgroup": name, "line": {"color": colour}}
        if len(seeds) > 1:
            by_step = frame.groupby("step")[value]
            mean, low, high = by_step.mean(), by_step.min(), by_step.max()
            band = "seeds"
            for seed, own in seeds:
                figure.add_scatter(
                    x=own["step"],
                    y=own[value],
                    mode="lines",
                    name=f"{label}, seed {_label(seed)}",
                    showlegend=False,
                    opacity=0.5,
                    customdata=_bounds(own, value),
                    hovertemplate=f"%{{y:.3f}}{_spread(own, value)}",
                    **(shared | {"line": {"color": colour, "width": 1}}),
                )
        else:
            mean = frame.set_index("step")[value]
            bounds = _bounds(frame, value)
            low, high = (mean, mean) if bounds is None else (bounds[:, 0], bounds[:, 1])
            band = "95%"
        low, high = np.asarray(low, float), np.asarray(high, float)
        figure.add_scatter(
            x=[*mean.index, *mean.index[::-1]],
            y=[*high, *low[::-1]],
            fill="toself",
            fillcolor=colour,
            opacity=0.15,
            mode="none",
            hoverinfo="skip",
            showlegend=False,
            legendgroup=name,
        )
        figure.add_scatter(
            x=mean.index,
            y=mean,
            mode="lines+markers",
            name=label,
            customdata=np.stack([low, high], axis=1),
            hovertemplate=f"%{{y:.3f}} ({band}: %{{customdata[0]:.3f}} to %{{customdata[1]:.3f}})",
            **(shared | {"line": {"color": colour, "width": 3}}),
        )
    figure.update_xaxes(title_text="training step", hoverformat="d")
    figure.update_yaxes(
        title_text="held-out accuracy (share of questions)", tickformat=".0%", rangemode="tozero"
    )
    return figure.update_layout(height=420, hovermode="x unified")


def accuracy_table(evaluations: pd.DataFrame) -> str:
    """HTML table of ``Run.evaluations``, one row an evaluation, with 95% intervals."""
    rows = [
        _row(
            [
                f"{row.step:.0f}",
                f"<b>{row.accuracy:.0%}</b> ({row.accuracy_low:.0%} to {row.accuracy_high:.0%})",
                f"{row.eval_finished_share:.0%}",
                f"{row.eval_trace_tokens:.1f}",
                f"{row.eval_questions:.0f}",
            ]
        )
        for row in evaluations.itertuples()
    ]
    header = ["after step", "accuracy (95% interval)", "finished traces", "trace length, tokens", "questions"]
    return _table(header, rows)


# --- estimators: frames of ``estimators``, exact sums as lines, means of random draws as points

_KNOB_TITLES = {
    "distance": "distance between p and q (1: the world's own posterior)",
    "composite_weight": "composite weight w",
}
_DASHES = ("solid", "dash", "dot", "dashdot")
_SYMBOLS = ("circle", "square", "diamond", "x")


def _two_panels(**settings: Any) -> go.Figure:
    figure = make_subplots(cols=2, horizontal_spacing=0.11, **settings)
    return figure.update_layout(template=TEMPLATE, height=400, margin={"t": 70})


def _points(frame: pd.DataFrame, x: str, name: str, colour: str, symbol: str, **settings: Any) -> go.Scatter:
    """Means of draws with bars of two standard errors; nothing where the frame has no draws."""
    drawn = "mean" in frame
    return go.Scatter(
        x=frame[x] if drawn else [],
        y=frame["mean"] if drawn else [],
        error_y={"array": 2 * frame["standard_error"] if drawn else [], "thickness": 1.5, "width": 3},
        mode="markers",
        marker={"color": colour, "symbol": symbol, "size": 7},
        name=name,
        showlegend=False,
        **settings,
    )


def kl_estimators(frame: pd.DataFrame) -> go.Figure:
    """``estimators.kl_sweep``: mean and standard deviation of one sample's KL estimate, in nats.

    Lines are exact, points are means of draws with two standard errors and their standard deviations.
    """
    x, figure = frame["over"].iloc[0], _two_panels()
    one = frame[frame["estimator"] == frame["estimator"].iloc[0]]
    figure.add_scatter(
        x=one[x],
        y=one["exact"],
        mode="lines",
        name="exact KL(p′‖p)",
        line={"color": GREY, "width": 3},
        row=1,
        col=1,
    )
    for k, (name, own) in enumerate(frame.groupby("estimator", sort=False)):
        colour, symbol = (PRIOR, POSTERIOR, PALETTE[3])[k % 3], _SYMBOLS[k % 4]
        # Three estimators of one number: side by side, or their points would hide one another.
        width = own[x].max() - own[x].min() or 1.0
        shifted = own.assign(**{x: own[x] + (k - 1) * width / 120})
        figure.add_trace(_points(shifted, x, name, colour, symbol, legendgroup=name), row=1, col=1)
        figure.add_scatter(
            x=own[x],
            y=own["deviation"],
            mode="lines",
            line={"color": colour, "dash": _DASHES[k % 4]},
            name=name,
            legendgroup=name,
            row=1,
            col=2,
        )
        if "sample_deviation" in own:
            figure.add_scatter(
                x=own[x],
                y=own["sample_deviation"],
                mode="markers",
                marker={"color": colour, "symbol": symbol, "size": 7},
                name=f"{name}, draws",
                legendgroup=name,
                showlegend=False,
                row=1,
                col=2,
            )
    figure.update_xaxes(title_text=_KNOB_TITLES[x])
    figure.update_yaxes(title_text="mean estimate (nats)", rangemode="tozero", col=1)
    figure.update_yaxes(title_text="standard deviation of one sample (nats)", rangemode="tozero", col=2)
    return figure.update_traces(hovertemplate="%{x:.2f}: %{y:.4f} nats")


def gradient_quality(frame: pd.DataFrame) -> go.Figure:
    """``estimators.gradient_quality``: bias (% of the exact gradient's norm) and noise (multiples of it)."""
    figure = _two_panels(shared_yaxes=True)
    for k, (part, own) in enumerate(frame.groupby("part", sort=False)):
        for column, (value, factor, unit) in enumerate((("bias", 100, "%"), ("noise", 1, "×")), 1):
            figure.add_scatter(
                x=factor * own[value],
                y=own["estimator"],
                mode="markers",
                marker={"color": (POSTERIOR, PRIOR)[k % 2], "symbol": _SYMBOLS[k % 4], "size": 10},
                name=f"{part} ",
                legendgroup=part,
                showlegend=column == 1,
                cliponaxis=False,
                hovertemplate=f"%{{y}}: %{{x:.3g}} {unit}",
                row=1,
                col=column,
            )
    figure.update_yaxes(
        autorange="reversed",
        categoryorder="array",
        categoryarray=list(frame["estimator"]),
        type="category",
        ticklabelstandoff=8,
    )
    figure.update_xaxes(title_text="bias (% of the exact gradient)", rangemode="tozero", col=1)
    figure.update_xaxes(title_text="noise of one rollout (× exact gradient)", rangemode="tozero", col=2)
    return figure.update_layout(height=120 + 27 * len(frame))


def ratio_range(frame: pd.DataFrame) -> go.Figure:
    """``estimators.ratio_range``: the ratios p'/h against alpha, and the share of tokens the clip touches."""
    figure, epsilon = _two_panels(), float(frame["clip_range"].iloc[0])
    bounds, world = {"color": GREY, "dash": "dash"}, {"color": PRIOR}
    for k, (column, name, line) in enumerate(
        (
            ("bound_low", "bounds w/α and (1−w)/(1−α)", bounds),
            ("bound_high", "bounds w/α and (1−w)/(1−α)", bounds),
            ("low", "least and largest here", world),
            ("high", "least and largest here", world),
        )
    ):
        figure.add_scatter(
            x=frame["alpha"],
            y=frame[column],
            mode="lines",
            line=line,
            name=name,
            legendgroup=name,
            showlegend=not k % 2,
            hovertemplate="α %{x:.2f}: %{y:.3f}",
            row=1,
            col=1,
        )
    figure.add_hrect(y0=1 - epsilon, y1=1 + epsilon, fillcolor=BOTH, opacity=0.15, line_width=0, row=1, col=1)
    figure.add_scatter(
        x=[None],
        y=[None],
        mode="markers",
        marker={"symbol": "square", "size": 12, "color": BOTH, "opacity": 0.35},
        name=f"inside the clip, 1 ± {epsilon:g}",
        row=1,
        col=1,
    )
    figure.add_scatter(
        x=frame["alpha"],
        y=frame["touched"],
        mode="lines",
        line={"color": POSTERIOR},
        name="touched by the clip",
        hovertemplate="α %{x:.2f}: %{y:.1%}",
        row=1,
        col=2,
    )
    points = _points(frame, "alpha", "draws", POSTERIOR, "circle", hovertemplate="α %{x:.2f}: %{y:.1%}")
    figure.add_trace(points, row=1, col=2)
    figure.update_xaxes(title_text="α, share of traces drawn from the prior", range=[0, 1])
    ticks = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100]
    figure.update_yaxes(
        title_text="ratio p′/h (no unit, log scale)",
        type="log",
        tickvals=ticks,
        ticktext=[f"{t:g}" for t in ticks],
        col=1,
    )
    figure.update_yaxes(title_text="share of sampled tokens", tickformat=".0%", rangemode="tozero", col=2)
    return figure


def responsibility(frame: pd.DataFrame) -> go.Figure:
    """``estimators.responsibilities``: mean rho of prior and posterior traces against the distance."""
    figure = go.Figure(layout={"template": TEMPLATE, "height": 400})
    weight = float(frame["composite_weight"].iloc[0])
    hover = "distance %{x:.2f}: ρ = %{y:.3f}"
    for k, (source, own) in enumerate(frame.groupby("source", sort=False)):
        colour = SOURCE_COLOURS[source]
        figure.add_scatter(
            x=own["distance"],
            y=own["expected"],
            mode="lines",
            line={"color": colour, "dash": _DASHES[k]},
            name=f"{source} traces",
            hovertemplate=hover,
        )
        figure.add_trace(_points(own, "distance", source, colour, _SYMBOLS[k], hovertemplate=hover))
    figure.add_scatter(
        x=[frame["distance"].min(), frame["distance"].max()],
        y=[weight, weight],
        mode="lines",
        line={"color": GREY, "dash": "dot"},
        name=f"w = {weight:g}, the mean under p′",
        hoverinfo="skip",
    )
    figure.update_xaxes(title_text=_KNOB_TITLES["distance"])
    return figure.update_yaxes(title_text="ρ, share of the gradient reaching the prior", range=[0, 1])
