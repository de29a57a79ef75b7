"""Stars and notes that readers give traces, kept beside the run in ``notes.json``."""

import json
import re
from collections.abc import Mapping, Sequence
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
    path, remedy = run.path / NOTES, "mend it, or move it away: until then stars and notes are not written"
    try:
        found = read_object(path, remedy) if path.exists() else {}
        for key, entry in found.items():
            kinds = {name: type(value) for name, value in entry.items()} if isinstance(entry, dict) else {}
            if not re.fullmatch(r"\d+/\d+", key) or kinds != {"starred": bool, "note": str}:
                raise ConfigError(f"{str(path)!r} cannot be read ({key[:40]!r} has no star and note); {remedy}")
        return found
    except ConfigError as error:
        run.note(NOTES, str(error))
        return {}


def keep(run: Run, notes: Notes, unwritten: Notes, told: Sequence[Mapping[str, Any]]) -> bool:
    """Take what a view tells of its traces (id, starred, note) into ``notes``, and write what has changed.

    run: a ``forgiving`` one, whose damage says why nothing was written; unwritten: what was not before, and is not
    now. What others wrote of other traces stays. Whether something has changed.
    """
    found = {line["id"]: {"starred": bool(line["starred"]), "note": str(line["note"])} for line in told}
    changed = {key: entry for key, entry in found.items() if entry != notes.get(key, EMPTY)}
    if changed:
        notes.update(changed)
        unwritten.update(changed)
        run.damage.pop(NOTES, None)
        try:
            stored = read_notes(Run(run.path)) | unwritten
            stored = {key: stored[key] for key in sorted(stored, key=place) if stored[key] != EMPTY}
            write_whole(run.path / NOTES, json.dumps(stored, indent=1) + "\n")
            unwritten.clear()
        except ConfigError as error:
            run.note(NOTES, str(error))
        except OSError as error:
            where, why = str(run.path / NOTES), error.strerror or str(error)
            run.note(
                NOTES, f"{where!r} cannot be written ({why}); this panel keeps the note and tries with the next one"
            )
    return bool(changed)


def place(key: str) -> tuple[int, ...]:
    """(step, rollout) of a key."""
    return tuple(map(int, key.split("/")))


def noted(frame: pd.DataFrame, notes: Notes) -> pd.DataFrame:
    """Rows of traces with the columns ``starred`` and ``note``."""
    keys = zip(frame["step"], frame["rollout"], strict=True)
    found = [notes.get(f"{step}/{rollout}", EMPTY) for step, rollout in keys] if notes else [EMPTY] * len(frame)
    return frame.assign(**{name: [entry[name] for entry in found] for name in EMPTY})
