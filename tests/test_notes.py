"""Stars and notes of traces: kept beside the run, shown again, and never lost or overwritten silently."""

import html
import json
import re

import pytest
from helpers import assert_one_sentence, made_up_run
from hostile import HOSTILE

from covrl_lab import TraceExplorer, load_run, report
from covrl_lab.runs import notes as keeping
from covrl_lab.runs.notes import EMPTY, NOTES, noted, read_notes
from covrl_lab.types import ConfigError
from covrl_lab.views.html import visible

NOTE = {"starred": True, "note": "copies the answer"}


@pytest.fixture
def run(tmp_path):
    run = made_up_run(tmp_path / "run")
    settings = {"model": "tiny", "method": "covrl", "steps": 2, "alpha": 0.5, "composite_weight": 0.5}
    (run.path / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    return run


def told(explorer, side, **changes):
    """A reader changes star or note of a shown trace; its key."""
    lines = [dict(line) for line in explorer.view.notes]
    lines[side] |= changes
    explorer.view.notes = lines
    return lines[side]["id"]


def stored(run):
    return json.loads((run.path / NOTES).read_text(encoding="utf-8"))


def test_a_star_and_a_note_are_kept_shown_and_found_again(run):
    explorer = TraceExplorer(run, 2)
    assert explorer.view.notes == [{"id": line["id"]} | EMPTY for line in explorer.view.notes]
    prior, posterior = (f"2/{rollout}" for rollout in explorer.pair()["rollout"])
    assert told(explorer, 0, starred=True) == prior and told(explorer, 1, starred=True, note="a | b") == posterior
    assert stored(run) == {prior: {"starred": True, "note": ""}, posterior: {"starred": True, "note": "a | b"}}
    assert {row["id"]: row["starred"] for row in explorer.rollouts.rows if row["starred"]} == {
        key.split("/")[1]: True for key in (prior, posterior)
    }
    page = explorer.static()[0].data
    assert page.count("★") == 1 + 2 + 2 and "<i>★ a | b</i>" in page  # the column's name, its cells, the traces
    assert told(explorer, 0, starred=False) == prior
    assert stored(run) == {posterior: {"starred": True, "note": "a | b"}}

    again = TraceExplorer(run)
    again.show.value = "starred"
    assert [row["id"] for row in again.questions.rows] == [f"2/{explorer.questions.picked.split('/')[1]}"]
    assert [f"2/{row['id']}" for row in again.rollouts.rows] == [posterior]
    assert [line for line in again.view.notes if line["id"] == posterior] == [
        {"id": posterior, "starred": True, "note": "a | b"}
    ]
    assert again.filtered()["note"].tolist() == ["a | b"]


def test_two_panels_write_one_file(run):
    one, other = TraceExplorer(run, 1), TraceExplorer(run, 2)
    first, second = told(one, 0, note="one"), told(other, 0, note="other")
    assert {key: entry["note"] for key, entry in stored(run).items()} == {first: "one", second: "other"}
    one.refresh()
    one.questions.picked = f"2/{other.questions.picked.split('/')[1]}"
    assert one.view.notes[0]["note"] == "other"


def test_a_folder_that_cannot_be_written_loses_nothing(run, monkeypatch):
    def full(*_):
        raise OSError(30, "Read-only file system")

    explorer = TraceExplorer(run, 1)
    with monkeypatch.context() as patch:
        patch.setattr(keeping, "write_whole", full)
        first = told(explorer, 0, **NOTE)
        sentence = explorer.run.damage[NOTES]
        assert_one_sentence(sentence)
        assert "Read-only file system" in sentence and html.escape(sentence) in explorer.heading.value
        explorer.refresh()  # what is not written stays
        assert explorer.view.notes[0] == {"id": first} | NOTE and not (run.path / NOTES).exists()
    second = told(explorer, 1, **NOTE)
    assert stored(run) == {first: NOTE, second: NOTE}
    assert not explorer.run.damage and "⚠" not in explorer.heading.value


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"1/0": {"starred": 1, "note": ""}}', '{"x": {"starred": true, "note": ""}}', '{"1/0": 2}', "\0"],
)
def test_a_damaged_file_is_named_and_left_alone(run, content):
    (run.path / NOTES).write_text(content)
    with pytest.raises(ConfigError, match="move it away"):
        read_notes(load_run(run.path))
    explorer = TraceExplorer(run, 1)
    assert_one_sentence(explorer.run.damage[NOTES])
    assert "notes.json" in explorer.heading.value and "⚠" in explorer.heading.value
    told(explorer, 0, **NOTE)
    assert (run.path / NOTES).read_text() == content and explorer.view.notes[0]["note"] == NOTE["note"]
    (run.path / NOTES).unlink()
    second = told(explorer, 1, **NOTE)
    assert set(stored(run)) == {explorer.view.notes[0]["id"], second} and "⚠" not in explorer.heading.value


def test_the_report_shows_starred_traces(run, tmp_path):
    text = report(run, tmp_path / "none.html").read_text(encoding="utf-8")
    assert "Starred traces" not in text
    kept = {"2/3": {"starred": True, "note": HOSTILE[0]}, "1/1": {"starred": False, "note": "no star"}}
    kept["9/0"] = {"starred": True, "note": "of a step that is gone"}
    (run.path / NOTES).write_text(json.dumps(kept), encoding="utf-8")
    text = report(run, tmp_path / "some.html").read_text(encoding="utf-8")
    part = text.split("<h2>Starred traces</h2>")[1].split("<h2>")[0]
    row = run.traces(2).query("rollout == 3").iloc[0]
    assert (
        re.search(f"step 2, rollout 3: <code[^>]*>{row['question']}</code>", part) and f"{row['source']} trace" in part
    )
    assert f"answer at {sum(row['answer_logp']):.1f}".replace("-", "−") in part and part.count("word·") >= len(
        row["tokens"]
    )
    assert f"<i>★ {html.escape(visible(HOSTILE[0]))}</i>" in part and "no star" not in part
    assert "step 9, rollout 0: its trace is not stored" in part and "of a step that is gone" in part
    (run.path / NOTES).write_text("{")
    text = report(run, tmp_path / "damaged.html").read_text(encoding="utf-8")
    assert "notes.json" in text and "Starred traces" not in text


def test_rows_get_their_own_notes(run):
    frame = noted(run.traces(), {"1/0": NOTE, "2/1": NOTE | {"starred": False}})
    marked = frame[frame["note"] != ""]
    assert list(zip(marked["step"], marked["rollout"], marked["starred"], strict=True)) == [
        (1, 0, True),
        (2, 1, False),
    ]


def test_after_a_refresh_the_note_beside_the_starred_trace_stays(run):
    """Both panels show the same question; what one of them read before is not written again."""
    one, other = TraceExplorer(run, 1), TraceExplorer(run, 1)
    at, shown = list(one.view.selected), [trace["id"] for trace in one.view.notes]
    second = told(other, 1, note="other")
    one.refresh()
    assert one.view.selected == at and [trace["id"] for trace in one.view.notes] == shown
    first = told(one, 0, starred=True)
    assert stored(run) == {first: {"starred": True, "note": ""}, second: {"starred": False, "note": "other"}}
