"""RecBole's atomic files: NAME.inter, NAME.item and NAME.user, tab-separated, with headers of ``name:type``.

The types are ``token``, ``token_seq``, ``float`` and ``float_seq``; members of a sequence are separated by a space.
RecBole reads the files with pandas, so that a field that begins with a quotation mark is a quoted one.
https://recbole.io/docs/user_guide/data/atomic_files.html
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import polars as pl

from genrec.dataset import Dataset
from genrec.errors import ConfigError, DataError
from genrec.files import new_folder
from genrec.progress import bar, say
from genrec.readers.tabular import TEXT_COLUMNS, Tables, split_lines
from genrec.tables import FAULT, SOURCE, VALUE

ROLES: dict[str, Literal["interactions", "items", "users"]] = {
    ".inter": "interactions",
    ".item": "items",
    ".user": "users",
}
TYPES = ("token", "token_seq", "float", "float_seq")
PARTS = (".train", ".valid", ".test")  # NAME.train.inter: RecBole's own splits.
# Texts, which RecBole takes for sequences of words.
TEXTS = ("title", "description", "text", "features")
BLOCK = 1 << 26  # Bytes read at once.
# A space in a member of a sequence, such as the name of a category.
NO_BREAK_SPACE = "\u00a0"
UNWRITABLE = r"[\t\n\r\x00]"
# What pandas, and so RecBole, takes for a missing value.
MISSING = ("#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
           "NULL", "NaN", "None", "n/a", "nan", "null")  # fmt: skip


def role(path: Path) -> Literal["interactions", "items", "users"]:
    """By the ending of the name.

    Raises:
        ConfigError: It is none of RecBole's three that are read.
    """
    if path.suffix not in ROLES:
        raise ConfigError(f"{path} is no atomic file that genrec reads: {', '.join(ROLES)}. Leave it out.")
    return ROLES[path.suffix]


def folder_files(folder: Path) -> list[Path]:
    """The files of one data set in a folder.

    Raises:
        ConfigError: There is no log, more than one, or nothing but the parts of a split.
    """
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.suffix in ROLES)
    parts = [p for p in files if p.suffix == ".inter" and Path(p.stem).suffix in PARTS]
    files = [p for p in files if p not in parts]
    logs = [p for p in files if p.suffix == ".inter"]
    if len(logs) > 1:
        raise ConfigError(f"{folder} holds several logs: {', '.join(p.name for p in logs)}. Name the files of one.")
    if not logs and parts:
        raise ConfigError(
            f"{folder} holds RecBole's split of a log alone ({', '.join(p.name for p in parts)}). genrec splits "
            "the log itself; to have the parts read as one log, name these files."
        )
    if not logs:
        raise ConfigError(f"{folder} holds no .inter file.")
    return files


def read_recbole(
    logs: Sequence[Path], catalogues: Sequence[Path], people: Sequence[Path], *, all_items: bool = False
) -> Tables:
    """Atomic files as tables; items without interactions are always taken, whatever ``all_items``.

    A ``token_seq`` is a text if its name is one of genrec's texts (title, brand, description, text, features), else a
    list of strings. A ``float`` is int64 where every value is written as a whole number.

    Raises:
        ConfigError: More than one .item or .user file.
        DataError: A header is none, or the log is one of augmented sequences.
    """
    for files in (catalogues, people):
        if len(files) > 1:
            raise ConfigError(f"more than one {files[0].suffix} file: {', '.join(map(str, files))}. Name one.")
    tables = [_read(path, log=True) for path in logs]
    items = _read(catalogues[0], log=False) if catalogues else None
    if items is not None and "title" not in items.columns:
        like = next((c for c in items.columns if c.endswith(("title", "name"))), "NAME")
        say(f"{catalogues[0]} has no column 'title'. If it calls titles otherwise: --item-column title={like}")
    return Tables(
        pl.concat(tables, how="diagonal_relaxed"),
        items,
        _read(people[0], log=False) if people else None,
    )


# Reading


def _header(path: Path, line: str) -> dict[str, str]:
    """Types by names."""
    types: dict[str, str] = {}
    for field in line.split("\t"):
        name, colon, kind = _unquoted_text(field).rpartition(":")
        if not colon or kind not in TYPES:
            raise DataError(
                f"{path}:1 has the field {field[:80]!r}; a header of RecBole is tab-separated and holds name:type, "
                f"the type one of {', '.join(TYPES)}."
            )
        if name in types:
            raise DataError(f"{path}:1 has the column {name!r} twice. Rename one.")
        types[name] = kind
    return types


def _unquoted_text(field: str) -> str:
    return field[1:-1].replace('""', '"') if len(field) > 1 and field[0] == field[-1] == '"' else field


def _read(path: Path, *, log: bool) -> pl.DataFrame:
    """One file. The columns of a log stay text, which ``tables`` parses; others get the types of the header."""
    if not path.is_file():
        raise ConfigError(f"{path} is a folder; name a file.")
    blocks: list[pl.DataFrame] = []
    first = 2
    try:
        with open(path, "rb") as file, bar(f"reads {path.name} (MB)", path.stat().st_size / 1e6) as advance:
            types = _header(path, file.readline().decode("utf-8-sig").rstrip("\r\n"))
            if log and "item_id_list" in types:
                raise DataError(
                    f"{path}:1 has the column 'item_id_list': a row holds a history and its next item, not an event. "
                    "Give the file of events from which it was made."
                )
            while lines := file.readlines(BLOCK):
                data = b"".join(lines)
                blocks.append(_split(data.decode("utf-8"), list(types), first))
                first += len(lines)
                advance(len(data) / 1e6)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.object[error.start]:#x}). Save it as UTF-8.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read as recbole: {error}.") from error
    if not blocks:
        blocks = [_split("", list(types), first)]
    table = pl.concat(blocks).with_columns(pl.lit(str(path)).alias(SOURCE))
    return table if log else _typed(table, types)


def _split(text: str, names: list[str], first: int) -> pl.DataFrame:
    """Lines as columns of text, empty ones null; lines of another number of fields are passed on as unreadable."""
    columns = []
    for name in names:
        field = pl.col(name)
        inner = field.str.slice(1, field.str.len_chars() - 2).str.replace_all('""', "\x00", literal=True)
        quoted = (field.str.len_chars() > 1) & field.str.starts_with('"') & field.str.ends_with('"')
        quoted &= ~inner.str.contains('"', literal=True)
        value = pl.when(quoted).then(inner.str.replace_all("\x00", '"', literal=True)).otherwise(field)
        columns.append(pl.when(value != "").then(value).alias(name))
    return split_lines(text, "\t", names, first).with_columns(columns)


def _typed(table: pl.DataFrame, types: dict[str, str]) -> pl.DataFrame:
    """Columns by the types of the header. A row with a ``float`` that is none is passed on as unreadable."""
    texts = {*TEXT_COLUMNS, *TEXTS} - {"categories"}
    for name, kind in types.items():
        raw = table[name]
        if kind == "token" or name in texts:
            continue
        wrong = None
        if kind == "token_seq":
            value = _members(raw).list.eval(pl.element().str.replace_all(NO_BREAK_SPACE, " ", literal=True))
        elif kind == "float_seq":
            value = _members(raw).list.eval(pl.element().cast(pl.Float64, strict=False))
            wrong = value.list.eval(pl.element().is_null()).list.any()
        elif raw.drop_nulls().len() and raw.drop_nulls().str.contains(r"^-?\d{1,18}$").all():
            value = raw.cast(pl.Int64)
        else:
            value = raw.cast(pl.Float64, strict=False)
            wrong = value.is_null() & raw.is_not_null()
            value = value.fill_nan(None)
        if wrong is not None and wrong.any():
            here = pl.lit(wrong) & pl.col(FAULT).is_null()
            table = table.with_columns(
                pl.when(here)
                .then(pl.lit(f"in the column {name!r} is no {kind}"))
                .otherwise(pl.col(FAULT))
                .alias(FAULT),
                pl.when(here).then(pl.lit(raw)).otherwise(pl.col(VALUE)).alias(VALUE),
            )
        table = table.with_columns(value.alias(name))
    return table


def _members(raw: pl.Series) -> pl.Series:
    """The members of sequences; a missing one is empty, as in RecBole."""
    return raw.fill_null("").str.split(" ").list.eval(pl.element().filter(pl.element() != ""))


# Writing


def export_recbole(data: Dataset, out: str | Path, *, overwrite: bool = False) -> list[str]:
    """Write a data set as the folder of atomic files that RecBole loads with ``dataset=NAME, data_path=PARENT``.

    ``NAME`` is the name of the folder ``out``, and of its files: NAME.inter, NAME.item and, if there are users,
    NAME.user. Numbers become ``float``, texts and lists of strings ``token_seq``, other strings ``token``. Rows keep
    their order; the log has a column ``order`` where its timestamps alone do not tell it: set RecBole's ``TIME_FIELD``
    to it where there are no timestamps. The manifest (what counts as a positive, whether seen items may come again)
    has no place in the files.

    Args:
        data: The data set.
        out: The folder to write.
        overwrite: Whether a folder that is there is replaced.

    Returns:
        What the files cannot carry, in sentences. If there is none, ``read`` gives a data set of the same hash.

    Raises:
        DataError: An id holds a tab or a line break, or two columns would get one name.
        StorageError: ``out`` exists and ``overwrite`` is off, or the operating system refused.
    """
    lost: list[str] = []
    name = Path(out).resolve().name
    files = {
        "inter": _fields(_log(data.interactions), "inter", lost),
        "item": _fields(data.items, "item", lost),
    }
    if data.users is not None:
        files["user"] = _fields(data.users, "user", lost)
    lost += [f".inter {name} comes back where an import names it, --context {name}, and as text."
             for name in data.context_columns]  # fmt: skip
    with new_folder(Path(out), overwrite=overwrite) as folder:
        for ending, table in files.items():
            _write(table, folder / f"{name}.{ending}")
    return lost


def _log(log: pl.DataFrame) -> pl.DataFrame:
    """The log with the columns that are needed to give it back, and numbers as they were read."""
    stamped = log.filter(pl.col("timestamp").is_not_null())
    keys = [c for c in ("user_id", "item_id", "timestamp", "event") if c in log.columns]
    if not stamped.height:
        log = log.drop("timestamp")
    elif not stamped.select(keys).is_duplicated().any():
        log = log.drop("order")
    # 3.7 is 3.7 again as float32, and would be 3.700000047683716 as float64.
    short = [c for c in ("rating", "weight") if c in log.columns]
    names = dict.fromkeys(("user_id", "item_id", "rating", "timestamp", "weight", "event", "order", *log.columns))
    return log.select(c for c in names if c in log.columns).with_columns(pl.col(short).cast(pl.String).cast(pl.Float64))


def _fields(table: pl.DataFrame, ending: str, lost: list[str]) -> pl.DataFrame:
    """Columns of text under names with types, and in ``lost`` what is not as it was."""
    out: dict[str, pl.Series] = {}
    for series in table:
        kind, text, losses = _field(series)
        if series.dtype == pl.String and (series == "").any() and (ending, series.name) != ("item", "title"):
            losses.append("has empty texts, which come back as missing")
        name = series.name
        for sign in (":", "\t", "\n", "\r", '"'):
            name = name.replace(sign, "_")
        if name != series.name:
            losses = [f"is called {name}", *losses]
        if name in {field.rpartition(":")[0] for field in out}:
            raise DataError(f"two columns would be called {name!r} in .{ending}. Rename one: genrec data import.")
        unwritable = text.str.contains(UNWRITABLE)
        if unwritable.any():
            if name in ("user_id", "item_id"):
                found = text.filter(unwritable)[0]
                raise DataError(f"{name} {found!r} holds a tab or a line break, which RecBole's files cannot carry.")
            losses.append("has tabs or line breaks, which become spaces")
            text = text.str.replace_all(UNWRITABLE, " ")
        if name in ("user_id", "item_id") and (missing := text.filter(text.is_in(MISSING))).len():
            say(f"RecBole reads the {name} {missing[0]!r} as a missing value. genrec reads it as it is.")
        lost += [f".{ending} {name} {loss}." for loss in losses]
        mark = text.str.starts_with('"').fill_null(False)
        quoted = '"' + text.str.replace_all('"', '""', literal=True) + '"'
        out[f"{name}:{kind}"] = quoted.zip_with(mark, text).fill_null("")
    return pl.DataFrame(out)


def _field(series: pl.Series) -> tuple[str, pl.Series, list[str]]:
    """The type of a column, its values as text, and what is lost."""
    dtype = series.dtype
    losses: list[str] = []
    if dtype in (pl.Categorical, pl.Enum):
        series = series.cast(pl.String)
        dtype = series.dtype
    if dtype == pl.List(pl.Null):  # Empty lists alone.
        series = series.cast(pl.List(pl.String))
        dtype = series.dtype
    if dtype == pl.Null:
        return "token", series.cast(pl.String), []
    if dtype == pl.String:
        return "token_seq" if series.name in TEXTS else "token", series, losses
    if dtype == pl.Boolean:
        return "float", series.cast(pl.Int8).cast(pl.String), []
    if dtype.is_float():
        return "float", series.cast(pl.Float64).fill_nan(None).cast(pl.String), []
    if dtype.is_integer():
        whole = series.cast(pl.Int64, strict=False)  # 18 digits, which any int64 holds, are read as a whole number.
        if whole.null_count() == series.null_count() and whole.is_between(-(10**18) + 1, 10**18 - 1).all():
            return "float", series.cast(pl.String), []
    if isinstance(dtype, pl.List) and (dtype.inner == pl.String or dtype.inner.is_numeric()):
        if series.null_count():
            losses.append("has missing lists, which come back as empty ones")
        members = series.explode(empty_as_null=False, keep_nulls=False)
        if dtype.inner == pl.String:
            if (members.is_null() | (members == "") | members.str.contains(NO_BREAK_SPACE, literal=True)).any():
                losses.append("has missing or empty members, or no-break spaces, which come back otherwise")
            parts = series.list.eval(pl.element().str.replace_all(" ", NO_BREAK_SPACE, literal=True))
            return "token_seq", parts.list.join(" ", ignore_nulls=True), losses
        if members.is_null().any() or (members.dtype.is_float() and members.is_nan().any()):
            losses.append("has missing members, which are left out")
        parts = series.list.eval(pl.element().cast(pl.Float64).fill_nan(None).cast(pl.String))
        return "float_seq", parts.list.join(" ", ignore_nulls=True), losses
    if dtype.is_nested() or dtype == pl.Object:
        values = [None if v is None else json.dumps(v, ensure_ascii=False, default=str) for v in series.to_list()]
        return "token", pl.Series(series.name, values, dtype=pl.String), [f"holds {dtype}, which becomes text"]
    return "token", series.cast(pl.String), [f"holds {dtype}, which becomes text"]


def _write(table: pl.DataFrame, path: Path) -> None:
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.write("\t".join(table.columns) + "\n")
        for part in table.iter_slices(100_000):
            lines = part.select(pl.concat_str(pl.all(), separator="\t")).to_series()
            file.write("\n".join(lines) + "\n")
