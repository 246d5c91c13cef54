"""Lists that something else made, such as the recommender that is in production, to be scored beside genrec's own.

One row per place: ``user_id``, ``rank`` (1 is the first) and ``item_id``; further columns, such as ``score``, are not
read. A list is scored as it is: what it holds of the user's history stays in it, what is not in the catalogue keeps its
place and hits nothing, and where a rank is left out, its place is empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from genrec import files, progress
from genrec.dataset import Dataset
from genrec.errors import DataError, suggestion
from genrec.readers import read_table
from genrec.tables import as_ids

COLUMNS = ("user_id", "rank", "item_id")
UNKNOWN = -2  # In a list: a place with an item that is not in the catalogue.


@dataclass(frozen=True, eq=False)
class ForeignLists:
    """What a file of lists says about the test cases.

    Attributes:
        lists: int32 [cases, k] item indices, best first; -1 where nothing stands, ``UNKNOWN`` where an item does that
            the catalogue does not know. The row of a user without a list is all -1.
        told: What the file is and what is odd about it, for the protocol: ``file``, ``sha256``, ``rows``,
            ``users_without_list``, ``users_without_case``, ``unknown_users``, ``unknown_items`` (rows),
            ``rows_beyond_k``, ``places_in_history``, and ``problems``, the first of them by row.
    """

    lists: NDArray[np.int32]
    told: dict[str, Any]


def read_lists(
    path: Path,
    data: Dataset,
    users: NDArray[np.integer],
    histories: Sequence[NDArray[np.integer]],
    k: int,
    *,
    shown: str | None = None,
) -> ForeignLists:
    """Read a file of lists for the test cases.

    Args:
        path: Parquet, CSV or JSON lines.
        data: The data set that the cases are of.
        users: int [cases], the user index of each case.
        histories: Of each case; only to count what a list holds of it.
        k: Places to keep of a list, >= 1.
        shown: What messages and the protocol call the file; ``path`` where it is not given.

    Raises:
        ConfigError: There is no such file, or its name does not tell the format.
        DataError: A column is missing, a value is none, a rank is no whole number from 1 on, a user has a rank twice or
            no first one, or no user of the file has a test case.
    """
    name = shown or str(path)
    table = read_table(path)
    for column in COLUMNS:
        if column not in table.columns:
            raise DataError(
                f"{name}: the column {column!r} is missing. {suggestion(column, table.columns)} A file of lists has "
                "user_id, rank and item_id."
            )
        if table[column].dtype.is_nested() or table[column].dtype == pl.Object:
            raise DataError(
                f"{name}: the column {column!r} holds {table[column].dtype}, where one value is expected. Write a row "
                "per place of a list."
            )
    ranks = table["rank"].cast(pl.Float64, strict=False)
    whole = ranks.is_not_null() & ranks.is_finite() & (ranks == ranks.floor()) & (ranks >= 1)
    given = table.select(
        as_ids(table["user_id"]),
        as_ids(table["item_id"]),
        pl.when(whole).then(ranks).cast(pl.Int64, strict=False).alias("rank"),
    ).with_row_index("row", offset=1)
    for column, bad, reason in (
        ("user_id", pl.col("user_id").is_null(), "is empty. Every row names a user."),
        ("item_id", pl.col("item_id").is_null(), "is empty. Every row names an item."),
        ("rank", pl.col("rank").is_null(), "is no whole number from 1 on. The first place of a list has rank 1."),
        ("rank", ~pl.struct("user_id", "rank").is_first_distinct(), "is there already for this user. Number each list "
         "1, 2, 3 and so on."),
        ("rank", (pl.col("rank") == pl.col("rank").min().over("user_id")) & (pl.col("rank") > 1),
         "is this user's first place. Ranks start at 1."),
    ):  # fmt: skip
        wrong = given.filter(bad)
        if wrong.height:
            row = int(wrong["row"][0])
            more = f" ({wrong.height - 1:,} more rows like this.)" if wrong.height > 1 else ""
            raise DataError(f"{_place(name, row, column, table[column][row - 1])} {reason}{more}")
    places = pl.DataFrame(
        {"user_id": [data.user_ids[user] for user in users], "case": np.arange(len(users))},
        schema={"user_id": pl.String, "case": pl.Int64},
    )
    index = pl.DataFrame({"item_id": data.item_ids, "item": np.arange(len(data.item_ids))})
    everybody = pl.DataFrame({"user_id": data.user_ids, "known": True}, schema={"user_id": pl.String, "known": bool})
    joined = (
        given.join(places, on="user_id", how="left").join(index, on="item_id", how="left")
        .join(everybody, on="user_id", how="left").sort("row")
    )  # fmt: skip
    scored = joined.filter(pl.col("case").is_not_null())
    if scored.is_empty():
        first = None if given.is_empty() else given["user_id"][0]
        raise DataError(
            f"{name}: none of its {given['user_id'].n_unique():,} users has a test case (the first is {first!r}; the "
            f"first test case is of {places['user_id'][0]!r}). Write the user ids of the data set."
        )
    strangers = joined.filter(pl.col("known").is_null())
    unknown = scored.filter(pl.col("item").is_null())
    kept = scored.filter(pl.col("rank") <= k)
    lists = np.full((len(users), k), -1, dtype=np.int32)
    lists[kept["case"].to_numpy(), kept["rank"].to_numpy() - 1] = kept["item"].fill_null(UNKNOWN).to_numpy()
    problems = [
        _place(name, row, column, value) + f" is not in {what}."
        for rows, column, what in ((strangers, "user_id", "the data set"), (unknown, "item_id", "the catalogue"))
        for row, value in rows.select("row", column).head(3).iter_rows()
    ]
    told = {
        "file": name,
        "sha256": files.sha256(path),
        "rows": given.height,
        "users_without_list": len(users) - scored["case"].n_unique(),
        "users_without_case": joined.filter(pl.col("case").is_null() & pl.col("known"))["user_id"].n_unique(),
        "unknown_users": strangers["user_id"].n_unique(),
        "unknown_items": unknown.height,
        "rows_beyond_k": scored.height - kept.height,
        "places": int((lists != -1).sum()),
        "places_in_history": sum(
            int(np.isin(row[row >= 0], history).sum()) for row, history in zip(lists, histories, strict=True)
        ),
        "problems": problems,
    }
    for count, what in (
        (told["users_without_list"], "test users have no list and count as missed"),
        (told["unknown_users"], "users are not in the data set and are left out"),
        (told["unknown_items"], "places hold items that are not in the catalogue and hit nothing"),
        (told["places_in_history"], "places hold items of the user's history; they are left in"),
    ):
        if count:
            progress.say(f"{name}: {count:,} {what}")
    for problem in problems:
        progress.say(problem)
    return ForeignLists(lists, told)


def _place(name: str, row: int, column: str, value: Any) -> str:
    """Where a value stands; rows of data are counted from 1, without a header."""
    return f"{name}: row {row}, column {column}: {value!r}"
