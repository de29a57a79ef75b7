"""Files that are never seen half-written."""

from __future__ import annotations

import os
from pathlib import Path


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
