"""Hostile text through every view, table, export and the HTML of notebooks; what code, files and scorers may do."""

import ast
import json
import re
import shutil
import unicodedata
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from helpers import EXAMPLE_RUN, ROOT, TINY_RUN, assert_one_sentence, hostile_run, made_up_run, make_trainer
from hostile import HOSTILE

from covrl_lab import MixingRatio, TraceExplorer, load_run
from covrl_lab.__main__ import main
from covrl_lab.config import RunConfig
from covrl_lab.runs.folder import step_file, write_parquet
from covrl_lab.runs.sweep import Sweep
from covrl_lab.types import ConfigError
from covrl_lab.views import comparison
from covrl_lab.views.evaluations import EvaluationBrowser
from covrl_lab.views.html import figure_text, visible
from covrl_lab.views.monitor import RunMonitor
from covrl_lab.views.report import page, report
from covrl_lab.views.run_browser import RunBrowser
from covrl_lab.views.side_by_side import TraceComparison

HARMLESS = ["word", "long " * 100, "line\n" * 20, "a\tb", "7", "two words", "x" * 200, "y"]
GROUPS = [HOSTILE[i : i + 8] for i in range(0, len(HOSTILE), 8)]
VOID = set("area base br col embed hr img input link meta source track wbr".split())


class Page(HTMLParser):
    """The elements of a page with their attributes' names, its text, and whether its elements nest."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.text, self.open = set(), [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements |= {(tag, name) for name, _ in attributes} | {(tag, "")}
        for name, value in attributes:
            assert not name.startswith("on")
            if name in ("href", "src", "action", "background", "srcdoc"):
                assert not re.search("bait|script|data:text", value or "", re.I), value
        self.open += [] if tag in VOID else [tag]

    def handle_endtag(self, tag):
        assert tag in VOID or self.open.pop() == tag, tag

    def handle_data(self, data):
        self.text += [] if self.open[-1:] in (["script"], ["style"]) else [data]


def hidden(text):
    """Characters that a reader would not see, or that change how others are read."""
    kept = "\n\t\u200c\u200d"  # joiners between letters of Persian, and in emoji
    odd = {c for c in set(text) if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c not in kept}
    odd |= {
        c for c in set(text) if c in "\u115f\u1160\u3164\uffa0\u2800\u034f\u17b4" or "\U000e0000" <= c < "\U000f0000"
    }
    return [c for c in text if c in odd] if odd else []


def strings(value):
    """Every text in a figure."""
    if isinstance(value, dict):
        return [text for key, v in value.items() if key != "template" for text in strings(v)]
    if isinstance(value, list | tuple | np.ndarray):
        return [text for v in value for text in strings(v)]
    return [value] if isinstance(value, str) else []


def assert_figure_is_text(figure):
    """Plotly obeys some HTML, TeX between dollars, and templates, in any text."""
    for text in strings(figure.to_plotly_json()):
        assert not hidden(text), (text[:80], hidden(text))
        assert not re.search(r"<(?!/?(br|b|i|extra)>)\w", text), text[:300]
        assert text.count("$") < 2, text[:300]
        assert "<b>bold" not in text and "<i>italic" not in text and "<b>" * 9 not in text, text[:300]
    for trace in figure.data:
        for name in ("hovertemplate", "texttemplate"):
            for template in strings([getattr(trace, name, None)]):
                assert not any(word in template for word in ("fullData", "customdata[0]} ", "bait", "pwned")), template


def widgets_below(widget):
    return [widget, *(w for child in getattr(widget, "children", ()) for w in widgets_below(child))]


def text_run(folder, texts):
    """A run folder in which every text of every file is one of the texts."""
    run = hostile_run(folder, texts)
    traces = run.traces()
    traces["example_id"] = [texts[i // 2 % len(texts)] for i in range(len(traces))]
    traces["prediction"] = [texts[i % len(texts)] for i in range(len(traces))]
    traces["right"] = [bool(i % 2) for i in range(len(traces))]
    write_parquet(traces, step_file(folder / "traces", 1))
    lines = []
    for step in (0, 1):
        rows = pd.DataFrame({"example_id": texts, "sample": -1, "finished": True, "trace_tokens": 3})
        for k, name in enumerate(("question", "answer", "trace", "prediction")):
            rows[name] = [*texts[k:], *texts[:k]]
        rows["score"] = [float((i + step) % 2) for i in range(len(texts))]
        write_parquet(rows, step_file(folder / "evaluations", step))
        lines.append({"step": step, "accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.6, "eval_questions": 8})
        lines[-1] |= {"eval_finished_share": 1.0, "eval_trace_tokens": 3.0}
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "seconds": 1.0, "finished_share": 1.0}) + "\n")
    settings = {"model": texts[0], "task": texts[1], "method": texts[2], texts[3]: texts[4], "dataset_split": texts[5]}
    config = {"steps": 1, "alpha": 0.5, "composite_weight": 0.5, "reward": texts[6]} | settings
    (folder / "config.json").write_text(json.dumps(config))
    return load_run(folder)


def everything(folder, texts, monkeypatch):
    """(pages by name, figures, texts that widgets set as text, exports) of a run of these texts."""
    monkeypatch.setattr("covrl_lab.views.report.get_plotlyjs", lambda: "")
    monkeypatch.setattr("covrl_lab.views.explorer._prompter", lambda config: f"no prompts: {texts[0]}")
    name = re.sub(r"[/\0]", "", texts[7])[:60] or "x"
    run = text_run(folder / "runs" / name, texts)
    panels = [TraceExplorer(run), MixingRatio(run), RunMonitor(run.path, every=60), EvaluationBrowser(run)]
    panels += [TraceComparison(run), RunBrowser(folder / "runs")]
    panels[0].prompts.value = True
    pages, figures, plain, exports = {"report": page(run.forgiving())}, [], [], []
    for panel in panels:
        for i in range(len(panel.questions.rows) if hasattr(panel, "questions") else 1):
            if i:
                panel.questions.picked = panel.questions.rows[i]["id"]
            for k, copy in enumerate(panel.static()):
                if isinstance(copy, go.Figure):
                    figures.append(copy)
                else:
                    pages[f"{type(panel).__name__} {i} {k}"] = copy.data
        for widget in widgets_below(panel.widget):
            if type(widget).__name__ == "HTML":
                pages[f"{type(panel).__name__} {id(widget)}"] = widget.value
            for trait in ("rows", "traces"):
                for item in getattr(widget, trait, ()):
                    plain += strings({k: v for k, v in item.items() if k not in ("id", "source")})
    exports += [panels[0].take and make()[1] for make in (lambda f=f: f(panels[0]) for f in _takes())]
    panels[2].close()
    return pages, figures, plain, exports


def _takes():
    from covrl_lab.views.explorer import _TAKEN

    return list(_TAKEN.values())


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """``everything`` of some texts, made once."""
    found = {}

    def get(texts):
        if texts[0] not in found:
            with pytest.MonkeyPatch.context() as monkeypatch:
                found[texts[0]] = everything(tmp_path_factory.mktemp("texts"), (texts + HARMLESS)[:8], monkeypatch)
        return found[texts[0]]

    return get


@pytest.mark.parametrize("texts", GROUPS, ids=lambda texts: ascii(texts[0])[:30])
def test_text_stays_text_in_every_view(texts, seen):
    known = set().union(*(Page(text).elements for text in seen(HARMLESS)[0].values()))
    pages, figures, plain, exports = seen(texts)
    for name, text in pages.items():
        found = Page(text)
        assert found.elements <= known, (name, found.elements - known)
        assert not found.open, (name, found.open)
        assert not hidden("".join(found.text)), (name, set(hidden("".join(found.text))))
    for figure in figures:
        assert_figure_is_text(figure)
    for text in plain:
        assert not hidden(text), (text[:80], hidden(text))
    shown = re.sub(r"\s+", " ", "".join(Page(pages["report"]).text))
    for text in texts:
        said = re.sub(r"\s+", " ", visible(text)).strip()
        assert said in shown, text[:100]
    csv, line, tokens = sorted(exports, key=lambda text: (text.startswith("TraceExplorer("), text.startswith("[")))
    code = ast.parse(line if line.startswith("TraceExplorer(") else tokens).body
    assert len(code) == 1 and all(isinstance(a, ast.Constant | ast.UnaryOp) for a in code[0].value.args)


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text)[:40])
def test_names_of_methods_and_tasks_stay_text_in_comparisons(text):
    table = pd.DataFrame({"task": [text, text], "method": [text, "b"], "iqm": [0.5, 0.6]})
    for column in ("iqm_low", "lowest"):
        table[column] = 0.4
    for column in ("iqm_high", "highest"):
        table[column] = 0.7
    markdown = comparison.to_markdown(table)
    assert not re.search(r"<\w", markdown) and not hidden(markdown) and len(markdown.splitlines()) == 4
    assert_figure_is_text(comparison.plot_intervals(table, "iqm"))
    drawn = figure_text(text)
    assert not re.search(r"<(?!br>)", drawn) and "$" not in drawn and not hidden(drawn)


def test_the_html_of_a_notebook_holds_no_live_text(seen):
    """As nbconvert makes it from what panels leave in an executed notebook."""
    exporter = pytest.importorskip("nbconvert").HTMLExporter()

    def scripts(texts):
        pages, figures, _, _ = seen(texts)
        bundles = [{"text/html": text} for name, text in pages.items() if name != "report"]
        outputs = [nbformat.v4.new_output("display_data", bundle) for bundle in bundles]
        outputs += [nbformat.v4.new_output("display_data", figure._repr_mimebundle_()) for figure in figures[:2]]
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("panels", outputs=outputs)])
        html = exporter.from_notebook_node(notebook)[0]
        body = re.sub(r"<(script|style)\b.*?</\1>", "", html[html.index("<body") :], flags=re.S)
        assert not re.search(r"<[^>]*\son\w+\s*=", body) and not re.search(r"<(img|object|embed|base|link)\b", body)
        return html.count("<script"), html.count("<iframe")

    assert len({scripts(texts) for texts in (HARMLESS, *GROUPS)}) == 1


def test_what_cannot_be_seen_is_shown_by_a_sign():
    assert visible("pay\u200bpal") == "pay⟨U+200B⟩pal" and visible("a\u200db") == "a⟨U+200D⟩b"
    assert visible("\u202eabc") == "⟨U+202E⟩abc" and visible("\u3164\U000e0100") == "⟨U+3164⟩⟨U+E0100⟩"
    for kept in ("می\u200cخواهم", "👩\u200d💻", "❤\ufe0f"):
        assert visible(kept) == kept


# --- what the code may do

DANGEROUS = {
    "pickle",
    "marshal",
    "shelve",
    "dill",
    "cloudpickle",
    "joblib",
    "http",
    "socketserver",
    "ftplib",
    "telnetlib",
}
CALLS = {"eval", "exec", "compile", "__import__", "system", "popen", "read_pickle", "torch.load", "listen", "bind"}


def test_nothing_unpickles_evaluates_or_opens_a_port():
    """What the scorer's own process evaluates is limited there (tests/test_scorer.py); it alone unpickles, from us."""
    for path in sorted((ROOT / "covrl_lab").rglob("*.py")):
        tree, name = ast.parse(path.read_text(encoding="utf-8")), path.relative_to(ROOT / "covrl_lab").as_posix()
        for node in ast.walk(tree):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for module in modules:
                assert module.split(".")[0] not in DANGEROUS or (name, module) == ("train/scorer.py", "pickle"), name
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                last = called.split(".")[-1]
                harmless = called in ("re.compile", "torch.compile") or called.endswith(
                    ".eval"
                )  # a model's mode, a frame's own terms
                assert harmless or not {called, last} & CALLS, (name, called)
                for keyword in node.keywords:
                    value = ast.unparse(keyword.value)
                    assert (keyword.arg, value) not in (("trust_remote_code", "True"), ("shell", "True")), name
                    assert (keyword.arg, value) != ("allow_pickle", "True"), name
        uses = {ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        assert not any(use.startswith("socket.") and use != "socket.gethostname" for use in uses), name


def test_no_secret_of_the_environment_is_in_any_file(tmp_path, monkeypatch):
    secret = "s3cr3t-b7f1"
    for name in ("HF_TOKEN", "WANDB_API_KEY", "MY_PASSWORD"):
        monkeypatch.setenv(name, secret)
    trainer = make_trainer(tmp_path / "run", TINY_RUN, steps=1, device="cpu").run()
    report(trainer.run_dir)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 8 and not any(secret.encode() in path.read_bytes() for path in files)


# --- no path leads out of a run or sweep folder


@pytest.mark.parametrize("name", ["metrics.jsonl", "owner.lock", "config.json", "traces", "checkpoints", "STOP"])
def test_a_link_in_a_run_folder_is_refused_before_anything_is_written(name, tmp_path):
    run, outside = tmp_path / "run", tmp_path / "outside"
    shutil.copytree(EXAMPLE_RUN, outside)
    config = RunConfig(**TINY_RUN, run_dir=str(run))
    run.mkdir()
    config.save(run / "config.json")
    (run / name).unlink(missing_ok=True)
    target = outside / name if (outside / name).exists() else tmp_path / "new"
    (run / name).symlink_to(target)
    before = {path: path.read_bytes() for path in outside.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="is a link") as caught:
        make_trainer(run, TINY_RUN)
    assert_one_sentence(str(caught.value))
    assert before == {path: path.read_bytes() for path in outside.rglob("*") if path.is_file()}
    assert not (tmp_path / "new").exists()


def test_a_link_is_followed_by_no_other_writer(tmp_path, no_model, capsys):
    """--repair, an evaluation of a checkpoint, and the monitor's button; of the last also a link to nothing."""
    run, outside, new = tmp_path / "run", tmp_path / "outside", tmp_path / "new"
    run.mkdir()
    outside.write_text("mine\n")
    RunConfig(**TINY_RUN, run_dir=str(run)).save(run / "config.json")

    def linked(name, target, write):
        (run / name).symlink_to(target)
        write()
        (run / name).unlink()
        assert outside.read_text() == "mine\n" and not new.exists()

    def refused(command, *arguments):
        with pytest.raises(SystemExit) as ended:
            main([command, *arguments])
        assert ended.value.code == 2 and "is a link, and a run stays within its own folder" in capsys.readouterr().err

    monitor = RunMonitor(run, every=60)

    def click():
        monitor.button.click()
        assert "is a link" in monitor.status.value

    linked("owner.lock", outside, lambda: refused("train", "--repair", "--run_dir", str(run)))
    linked("benchmarks.jsonl", outside, lambda: refused("evaluate", str(run)))
    linked("benchmarks", tmp_path, lambda: refused("evaluate", str(run)))
    linked("STOP", new, click)
    monitor.button.click()
    assert (run / "STOP").exists() and "is a link" not in monitor.status.value
    monitor.close()


def test_a_link_in_a_sweep_folder_is_refused(tmp_path):
    sweep = Sweep(tmp_path / "sweep", base=TINY_RUN)
    (run_id,) = sweep.runs
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / run_id).symlink_to(outside)
    with pytest.raises(ConfigError, match="is a link"):
        sweep.submit()
    (tmp_path / "sweep" / run_id).unlink()
    (tmp_path / "sweep" / run_id).mkdir()
    (tmp_path / "sweep" / run_id / "lock").symlink_to(outside / "lock")
    with pytest.raises(ConfigError, match="is a link"):
        sweep.submit()
    assert not list(outside.iterdir())


def test_names_of_files_cannot_lead_out(tmp_path):
    """Steps are read as numbers, and every name is made from one."""
    run = made_up_run(tmp_path / "run", steps=1)
    for name in ("step_../../x.parquet", "step_1e5.parquet", "step_-1.parquet", "step_٣.parquet", "step_x.parquet"):
        (run.path / "traces" / name.replace("/", "\u2215")).write_bytes(b"")
    assert run.steps == [1]
    with pytest.raises(ValueError):
        run.traces("../../x")  # type: ignore[arg-type]


def test_a_report_replaces_a_link_and_leaves_its_target(tmp_path, monkeypatch):
    monkeypatch.setattr("covrl_lab.views.report.get_plotlyjs", lambda: "")
    run, mine = made_up_run(tmp_path / "run"), tmp_path / "mine"
    mine.write_text("mine")
    (run.path / "report.html").symlink_to(mine)
    (run.path / "config.json").write_text('{"method": "covrl", "steps": 2, "alpha": 0.5, "composite_weight": 0.5}')
    assert Path(report(run)).read_text().startswith("<!DOCTYPE") and mine.read_text() == "mine"
