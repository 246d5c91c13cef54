"""An earlier output of the same job: whose row is the same today has the same list, and is carried over."""

from __future__ import annotations

import io
import tempfile
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from genrec.batch import output
from genrec.errors import ConfigError, StorageError

INPUT = ("input", "rows", "previous")  # The keys of a job that may have changed since; all others decide the lists.

_HELD = 4  # Shards of the earlier output that are kept in memory while shards of today follow one another.
_AT_ONCE = 16  # Shards of the earlier output that are sorted at once, where they must be.

Places = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Carried:
    """Lists that were made before.

    Attributes:
        lists: Rows as in the earlier part files, and ``case``: for which of the rows asked for.
        index: ``items`` and ``reason`` of each row asked for, in that order.
    """

    lists: pl.DataFrame
    index: pl.DataFrame


class Previous:
    """A finished output, for the rows of today's input. Memory: 8 bytes a row, and a few shards.

    Where today's rows stand in another order than before, so that every shard of today would read many of the earlier
    ones, the earlier output is read once and sorted by today's shards in a temporary file, somewhat larger than it is.

    Args:
        folder: The output.
        job: What today's job is; but for its input it must be what the earlier one was.
        row_hashes: bytes [rows], 16 long; of the rows of today's input: ``Survey.hashes``.

    Attributes:
        places: int64 [rows]; where in the earlier output the list of each row of today is: the shard in the upper half,
            the row of the shard's index in the lower. -1 where the row is new or changed. Of earlier rows that share
            the first half of their hash (one pair is to be expected among four billion rows) the first is found.

    Raises:
        ConfigError: The earlier output is of another job; every key that differs is named with both values.
        StorageError: It is not finished, or was changed.
    """

    def __init__(self, folder: str | Path, job: Mapping[str, Any], row_hashes: NDArray[np.bytes_]) -> None:
        self.folder = Path(folder)
        self.records = output.finished(self.folder)
        if changed := output.changes(self.folder, job, ignore=INPUT):
            raise ConfigError(
                f"{folder} is the output of another job: {'; '.join(changed)}. Its lists would not be those that this "
                "job makes. Leave out --previous, and everything is computed."
            )
        self.places = self._find(row_hashes)
        self._size = int(job["shard_size"])
        self._held = lru_cache(maxsize=_HELD)(self._read)
        self._sorted: _Sorted | None = None
        known = np.flatnonzero(self.places >= 0)
        # The pairs of a shard of today and one of before that have a row in common.
        pairs = len(np.unique((known // self._size << 32) + (self.places[known] >> 32)))
        self._jumps = pairs > 2 * (len(self.records) + -(-len(self.places) // self._size))

    def take(self, rows: Places) -> Carried:
        """The lists of rows of today's input, all of which have a place.

        Raises:
            StorageError: A shard was changed since, or the temporary file cannot be written.
        """
        places = self.places[rows]
        groups = rows // self._size if self._jumps else places >> 32
        lists, index = [], []
        for group in np.unique(groups).tolist():
            cases = np.flatnonzero(groups == group)
            there = self._of_today(group) if self._jumps else self._held(group)
            part, told = there.take(np.searchsorted(there.places, places[cases]))
            lists.append(part.with_columns(case=pl.Series(cases, dtype=pl.Int64).gather(part["case"])))
            index.append(told.with_columns(case=pl.Series(cases, dtype=pl.Int64)))
        return Carried(pl.concat(lists).sort("case", maintain_order=True), pl.concat(index).sort("case").drop("case"))

    def _find(self, row_hashes: NDArray[np.bytes_]) -> Places:
        high, low, place = [], [], []
        for record in self.records:
            hashes = _halves(b"".join(output.read(self.folder, record, "index", ["row_hash"])["row_hash"].to_list()))
            high.append(hashes[:, 0])
            low.append(hashes[:, 1])
            place.append((record.shard << 32) + np.arange(len(hashes), dtype=np.int64))
        found = np.full(len(row_hashes), -1, dtype=np.int64)
        if not sum(map(len, place)):
            return found
        order = np.argsort(np.concatenate(high), kind="stable")
        high_, low_, place_ = (np.concatenate(parts)[order] for parts in (high, low, place))
        asked = _halves(row_hashes.tobytes())
        at = np.minimum(np.searchsorted(high_, asked[:, 0]), len(high_) - 1)
        same = (high_[at] == asked[:, 0]) & (low_[at] == asked[:, 1])
        found[same] = place_[at[same]]
        return found

    def _read(self, shard: int) -> _Lists:
        """The lists of a shard of the earlier output."""
        record = self.records[shard]
        told = output.read(self.folder, record, "index", ["items", "reason"])
        places = (shard << 32) + np.arange(len(told), dtype=np.int64)
        return _Lists(output.read(self.folder, record), told, places)

    def _of_today(self, shard: int) -> _Lists:
        """The lists of before that a shard of today carries over."""
        if self._sorted is None:
            self._sorted = _Sorted()
            known = np.flatnonzero(self.places >= 0)
            order = known[np.argsort(self.places[known], kind="stable")]
            places, owners = self.places[order], order // self._size
            for first in range(0, len(self.records), _AT_ONCE):
                numbers = range(first, min(first + _AT_ONCE, len(self.records)))
                low, high = np.searchsorted(places, [first << 32, (numbers[-1] + 1) << 32])
                self._sorted.add(
                    _concat([self._read(number) for number in numbers]), places[low:high], owners[low:high]
                )
        return self._sorted.read(shard)


@dataclass(frozen=True, eq=False)
class _Lists:
    """Lists of an earlier output.

    Attributes:
        part: Rows of part files, one list after the other.
        index: ``items`` and ``reason`` of each list.
        places: int64 [lists], ascending.
    """

    part: pl.DataFrame
    index: pl.DataFrame
    places: Places

    def take(self, numbers: NDArray[np.integer]) -> tuple[pl.DataFrame, pl.DataFrame]:
        """Some of the lists, in the order asked for: their rows, with ``case`` (which one it is), and their index."""
        ends = np.cumsum(self.index["items"].to_numpy().astype(np.int64))
        counts = self.index["items"].to_numpy()[numbers].astype(np.int64)
        case = np.repeat(np.arange(len(numbers)), counts)
        starts = ends[numbers] - counts
        wanted = starts[case] + np.arange(len(case)) - (np.cumsum(counts) - counts)[case]
        return self.part[wanted].with_columns(case=pl.Series(case, dtype=pl.Int64)), self.index[numbers]


def _concat(lists: list[_Lists]) -> _Lists:
    return _Lists(
        pl.concat([one.part for one in lists]),
        pl.concat([one.index for one in lists]),
        np.concatenate([one.places for one in lists]),
    )


class _Sorted:
    """Lists of an earlier output by today's shards, in a file that has no name and ends with the process."""

    def __init__(self) -> None:
        self._pieces: dict[int, list[tuple[int, int, int]]] = {}  # Shard -> start, middle and end of its pieces.
        try:
            self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        except OSError as error:
            raise self._refused(error) from error
        weakref.finalize(self, _close, self._file)

    def add(self, lists: _Lists, places: Places, owners: Places) -> None:
        """Append some lists.

        Args:
            lists: Of some shards of before.
            places: Of the lists that are wanted, ascending; a place may stand twice.
            owners: The shard of today that wants each.
        """
        order = np.argsort(owners, kind="stable")
        part, index = lists.take(np.searchsorted(lists.places, places[order]))
        index = index.with_columns(place=pl.Series(places[order], dtype=pl.Int64))
        rows = np.concatenate([[0], np.cumsum(index["items"].to_numpy().astype(np.int64))])
        found, starts = np.unique(owners[order], return_index=True)
        for owner, start, stop in zip(found.tolist(), starts.tolist(), [*starts[1:].tolist(), len(order)], strict=True):
            low, middle = self._append(part.drop("case")[rows[start] : rows[stop]])
            _, high = self._append(index[start:stop])
            self._pieces.setdefault(owner, []).append((low, middle, high))

    def read(self, shard: int) -> _Lists:
        """What a shard of today wants."""
        lists = []
        for start, middle, end in self._pieces[shard]:
            index = self._frame(middle, end)
            lists.append(_Lists(self._frame(start, middle), index.drop("place"), index["place"].to_numpy()))
        return _concat(lists)

    def _append(self, frame: pl.DataFrame) -> tuple[int, int]:
        """Where the frame begins in the file, and where it ends."""
        buffer = io.BytesIO()
        frame.write_ipc(buffer, compression="zstd")
        try:
            start = self._file.seek(0, io.SEEK_END)
            self._file.write(buffer.getvalue())
            return start, self._file.tell()
        except OSError as error:
            raise self._refused(error) from error

    def _frame(self, start: int, end: int) -> pl.DataFrame:
        try:
            self._file.seek(start)
            data = self._file.read(end - start)
        except OSError as error:  # What a full disk refuses of the last piece, say.
            raise self._refused(error) from error
        return pl.read_ipc(io.BytesIO(data))

    @staticmethod
    def _refused(error: OSError) -> StorageError:
        return StorageError(
            f"cannot sort the previous output by today's rows in {tempfile.gettempdir()}: {error.strerror or error}. "
            "It takes about one and a half times the room of that output; set TMPDIR to a place that has it, or leave "
            "out --previous."
        )


def _close(file: IO[bytes]) -> None:
    with suppress(OSError):
        file.close()


def _halves(hashes: bytes) -> NDArray[np.uint64]:
    """uint64 [n, 2] of 16-byte hashes."""
    return np.frombuffer(hashes, dtype=">u8").reshape(-1, 2).astype(np.uint64)
