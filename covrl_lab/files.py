"""Files that others read or write at the same time, or that may be damaged: whole or not at all, and one owner."""

import hashlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from .types import ConfigError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

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
def readable(what: str, remedy: str = "restore it", problem: str = "cannot be read") -> Iterator[None]:
    """Whatever fails inside is a ConfigError: ``what`` has this problem, why, and the remedy."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # damaged bytes fail in many ways, and each library has kinds of its own
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(f"{what} {problem} ({reason}); {remedy}") from error


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
    """ConfigError where a file is missing or is not what was written.

    Folders without checksums pass: older versions wrote none, so nobody can tell that they were deleted.
    """
    if (folder / CHECKSUMS).exists():
        found = checksums(folder)
        for name, expected in read_object(folder / CHECKSUMS).items():
            if found.get(name) != expected:
                problem = f"damaged: its SHA-256 is not the one in {CHECKSUMS}" if name in found else "missing"
                raise ConfigError(f"{str(folder / name)!r} is {problem}; restore it")


def lock(file: IO[Any]) -> bool | None:
    """Try to hold the system's lock on an open file until it is closed; False where others hold it.

    Processes that inherit the file share the lock; it is free when all of them have closed it or died. None where the
    file system has no locks; on Windows always True.
    """
    for _ in range(20):  # a process that only looks holds the lock for an instant
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.05)
        except OSError:
            return None
    return False


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Add a line to a JSON-lines file, in place of a last one that a killed process left unfinished.

    A line that is there already is not added again: the command was killed after it had written, or was repeated.
    """
    line = json.dumps(record).encode() + b"\n"
    with path.open("a+b") as file:
        if lock(file) is False:  # two evaluations may end together
            raise ConfigError(f"{str(path)!r} is held by another process; end that, and run again")
        file.seek(0)
        stored = file.read()
        file.truncate(stored.rfind(b"\n") + 1)
        if b"\n" + line not in b"\n" + stored:
            file.write(line)


def locked(path: Path) -> bool | None:
    """Whether some process holds the lock on a file now; None where nobody can know: no locks, or no file."""
    if fcntl is None:
        return None
    try:
        with open(path, encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False


def written(path: Path) -> float:
    """When a file or folder was last written, 0 where there is none."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def refuse_links(folder: Path) -> None:
    """ConfigError where a run folder, or what a run writes into, is a link: it would write to another place."""
    places = [folder, *(folder / name for name in ("traces", "evaluations", "benchmarks", "checkpoints"))]
    for path in [folder, *(path for place in places for path in place.glob("*"))]:
        if path.is_symlink():
            raise ConfigError(f"{str(path)!r} is a link, and a run stays within its own folder; remove it")


class Owner:
    """Owns a run folder inside ``with``, which may be nested; also against machines that share the folder.

    ConfigError, with the owner's process and host, where another one owns it, and where the folder holds a link. A
    signal that would end the process is a KeyboardInterrupt inside, and ends the process behind it; one that others
    handle is left to them. Where the file system has no locks, a file ``MARK`` stands in, which a killed owner leaves.
    """

    NAME, MARK = "owner.lock", "held.lock"

    def __init__(self, folder: Path) -> None:
        self.folder, self._depth, self._heeded, self._ended, self._marked = folder, 0, [], 0, False

    def _interrupt(self, number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second one would meet what the first began to save
        self._ended = number
        raise KeyboardInterrupt(number)

    def __enter__(self) -> None:
        if not self._depth:
            refuse_links(Path(os.path.realpath(self.folder)))  # the folder itself may be one
            self._file = open(self.folder / self.NAME, "a+", encoding="utf-8")
            free, killed = lock(self._file), ""
            if free is None:
                killed = f"; if it was killed, delete {self.MARK!r} there"
                with suppress(FileExistsError):
                    (self.folder / self.MARK).touch(exist_ok=False)  # one process alone can make it
                    free = self._marked = True
            if not free:
                self._file.seek(0)
                owner = self._file.read() or "another process"
                self._file.close()
                what = "wait for it, or stop it by a file STOP there"
                raise ConfigError(f"{str(self.folder)!r} is being trained by {owner}; {what}{killed}")
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
            self._file.flush()
            if threading.current_thread() is threading.main_thread():
                ends = {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}  # Windows has no SIGHUP
                self._heeded = [number for number in ends if signal.getsignal(number) == signal.SIG_DFL]
                for number in self._heeded:
                    signal.signal(number, self._interrupt)
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._file.truncate(0)
            self._file.close()
            if self._marked:
                (self.folder / self.MARK).unlink(missing_ok=True)
            while self._heeded:
                signal.signal(self._heeded.pop(), signal.SIG_DFL)
            if self._ended:
                os.kill(os.getpid(), self._ended)

    @classmethod
    def held(cls, folder: Path) -> bool | None:
        """Whether the process that owns a run lives; None where nobody can know."""
        return locked(folder / cls.NAME)
