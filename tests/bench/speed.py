"""Stored measurements of ``tests.bench.benchmark`` to data frames and figures; no model, no torch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from covrl_lab.config import RunConfig
from covrl_lab.train.plan import DEVICES, GIB, Device, Plan, Tokens, plan, step_seconds
from covrl_lab.train.shapes import shape_of
from covrl_lab.views.style import BOTH, GREY, PALETTE, POSTERIOR, PRIOR, TEMPLATE

FOLDER = Path(__file__).resolve().parents[2] / "notebooks" / "results" / "speed"
LABELS = {
    "covrl": "CoVRL",
    "prior only": "prior only",
    "covrl, own ends": "CoVRL, own ends",
    "prior only, own ends": "prior only, own ends",
    "trl": "TRL GRPOTrainer",
}
PAIRS = (
    ("covrl", "trl"),
    ("prior only", "trl"),
    ("covrl, own ends", "trl"),
    ("covrl", "prior only"),
    ("covrl, own ends", "prior only, own ends"),
)
TARGETS = dict(zip(PAIRS, (0.2, math.nan, 0.2, 1.4, 1.4), strict=True))  # what the project set out to reach
LIMIT_TARGET = 2.5  # times the machine's limit
PHASES = {"sampling": PRIOR, "scoring": BOTH, "update": POSTERIOR}


def load(folder: str | Path = FOLDER) -> dict[str, dict[str, Any]]:
    """The stored parts by name: dictionaries of settings, machine and results."""
    return {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in sorted(Path(folder).glob("*.json"))}


def machine_line(part: dict[str, Any]) -> str:
    """The machine of a part in one line."""
    m = part["machine"]
    versions = ", ".join(f"{name} {m[name]}" for name in ("torch", "transformers", "trl") if name in m)
    return f"{m['gpu'] or m['cpu']}, {m['cores']} cores, {m['threads']} threads; {versions}"


# --- frames


def step_frame(part: dict[str, Any]) -> pd.DataFrame:
    """A row for each repetition and trainer: seconds by phase, tokens, memory in GiB."""
    rows = [
        {"repetition": int(r), "trainer": name, **measured}
        for r, trainers in part["results"].items()
        for name, measured in trainers.items()
    ]
    return pd.DataFrame(rows)


def medians(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a trainer, in the order measured: the median of every column over the repetitions."""
    return frame.drop(columns="repetition").groupby("trainer", sort=False).median()


def ratio_frame(frame: pd.DataFrame, of: str = "seconds") -> pd.DataFrame:
    """Median, lowest and highest ratio of two trainers' seconds within one repetition; one row a pair.

    ``of="cpu_seconds"`` compares processor time, which other processes on the machine disturb less.
    """
    wide = frame.pivot(index="repetition", columns="trainer", values=of)
    rows = []
    for one, other in PAIRS:
        if one in wide and other in wide:
            ratio, name = wide[one] / wide[other], f"{LABELS[one]} / {LABELS[other]}"
            spread = (ratio.median(), ratio.min(), ratio.max(), len(ratio))
            rows.append((name, *spread, TARGETS.get((one, other), math.nan)))
    return pd.DataFrame(rows, columns=["ratio", "median", "lowest", "highest", "repetitions", "target"])


def token_frame(frame: pd.DataFrame) -> pd.DataFrame:
    """Tokens of prompts and of the update a trainer computes, those that are distinct, and plain rows'."""
    middle = medians(frame).assign(
        needed=lambda f: (
            f["update_tokens_needed"].fillna(f["update_tokens"]) if "update_tokens_needed" in f else f["update_tokens"]
        )
    )
    table = middle[["prompt_tokens", "update_tokens", "needed", "update_tokens_as_rows", "generated"]]
    return table.set_axis(["prompts", "update", "distinct", "as plain rows", "generated"], axis=1).astype(int)


def limit_frame(parts: dict[str, dict[str, Any]], trainer: str = "covrl") -> pd.DataFrame:
    """Seconds of one step's phases: measured, in bare matrix products of its own sizes, and at the limit.

    limit: the least that the machine's measured matrix rate and bandwidth allow for arithmetic a step cannot
    do without: every distinct token once forward and once for the gradient of its activations, the head at
    decoded and scored tokens, one reading of weights, keys and values a token step.
    """
    limits = parts["limits"]["results"]["machine limits"]
    config = RunConfig(
        **{"gradient_checkpointing": False, "max_packed_tokens": 4096} | parts["step"]["settings"]["config"]
    )
    step, shape = medians(step_frame(parts["step"])).loc[trainer], shape_of(config.model)
    rows, n, m = (int(step[name]) for name in ("rows", "update_tokens", "prompt_tokens"))
    length = math.ceil(step["generated"] / rows)
    context = round(step["prompt_tokens_as_rows"] / rows)
    tokens = Tokens(rows, length, prompts=m, nodes=n, scored=int(step["scored"]), context=context)
    device = Device("this machine", 0, limits["rate"], limits["bandwidth"], runtime=0, share=1)
    least = step_seconds(config, shape, tokens, device, ideal=True)
    few, some, many = (float(limits["products"][k]) for k in ("32", "512", "2048"))
    head = 4 * step["scored"] * shape.embedding / limits["rate"]
    return pd.DataFrame(
        {
            "measured": [step["sampling"], step["scoring"] + step["update"]],
            "matrix products": [some * m / 512 + length * few * rows / 32, 2 * many * n / 2048 + head],
            "limit": [least["prompts"] + least["decoding"], least["update"]],
        },
        index=["sampling", "scoring and update"],
    )


def limit_ratio(parts: dict[str, dict[str, Any]], trainer: str = "covrl", other: str = "prior only") -> float:
    """One trainer's limit over another's: the ratio of their steps if neither wasted anything."""
    ours, theirs = (float(limit_frame(parts, name)["limit"].sum()) for name in (trainer, other))
    return ours / theirs


def growth_frame(part: dict[str, Any]) -> pd.DataFrame:
    """One row a point: what grows, its value, seconds by phase, and memory in GiB beyond the loaded model."""
    rows = [{"grows": key.split(":")[0], **measured} for key, measured in part["results"].items()]
    return pd.DataFrame(rows).assign(step_gib=lambda f: f["peak_gib"] - f["loaded_gib"])


def memory_frame(part: dict[str, Any]) -> pd.DataFrame:
    """MiB that scoring and its backward allocate; a row for each tree, a column for each vocabulary."""
    frame = pd.DataFrame(part["results"].values())
    return frame.assign(mib=frame["bytes"] / 2**20).pivot(index="packed_tokens", columns="vocabulary", values="mib")


def plan_frame(part: dict[str, Any]) -> pd.DataFrame:
    """Predicted and measured memory in GiB and seconds a step, one row a model."""
    columns = [(kind, unit) for unit in ("gib", "seconds") for kind in ("predicted", "measured")]
    rows = {
        name: {f"{kind}, {unit}": both[kind][unit] for kind, unit in columns} for name, both in part["results"].items()
    }
    return pd.DataFrame(rows).T


def gpu_plans(models: list[str], **settings: Any) -> list[Plan]:
    """The plan of each model on each device of the table, with settings of ``RunConfig``."""
    return [plan(model=model, device=device, **settings) for model in models for device in DEVICES]


pd.set_option("display.max_colwidth", None)  # advice is a whole sentence


def plans_table(plans: list[Plan]) -> pd.DataFrame:
    """One row a plan: memory, time, and what to lower where it does not fit."""
    rows = [
        {
            "model": p.config.model,
            "device": p.device.name,
            "GiB needed": round(p.peak / GIB, 1),
            "GiB there": round(p.device.memory / GIB),
            "rows at once": p.rows,
            "packed tokens": p.config.max_packed_tokens,
            "recomputed": p.config.gradient_checkpointing,
            "minutes a step": round(p.minutes, 2),
            "verdict": "fits" if p.fits else p.advice,
        }
        for p in plans
    ]
    return pd.DataFrame(rows).set_index(["model", "device"])


def card_frame(parts: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """What ``make gpu-check`` found, a row a part; empty where no card was checked."""
    results = parts.get("gpu_check", {"results": {}})["results"]
    rows = [
        {"part": part, "ok": found["ok"], "seconds": found.get("took"), "found": found.get("error") or _found(found)}
        for part, found in results.items()
    ]
    return pd.DataFrame(rows, columns=["part", "ok", "seconds", "found"]).set_index("part")


def _found(found: dict[str, Any]) -> str:
    """The numbers of a part in one line."""
    if "gaps" in found:
        return (
            f"largest gap {max(v for one in found['gaps'].values() for v in one.values()):.1e}, bound {found['bound']}"
        )
    if "table" in found:
        return "; ".join(
            f"{row['weights']}{', recorded' * row['recorded']}, {row['rows']} rows: {row['tokens/s']:.0f} tokens/s, "
            f"{row['kernels']:.0f} kernels a token"
            for row in found["table"]
        )
    return ", ".join(f"{name} {value}" for name, value in found.items() if name not in ("ok", "took", "parts"))


def report(folder: str | Path) -> str:
    """What the stored parts say, as text."""
    parts, lines = load(folder), []
    if "step" in parts:
        frame = step_frame(parts["step"])
        columns = ["seconds", *PHASES, "cpu_seconds", "generated", "peak_gib"]
        lines += [machine_line(parts["step"]), "", medians(frame)[columns].round(2).to_string(), ""]
        for of in ("seconds", "cpu_seconds"):
            lines += [f"ratios of {of}", ratio_frame(frame, of).round(3).to_string(index=False), ""]
        lines += ["tokens a step", token_frame(frame).to_string(), ""]
    if {"step", "limits"} <= set(parts):
        times = limit_frame(parts)
        total = times.sum()
        lines += [times.round(2).to_string()]
        lines += [f"our step takes {total['measured'] / total['limit']:.2f} times the machine's limit"]
        if "prior only" in set(frame["trainer"]):
            lines += [f"at the limit, CoVRL / prior only would be {limit_ratio(parts):.2f}"]
        lines += [""]
    if "memory" in parts:
        lines += ["MiB of scoring, by packed tokens and vocabulary"]
        lines += [memory_frame(parts["memory"]).round(1).to_string(), ""]
    if "growth" in parts:
        columns = ["grows", "value", "seconds", *PHASES, "step_gib", "update_tokens"]
        lines += [growth_frame(parts["growth"])[columns].round(2).to_string(index=False), ""]
    if "plan" in parts:
        lines += ["plan", plan_frame(parts["plan"]).round(2).to_string()]
    if "layout" in parts:
        lines += ["", "posterior traces, by whose demonstrations their prompt shows"]
        lines += [pd.DataFrame(parts["layout"]["results"]).T.round(2).to_string()]
    return "\n".join(lines)


# --- figures

TALL = {"margin": {"t": 84}}  # the title stands above the legend


def _title(text: str) -> dict[str, Any]:
    return {"text": text, "yref": "container", "y": 1, "yanchor": "top", "pad": {"t": 14}}


def ratio_figure(ratios: pd.DataFrame) -> go.Figure:
    """A point a pair of trainers: the median ratio of seconds, a bar from the lowest to the highest."""
    figure = go.Figure(layout={"template": TEMPLATE})
    figure.add_scatter(
        x=ratios["median"],
        y=ratios["ratio"],
        error_x={
            "array": ratios["highest"] - ratios["median"],
            "arrayminus": ratios["median"] - ratios["lowest"],
            "symmetric": False,
        },
        mode="markers+text",
        text=[f"{x:.2f}" for x in ratios["median"]],
        textposition="top center",
        marker={"size": 10, "color": PRIOR},
        name="measured: median, lowest to highest",
    )
    figure.add_scatter(
        x=ratios["target"],
        y=ratios["ratio"],
        mode="markers",
        marker={"symbol": "line-ns-open", "size": 22, "color": POSTERIOR, "line": {"width": 2}},
        name="target",
    )
    figure.update_layout(title=_title("A step's seconds against another's"), **TALL, height=150 + 55 * len(ratios))
    figure.update_xaxes(title="ratio of seconds, within a repetition", rangemode="tozero")
    return figure.update_yaxes(autorange="reversed")


def phase_figure(frame: pd.DataFrame) -> go.Figure:
    """Stacked bars: median seconds of each phase, one bar a trainer; points are whole repetitions."""
    middle = medians(frame)
    names = [LABELS[name] for name in middle.index]
    figure = go.Figure(layout={"template": TEMPLATE, "barmode": "stack"})
    for phase, colour in PHASES.items():
        label = {"scoring": "scoring (forward)", "update": "update (backward, rest)"}.get(phase, phase)
        figure.add_bar(x=middle[phase], y=names, orientation="h", name=label, marker_color=colour)
    figure.add_scatter(
        x=frame["seconds"],
        y=frame["trainer"].map(LABELS),
        mode="markers",
        name="each repetition",
        marker={"symbol": "circle-open", "color": GREY, "size": 7},
    )
    figure.update_layout(title=_title("Where a step's time goes"), **TALL, height=160 + 50 * len(names))
    figure.update_xaxes(title="seconds")
    return figure.update_yaxes(autorange="reversed")


def token_figure(tokens: pd.DataFrame) -> go.Figure:
    """Tokens in the update's forward: computed, distinct, and as rows without padding."""
    figure = go.Figure(layout={"template": TEMPLATE, "barmode": "group"})
    names = [LABELS[name] for name in tokens.index]
    bars = {
        "update": ("computed", PRIOR),
        "distinct": ("distinct (needed)", BOTH),
        "as plain rows": ("if every sequence were a row", GREY),
    }
    for column, (label, colour) in bars.items():
        figure.add_bar(
            x=tokens[column],
            y=names,
            orientation="h",
            name=label,
            marker_color=colour,
            text=tokens[column],
            textposition="outside",
            cliponaxis=False,
        )
    figure.update_layout(title=_title("Tokens in the update's forward pass"), **TALL, height=160 + 75 * len(names))
    figure.update_xaxes(title="tokens a step")
    return figure.update_yaxes(autorange="reversed")


def limit_figure(times: pd.DataFrame) -> go.Figure:
    """Seconds of a step by phase: at the limit, in bare matrix products, and measured."""
    figure = go.Figure(layout={"template": TEMPLATE, "barmode": "stack"})
    labels = {"limit": "limit", "matrix products": "bare matrix products", "measured": "measured"}
    for phase, colour in zip(times.index, (PRIOR, POSTERIOR), strict=True):
        values = [times.loc[phase, column] for column in labels]
        figure.add_bar(
            x=values,
            y=list(labels.values()),
            orientation="h",
            name=phase,
            marker_color=colour,
            text=[f"{v:.2f}" for v in values],
            textposition="inside",
            insidetextanchor="middle",
        )
    target = LIMIT_TARGET * times["limit"].sum()
    figure.add_vline(x=target, line={"dash": "dot", "color": GREY}, annotation_text=f"{LIMIT_TARGET} x limit")
    figure.update_layout(title=_title("A CoVRL step against the machine"), **TALL, height=310)
    figure.update_xaxes(title="seconds", rangemode="tozero")
    return figure.update_yaxes(autorange="reversed")


def growth_figure(growth: pd.DataFrame) -> go.Figure:
    """Seconds by phase above, memory beyond the loaded model below; a column for what grows."""
    names = list(dict.fromkeys(growth["grows"]))
    figure = make_subplots(2, len(names), shared_xaxes=True, vertical_spacing=0.08, horizontal_spacing=0.07)
    for column, name in enumerate(names, 1):
        part = growth[growth["grows"] == name]
        x = part["rows"] if name == "rollouts" else part["value"]
        for phase, colour in PHASES.items():
            figure.add_scatter(
                x=x,
                y=part[phase],
                name=phase,
                legendgroup=phase,
                showlegend=column == 1,
                line={"color": colour},
                row=1,
                col=column,
            )
        figure.add_scatter(
            x=x,
            y=part["step_gib"],
            name="memory",
            legendgroup="memory",
            showlegend=column == 1,
            line={"color": PALETTE[3]},
            row=2,
            col=column,
        )
        figure.update_xaxes(title=name, row=2, col=column)
    figure.update_xaxes(rangemode="tozero")
    figure.update_yaxes(rangemode="tozero")
    figure.update_yaxes(title="seconds a step", row=1, col=1)
    figure.update_yaxes(title="GiB beyond the model", row=2, col=1)
    return figure.update_layout(template=TEMPLATE, title=_title("How a CoVRL step grows"), **TALL, height=520)


def memory_figure(memory: pd.DataFrame) -> go.Figure:
    """MiB that scoring allocates against packed tokens, a line a vocabulary."""
    figure = go.Figure(layout={"template": TEMPLATE})
    for (vocabulary, sizes), dash in zip(memory.items(), ("solid", "dash", "dot"), strict=False):
        figure.add_scatter(
            x=memory.index,
            y=sizes,
            name=f"vocabulary {vocabulary:,}",
            line={"dash": dash},
            mode="lines+markers",
        )
    figure.update_layout(title=_title("Memory of scoring and its backward, weights aside"), **TALL, height=380)
    figure.update_xaxes(title="packed tokens", rangemode="tozero")
    return figure.update_yaxes(title="MiB", rangemode="tozero")


def plan_figure(plans: pd.DataFrame) -> go.Figure:
    """Predicted beside measured: memory on the left, seconds a step on the right."""
    figure = make_subplots(1, 2, horizontal_spacing=0.12)
    for column, (unit, label) in enumerate({"gib": "peak GiB", "seconds": "seconds a step"}.items(), 1):
        for kind, colour in {"predicted": GREY, "measured": PRIOR}.items():
            values = plans[f"{kind}, {unit}"]
            figure.add_bar(
                x=plans.index,
                y=values,
                name=kind,
                legendgroup=kind,
                showlegend=column == 1,
                marker_color=colour,
                text=[f"{v:.2f}" for v in values],
                textposition="outside",
                cliponaxis=False,
                row=1,
                col=column,
            )
        figure.update_yaxes(title=label, rangemode="tozero", row=1, col=column)
    return figure.update_layout(
        template=TEMPLATE,
        barmode="group",
        title=_title("What plan said, and what a step took"),
        **TALL,
        height=380,
    )
