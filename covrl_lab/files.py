"""Files that are never seen half-written, and files that may be damaged."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from .types import ConfigError

CHECKSUMS = "checksums.json"


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Write beside ``path``, then rename: whoever reads it sees the old content or the new.

    Text is UTF-8. Whatever goes wrong (a full disk, Ctrl-C), ``path`` keeps its old content. Processes may
    write the same file at once: the last one wins. Only a killed one leaves something, ``NAME.PID.tmp``.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_object(path: str | Path, remedy: str = "restore it") -> dict[str, Any]:
    """The object that a JSON file holds. ConfigError, which ends with ``remedy``, where it cannot be read."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{str(path)!r} cannot be read ({error}); {remedy}") from error
    return found


def write_checksums(folder: Path) -> None:
    """Write the SHA-256 of every file of a folder to its ``checksums.json``."""
    sums = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")


def check_checksums(folder: Path) -> None:
    """ConfigError where a file is missing or is not what was written; nothing in folders without checksums."""
    if not (folder / CHECKSUMS).exists():
        return
    for name, expected in read_object(folder / CHECKSUMS).items():
        path = folder / name
        if not path.is_file():
            raise ConfigError(f"{str(path)!r} is missing; restore it")
        if _sha256(path) != expected:
            raise ConfigError(f"{str(path)!r} is damaged: its SHA-256 is not the one in {CHECKSUMS}; restore it")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
