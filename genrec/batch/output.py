"""The folder that a job writes: one writer at a time, shards committed one by one, verified as a whole.

    DIR/
      part-00000.parquet ...         one row per user and rank
      _index/part-00000.parquet ...  one row per user, with the place in the input and the hash of the row
      errors/part-00000.parquet ...  rows of the input that cannot be answered; only where a shard has some
      job.json                       what the job is; written first
      manifest.jsonl                 one line per committed shard, in order of commitment
      _SUCCESS                       counts and digests; written last
      .lock .owner                   held by the process that writes, and who that is

A shard is committed by its line in the manifest, which is written once its files are whole and flushed. Whatever stands
in the folder without a line is of a run that was killed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import re
import socket
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import polars as pl

from genrec import files, progress
from genrec.errors import ConfigError, StorageError

Kind = Literal["part", "index", "errors"]

FOLDERS: dict[str, str] = {"part": "", "index": "_index/", "errors": "errors/"}
LOCKS = (".lock", ".owner")
COUNTS = ("users", "rows", "bad", "carried", "fewer")  # What a record counts, and an output sums.
SHARD_FILE = re.compile(r"part-\d{5,}\.parquet")
TEMPORARY = re.compile(r"\..+\.\d+\.tmp")  # As files.new_file names them.


def shard_file(shard: int, kind: Kind = "part") -> str:
    """The name of a shard's file, relative to the output folder."""
    return f"{FOLDERS[kind]}part-{shard:05d}.parquet"


@dataclass(frozen=True)
class Record:
    """One line of the manifest: a committed shard.

    Attributes:
        shard: Its number, from 0.
        files: Name relative to the output folder -> SHA-256 (hex) of the file's bytes.
        users: Users with a row in the shard's index.
        rows: Rows of all their lists.
        bad: Rows in errors/.
        carried: Users whose lists were carried over from an earlier output.
        fewer: Users with a list that is shorter than asked for.
    """

    shard: int
    files: dict[str, str]
    users: int
    rows: int
    bad: int
    carried: int
    fewer: int

    @property
    def line(self) -> bytes:
        """The very bytes that the manifest holds of it."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True).encode() + b"\n"


@dataclass(frozen=True)
class Verified:
    """What a finished output holds: sums over its shards' records, and its content digest (see ``digest``)."""

    shards: int
    users: int
    rows: int
    bad: int
    carried: int
    fewer: int
    digest: str


def write_shard(
    folder: Path,
    shard: int,
    lists: pl.DataFrame,
    index: pl.DataFrame,
    errors: pl.DataFrame,
    metadata: Mapping[str, str],
    carried: int = 0,
) -> Record:
    """Write the files of a shard, each whole or not at all; ``Output.commit`` of the record makes them count.

    Needs no lock: whoever has the folder mounted may write a shard. The same tables give the same bytes.

    Args:
        folder: The output folder.
        shard: The shard's number, from 0.
        lists, index, errors: What goes into part-, _index/ and errors/; without a bad row there is no file in errors/.
        metadata: Key-value metadata of every file.
        carried: Users whose lists were carried over.

    Raises:
        StorageError: The operating system refused.
    """
    digests = {}
    tables: tuple[tuple[Kind, pl.DataFrame], ...] = (("part", lists), ("index", index), ("errors", errors))
    for kind, frame in tables:
        if kind == "errors" and not len(frame):
            continue
        # Made in memory, so that the digest is of the bytes that were meant, not of what a disk made of them.
        buffer = io.BytesIO()
        frame.rechunk().write_parquet(buffer, metadata=dict(metadata), row_group_size=max(1, len(frame)))
        data = buffer.getvalue()
        name = shard_file(shard, kind)
        _write(folder / name, data)
        digests[name] = hashlib.sha256(data).hexdigest()
    fewer = len(index) - index["reason"].null_count()
    return Record(shard, digests, len(index), len(lists), len(errors), carried, fewer)


def read(folder: Path, record: Record, kind: Kind = "part", columns: Sequence[str] | None = None) -> pl.DataFrame:
    """One table of a committed shard, checked by its digest.

    Raises:
        StorageError: The file is gone, was changed, or the shard has none of this kind.
    """
    name = shard_file(record.shard, kind)
    path = Path(folder) / name
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}. See what else: genrec verify {folder}") from error
    if hashlib.sha256(data).hexdigest() != record.files.get(name):
        raise StorageError(f"{path} was changed since it was written. See what else: genrec verify {folder}")
    return pl.read_parquet(io.BytesIO(data), columns=None if columns is None else list(columns))


class Output:
    """An output folder that this process alone writes to. Made by ``open_output``.

    Attributes:
        folder: The output folder.
        done: Shard -> record of every committed shard.
        finished: Whether _SUCCESS is there.
    """

    def __init__(self, folder: Path, shards: int, done: dict[int, Record], finished: bool) -> None:
        self.folder = folder
        self.shards = shards
        self.done = done
        self.finished = finished

    def commit(self, record: Record) -> None:
        """Append a shard's line to the manifest and flush it.

        Raises:
            StorageError: The operating system refused. Open the output anew then: a part of the line may be there.
        """
        if record.shard in self.done or not 0 <= record.shard < self.shards:
            raise ValueError(f"shard {record.shard} of {self.shards} is committed already, or is none")
        path = self.folder / "manifest.jsonl"
        try:
            with open(path, "ab") as file:
                file.write(record.line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise StorageError(
                f"cannot write {path}: {error.strerror or error}. The shards before stay; free some space or see to "
                "the disk, and run the same command again."
            ) from error
        self.done[record.shard] = record

    def finish(self) -> Verified:
        """Write _SUCCESS, once every file is what its line of the manifest says; where it is there already, leave it.

        Raises:
            StorageError: A shard is missing, a file was changed since its shard was committed (by a worker whose own
                job was killed, say), or the operating system refused.
        """
        missing = [shard for shard in range(self.shards) if shard not in self.done]
        if missing:
            raise StorageError(
                f"{self.folder}: {_some(missing)} of {self.shards} shards missing. Run the same command again."
            )
        records = [self.done[shard] for shard in range(self.shards)]
        if not self.finished:
            _sweep(self.folder, self.done)
            if problems := _all_faults(self.folder, records):
                raise StorageError(
                    f"{self.folder}: {' '.join(problems[:5])} Something else wrote there, such as a worker that "
                    f"outlived its job. See that none runs any more, and run the same command again: what is changed "
                    "is made anew."
                )
            _write(self.folder / "_SUCCESS", _seal(self.folder, records))
            self.finished = True
        return _verified(records)


@contextmanager
def open_output(folder: Path, job: Mapping[str, Any], shards: int) -> Iterator[Output]:
    """Take the output folder of a job: a new one, or one that the same job left, whole or half done.

    A line of the manifest whose files are gone or changed is dropped, said on standard error, and its shard counts as
    not done. A finished output is taken as it is; ``verify`` looks into it.

    Args:
        folder: The output folder; made where it is missing.
        job: What the job is, JSON values: whatever decides the bytes that come out.
        shards: How many there are.

    Raises:
        ConfigError: The folder holds another job; every key that differs is named with both values.
        StorageError: Another process writes there, the folder holds something else, or the operating system refused.
    """
    folder = Path(folder)
    note = folder / "job.json"
    if folder.exists() and not folder.is_dir():
        raise StorageError(f"{folder} is a file. Name another --out.")
    if not note.exists() and folder.is_dir():
        foreign = sorted(e.name for e in folder.iterdir() if e.name not in LOCKS and not TEMPORARY.fullmatch(e.name))
        if foreign and not note.exists():  # Another process may have begun this very moment.
            raise StorageError(f"{folder} is not empty ({_some(foreign)}) and holds no batch job. Name another --out.")
    with _locked(folder):
        _claim(note, job)
        if (folder / "_SUCCESS").exists():
            yield Output(folder, shards, {record.shard: record for record in finished(folder)}, finished=True)
            return
        done = _committed(folder, shards)
        # Written anew: without torn lines, and flushed, even where the run before was refused just that.
        _write(folder / "manifest.jsonl", b"".join(record.line for record in done.values()))
        _sweep(folder, done)
        yield Output(folder, shards, done, finished=False)


def finished(folder: Path) -> list[Record]:
    """The records of a finished output, in shard order. job.json, manifest and _SUCCESS are checked, shards are not.

    Raises:
        StorageError: It is not finished, or one of the three was changed or is missing.
    """
    folder = Path(folder)
    records, problems = _control(folder)
    if problems:
        raise _broken(folder, problems)
    return records


def digest(folder: Path) -> str:
    """SHA-256 (hex) over the digests of a finished output's shards, in shard order: its content, however it was made.

    Raises:
        StorageError: As ``finished``.
    """
    return _content(finished(folder))


def verify(folder: Path) -> Verified:
    """Check every byte of a finished output against its manifest, and the manifest against _SUCCESS.

    Raises:
        StorageError: Lists all that is wrong: a file that is changed, missing or foreign, a changed or torn manifest,
            job.json or _SUCCESS, a job that is not finished.
    """
    folder = Path(folder)
    records, problems = _control(folder)
    known = {"job.json", "manifest.jsonl", "_SUCCESS", *LOCKS}
    known |= {name for record in records for name in record.files}
    problems += _all_faults(folder, records)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name not in known and (path.is_symlink() or not path.is_dir()):
            problems.append(f"{name} is foreign: no line of the manifest names it. Remove it.")
    if problems:
        raise _broken(folder, problems)
    return _verified(records)


# The lock


def check_free(folder: Path) -> None:
    """Refuse a folder that another process writes to now, before anything costly is done.

    Raises:
        StorageError: Another process writes there.
    """
    if (folder / ".lock").exists():
        with _locked(folder):
            pass


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the system frees it when this process ends, however it ends."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock", timeout=0, thread_local=False)
    owner = folder / ".owner"
    try:
        if not folder.exists():
            folder.mkdir(parents=True, exist_ok=True)
            files.sync_folder(folder.parent)
        lock.acquire()
    except Timeout:
        raise StorageError(
            f"{folder} is being written by {_holder(owner)}. Wait until it has ended, or name another --out."
        ) from None
    except (OSError, NotImplementedError) as error:
        raise StorageError(
            f"cannot lock {folder}: {getattr(error, 'strerror', None) or error}. Choose another place, and run the "
            "same command again."
        ) from error
    try:
        # filelock may truncate its file, so who holds it stands in another.
        who = {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now(UTC).isoformat("T", "seconds")}
        _write(owner, (json.dumps(who) + "\n").encode())
        yield
    finally:
        with suppress(OSError):
            owner.unlink(missing_ok=True)
        lock.release()


def _holder(owner: Path) -> str:
    try:
        who = json.loads(owner.read_text(encoding="utf-8"))
        return f"process {who['pid']} on {who['host']} since {who['since']}"
    except (OSError, ValueError, TypeError, KeyError):
        return "another process"  # It has taken the lock this moment, and not said yet who it is.


# The job


def _claim(note: Path, job: Mapping[str, Any]) -> None:
    """Note in job.json what the job is, or check that it is the one noted there."""
    if not note.exists():
        _write(note, (json.dumps(job, indent=1) + "\n").encode())
    elif changed := changes(note.parent, job):
        done = (note.parent / "_SUCCESS").exists()
        raise ConfigError(
            f"{note.parent} holds another job: {'; '.join(changed)}. Name another --out"
            + (f"; where users alone changed, --previous {note.parent} carries over the others." if done else ".")
        )


def changes(folder: Path, job: Mapping[str, Any], ignore: Collection[str] = ()) -> list[str]:
    """What differs between the job that an output is of and ``job``: "KEY was VALUE, now VALUE", but for some keys.

    Raises:
        StorageError: job.json cannot be read.
    """
    note = folder / "job.json"
    try:
        before = dict(json.loads(note.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise StorageError(
            f"{note} does not say what the job is ({error}). Name another --out, or remove the folder."
        ) from error
    now = json.loads(json.dumps(job))
    return [
        f"{key} was {_value(before, key)}, now {_value(now, key)}"
        for key in dict.fromkeys([*now, *before])
        if key not in ignore and _value(before, key) != _value(now, key)
    ]


def _value(job: Mapping[str, Any], key: str) -> str:
    return repr(job[key]) if key in job else "absent"


# The manifest


def _records(folder: Path) -> tuple[dict[int, Record], list[str]]:
    """Shard -> record of the lines of the manifest that are as they were written, in their order; and what is not."""
    path = folder / "manifest.jsonl"
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return {}, ["manifest.jsonl is missing."]
    except OSError as error:
        return {}, [f"manifest.jsonl cannot be read: {error.strerror}."]
    records: dict[int, Record] = {}
    problems = []
    for number, line in enumerate(data.splitlines(keepends=True), start=1):
        record = _parsed(line)
        if record is None:
            what = "changed" if line.endswith(b"\n") else "torn"
            problems.append(f"manifest.jsonl: line {number} is {what}.")
        elif record.shard in records:
            problems.append(f"manifest.jsonl: line {number} commits shard {record.shard} again.")
        else:
            records[record.shard] = record
    return records, problems


def _parsed(line: bytes) -> Record | None:
    try:
        record = Record(**json.loads(line))
        kinds: tuple[Kind, ...] = ("part", "index", "errors") if record.bad else ("part", "index")
        numbers = all(type(getattr(record, name)) is int for name in ("shard", *COUNTS))
        named = set(record.files) == {shard_file(record.shard, kind) for kind in kinds}
        whole = numbers and named and record.line == line
    except (ValueError, TypeError):
        return None
    return record if whole else None


def _committed(folder: Path, shards: int) -> dict[int, Record]:
    """The records of an unfinished output that hold: their files are there, with the bytes that were meant."""
    if not (folder / "manifest.jsonl").exists():
        return {}
    records, problems = _records(folder)
    for shard, record in list(records.items()):
        faults = _faults(folder, record) if shard < shards else [f"shard {shard} is none of {shards}."]
        if faults:
            del records[shard]
            problems += faults
    for problem in problems:
        progress.say(f"{folder}: {problem} What it tells of is made again.")
    return records


def _faults(folder: Path, record: Record) -> list[str]:
    """What is wrong with the files of a shard."""
    problems = []
    for name, wanted in record.files.items():
        try:
            if files.sha256(folder / name) != wanted:
                problems.append(f"{name} is changed.")
        except FileNotFoundError:
            problems.append(f"{name} is missing.")
        except OSError as error:
            problems.append(f"{name} cannot be read: {error.strerror}.")
    return problems


def _all_faults(folder: Path, records: Sequence[Record]) -> list[str]:
    """What is wrong with the files of shards, every byte of which is read."""
    problems = []
    with progress.bar("verifying", len(records)) as advance:
        for record in records:
            problems += _faults(folder, record)
            advance()
    return problems


def _sweep(folder: Path, done: Mapping[int, Record]) -> None:
    """Remove what a killed run left: temporary files, and shards that no line of the manifest names."""
    known = {name for record in done.values() for name in record.files}
    try:
        for below in FOLDERS.values():
            for path in sorted((folder / below).iterdir()) if (folder / below).is_dir() else ():
                left = SHARD_FILE.fullmatch(path.name) and below + path.name not in known
                if left or TEMPORARY.fullmatch(path.name):
                    path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"cannot remove {error.filename}, left by a killed run: {error.strerror}.") from error


# The seal


def _verified(records: Sequence[Record]) -> Verified:
    """The sums over records in shard order."""
    sums = {name: sum(getattr(record, name) for record in records) for name in COUNTS}
    return Verified(shards=len(records), **sums, digest=_content(records))


def _content(records: Iterable[Record]) -> str:
    """The content digest of records in shard order."""
    return files.text_hash(*(text for record in records for name in sorted(record.files)
                             for text in (name, record.files[name])))  # fmt: skip


def _seal(folder: Path, records: Sequence[Record]) -> bytes:
    """The very bytes of _SUCCESS: what the rest of the folder must be, of records in shard order."""
    job = (folder / "job.json").read_bytes()
    told = {
        **dataclasses.asdict(_verified(records)),
        "records": hashlib.sha256(b"".join([job, *(record.line for record in records)])).hexdigest(),
    }
    return (json.dumps(told, indent=1) + "\n").encode()


def _control(folder: Path) -> tuple[list[Record], list[str]]:
    """The records of the manifest in shard order, and what is wrong with it, job.json and _SUCCESS."""
    if not (folder / "job.json").is_file():
        raise StorageError(f"{folder} holds no batch job: there is no job.json. Name the folder that --out named.")
    found, problems = _records(folder)
    records = [found[shard] for shard in sorted(found)]
    try:
        sealed = (folder / "_SUCCESS").read_bytes()
        meant = _seal(folder, records)
    except FileNotFoundError:
        problems.append(
            f"_SUCCESS is missing: the job is not finished, {len(records)} shards are committed. "
            "Run the same command again, and it goes on."
        )
    except OSError as error:
        problems.append(f"{error.filename} cannot be read: {error.strerror}.")
    else:
        if sealed != meant:
            problems.append("_SUCCESS, job.json and manifest.jsonl do not belong together: one of them is changed.")
    return records, problems


def _broken(folder: Path, problems: Sequence[str]) -> StorageError:
    lines = "\n".join(f"- {problem}" for problem in problems)
    advice = ""
    if (folder / "_SUCCESS").exists():
        advice = (
            f"\nTo make anew what is missing or changed, remove {folder / '_SUCCESS'} and run the same command again; "
            "where job.json is changed, name another --out."
        )
    return StorageError(f"{folder} is not a whole output:\n{lines}{advice}")


def _some(names: Sequence[Any]) -> str:
    return ", ".join(map(str, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _write(path: Path, data: bytes) -> None:
    with files.new_file(path, durable=True) as temporary, open(temporary, "wb") as file:
        file.write(data)
