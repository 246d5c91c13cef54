"""Who may be recommended what: predicates over item columns become masks, which the decoder applies within the trie."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from genrec.errors import ConfigError, suggestion

Bools = NDArray[np.bool_]

# One part of SQL text in which others do not count, or that Polars might read otherwise than this does.
_PART = re.compile(r"""'(?:[^']|'')*'|"(?:[^"]|"")*"|`[^`]*`|--|/\*|[#$\\]""")
_TIMES = re.compile(r"\b(?:now|current_(?:date|time|timestamp)|localtime(?:stamp)?)\b", re.IGNORECASE)
_QUERY = re.compile(r"\b(?:select|from|with|values|table)\b", re.IGNORECASE)

# Polars takes far more than linear time for long expressions, and overflows its stack at some 50,000 characters.
LONGEST = 4000

_EXAMPLE = "Write one such as \"market = 'DE' and in_stock\", or \"array_contains(tags, 'tea')\" of a column of lists."
_REFUSALS: tuple[Any, ...] = (pl.exceptions.PolarsError, pl.exceptions.PanicException)


def predicate(where: str, items: pl.DataFrame, *, lasting: bool = False) -> Bools:
    """The items for which a predicate holds.

    Args:
        where: A Polars SQL expression over the columns of ``items``, such as ``market = 'DE' and in_stock``. Null is
            no; what reads no column (``true``) holds for all items or none.
        items: n rows.
        lasting: Refuse what holds for others tomorrow, as ``date < now()`` does.

    Returns:
        bool [n].

    Raises:
        ConfigError: It is no text or no expression, reads a column that there is not (the closest one is named), is not
            true or false, is not so for each item (an aggregate, a subquery), or is longer than ``LONGEST`` characters.
    """
    if not isinstance(where, str):
        raise ConfigError(f"where is {where!r}, of type {type(where).__name__}. {_EXAMPLE}")
    if len(where) > LONGEST:
        raise ConfigError(
            f"where is {where[:80]!r} and goes on, {len(where):,} characters in all; {LONGEST:,} are the most. Items "
            "can be named in the columns allowed and blocked of the users, too."
        )
    place = f"where is {where!r}"
    bare = _without_texts(where)
    # A subquery could read files, and would do so while it is parsed.
    if any(name not in items.columns for name in re.findall(r"\b(?:read|scan)_\w+", bare, re.IGNORECASE)):
        raise ConfigError(f"{place}, and items alone can be read. {_EXAMPLE}")
    if lasting and (time := _TIMES.search(bare)) is not None:
        raise ConfigError(f"{place}, and {time[0]} is another time tomorrow. Write the date itself: DATE '2026-01-31'.")
    try:
        expression = pl.sql_expr(where)
    except _REFUSALS as error:
        raise ConfigError(f"{place}, which is no SQL expression: {_first_line(error)}. {_EXAMPLE}") from error
    read = expression.meta.root_names()
    query = "subplan" in str(expression) and _QUERY.search(bare)
    if query or any(name.startswith("_POLARS_TMP_SQL") for name in read):
        raise ConfigError(f"{place}, which holds a subquery. Only the columns of an item are read. {_EXAMPLE}")
    for name in read:
        if name not in items.columns:
            quoted = " A text stands in single quotes." if re.search(f'["`]{re.escape(name)}["`]', where) else ""
            raise ConfigError(f"{place}, and items have no column {name!r}. {suggestion(name, items.columns)}{quoted}")
    try:
        # The optimiser would only lose time here.
        found = items.lazy().select(expression).collect(optimizations=pl.QueryOptFlags.none())
    except _REFUSALS as error:
        raise ConfigError(f"{place}, which items do not answer: {_first_line(error)}. {_EXAMPLE}") from error
    if found.width != 1 or found.dtypes[0] != pl.Boolean:
        raise ConfigError(f"{place}, which is {', '.join(map(str, found.dtypes))} and not true or false. {_EXAMPLE}")
    mask: Bools = found.to_series().fill_null(False).to_numpy()
    if not read and found.height == 1:
        return np.full(items.height, mask[0])
    if found.height != items.height:
        raise ConfigError(
            f"{place}, which has {found.height:,} answers for {items.height:,} items. Leave out what takes all items "
            f"together. {_EXAMPLE}"
        )
    return mask.copy()


def _without_texts(where: str) -> str:
    """SQL with every text in single quotes made empty; as it is where that could be no more than a guess."""
    for part in _PART.finditer(where):
        before = where[part.start() - 1] if part.start() else " "  # E'...' and X'...' have rules of their own.
        if part[0][0] not in "'\"`" or "\\" in part[0] or (part[0][0] == "'" and re.match(r"[\w&]", before)):
            return where
    return _PART.sub(lambda part: "''" if part[0][0] == "'" else part[0], where)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
