from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from genrec.additions import combine
from genrec.dataset import Dataset
from genrec.errors import DataError


def table(rows: list[tuple[Any, ...]], *columns: str) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=list(columns), orient="row")


def small() -> Dataset:
    log = table(
        [("b", "x", 10), ("a", "y", 10), ("b", "y", 20), ("a", "x", 30)], "user_id", "item_id", "timestamp"
    )  # fmt: skip
    items = pl.DataFrame({"item_id": ["x", "y"], "title": ["X", "Y"], "year": [1990, None], "categories": ["p|q", "p"]})
    return Dataset.from_frames(log, items, name="small")


def write(path: Path, frame: pl.DataFrame) -> Path:
    frame.write_csv(path)
    return path


def test_new_events_come_after_the_old_ones_and_no_old_row_changes(tmp_path: Path) -> None:
    old = small()
    log = table(
        [
            ("c", "z", 5), ("a", "x", 30), ("a", "z", 40), ("b", "x", 20), ("b", "x", 15), ("a", "y", 35),
        ],
        "user", "item_id", "timestamp",
    )  # fmt: skip
    new_items = pl.DataFrame({"item_id": ["z", "y"], "year": [2000, 1991], "colour": ["red", None], "title": ["Z", ""]})
    both, counts = combine(
        old, write(tmp_path / "log.csv", log), write(tmp_path / "items.csv", new_items), columns={"user_id": "user"}
    )
    told = {"interactions": 4, "users": 1, "items": 1, "repeated": 1, "late": 1}
    assert counts == told
    rows = both.interactions.select("user_id", "item_id", "timestamp", "order").rows()
    assert rows == [
        ("b", "x", 10, 0), ("b", "y", 20, 1), ("b", "x", 20, 2), ("a", "y", 10, 0), ("a", "x", 30, 1),
        ("a", "y", 35, 2), ("a", "z", 40, 3), ("c", "z", 5, 0),
    ]  # fmt: skip
    assert both.items.to_dicts() == [
        {"item_id": "x", "title": "X", "year": 1990, "categories": ["p", "q"], "colour": None},
        {"item_id": "y", "title": "Y", "year": 1991, "categories": ["p"], "colour": None},
        {"item_id": "z", "title": "Z", "year": 2000, "categories": [], "colour": "red"},
    ]
    assert both.manifest["counts"]["interactions"] == 8
    assert both.manifest["updates"] == [{"from": old.hash, **told}]
    both.save(tmp_path / "both")
    assert Dataset.load(tmp_path / "both").hash == both.hash


def test_positives_are_those_of_the_old_data_set_and_bad_rows_are_named(tmp_path: Path) -> None:
    names = ("user_id", "item_id", "timestamp", "event")
    log = table([("a", "x", 1, "buy"), ("a", "y", 2, "view"), ("b", "x", 3, "click")], *names)
    items = pl.DataFrame({"item_id": ["x", "y"], "title": ["X", "Y"]})
    old = Dataset.from_frames(log, items, events={"buy": 2.0, "view": 0.5})
    day = table([("a", "x", 5, "buy"), ("a", "x", 6, "click")], *names)
    both, counts = combine(old, write(tmp_path / "day.csv", day))
    assert counts["interactions"] == 1
    assert both.interactions["weight"].to_list() == [2.0, 0.5, 2.0]
    assert (old.summary()["dropped"], both.summary()["dropped"]) == ({"events": 1}, {"events": 2})  # The clicks.
    with pytest.raises(DataError, match=r"no new interactions: none has an event that counts \(buy, view\).*click"):
        combine(old, write(tmp_path / "clicks.csv", day.filter(pl.col("event") == "click")))
    unknown = write(tmp_path / "unknown.csv", table([("a", "q", 5, "buy")], *day.columns))
    with pytest.raises(DataError, match=r"unknown\.csv:2 item_id 'q' is not in the items"):
        combine(old, unknown)
    more = write(tmp_path / "more.csv", table([("a", "q", 5, "buy"), ("a", "x", 6, "buy")], *day.columns))
    both, _ = combine(old, more, on_bad_row="skip")
    assert both.bad_rows["value"].to_list() == ["q"]
    twice = write(tmp_path / "items.csv", pl.DataFrame({"item_id": ["n", "n"]}))
    both, _ = combine(old, more, twice, on_bad_row="skip")
    assert both.manifest["counts"]["bad_rows"] == both.bad_rows.height == 2
    assert both.manifest["source"][-2:] == ["more.csv", "items.csv"]
    with pytest.raises(DataError, match=r"items\.csv:3 item_id 'n' stands in an earlier row too"):
        combine(old, tmp_path / "day.csv", twice)
    with pytest.raises(DataError, match="no column 'user'"):
        combine(old, tmp_path / "day.csv", columns={"user_id": "user"})
    named = write(tmp_path / "named.csv", pl.DataFrame({"item_id": ["n"], "title": ["N"], "year": ["old"]}))
    dated = Dataset.from_frames(log, items.with_columns(year=pl.lit(1990)), events=["buy", "view"])
    with pytest.raises(DataError, match=r"named\.csv: column 'year' is String, and Int32 in the old"):
        combine(dated, tmp_path / "day.csv", named)
    with pytest.raises(DataError, match=r"no new interactions: of 1 read, 1 are in the old log and 0 are older"):
        combine(old, write(tmp_path / "again.csv", log.filter(pl.col("event") == "buy")))


def test_a_catalogue_made_of_a_log_grows_with_the_log(tmp_path: Path) -> None:
    old = Dataset.from_frames(table([("a", "x"), ("a", "y")], "user_id", "item_id"))
    both, counts = combine(old, write(tmp_path / "log.csv", table([("a", "z")], "user_id", "item_id")))
    assert (both.item_ids, counts["items"]) == (["x", "y", "z"], 1)
    assert [both.item_ids[item] for item in both.histories[0]] == ["x", "y", "z"]


def test_users_without_times_get_none_and_missing_times_take_the_last_one(tmp_path: Path) -> None:
    old = Dataset.from_frames(table([("a", "x"), ("b", "y")], "user_id", "item_id"))
    log = write(tmp_path / "log.csv", table([("a", "y", 3), ("b", "y", None)], "user_id", "item_id", "timestamp"))
    assert combine(old, log)[0].interactions["timestamp"].to_list() == [None] * 4
    timed = combine(small(), log)[0]
    assert timed.interactions.filter(pl.col("user_id") == "b")["timestamp"].to_list() == [10, 20, 20]
    assert timed.manifest["filled_timestamps"] == 1


def test_a_title_in_words_is_read_as_an_import_reads_it(tmp_path: Path) -> None:
    (tmp_path / "day.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\na\tz\t40\n")
    (tmp_path / "day.item").write_text("item_id:token\tmovie_title:token_seq\nz\tThe Piano\n")
    both, _ = combine(
        small(), tmp_path / "day.inter", tmp_path / "day.item", format="recbole", item_columns={"title": "movie_title"}
    )
    assert both.items["title"].to_list() == ["X", "Y", "The Piano"]
