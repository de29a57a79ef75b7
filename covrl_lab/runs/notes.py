"""Stars and notes that readers give traces, kept beside the run in ``notes.json``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ..files import read_object, write_whole
from ..types import ConfigError
from .folder import Run

NOTES = "notes.json"
EMPTY: dict[str, Any] = {"starred": False, "note": ""}
Notes = dict[str, dict[str, Any]]  # "step/rollout" -> starred (true or false), note (text)


def read_notes(run: Run) -> Notes:
    """The stars and notes of a run; none where the file is damaged, which is the run's damage."""
    try:
        return _read(run.path / NOTES)
    except ConfigError as error:
        run.note(NOTES, str(error))
        return {}


def _read(path: Path) -> Notes:
    if not path.exists():
        return {}
    remedy = "mend it, or move it away: until then stars and notes are not written"
    found = read_object(path, remedy)
    for key, entry in found.items():
        kinds = {name: type(value) for name, value in entry.items()} if isinstance(entry, dict) else {}
        if not re.fullmatch(r"\d+/\d+", key) or kinds != {"starred": bool, "note": str}:
            raise ConfigError(f"{str(path)!r} cannot be read ({key[:40]!r} has no star and note); {remedy}")
    return found


def write_notes(folder: Path, changed: Notes) -> None:
    """Put ``changed`` in place of what a run's file says of the same traces, which others may write as well.

    ConfigError where the file is damaged, and stays as it is, or where the folder cannot be written.
    """
    notes = _read(folder / NOTES) | changed
    kept = {key: notes[key] for key in sorted(notes, key=place) if notes[key] != EMPTY}
    try:
        write_whole(folder / NOTES, json.dumps(kept, indent=1) + "\n")
    except OSError as error:
        why = error.strerror or str(error)
        raise ConfigError(
            f"stars and notes cannot be written to {str(folder / NOTES)!r} ({why}); this panel keeps them and tries "
            "again with the next one"
        ) from error


def keep(run: Run, notes: Notes, unwritten: Notes, told: Sequence[Mapping[str, Any]]) -> bool:
    """Take what a view tells of its traces (id, starred, note) into ``notes``, and write what has changed.

    run: a ``forgiving`` one; unwritten: what could not be written before, and now. Whether something has changed.
    """
    found = {line["id"]: {"starred": bool(line["starred"]), "note": str(line["note"])} for line in told}
    changed = {key: entry for key, entry in found.items() if entry != notes.get(key, EMPTY)}
    if changed:
        notes.update(changed)
        unwritten.update(changed)
        run.damage.pop(NOTES, None)
        try:
            write_notes(run.path, unwritten)
            unwritten.clear()
        except ConfigError as error:
            run.note(NOTES, str(error))
    return bool(changed)


def place(key: str) -> tuple[int, ...]:
    """(step, rollout) of a key."""
    return tuple(map(int, key.split("/")))


def noted(frame: pd.DataFrame, notes: Notes) -> pd.DataFrame:
    """Rows of traces with the columns ``starred`` and ``note``."""
    keys = zip(frame["step"], frame["rollout"], strict=True)
    found = [notes.get(f"{step}/{rollout}", EMPTY) for step, rollout in keys] if notes else [EMPTY] * len(frame)
    return frame.assign(**{name: [entry[name] for entry in found] for name in EMPTY})
