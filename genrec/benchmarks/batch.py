"""`genrec bench batch`: what a job costs beside its engine, and the memory of jobs of any size."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from genrec.asking import beams_for
from genrec.batch import run_batch
from genrec.benchmarks import Clock, Report, Row, begin, conditions, figure, interleaved, median, peak
from genrec.config import Dtype
from genrec.errors import GenrecError
from genrec.recommender import Recommender

PARTS = ("throughput", "memory")
_PIECE = 50_000  # Rows that are made at a time.


def batch(
    adapter: Path,
    *,
    parts: Sequence[str] = PARTS,
    users: int = 8192,
    sizes: Sequence[int] = (10_000, 1_000_000),
    k: int = 20,
    shard_size: int = 4096,
    device: str = "cpu",
    dtype: Dtype = "float32",
    threads: int | None = None,
    repeats: int = 5,
    clock: Clock = "wall",
) -> Report:
    """Run jobs over random histories of 1 to 50 items, on a temporary folder.

    ``throughput``: the users per second of the engine alone, whose prompts are ready, and of the whole job: reading,
    checking and hashing the input, prompts, decoding, writing and flushing. ``memory``: the peak of processes that run
    jobs of ``sizes`` users with the engine ``dummy``.

    Args:
        adapter: An adapter folder.
        parts: Of ``PARTS``.
        users: Of the part throughput.
        sizes: Users of each job of the part memory.
        k, shard_size: Of the jobs.
        device, dtype: Where the model runs, and its weights.
        threads: Of PyTorch; unset: as it is.
        repeats: Rounds whose medians are reported.
        clock: ``cpu`` is processor time, on a busy machine.

    Raises:
        ConfigError: An unknown part, or a number that is too small.
        AdapterError: The folder is no adapter.
        GenrecError: A job of the part memory failed.
    """
    begin("batch", parts, PARTS, threads, users=users, repeats=repeats, size=min(sizes, default=1))
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "throughput" in parts:
            loaded = Recommender.load(adapter, device=device, dtype=dtype)
            rows += _throughput(loaded, folder, users, k, shard_size, repeats, clock)
        if "memory" in parts:
            item_ids = Recommender.load(adapter, engine="dummy").item_ids
            rows += _memory(adapter, item_ids, folder, sizes, k, shard_size)
    told = {"adapter": Path(adapter).name, "k": k, "shard_size": shard_size, "clock": clock, "device": device}
    return Report(conditions(**told), rows, name="batch")


def write_users(path: Path, item_ids: Sequence[str], users: int, seed: int = 0) -> None:
    """A Parquet file of users with random histories of 1 to 50 items, made and written in pieces."""
    rng = np.random.default_rng(seed)
    names = pa.array(item_ids, pa.string())
    schema = pa.schema([("user_id", pa.string()), ("history", pa.list_(pa.string()))])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, users, _PIECE):
            size = min(_PIECE, users - start)
            ends = np.concatenate([[0], np.cumsum(rng.integers(1, 51, size))]).astype(np.int32)
            items = names.take(pa.array(rng.integers(0, len(item_ids), ends[-1])))
            user_ids = pa.array([f"u{number}" for number in range(start, start + size)], pa.string())
            writer.write_table(pa.table([user_ids, pa.ListArray.from_arrays(ends, items)], schema=schema))


def _throughput(
    loaded: Recommender, folder: Path, users: int, k: int, shard_size: int, repeats: int, clock: Clock
) -> list[Row]:
    table = folder / "users.parquet"
    write_users(table, loaded.item_ids, users)
    histories = [loaded.indices(history) for history in pq.read_table(table)["history"].to_pylist()]
    prompts = [loaded.tokenization.sequence(loaded.adapter.prompt, history) for history in histories]
    blocked = histories if loaded.exclude_seen else [None] * users
    beams = beams_for(k, None)

    def engine() -> None:
        for start in range(0, users, shard_size):
            chosen = slice(start, start + shard_size)
            loaded.engine.beam_search(prompts[chosen], loaded.trie, beams, None, blocked[chosen])

    def job() -> None:
        with tempfile.TemporaryDirectory(dir=folder) as out:
            run_batch(loaded, table, Path(out) / "recs", k=k, shard_size=shard_size)

    seconds = interleaved({"engine": engine, "job": job}, repeats, clock, patience=300)
    bare, whole = median(seconds["engine"]), median(seconds["job"])
    setting, samples = f"{users:,} users", (seconds["engine"], seconds["job"])
    return [
        figure("throughput", setting, "engine alone", users / bare, "users/s", samples=samples[:1]),
        figure("throughput", setting, "whole job", users / whole, "users/s", samples=samples[1:]),
        figure("throughput", setting, "job / engine", bare / whole, "", least=0.95, samples=samples),
        figure("throughput", setting, "job beside the engine", (whole - bare) / users * 1e6, "µs per user"),
    ]


def _memory(
    adapter: Path, item_ids: Sequence[str], folder: Path, sizes: Sequence[int], k: int, shard_size: int
) -> list[Row]:
    rows, peaks = [], []
    for users in sizes:
        table, out = folder / f"{users}.parquet", folder / f"{users}"
        write_users(table, item_ids, users)
        told = ["--users", table, "--out", out, "-k", k, f"shard_size={shard_size}", "--engine", "dummy", "--json"]
        seconds, memory = _job([str(adapter), *map(str, told)])
        peaks.append(memory)
        rows += [
            figure("memory", f"{users:,} users", "peak memory of the process", memory, "MiB"),
            figure("memory", f"{users:,} users", "whole process, dummy engine", users / seconds, "users/s"),
        ]
    if len(peaks) > 1:
        what = f"peak at {max(sizes):,} / at {min(sizes):,} users"
        ratio = peaks[int(np.argmax(sizes))] / peaks[int(np.argmin(sizes))]
        rows.append(figure("memory", "dummy engine", what, ratio, ""))
    return rows


def _job(arguments: Sequence[str]) -> tuple[float, float]:
    """Run `genrec batch` in a process of its own: seconds, and its peak memory in MiB."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "genrec.cli", "batch", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    with process.stderr as stream:
        told = stream.read().decode(errors="replace")
    _, status, usage = os.wait4(process.pid, 0)  # Not `wait`: of this process alone the usage is told.
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise GenrecError(f"genrec batch {' '.join(arguments)} ended with {process.returncode}:\n{told[-2000:]}")
    return time.perf_counter() - began, peak(usage)
