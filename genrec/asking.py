"""What a recommender is asked, read and checked: histories, rows of users and contexts, numbers, data frames."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np
import polars as pl

from genrec import tables
from genrec.decoding import MAX_BEAMS
from genrec.errors import ConfigError, DataError
from genrec.prompts import Prompt

History = Sequence[str]
Row = Mapping[str, Any]  # Columns of a user or of a context, by name.
Rows = Sequence[Row | None]


def counted(count: int, one: str, many: str) -> str:
    """The number and its noun: "1 history", "2 histories"."""
    return f"{count:,} {one if count == 1 else many}"


def whole(value: Any, what: str) -> int:
    """``value``, an integer of Python or NumPy. Raises ConfigError for anything else, naming ``what`` it is."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ConfigError(f"{what} is {value!r}, of type {type(value).__name__}. It takes a whole number, such as 10.")
    return int(value)


def listed(given: Any, what: str, ids: str = "item ids") -> list[Any]:
    """The values of a list, an array or a column, in their order.

    Args:
        given: What the caller gave.
        what: Its name in messages.
        ids: What it holds.

    Raises:
        ConfigError: A text, a table, something without an order, or no list at all.
    """
    kind = type(given).__name__
    if kind in ("DataFrame", "LazyFrame", "Table", "RecordBatch"):
        raise ConfigError(f"{what} is a {kind}. A table goes to recommend_frame.")
    if isinstance(given, str):
        raise ConfigError(f"a list of {ids} is wanted, found the text {given!r}. Write [{given!r}].")
    if isinstance(given, Set | Mapping):
        raise ConfigError(f"{what} is a {kind}, which keeps no order. It takes a list of {ids}.")
    try:
        return list(given)
    except TypeError:
        raise ConfigError(f"{what} is {given!r}. It takes a list of {ids}.") from None


def histories_of(given: Any) -> tuple[Sequence[History], bool]:
    """Histories, and whether ``given`` was but one of them: a list of ids rather than a list of lists.

    Raises:
        ConfigError: It is neither, or a history is nothing that ``listed`` takes.
    """
    values = listed(given, "histories")
    lists = [not isinstance(value, str) and isinstance(value, Iterable) for value in values]
    if values and not any(lists):
        return [values], True
    if not all(lists):
        raise ConfigError(
            "recommend takes a history, which is a list of item ids, or a list of histories: recommend([id, id]) or "
            f"recommend([[id, id], [id]]). Found both, such as {values[lists.index(False)]!r} beside a list."
        )
    return [listed(value, "a history") for value in values], False


def one_each(told: Any, what: str, count: int) -> Sequence[Mapping[str, Any] | None]:
    """``told``, a mapping or None for each of ``count`` histories; a mapping alone is that of the only one.

    Raises:
        ConfigError: Anything else, or of another number.
    """
    if told is None:
        return [None] * count
    rows = [told] if isinstance(told, Mapping) else told
    wanted = "a mapping of columns or None per history, such as [{'name': 'value'}, None]"
    if isinstance(rows, str) or not isinstance(rows, Sequence):
        raise ConfigError(f"{what} is {told!r}. It takes {wanted}.")
    for row in rows:
        if row is not None and not isinstance(row, Mapping):
            raise ConfigError(f"{what} holds {row!r}. It takes {wanted}.")
    if len(rows) != count:
        found = f"{counted(count, 'history', 'histories')} and {counted(len(rows), 'row', 'rows')} of {what}"
        raise ConfigError(f"{found} were given; it takes one per history.")
    return rows


def beams_for(k: int, num_beams: int | None) -> int:
    """The number of beams of a search for ``k`` items: ``num_beams``, or ``max(50, 2 * k)`` where it is None.

    Raises:
        ConfigError: ``k`` or ``num_beams`` out of range, or no whole number.
    """
    if not 1 <= whole(k, "k") <= MAX_BEAMS:
        raise ConfigError(f"k is {k}. It is at least 1 and at most {MAX_BEAMS}.")
    beams = min(max(50, 2 * k), MAX_BEAMS) if num_beams is None else whole(num_beams, "num_beams")
    if beams < k:
        raise ConfigError(f"num_beams is {beams}, below k, which is {k}. Leave it out, or raise it.")
    return beams


def read_frame(
    table: pl.DataFrame, prompt: Prompt
) -> tuple[pl.Series, Sequence[History] | None, Rows | None, Rows | None]:
    """What ``Recommender.recommend_frame`` takes, of a Polars table.

    Returns:
        A column that names the rows: ``user_id``, or ``row``, counted from 0; the histories, None where users of a data
        set are named alone; and what the table tells of users and of contexts, each None where it tells nothing.

    Raises:
        DataError: A column is missing, or is of another type.
    """
    read = sorted(prompt.reads["user"] & {*table.columns})
    users: Rows | None = table.select(read).to_dicts() if read else None
    named = "user_id" in table.columns
    ids = tables.as_ids(table["user_id"]) if named else pl.Series("row", range(len(table)), dtype=pl.Int64)
    given = contexts = None
    if "history" in table.columns:
        kind = table.schema["history"]
        if not isinstance(kind, pl.List | pl.Array):
            raise DataError(f"users: column history is {kind}; it takes lists of item ids.")
        for problem in prompt.check(user_columns=table.columns):
            raise DataError(f"the users do not fit prompt {prompt.name}, {problem}")
        given = [history or [] for history in table["history"].cast(pl.List(pl.String)).to_list()]
    elif not named:
        raise DataError(f"users: no column 'history' and no 'user_id'; it has {', '.join(table.columns)}.")
    if "context" in table.columns and table.schema["context"] != pl.Null:  # That is one of no values at all.
        if not isinstance(table.schema["context"], pl.Struct):
            raise DataError(f"users: column context is {table.schema['context']}; it takes structs.")
        contexts = table["context"].to_list()
    return ids, given, users, contexts
