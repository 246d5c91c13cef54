from __future__ import annotations

import datetime
import decimal
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
from hypothesis import given
from hypothesis import strategies as st

from genrec.dataset import Dataset
from genrec.errors import ConfigError, DataError, StorageError

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


# The manifest


def test_manifest_states_what_was_done() -> None:
    frame = pl.DataFrame(
        {"user_id": "u", "item_id": ["a", "b", "c"], "rating": [5, 2, 4], "event": ["buy", "buy", "view"], "page": "p"}
    )
    data = Dataset.from_frames(frame, min_rating=3, events={"buy": 2, "view": 1}, exclude_seen=False, name="shop")
    assert data.manifest == {
        "format_version": 1,
        "name": "shop",
        "source": ["interactions"],
        "positives": {"min_rating": 3, "events": {"buy": 2, "view": 1}},
        "order": "file",
        "ties": "file",
        "exclude_seen": False,
        "dropped": {"min_rating": 1, "events": 0},
        "ignored_columns": ["page"],
        "filled_timestamps": 0,
        "counts": {"users": 1, "items": 2, "interactions": 2, "titles_missing": 2, "bad_rows": 0},
    }
    for events in (["view", "buy"], iter(["view", "buy"])):
        assert Dataset.from_frames(frame, events=events).manifest["positives"]["events"] == ["buy", "view"]


def test_bad_rows_are_counted_and_saved(tmp_path: Path) -> None:
    frame = pl.DataFrame({"user_id": ["u", "", "u"], "item_id": ["1", "1", None], "timestamp": ["1", "2", "noon"]})
    with pytest.raises(DataError, match="2 malformed rows"):
        Dataset.from_frames(frame)
    data = Dataset.from_frames(frame, on_bad_row="skip")
    assert data.manifest["counts"]["bad_rows"] == data.summary()["bad_rows"] == data.bad_rows.height == 2
    data.save(tmp_path / "d")
    assert Dataset.load(tmp_path / "d").bad_rows.equals(data.bad_rows)


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


def test_tables_that_were_changed_are_refused(shop: Dataset, tmp_path: Path) -> None:
    shop.save(tmp_path / "shop")
    cut = shop.interactions.head(9)
    cut.write_parquet(tmp_path / "shop" / "interactions.parquet")
    found = replace(shop, interactions=cut).hash
    with pytest.raises(DataError, match=f"have hash {found}, and manifest.json says {shop.hash}: .* Import the data"):
        Dataset.load(tmp_path / "shop")


def test_every_kind_of_column_is_saved_and_loaded(tmp_path: Path) -> None:
    day = datetime.datetime(2020, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
    items = pl.DataFrame(
        {
            "item_id": ["1", "2"], "price": [1.5, float("nan")], "new": [True, None], "day": [day.date(), None],
            "since": [day, None], "kind": pl.Series(["a", "b"], dtype=pl.Categorical), "size": [{"w": 1}, None],
            "tags": [["x", None], []], "score": pl.Series([0.1, 2], dtype=pl.Float32), "none": [None, None],
            "long": pl.Series([[0.5, 1.0], [2.0, 3.0]], dtype=pl.Array(pl.Float32, 2)), "blob": [b"a", None],
            "wait": [datetime.timedelta(seconds=1), None], "cost": [decimal.Decimal("1.10"), None],
        }
    )  # fmt: skip
    data = Dataset.from_frames(log(("u", "1", 1)).with_columns(weight=0.3, rating=4.5, event=pl.lit("buy")), items)
    data.save(tmp_path / "shop")
    assert Dataset.load(tmp_path / "shop").hash == data.hash


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
    assert data.hash == data.sha256[:16]
    assert len(data.sha256) == 64
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


def test_columns_of_the_log_are_kept_as_context_where_they_are_named(tmp_path: Path) -> None:
    log = pl.DataFrame(
        {
            "user_id": ["b", "a", "b", "a"],
            "item_id": ["i", "j", "k", "i"],
            "timestamp": [20, 10, 5, 15],
            "query": ["tea", None, "pot", "cup"],
            "page": [1.0, 2.0, float("nan"), 4.0],
            "debug": ["x"] * 4,
        }
    )
    data = Dataset.from_frames(log, context=["page", "query"])
    assert data.context_columns == ["page", "query"]
    assert data.interactions.select("user_id", "query", "page").rows() == [
        ("b", "pot", None), ("b", "tea", 1.0), ("a", None, 2.0), ("a", "cup", 4.0),
    ]  # fmt: skip
    assert data.manifest["ignored_columns"] == ["debug"]
    assert data.events.columns == ["timestamp", "page", "query"]
    assert Dataset.from_frames(log).hash != data.hash
    data.save(tmp_path / "data")
    assert Dataset.load(tmp_path / "data").context_columns == ["page", "query"]
    later = log.with_columns(pl.col("timestamp") + 100, query=pl.lit("jar"))
    both, _ = data.append(Dataset.from_frames(later, data.items, context=["query"]))
    assert both.interactions["query"].to_list() == ["pot", "tea", "jar", "jar", None, "cup", "jar", "jar"]
    assert both.interactions["page"].null_count() == 5
    for wrong, error, message in (
        (["querry"], DataError, r"has no column 'querry' for context\. Did you mean 'query'\?"),
        (["rating"], ConfigError, "context names 'rating', which is kept without saying so"),
        ("query", ConfigError, r"context is the text 'query'; give a list .*: \['query'\]"),
    ):
        with pytest.raises(error, match=message):
            Dataset.from_frames(log, context=wrong)
