"""Scoring in a process of its own, so that no answer of a model can hang, crash or harm the run. No torch.

math_verify and some of reasoning-gym's scorers evaluate what they are given, and ``9**9**9**9`` never ends. The
process is one for the whole run; it ends itself when an answer takes too long and is replaced at the next one.
"""

import faulthandler
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any

MEMORY = 4 * 2**30  # bytes of address space
_KEPT_VARIABLES = ("PATH", "PYTHONPATH", "HOME", "LANG", "SYSTEMROOT", "LD_LIBRARY_PATH")  # no keys, no tokens


class Scorer:
    """Asks the process for scores; from any thread. ``cut`` counts the answers at which the process ended.

    That is by time, or by memory; but most scorers take a lack of memory for a wrong answer, which is not counted.
    """

    def __init__(self, seconds: float = 3.0) -> None:
        self.seconds, self.cut = seconds, 0
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._owner = 0

    def __call__(self, scorer: str, prediction: str, entry: dict[str, Any]) -> float:
        """The score, 0..1; 0 where a limit was broken or the scorer failed.

        scorer: "math_verify" or the name of a reasoning-gym data set. entry: the reference ``answer``, and for
        reasoning-gym the whole entry.
        """
        with self._lock:
            if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
                self._process, self._owner = _start(self.seconds), os.getpid()
            try:
                pickle.dump((scorer, prediction, entry), self._process.stdin)
                self._process.stdin.flush()
                said = self._process.stdout.readline()
            except OSError:
                said = b""
            if said:
                return float(said)
            self.cut += 1  # the process has ended itself
            self._process.wait()
            return 0.0


scorer = Scorer()


def _start(seconds: float) -> subprocess.Popen:
    """A new process; it ends with its standard input, and so with this one."""
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    return subprocess.Popen(
        [sys.executable, "-m", "covrl_lab.train.scorer", str(seconds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=kept | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )


@lru_cache
def _function(name: str) -> Callable[[str, dict[str, Any]], float]:
    """The scorer of that name, everything it needs loaded."""
    if name != "math_verify":
        import reasoning_gym

        return reasoning_gym.create_dataset(name, seed=0, size=1).score_answer
    from math_verify import parse, verify

    def compare(prediction: str, entry: dict[str, Any]) -> float:
        # Inside $...$ the whole text has to be the formula, else a number would be fished out of prose. math_verify's
        # own time limits are off: they are signals.
        gold, guess = (parse(f"${text}$", parsing_timeout=None) for text in (entry["answer"], prediction))
        return float(verify(gold, guess, timeout_seconds=None))

    compare("1", {"answer": "1"})  # the first formula builds the parser, which is no answer's fault
    return compare


_FORBIDDEN = ("os.", "shutil.", "subprocess.", "socket.", "ctypes.", "pty.", "ftplib.", "urllib.", "webbrowser.")


def _refuse(event: str, arguments: tuple) -> None:
    """For an audit hook: evaluated text may read Python's own modules, and do nothing else to the machine."""
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if writes or event.startswith(_FORBIDDEN) and event not in ("os.listdir", "os.scandir"):
        raise PermissionError(event)


def _serve(seconds: float) -> None:
    """Answer one request after another; a float a line."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ImportError, ValueError, OSError):  # not on this system: time is still limited
        pass
    scoring = False
    sys.addaudithook(lambda event, arguments: scoring and _refuse(event, arguments))
    answers, sys.stdout = sys.stdout, sys.stderr  # what a scorer prints is no answer
    quiet = open(os.devnull)
    while True:
        try:
            name, prediction, entry = pickle.load(sys.stdin.buffer)  # from the process that started this one
        except EOFError:
            return
        score = _function(name)
        # Seconds of work, so that a busy machine changes no score; else, by a thread, ten times as many of the clock.
        if hasattr(signal, "ITIMER_PROF"):  # not on Windows; the signal ends this process, even where Python hangs
            signal.setitimer(signal.ITIMER_PROF, seconds)
        faulthandler.dump_traceback_later(10 * seconds, exit=True, file=quiet)
        scoring = True
        try:
            value = min(1.0, max(0.0, float(score(prediction, entry))))
        except Exception:  # a scorer that trips over a malformed answer has found a wrong one
            value = 0.0
        scoring = False
        faulthandler.cancel_dump_traceback_later()
        if hasattr(signal, "ITIMER_PROF"):
            signal.setitimer(signal.ITIMER_PROF, 0)
        print(value, file=answers, flush=True)


if __name__ == "__main__":
    _serve(float(sys.argv[1]))
