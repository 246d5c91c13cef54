"""Tables in one file each: CSV, Parquet and JSON lines."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterable, Sequence
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


def open_text(path: Path, *, errors: str = "strict") -> io.TextIOBase:
    """A file of UTF-8 text, gzipped or not; ``errors`` as ``open`` takes it."""
    if path.name.lower().endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8-sig", errors=errors, newline="")
    return open(path, encoding="utf-8-sig", errors=errors, newline="")


def placed(table: pl.DataFrame, path: Path, lines: pl.Series | pl.Expr, *notes: list[str | None]) -> pl.DataFrame:
    """With the place of every row; ``notes``: why it could not be read, if so, and what stands there."""
    more = [pl.Series(name, note, dtype=pl.String) for name, note in zip((FAULT, VALUE), notes, strict=False)]
    return table.with_columns(pl.lit(str(path)).alias(SOURCE), lines.cast(pl.Int64).alias(LINE), *more)


def split_lines(text: str, separator: str, names: Sequence[str], first: int = 1) -> pl.DataFrame:
    """Lines, of which the first has the number ``first``, as columns of text: fields are unquoted, blank lines no rows.

    Lines of another number of fields are passed on as unreadable.
    """
    table = pl.DataFrame({VALUE: pl.Series(text.split("\n"), dtype=pl.String)})
    table = table.with_columns(pl.col(VALUE).str.strip_suffix("\r"), pl.int_range(first, pl.len() + first).alias(LINE))
    table = table.filter(pl.col(VALUE) != "").with_columns(__fields=pl.col(VALUE).str.split(separator))
    width = pl.col("__fields").list.len()
    right = width == len(names)
    fields = [pl.when(right).then(pl.col("__fields").list.get(i, null_on_oob=True)) for i in range(len(names))]
    return table.select(
        *(field.alias(name) for field, name in zip(fields, names, strict=True)),
        pl.col(LINE),
        pl.when(~right).then(pl.format(f"has {{}} fields where {len(names)} are expected", width)).alias(FAULT),
        pl.when(~right).then(pl.col(VALUE)).alias(VALUE),
    )


# CSV


def csv_header(path: Path) -> tuple[str, list[str]]:
    """What separates the fields, and the names of the columns.

    Raises:
        DataError: There is no header, a column stands in it twice, or something else separates its fields.
    """
    separator = "\t" if path.name.lower().removesuffix(".gz").endswith(".tsv") else ","
    with open_text(path, errors="surrogateescape") as file:  # What is no UTF-8 may stand in the rows, read ahead.
        header = next(csv.reader(file, delimiter=separator), [])
    if not header:
        raise DataError(f"{path} is empty: it has no header line.")
    if len(header) == 1 and (other := next((mark for mark in ",;\t|" if mark in header[0]), None)):
        hint = "genrec reads commas, and tabs in a file *.tsv. Convert or rename it."
        raise DataError(f"{path}:1 has {other!r} between its fields. {hint}")
    if doubled := [c for i, c in enumerate(header) if c in header[:i]]:
        raise DataError(f"{path}:1 has the column {doubled[0]!r} twice. Rename one.")
    return separator, header


def _read_csv(path: Path) -> pl.DataFrame:
    """All columns as strings. Rows with more or fewer fields than the header are passed on as unreadable."""
    separator, header = csv_header(path)
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
    with open_text(path) as file:
        return any(0 < len(row) < width for row in csv.reader(file, delimiter=separator))


def _read_csv_by_line(path: Path, header: list[str], separator: str) -> pl.DataFrame:
    rows: list[list[str | None]] = []
    lines, faults, values = [], [], []
    with open_text(path) as file:
        reader = csv.reader(file, delimiter=separator, strict=True)
        next(reader)
        start = reader.line_num
        try:
            for row in reader:
                if row:
                    fault = csv_fault(row, header)
                    rows.append([None] * len(header) if fault else [value or None for value in row])
                    lines.append(start + 1)
                    faults.append(fault)
                    values.append(separator.join(row) if fault else None)
                start = reader.line_num
        except csv.Error as error:
            raise DataError(
                f"{path}:{start + 1} is not CSV ({error}). Look for a quotation mark that is never closed."
            ) from error
    table = pl.DataFrame(rows, schema=dict.fromkeys(header, pl.String), orient="row")
    return placed(table, path, pl.Series(lines, dtype=pl.Int64), faults, values)


def csv_fault(row: list[str], header: list[str]) -> str | None:
    """What is wrong with a row of CSV as a whole, or None."""
    return f"has {len(row)} fields where the header has {len(header)}" if len(row) != len(header) else None


# What the columns of CSV may be beside text, the best first.
CSV_TYPES: tuple[type[pl.DataType], ...] = (pl.Boolean, pl.Int64, pl.Float64)


def csv_types(series: pl.Series) -> set[type[pl.DataType]]:
    """Those of ``CSV_TYPES`` that a column of strings can be; numbers that are codes would lose their zeros."""
    if series.null_count() == series.len():
        return set(CSV_TYPES)
    if series.is_in(["true", "false"]).all():
        return {pl.Boolean}
    found: set[type[pl.DataType]] = set()
    whole = series.cast(pl.Int64, strict=False)
    if whole.null_count() == series.null_count() and (whole.cast(pl.String) == series).all():
        found.add(pl.Int64)
    if series.str.contains(r"^-?(?:0|[1-9]\d{0,14})(?:\.\d+)?$").all():
        found.add(pl.Float64)
    return found


def csv_typed(series: pl.Series, types: set[type[pl.DataType]]) -> pl.Series:
    """A column of strings as the best of ``types`` that it can be; without any it stays text."""
    best = next((one for one in CSV_TYPES if one in types), None)
    if best is None:
        return series
    return (series == "true").rename(series.name) if best == pl.Boolean else series.cast(best)


def _typed(table: pl.DataFrame, text: Iterable[str]) -> pl.DataFrame:
    """Numbers and truth values in columns of a CSV table other than ``text``."""
    columns = table.select(pl.col(pl.String).exclude("^__.*$", *text))
    return table.with_columns(csv_typed(one, csv_types(one)) for one in columns if one.null_count() < one.len())


# Parquet and JSON lines


def _read_parquet(path: Path) -> pl.DataFrame:
    return placed(pl.read_parquet(path, glob=False), path, pl.int_range(1, pl.len() + 1))


def json_object(line: str) -> tuple[dict[str, Any], str | None]:
    """The object that a line of JSON lines holds, or an empty one and why it holds none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return {}, f"is not JSON ({error})"
    return (row, None) if isinstance(row, dict) else ({}, "is no JSON object")


def _read_jsonl(path: Path) -> pl.DataFrame:
    """One object a line. Lines that are none are passed on as unreadable."""
    rows: list[dict[str, Any]] = []
    lines, faults, values = [], [], []
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            row, fault = json_object(line)
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


def json_types(values: Iterable[Any]) -> set[type]:
    """What types JSON values have; whole numbers that no Int64 holds count as text."""
    known = [value for value in values if value is not None]
    types = {type(value) for value in known}
    if int in types and any(type(value) is int and not -(2**63) <= value < 2**63 for value in known):
        types.add(str)
    return types


def column(name: str, values: list[Any], types: set[type] | None = None) -> pl.Series:
    """JSON values of one key as a column; where types mix, lists win over text and text over numbers.

    ``types`` are those of the whole column where ``values`` are a piece of it (``json_types``).
    """
    types = json_types(values) if types is None else types
    if list in types:
        texts = [None if v is None else [_spelled(leaf) for leaf in leaves(v)] for v in values]
        return pl.Series(name, texts, dtype=pl.List(pl.String))
    if not types or types == {str}:
        return pl.Series(name, values, dtype=pl.String)
    if types == {bool} or types == {float} or types == {int, float}:
        return pl.Series(name, values, dtype=pl.Boolean if bool in types else pl.Float64)
    if types == {int}:
        return pl.Series(name, values, dtype=pl.Int64)
    return pl.Series(name, [_spelled(value) for value in values], dtype=pl.String)


def _spelled(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def leaves(value: Any) -> list[Any]:
    """What stands in a list of lists of any depth, in order; what is no list stands alone."""
    found, left = [], [value]
    while left:
        part = left.pop()
        if isinstance(part, list):
            left += part[::-1]
        else:
            found.append(part)
    return found


FILE_FORMATS: dict[str, Callable[[Path], pl.DataFrame]] = {
    "csv": _read_csv,
    "parquet": _read_parquet,
    "jsonl": _read_jsonl,
}
