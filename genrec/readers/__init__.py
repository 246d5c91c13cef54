"""File formats: what is on disk becomes the tables that ``tables`` checks.

CSV, Parquet and JSON lines (``tabular``), the MovieLens folders (``movielens``), Amazon reviews with their metadata
(``amazon``), and the atomic files of RecBole (``recbole``).

Every row carries where it stands (file and 1-based line, or row for Parquet), so that a malformed value can be named.
A row that cannot be split into columns at all is passed on with its reason, and ``tables`` reports it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import polars as pl

from genrec.dataset import Dataset
from genrec.errors import ConfigError, DataError, suggestion
from genrec.readers import amazon, recbole
from genrec.readers.movielens import FETCHABLE, fetch, read_movielens_1m, read_movielens_32m, read_movielens_100k
from genrec.readers.recbole import export_recbole
from genrec.readers.tabular import FILE_FORMATS, TEXT_COLUMNS, PathLike, Tables, read_file, suffix
from genrec.tables import FAULT, LINE, VALUE

__all__ = [
    "FETCHABLE",
    "FILES_FORMATS",
    "FILE_FORMATS",
    "FOLDER_FORMATS",
    "FORMATS",
    "TEXT_COLUMNS",
    "PathLike",
    "Tables",
    "export_recbole",
    "fetch",
    "import_files",
    "read",
    "read_table",
]


class ReadFiles(Protocol):
    """Logs, catalogues and users tables to tables."""

    def __call__(
        self, logs: Sequence[Path], catalogues: Sequence[Path], people: Sequence[Path], *, all_items: bool = False
    ) -> Tables: ...


class FilesFormat(NamedTuple):
    """A format of several files: which of them is what ("interactions", "items" or "users"), and their reader."""

    role: Callable[[Path], str]
    read: ReadFiles


class FolderFormat(NamedTuple):
    """A format of one folder that is read as a whole: its reader, and the files by which a folder is known for it."""

    read: Callable[[Path], Tables]
    markers: tuple[str, ...]


FOLDER_FORMATS: dict[str, FolderFormat] = {
    "movielens-100k": FolderFormat(read_movielens_100k, ("u.data", "ml-100k.inter")),
    "movielens-1m": FolderFormat(read_movielens_1m, ("ratings.dat",)),
    "movielens-32m": FolderFormat(read_movielens_32m, ("ratings.csv",)),
}
FILES_FORMATS: dict[str, FilesFormat] = {
    "amazon": FilesFormat(amazon.role, amazon.read_amazon),
    "recbole": FilesFormat(recbole.role, recbole.read_recbole),
}
FORMATS = (*FILE_FORMATS, *FOLDER_FORMATS, *FILES_FORMATS)


def read(
    paths: PathLike | Sequence[PathLike] = (),
    *,
    format: str | None = None,
    interactions: PathLike | Sequence[PathLike] | None = None,
    items: PathLike | None = None,
    users: PathLike | None = None,
    columns: Mapping[str, str] | None = None,
    item_columns: Mapping[str, str] | None = None,
    user_columns: Mapping[str, str] | None = None,
    all_items: bool = False,
) -> Tables:
    """Read files into tables, without checking or renaming their columns.

    Args:
        paths: A folder with ``interactions.*`` and, if there are any, ``items.*`` and ``users.*``; a MovieLens folder;
            a folder or files of Amazon reviews or of RecBole; or files, told apart by their names (items…, users…,
            anything else is a log).
        format: One of ``FORMATS``. None goes by the file names, and for Amazon reviews by their first object.
        interactions: The log or logs, whatever their names.
        items: The catalogue, whatever its name.
        users: The users table, whatever its name.
        columns, item_columns, user_columns: Which column of a file is which of genrec's. What is an id or a text there
            stays text where CSV has nothing but numbers in it, and a title that is a list of words becomes one text.
        all_items: Of Amazon's metadata, take the items that no review names too. Other catalogues are taken whole.

    Raises:
        ConfigError: A file is missing or its format unknown, or columns are named where the format has its own.
        DataError: A file is not in its format.
    """
    tables = _read(paths, format, interactions, items, users, (columns, item_columns, user_columns), all_items)
    title = (item_columns or {}).get("title")
    if tables.items is not None and title in tables.items.columns and tables.items[title].dtype == pl.List(pl.String):
        # A sequence of words, as in RecBole's files.
        tables = tables._replace(items=tables.items.with_columns(pl.col(title).list.join(" ")))
    return tables


def _read(
    paths: PathLike | Sequence[PathLike],
    format: str | None,
    interactions: PathLike | Sequence[PathLike] | None,
    items: PathLike | None,
    users: PathLike | None,
    mappings: Sequence[Mapping[str, str] | None],
    all_items: bool,
) -> Tables:
    if format is not None and format not in FORMATS:
        raise ConfigError(f"format {format!r} is unknown. {suggestion(format, FORMATS)}")
    places = _paths(paths)
    logs, catalogues, people = _paths(interactions or ()), _paths(items or ()), _paths(users or ())
    found = format or _recognise([*places, *logs])
    mapped = [pair for mapping in mappings for pair in (mapping or {}).items()]
    text = [*TEXT_COLUMNS, *(theirs for ours, theirs in mapped if ours in TEXT_COLUMNS)]
    if found == "amazon" and mapped:
        raise ConfigError(
            f"{[*places, *logs][0]} holds Amazon reviews, whose columns get genrec's names by themselves. Leave out "
            "the names of columns, or have the files read as they are: --format jsonl."
        )
    if len(places) == 1 and places[0].is_dir():
        folder = places.pop()
        if found in FOLDER_FORMATS:
            if logs or catalogues or people:
                raise ConfigError(f"{folder} is read as {found} as a whole; leave out interactions, items and users.")
            return FOLDER_FORMATS[found].read(folder)
        places = _folder_files(folder, found)
        if not any(_role(p, found) == "interactions" for p in places) and not logs:
            there = sorted(p.name for p in folder.iterdir())
            listed = ", ".join(there[:8]) + (", ..." if len(there) > 8 else "") or "nothing"
            wanted = {"amazon": "no Amazon reviews", "recbole": "no .inter file"}.get(
                found or "", "no interactions.csv, .parquet or .jsonl (also .gz), no known MovieLens files, no Amazon "
                "reviews and no .inter file"
            )  # fmt: skip
            raise ConfigError(f"{folder} holds {wanted}. There: {listed}. Name the files instead.")
    if format in FOLDER_FORMATS:
        raise ConfigError(f"format {format!r} reads one folder; got {', '.join(map(str, places)) or 'none'}.")
    for path in places:
        {"interactions": logs, "items": catalogues, "users": people}[_role(path, found)].append(path)
    if not logs:
        raise ConfigError("no interactions file was named. Name a log, or a folder that holds one.")
    if found in FILES_FORMATS:
        return FILES_FORMATS[found].read(logs, catalogues, people, all_items=all_items)
    for what, files in (("items", catalogues), ("users", people)):
        if len(files) > 1:
            raise ConfigError(f"more than one {what} file: {', '.join(map(str, files))}. Name one.")
    for path in logs if format is None else ():
        if suffix(path) is None and (keys := amazon.examine(path)[1]):
            raise ConfigError(
                f"{path}: its name does not tell the format, and its first object has the keys {', '.join(keys)}, "
                "which are not those of Amazon reviews. If it holds an object a line: --format jsonl."
            )
    tables = [read_file(path, format) for path in logs]
    return Tables(
        tables[0] if len(tables) == 1 else pl.concat(tables, how="diagonal_relaxed"),
        read_file(catalogues[0], format, text=text) if catalogues else None,
        read_file(people[0], format, text=text) if people else None,
    )


def read_table(path: PathLike) -> pl.DataFrame:
    """One CSV, Parquet or JSON lines file as it is; numbers in CSV become numbers, unless in an id or text column.

    Raises:
        ConfigError: The file is missing, or its name does not tell the format.
        DataError: The file is not in its format; names the first line that is none of it.
    """
    (place,) = _paths(path)
    table = read_file(place, None, text=TEXT_COLUMNS)
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
    context: Iterable[str] = (),
    name: str | None = None,
    on_bad_row: Literal["fail", "skip"] = "fail",
    all_items: bool = False,
) -> Dataset:
    """``read``, then ``Dataset.from_frames``: see there for the arguments. ``name`` defaults to the first path's."""
    tables = read(
        paths, format=format, interactions=interactions, items=items, users=users,
        columns=columns, item_columns=item_columns, user_columns=user_columns, all_items=all_items,
    )  # fmt: skip
    if name is None:
        name = [*_paths(paths), *_paths(interactions or ())][0].resolve().name.split(".")[0]
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
        context=context,
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


def _recognise(places: Sequence[Path]) -> str | None:
    """The format of a folder or of files, where it is not that of each file by itself."""
    if len(places) != 1 or not places[0].is_dir():
        if any(path.suffix == ".inter" for path in places):
            return "recbole"
        return "amazon" if any(amazon.examine(path)[0] == "interactions" for path in places) else None
    folder = places[0]
    for name, format in FOLDER_FORMATS.items():
        if any((folder / marker).is_file() for marker in format.markers):
            return name
    return _recognise(sorted(path for path in folder.iterdir() if path.is_file()))


def _folder_files(folder: Path, format: str | None) -> list[Path]:
    """The files of a folder that are read."""
    if format == "recbole":
        return recbole.folder_files(folder)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    if format == "amazon":
        return [path for path in files if amazon.examine(path)[0]]
    return [path for path in files if suffix(path) and path.name.startswith(("items", "users", "interactions"))]


def _role(path: Path, format: str | None) -> str:
    if format in FILES_FORMATS:
        return FILES_FORMATS[format].role(path)
    return next((role for role in ("items", "users") if path.name.startswith(role)), "interactions")
