"""Several processes, one a device, that train one run together: its ranks.

``accelerate launch`` (or torchrun) starts them. A rank works on its share of every step, whole questions in order, and
gathers what the others found: batch, log-probabilities and credit are those of the whole step everywhere. The adapter's
gradients are summed over ranks, to the same bits on each. Objects are pickled on their way, never on disk.
"""

import atexit
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from logging import getLogger
from typing import Self

import torch
import torch.distributed as dist

from ..types import ConfigError, NotFinite

TIMEOUT = timedelta(minutes=30)  # that ranks wait for one another, also while rank 0 downloads a model
ERROR = "covrl_lab/error"  # what ended the first rank that did, in the store that all ranks see


class Ranks:
    """This process's place ``rank`` among ``count``; alone, nothing here does or costs anything.

    All ranks call ``gather``, ``map``, ``add_gradients`` and ``first`` in the same order. Each is a ConfigError with
    the other's sentence where another rank has ended.
    """

    _store: dist.Store | None = None  # one a process, as the process group is

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.rank, self.count, self.device = rank, count, "cpu"
        if rank:
            getLogger("covrl_lab").setLevel("ERROR")  # rank 0 says it for all

    @classmethod
    def launched(cls) -> Self:
        """The place that a launcher gave to this process."""
        if "ACCELERATE_USE_CPU" in os.environ and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
            problem = "accelerate launch has started one process only, as it does for CPUs"
            raise ConfigError(
                f"{problem}; add --multi_gpu and leave --cpu out, which starts all of them, also on CPUs"
            )
        names = "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"
        return cls(*(int(os.environ[name]) for name in names[:2])) if {*names} <= {*os.environ} else cls()

    @property
    def here(self) -> int:
        """Ranks on this machine."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.count)) if self.count > 1 else 1

    def start(self, device: str) -> str:
        """Meet the others; returns the device of this rank, from the setting ``device``. Raises ConfigError."""
        if self.count > 1 and device != "cpu" and torch.cuda.is_available():
            if self.here > (gpus := torch.cuda.device_count()):
                raise ConfigError(f"{self.here} processes for {gpus} GPUs; launch one a GPU, or set device='cpu'")
            device = self.device = f"cuda:{os.environ.get('LOCAL_RANK', self.rank)}"
            torch.cuda.set_device(device)
        if self.count > 1 and not dist.is_initialized():
            with self._meeting():
                Ranks._store = next(dist.rendezvous("env://", timeout=TIMEOUT))[0]
                place = {"store": self._store, "rank": self.rank, "world_size": self.count, "timeout": TIMEOUT}
                # Objects go through gloo on GPUs, too: it notices at once when a rank has died.
                dist.init_process_group("gloo" if self.device == "cpu" else "cpu:gloo,cuda:nccl", **place)
            atexit.register(_leave)
        return device

    def share(self, count: int) -> slice:
        """Which of ``count`` things are this rank's: neighbours, as many as any other's or one more; maybe none."""
        return slice(count * self.rank // self.count, count * (self.rank + 1) // self.count)

    def gather(self, mine: list) -> list:
        """The lists of all ranks as one, in order."""
        if self.count == 1:
            return mine
        found: list = [None] * self.count
        with self._meeting():
            dist.all_gather_object(found, [_to(x, "cpu") for x in mine])
        return [_to(x, self.device) for part in found for x in part]

    def map(self, count: int, work: Callable[[slice], Sequence], size: int | None = None) -> list:
        """What ``work(part)`` finds for ``count`` things, a list; a rank does its share, at most ``size`` at once."""
        own = self.share(count)
        starts = range(own.start, own.stop, size or max(1, count))
        return self.gather([x for i in starts for x in work(slice(i, min(i + starts.step, own.stop)))])

    def add_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Replace every gradient by its sum over ranks, in one message; None counts as zeros."""
        if self.count > 1:
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
            with self._meeting():
                dist.all_reduce(flat)
            for p, total in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                p.grad = total.view_as(p)

    def on_first(self, function: Callable, *arguments: object) -> None:
        """Call what writes a file, on rank 0 alone."""
        if not self.rank:
            function(*arguments)

    @contextmanager
    def first(self) -> Iterator[None]:
        """Rank 0 goes before the others, which find what it has downloaded or put in order."""
        if self.rank:
            self.gather([])
        yield
        if not self.rank:
            self.gather([])

    @contextmanager
    def together(self) -> Iterator[None]:
        """What ends this rank inside ends all of them, the others with this one's sentence where they next meet."""
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            if self.count > 1:
                if threading.current_thread() is threading.main_thread():
                    for number in (signal.SIGINT, signal.SIGTERM):  # the launcher's, while rank 0 still saves
                        signal.signal(number, signal.SIG_IGN)
                cause = error.__cause__ if isinstance(error.__cause__, NotFinite) else error
                text = " ".join(str(cause).split()) if isinstance(cause, ConfigError) else repr(cause)[:300]
                said = json.dumps([isinstance(cause, NotFinite), f"rank {self.rank} has ended: {text}"])
                with suppress(Exception):
                    self._store.compare_set(ERROR, "", said)  # only where nothing was said before
                _leave()  # closes its connections, which the others notice
            raise

    @contextmanager
    def _meeting(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            broken, said = False, "another rank was killed, or did not answer in time; run again, it resumes"
            with suppress(Exception):
                if self._store.check([ERROR]):
                    broken, said = json.loads(self._store.get(ERROR))
            raise (NotFinite if broken else ConfigError)(said) from error


ALONE = Ranks()


def _to(x: object, device: str) -> object:
    return x.to(device) if hasattr(x, "to") else x


def _leave() -> None:
    with suppress(Exception):
        if dist.is_initialized():
            dist.destroy_process_group()
