"""What users are read from: a table that is held, or a file of which rows are taken from any place, best forward.

Rows are raw: ids are texts or numbers, lists may be JSON, and a row that is none at all (a line that is no JSON object,
CSV with too few fields) is all nulls, with the reason in the column ``FAULT`` and its text in ``VALUE``. Columns have
the types that the caller names, so that no row changes what the others hold: a value that is none of its column's type
is null, with the reason in ``FAULT``, its text in ``VALUE`` and the column in ``COLUMN``.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import polars as pl

from genrec.dataset import Dataset
from genrec.errors import ConfigError, DataError, suggestion
from genrec.readers import tabular
from genrec.tables import FAULT, VALUE, as_polars

Types = Mapping[str, pl.DataType]

ITEM_LISTS = ("history", "allowed", "blocked")
# What a job reads; every other column is of the user, for the head of a prompt.
OURS = ("user_id", *ITEM_LISTS, "where", "context")
COLUMN = "__column"  # Beside FAULT and VALUE: which column is at fault, where it is not the whole row.
PIECE = 4096  # Rows that are held at once where nobody says how many.

# What libraries raise for files that are damaged or not in their format.
_REFUSALS = (OSError, EOFError, ValueError, NotImplementedError, zlib.error, pl.exceptions.PolarsError)


class Source(Protocol):
    """Rows of users under a name for messages; ``columns`` are those that hold data."""

    name: str
    columns: list[str]

    def take(self, start: int, stop: int) -> pl.DataFrame:
        """The rows ``start .. stop - 1``, fewer where there are no more."""


def find(source: str | Path | pl.DataFrame | Any, types: Types) -> Source:
    """What an input is, and which types columns of it have: see ``users.Users.open``."""
    types = {name: kind for name, kind in types.items() if name not in OURS}
    if not isinstance(source, str | Path):
        return _Frame("users", as_polars(source, "users"), types)
    path, name = Path(source), str(source)
    if path.is_dir():
        data = Dataset.load(path)
        frame = data.history_frame()
        if data.users is not None:
            frame = frame.join(data.users, on="user_id", how="left", maintain_order="left")
        return _Frame(name, frame, types)
    if not path.exists():
        there = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ConfigError(f"{path} does not exist. {suggestion(path.name, there) if there else ''}".strip())
    match tabular.suffix(path):
        case "parquet":
            return _Parquet(name, path, types)
        case "csv":
            return _Csv(name, path, types)
        case "jsonl":
            return _Jsonl(name, path, types)
    raise ConfigError(
        f"{path}: its name does not tell the format. It ends in .parquet, .csv, .tsv or .jsonl (also .gz)."
    )


def _check_columns(name: str, schema: Mapping[str, Any]) -> None:
    """Refuse a table that lacks a column, or has one that no row of can be right."""
    for column in ("user_id", "history"):
        if column not in schema:
            raise DataError(f"{name}: no column {column!r}; it has {', '.join(schema)}. Rename one of them.")
    for column, kind in schema.items():
        if column in ("row", "row_hash"):
            raise DataError(f"{name}: a column is called {column!r}, as one of the output is. Rename it.")
        if column == "user_id" and not _holds_ids(kind):
            raise DataError(f"{name}: column user_id is {kind}; it takes texts or numbers.")
        listed = isinstance(kind, pl.List | pl.Array) and _holds_ids(kind.inner)
        if column in ITEM_LISTS and not (listed or kind in (pl.String, pl.Null)):
            raise DataError(f"{name}: column {column} is {kind}; it takes lists of item ids.")
        if column == "where" and kind not in (pl.String, pl.Null, pl.Categorical, pl.Enum):
            raise DataError(f"{name}: column where is {kind}; it takes texts, such as \"market = 'DE'\".")
        if column == "context" and not (isinstance(kind, pl.Struct) or kind in (pl.String, pl.Null)):
            raise DataError(f"{name}: column context is {kind}; it takes structs, or JSON objects as texts.")


def _holds_ids(kind: Any) -> bool:
    return kind.is_numeric() or kind in (pl.String, pl.Categorical, pl.Enum, pl.Null)


class _Frame:
    """A table that is held."""

    def __init__(self, name: str, frame: pl.DataFrame, types: Types) -> None:
        self.name, self.frame, self.types = name, _plain(frame), types
        self.columns = self.frame.columns
        _check_columns(name, self.frame.schema)

    def take(self, start: int, stop: int) -> pl.DataFrame:
        return _fitted(self.frame[start:stop], self.types)


def _plain(frame: pl.DataFrame) -> pl.DataFrame:
    """Without columns whose names begin with "__"; categoricals as the strings that they stand for."""
    frame = frame.select(name for name in frame.columns if not name.startswith("__"))
    return frame.with_columns(pl.col(pl.Categorical, pl.Enum).cast(pl.String))


_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]+)?")


def _fit(value: Any, kind: Any, *, spelled: bool) -> Any:
    """A value as a type holds it, or None where it is none of that type; ``spelled``: texts may stand for others.

    Numbers fit where they keep their value: 31.0 is an Int64, 31.5 is none.
    """
    if isinstance(kind, pl.List):
        if spelled and isinstance(value, str):
            value = _json(value)
        if not isinstance(value, list):
            return None
        leaves = tabular.leaves(value)
        parts = [None if leaf is None else _fit(leaf, kind.inner, spelled=spelled) for leaf in leaves]
        return None if any(one is None and leaf is not None for one, leaf in zip(parts, leaves, strict=True)) else parts
    if kind == pl.String:
        return json.dumps(value) if isinstance(value, bool | int | float) else value if isinstance(value, str) else None
    if kind == pl.Boolean:
        if spelled and value in ("true", "false"):
            return value == "true"
        return value if isinstance(value, bool) else None
    if spelled and isinstance(value, str):
        value = _number(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if kind.is_float():
        try:
            return float(value)
        except OverflowError:
            return None
    if isinstance(value, int):
        return value
    return int(value) if value.is_integer() else None


def _json(text: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if encodable(text, value) else None


def _number(text: str) -> int | float | None:
    found = _NUMBER.fullmatch(text)
    if not found:
        return None
    if not any(found.groups()) and len(text) <= 20:  # As many as a whole number has.
        return int(text)
    return value if math.isfinite(value := float(text)) else None


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _column(name: str, values: list[Any], kind: pl.DataType, *, spelled: bool) -> tuple[pl.Series, list[int]]:
    """Values as a column of a type, and the places of those that are none of it, which are null."""
    fitting = [None if value is None else _fit(value, kind, spelled=spelled) for value in values]
    made = pl.Series(name, fitting, dtype=kind, strict=False)  # A number that is too large becomes null, too.
    lost = made.is_null().to_numpy()
    return made, [place for place in np.flatnonzero(lost).tolist() if values[place] is not None]


def _fitted(frame: pl.DataFrame, types: Types) -> pl.DataFrame:
    """With columns of the types that are named; tables that have no texts for other things may have them here."""
    columns = {
        name: _column(name, frame[name].to_list(), kind, spelled=True)
        for name, kind in types.items()
        if name in frame.columns and frame.schema[name] != kind
    }
    return _put(frame, columns, {name: frame[name] for name in columns}, types)


def _put(
    frame: pl.DataFrame,
    columns: Mapping[str, tuple[pl.Series, list[int]]],
    before: Mapping[str, Any],
    types: Types,
) -> pl.DataFrame:
    """A frame with columns that ``_column`` made of the values ``before``, and what did not fit noted."""
    if types.keys().isdisjoint(frame.columns):
        return frame
    notes: dict[str, list[str | None]] = {
        note: frame[note].to_list() if note in frame.columns else [None] * len(frame) for note in (FAULT, VALUE, COLUMN)
    }
    for name, (_, misfits) in columns.items():
        for place in misfits:
            if notes[FAULT][place] is None:
                notes[FAULT][place] = f"is no {types[name]}, as in training"
                notes[VALUE][place], notes[COLUMN][place] = _shown(before[name][place]), name
    frame = frame.with_columns(made for made, _ in columns.values())
    return frame.with_columns(pl.Series(note, values, dtype=pl.String) for note, values in notes.items())


class _File:
    """A file that is read forward: subclasses say how it is begun at a row, and how rows are taken from there."""

    columns: list[str]

    def __init__(self, name: str, path: Path, types: Types) -> None:
        self.name, self.path, self.types = name, path.absolute(), types
        self._stamp = self._state()
        self._open: Any = None
        self._at = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None, "_at": 0}

    def _state(self) -> tuple[int, int]:
        try:
            found = self.path.stat()
        except OSError as error:
            raise DataError(f"{self.name} cannot be read: {error.strerror}.") from error
        return found.st_size, found.st_mtime_ns

    def _failed(self, error: Exception) -> DataError:
        """The error for a file that is not what it was taken for; the next ``take`` begins anew."""
        self._open = None
        return DataError(f"{self.name} cannot be read as {tabular.suffix(self.path)}: {error}.")

    def _check_unchanged(self) -> None:
        if self._state() != self._stamp:
            raise DataError(f"{self.name} has changed while it was read. Run the same command again.")


class _Parquet(_File):
    """Batches of Arrow, because a slice of a scan would decode a row group from its beginning for every piece."""

    def __init__(self, name: str, path: Path, types: Types) -> None:
        super().__init__(name, path, types)
        from pyarrow import parquet

        try:
            with parquet.ParquetFile(self.path) as file:
                sizes = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
                self._empty = self._rest = _plain(_polars(file.schema_arrow.empty_table()))
        except _REFUSALS as error:
            raise self._failed(error) from error
        self._starts = [0, *itertools.accumulate(sizes)]
        self.columns = self._empty.columns
        _check_columns(name, self._empty.schema)

    def take(self, start: int, stop: int) -> pl.DataFrame:
        self._check_unchanged()
        stop = min(stop, self._starts[-1])
        if start >= stop:
            return _fitted(self._empty, self.types)
        group = int(np.searchsorted(self._starts, start, side="right")) - 1
        try:
            if self._open is None or start < self._at or self._starts[group] > self._at:
                self._begin(group)
            parts = []
            while self._at < stop:
                first = max(start - self._at, 0)
                if first < len(self._rest):
                    parts.append(self._rest[first : stop - self._at])
                if self._at + len(self._rest) > stop:
                    self._rest, self._at = self._rest[stop - self._at :], stop
                else:
                    self._at += len(self._rest)
                    self._rest = _plain(_polars(next(self._open))) if self._at < self._starts[-1] else self._empty
        except (StopIteration, *_REFUSALS) as error:
            raise self._failed(error) from error
        return _fitted(pl.concat(parts, rechunk=True), self.types)

    def _begin(self, group: int) -> None:
        from pyarrow import parquet

        # Without these, a row group's columns would be read whole before the first of its rows is decoded.
        file = parquet.ParquetFile(self.path, pre_buffer=False, buffer_size=1 << 20)
        groups = range(group, file.num_row_groups)
        self._open = file.iter_batches(PIECE, row_groups=groups)
        self._rest, self._at = self._empty, self._starts[group]


def _polars(table: Any) -> pl.DataFrame:
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    return frame


class _Text(_File):
    """Lines that are parsed when they are taken; those before them are only counted."""

    def take(self, start: int, stop: int) -> pl.DataFrame:
        self._check_unchanged()
        try:
            if self._open is None or start < self._at:
                self._open, self._at = self._lines(), 0
            lines = list(itertools.islice(self._open, start - self._at, max(stop, start) - self._at))
            self._at = max(stop, start)
        except _REFUSALS as error:
            raise self._failed(error) from error
        except DataError:
            self._open = None
            raise
        return self._frame(lines)

    def _pieces(self) -> Iterator[list[Any]]:
        """All lines once, for what is the same in all pieces."""
        lines = self._lines()
        try:
            while piece := list(itertools.islice(lines, PIECE)):
                yield piece
        except _REFUSALS as error:
            raise self._failed(error) from error

    def _lines(self) -> Iterator[Any]:
        raise NotImplementedError

    def _frame(self, lines: list[Any]) -> pl.DataFrame:
        raise NotImplementedError


def _decoded(text: str) -> str | None:
    """Why a text that was read with surrogates in the place of bytes is no UTF-8, or None."""
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"is not UTF-8 text (byte {ord(text[error.start]) - 0xDC00:#x})"
    return None


def encodable(line: str, value: Any) -> bool:
    """Whether JSON text spells characters alone, and not halves of a surrogate pair, which no file can hold."""
    if "\\ud" not in line and "\\uD" not in line:
        return True
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _noted(frame: pl.DataFrame, faults: list[str | None], values: list[str | None]) -> pl.DataFrame:
    """A frame with what is wrong with whole rows, and their text."""
    shown = [None if value is None else value.encode("utf-8", "replace").decode() for value in values]
    notes = (pl.Series(FAULT, faults, dtype=pl.String), pl.Series(VALUE, shown, dtype=pl.String))
    return frame.with_columns(notes)


class _Csv(_Text):
    """Ids, lists, predicates and titles are text; other columns what the caller says, or numbers where all of it is."""

    def __init__(self, name: str, path: Path, types: Types) -> None:
        super().__init__(name, path, types)
        try:
            self.separator, self.header = tabular.csv_header(path)
        except _REFUSALS as error:
            raise self._failed(error) from error
        except csv.Error as error:
            raise DataError(f"{name}: the header is not CSV ({error}).") from error
        if (wrong := _decoded(self.separator.join(self.header))) is not None:
            raise DataError(f"{name}: the header {wrong}. Save the file as UTF-8.")
        self.columns = [column for column in self.header if not column.startswith("__")]
        _check_columns(name, dict.fromkeys(self.columns, pl.String()))
        self.found: dict[str, set[type[pl.DataType]]] = {}
        free = [column for column in self.columns if column not in (*OURS, *tabular.TEXT_COLUMNS, *types)]
        for piece in self._pieces():
            for column in self._table(piece).select(free):
                if column.null_count() < column.len():
                    found = tabular.csv_types(column)
                    self.found[column.name] = self.found.get(column.name, found) & found

    def _lines(self) -> Iterator[list[str]]:
        with tabular.open_text(self.path, errors="surrogateescape") as file:
            reader = csv.reader(file, delimiter=self.separator, strict=True)
            next(reader)
            number = 0
            try:
                for row in reader:
                    if row:
                        number += 1
                        yield row
            except csv.Error as error:
                place = f"{self.name}: row {number + 1}"
                raise DataError(
                    f"{place} is not CSV ({error}). Look for a quotation mark that is never closed."
                ) from error

    def _table(self, lines: list[list[str]]) -> pl.DataFrame:
        """All columns as text."""
        rows: list[list[str | None]] = []
        faults: list[str | None] = []
        values: list[str | None] = []
        for row in lines:
            text = self.separator.join(row)
            wrong = tabular.csv_fault(row, self.header) or _decoded(text)
            rows.append([None] * len(self.header) if wrong else [value or None for value in row])
            faults.append(wrong)
            values.append(text if wrong else None)
        frame = pl.DataFrame(rows, schema=dict.fromkeys(self.header, pl.String), orient="row").select(self.columns)
        return _noted(frame, faults, values)

    def _frame(self, lines: list[list[str]]) -> pl.DataFrame:
        table = self._table(lines)
        table = table.with_columns(tabular.csv_typed(table[name], types) for name, types in self.found.items())
        return _fitted(table, self.types)


class _Jsonl(_Text):
    """Ids are texts and lists JSON; other columns what the caller says, or what ``readers`` makes of the whole."""

    def __init__(self, name: str, path: Path, types: Types) -> None:
        super().__init__(name, path, types)
        self.found: dict[str, set[type]] = {}
        fault = None
        for piece in self._pieces():
            rows, faults = zip(*map(_object, piece), strict=True)
            fault = fault or next(filter(None, faults), None)
            for key in dict.fromkeys(key for row in rows for key in row):
                found = tabular.json_types(row.get(key) for row in rows)
                self.found[key] = self.found.get(key, set()) | found
        self.columns = [key for key in self.found if key and not key.startswith("__")]
        if not self.columns:
            raise DataError(f"{name} holds no JSON object{f': a line {fault}' if fault else ''}.")
        _check_columns(name, dict.fromkeys(self.columns, pl.String()))

    def _lines(self) -> Iterator[str]:
        with tabular.open_text(self.path, errors="surrogateescape") as file:
            for line in file:
                if line.strip():
                    yield line

    def _frame(self, lines: list[str]) -> pl.DataFrame:
        rows, faults, values = [], [], []
        for line in lines:
            row, wrong = _object(line)
            rows.append(row)
            faults.append(wrong)
            values.append(line.strip() if wrong else None)
        columns = []
        typed: dict[str, tuple[pl.Series, list[int]]] = {}
        before: dict[str, list[Any]] = {}
        for name in self.columns:
            column = [row.get(name) for row in rows]
            if name in self.types:
                before[name], typed[name] = column, _column(name, column, self.types[name], spelled=False)
                columns.append(typed[name][0])
            elif name in OURS:
                told = [_id(value) if name == "user_id" else _told(value) for value in column]
                columns.append(pl.Series(name, told, dtype=pl.String))
            else:
                columns.append(tabular.column(name, column, self.found[name]))
        return _put(_noted(pl.DataFrame(columns), faults, values), typed, before, self.types)


def _object(line: str) -> tuple[dict[str, Any], str | None]:
    """``tabular.json_object``, which also refuses what is no text."""
    wrong = _decoded(line)
    row, fault = ({}, wrong) if wrong else tabular.json_object(line)
    return (row, fault) if encodable(line, row) else ({}, "holds half of a surrogate pair")


def _id(value: Any) -> str | None:
    none = isinstance(value, bool) or (isinstance(value, float) and math.isnan(value))
    return str(value) if isinstance(value, str | int | float) and not none else None


def _told(value: Any) -> str | None:
    """A JSON value as text: a text as it is, anything else as JSON."""
    return None if value is None else _shown(value)
