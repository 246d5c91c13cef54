"""Jobs that are killed, that meet a failing disk, and that meet one another."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from conftest import Run

import genrec
from genrec.batch import run_batch
from genrec.batch.output import LOCKS, digest, verify
from genrec.errors import EngineError, GenrecError, StorageError
from genrec.recommender import Recommender


def people(users: int, seed: int = 0) -> pl.DataFrame:
    """Users with histories of up to six of the 24 items; every 50th row has an unknown item."""
    rng = np.random.default_rng(seed)
    items = np.array([f"i{item}" for item in range(24)])
    lengths = rng.integers(0, 7, users)
    histories = [items[drawn].tolist() for drawn in np.split(rng.integers(0, 24, lengths.sum()), lengths.cumsum()[:-1])]
    for row in range(20, users, 50):
        histories[row] = ["i0", "gone"]
    return pl.DataFrame({"user_id": [f"user {row}" for row in range(users)], "history": histories})


def contents(folder: Path) -> dict[str, bytes]:
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if name not in LOCKS}


def check_nothing_torn(folder: Path, whole: dict[str, bytes]) -> None:
    """What stands under its final name is what the undisturbed job wrote there; only the manifest may be torn."""
    for name, data in contents(folder).items():
        if name == "manifest.jsonl":
            lines = whole[name].splitlines(keepends=True)
            *before, last = data.splitlines(keepends=True) or [b""]
            assert set(before) <= set(lines)
            assert any(line.startswith(last) for line in lines)
        elif not name.endswith(".tmp"):
            assert data == whole[name], name


def check_nobody_lost(folder: Path, users: pl.DataFrame, k: int) -> None:
    """Every good user stands in the output once, in the order of the input, with ranks 1 to k."""
    good = users.filter(~pl.col("history").list.contains("gone"))["user_id"]
    rows = pl.concat([pl.read_parquet(path) for path in sorted(folder.glob("part-*.parquet"))])
    assert rows["user_id"].equals(good.repeat_by(k).explode())
    assert rows["rank"].to_list() == [*range(1, k + 1)] * len(good)
    bad = pl.concat([pl.read_parquet(path) for path in sorted((folder / "errors").glob("*.parquet"))])
    assert set(bad["user_id"]) == set(users["user_id"]) - set(good)
    assert len(bad) == len(users) - len(good)


# A failing disk


class Refusing:
    """A file that is open for writing, and may refuse: it then has written half."""

    def __init__(self, file: Any, met: Callable[[str], None]) -> None:
        self._file, self._met = file, met

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Refusing:
        return self

    def __exit__(self, *raised: object) -> None:
        self._file.close()

    def write(self, data: Any) -> int:
        try:
            self._met("write")
        except OSError:
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            raise
        return int(self._file.write(data))


@contextmanager
def failing(folder: Path, kind: str, number: int, code: int) -> Iterator[list[str]]:
    """Fail the ``number``-th call (from 1) of a kind that concerns ``folder``; a full disk refuses those after it too.

    The list holds what was called.
    """
    calls: list[str] = []

    def met(what: str) -> None:
        calls.append(what)
        if what == kind and (calls.count(kind) == number or (code == errno.ENOSPC and calls.count(kind) > number)):
            raise OSError(code, os.strerror(code))

    def below(path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and Path(path).is_relative_to(folder)

    real = {name: getattr(os, name) for name in ("open", "fsync", "replace", "mkdir")}
    real_open = io.open

    def opening(path: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        writes = below(path) and set(mode) & set("wax+")
        if writes:
            met("open")
        file = real_open(path, mode, *arguments, **options)
        return Refusing(file, met) if writes else file

    def os_open(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        if below(path) and flags & (os.O_WRONLY | os.O_RDWR):
            met("open")
        return int(real["open"](path, flags, *arguments, **options))

    def fsync(descriptor: Any) -> None:
        met("fsync")
        real["fsync"](descriptor)

    def replace(source: Any, target: Any, **options: Any) -> None:
        if below(target):
            met("replace")
        real["replace"](source, target, **options)

    def mkdir(path: Any, *arguments: Any, **options: Any) -> None:
        if below(path) and not os.path.isdir(path):
            met("mkdir")
        real["mkdir"](path, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        for owner, name, new in (
            ("builtins", "open", opening), ("io", "open", opening), ("os", "open", os_open), ("os", "fsync", fsync),
            ("os", "replace", replace), ("os", "mkdir", mkdir),
        ):  # fmt: skip
            patch.setattr(f"{owner}.{name}", new)
        yield calls


@pytest.fixture(scope="module")
def dummy(workspace: Path) -> Recommender:
    return Recommender.load(workspace / "adapters" / "lora", engine="dummy")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["full", "broken"])
@pytest.mark.parametrize("kind", ["open", "write", "fsync", "replace", "mkdir"])
def test_disk_that_refuses_at_any_moment(dummy: Recommender, tmp_path: Path, kind: str, code: int) -> None:
    users = people(60)

    def job(out: Path) -> None:
        run_batch(dummy, users, out, k=3, shard_size=30, max_bad_share=1.0)

    job(tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    number, refused = 0, True
    while refused:
        number += 1
        out = tmp_path / f"out-{number}"
        refusal = None
        with failing(out, kind, number, code) as calls:
            try:
                job(out)
            except GenrecError as error:
                refusal = error
        refused = calls.count(kind) >= number
        assert isinstance(refusal, StorageError) == refused  # No refusal is passed over in silence.
        if refused:
            assert os.strerror(code) in str(refusal)
            check_nothing_torn(out, whole)
            assert not (out / ".owner").exists()
            job(out)
        assert contents(out) == whole
    assert number > (2 if kind == "mkdir" else 9)


# Jobs that are killed

# Imports what a job needs, once, and starts one in a process of its own for every line that it reads. No more than
# imports may come before the fork: threads do not come along.
JOBS = """
import json
import os
import sys

import peft
from transformers import AutoModelForCausalLM, AutoTokenizer

from genrec import recommender
from genrec.batch import run_batch
from genrec.engines import dummy

for line in sys.stdin:
    pid = os.fork()
    if not pid:
        status = 1
        try:
            arguments, keys = json.loads(line)
            run_batch(*arguments, **keys)
            status = 0
        finally:
            os._exit(status)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


class Jobs:
    """Starts jobs in processes of their own, one after the other."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", JOBS],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(Path(genrec.__file__).parents[1])},
        )  # fmt: skip

    def start(self, *arguments: Path, **keys: Any) -> int:
        """The process of a new job; arguments as ``run_batch`` takes them."""
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps([list(map(str, arguments)), keys]) + "\n")
        self._server.stdin.flush()
        return int(self._told())

    def end(self) -> int:
        """How the job ended: what ``waitpid`` says."""
        return int(self._told())

    def close(self) -> None:
        self._server.communicate(timeout=60)

    def _told(self) -> str:
        assert self._server.stdout is not None
        return self._server.stdout.readline()


@pytest.fixture(scope="module")
def jobs() -> Iterator[Jobs]:
    started = Jobs()
    yield started
    started.close()


def committed(out: Path) -> int:
    try:
        return (out / "manifest.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def wait_for(out: Path, shards: int, pid: int) -> None:
    while committed(out) < shards:
        os.kill(pid, 0)  # Raises where the job has ended by itself.
        time.sleep(0.001)


@pytest.mark.parametrize(
    ("users", "shard_size", "kills", "most"),
    [
        pytest.param(1200, 20, 5, 3, id="5 kills"),
        pytest.param(200_000, 1000, 50, 2, id="50 kills", marks=pytest.mark.slow),
    ],
)
def test_killed_job_loses_and_doubles_nothing(
    workspace: Path, dummy: Recommender, jobs: Jobs, tmp_path: Path, users: int, shard_size: int, kills: int, most: int
) -> None:
    frame, out = people(users), tmp_path / "out"
    frame.write_parquet(tmp_path / "users.parquet")
    keys = {"k": 3, "shard_size": shard_size, "max_bad_share": 1.0}
    began = time.perf_counter()
    done = run_batch(dummy, tmp_path / "users.parquet", tmp_path / "whole", **keys)
    pace = (time.perf_counter() - began) / done.shards
    whole = contents(tmp_path / "whole")
    drawn = random.Random(0)
    job = (workspace / "adapters" / "lora", tmp_path / "users.parquet", out)
    for _ in range(kills):
        # At any moment of the work on a shard, after up to ``most`` shards: the job never gets to its end.
        shards = committed(out) + drawn.randint(0, most)
        pid = jobs.start(*job, engine="dummy", **keys)
        wait_for(out, shards, pid)
        time.sleep(drawn.random() * pace)
        os.kill(pid, 9)
        assert jobs.end() == 9
        check_nothing_torn(out, whole)
    assert not (out / "_SUCCESS").exists()
    jobs.start(*job, engine="dummy", **keys)
    assert jobs.end() == 0
    assert contents(out) == whole
    assert digest(out) == digest(tmp_path / "whole") == done.digest
    assert verify(out).bad == done.bad_rows == len(range(20, users, 50))
    check_nobody_lost(out, frame, 3)


# Two jobs


def test_of_two_jobs_on_one_folder_one_proceeds(
    workspace: Path, dummy: Recommender, jobs: Jobs, tmp_path: Path
) -> None:
    users, out = tmp_path / "users.parquet", tmp_path / "out"
    people(1200).write_parquet(users)
    keys = {"k": 3, "shard_size": 20, "max_bad_share": 1.0}
    pid = jobs.start(workspace / "adapters" / "lora", users, out, engine="dummy", **keys)
    wait_for(out, 1, pid)
    with pytest.raises(StorageError, match=f"is being written by process {pid} on "):
        run_batch(dummy, users, out, **keys)
    assert jobs.end() == 0
    assert verify(out).digest == run_batch(dummy, users, tmp_path / "whole", **keys).digest


# An engine that dies


def test_engine_that_dies_ends_the_job_and_the_next_one_goes_on(
    inside: Path, tmp_path: Path, vllm: list[Any], monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    users, path = people(80), inside / "adapters" / "lora"
    users.write_parquet(tmp_path / "users.parquet")
    run_batch(path, users, tmp_path / "whole", k=3, shard_size=20, engine="vllm")
    search, calls = Recommender.search, [0]

    def dies(self: Recommender, *arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise EngineError("vLLM's worker was killed. Lower max_num_seqs, and run the same command again.")
        return search(self, *arguments, **options)

    monkeypatch.setattr(Recommender, "search", dies)
    command = ("batch", path, "--users", tmp_path / "users.parquet", "--out", tmp_path / "out", "-k", 3,
               "--engine", "vllm", "shard_size=20")  # fmt: skip
    done = run("-q", *command)
    assert (done.code, done.out) == (11, "")
    assert done.err == "error: vLLM's worker was killed. Lower max_num_seqs, and run the same command again.\n"
    assert all(engine.closed for engine in vllm)
    assert len((tmp_path / "out" / "manifest.jsonl").read_text().splitlines()) == 2
    found = run("-q", *command, "vllm.max_num_seqs=4", "--json").json
    assert (found["shards"], found["shards_reused"]) == (4, 2)
    assert [engine.options.max_num_seqs for engine in vllm] == [None, None, 4]
    assert vllm[-1].closed
    lists = [digest(tmp_path / name) for name in ("whole", "out")]
    assert lists[0] == lists[1]
