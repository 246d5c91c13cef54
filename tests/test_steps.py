from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from genrec import features
from genrec.baselines import BASELINES
from genrec.batch.steps import STEPS, Catalogue, Limit, Lists, MaxPer, _cosines, fill_up, max_per, prepare
from genrec.errors import ConfigError

N = 12  # Items.
WORDS = [
    "red tea",
    "green tea",
    "tea pot",
    "blue cup",
    "red cup",
    "",
    "green pot",
    "pan",
    "red pan",
    "tea",
    "cup",
    "red",
]
ITEMS = pl.DataFrame(
    {
        "item_id": [f"i{item}" for item in range(N)],
        "title": WORDS,
        "brand": ["A", "A", "B", None, "B", "A", "C", "C", "C", "A", None, "A"],
        "categories": [
            ["x", "y"],
            ["x"],
            [],
            None,
            ["y", "y"],
            ["x", "z"],
            ["z"],
            ["y"],
            ["x"],
            ["z", "y"],
            ["x"],
            ["w"],
        ],
        "nested": [{"a": 1}] * N,
    }
)
TRAIN = [np.array(one, dtype=np.int32) for one in ([0, 1, 2, 3], [0, 1, 2], [0, 1, 4], [0, 5], [11, 0])]
COUNTS = np.bincount(np.concatenate(TRAIN), minlength=N)
CATALOGUE = Catalogue(ITEMS, lambda: TRAIN)


@st.composite
def some_lists(draw: st.DrawFn) -> Lists:
    """Lists as decoding makes them: distinct legal items, best first with ties, some of them short."""
    users, n = draw(st.integers(0, 4)), draw(st.integers(1, N))
    items = np.full((users, n), -1, dtype=np.int32)
    scores = np.full((users, n), -np.inf, dtype=np.float32)
    legal = draw(arrays(bool, (users, N)))
    histories = []
    for user in range(users):
        open_ = draw(st.permutations(np.flatnonzero(legal[user]).tolist()))
        length = draw(st.integers(0, min(n, len(open_))))
        items[user, :length] = open_[:length]
        found = draw(st.lists(st.sampled_from([-1.0, -1.5, -2.0, -4.0, -7.25]), min_size=length, max_size=length))
        scores[user, :length] = sorted(found, reverse=True)
        histories.append(np.array(draw(st.lists(st.integers(0, N - 1), max_size=3)), dtype=np.int32))
    return Lists(items, scores, np.zeros((users, n), dtype=bool), histories, lambda user: legal[user].copy())


def run(lists: Lists, *steps: dict[str, Any], k: int = 5) -> Lists:
    return prepare(steps, CATALOGUE, k)(lists)


def rows(lists: Lists) -> list[list[tuple[int, float]]]:
    """(item, score) of every list; a list has no hole, and its end is padded."""
    found = []
    for items, scores in zip(lists.items.tolist(), lists.scores.tolist(), strict=True):
        length = sum(item >= 0 for item in items)
        assert items[length:] == [-1] * (len(items) - length)
        assert scores[length:] == [-np.inf] * (len(items) - length)
        found.append(list(zip(items[:length], scores[:length], strict=True)))
    return found


def same(one: Lists, other: Lists) -> bool:
    return rows(one) == rows(other) and one.filled.tolist() == other.filled.tolist()


properties = settings(max_examples=80)


# Every step

EVERY_STEP: dict[str, dict[str, Any]] = {
    "min_score": {"step": "min_score", "score": -2.0},
    "popularity_damping": {"step": "popularity_damping", "strength": 0.7},
    "mmr": {"step": "mmr", "relevance": 0.5},
    "max_per": {"step": "max_per", "column": "categories", "count": 1},
    "fill_up": {"step": "fill_up"},
}


def test_every_step_is_tested() -> None:
    assert set(EVERY_STEP) == set(STEPS)


@pytest.mark.parametrize("step", [EVERY_STEP[name] for name in EVERY_STEP if name != "fill_up"], ids=str)
@given(lists=some_lists())
@properties
def test_a_step_adds_nothing_and_leaves_scores_and_its_input_alone(step: dict[str, Any], lists: Lists) -> None:
    before = [array.copy() for array in (lists.items, lists.scores, lists.filled)]
    made = run(lists, step)
    for found, old in zip(rows(made), rows(lists), strict=True):
        assert set(found) <= set(old)
        assert len(set(found)) == len(found)
    for array, old in zip((lists.items, lists.scores, lists.filled), before, strict=True):
        np.testing.assert_array_equal(array, old)
    assert made.items.dtype == np.int32
    assert made.scores.dtype == np.float32
    assert not made.filled.any()
    assert (np.diff(np.where(made.items >= 0, made.keys, -1e9), axis=1) <= 0).all()


@pytest.mark.parametrize("step", EVERY_STEP.values(), ids=str)
@given(lists=some_lists())
@properties
def test_a_list_is_made_alone_as_among_others(step: dict[str, Any], lists: Lists) -> None:
    together = rows(run(lists, step))
    for user in range(len(lists.items)):
        one = slice(user, user + 1)
        alone = Lists(lists.items[one], lists.scores[one], lists.filled[one], lists.histories[one],
                      lambda _, user=user: lists.legal(user))  # fmt: skip
        assert rows(run(alone, step)) == [together[user]]


# Minimum score


@given(lists=some_lists(), score=st.sampled_from([-np.inf, -7.25, -3.0, -1.5, 0.0]))
@properties
def test_no_item_scores_below_the_minimum(lists: Lists, score: float) -> None:
    found = rows(run(lists, {"step": "min_score", "score": score}))
    assert found == [[pair for pair in old if pair[1] >= score] for old in rows(lists)]


# Popularity damping


@given(lists=some_lists(), strength=st.sampled_from([0.1, 0.7, 3.0]))
@properties
def test_damped_lists_are_sorted_by_damped_scores(lists: Lists, strength: float) -> None:
    found = rows(run(lists, {"step": "popularity_damping", "strength": strength}))
    for new, old in zip(found, rows(lists), strict=True):
        place = {item: number for number, (item, _) in enumerate(old)}
        assert new == sorted(
            old, key=lambda pair: (-(pair[1] - strength * np.log(1 + COUNTS[pair[0]])), place[pair[0]])
        )


@given(lists=some_lists(), before=st.sampled_from([[], [EVERY_STEP["mmr"]], [EVERY_STEP["popularity_damping"]]]))
@properties
def test_no_damping_changes_nothing_after_whatever_step(lists: Lists, before: list[dict[str, Any]]) -> None:
    assert same(run(lists, *before, {"step": "popularity_damping", "strength": 0}), run(lists, *before))


# Maximal marginal relevance


def by_hand(old: list[tuple[int, float]], relevance: float) -> list[int]:
    """The items of a list in the order of MMR, one pair of items at a time."""
    vectors = features.text(ITEMS).toarray()
    scores = [score for _, score in old]
    low, span = min(scores, default=0.0), (max(scores, default=0.0) - min(scores, default=0.0)) or np.inf
    left, chosen = [(item, (score - low) / span) for item, score in old], list[int]()
    while left:
        values = [
            relevance * scaled
            - (1 - relevance) * max((float(vectors[item] @ vectors[other]) for other in chosen), default=0.0)
            for item, scaled in left
        ]
        best = next(number for number, value in enumerate(values) if value > max(values) - 1e-6)
        chosen.append(left.pop(best)[0])
    return chosen


@given(lists=some_lists(), relevance=st.sampled_from([0.0, 0.3, 0.7, 0.95]))
@properties
def test_mmr_is_that_of_the_paper(lists: Lists, relevance: float) -> None:
    found = rows(run(lists, {"step": "mmr", "relevance": relevance}))
    for new, old in zip(found, rows(lists), strict=True):
        assert [item for item, _ in new] == by_hand(old, relevance)


@given(lists=some_lists(), before=st.sampled_from([[], [EVERY_STEP["mmr"]], [EVERY_STEP["popularity_damping"]]]))
@properties
def test_relevance_alone_changes_nothing_after_whatever_step(lists: Lists, before: list[dict[str, Any]]) -> None:
    assert same(run(lists, *before, {"step": "mmr", "relevance": 1}), run(lists, *before))


@given(lists=some_lists())
@properties
def test_cosines_are_those_of_all_pairs_of_a_list(lists: Lists) -> None:
    vectors = features.text(ITEMS)
    dense = np.vstack([vectors.toarray(), np.zeros((1, vectors.shape[1]))])[lists.items]
    np.testing.assert_allclose(_cosines(vectors, lists.items), dense @ dense.transpose(0, 2, 1), atol=1e-6)


def test_mmr_of_items_without_a_word_keeps_the_order() -> None:
    items = np.array([[3, 1, 2]], dtype=np.int32)
    lists = Lists(
        items, np.array([[-1, -2, -3]], dtype=np.float32), items < 0, [items[0, :0]], lambda _: np.ones(4, bool)
    )
    step = prepare([{"step": "mmr"}], Catalogue(pl.DataFrame({"title": [""] * 4}), list), 3)
    assert step(lists).items.tolist() == [[3, 1, 2]]


# At most so many per value


def values_of(column: str) -> list[set[Any]]:
    return [set(v) if isinstance(v, list) else set() if v is None else {v} for v in ITEMS[column].to_list()]


@pytest.mark.parametrize("column", ["brand", "categories"])
@given(lists=some_lists(), count=st.integers(1, 3))
@properties
def test_no_value_stands_more_often_and_nothing_is_left_out_without_need(column: str, lists: Lists, count: int) -> None:
    found = rows(run(lists, {"step": "max_per", "column": column, "count": count}))
    values = values_of(column)
    for new, old in zip(found, rows(lists), strict=True):
        kept: list[tuple[int, float]] = []
        for pair in old:
            if all(sum(value in values[item] for item, _ in kept) < count for value in values[pair[0]]):
                kept.append(pair)
        assert new == kept


def test_items_without_a_value_are_not_limited() -> None:
    items = np.array([[3, 10, 0, 1, 2]], dtype=np.int32)
    lists = Lists(items, -np.arange(5, dtype=np.float32)[None], items < 0, [items[0, :0]], lambda _: np.ones(N, bool))
    assert run(lists, {"step": "max_per", "column": "brand", "count": 1}).items.tolist() == [[3, 10, 0, 2, -1]]
    assert MaxPer("brand", 1).bind(CATALOGUE, 5)(lists).items.tolist() == [[3, 10, 0, 2, -1]]
    assert max_per(lists, Limit([()] * N, 1)).items.tolist() == items.tolist()


# Filling up


@pytest.mark.parametrize("baseline", ["popularity", "item_knn", "text", "transitions_text", "ease"])
@given(lists=some_lists(), k=st.integers(1, N + 2))
@settings(max_examples=25)
def test_lists_are_filled_up_with_what_the_baseline_likes_best(baseline: str, lists: Lists, k: int) -> None:
    found = run(lists, {"step": "fill_up", "baseline": baseline}, k=k)
    assert found.items.shape == (len(lists.items), k)
    fitted = BASELINES[baseline]().fit(TRAIN, ITEMS)
    for user, (new, old) in enumerate(zip(rows(found), rows(lists), strict=True)):
        kept = old[:k]
        assert new[: len(kept)] == kept
        assert found.filled[user].tolist() == [len(kept) <= place < len(new) for place in range(k)]
        scores = fitted.scores([lists.histories[user]])[0]
        left = set(np.flatnonzero(lists.legal(user)).tolist()) - {item for item, _ in kept}
        best = sorted(left, key=lambda item: (-scores[item], item))[: k - len(kept)]
        assert new[len(kept) :] == [(item, float(scores[item])) for item in best]


def test_only_short_lists_are_scored_and_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genrec.batch.steps._CHUNK", 2 * N)
    items = np.array([[1, 2], [1, -1], [-1, -1], [3, 4], [5, -1]], dtype=np.int32)
    asked: list[list[int]] = []

    def scores(histories: Sequence[np.ndarray]) -> np.ndarray:
        asked.append([int(history[0]) for history in histories])
        return np.tile(np.arange(N, 0, -1, dtype=np.float32), (len(histories), 1))

    histories = [np.array([user]) for user in range(5)]
    lists = Lists(items, -np.abs(items).astype(np.float32), items < -1, histories, lambda _: np.ones(N, bool))
    found = fill_up(lists, scores, k=3)
    assert asked == [[0, 1], [2, 3], [4]]
    assert found.items.tolist() == [[1, 2, 0], [1, 0, 2], [0, 1, 2], [3, 4, 0], [5, 0, 1]]
    asked.clear()
    fill_up(lists, scores, k=1)
    assert asked == [[2]]


LIMITED = st.lists(
    st.sampled_from([("brand", 1), ("brand", 2), ("categories", 1), ("categories", 3)]), max_size=2, unique=True
)


@given(
    lists=some_lists(),
    limits=LIMITED,
    score=st.sampled_from([None, -1.5, -3.0]),
    k=st.integers(1, N + 2),
    baseline=st.sampled_from(["popularity", "item_knn"]),
)
@properties
def test_filling_up_brings_nothing_back_and_keeps_to_the_limits(
    lists: Lists, limits: list[tuple[str, int]], score: float | None, k: int, baseline: str
) -> None:
    steps: list[dict[str, Any]] = [{"step": "max_per", "column": column, "count": count} for column, count in limits]
    if score is not None:
        steps.insert(len(steps) // 2, {"step": "min_score", "score": score})
    steps.append({"step": "mmr"})
    before = run(lists, *steps)
    found = run(lists, *steps, {"step": "fill_up", "baseline": baseline}, k=k)
    fitted = BASELINES[baseline]().fit(TRAIN, ITEMS)
    for user, (new, old) in enumerate(zip(rows(found), rows(before), strict=True)):
        chosen = [item for item, _ in old[:k]]

        def fits(item: int, chosen: list[int] = chosen) -> bool:
            return all(
                sum(value in values_of(column)[other] for other in chosen) < count
                for column, count in limits
                for value in values_of(column)[item]
            )

        scores = fitted.scores([lists.histories[user]])[0]
        decoded = {item for item, _ in rows(lists)[user]}
        for item in sorted(set(range(N)) - decoded, key=lambda item: (-scores[item], item)):
            if len(chosen) < k and lists.legal(user)[item] and fits(item):
                chosen.append(item)
        assert [item for item, _ in new] == chosen
        for column, count in limits:
            told = [value for item in chosen for value in values_of(column)[item]]
            assert all(told.count(value) <= count for value in told)


# Some steps, one after the other


@given(lists=some_lists())
@properties
def test_steps_are_taken_in_the_order_in_which_they_are_written(lists: Lists) -> None:
    steps = [
        {"step": "popularity_damping", "strength": 0.5},
        {"step": "mmr"},
        {"step": "max_per", "column": "brand", "count": 2},
        {"step": "fill_up"},
    ]
    found = prepare(steps, CATALOGUE, 4)(lists)
    one_by_one = lists
    for step in steps:
        one_by_one = run(one_by_one, step, k=4)
    assert same(found, one_by_one)


def test_mmr_goes_by_what_damping_made_of_the_scores() -> None:
    items = np.array([[0, 3, 7]], dtype=np.int32)
    lists = Lists(
        items, np.array([[-1, -1.5, -2]], dtype=np.float32), items < 0, [items[0, :0]], lambda _: np.ones(N, bool)
    )
    damped = run(lists, {"step": "popularity_damping", "strength": 2})
    assert damped.items.tolist() == [[7, 3, 0]]
    assert run(damped, {"step": "mmr", "relevance": 0.9}).items.tolist() == [[7, 3, 0]]


# What a job may write


def never() -> Sequence[np.ndarray]:
    pytest.fail("nothing asked for the histories")


@pytest.mark.parametrize("step", EVERY_STEP.values(), ids=str)
def test_histories_are_read_only_where_they_are_needed_and_not_before(step: dict[str, Any]) -> None:
    asked: list[int] = []

    def train() -> Sequence[np.ndarray]:
        asked.append(1)
        return TRAIN

    prepared = prepare([step], Catalogue(ITEMS, train), 5)
    assert asked == []
    empty = Lists(np.full((1, 2), -1, dtype=np.int32), np.full((1, 2), -np.inf, dtype=np.float32),
                  np.zeros((1, 2), dtype=bool), [np.zeros(0, dtype=np.int32)], lambda _: np.ones(N, bool))  # fmt: skip
    for _ in range(3):
        prepared(empty)
    assert len(asked) == prepared.reads_data
    assert prepared.reads_data == (step["step"] in ("popularity_damping", "fill_up"))


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([{"step": "max_pre", "column": "brand", "count": 1}], r"job: steps\[0\]: step is 'max_pre'\. Did you mean"),
        ([{"column": "brand"}], r"steps\[0\]: step is None\. Known: fill_up, max_per, min_score, mmr"),
        ([{"step": ["mmr"]}], r"steps\[0\]: step is \['mmr'\]"),
        ([{"step": "mmr"}, {"step": "mmr", "relevanse": 1}], r"steps\[1\]: mmr: unknown key 'relevanse'\. Did you"),
        ([{"step": "max_per", "column": "brand"}], r"max_per: the key 'count' is missing"),
        ([{"step": "max_per", "column": "brnd", "count": 1}], r"items have no column 'brnd'\. Did you mean 'brand'\?"),
        ([{"step": "max_per", "column": "nested", "count": 1}], r"column 'nested' is Struct.*single values, or lists"),
        ([{"step": "max_per", "column": "brand", "count": 0}], r"count is 0\. It is at least 1"),
        ([{"step": "max_per", "column": "brand", "count": 1.5}], r"max_per: count is 1\.5\. It takes a value of"),
        ([{"step": "mmr", "relevance": 1.1}], r"relevance is 1\.1\. It lies between 0 and 1"),
        ([{"step": "min_score", "score": float("nan")}], r"score is nan"),
        ([{"step": "popularity_damping", "strength": -1}], r"strength is -1\.0\. It is at least 0"),
        ([{"step": "popularity_damping", "strength": float("inf")}], r"strength is inf"),
        ([{"step": "fill_up", "baseline": "popularty"}], r"baseline is 'popularty'\. Did you mean 'popularity'\?"),
        ([{"step": "fill_up", "baseline": "sasrec"}], r"baseline is 'sasrec', a network: .*Take one of popularity, "),
        ([{"step": "fill_up", "baseline": "sasrec_text"}], r"baseline is 'sasrec_text', a network"),
        ([{"step": "fill_up"}, {"step": "mmr"}], r"steps\[0\]: fill_up is followed by 'mmr'\. Make it the last"),
    ],
)  # fmt: skip
def test_wrong_steps_are_refused(steps: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(steps, Catalogue(ITEMS, never), 5)


def test_no_steps_change_nothing() -> None:
    lists = Lists(np.array([[1]], dtype=np.int32), np.ones((1, 1), dtype=np.float32), np.zeros((1, 1), dtype=bool),
                  [np.zeros(0, dtype=np.int32)], lambda _: np.ones(N, bool))  # fmt: skip
    assert prepare([], Catalogue(ITEMS, never), 5)(lists) is lists
