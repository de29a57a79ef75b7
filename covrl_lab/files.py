"""Files that are never seen half-written, and files that may be damaged."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def readable(what: str, remedy: str = "restore it") -> Iterator[None]:
    """Whatever fails inside is a ConfigError: ``what`` cannot be read, why, and the remedy."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # damaged bytes fail in many ways, and each library has kinds of its own
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(f"{what} cannot be read ({reason}); {remedy}") from error


def read_object(path: str | Path, remedy: str = "restore it") -> dict[str, Any]:
    """The object that a JSON file holds. ConfigError, which ends with ``remedy``, where it cannot be read."""
    with readable(repr(str(path)), remedy):
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it holds no object")
        return found


def checksums(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file of a folder."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def check_checksums(folder: Path) -> None:
    """ConfigError where a file is missing or is not what was written; nothing in folders without checksums."""
    if (folder / CHECKSUMS).exists():
        found = checksums(folder)
        for name, expected in read_object(folder / CHECKSUMS).items():
            if found.get(name) != expected:
                problem = f"damaged: its SHA-256 is not the one in {CHECKSUMS}" if name in found else "missing"
                raise ConfigError(f"{str(folder / name)!r} is {problem}; restore it")
