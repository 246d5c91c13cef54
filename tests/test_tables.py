from __future__ import annotations

import datetime
import hashlib
from typing import Any

import pandas as pd
import polars as pl
import pytest

from genrec.errors import ConfigError, DataError
from genrec.tables import Checked, add_to_hash, check


def log(*rows: tuple[str, str, int | None]) -> pl.DataFrame:
    schema = {"user_id": pl.String, "item_id": pl.String, "timestamp": pl.Int64}
    return pl.DataFrame(rows, schema=schema, orient="row")


def sequences(data: Checked) -> list[list[str]]:
    """The items of each user in order."""
    return data.interactions.group_by("user_id", maintain_order=True).agg("item_id")["item_id"].to_list()


# From any frame


def test_what_is_no_table() -> None:
    with pytest.raises(DataError, match="interactions is a list; it must be a Polars, pandas or Arrow table"):
        check([("u", "i")])
    with pytest.raises(DataError, match="column 'item_id' holds List"):
        check(pl.DataFrame({"user_id": ["u"], "item_id": [["i"]]}))


def test_a_frame_is_converted_once() -> None:
    calls = []

    def noted(table: pl.DataFrame) -> pl.DataFrame:
        calls.append(table.columns[0])
        return table

    lazy = [
        table.lazy().map_batches(noted, schema=table.schema)
        for table in (
            log(("u", "i", 1)),
            pl.DataFrame({"item_id": ["i"], "title": ["I"]}),
            pl.DataFrame({"age": [3], "user_id": ["u"]}),
        )
    ]
    check(*lazy)
    assert calls == ["user_id", "item_id", "age"]


def test_numeric_ids_become_strings() -> None:
    frame = pd.DataFrame({"user_id": [1, 2, 2], "item_id": [7.0, 8.0, 9.0]})
    data = check(frame)
    assert data.interactions["user_id"].unique(maintain_order=True).to_list() == ["1", "2"]
    assert data.items["item_id"].to_list() == ["7", "8", "9"]
    assert data.facts["order"] == "file"


def test_column_mappings() -> None:
    frame = pl.DataFrame({"customer": ["u"], "sku": ["i"], "ts": [3], "item_id": ["not this one"], "page": ["p"]})
    items = pl.DataFrame({"sku": ["i"], "name": ["Name"], "genre": ["a|b"], "stock": [True]})
    data = check(
        frame,
        items,
        columns={"user_id": "customer", "item_id": "sku", "timestamp": "ts"},
        item_columns={"item_id": "sku", "title": "name", "categories": "genre"},
    )
    assert data.interactions.row(0) == ("u", "i", 3, 0)
    assert data.items.to_dicts() == [{"item_id": "i", "title": "Name", "categories": ["a", "b"], "stock": True}]
    assert data.facts["ignored_columns"] == ["page"]


def test_unknown_columns_name_those_that_exist() -> None:
    frame = pl.DataFrame({"customer": ["u"], "sku": ["i"]})
    with pytest.raises(DataError, match=r"no column 'custmer' \(wanted as 'user_id'\)\. Did you mean 'customer'\?$"):
        check(frame, columns={"user_id": "custmer", "item_id": "sku"})
    with pytest.raises(DataError, match=r"no column 'user_id'\. Known: customer, sku\. Name the right one: columns="):
        check(frame)
    with pytest.raises(
        ConfigError, match=r"columns names 'time', which genrec has no use for.*Did you mean 'timestamp'"
    ):
        check(frame, columns={"time": "sku"})
    with pytest.raises(DataError, match=r"Did you mean 'userId'\? Name the right one: columns={'user_id': \.\.\.}"):
        check(pl.DataFrame({"userId": ["u"], "item_id": ["i"]}))
    with pytest.raises(ConfigError, match="item_columns is given, but no items table"):
        check(log(("u", "i", 1)), item_columns={"title": "name"})


# Bad rows


BAD = pl.DataFrame(
    {
        "user_id": ["u", "", "u", "u", "u", "u", "u", "u", "u"],
        "item_id": ["1", "1", None, "1", "9", "1", "1", "2", "2"],
        "timestamp": ["1", "2", "3", "noon", "5", "1", "1.5e12", "6", "7"],
        "rating": ["5", "5", "5", "5", "5", "5", "5", "good", "nan"],
    }
)
BAD_ITEMS = pl.DataFrame({"item_id": ["1", "2", "1", None], "title": ["One", "Two", "Uno", "None"]})


def test_bad_rows_fail_by_default() -> None:
    with pytest.raises(DataError) as caught:
        check(BAD, BAD_ITEMS)
    text = str(caught.value)
    assert text.startswith("10 malformed rows:\n")
    assert "interactions:2 user_id '' is missing" in text
    assert "interactions:4 timestamp 'noon' is neither a whole number of seconds nor an ISO date" in text
    assert "and 5 more" in text
    assert "on_bad_row='skip'" in text
    assert "--on-bad-row skip" in text


def test_bad_rows_are_set_apart() -> None:
    data = check(BAD, BAD_ITEMS, on_bad_row="skip")
    assert data.bad_rows.select("source", "line", "column", "value").rows() == [
        ("interactions", 2, "user_id", ""),
        ("interactions", 3, "item_id", ""),
        ("interactions", 4, "timestamp", "noon"),
        ("interactions", 5, "item_id", "9"),
        ("interactions", 6, "item_id", "1"),
        ("interactions", 7, "timestamp", "1.5e12"),
        ("interactions", 8, "rating", "good"),
        ("interactions", 9, "rating", "nan"),
        ("items", 4, "item_id", ""),
        ("items", 3, "item_id", "1"),
    ]
    reasons = data.bad_rows["reason"].to_list()
    assert "repeats an earlier row" in reasons[4]
    assert "milliseconds" in reasons[5]
    assert data.interactions.height == 1


def test_one_instant_may_hold_two_events() -> None:
    frame = pl.DataFrame({"user_id": "u", "item_id": "i", "timestamp": [1, 1], "event": ["view", "buy"]})
    assert check(frame).interactions.height == 2
    with pytest.raises(DataError, match="interactions:2 item_id 'i' repeats an earlier row"):
        check(frame.drop("event"))
    # Without a time nobody can tell a repetition from a mistake.
    assert check(frame.drop("event", "timestamp")).interactions.height == 2


def test_rows_that_the_source_puts_in_order_are_no_duplicates() -> None:
    frame = pl.DataFrame({"user_id": "u", "item_id": ["i", "j", "i"], "timestamp": 1, "order": [1, 2, 3]})
    assert sequences(check(frame)) == [["i", "j", "i"]]
    with pytest.raises(DataError, match="interactions:3 item_id 'i' repeats an earlier row"):
        check(frame.with_columns(order=pl.Series([1, 2, 1])))


def test_repeated_events_that_are_dropped_are_no_matter() -> None:
    frame = pl.DataFrame({"user_id": "u", "item_id": "i", "timestamp": 1, "event": ["view", "view", "buy"]})
    for events in (["buy"], {"buy": 2.0}):
        assert check(frame, events=events).interactions["event"].to_list() == ["buy"]
    for chosen in (None, ["buy", "view"]):
        with pytest.raises(DataError, match="interactions:2 item_id 'i' repeats an earlier row"):
            check(frame, events=chosen)


@pytest.mark.parametrize("frame", [log(), log(("u", "", 1))])
def test_empty_log(frame: pl.DataFrame) -> None:
    with pytest.raises(DataError, match="no interactions are left in"):
        check(frame, on_bad_row="skip")


def test_empty_after_filter_says_why() -> None:
    frame = pl.DataFrame({"user_id": ["u"], "item_id": ["i"], "rating": [2]})
    with pytest.raises(DataError, match="1 rows were read, 0 of them malformed, 1 dropped by min_rating"):
        check(frame, min_rating=4)


def test_arguments_out_of_range() -> None:
    frame = log(("u", "i", 1))
    with pytest.raises(ConfigError, match="on_bad_row is 'drop'"):
        check(frame, on_bad_row="drop")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="min_rating is nan"):
        check(frame, min_rating=float("nan"))
    with pytest.raises(DataError, match="min_rating needs a column 'rating'"):
        check(frame, min_rating=4)
    with pytest.raises(DataError, match="events needs a column 'event'"):
        check(frame, events=["buy"])


# Times and order


def test_times_in_many_spellings() -> None:
    texts = [
        "881250949", "881250949.0", " 881250949 ", "1997-12-04", "1997-12-04T15:55:49Z", "1997-12-04 15:55",
        "1997-12-04T17:55:49.25+02:00", "1997-12-04T10:25:49-0530",
    ]  # fmt: skip
    frame = pl.DataFrame({"user_id": [f"u{n}" for n in range(len(texts))], "item_id": "i", "timestamp": texts})
    day, moment = 881193600, 881250949
    expected = [moment, moment, moment, day, moment, moment - 49, moment, moment]
    assert check(frame).interactions["timestamp"].to_list() == expected


@pytest.mark.parametrize("text", ["1997-13-04", "1997-12-04T25:00", "04.12.1997", "1.5", "inf", "1997"])
def test_times_that_are_none(text: str) -> None:
    frame = pl.DataFrame({"user_id": ["u"], "item_id": ["i"], "timestamp": [text]})
    if text == "1997":  # A number, however unlikely a time.
        assert check(frame).interactions["timestamp"].item() == 1997
    else:
        with pytest.raises(DataError, match="is neither a whole number of seconds nor an ISO date"):
            check(frame)


def test_datetimes_and_dates() -> None:
    moment = datetime.datetime(2020, 1, 2, tzinfo=datetime.timezone(datetime.timedelta(hours=1)))
    for value, seconds in ((datetime.date(2020, 1, 2), 1577923200), (moment, 1577923200 - 3600)):
        frame = pl.DataFrame({"user_id": ["u"], "item_id": ["i"], "timestamp": [value]})
        assert check(frame).interactions["timestamp"].item() == seconds
    frame = pd.DataFrame({"user_id": ["u"], "item_id": ["i"], "timestamp": pd.to_datetime(["2020-01-02"])})
    assert check(frame).interactions["timestamp"].item() == 1577923200


def test_milliseconds_are_refused() -> None:
    with pytest.raises(DataError, match=r"looks like milliseconds.*divide by 1000"):
        check(log(("u", "i", 881250949000)))


def test_missing_times_are_filled_within_the_user() -> None:
    data = check(log(("a", "1", None), ("a", "2", 5), ("b", "1", None), ("a", "3", None), ("a", "4", 9)))
    assert data.interactions["timestamp"].to_list() == [5, 5, 5, 9, None]
    assert sequences(data) == [["1", "2", "3", "4"], ["1"]]
    assert data.facts["filled_timestamps"] == 2
    assert data.interactions["timestamp"].null_count() == 1


def test_order_column_and_file_order() -> None:
    frame = pl.DataFrame({"user_id": "u", "item_id": ["a", "b", "c"], "order": [2, 0, 1]})
    ordered, plain = check(frame), check(frame.drop("order"))
    assert (ordered.facts["order"], plain.facts["order"]) == ("order", "file")
    assert sequences(ordered) == [["b", "c", "a"]]
    assert sequences(plain) == [["a", "b", "c"]]
    timed = check(frame.with_columns(timestamp=pl.Series([7, 7, 6])))
    assert sequences(timed) == [["c", "b", "a"]]
    assert (timed.facts["order"], timed.facts["ties"]) == ("timestamp", "order")
    with pytest.raises(DataError, match="interactions:1 order 'x' is not a whole number"):
        check(pl.DataFrame({"user_id": ["u"], "item_id": ["a"], "order": ["x"]}))


# Positives


def test_min_rating() -> None:
    frame = pl.DataFrame({"user_id": "u", "item_id": ["a", "b", "c"], "rating": ["3", "4.5", "5"]})
    data = check(frame, min_rating=4)
    assert sequences(data) == [["b", "c"]]
    assert data.interactions["rating"].to_list() == [4.5, 5.0]
    assert data.facts["dropped"] == {"min_rating": 1}
    tenths = pl.DataFrame({"user_id": "u", "item_id": ["a", "b"], "rating": ["4.1", "4.0"]})
    assert check(tenths, min_rating=4.1).items["item_id"].to_list() == ["a"]


def test_events_and_weights() -> None:
    frame = pl.DataFrame({"user_id": "u", "item_id": ["a", "b", "c"], "event": ["view", "buy", "cart"]})
    chosen = check(frame, events=["buy", "cart"])
    assert sequences(chosen) == [["b", "c"]]
    assert "weight" not in chosen.interactions.columns
    weighted = check(frame, events={"buy": 3, "view": 0.5})
    assert weighted.interactions.select("event", "weight").rows() == [("view", 0.5), ("buy", 3.0)]
    assert weighted.facts["dropped"] == {"events": 1}
    both = check(frame.with_columns(weight=pl.Series([2, None, 1])), events={"buy": 3, "view": 0.5})
    assert both.interactions["weight"].to_list() == [1.0, 3.0]
    with pytest.raises(DataError, match=r"no row has the event 'byu'\. Did you mean 'buy'\?$"):
        check(frame, events=["byu"])
    with pytest.raises(DataError, match=r"no row has the event 'sale'\. Known: buy, cart, view\.$"):
        check(frame, events=["sale"])
    with pytest.raises(ConfigError, match="weight of event 'buy' is -1"):
        check(frame, events={"buy": -1})
    with pytest.raises(ConfigError, match="events is the text 'buy'"):
        check(frame, events="buy")


# Items


def test_items_are_cleaned() -> None:
    items = pl.DataFrame(
        {
            "item_id": ["1", "2", "3"],
            "title": ["  A\n title ", None, "三体 　(2008)"],
            "categories": [[["Beauty", "Hair"], ["Beauty", "Skin "]], [], None],
            "price": [1.5, float("nan"), 2.0],
        }
    )
    data = check(log(("u", "1", 1)), items)
    assert data.items["title"].to_list() == ["A title", "", "三体 (2008)"]
    assert data.items["categories"].to_list() == [["Beauty", "Hair", "Skin"], [], []]
    assert data.items["price"].to_list() == [1.5, None, 2.0]
    text = check(log(("u", "1", 1)), items.with_columns(categories=pl.Series(["a|b| a", "", None])))
    assert text.items["categories"].to_list() == [["a", "b"], [], []]
    mixed = check(log(("u", "1", 1)), items.with_columns(categories=pl.Series([["a|b", None, "a"], [], None])))
    assert mixed.items["categories"].to_list() == [["a", "b"], [], []]


def test_hash_takes_equal_values_as_equal() -> None:
    def digest(series: pl.Series) -> str:
        sha = hashlib.sha256()
        add_to_hash(sha, series)
        return sha.hexdigest()

    day = datetime.date(2020, 1, 2)
    for first, second in (
        (pl.Series([1, None], dtype=pl.Int8), pl.Series([1.0, None])),
        (pl.Series(["a"], dtype=pl.Categorical), pl.Series(["a"])),
        (pl.Series([day]), pl.Series([datetime.datetime(2020, 1, 2)])),
        (pl.Series([0.5], dtype=pl.Float32), pl.Series([0.5])),
        (pl.Series([7], dtype=pl.UInt64), pl.Series([7])),
    ):
        assert digest(first) == digest(second)
    different: list[Any] = [[1], [2], ["1"], [None], [], ["a", "bc"], ["ab", "c"], [["a"], ["b"]], [["a", "b"], []]]
    different += [[0.5], [{"a": 1}], [{"a": 2}], [2**63], [2**63 + 1]]
    assert len({digest(pl.Series(values)) for values in different}) == len(different)


def test_the_catalogue_may_call_its_id_as_the_log_does() -> None:
    sales = pl.DataFrame({"customer": ["a", "a"], "sku": ["x", "y"]})
    columns = {"user_id": "customer", "item_id": "sku"}
    items = pl.DataFrame({"sku": ["x", "y"], "title": ["X", "Y"]})
    users = pl.DataFrame({"customer": ["a"], "age": [3]})
    found = check(sales, items, users, columns=columns)
    assert found.items["item_id"].to_list() == ["x", "y"]
    assert found.users is not None
    assert found.users["user_id"].to_list() == ["a"]
    other = pl.DataFrame({"item_id": ["x", "y"], "sku": ["1", "2"], "title": ["X", "Y"]})
    assert check(sales, other, columns=columns).items["item_id"].to_list() == ["x", "y"]
