"""Additions: what came later, joined to a data set that is there, read and checked as an import is, by its positives.

Nothing here knows of adapters: what training makes of it is ``update``'s.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import polars as pl

from genrec import readers, tables
from genrec.dataset import Dataset
from genrec.errors import DataError


def combine(
    old: Dataset,
    interactions: readers.PathLike | Sequence[readers.PathLike],
    items: readers.PathLike | None = None,
    users: readers.PathLike | None = None,
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    item_columns: Mapping[str, str] | None = None,
    user_columns: Mapping[str, str] | None = None,
    on_bad_row: Literal["fail", "skip"] = "fail",
    name: str | None = None,
) -> tuple[Dataset, dict[str, int]]:
    """A data set with what came later, read and checked as ``readers.import_files`` does, by the same positives.

    Cells of ``items`` and ``users`` replace those of known ones unless they are empty; unknown ones come after them.

    Returns:
        The data set, and counts: ``interactions``, ``users`` and ``items`` that are new, and interactions that were
        left out because they are there already (``repeated``) or older than the user's last old one (``late``).

    Raises:
        ConfigError, DataError: As there, or no new interaction is left.
    """
    read = readers.read(
        (), format=format, interactions=interactions, items=items, users=users,
        columns=columns, item_columns=item_columns, user_columns=user_columns,
    )  # fmt: skip
    catalogue, people, bad = old.items, old.users, [old.bad_rows]
    options: dict[str, Any] = {"log_columns": columns, "on_bad_row": on_bad_row}
    if read.items is not None:
        given, faults = tables.check_entities(read.items, "items", columns=item_columns, **options)
        catalogue = _merged(catalogue, given, "item_id", f"{items}")
        bad.append(faults)
    if read.users is not None:
        given, faults = tables.check_entities(read.users, "users", columns=user_columns, **options)
        people = given if people is None else _merged(people, given, "user_id", f"{users}")
        bad.append(faults)
    positives = old.manifest["positives"]
    events = positives["events"]
    if events is not None:
        # A day may lack an event that counts; the import of everything may not.
        column = (columns or {}).get("event", "event")
        there = set(read.interactions[column].cast(pl.String)) if column in read.interactions.columns else set(events)
        events = {e: w for e, w in events.items() if e in there} if isinstance(events, dict) else [
            e for e in events if e in there
        ]  # fmt: skip
        if not events:
            raise DataError(
                f"no new interactions: none has an event that counts ({', '.join(positives['events'])}); the log has "
                f"{', '.join(sorted(filter(None, there))[:5])}."
            )
    # A catalogue that an import made of a log grows with the log.
    bare = items is None and old.items.columns == ["item_id", "title"] and (old.items["title"] == "").all()
    new = Dataset.from_frames(
        read.interactions, None if bare else catalogue, people,
        columns=columns, min_rating=positives["min_rating"], events=events,
        exclude_seen=old.manifest["exclude_seen"], context=old.context_columns, on_bad_row=on_bad_row,
    )  # fmt: skip
    if bare:
        catalogue = _merged(catalogue, new.items, "item_id", "the log")
    bad.append(new.bad_rows)
    both, left_out = old.append(replace(new, items=catalogue, users=people))
    filled = left_out.pop("filled")
    added = both.interactions.height - old.interactions.height
    counts = {
        "interactions": added,
        "users": len(both.user_ids) - len(old.user_ids),
        "items": both.items.height - old.items.height,
        **left_out,
    }
    if not added:
        raise DataError(
            f"no new interactions: of {new.interactions.height:,} read, {left_out['repeated']:,} are in the old log "
            f"and {left_out['late']:,} are older than the last old event of their user. Give a log with later events."
        )
    manifest = {
        **both.manifest,
        "name": name or old.manifest["name"],
        "source": list(dict.fromkeys([*old.manifest.get("source", []), *_sources(read)])),
        "dropped": dict(Counter(old.manifest.get("dropped")) + Counter(new.manifest.get("dropped"))),
        "filled_timestamps": filled
        + old.manifest.get("filled_timestamps", 0)
        + new.manifest.get("filled_timestamps", 0),
        "updates": [*old.manifest.get("updates", []), {"from": old.hash, **counts}],
    }
    return replace(both, manifest=manifest, bad_rows=pl.concat(bad)).counted(), counts


def _sources(read: readers.Tables) -> list[str]:
    """Names of the files that tables were read from."""
    return [Path(place).name for table in read if table is not None for place in table[tables.SOURCE].unique()]


def _merged(old: pl.DataFrame, new: pl.DataFrame, key: str, where: str) -> pl.DataFrame:
    """``old`` with the cells of ``new`` that are not empty in the place of its own, and unknown rows after it."""
    shared = [c for c in new.columns if c in old.columns]
    for column in shared:
        try:
            new = new.with_columns(pl.col(column).cast(old.schema[column], strict=True))
        except pl.exceptions.PolarsError as error:
            raise DataError(
                f"{where}: column {column!r} is {new.schema[column]}, and {old.schema[column]} in the old data set: "
                f"{str(error).splitlines()[0]}. Write it as before, or under another name."
            ) from error
    known = old.join(new, on=key, how="left", suffix="__new", maintain_order="left")
    cells = []
    for column in shared:
        if column != key:
            cell = pl.col(f"{column}__new")
            kind = old.schema[column]
            empty = cell.list.len() == 0 if isinstance(kind, pl.List) else cell == "" if kind == pl.String else None
            cell = cell if empty is None else pl.when(~empty).then(cell)
            cells.append(pl.coalesce(cell, pl.col(column)).alias(column))
    known = known.with_columns(cells).drop(f"{column}__new" for column in shared if column != key)
    added = new.join(old, on=key, how="anti", maintain_order="left")
    both = pl.concat([known, added], how="diagonal")
    if "categories" in both.columns:
        both = both.with_columns(pl.col("categories").fill_null(pl.Series([[]], dtype=both.schema["categories"])))
    return both
