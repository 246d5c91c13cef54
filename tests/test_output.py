from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.batch import output
from genrec.batch.output import Record, Verified, digest, finished, open_output, read, verify, write_shard
from genrec.errors import ConfigError, StorageError

JOB = {"adapter_hash": "a1", "k": 2, "where": None, "steps": [{"step": "mmr"}], "rows": 9}
METADATA = {"adapter_hash": "a1", "catalogue_hash": "c1"}


def tables(shard: int, size: int = 3) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Lists, index and errors of a shard; the first row is bad but in shard 0, the last user has one item."""
    rows = list(range(shard * size, (shard + 1) * size))
    bad, good = (rows[:1], rows[1:]) if shard else ([], rows)
    lists = [(f"u{row}", rank, f"i{row + rank}", -0.5 * rank) for row in good for rank in (1, 2)][:-1]
    schema = {"user_id": pl.String, "rank": pl.Int32, "item_id": pl.String, "score": pl.Float32}
    return (
        pl.DataFrame(lists, schema=schema, orient="row").with_columns(source=pl.lit("model")),
        pl.DataFrame(
            {
                "row": good,
                "user_id": [f"u{row}" for row in good],
                "row_hash": [hashlib.blake2b(bytes([row]), digest_size=16).digest() for row in good],
                "items": pl.Series([2] * (len(good) - 1) + [1], dtype=pl.Int32),
                "reason": [None] * (len(good) - 1) + ["no more items are allowed"],
            },
            schema_overrides={"reason": pl.String},
        ),
        pl.DataFrame(
            {"row": bad, "user_id": [f"u{row}" for row in bad], "reason": ["unknown item"] * len(bad)},
            schema={"row": pl.Int64, "user_id": pl.String, "reason": pl.String},
        ),
    )


def run(folder: Path, shards: int = 3, *, job: Mapping[str, Any] = JOB, stop: int | None = None) -> list[int]:
    """Write the shards that are missing, at most ``stop``, and finish; which ones were written."""
    made = []
    with open_output(folder, job, shards) as out:
        for shard in range(shards):
            if shard not in out.done and (stop is None or len(made) < stop):
                out.commit(write_shard(folder, shard, *tables(shard), METADATA, carried=shard))
                made.append(shard)
        if stop is None:
            out.finish()
    return made


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# What comes out


def test_whole_output(tmp_path: Path) -> None:
    out = tmp_path / "a" / "out"
    assert run(out) == [0, 1, 2]
    names = [f"{below}part-0000{shard}.parquet" for below in ("", "_index/", "errors/") for shard in range(3)]
    names.remove("errors/part-00000.parquet")
    assert set(contents(out)) - {".lock"} == {*names, "job.json", "manifest.jsonl", "_SUCCESS"}
    assert json.loads((out / "job.json").read_text()) == JOB
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert [line["shard"] for line in lines] == [0, 1, 2]
    assert all(
        hashlib.sha256((out / name).read_bytes()).hexdigest() == wanted
        for line in lines
        for name, wanted in line["files"].items()
    )
    assert lines[1] == {
        "shard": 1,
        "files": lines[1]["files"],
        "users": 2,
        "rows": 3,
        "bad": 1,
        "carried": 1,
        "fewer": 1,
    }
    assert verify(out) == Verified(shards=3, users=7, rows=11, bad=2, carried=3, fewer=3, digest=digest(out))
    told = json.loads((out / "_SUCCESS").read_text())
    assert told["digest"] == digest(out)
    assert {key: told[key] for key in dataclasses.asdict(verify(out))} == dataclasses.asdict(verify(out))
    assert [record.shard for record in finished(out)] == [0, 1, 2]


def test_tables_come_back_with_their_metadata(tmp_path: Path) -> None:
    run(tmp_path)
    record = finished(tmp_path)[1]
    lists, index, errors = tables(1)
    assert read(tmp_path, record).equals(lists)
    assert read(tmp_path, record, "index", ["user_id", "row_hash"]).equals(index.select("user_id", "row_hash"))
    assert read(tmp_path, record, "errors").equals(errors)
    for below in ("", "_index/", "errors/"):
        found = pl.read_parquet_metadata(tmp_path / f"{below}part-00001.parquet")
        assert {key: found[key] for key in METADATA} == METADATA


def test_shard_without_a_good_row_is_written(tmp_path: Path) -> None:
    lists, index, errors = tables(1)
    with open_output(tmp_path, JOB, 1) as out:
        out.commit(write_shard(tmp_path, 0, lists.clear(), index.clear(), errors, {}))
        out.finish()
    assert verify(tmp_path).users == 0
    assert read(tmp_path, finished(tmp_path)[0]).schema == lists.schema


def test_output_without_shards(tmp_path: Path) -> None:
    run(tmp_path, 0)
    assert verify(tmp_path).shards == 0


@settings(max_examples=25)
@given(cuts=st.lists(st.integers(1, 299), max_size=6, unique=True), columns=st.permutations(["a", "b"]))
def test_same_tables_give_the_same_bytes_however_they_were_put_together(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], columns: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("out")
    whole = pl.DataFrame(
        {"user_id": [f"u{n % 7}" for n in range(300)], "reason": ["x" if n % 5 else None for n in range(300)]}
    )
    places = [0, *sorted(cuts), 300]
    pieces = pl.concat([whole[a:b] for a, b in pairwise(places)], rechunk=False)
    empty = whole.clear()
    first = write_shard(folder, 0, whole, whole, empty, dict.fromkeys(columns, "x"))
    assert write_shard(folder, 0, pieces, pieces, empty, dict.fromkeys(columns, "x")) == first


def test_digest_does_not_depend_on_the_order_of_commitment(tmp_path: Path) -> None:
    run(tmp_path / "a")
    with open_output(tmp_path / "b", JOB, 3) as out:
        for shard in (2, 0, 1):
            out.commit(write_shard(tmp_path / "b", shard, *tables(shard), METADATA, carried=shard))
        out.finish()
    assert verify(tmp_path / "b") == verify(tmp_path / "a")
    run(tmp_path / "c", job={**JOB, "k": 3})
    assert digest(tmp_path / "c") == digest(tmp_path / "a")


def test_digest_tells_another_content(tmp_path: Path) -> None:
    run(tmp_path / "a")
    with open_output(tmp_path / "b", JOB, 3) as out:
        for shard in range(3):
            out.commit(write_shard(tmp_path / "b", shard, *tables(shard + 1), METADATA))
        out.finish()
    assert digest(tmp_path / "b") != digest(tmp_path / "a")


# Going on


@pytest.mark.parametrize("stop", [0, 1, 2, 3])
def test_stopped_job_goes_on_with_what_is_missing(tmp_path: Path, stop: int) -> None:
    run(tmp_path / "whole")
    assert run(tmp_path / "out", stop=stop) == list(range(stop))
    with pytest.raises(
        StorageError, match=f"the job is not finished, {stop} shards are committed. Run the same command"
    ):
        verify(tmp_path / "out")
    assert run(tmp_path / "out") == list(range(stop, 3))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_finished_output_is_left_as_it_is(tmp_path: Path) -> None:
    run(tmp_path)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in tmp_path.rglob("*.*") if path.is_file()}
    with open_output(tmp_path, JOB, 3) as out:
        assert (sorted(out.done), out.finished) == ([0, 1, 2], True)
        assert out.finish() == verify(tmp_path)
    after = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in tmp_path.rglob("*.*") if path.is_file()}
    assert after == before


@pytest.mark.parametrize("cut", [1, 40, -1])
def test_torn_last_line_is_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str], cut: int) -> None:
    run(tmp_path / "whole")
    run(tmp_path / "out", stop=2)
    manifest = tmp_path / "out" / "manifest.jsonl"
    first, second = manifest.read_bytes().splitlines(keepends=True)
    manifest.write_bytes(first + second[:cut])
    with pytest.raises(StorageError, match=r"manifest\.jsonl: line 2 is torn"):
        verify(tmp_path / "out")
    assert run(tmp_path / "out") == [1, 2]
    assert "line 2 is torn. What it tells of is made again." in capsys.readouterr().err
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("name", ["part-00001.parquet", "_index/part-00001.parquet", "errors/part-00001.parquet"])
@pytest.mark.parametrize("how", ["missing", "shorter", "changed"])
def test_shard_whose_file_is_not_as_recorded_is_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, how: str
) -> None:
    run(tmp_path / "whole")
    run(tmp_path / "out", stop=2)
    path = tmp_path / "out" / name
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:-1] if how == "shorter" else data[:9] + b"?" + data[10:])
    assert run(tmp_path / "out") == [1, 2]
    assert f"{name} is {'missing' if how == 'missing' else 'changed'}." in capsys.readouterr().err
    assert finished(tmp_path / "out") == finished(tmp_path / "whole")
    assert verify(tmp_path / "out") == verify(tmp_path / "whole")


def test_what_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    run(tmp_path / "out", stop=1)
    write_shard(tmp_path / "out", 1, *tables(2), METADATA)  # Of another version, say, and never committed.
    write_shard(tmp_path / "out", 7, *tables(1), METADATA)
    for name in (".part-00002.parquet.7.tmp", "_index/.part-00002.parquet.7.tmp", "..owner.7.tmp"):
        (tmp_path / "out" / name).write_bytes(b"half")
    assert run(tmp_path / "out") == [1, 2]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_folder_that_a_run_was_killed_in_at_once_is_taken(tmp_path: Path) -> None:
    for name in (".lock", ".owner", ".job.json.7.tmp"):
        (tmp_path / name).write_bytes(b"")
    assert run(tmp_path) == [0, 1, 2]
    assert verify(tmp_path).shards == 3


def test_finished_output_whose_shard_is_broken_is_repaired_without_success(tmp_path: Path) -> None:
    run(tmp_path)
    whole = verify(tmp_path)
    (tmp_path / "part-00002.parquet").write_bytes(b"")
    with pytest.raises(
        StorageError, match=r"part-00002.parquet is changed.\nTo make anew .* remove .*_SUCCESS and run"
    ):
        verify(tmp_path)
    (tmp_path / "_SUCCESS").unlink()
    assert run(tmp_path) == [2]
    assert verify(tmp_path) == whole


def test_damaged_success_is_refused_when_the_job_runs_again(tmp_path: Path) -> None:
    run(tmp_path)
    (tmp_path / "_SUCCESS").write_text("{}")
    with pytest.raises(StorageError, match=r"_SUCCESS, job\.json and manifest\.jsonl do not belong together"):
        run(tmp_path)


@pytest.mark.parametrize(("shards", "told"), [(6, "0, 2, 3, 4, 5"), (7, "0, 2, 3, 4, 5 and 1 more")])
def test_up_to_five_missing_shards_are_named(tmp_path: Path, shards: int, told: str) -> None:
    with open_output(tmp_path, JOB, shards) as out:
        out.commit(write_shard(tmp_path, 1, *tables(1), METADATA))
        with pytest.raises(StorageError, match=f": {told} of {shards} shards missing"):
            out.finish()


def test_commits_and_finishes_out_of_turn(tmp_path: Path) -> None:
    with open_output(tmp_path, JOB, 8) as out:
        record = write_shard(tmp_path, 1, *tables(1), METADATA)
        out.commit(record)
        for wrong in (record, dataclasses.replace(record, shard=8)):
            with pytest.raises(ValueError, match="is committed already, or is none"):
                out.commit(wrong)
        with pytest.raises(StorageError, match=r"0, 2, 3, 4, 5 and 2 more of 8 shards missing. Run the same"):
            out.finish()
    assert not (tmp_path / "_SUCCESS").exists()


@pytest.mark.parametrize("below", ["", "_index/", "errors/"])
def test_shard_that_was_overwritten_after_its_commit_is_not_sealed(tmp_path: Path, below: str) -> None:
    folder, whole = tmp_path / "out", tmp_path / "whole"
    with open_output(folder, JOB, 3) as out:
        for shard in range(3):
            out.commit(write_shard(folder, shard, *tables(shard), METADATA, carried=shard))
        name = f"{below}part-00001.parquet"
        (folder / name).write_bytes(b"of a worker whose job is gone")
        with pytest.raises(
            StorageError, match=rf"{name} is changed\. Something else wrote .* run the same command again"
        ):
            out.finish()
    assert not (folder / "_SUCCESS").exists()
    assert run(folder) == [1]
    run(whole)
    assert verify(folder).digest == verify(whole).digest


def test_finish_gives_the_sums(tmp_path: Path) -> None:
    with open_output(tmp_path, JOB, 1) as out:
        out.commit(write_shard(tmp_path, 0, *tables(0), METADATA))
        assert out.finish() == verify(tmp_path)


# Another job


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 3}, "k was 2, now 3"),
        ({"where": "price < 3"}, "where was None, now 'price < 3'"),
        ({"adapter_hash": "b2", "rows": 10}, "adapter_hash was 'a1', now 'b2'; rows was 9, now 10"),
        ({"steps": []}, r"steps was \[\{'step': 'mmr'\}\], now \[\]"),
        ({"dtype": None}, "dtype was absent, now None"),
    ],
)
@pytest.mark.parametrize("stop", [None, 1])
def test_another_job_is_refused_with_what_changed(
    tmp_path: Path, stop: int | None, change: dict[str, Any], message: str
) -> None:
    run(tmp_path, stop=stop)
    before = contents(tmp_path)
    advice = "; .*--previous" if stop is None else r"\.$"  # Only a finished output can be carried over from.
    with pytest.raises(ConfigError, match=f"holds another job: {message}. Name another --out{advice}"):
        run(tmp_path, job={**JOB, **change})
    assert contents(tmp_path) == before
    with pytest.raises(ConfigError, match="rows was 9, now absent"):
        run(tmp_path, job={key: value for key, value in JOB.items() if key != "rows"})


def test_values_are_compared_as_json(tmp_path: Path) -> None:
    run(tmp_path, stop=1, job={**JOB, "steps": ({"step": "mmr"},)})
    assert run(tmp_path) == [1, 2]


def test_foreign_folder_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"sun")
    with pytest.raises(StorageError, match=r"is not empty \(holiday.jpg\) and holds no batch job. Name another --out"):
        run(tmp_path)
    assert contents(tmp_path) == {"holiday.jpg": b"sun"}
    with pytest.raises(StorageError, match=r"holiday.jpg is a file. Name another --out"):
        run(tmp_path / "holiday.jpg")
    with pytest.raises(StorageError, match=r"holds no batch job: there is no job.json"):
        verify(tmp_path)


def test_unreadable_job_is_refused(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text("[1")
    with pytest.raises(StorageError, match=r"job.json does not say what the job is .*Name another --out, or remove"):
        run(tmp_path)


# One writer

HOLD = """
import sys
from genrec.batch.output import open_output
with open_output(sys.argv[1], {"k": 1}, 1):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_second_writer_is_told_who_holds_the_folder_and_takes_it_over_from_the_dead(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(output.__file__).parents[2])},
    )  # fmt: skip
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        message = rf"is being written by process {process.pid} on {socket.gethostname()} since 20\d\d-.*Wait until"
        with pytest.raises(StorageError, match=message):
            run(tmp_path, job={"k": 1})
        process.kill()
    assert json.loads((tmp_path / ".owner").read_text())["pid"] == process.pid
    assert run(tmp_path, job={"k": 1}) == [0, 1, 2]
    assert verify(tmp_path).shards == 3
    assert not (tmp_path / ".owner").exists()


def test_second_writer_in_the_same_process_is_refused(tmp_path: Path) -> None:
    with open_output(tmp_path, JOB, 3), pytest.raises(StorageError, match=f"by process {os.getpid()} on"):
        run(tmp_path)
    (tmp_path / ".owner").write_text("?")
    with open_output(tmp_path, JOB, 3):
        (tmp_path / ".owner").write_text("?")
        with pytest.raises(StorageError, match="is being written by another process"):
            run(tmp_path)


def test_folder_that_cannot_be_locked_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refusing(path: Any, *arguments: Any, **options: Any) -> int:
        if str(path).endswith(".lock"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refusing)
    with pytest.raises(StorageError, match=r"cannot lock .*: No space left on device. Choose another place"):
        run(tmp_path)


# Verifying


def flips(folder: Path, count: int, seed: int) -> None:
    """Flip one random bit of all bytes of the folder, ``count`` times, each alone; every one is found."""
    drawn = random.Random(seed)
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in output.LOCKS]
    sizes = [path.stat().st_size for path in paths]
    missed = []
    for _ in range(count):
        path = drawn.choices(paths, weights=sizes)[0] if drawn.random() < 0.5 else drawn.choice(paths)
        data = bytearray(path.read_bytes())
        place = drawn.randrange(8 * len(data))
        data[place // 8] ^= 1 << place % 8
        whole = path.read_bytes()
        path.write_bytes(data)
        try:
            verify(folder)
            missed.append((path.name, place))
        except StorageError:
            pass
        path.write_bytes(whole)
    assert missed == []
    verify(folder)


def test_flipped_bits_are_found(tmp_path: Path) -> None:
    run(tmp_path)
    flips(tmp_path, 100, seed=0)


@pytest.mark.slow
def test_a_thousand_flipped_bits_are_found(tmp_path: Path) -> None:
    run(tmp_path)
    flips(tmp_path, 1000, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["job.json", "manifest.jsonl", "_SUCCESS"])
def test_a_flipped_bit_in_any_byte_of_what_says_what_is_there_is_found(tmp_path: Path, name: str) -> None:
    run(tmp_path)
    path, drawn = tmp_path / name, random.Random(2)
    whole = path.read_bytes()
    for place in range(len(whole)):
        data = bytearray(whole)
        data[place] ^= 1 << drawn.randrange(8)
        path.write_bytes(data)
        with pytest.raises(StorageError, match="is not a whole output"):
            verify(tmp_path)
    path.write_bytes(whole)
    verify(tmp_path)


def test_everything_that_is_wrong_is_listed(tmp_path: Path) -> None:
    run(tmp_path)
    (tmp_path / "part-00000.parquet").unlink()
    with open(tmp_path / "_index" / "part-00002.parquet", "ab") as file:
        file.write(b"x")
    (tmp_path / "part-00003.parquet").write_bytes(b"")
    (tmp_path / "errors" / "notes.txt").write_bytes(b"")
    (tmp_path / "_index" / ".lock").write_bytes(b"")
    (tmp_path / "job.json").write_text("{}")
    with pytest.raises(StorageError) as caught:
        verify(tmp_path)
    lines = str(caught.value).splitlines()
    assert [line.removeprefix("- ").split(" ")[:3] for line in lines[1:-1]] == [
        ["_SUCCESS,", "job.json", "and"],
        ["part-00000.parquet", "is", "missing."],
        ["_index/part-00002.parquet", "is", "changed."],
        ["_index/.lock", "is", "foreign:"],
        ["errors/notes.txt", "is", "foreign:"],
        ["part-00003.parquet", "is", "foreign:"],
    ]


def drop_shard(folder: Path) -> None:
    for path in folder.rglob("part-00001.parquet"):
        path.unlink()


def drop_shard_and_line(folder: Path) -> None:
    drop_shard(folder)
    lines = (folder / "manifest.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "manifest.jsonl").write_bytes(lines[0] + lines[2])


def repeat_line(folder: Path) -> None:
    lines = (folder / "manifest.jsonl").read_bytes()
    (folder / "manifest.jsonl").write_bytes(lines + lines.splitlines(keepends=True)[1])


def add_shard(folder: Path) -> None:
    record = write_shard(folder, 3, *tables(3), METADATA)
    with open(folder / "manifest.jsonl", "ab") as file:
        file.write(record.line)


def leave_the_folder(folder: Path) -> None:
    """A line that names a file elsewhere."""
    text = (folder / "manifest.jsonl").read_text().replace('"part-00001.parquet"', '"../part-00001.parquet"')
    (folder / "part-00001.parquet").rename(folder.parent / "part-00001.parquet")
    (folder / "manifest.jsonl").write_text(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_shard, "part-00001.parquet is missing"),
        (drop_shard_and_line, "do not belong together"),
        (repeat_line, "line 4 commits shard 1 again"),
        (add_shard, "do not belong together"),
        (leave_the_folder, "line 2 is changed"),
        (lambda folder: (folder / "manifest.jsonl").unlink(), "manifest.jsonl is missing"),
        (lambda folder: (folder / "_SUCCESS").unlink(), "_SUCCESS is missing: the job is not finished, 3 shards"),
        (lambda folder: (folder / "link").symlink_to(folder), "link is foreign"),
    ],
    ids=["shard", "shard and line", "twice", "more", "elsewhere", "no manifest", "no _SUCCESS", "link"],
)
def test_damage_is_found(tmp_path: Path, damage: Any, message: str) -> None:
    folder = tmp_path / "out"
    run(folder)
    damage(folder)
    with pytest.raises(StorageError, match=message):
        verify(folder)


def test_shard_that_was_changed_is_not_read(tmp_path: Path) -> None:
    run(tmp_path)
    record = finished(tmp_path)[2]
    path = tmp_path / "part-00002.parquet"
    path.write_bytes(path.read_bytes().replace(b"u7", b"u9"))
    with pytest.raises(StorageError, match=r"part-00002.parquet was changed since it was written.*genrec verify"):
        read(tmp_path, record)
    path.unlink()
    with pytest.raises(StorageError, match=r"part-00002.parquet cannot be read: No such file"):
        read(tmp_path, record)


def test_line_of_a_record_is_one_line() -> None:
    record = Record(3, {"part-00003.parquet": "ab"}, 1, 2, 3, 4, 5)
    assert record.line.count(b"\n") == 1
    assert Record(**json.loads(record.line)) == record
