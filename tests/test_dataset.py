from __future__ import annotations

import datetime
import json
import resource
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.dataset import Cases, Dataset, Split, histories_hash
from genrec.errors import ConfigError, DataError, LeakError, StorageError

# Arbitrary logs: (user, item, timestamp or None); repeated rows are left out, as they would be refused.
EVENTS = st.lists(
    st.tuples(
        st.integers(0, 5).map(lambda n: f"u{n}"),
        st.integers(0, 7).map(lambda n: f"i{n}"),
        st.one_of(st.none(), st.integers(0, 12)),
    ),
    min_size=1,
    max_size=60,
    unique=True,
)


def log(*rows: tuple[str, str, int | None]) -> pl.DataFrame:
    schema = {"user_id": pl.String, "item_id": pl.String, "timestamp": pl.Int64}
    return pl.DataFrame(rows, schema=schema, orient="row")


def names(data: Dataset, history: np.ndarray) -> list[str]:
    return [data.item_ids[item] for item in history]


@pytest.fixture
def shop() -> Dataset:
    """Three users with 5, 3 and 2 events; user c is too short to be tested."""
    interactions = log(
        ("a", "1", 10), ("b", "2", 15), ("a", "2", 20), ("a", "3", 30), ("b", "3", 35),
        ("a", "4", 40), ("c", "1", 45), ("a", "1", 50), ("b", "4", 60), ("c", "2", 70),
    )  # fmt: skip
    items = pl.DataFrame({"item_id": ["1", "2", "3", "4", "5"], "title": ["One", "Two", None, "四", "Five"]})
    return Dataset.from_frames(interactions, items, name="shop")


# From frames


def test_sorted_by_first_appearance_and_time() -> None:
    data = Dataset.from_frames(log(("b", "x", 5), ("a", "y", 1), ("b", "z", 3), ("b", "y", 3)))
    assert data.user_ids == ["b", "a"]
    assert data.item_ids == ["x", "y", "z"]
    assert [names(data, h) for h in data.histories] == [["z", "y", "x"], ["y"]]
    assert data.interactions["order"].to_list() == [0, 1, 2, 0]
    assert data.interactions.schema == {
        "user_id": pl.String, "item_id": pl.String, "timestamp": pl.Int64, "order": pl.Int32,
    }  # fmt: skip
    assert all(h.dtype == np.int32 for h in data.histories)
    assert data.manifest["order"] == "timestamp"
    assert data.manifest["ties"] == "file"
    assert data.items["title"].to_list() == ["", "", ""]


def test_polars_pandas_and_arrow_alike() -> None:
    columns: dict[str, list[Any]] = {
        "user_id": ["1", "1", "2"], "item_id": ["10", "11", "10"], "timestamp": [5, 6, 7], "rating": [1.0, 2.5, 3.0]
    }  # fmt: skip
    items: dict[str, list[Any]] = {
        "item_id": ["10", "11"], "title": ["红楼梦", None], "year": [1995, None], "categories": [["a", "b"], ["b"]]
    }  # fmt: skip
    users: dict[str, list[Any]] = {"user_id": ["1", "2"], "age": [30, None]}
    data = [
        Dataset.from_frames(pl.DataFrame(columns), pl.DataFrame(items), pl.DataFrame(users)),
        Dataset.from_frames(pd.DataFrame(columns), pd.DataFrame(items), pd.DataFrame(users)),
        Dataset.from_frames(pa.table(columns), pa.table(items), pa.table(users)),
        Dataset.from_frames(pl.DataFrame(columns).lazy(), pl.DataFrame(items).lazy(), pl.DataFrame(users).lazy()),
    ]
    assert len({d.hash for d in data}) == 1
    for d in data:
        assert d.items["title"].to_list() == ["红楼梦", ""]
        assert d.items["year"].to_list() == [1995, None]
        assert d.items["year"].dtype == pl.Int64
        assert d.user_rows == [{"user_id": "1", "age": 30}, {"user_id": "2", "age": None}]


def test_numeric_ids_become_strings() -> None:
    frame = pd.DataFrame({"user_id": [1, 2, 2], "item_id": [7.0, 8.0, 9.0]})
    data = Dataset.from_frames(frame)
    assert data.user_ids == ["1", "2"]
    assert data.item_ids == ["7", "8", "9"]
    assert data.manifest["order"] == "file"


def test_what_is_no_table() -> None:
    with pytest.raises(DataError, match="interactions is a list; it must be a Polars, pandas or Arrow table"):
        Dataset.from_frames([("u", "i")])
    with pytest.raises(DataError, match="column 'item_id' holds List"):
        Dataset.from_frames(pl.DataFrame({"user_id": ["u"], "item_id": [["i"]]}))


def test_column_mappings() -> None:
    frame = pl.DataFrame({"customer": ["u"], "sku": ["i"], "ts": [3], "item_id": ["not this one"], "page": ["p"]})
    items = pl.DataFrame({"sku": ["i"], "name": ["Name"], "genre": ["a|b"], "stock": [True]})
    data = Dataset.from_frames(
        frame,
        items,
        columns={"user_id": "customer", "item_id": "sku", "timestamp": "ts"},
        item_columns={"item_id": "sku", "title": "name", "categories": "genre"},
    )
    assert data.interactions.row(0) == ("u", "i", 3, 0)
    assert data.items.to_dicts() == [{"item_id": "i", "title": "Name", "categories": ["a", "b"], "stock": True}]
    assert data.manifest["ignored_columns"] == ["page"]


def test_unknown_columns_name_those_that_exist() -> None:
    frame = pl.DataFrame({"customer": ["u"], "sku": ["i"]})
    with pytest.raises(DataError, match=r"no column 'custmer'.*it has: customer, sku\. Did you mean 'customer'"):
        Dataset.from_frames(frame, columns={"user_id": "custmer", "item_id": "sku"})
    with pytest.raises(DataError, match=r"no column 'user_id'; it has: customer, sku"):
        Dataset.from_frames(frame)
    with pytest.raises(ConfigError, match="columns names 'time', which genrec has no use for"):
        Dataset.from_frames(frame, columns={"time": "sku"})
    with pytest.raises(DataError, match=r"Did you mean 'userId'\? Name the right one: columns={'user_id': \.\.\.}"):
        Dataset.from_frames(pl.DataFrame({"userId": ["u"], "item_id": ["i"]}))
    with pytest.raises(ConfigError, match="item_columns is given, but no items table"):
        Dataset.from_frames(log(("u", "i", 1)), item_columns={"title": "name"})


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
        Dataset.from_frames(BAD, BAD_ITEMS)
    text = str(caught.value)
    assert text.startswith("10 malformed rows:\n")
    assert "interactions:2 user_id '' is missing" in text
    assert "interactions:4 timestamp 'noon' is neither a whole number of seconds nor an ISO date" in text
    assert "and 5 more" in text
    assert "on_bad_row='skip'" in text
    assert "--on-bad-row skip" in text


def test_bad_rows_skipped_counted_and_saved(tmp_path: Path) -> None:
    data = Dataset.from_frames(BAD, BAD_ITEMS, on_bad_row="skip")
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
    assert data.manifest["counts"]["bad_rows"] == data.summary()["bad_rows"] == 10
    data.save(tmp_path / "d")
    assert Dataset.load(tmp_path / "d").bad_rows.equals(data.bad_rows)


def test_one_instant_may_hold_two_events() -> None:
    frame = pl.DataFrame({"user_id": "u", "item_id": "i", "timestamp": [1, 1], "event": ["view", "buy"]})
    assert Dataset.from_frames(frame).interactions.height == 2
    with pytest.raises(DataError, match="interactions:2 item_id 'i' repeats an earlier row"):
        Dataset.from_frames(frame.drop("event"))
    # Without a time nobody can tell a repetition from a mistake.
    assert Dataset.from_frames(frame.drop("event", "timestamp")).summary()["repeated_items"] == 1


@pytest.mark.parametrize("frame", [log(), log(("u", "", 1))])
def test_empty_log(frame: pl.DataFrame) -> None:
    with pytest.raises(DataError, match="no interactions are left in"):
        Dataset.from_frames(frame, on_bad_row="skip")


def test_empty_after_filter_says_why() -> None:
    frame = pl.DataFrame({"user_id": ["u"], "item_id": ["i"], "rating": [2]})
    with pytest.raises(DataError, match="1 rows were read, 0 of them malformed, 1 dropped by min_rating"):
        Dataset.from_frames(frame, min_rating=4)


def test_arguments_out_of_range() -> None:
    frame = log(("u", "i", 1))
    with pytest.raises(ConfigError, match="on_bad_row is 'drop'"):
        Dataset.from_frames(frame, on_bad_row="drop")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="min_rating is nan"):
        Dataset.from_frames(frame, min_rating=float("nan"))
    with pytest.raises(DataError, match="min_rating needs a column 'rating'"):
        Dataset.from_frames(frame, min_rating=4)
    with pytest.raises(DataError, match="events needs a column 'event'"):
        Dataset.from_frames(frame, events=["buy"])


# Times and order


def test_times_in_many_spellings() -> None:
    texts = [
        "881250949", "881250949.0", " 881250949 ", "1997-12-04", "1997-12-04T15:55:49Z", "1997-12-04 15:55",
        "1997-12-04T17:55:49.25+02:00", "1997-12-04T10:25:49-0530",
    ]  # fmt: skip
    frame = pl.DataFrame({"user_id": [f"u{n}" for n in range(len(texts))], "item_id": "i", "timestamp": texts})
    day, moment = 881193600, 881250949
    expected = [moment, moment, moment, day, moment, moment - 49, moment, moment]
    assert Dataset.from_frames(frame).interactions["timestamp"].to_list() == expected


@pytest.mark.parametrize("text", ["1997-13-04", "1997-12-04T25:00", "04.12.1997", "1.5", "inf", "1997"])
def test_times_that_are_none(text: str) -> None:
    frame = pl.DataFrame({"user_id": ["u"], "item_id": ["i"], "timestamp": [text]})
    if text == "1997":  # A number, however unlikely a time.
        assert Dataset.from_frames(frame).interactions["timestamp"].item() == 1997
    else:
        with pytest.raises(DataError, match="is neither a whole number of seconds nor an ISO date"):
            Dataset.from_frames(frame)


def test_datetimes_and_dates() -> None:
    moment = datetime.datetime(2020, 1, 2, tzinfo=datetime.timezone(datetime.timedelta(hours=1)))
    for value, seconds in ((datetime.date(2020, 1, 2), 1577923200), (moment, 1577923200 - 3600)):
        frame = pl.DataFrame({"user_id": ["u"], "item_id": ["i"], "timestamp": [value]})
        assert Dataset.from_frames(frame).interactions["timestamp"].item() == seconds
    frame = pd.DataFrame({"user_id": ["u"], "item_id": ["i"], "timestamp": pd.to_datetime(["2020-01-02"])})
    assert Dataset.from_frames(frame).interactions["timestamp"].item() == 1577923200


def test_milliseconds_are_refused() -> None:
    with pytest.raises(DataError, match=r"looks like milliseconds.*divide by 1000"):
        Dataset.from_frames(log(("u", "i", 881250949000)))


def test_missing_times_are_filled_within_the_user() -> None:
    data = Dataset.from_frames(log(("a", "1", None), ("a", "2", 5), ("b", "1", None), ("a", "3", None), ("a", "4", 9)))
    assert data.interactions["timestamp"].to_list() == [5, 5, 5, 9, None]
    assert [names(data, h) for h in data.histories] == [["1", "2", "3", "4"], ["1"]]
    assert data.manifest["filled_timestamps"] == 2
    assert data.summary()["missing_timestamps"] == 1


def test_order_column_and_file_order() -> None:
    frame = pl.DataFrame({"user_id": "u", "item_id": ["a", "b", "c"], "order": [2, 0, 1]})
    ordered, plain = Dataset.from_frames(frame), Dataset.from_frames(frame.drop("order"))
    assert (ordered.manifest["order"], plain.manifest["order"]) == ("order", "file")
    assert names(ordered, ordered.histories[0]) == ["b", "c", "a"]
    assert names(plain, plain.histories[0]) == ["a", "b", "c"]
    timed = Dataset.from_frames(frame.with_columns(timestamp=pl.Series([7, 7, 6])))
    assert names(timed, timed.histories[0]) == ["c", "b", "a"]
    assert (timed.manifest["order"], timed.manifest["ties"]) == ("timestamp", "order")
    with pytest.raises(DataError, match="interactions:1 order 'x' is not a whole number"):
        Dataset.from_frames(pl.DataFrame({"user_id": ["u"], "item_id": ["a"], "order": ["x"]}))


# Positives


def test_min_rating() -> None:
    frame = pl.DataFrame({"user_id": "u", "item_id": ["a", "b", "c"], "rating": ["3", "4.5", "5"]})
    data = Dataset.from_frames(frame, min_rating=4)
    assert names(data, data.histories[0]) == ["b", "c"]
    assert data.interactions["rating"].to_list() == [4.5, 5.0]
    assert data.manifest["positives"]["min_rating"] == 4
    assert data.manifest["dropped"] == {"min_rating": 1}
    tenths = pl.DataFrame({"user_id": "u", "item_id": ["a", "b"], "rating": ["4.1", "4.0"]})
    assert Dataset.from_frames(tenths, min_rating=4.1).item_ids == ["a"]


def test_events_and_weights() -> None:
    frame = pl.DataFrame({"user_id": "u", "item_id": ["a", "b", "c"], "event": ["view", "buy", "cart"]})
    chosen = Dataset.from_frames(frame, events=["buy", "cart"])
    assert names(chosen, chosen.histories[0]) == ["b", "c"]
    assert "weight" not in chosen.interactions.columns
    weighted = Dataset.from_frames(frame, events={"buy": 3, "view": 0.5})
    assert weighted.interactions.select("event", "weight").rows() == [("view", 0.5), ("buy", 3.0)]
    assert weighted.manifest["dropped"] == {"events": 1}
    both = Dataset.from_frames(frame.with_columns(weight=pl.Series([2, None, 1])), events={"buy": 3, "view": 0.5})
    assert both.interactions["weight"].to_list() == [1.0, 3.0]
    with pytest.raises(DataError, match=r"no row has the event 'byu'; the log has: buy, cart, view.*'buy'"):
        Dataset.from_frames(frame, events=["byu"])
    with pytest.raises(ConfigError, match="weight of event 'buy' is -1"):
        Dataset.from_frames(frame, events={"buy": -1})
    with pytest.raises(ConfigError, match="events is the text 'buy'"):
        Dataset.from_frames(frame, events="buy")


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
    data = Dataset.from_frames(log(("u", "1", 1)), items)
    assert data.items["title"].to_list() == ["A title", "", "三体 (2008)"]
    assert data.items["categories"].to_list() == [["Beauty", "Hair", "Skin"], [], []]
    assert data.items["price"].to_list() == [1.5, None, 2.0]
    assert data.manifest["counts"]["titles_missing"] == data.summary()["titles_missing"] == 1
    text = Dataset.from_frames(log(("u", "1", 1)), items.with_columns(categories=pl.Series(["a|b| a", "", None])))
    assert text.items["categories"].to_list() == [["a", "b"], [], []]


# Storage


def test_saved_and_loaded(shop: Dataset, tmp_path: Path) -> None:
    shop.save(tmp_path / "shop")
    loaded = Dataset.load(tmp_path / "shop")
    assert loaded.hash == shop.hash
    assert loaded.manifest == shop.manifest
    assert loaded.users is None
    assert loaded.items["title"].to_list() == ["One", "Two", "", "四", "Five"]
    assert sorted(p.name for p in tmp_path.rglob("*")) == [
        "interactions.parquet",
        "items.parquet",
        "manifest.json",
        "shop",
    ]
    with pytest.raises(StorageError, match="exists already"):
        shop.save(tmp_path / "shop")
    shop.k_core(3, 0).save(tmp_path / "shop", overwrite=True)
    assert Dataset.load(tmp_path / "shop").user_ids == ["a", "b"]


def test_damaged_folders(shop: Dataset, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no data set"):
        Dataset.load(tmp_path)
    shop.save(tmp_path / "shop")
    manifest = tmp_path / "shop" / "manifest.json"
    text = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**text, "format_version": 99}))
    with pytest.raises(DataError, match="format_version 99"):
        Dataset.load(tmp_path / "shop")
    manifest.write_text("{")
    with pytest.raises(DataError, match="cannot read the data set"):
        Dataset.load(tmp_path / "shop")
    manifest.write_text(json.dumps(text))
    (tmp_path / "shop" / "items.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match="cannot read the data set"):
        Dataset.load(tmp_path / "shop")


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file may grow beyond 4 KB: the operating system refuses as it does on a full disk."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.usefixtures("full_disk")
def test_full_disk_leaves_nothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frame = pl.DataFrame({"user_id": rng.integers(0, 10**9, 5000), "item_id": rng.integers(0, 10**9, 5000)})
    data = Dataset.from_frames(frame)
    with pytest.raises(StorageError, match="cannot write"):
        data.save(tmp_path / "data" / "big")
    assert list((tmp_path / "data").iterdir()) == []


# Hashes


def test_hash_ignores_what_does_not_matter() -> None:
    rows = [("a", "1", 1), ("a", "2", 2), ("b", "1", 3)]
    items = pl.DataFrame({"item_id": ["1", "2"], "title": ["x", "y"], "year": [1, 2]})
    data = Dataset.from_frames(log(*rows), items)
    assert Dataset.from_frames(log(*reversed(rows)), items[::-1], name="other").hash == data.hash
    other = items.select("year", "title", "item_id").with_columns(pl.col("year").cast(pl.Float32))
    assert Dataset.from_frames(log(*rows), other).hash == data.hash


def test_hash_feels_every_value() -> None:
    rows = [("a", "1", 1), ("a", "2", 2), ("b", "1", 3)]
    items = pl.DataFrame({"item_id": ["1", "2"], "title": ["x", "y"], "categories": [["p", "q"], ["r"]]})
    users = pl.DataFrame({"user_id": ["a"], "age": [3]})
    variants = [
        Dataset.from_frames(log(*rows), items, users),
        Dataset.from_frames(log(*rows), items),
        Dataset.from_frames(log(*rows), items, users.with_columns(age=pl.lit(4))),
        Dataset.from_frames(log(*rows[:2], ("b", "2", 3)), items, users),
        Dataset.from_frames(log(*rows[:2], ("b", "1", 4)), items, users),
        Dataset.from_frames(log(("a", "1", 2), ("a", "2", 1), rows[2]), items, users),
        Dataset.from_frames(log(*rows), items.with_columns(title=pl.Series(["xy", ""])), users),
        Dataset.from_frames(log(*rows), items.with_columns(categories=pl.Series([["p"], ["q", "r"]])), users),
        Dataset.from_frames(log(*rows), items.rename({"categories": "tags"}), users),
        Dataset.from_frames(log(*rows).with_columns(rating=pl.lit(1.0)), items, users),
    ]
    assert len({d.hash for d in variants}) == len(variants)


def test_histories_hash() -> None:
    first = [np.array([0, 1], dtype=np.int32), np.array([], dtype=np.int32)]
    assert histories_hash(first, ["a", "b"]) == histories_hash([np.array([1, 0]), np.array([], dtype=int)], ["b", "a"])
    assert histories_hash(first, ["a", "b"]) != histories_hash(first, ["a", "c"])
    assert histories_hash(first, ["a", "b"]) != histories_hash(first[::-1], ["a", "b"])
    assert histories_hash([], []) == histories_hash([], ["a"])


# Shapes of the data


def test_summary(shop: Dataset) -> None:
    summary = shop.summary()
    assert json.loads(json.dumps(summary)) == summary
    for key, value in {
        "users": 3, "items": 5, "interactions": 10, "sparsity": 1 - 9 / 15, "exact_duplicates": 0, "repeated_items": 1,
        "ties": 0, "time_range": ["1970-01-01T00:00:10Z", "1970-01-01T00:01:10Z"], "titles_missing": 1, "cold_items": 1,
        "users_with_fewer_than_3": 1,
    }.items():  # fmt: skip
        assert summary[key] == value, key
    assert summary["history_length"] == pytest.approx(
        {"min": 2, "p25": 2.5, "median": 3, "p75": 4, "p90": 4.6, "p99": 4.96, "max": 5, "mean": 10 / 3}
    )


def test_history_frame(shop: Dataset) -> None:
    frame = shop.history_frame()
    assert frame.schema == {"user_id": pl.String, "history": pl.List(pl.String)}
    assert frame.rows() == [("a", ["1", "2", "3", "4", "1"]), ("b", ["2", "3", "4"]), ("c", ["1", "2"])]


def test_k_core_closed_form() -> None:
    # Item z has one event; without it user c has one; without c item y has two, which is enough.
    data = Dataset.from_frames(
        log(("a", "x", 1), ("a", "y", 2), ("b", "x", 3), ("b", "y", 4), ("c", "y", 5), ("c", "z", 6)),
        pl.DataFrame({"item_id": ["w", "x", "y", "z"]}),
        pl.DataFrame({"user_id": ["c", "a", "b", "d"]}),
    )
    core = data.k_core(2, 2)
    assert core.item_ids == ["x", "y"]
    assert core.users is not None
    assert core.users["user_id"].to_list() == ["a", "b"]
    assert core.history_frame().rows() == [("a", ["x", "y"]), ("b", ["x", "y"])]
    assert core.manifest["k_core"] == {"users": 2, "items": 2}
    assert core.manifest["counts"]["interactions"] == 4
    assert data.k_core(0, 0).hash == data.hash
    with pytest.raises(DataError, match=r"\(5, 5\)-core is empty"):
        data.k_core(5, 5)
    with pytest.raises(ConfigError, match="cannot be negative"):
        data.k_core(-1, 0)


@given(EVENTS, st.integers(0, 4), st.integers(0, 4))
@settings(deadline=None)
def test_k_core_is_the_largest_fixpoint(events: list[tuple[str, str, int | None]], users: int, items: int) -> None:
    kept = events
    while True:  # Remove one offending event at a time.
        per_user, per_item = Counter(e[0] for e in kept), Counter(e[1] for e in kept)
        fewer = [e for e in kept if per_user[e[0]] >= users and per_item[e[1]] >= items]
        if len(fewer) == len(kept):
            break
        kept = fewer
    data = Dataset.from_frames(log(*events))
    if not kept:
        with pytest.raises(DataError):
            data.k_core(users, items)
        return
    core = data.k_core(users, items)
    assert Counter(core.interactions.select("user_id", "item_id").rows()) == Counter(e[:2] for e in kept)
    assert core.k_core(users, items).hash == core.hash
    assert [len(h) for h in core.histories] == core.interactions.group_by("user_id", maintain_order=True).len()[
        "len"
    ].to_list()


# Splits


def test_leave_one_out(shop: Dataset) -> None:
    split = shop.split()
    split.check()
    assert [names(shop, h) for h in split.train] == [["1", "2", "3"], ["2"], ["1", "2"]]
    assert split.valid.users.tolist() == split.test.users.tolist() == [0, 1]
    assert names(shop, split.valid.targets) == ["4", "3"]
    assert names(shop, split.test.targets) == ["1", "4"]
    assert [names(shop, h) for h in split.valid.histories] == [["1", "2", "3"], ["2"]]
    assert [names(shop, h) for h in split.test.histories] == [["1", "2", "3", "4"], ["2", "3"]]
    assert len(split.valid) == 2
    assert {a.dtype for a in (split.test.targets, split.test.users, *split.train)} == {np.dtype(np.int32)}
    assert split.train_hash == histories_hash(split.train, shop.item_ids)
    assert json.loads(json.dumps(split.protocol)) == split.protocol
    assert split.protocol["data_hash"] == shop.hash
    assert (split.protocol["split"], split.protocol["ties"], split.protocol["order"]) == (
        "leave_one_out",
        "file",
        "timestamp",
    )


def test_temporal(shop: Dataset) -> None:
    split = shop.split("temporal", valid_fraction=0.3, test_fraction=0.2)  # The cuts are at times 40 and 60.
    split.check()
    assert (split.protocol["valid_time"], split.protocol["test_time"]) == (40, 60)
    assert [names(shop, h) for h in split.train] == [["1", "2", "3"], ["2", "3"], []]
    assert (names(shop, split.valid.targets), split.valid.users.tolist()) == (["4", "1"], [0, 2])
    assert [names(shop, h) for h in split.valid.histories] == [["1", "2", "3"], []]
    assert (names(shop, split.test.targets), split.test.users.tolist()) == (["4", "2"], [1, 2])
    assert [names(shop, h) for h in split.test.histories] == [["2", "3"], ["1"]]


def test_temporal_needs_times(shop: Dataset) -> None:
    untimed = Dataset.from_frames(pl.DataFrame({"user_id": ["u"], "item_id": ["i"]}))
    with pytest.raises(DataError, match="a temporal split needs timestamps"):
        untimed.split("temporal")
    with pytest.raises(DataError, match="ties='shuffled' needs timestamps"):
        untimed.split(ties="shuffled")
    with pytest.raises(DataError, match="too coarse"):
        Dataset.from_frames(log(("u", "1", 1), ("u", "2", 1))).split("temporal")
    with pytest.raises(ConfigError, match=r"test_fraction is 1\.5"):
        shop.split("temporal", test_fraction=1.5)
    with pytest.raises(ConfigError, match="nothing would be left to train on"):
        shop.split("temporal", valid_fraction=0.6, test_fraction=0.5)
    with pytest.raises(ConfigError, match="split kind is 'random'"):
        shop.split("random")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="ties is 'ids'"):
        shop.split(ties="ids")  # type: ignore[arg-type]


def test_users_without_time_are_counted() -> None:
    data = Dataset.from_frames(log(*(("a", str(n), n) for n in range(10)), ("b", "1", None)))
    split = data.split("temporal")
    split.check()
    assert split.protocol["users_without_time"] == 1
    assert len(split.train[1]) == 0
    assert split.test.users.tolist() == [0]


def test_shuffled_ties() -> None:
    rows = [("u", f"{day}{n}", day) for day in range(3) for n in range(8)]
    data = Dataset.from_frames(log(*rows))
    whole = [data.split(ties="shuffled", seed=seed).truth.sequences[0] for seed in (1, 1, 2)]
    assert np.array_equal(whole[0], whole[1])
    assert not np.array_equal(whole[0], whole[2])
    assert not np.array_equal(whole[0], data.histories[0])
    assert [names(data, whole[0])[at][0] for at in range(24)] == sorted("012" * 8)
    assert data.split(ties="shuffled", seed=2).protocol["seed"] == 2
    assert data.split(seed=2).protocol["seed"] is None
    assert data.split(seed=2).train_hash == data.split(seed=3).train_hash


@given(EVENTS, st.sampled_from(["file", "shuffled"]), st.integers(0, 3))
@settings(deadline=None)
def test_leave_one_out_of_any_log(events: list[tuple[str, str, int | None]], ties: Any, seed: int) -> None:
    data = Dataset.from_frames(log(*events))
    if all(time is None for _, _, time in events):
        ties = "file"
    split = data.split(ties=ties, seed=seed)
    split.check()
    tested = {user: case for case, user in enumerate(split.test.users.tolist())}
    assert set(tested) == {user for user, h in enumerate(data.histories) if len(h) >= 3}
    for user, history in enumerate(data.histories):
        parts = list(split.train[user])
        if user in tested:
            case = tested[user]
            assert np.array_equal(split.valid.histories[case], split.train[user])
            assert np.array_equal(split.test.histories[case], [*parts, split.valid.targets[case]])
            parts += [split.valid.targets[case], split.test.targets[case]]
        # Nothing is lost or invented, and in file order nothing moves.
        assert Counter(parts) == Counter(history.tolist())
        assert ties == "shuffled" or parts == history.tolist()


@given(EVENTS, st.floats(0.05, 0.45), st.floats(0.05, 0.45), st.sampled_from(["file", "shuffled"]))
@settings(deadline=None)
def test_temporal_of_any_log(
    events: list[tuple[str, str, int | None]], valid_fraction: float, test_fraction: float, ties: Any
) -> None:
    data = Dataset.from_frames(log(*events))
    try:
        split = data.split("temporal", ties=ties, valid_fraction=valid_fraction, test_fraction=test_fraction)
    except DataError:
        return
    split.check()
    valid_time, test_time = split.protocol["valid_time"], split.protocol["test_time"]
    assert valid_time < test_time
    frame = data.interactions.filter(pl.col("timestamp").is_not_null())
    for cases, start, end in ((split.valid, valid_time, test_time), (split.test, test_time, 10**9)):
        inside = frame.filter(pl.col("timestamp").is_between(start, end, closed="left"))
        assert {data.user_ids[user] for user in cases.users} == set(inside["user_id"])
        for user, history, target in zip(cases.users, cases.histories, cases.targets, strict=True):
            mine = pl.col("user_id") == data.user_ids[user]
            before = frame.filter(mine & (pl.col("timestamp") < start))["item_id"].to_list()
            assert Counter(names(data, history)) == Counter(before)
            first = inside.filter(mine).filter(pl.col("timestamp") == pl.col("timestamp").min())
            assert data.item_ids[target] in first["item_id"].to_list()
    assert sum(map(len, split.train)) == frame.filter(pl.col("timestamp") < valid_time).height


# Planted leaks


def with_case(cases: Cases, case: int, history: list[int]) -> Cases:
    histories = list(cases.histories)
    histories[case] = np.array(history, dtype=np.int32)
    return replace(cases, histories=histories)


@pytest.mark.parametrize("kind", ["leave_one_out", "temporal"])
def test_planted_leaks_are_caught(shop: Dataset, kind: Any) -> None:
    split = shop.split(kind, valid_fraction=0.3, test_fraction=0.2)
    split.check()

    def planted(**parts: Any) -> Split:
        return replace(split, **parts)

    # The target in its own history.
    case = split.test.users.tolist().index(1)
    history = [*split.test.histories[case].tolist(), int(split.test.targets[case])]
    with pytest.raises(LeakError, match="user 'b': the history of the test case holds item '4', which is event 2"):
        planted(test=with_case(split.test, case, history)).check()
    # Something later than the target.
    case = split.valid.users.tolist().index(0)
    with pytest.raises(
        LeakError, match="user 'a': the history of the validation case holds item '4', which is event 3"
    ):
        planted(valid=with_case(split.valid, case, [0, 3])).check()
    # The later of two events of one item: the item is known, its repetition is the future.
    with pytest.raises(
        LeakError, match="user 'a': the history of the validation case holds item '1', which is event 4"
    ):
        planted(valid=with_case(split.valid, case, [0, 1, 2, 0])).check()
    # A test interaction in training, and one that is somebody else's.
    train = [*split.train]
    train[1] = np.append(train[1], np.int32(3))
    with pytest.raises(LeakError, match="user 'b': the training history holds item '4', which is event 2"):
        planted(train=train).check()
    train[1] = np.append(split.train[1], np.int32(4))
    with pytest.raises(
        LeakError, match="user 'b': the training history holds item '5', which is no event of that user"
    ):
        planted(train=train).check()
    with pytest.raises(LeakError, match="2 training histories for 3 users"):
        planted(train=split.train[:2]).check()
    # Another target than the one held out, and a case for which nothing is held out.
    with pytest.raises(LeakError, match="the target of the test case is item '5'"):
        planted(test=replace(split.test, targets=np.full_like(split.test.targets, 4))).check()
    if kind == "leave_one_out":
        none = Cases(np.array([2], np.int32), [np.array([], np.int32)], np.array([0], np.int32))
        with pytest.raises(LeakError, match="user 'c' has a test case, but no event held out"):
            planted(test=none).check()
    # A history that was cut to fewer of the past events is no leak.
    planted(test=with_case(split.test, split.test.users.tolist().index(1), [2])).check()


def test_leaks_in_time_are_caught(shop: Dataset) -> None:
    split = shop.split("temporal", valid_fraction=0.3, test_fraction=0.2)
    times = [t.copy() for t in split.truth.times or []]
    times[1][0] = 99  # An event that is used as history happened after the cut.
    with pytest.raises(
        LeakError, match="user 'b': event 2 is the target of the test case, but not all events before it"
    ):
        replace(split, truth=replace(split.truth, times=times)).check()
    split = replace(split, valid=Cases(split.valid.users[:0], [], split.valid.targets[:0]), test=split.test)
    later = replace(split.truth, times=[t.copy() for t in split.truth.times or []])
    assert later.times is not None
    later.times[0][2] = 45
    with pytest.raises(LeakError, match="user 'a': an event at or after time 40 is in training"):
        replace(split, truth=later).check()
