"""Files that others read or write at the same time: whole or not at all, and one owner."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from .types import ConfigError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


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


class Owner:
    """Owns a run folder inside ``with``, which may be nested; also against machines that share the folder.

    The lock is the system's, so that it is free when its owner has died. ConfigError, with the owner's process and
    host, where it is held. Where the file system has no locks (or on Windows) nothing is refused.
    """

    NAME = "owner.lock"

    def __init__(self, folder: Path) -> None:
        self.folder, self._depth = folder, 0

    def __enter__(self) -> None:
        if not self._depth:
            self._file = open(self.folder / self.NAME, "a+", encoding="utf-8")
            try:
                if fcntl is not None:
                    fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._file.seek(0)
                owner = self._file.read() or "another process"
                self._file.close()
                raise ConfigError(
                    f"{str(self.folder)!r} is being trained by {owner}; wait for it, or stop it by a file STOP there"
                ) from None
            except OSError:  # a file system without locks
                pass
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
            self._file.flush()
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._file.truncate(0)
            self._file.close()
