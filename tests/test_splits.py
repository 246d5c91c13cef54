from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genrec.dataset import Dataset
from genrec.errors import ConfigError, DataError, LeakError
from genrec.splits import Cases, Split, contexts, histories_hash

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


def test_histories_hash() -> None:
    first = [np.array([0, 1], dtype=np.int32), np.array([], dtype=np.int32)]
    assert histories_hash(first, ["a", "b"]) == histories_hash([np.array([1, 0]), np.array([], dtype=int)], ["b", "a"])
    assert histories_hash(first, ["a", "b"]) != histories_hash(first, ["a", "c"])
    assert histories_hash(first, ["a", "b"]) != histories_hash(first[::-1], ["a", "b"])
    assert histories_hash([], []) == histories_hash([], ["a"])


# The rules


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


def test_event_weights_stay_with_their_events() -> None:
    rows = [
        (f"u{user}", f"i{event}", 10 * (event // 3), "buy" if event % 2 else "view")
        for user in range(4)
        for event in range(9)
    ]
    table = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp", "event"], orient="row")
    data = Dataset.from_frames(table, events={"buy": 1.0, "view": 0.25})
    for ties in ("file", "shuffled"):
        split = data.split("leave_one_out", ties=ties)  # type: ignore[arg-type]
        assert split.train_weights is not None
        for history, weights in zip(split.train, split.train_weights, strict=True):
            expected = [1.0 if int(data.item_ids[item][1:]) % 2 else 0.25 for item in history]
            assert weights.tolist() == expected
    assert Dataset.from_frames(table.drop("event")).split().train_weights is None


@pytest.mark.parametrize("kind", ["leave_one_out", "temporal"])
@pytest.mark.parametrize("ties", ["file", "shuffled"])
def test_what_the_log_says_of_an_event_stays_with_it(kind: Any, ties: Any) -> None:
    rng = np.random.default_rng(3)
    rows = [
        (f"u{user}", f"i{event}", int(rng.integers(0, 40)) // 4, float(100 * user + event))
        for user in range(9)
        for event in range(int(rng.integers(1, 12)))
    ]
    table = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp", "rating"], orient="row")
    data = Dataset.from_frames(table)
    split = data.split(kind, ties=ties, seed=5, valid_fraction=0.3, test_fraction=0.3)

    def rating(user: int, item: int) -> float:
        return 100.0 * int(data.user_ids[user][1:]) + int(data.item_ids[item][1:])

    assert split.train_events.columns == split.test_events.columns == ["timestamp", "rating"]
    expected = [rating(user, item) for user, history in enumerate(split.train) for item in history]
    assert split.train_events["rating"].to_list() == expected
    cases = zip(split.test.users, split.test.targets, strict=True)
    assert split.test_events["rating"].to_list() == [rating(user, item) for user, item in cases]
    assert len(split.test_events) > 0
    with pytest.raises(DataError, match=r"order of its events alone\. Make it with Dataset\.split"):
        _ = replace(split, truth=replace(split.truth, events=None)).train_events


def test_drawn_cases_are_ascending_and_decided_by_the_seed() -> None:
    cases = Cases(np.arange(9, dtype=np.int32), [np.array([0], dtype=np.int32)] * 9, np.arange(9, dtype=np.int32))
    drawn = cases.draw(4, [7, 3])
    assert len(drawn) == len(set(drawn.tolist())) == 4
    assert drawn.tolist() == sorted(drawn.tolist()) == cases.draw(4, [7, 3]).tolist()
    assert any(cases.draw(4, [seed, 3]).tolist() != drawn.tolist() for seed in range(5))
    for count in (0, 9, 10):
        assert cases.draw(count, [7, 3]).tolist() == list(range(9))
    part = cases.take(np.array([2, 5]))
    assert (part.users.tolist(), part.targets.tolist(), len(part.histories)) == ([2, 5], [2, 5], 2)


def test_users_without_validation_are_tested_all_the_same() -> None:
    rows = [(user, item, time) for user in ("a", "b", "c") for time, item in enumerate(("x", "y", "z"))]
    split = Dataset.from_frames(log(*rows)).split()
    less = split.without_validation(["b", "nobody"])
    less.check()
    assert [less.truth.user_ids[user] for user in less.valid.users] == ["a", "c"]
    assert (less.protocol["valid_cases"], split.protocol["valid_cases"]) == (2, 3)
    assert len(less.test) == 3
    assert less.train_hash == split.train_hash
    assert split.without_validation([]) is split


def test_the_context_of_an_event_is_its_row_and_its_time_of_day() -> None:
    events = pl.DataFrame({"timestamp": [0, 1_700_000_000, None], "query": ["tea", None, "pot"]})
    told = contexts(events)
    assert told.columns == ["timestamp", "query", "hour", "weekday"]
    assert told["hour"].to_list() == [0, 22, None]
    assert told["weekday"].to_list() == ["Thursday", "Tuesday", None]
    own = contexts(events.with_columns(hour=pl.lit("noon")))
    assert own["hour"].to_list() == ["noon"] * 3
    assert contexts(events.clear()).schema["hour"] == pl.Int64
