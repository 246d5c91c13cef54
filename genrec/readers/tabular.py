"""Tables in one file each: CSV, Parquet and JSON lines."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from genrec.errors import ConfigError, DataError
from genrec.tables import FAULT, LINE, SOURCE, VALUE

PathLike = str | Path
# Ids and texts lose something when they become numbers: zeros in front or behind, digits after the 15th.
TEXT_COLUMNS = ("item_id", "user_id", "title", "brand", "description", "text", "categories")
csv.field_size_limit(1 << 30)  # A description may be longer than the module's 131,072 characters.


class Tables(NamedTuple):
    """What a reader gives: unchecked tables whose rows say where they stand."""

    interactions: pl.DataFrame
    items: pl.DataFrame | None = None
    users: pl.DataFrame | None = None


def suffix(path: Path) -> str | None:
    """The format that a file name stands for."""
    name = path.name.lower().removesuffix(".gz")
    endings = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl"}
    return endings.get(Path(name).suffix)


def read_file(path: Path, format: str | None, *, text: Iterable[str] | None = None) -> pl.DataFrame:
    """One file, by its name's ending, else ``format``. With ``text``, CSV columns other than these may be numbers."""
    found = suffix(path) or format
    if found not in FILE_FORMATS:
        raise ConfigError(
            f"{path}: its name does not tell the format. Give one of {', '.join(FILE_FORMATS)} as format."
        )
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; name a file.")
    try:
        table = FILE_FORMATS[found](path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.object[error.start]:#x}). Save it as UTF-8.") from error
    except (OSError, EOFError, pl.exceptions.PolarsError) as error:
        raise DataError(f"{path} cannot be read as {found}: {error}.") from error
    return _typed(table, text) if text is not None and found == "csv" else table


def _open(path: Path, encoding: str = "utf-8-sig") -> io.TextIOBase:
    if path.name.lower().endswith(".gz"):
        return gzip.open(path, "rt", encoding=encoding, newline="")
    return open(path, encoding=encoding, newline="")


def placed(table: pl.DataFrame, path: Path, lines: pl.Series | pl.Expr, *notes: list[str | None]) -> pl.DataFrame:
    """With the place of every row; ``notes``: why it could not be read, if so, and what stands there."""
    more = [pl.Series(name, note, dtype=pl.String) for name, note in zip((FAULT, VALUE), notes, strict=False)]
    return table.with_columns(pl.lit(str(path)).alias(SOURCE), lines.cast(pl.Int64).alias(LINE), *more)


# CSV


def _read_csv(path: Path) -> pl.DataFrame:
    """All columns as strings. Rows with more or fewer fields than the header are passed on as unreadable."""
    separator = "\t" if path.name.lower().removesuffix(".gz").endswith(".tsv") else ","
    with _open(path) as file:
        header = next(csv.reader(file, delimiter=separator), [])
    if not header:
        raise DataError(f"{path} is empty: it has no header line.")
    if doubled := [c for i, c in enumerate(header) if c in header[:i]]:
        raise DataError(f"{path}:1 has the column {doubled[0]!r} twice. Rename one.")
    try:
        table = pl.read_csv(path, infer_schema=False, separator=separator, glob=False)
        ragged = table[:, -1].has_nulls() and _has_short_rows(path, len(header), separator)
    except pl.exceptions.ComputeError:
        ragged = True
    if ragged:  # Slower, but it tells which lines are at fault.
        return _read_csv_by_line(path, header, separator)
    breaks = pl.sum_horizontal(pl.all().str.count_matches("\n", literal=True).fill_null(0))
    lines = table.select(pl.int_range(2, pl.len() + 2) + breaks.cum_sum().shift(1, fill_value=0)).to_series()
    table = placed(table, path, lines)
    # A blank line is no row.
    return table.filter(~pl.all_horizontal(pl.col(header).is_null()))


def _has_short_rows(path: Path, width: int, separator: str) -> bool:
    """Whether Polars has filled up a row that ends too early."""
    with _open(path) as file:
        return any(0 < len(row) < width for row in csv.reader(file, delimiter=separator))


def _read_csv_by_line(path: Path, header: list[str], separator: str) -> pl.DataFrame:
    rows: list[list[str | None]] = []
    lines, faults, values = [], [], []
    with _open(path) as file:
        reader = csv.reader(file, delimiter=separator, strict=True)
        next(reader)
        start = reader.line_num
        try:
            for row in reader:
                if row:
                    wrong = len(row) != len(header)
                    rows.append([None] * len(header) if wrong else [value or None for value in row])
                    lines.append(start + 1)
                    faults.append(f"has {len(row)} fields where the header has {len(header)}" if wrong else None)
                    values.append(separator.join(row) if wrong else None)
                start = reader.line_num
        except csv.Error as error:
            raise DataError(
                f"{path}:{start + 1} is not CSV ({error}). Look for a quotation mark that is never closed."
            ) from error
    table = pl.DataFrame(rows, schema=dict.fromkeys(header, pl.String), orient="row")
    return placed(table, path, pl.Series(lines, dtype=pl.Int64), faults, values)


def _typed(table: pl.DataFrame, text: Iterable[str]) -> pl.DataFrame:
    """Numbers and truth values in columns of a CSV table other than ``text``, unless codes would lose their zeros."""
    new = []
    for series in table.select(pl.col(pl.String).exclude("^__.*$", *text)):
        if series.null_count() == series.len():
            continue
        if series.is_in(["true", "false"]).all():
            new.append((series == "true").rename(series.name))
            continue
        whole = series.cast(pl.Int64, strict=False)
        if whole.null_count() == series.null_count() and (whole.cast(pl.String) == series).all():
            new.append(whole)
        elif series.str.contains(r"^-?(?:0|[1-9]\d{0,14})(?:\.\d+)?$").all():
            new.append(series.cast(pl.Float64))
    return table.with_columns(new)


# Parquet and JSON lines


def _read_parquet(path: Path) -> pl.DataFrame:
    return placed(pl.read_parquet(path, glob=False), path, pl.int_range(1, pl.len() + 1))


def _read_jsonl(path: Path) -> pl.DataFrame:
    """One object a line. Lines that are none are passed on as unreadable."""
    rows: list[dict[str, Any]] = []
    lines, faults, values = [], [], []
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            fault, row = None, {}
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    fault, row = "is no JSON object", {}
            except (ValueError, RecursionError) as error:
                fault = f"is not JSON ({error})"
            rows.append(row)
            lines.append(number)
            faults.append(fault)
            values.append(line.strip() if fault else None)
    names = dict.fromkeys(name for row in rows for name in row)
    if not rows:
        raise DataError(f"{path} is empty.")
    names.pop("", None)
    table = pl.DataFrame([column(n, [row.get(n) for row in rows]) for n in names if not n.startswith("__")])
    if not table.width:
        reason = faults[0] or "is an empty object"
        raise DataError(f"{path}:{lines[0]} {reason}. The file must hold one JSON object a line.")
    return placed(table, path, pl.Series(lines, dtype=pl.Int64), faults, values)


def column(name: str, values: list[Any]) -> pl.Series:
    """JSON values of one key as a column; where types mix, lists win over text and text over numbers."""
    types = {type(value) for value in values if value is not None}
    if list in types:
        return pl.Series(name, [None if v is None else _leaves(v) for v in values], dtype=pl.List(pl.String))
    if not types or types == {str}:
        return pl.Series(name, values, dtype=pl.String)
    if types == {bool} or types == {float} or types == {int, float}:
        return pl.Series(name, values, dtype=pl.Boolean if bool in types else pl.Float64)
    if types == {int} and all(v is None or -(2**63) <= v < 2**63 for v in values):
        return pl.Series(name, values, dtype=pl.Int64)
    texts = [v if v is None or isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values]
    return pl.Series(name, texts, dtype=pl.String)


def _leaves(value: Any) -> list[str | None]:
    """The strings and nulls of a list of lists of any depth, in order."""
    if isinstance(value, list):
        return [leaf for part in value for leaf in _leaves(part)]
    return [value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)]


FILE_FORMATS: dict[str, Callable[[Path], pl.DataFrame]] = {
    "csv": _read_csv,
    "parquet": _read_parquet,
    "jsonl": _read_jsonl,
}
