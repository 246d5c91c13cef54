"""The processes of an engine, on the side of whoever started them: found, watched and ended. What they do themselves
when their owner is gone is in ``guard``.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess

import psutil

from genrec.engines.guard import OWNER


class Processes:
    """What one engine has started. One thread at a time starts and ends them; any may ask for them.

    Attributes:
        folder: For their sockets; it goes with them.
        overdue: Whether a start took too long and was ended.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="genrec-engine-", ignore_cleanup_errors=True)
        self.folder, self.overdue = self._folder.name, False
        self._started: list[BaseProcess] = []  # Of multiprocessing, which knows how they ended.
        self.all: list[psutil.Process] = []

    @contextmanager
    def starting(self, limit: float, told: Mapping[str, str]) -> Iterator[None]:
        """Processes started meanwhile know their owner, and find ``told`` in their environment. After ``limit`` seconds
        they are killed, which fails their start."""
        before = set(multiprocessing.active_children())

        def end() -> None:
            self.overdue = True
            for child in set(multiprocessing.active_children()) - before:
                child.kill()

        timer = threading.Timer(limit, end)
        timer.daemon = True
        with _environment({OWNER: f"{os.getpid()} {time.time()}", **told}):
            timer.start()
            try:
                yield
            finally:
                timer.cancel()

    def add(self, started: Iterable[BaseProcess]) -> None:
        """Processes that run now, with what they have started themselves."""
        for process in started:
            self._started.append(process)
            found = psutil.Process(process.pid)
            self.all += [found, *found.children(recursive=True)]

    def dead(self) -> str | None:
        """Which of them ended, and how; None while all run."""
        for process in self._started:
            if (code := process.exitcode) is not None:
                how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
                return f"died: process {process.pid} ended {how}"
        for one in self.all:
            with suppress(psutil.NoSuchProcess):
                if one.is_running() and one.status() != psutil.STATUS_ZOMBIE:
                    continue
            return f"died: its worker process {one.pid} ended"
        return None

    def end(self) -> None:
        """End all, whatever state they are in, and remove their folder."""
        found = set(self.all)
        for one in self.all:
            with suppress(psutil.NoSuchProcess):
                found.update(one.children(recursive=True))
        for one in found:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        for process in self._started:  # By multiprocessing, which would miss the exit code if another waited for it.
            process.join(timeout=10)
        own = {process.pid for process in self._started}
        psutil.wait_procs([one for one in found if one.pid not in own], timeout=10)
        self._started, self.all = [], []
        self._folder.cleanup()


@contextmanager
def _environment(told: Mapping[str, str]) -> Iterator[None]:
    """Variables that processes started meanwhile inherit."""
    before = {name: os.environ.get(name) for name in told}
    os.environ.update(told)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
