"""The users of a job: read in pieces, surveyed once, and checked row by row, so that a bad row stops nothing.

A row is a user: ``user_id``, ``history`` (item ids, oldest first), optionally ``allowed`` and ``blocked`` (item ids),
``where`` (a predicate over item columns), ``context`` (what the head of a prompt may read of this very request), and
any columns for the head of a prompt. Rows are counted from 0 in data and
from 1 in messages.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from genrec.batch import sources
from genrec.batch.sources import COLUMN, ITEM_LISTS, OURS, PIECE, Types, encodable
from genrec.errors import DataError
from genrec.tables import FAULT, VALUE, as_ids

ERRORS = {"row": pl.Int64, "user_id": pl.String, "column": pl.String, "value": pl.String, "reason": pl.String}
SHOWN = 200  # Characters of a bad value that are kept.

_NO_ITEM = pl.Series([[]], dtype=pl.List(pl.String))

Bools = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Survey:
    """What one pass over an input finds.

    Attributes:
        rows: How many there are, bad ones included.
        digest: SHA-256 (hex) over the hashes of the rows, in order.
        repeated: bool [rows]; the ``user_id`` stands in an earlier row, whatever else that row holds.
        hashes: bytes [rows], 16 long: BLAKE2b of each row as JSON with sorted keys, ids as texts.
    """

    rows: int
    digest: str
    repeated: Bools
    hashes: NDArray[np.bytes_]


@dataclass(frozen=True, eq=False)
class Checked:
    """Rows of users, the good and the bad.

    Attributes:
        frame: The good ones in order: ``row`` i64 (place in the input, from 0), ``user_id`` str, ``history`` list[str],
            ``row_hash`` binary (16 bytes); where the input has them ``allowed`` and ``blocked`` (list[str] or null),
            ``where`` (str or null) and ``context`` (a JSON object as str, or null); then the other columns as they
            came.
        histories: int32 item indices of each row of ``frame``, oldest first.
        errors: The bad ones in order, as ``ERRORS`` says.
    """

    frame: pl.DataFrame
    histories: list[NDArray[np.int32]]
    errors: pl.DataFrame

    @classmethod
    def concat(cls, pieces: Sequence[Checked]) -> Checked:
        """Pieces of an input one after another."""
        return cls(
            pl.concat([piece.frame for piece in pieces]),
            [history for piece in pieces for history in piece.histories],
            pl.concat([piece.errors for piece in pieces]),
        )


class Users:
    """An input of users that is read in pieces.

    Files are never held whole. Reading forward is cheapest, from wherever; going back begins a file of text anew, and a
    Parquet file at the row group. An object may be pickled and read elsewhere, where the same file lies.

    Attributes:
        name: What messages call it: the path as it was given, or "users".
        columns: The names of its columns; those that begin with "__" are not read.
    """

    def __init__(self, source: sources.Source) -> None:
        self.name, self.columns = source.name, list(source.columns)
        self._source = source

    @classmethod
    def open(cls, source: str | Path | pl.DataFrame | Any, *, types: Types | None = None) -> Users:
        """Find out what an input is and which columns it has.

        Text has no types of its own, so CSV and JSON lines are read once here, for one type of a column in all pieces.
        What a prompt reads has those of training instead: a value that does not fit makes its row a bad one, and
        changes no other.

        Args:
            source: A Parquet, CSV or JSON lines file (the latter two also gzipped), in which a list may be written as
                JSON; the folder of a data set, for whole histories joined with its users; or a Polars, pandas or Arrow
                table. Folders and tables are held whole.
            types: Of columns for the head of a prompt: ``Adapter.user_columns``.

        Raises:
            DataError: No column ``user_id`` or ``history``, one that can hold no ids, or a file that is not in its
                format.
            ConfigError: The file is missing, or its name does not tell the format.
        """
        return cls(sources.find(source, types or {}))

    def read(self, start: int, stop: int) -> pl.DataFrame:
        """The raw rows ``start .. stop - 1``, fewer where the input ends before; ``check`` tells what is in them.

        Raises:
            DataError: The file cannot be read, or has changed since it was opened.
        """
        return self._source.take(start, stop)

    def pieces(self, size: int = PIECE) -> Iterator[tuple[int, pl.DataFrame]]:
        """All raw rows in pieces of ``size``, each with the number of its first row."""
        for start in itertools.count(0, size):
            piece = self.read(start, start + size)
            if len(piece):
                yield start, piece
            if len(piece) < size:
                return

    def survey(self) -> Survey:
        """Read everything once.

        What is kept of a row is its hash, 16 bytes; and as much of its user's id, and some 8 more, while repeated ones
        are looked for.

        Raises:
            DataError: There is no row, or the file cannot be read.
        """
        hashes, ids, rows = bytearray(), bytearray(), 0
        missing = []
        for start, piece in self.pieces():
            users, lists = as_ids(piece["user_id"]).to_list(), _all_lists(piece)
            hashes += b"".join(_row_hashes(piece, users, lists))
            ids += b"".join(_hash16(user or "") for user in users)
            missing.append(np.array([not user for user in users], dtype=bool))
            rows = start + len(piece)
        if not rows:
            raise DataError(f"{self.name}: there is no user in it.")
        repeated = _repeated(ids) & ~np.concatenate(missing)
        return Survey(rows, hashlib.sha256(hashes).hexdigest(), repeated, np.frombuffer(hashes, dtype="V16"))


def check(raw: pl.DataFrame, start: int, survey: Survey, index: Mapping[str, int], *, max_events: int) -> Checked:
    """Tell the good rows of ``Users.read`` from the bad ones.

    Bad is a row that is none at all (a line that is no JSON object, CSV with too few fields), one with a value that is
    none of its column's type, one without a user id or with that of an earlier row, one whose history is no list of
    item ids, holds a null or an item that ``index`` lacks, or is longer than ``max_events``, one whose ``allowed`` or
    ``blocked`` is no list of item ids, and one whose ``context`` is no object of plain values. No history is an empty
    one. Unknown items in ``allowed`` and ``blocked`` are no fault: they cannot come out anyway.

    Args:
        raw: n rows.
        start: The number of the first.
        survey: Of the whole input.
        index: Item id -> item index.
        max_events: Of a history, at most.

    Returns:
        Every row once, in ``frame`` or in ``errors``, there with the first of what is wrong with it.
    """
    users, lists, contexts = as_ids(raw["user_id"]).to_list(), _all_lists(raw), _contexts(raw)
    faults = raw[FAULT].to_list() if FAULT in raw.columns else [None] * len(raw)
    columns = raw[COLUMN].to_list() if COLUMN in raw.columns else [None] * len(raw)
    good: list[int] = []
    histories: list[NDArray[np.int32]] = []
    bad: list[dict[str, Any]] = []

    def refuse(place: int, column: str, value: str, reason: str) -> None:
        bad.append(fault(start + place, users[place] or None, column, value, reason))

    for place, (user, history, broken) in enumerate(zip(users, lists["history"], faults, strict=True)):
        if broken is not None:
            refuse(place, columns[place] or "row", raw[VALUE][place], broken)
        elif not user:
            refuse(place, "user_id", "", "is empty, or neither a text nor a number")
        elif survey.repeated[start + place]:
            refuse(place, "user_id", user, "stands in an earlier row too")
        else:
            found, wrong = _indices(history or [], index, max_events)
            reasons = {"history": wrong}
            reasons |= {name: _wrong(lists[name][place]) for name in ITEM_LISTS[1:] if name in lists}
            if contexts is not None and isinstance(contexts[place], str):
                reasons["context"] = contexts[place], 'is no JSON object of plain values, such as {"query": "tea"}'
            column = next((name for name, reason in reasons.items() if reason is not None), None)
            if found is None or column is not None:
                column = column or "history"
                refuse(place, column, *(reasons[column] or ("", "")))
            else:
                good.append(place)
                histories.append(found)
    frame = raw[good]
    ours = {
        "row": pl.Series(np.array(good, dtype=np.int64) + start),
        "user_id": pl.Series([users[place] for place in good], dtype=pl.String),
        "history": _list_column(frame["history"], [lists["history"][place] for place in good]).fill_null(_NO_ITEM),
        "row_hash": pl.Series(survey.hashes[start : start + len(raw)][good].tolist(), dtype=pl.Binary),
    }
    for name in ITEM_LISTS[1:]:
        if name in lists:
            ours[name] = _list_column(frame[name], [lists[name][place] for place in good])
    if "where" in frame.columns:
        texts = frame["where"].cast(pl.String)
        ours["where"] = texts.set(texts.str.strip_chars() == "", None)
    if contexts is not None:
        told = [None if contexts[place] is None else _encode(contexts[place]) for place in good]
        ours["context"] = pl.Series(told, dtype=pl.String)
    others = frame.drop(*OURS, FAULT, VALUE, COLUMN, strict=False)
    return Checked(pl.concat([pl.DataFrame(ours), others], how="horizontal"), histories, error_frame(bad))


def fault(row: int, user_id: str | None, column: str, value: str | None, reason: str) -> dict[str, Any]:
    """One row of ``errors/``: the input's row (from 0), its user where it has one, and what is wrong with which value.

    ``column`` is "row" where a row is none at all. Values are cut to 200 characters.
    """
    return {"row": row, "user_id": user_id, "column": column, "value": _shown(value or ""), "reason": _shown(reason)}


def error_frame(faults: Sequence[Mapping[str, Any]]) -> pl.DataFrame:
    """Rows that ``fault`` made as the table of ``errors/``, in the order of the input."""
    return pl.DataFrame(list(faults), schema=ERRORS).sort("row", maintain_order=True)


# One value


def _all_lists(raw: pl.DataFrame) -> dict[str, list[Any]]:
    """The columns of item ids that there are: for each row a list, None, or the text that is none."""
    return {name: _lists(raw[name]) for name in ITEM_LISTS if name in raw.columns}


def _lists(series: pl.Series) -> list[Any]:
    if series.dtype == pl.String:
        return [_parsed(text) for text in series.to_list()]
    if isinstance(series.dtype, pl.Array):
        series = series.arr.to_list()
    return series.cast(pl.List(pl.String)).to_list()


def _parsed(text: str | None) -> list[str | None] | str | None:
    """A JSON list of ids as a list of strings and nulls; nothing as None; what is none of these as it is."""
    if text is None or not text.strip():
        return None
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return text
    plain = isinstance(values, list) and all(
        value is None or (isinstance(value, str | int | float) and not isinstance(value, bool)) for value in values
    )
    if not plain or not encodable(text, values):
        return text
    return [None if value is None else str(value) for value in values]


def _contexts(raw: pl.DataFrame) -> list[Any] | None:
    """The column ``context``: for each row a dict without empty values, None, or the text that is none."""
    if "context" not in raw.columns:
        return None
    return [_context(value) for value in raw["context"].to_list()]


def _context(value: Any) -> dict[str, Any] | str | None:
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    told = value
    if isinstance(value, str):
        try:
            told = json.loads(value)
        except (ValueError, RecursionError):
            return value
        if not isinstance(told, dict) or not encodable(value, told):
            return value
    # A struct has all its fields in every row, and an object those that there are: empty ones tell nothing.
    told = {name: one for name, one in told.items() if one is not None}
    for one in told.values():
        if not all(isinstance(leaf, str | int | float) for leaf in (one if isinstance(one, list) else [one])):
            return json.dumps(told, ensure_ascii=False, default=str)
    return told or None


def _wrong(items: Any) -> tuple[str, str] | None:
    """(value, reason) where a list of item ids is none or has a hole."""
    if isinstance(items, str):
        return items, 'is no JSON list of item ids, such as ["id1", "id2"]'
    if items is not None and None in items:
        return json.dumps(items[:SHOWN], ensure_ascii=False), "holds a null among the item ids"
    return None


def _indices(
    items: Any, index: Mapping[str, int], max_events: int
) -> tuple[NDArray[np.int32], None] | tuple[None, tuple[str, str]]:
    """Item indices of a history, or (value, reason)."""
    if not isinstance(items, str) and len(items) > max_events:
        shown = json.dumps(items[:SHOWN], ensure_ascii=False)
        return None, (shown, f"has {len(items):,} events, above max_events, which is {max_events:,}")
    if (wrong := _wrong(items)) is not None:
        return None, wrong
    try:
        return np.fromiter(map(index.__getitem__, items), dtype=np.int32, count=len(items)), None
    except KeyError as error:
        return None, (str(error.args[0]), f"item {error.args[0]!r} is not in the catalogue")


def _list_column(series: pl.Series, values: list[Any]) -> pl.Series:
    """Lists that are known to be good as list[str]; those that are already are not built again."""
    whole = pl.List(pl.String)
    return series if series.dtype == whole else pl.Series(series.name, values, dtype=whole)


def _shown(text: str) -> str:
    return text[:SHOWN].encode("utf-8", "replace").decode()


# Hashes

_encode = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":"), default=str).encode


def _hash16(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _row_hashes(raw: pl.DataFrame, users: Sequence[str | None], lists: Mapping[str, Sequence[Any]]) -> list[bytes]:
    """BLAKE2b (16 bytes) of rows as JSON with sorted keys; ids are texts there, and no history is an empty one.

    A line that is no row is hashed as it stands, and a value that does not fit its column under no name.
    """
    faults = raw[FAULT].to_list() if FAULT in raw.columns else [None] * len(raw)
    contexts = _contexts(raw)
    ours = ("user_id", "context", *ITEM_LISTS, FAULT, VALUE, COLUMN)
    others = [name for name in raw.columns if name not in ours]
    values = raw.select(others).rows() if others else [()] * len(raw)
    misfits = raw[COLUMN].is_not_null().to_list() if COLUMN in raw.columns else [False] * len(raw)
    hashes = []
    for place in range(len(raw)):
        if faults[place] is not None and not misfits[place]:
            hashes.append(_hash16(_encode({"": raw[VALUE][place]})))
            continue
        row = dict(zip(others, values[place], strict=True))
        row["user_id"] = users[place]
        if contexts is not None and contexts[place] is not None:
            row["context"] = contexts[place]
        for name, column in lists.items():
            row[name] = column[place]
        row["history"] = row["history"] or []
        if misfits[place]:
            row[""] = raw[VALUE][place]
        hashes.append(_hash16(_encode(row)))
    return hashes


def _repeated(ids: bytearray) -> Bools:
    """bool [n]: 16 bytes that stand among those before; n of them one after the other."""
    first, second = np.frombuffer(ids, dtype="<u8").reshape(-1, 2).T
    order = np.lexsort((second, first))  # Stable: of equal ones the first row comes first.
    alike = np.flatnonzero(first[order[1:]] == first[order[:-1]]) + 1
    later, earlier = order[alike], order[alike - 1]
    repeated = np.zeros(len(first), dtype=bool)
    repeated[later[second[later] == second[earlier]]] = True
    return repeated
