from __future__ import annotations

import errno
import io
import os
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.batch import output
from genrec.batch.output import open_output, write_shard
from genrec.batch.previous import Previous
from genrec.errors import ConfigError, StorageError

JOB = {"k": 2, "adapter_hash": "a", "steps": [], "shard_size": 3, "input": "today", "rows": 5, "previous": None}


def row_hash(row: int) -> bytes:
    return row.to_bytes(8, "big") + (7 * row).to_bytes(8, "little")


def make(folder: Path, shards: list[list[int]], **changes: Any) -> Path:
    """A finished output: row r has r % 3 items, "item r-0", "item r-1"."""
    with open_output(folder, {**JOB, **changes}, len(shards)) as opened:
        for shard, rows in enumerate(shards):
            lists = pl.DataFrame(
                [(f"u{row}", rank + 1, f"item {row}-{rank}", row / 8) for row in rows for rank in range(row % 3)],
                schema={"user_id": pl.String, "rank": pl.Int32, "item_id": pl.String, "score": pl.Float32},
                orient="row",
            )
            index = pl.DataFrame(
                {
                    "row": range(len(rows)),
                    "user_id": [f"u{row}" for row in rows],
                    "row_hash": [row_hash(row) for row in rows],
                    "items": pl.Series([row % 3 for row in rows], dtype=pl.Int32),
                    "reason": pl.Series([None if row % 3 == 2 else f"why {row}" for row in rows], dtype=pl.String),
                },
                schema_overrides={"row_hash": pl.Binary, "row": pl.Int64, "user_id": pl.String},
            )
            opened.commit(write_shard(folder, shard, lists, index, pl.DataFrame(), {}))
        opened.finish()
    return folder


def hashes(rows: list[int]) -> np.ndarray:
    return np.frombuffer(b"".join(row_hash(row) for row in rows), dtype="V16")


def check(previous: Previous, today: list[int], rows: list[int], seen: set[int]) -> None:
    """What is carried over for some rows of today is what ``make`` wrote."""
    places = previous.places[rows]
    assert [place >= 0 for place in places] == [today[row] in seen for row in rows]
    known = np.array(rows, dtype=np.int64)[places >= 0]
    if not len(known):
        return
    found = [today[row] for row in known.tolist()]
    carried = previous.take(known)
    lists, index = carried.lists, carried.index
    assert lists["case"].to_list() == [case for case, row in enumerate(found) for _ in range(row % 3)]
    assert lists["item_id"].to_list() == [f"item {row}-{rank}" for row in found for rank in range(row % 3)]
    assert lists["score"].to_list() == [row / 8 for row in found for _ in range(row % 3)]
    assert index["items"].to_list() == [row % 3 for row in found]
    assert index["reason"].to_list() == [None if row % 3 == 2 else f"why {row}" for row in found]


@settings(max_examples=40)
@given(st.data())
def test_takes_the_lists_of_the_rows_that_are_found(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    shards = data.draw(st.lists(st.lists(st.integers(0, 60), unique=True, max_size=9), min_size=1, max_size=4))
    seen: set[int] = set()
    shards = [[row for row in rows if not (row in seen or seen.add(row))] for rows in shards]
    today = data.draw(st.lists(st.integers(0, 60), min_size=1, max_size=12))  # A row may stand there twice.
    job = {**JOB, "shard_size": data.draw(st.integers(1, 4))}
    previous = Previous(make(tmp_path_factory.mktemp("job") / "out", shards, **job), job, hashes(today))
    if data.draw(st.booleans()):
        previous._jumps = True
    for start in range(0, len(today), job["shard_size"]):
        check(previous, today, list(range(start, min(start + job["shard_size"], len(today)))), seen)
    check(previous, today, data.draw(st.permutations(range(len(today)))), seen)


@pytest.mark.parametrize("order", ["same", "shuffled", "reversed", "with gaps"])
def test_the_earlier_output_is_read_a_few_times_at_most_in_whatever_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    monkeypatch.setattr("genrec.batch.previous._AT_ONCE", 7)
    folder = make(tmp_path / "out", [list(range(shard, shard + 10)) for shard in range(0, 400, 10)], shard_size=10)
    today = list(range(400))
    if order == "shuffled":
        random.Random(0).shuffle(today)
    elif order == "reversed":
        today.reverse()
    elif order == "with gaps":
        today = [row for row in today if row % 7]
    read: list[int] = []
    real = output.read

    def counted(folder: Path, record: output.Record, *arguments: Any) -> pl.DataFrame:
        read.append(record.shard)
        return real(folder, record, *arguments)

    monkeypatch.setattr(output, "read", counted)
    previous = Previous(folder, {**JOB, "shard_size": 10}, hashes(today))
    for start in range(0, len(today), 10):
        check(previous, today, list(range(start, min(start + 10, len(today)))), set(range(400)))
    assert len(read) <= 40 * (1 + 2 * 2)  # The index for all; then part and index, of most shards once.
    assert (previous._sorted is not None) == (order == "shuffled")


def test_no_room_for_sorting_is_an_error_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    previous = Previous(make(tmp_path / "out", [[1, 2]]), JOB, hashes([1, 2]))
    previous._jumps = True

    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "TemporaryFile", Full)
    with pytest.raises(StorageError, match=r"cannot sort the previous output .*No space left.* set TMPDIR"):
        previous.take(np.array([0, 1]))


def test_half_of_a_hash_is_not_enough(tmp_path: Path) -> None:
    other = row_hash(3)[:8] + row_hash(4)[8:]
    previous = Previous(make(tmp_path / "out", [[3, 4]]), JOB, np.frombuffer(other + row_hash(4), dtype="V16"))
    assert previous.places.tolist() == [-1, 1]


def test_output_without_users_has_nothing_to_carry(tmp_path: Path) -> None:
    previous = Previous(make(tmp_path / "out", [[]]), JOB, hashes([1, 2]))
    assert previous.places.tolist() == [-1, -1]


def test_other_input_is_the_same_job(tmp_path: Path) -> None:
    folder = make(tmp_path / "out", [[1]], input="yesterday", rows=9, previous="the day before")
    assert Previous(folder, JOB, hashes([1])).places.tolist() == [0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 3}, "k was 3, now 2"),
        ({"adapter_hash": "b", "steps": [{"step": "mmr"}]}, "adapter_hash was 'b', now 'a'; steps was .*, now \\[\\]"),
        ({"where": "x"}, "where was 'x', now absent"),
    ],
)
def test_another_job_is_refused_with_what_changed(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"out is the output of another job: {message}.* Leave out --previous"):
        Previous(make(tmp_path / "out", [[1]], **changes), JOB, hashes([1]))


def test_unfinished_output_is_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "out", [[1], [2]])
    (folder / "_SUCCESS").unlink()
    with pytest.raises(StorageError, match="not finished"):
        Previous(folder, JOB, hashes([1, 2]))
    with pytest.raises(StorageError):
        Previous(tmp_path / "nix", JOB, hashes([1]))


def test_changed_shard_is_refused_when_it_is_read(tmp_path: Path) -> None:
    folder = make(tmp_path / "out", [[1], [2]])
    part = folder / "part-00001.parquet"
    part.write_bytes(part.read_bytes()[:-1] + b"!")
    previous = Previous(folder, JOB, hashes([1, 2]))
    assert previous.take(np.array([0])).lists.height == 1
    with pytest.raises(StorageError, match=r"part-00001\.parquet was changed"):
        previous.take(np.array([0, 1]))
    index = folder / "_index" / "part-00000.parquet"
    index.write_bytes(index.read_bytes()[:-1] + b"!")
    with pytest.raises(StorageError, match=r"_index/part-00000\.parquet was changed"):
        Previous(folder, JOB, hashes([1, 2]))
