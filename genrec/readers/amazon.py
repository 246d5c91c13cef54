"""Amazon reviews with their metadata, in the editions of 2014, 2018 and 2023: one object a line, often gzipped.

The editions call the same things by other names (``reviewerID`` and ``asin``, or ``user_id`` and ``parent_asin``), and
the metadata of 2014 are Python literals, not JSON. Which is which shows in the lines, not in the file names. Files may
hold many millions of lines, of which nothing but the columns is kept.

Jianmo Ni, Jiacheng Li, Julian McAuley: Justifying recommendations using distantly-labeled reviews and fine-grained
aspects, EMNLP 2019 (2018 edition). Yupeng Hou et al.: Bridging language and items for retrieval and recommendation,
2024 (2023 edition).
"""

from __future__ import annotations

import ast
import gzip
import html
import json
import re
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import polars as pl

from genrec.errors import ConfigError, DataError
from genrec.progress import bar, say
from genrec.readers.tabular import Tables, column, placed
from genrec.tables import LINE, SOURCE

ENDINGS = (".json", ".jsonl", ".ndjson", ".json.gz", ".jsonl.gz", ".ndjson.gz")
REVIEWS = ("user_id", "item_id", "rating", "timestamp")
ITEMS = ("item_id", "title", "brand", "categories", "price", "description", "features")
BLOCK = 50_000  # Lines that become columns at once.
LOOKED_AT = 100  # Lines in which `examine` looks for one that can be read.

_LITERAL = re.compile(r"\s*\{\s*'")
_LITERAL_ASIN = re.compile(rb"\{'asin': '([^'\\]*)'")
_TAG = re.compile(r"</?[A-Za-z][^<>]*>")
# What was scraped in the place of a title: a script, or the layout around it.
_NO_TITLE = re.compile(r"getTime\b|</?(?:div|img|script|span|style|table)\b|function\s*\(")
_PRICE = re.compile(r"\$?\s*(\d[\d,]*(?:\.\d+)?)$")


def examine(path: Path) -> tuple[Literal["interactions", "items"] | None, list[str]]:
    """What a file holds by the keys of its first object, reviews or metadata; and these keys."""
    if path.is_file() and path.name.lower().endswith(ENDINGS):
        try:
            for number, line in _lines(path):
                row, fault, _ = _parse(line)
                if fault is None:
                    if {"reviewerID", "asin"} <= row.keys() or {"user_id", "parent_asin"} <= row.keys():
                        return "interactions", list(row)
                    known = row.keys() & {"asin", "parent_asin"} and "item_id" not in row
                    return "items" if known else None, list(row)
                if number >= LOOKED_AT:
                    break
        except (OSError, EOFError, zlib.error):
            pass  # Reading the file says what is wrong with it.
    return None, []


def role(path: Path) -> Literal["interactions", "items"]:
    """Reviews or metadata.

    Raises:
        DataError: The first object in the file is neither.
    """
    found, keys = examine(path)
    if found is None:
        first = f"its first object has the keys {', '.join(keys)}" if keys else "no object was found in its first lines"
        raise DataError(
            f"{path} is no file of Amazon reviews: {first}. Reviews have reviewerID and asin (2014, 2018) or user_id "
            "and parent_asin (2023), metadata have asin or parent_asin. Name another file, or another --format."
        )
    return found


def read_amazon(
    logs: Sequence[Path], catalogues: Sequence[Path], people: Sequence[Path], *, all_items: bool = False
) -> Tables:
    """Reviews as interactions, metadata as items.

    Of the metadata those items are taken that a review names, unless ``all_items``: the catalogue of a category is
    many times as large. An item without metadata has an empty title. Timestamps of 2023, in milliseconds, become
    seconds; HTML is taken out of texts, and a title that is none (a script, a layout) is empty. Columns of items:
    title, brand (2023: the store), categories, price (float64, where it is one number), description, features.

    Raises:
        ConfigError: There is a users table, which these data do not have.
        DataError: A file is damaged or empty.
    """
    if people:
        raise ConfigError(f"Amazon reviews have no users table; leave out {people[0]}.")
    log = pl.concat([_table(path, None, None) for path in logs], how="diagonal_relaxed")
    if not catalogues:
        return Tables(log)
    named = log.select(pl.col("item_id").cast(pl.String), SOURCE, LINE).drop_nulls("item_id")
    named = named.unique("item_id", keep="first", maintain_order=True)
    used = None if all_items else set(named["item_id"])
    items = pl.concat([_table(path, ITEMS, used) for path in catalogues], how="diagonal_relaxed")
    items = items.with_columns(pl.col("item_id").cast(pl.String))
    bare = named.join(items.select("item_id"), on="item_id", how="anti", maintain_order="left")
    if bare.height:
        say(f"{bare.height:,} of {named.height:,} items have no metadata; they are kept with an empty title.")
    items = pl.concat([items, bare], how="diagonal_relaxed")
    optional = [c for c in ITEMS if c not in ("item_id", "title") and items[c].null_count() == items.height]
    return Tables(log, items.drop(optional))


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their numbers; gzip or not."""
    zipped = path.name.lower().endswith(".gz")
    with (
        open(path, "rb") as raw,
        gzip.GzipFile(fileobj=raw) if zipped else nullcontext(raw) as file,
        bar(f"reads {path.name} (MB)", path.stat().st_size / 1e6) as advance,
    ):
        told = 0
        for number, line in enumerate(file, start=1):
            if number % 5_000 == 0:
                place = raw.tell()  # Of the compressed bytes, whose number is known beforehand.
                advance((place - told) / 1e6)
                told = place
            if line.strip():
                yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _parse(line: bytes) -> tuple[dict[str, Any], str | None, str]:
    """The object of a line, or why it is none; and the text of the line."""
    try:
        text = line.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        return {}, f"is not UTF-8 text (byte {error.object[error.start]:#x})", line.decode("utf-8", "replace").strip()
    literal = _LITERAL.match(text) is not None
    try:
        row = ast.literal_eval(text) if literal else json.loads(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        return {}, f"is {'no Python literal' if literal else 'not JSON'} ({reason})", text
    return (row, None, text) if isinstance(row, dict) else ({}, "is no object", text)


def _table(path: Path, names: Sequence[str] | None, used: set[str] | None) -> pl.DataFrame:
    """The columns REVIEWS of a file, or those of ``names``, with the place of every row.

    Args:
        path: A file of reviews, or with ``names`` one of metadata.
        names: None or ITEMS.
        used: Items to take, None for all.
    """
    blocks: list[pl.DataFrame] = []
    rows: list[tuple[Any, ...]] = []
    width = len(names or REVIEWS)
    types: dict[str, Any] = {"categories": pl.List(pl.String), "price": pl.Float64}

    def flush() -> None:
        *values, lines, faults, texts = zip(*rows, strict=True)
        columns = zip(names or REVIEWS, values, strict=True)
        table = pl.DataFrame([pl.Series(n, v, types[n]) if n in types else column(n, list(v)) for n, v in columns])
        blocks.append(placed(table, path, pl.Series(lines, dtype=pl.Int64), list(faults), list(texts)))
        rows.clear()

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Of the compiler, about a backslash in a literal.
            for number, line in _lines(path):
                if (
                    used is not None
                    and (asin := _LITERAL_ASIN.match(line))
                    and asin[1].decode("utf-8", "replace") not in used
                ):
                    continue  # A literal costs a hundred times what JSON does.
                row, fault, text = _parse(line)
                if fault is not None:
                    rows.append((*[None] * width, number, fault, text))
                elif names is None:
                    rows.append((*_review(row), number, None, None))
                else:
                    item = _item(row)
                    if used is None or item[0] is None or item[0] in used:
                        rows.append((*item, number, None, None))
                if len(rows) >= BLOCK:
                    flush()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read as Amazon reviews: {error}.") from error
    if rows:
        flush()
    if not blocks:
        empty = {name: types.get(name, pl.String) for name in names or REVIEWS}
        if names is None:
            raise DataError(f"{path} is empty.")
        return placed(pl.DataFrame(schema=empty), path, pl.Series([], dtype=pl.Int64), [], [])
    return pl.concat(blocks, how="diagonal_relaxed")


def _review(row: dict[str, Any]) -> tuple[Any, ...]:
    """The values of REVIEWS, as they stand but for the unit of time; ``tables`` checks them."""
    if "reviewerID" in row:
        return _id(row.get("reviewerID")), _id(row.get("asin")), row.get("overall"), row.get("unixReviewTime")
    when = row.get("timestamp")
    if isinstance(when, int):
        when //= 1000
    return _id(row.get("user_id")), _id(row.get("parent_asin")), row.get("rating"), when


def _item(row: dict[str, Any]) -> tuple[Any, ...]:
    """The values of ITEMS."""
    title = " ".join(_strings(row.get("title")))
    path = row.get("categories") or row.get("category") or row.get("main_category") or row.get("main_cat")
    categories = [_clean(name) for name in _strings(path) if not _NO_TITLE.search(name)]
    return (
        _id(row.get("parent_asin", row.get("asin"))),
        "" if _NO_TITLE.search(html.unescape(title)) else _clean(title),
        _text(row.get("store") if "parent_asin" in row else row.get("brand")),
        [name for name in categories if name] or None,
        _price(row.get("price")),
        _text(row.get("description")),
        _text(row.get("features", row.get("feature"))),
    )


def _id(value: Any) -> str | None:
    return _valid(str(value)) if isinstance(value, str | int) and value != "" else None


def _valid(text: str) -> str:
    """Without halves of surrogate pairs, which JSON can write and UTF-8 cannot."""
    return text if text.isascii() else text.encode("utf-8", "ignore").decode("utf-8")


def _strings(value: Any) -> list[str]:
    """The strings of a string or of a list of any depth."""
    if isinstance(value, list | tuple):
        return [text for part in value for text in _strings(part)]
    return [value] if isinstance(value, str) else []


def _clean(text: str) -> str:
    """Entities decoded, tags and doubled white space taken out."""
    return " ".join(_TAG.sub(" ", html.unescape(_valid(text))).split())


def _text(value: Any) -> str | None:
    """The clean text of a string or a list of them; None where there is none, or a script."""
    parts = [_clean(part) for part in _strings(value) if "getTime" not in part]
    return " ".join(part for part in parts if part) or None


def _price(value: Any) -> float | None:
    """A number, or a text such as "$1,299.00"; None for a range, a layout or nothing."""
    if isinstance(value, int | float):
        return float(value)
    match = _PRICE.match(value.strip()) if isinstance(value, str) else None
    return float(match[1].replace(",", "")) if match else None
