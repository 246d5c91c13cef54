"""``genrec.engines.processes`` with processes that only sleep."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest

from genrec.engines.guard import OWNER
from genrec.engines.processes import Processes

SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture
def sleeper() -> Iterator[BaseProcess]:
    process = SPAWN.Process(target=time.sleep, args=(300,))
    process.start()
    yield process
    process.kill()
    process.join()
    process.close()


def test_they_are_watched_and_ended_and_their_folder_goes(sleeper: BaseProcess) -> None:
    processes = Processes()
    assert Path(processes.folder).is_dir()
    processes.add([sleeper])
    assert [one.pid for one in processes.all] == [sleeper.pid]
    assert processes.dead() is None
    processes.end()
    sleeper.join(10)
    assert sleeper.exitcode == -signal.SIGKILL
    assert not processes.all
    assert not Path(processes.folder).exists()
    processes.end()  # Once more does nothing.


def test_how_one_ended_is_told(sleeper: BaseProcess) -> None:
    processes = Processes()
    processes.add([sleeper])
    sleeper.terminate()
    sleeper.join(10)
    assert processes.dead() == f"died: process {sleeper.pid} ended by SIGTERM"
    processes.end()


def test_a_worker_of_a_process_that_lives_is_watched_too(sleeper: BaseProcess) -> None:
    processes = Processes()
    worker = SPAWN.Process(target=time.sleep, args=(300,))
    worker.start()
    processes.add([sleeper])
    processes.all.append(psutil.Process(worker.pid))
    worker.kill()
    worker.join(10)
    assert processes.dead() == f"died: its worker process {worker.pid} ended"
    worker.close()
    processes.end()


def test_a_start_that_takes_too_long_is_ended_and_nothing_else_is(sleeper: BaseProcess) -> None:
    processes = Processes()
    with processes.starting(0.5, {"GENREC_TEST_TOLD": "yes"}):
        assert os.environ["GENREC_TEST_TOLD"] == "yes"
        assert os.environ[OWNER].split()[0] == str(os.getpid())
        late = SPAWN.Process(target=time.sleep, args=(300,))
        late.start()
        late.join(30)
    assert processes.overdue
    assert late.exitcode == -signal.SIGKILL
    assert sleeper.is_alive()
    assert "GENREC_TEST_TOLD" not in os.environ
    assert OWNER not in os.environ
    late.close()
    processes.end()


def test_a_start_in_time_is_left_alone() -> None:
    processes = Processes()
    with processes.starting(60, {}):
        process = SPAWN.Process(target=time.sleep, args=(0,))
        process.start()
        process.join(30)
    assert process.exitcode == 0
    assert not processes.overdue
    process.close()
    processes.end()
