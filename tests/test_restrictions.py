from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genrec.errors import ConfigError
from genrec.restrictions import LONGEST, predicate

ITEMS = pl.DataFrame(
    {
        "item_id": ["a", "b", "c", "d"],
        "market": ["DE", "FR", None, "O'Neil"],
        "in_stock": [True, False, True, None],
        "price": [1.0, 2.5, None, 4.0],
        "categories": [["x", "y"], [], None, ["y"]],
        "Big Name": [1, 2, 3, 4],
        "date": pl.Series(["2024-01-01", "2024-05-01", None, "2025-01-01"]).str.to_date(),
    }
)


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("in_stock", "ac"),
        ("not in_stock", "b"),
        ("market == 'DE' and in_stock", "a"),
        ("market = 'DE' OR price > 2", "abd"),
        ("market IN ('DE', 'FR')", "ab"),
        ("market = 'O''Neil'", "d"),
        ("market IS NULL", "c"),
        ("coalesce(price, 0) < 2", "ac"),
        ("price BETWEEN 2 AND 3", "b"),
        ("price > avg(price)", "d"),
        ("lower(market) LIKE 'd%'", "a"),
        ("array_contains(categories, 'y')", "ad"),
        ('"Big Name" >= 3', "cd"),
        ("date > DATE '2024-02-01'", "bd"),
        ("CASE WHEN price > 2 THEN in_stock ELSE true END", "ac"),
        ("true", "abcd"),
        ("1 = 2", ""),
    ],
)
def test_items_for_which_it_holds(where: str, expected: str) -> None:
    mask = predicate(where, ITEMS)
    assert mask.dtype == np.bool_
    assert "".join(ITEMS["item_id"].filter(pl.Series(mask))) == expected


@given(prices=st.lists(st.one_of(st.none(), st.floats(-5, 5)), min_size=1, max_size=9), bound=st.integers(-5, 5))
def test_null_is_no_on_either_side(prices: list[float | None], bound: int) -> None:
    items = pl.DataFrame({"price": prices}, schema={"price": pl.Float64})
    assert predicate(f"price > {bound}", items).tolist() == [p is not None and p > bound for p in prices]
    assert predicate(f"not price > {bound}", items).tolist() == [p is not None and p <= bound for p in prices]


def test_a_constant_holds_for_an_empty_table_too() -> None:
    assert predicate("true", ITEMS.clear()).tolist() == []
    assert predicate("in_stock", ITEMS.clear()).tolist() == []


def test_the_mask_may_be_changed() -> None:
    predicate("in_stock", ITEMS.with_columns(in_stock=pl.lit(True)))[0] = False


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("", "where is '', which is no SQL expression"),
        ("market =", "where is 'market =', which is no SQL expression: .* Write one such as \"market = 'DE'"),
        ("market = 'DE'; DROP TABLE x", "which is no SQL expression"),
        ("in_stock, price", "which is no SQL expression"),
        ("*", "which is no SQL expression"),
        ("nix(price)", "which is no SQL expression: unsupported function 'nix'"),
        ("mrket = 'DE'", r"items have no column 'mrket'\. Did you mean 'market'\?"),
        ('market = "DE"', r"items have no column 'DE'\..* A text stands in single quotes"),
        ("items.price > 1", "items have no column 'items'"),
        ("price", r"which is Float64 and not true or false\. Write one"),
        ("market", "which is String and not true or false"),
        ("null", "which is Null and not true or false"),
        ("columns('^(price|market)$')", "which is .* and not true or false"),
        ("sum(price) > 1", r"which has 1 answers for 4 items\. Leave out what takes all items together"),
        ("first(in_stock)", "which has 1 answers for 4 items"),
        ("unnest(categories) = 'y'", "which has 5 answers for 4 items"),
        ("market IN (SELECT 'DE')", r"which holds a subquery\. Only the columns of an item are read"),
        ("EXISTS (SELECT 1)", "which holds a subquery"),
        ("price > (SELECT 1)", "which holds a subquery"),
        ("market > 1", "which items do not answer: cannot compare string with numeric type"),
        ("cast(market AS int) > 1", "which items do not answer: conversion from"),
        ("date > '2024-01-01'", "which items do not answer: cannot compare"),
        ("market RLIKE '('", "which items do not answer: regex"),
    ],
)
def test_what_is_no_predicate_is_refused(where: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        predicate(where, ITEMS)


@pytest.mark.parametrize(
    "subquery", ["SELECT * FROM read_csv('{}')", "FROM READ_CSV('{}')", "WITH t AS (FROM scan_csv('{}')) FROM t"]
)
def test_no_file_is_read(subquery: str, tmp_path: Path) -> None:
    """Polars would open it while it parses: a file that is missing is told from one that is not."""
    (tmp_path / "secret.csv").write_text("a\n1\n")
    for name in ("secret.csv", "missing.csv"):
        with pytest.raises(ConfigError, match="and items alone can be read"):
            predicate(f"EXISTS ({subquery.format(tmp_path / name)})", ITEMS)
    with_column = ITEMS.with_columns(read_count=pl.Series([1, 2, 3, 4]))
    assert predicate("read_count > 3", with_column).tolist() == [False, False, False, True]


def test_a_predicate_that_would_overflow_the_parser_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"and goes on, 50,008 characters in all; 4,000 are the most"):
        predicate("in_stock" + " or true  " * 5000, ITEMS)
    with pytest.raises(ConfigError, match="no SQL expression"):
        predicate("(" * 1900 + "in_stock" + ")" * 1900, ITEMS)
    many = " or ".join(["in_stock"] * (LONGEST // 12))
    assert predicate(many, ITEMS).tolist() == predicate("in_stock", ITEMS).tolist()


# What texts and columns may be called, and what must not get past

NAMED = pl.DataFrame(
    {
        "genre": ["read_more", "subplan", "a (select b)", "it's now"],
        "from": [1, 2, 3, 4],
        "it's": [1, 2, 3, 4],
        "date": pl.Series(["2024-01-01", "2024-05-01", None, "2999-01-01"]).str.to_date(),
    }
)


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("genre = 'read_more'", "a"),
        ("genre = 'subplan'", "b"),
        ("genre IN ('subplan', 'scan_csv(x)')", "b"),
        ("genre = 'a (select b)'", "c"),
        ("genre = 'it''s now'", "d"),
        ("genre = 'subplan' or \"it's\" = 3 or genre = 'read_more'", "abc"),
        ('"from" = 1', "a"),
        ("date = DATE '2024-05-01'", "b"),
    ],
)
def test_texts_may_say_anything(where: str, expected: str) -> None:
    for lasting in (False, True):
        assert "".join(np.array(list("abcd"))[predicate(where, NAMED, lasting=lasting)]) == expected


@pytest.mark.parametrize("file", ["secret.csv", "missing.csv"])
@pytest.mark.parametrize(
    "where",
    [
        "genre = E'\\'' or exists (select * from read_csv('{}')) or genre = 'x'",
        "genre = '\\' or exists (select * from read_csv('{}')) or genre = '\\'",
        "genre = 'x' /* ' */ or exists (select * from read_csv('{}')) /* ' */",
        "genre = 'x' -- '\n or exists (select * from read_csv('{}')) -- '",
        "genre = $$'$$ or exists (select * from read_csv('{}')) or genre = $$'$$",
        "\"it's\" = 1 or exists (select * from read_csv('{}')) or \"it's\" = 2",
        "`it's` = 1 or exists (select * from read_csv('{}')) or `it's` = 2",
        "genre = 'x' or exists (select * from \"read_csv\"('{}'))",
        "genre = X'' or exists (select * from read_csv('{}')) or genre = 'x'",
    ],
)
def test_no_quotation_hides_a_file(where: str, file: str, tmp_path: Path) -> None:
    (tmp_path / "secret.csv").write_text("a\n1\n")
    with pytest.raises(ConfigError, match="and items alone can be read"):
        predicate(where.replace("{}", str(tmp_path / file)), NAMED)


@pytest.mark.parametrize(
    "time",
    ["CURRENT_DATE", "current_date()", "NOW()", "now /* */ ()", '"now"()', "CURRENT_TIMESTAMP", "LocalTimestamp",
     "localtime", "current_time"],
)  # fmt: skip
def test_what_holds_for_others_tomorrow_is_refused_where_it_must_last(time: str) -> None:
    where = f"date > {time}"
    with pytest.raises(ConfigError, match=r"is another time tomorrow\. Write the date itself: DATE '2026-01-31'"):
        predicate(where, NAMED, lasting=True)
    if "time" not in time.lower():
        assert predicate(where, NAMED).tolist() == [False, False, False, True]
