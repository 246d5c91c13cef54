from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec import features
from genrec.baselines import BASELINES, ItemKNN, Popularity, TransitionsText, recommend
from genrec.errors import ConfigError, DataError

TITLES = ["red tea", "green tea", "red lipstick", "matt lipstick", "baby wipes", ""]
ITEMS = pl.DataFrame({"item_id": [f"i{n}" for n in range(6)], "title": TITLES})
N = len(TITLES)
history = st.lists(st.integers(0, N - 1), max_size=8).map(lambda h: np.array(h, dtype=np.int32))
logs = st.lists(history, max_size=8)
EMPTY = np.array([], dtype=np.int32)


@given(logs)
def test_popularity_counts(train: list[np.ndarray]) -> None:
    counts = [sum(int((h == item).sum()) for h in train) for item in range(N)]
    scores = Popularity().fit(train, ITEMS).scores([EMPTY, np.array([1])])
    assert scores.dtype == np.float32
    assert scores.tolist() == [counts, counts]


@settings(deadline=None)
@given(logs, history.filter(len), st.sampled_from([0.5, 0.8, 1.0]), st.integers(1, 10))
def test_item_knn_equals_the_slow_reference(
    train: list[np.ndarray], seen: np.ndarray, decay: float, window: int
) -> None:
    users = [{u for u, h in enumerate(train) if item in h} for item in range(N)]
    expected = np.zeros(N)
    for age, item in enumerate(seen[::-1][:window]):
        for other in range(N):
            both = len(users[item] & users[other])
            if other != item and both:
                expected[other] += decay**age * both / math.sqrt(len(users[item]) * len(users[other]))
    scores = ItemKNN(decay=decay, window=window).fit(train, ITEMS).scores([seen, EMPTY, seen])
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores[0], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(scores[0], scores[2])


@settings(deadline=None)
@given(logs, history.filter(len), st.sampled_from([0.0, 0.5, 1.0]))
def test_transitions_text_equals_the_slow_reference(train: list[np.ndarray], seen: np.ndarray, power: float) -> None:
    last = seen[-1]
    after = [int(b) for h in train for a, b in pairwise(h) if a == last]
    tfidf = features.text(ITEMS).toarray()
    expected = tfidf @ tfidf[last]
    for item in after:
        expected[item] += 1 / len(after) ** power
    scores = TransitionsText(power=power).fit(train, ITEMS).scores([EMPTY, seen, EMPTY, seen[-1:]])
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores[1], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(scores[1], scores[3])


@pytest.mark.parametrize("name", sorted(BASELINES))
def test_an_empty_history_is_scored_by_popularity(name: str) -> None:
    train = [np.array([3, 1, 3]), np.array([3, 0]), EMPTY]
    fitted = BASELINES[name]().fit(train, ITEMS)
    assert recommend(fitted, [EMPTY], 3).tolist() == [[3, 0, 1]]
    assert fitted.scores([]).shape == (0, N)


@pytest.mark.parametrize("name", sorted(BASELINES))
def test_planted_leaks_are_seen(name: str) -> None:
    """What is fitted depends on training events alone; fitted on test events too, it would give itself away."""
    rng = np.random.default_rng(0)
    log = [rng.permutation(N)[:5] for _ in range(10)]
    other = [np.concatenate([h[:-2], (h[-2:] + 1) % N]) for h in log]
    train = [h[:-2] for h in log]
    asked = [h[:-1] for h in log]
    honest = BASELINES[name]().fit(train, ITEMS).scores(asked)
    np.testing.assert_array_equal(honest, BASELINES[name]().fit([h[:-2] for h in other], ITEMS).scores(asked))
    leaked = BASELINES[name]().fit(log, ITEMS).scores(asked)
    assert not np.allclose(honest, leaked)
    assert not np.allclose(leaked, BASELINES[name]().fit(other, ITEMS).scores(asked))


@pytest.mark.parametrize("name", sorted(BASELINES))
def test_scoring_changes_nothing(name: str) -> None:
    train = [np.array([0, 1, 2]), np.array([2, 3])]
    fitted = BASELINES[name]().fit(train, ITEMS)
    before = fitted.scores([np.array([2])])
    recommend(fitted, [np.array([2]), EMPTY], 6)
    np.testing.assert_array_equal(before, fitted.scores([np.array([2])]))


def test_recommend_excludes_seen_pads_and_breaks_ties_by_index() -> None:
    fitted = Popularity().fit([np.array([4, 4, 2, 5])], ITEMS)
    histories = [EMPTY, np.array([4, 2]), np.arange(N), np.array([5])]
    expected = [[4, 2, 5, 0], [5, 0, 1, 3], [-1, -1, -1, -1], [4, 2, 0, 1]]
    for batch in (1, 3, 256):
        lists = recommend(fitted, histories, 4, batch=batch)
        assert lists.dtype == np.int32
        assert lists.tolist() == expected
    assert recommend(fitted, histories[1:2], 3, exclude_seen=False).tolist() == [[4, 2, 5]]
    assert recommend(fitted, histories[:1], 8).tolist() == [[4, 2, 5, 0, 1, 3, -1, -1]]
    assert recommend(fitted, [], 4).shape == (0, 4)


def test_recency_lets_the_last_item_weigh_most() -> None:
    train = [np.array([0, 1]), np.array([2, 3])]
    fitted = ItemKNN().fit(train, ITEMS)
    assert recommend(fitted, [np.array([0, 2])], 2).tolist() == [[3, 1]]
    assert recommend(fitted, [np.array([2, 0])], 2).tolist() == [[1, 3]]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("popularity", {}), ("item_knn", {"decay": 0.6, "window": 20}), ("transitions_text", {"power": 0.25})],
)
def test_parameters_make_the_same_again(name: str, expected: dict[str, float]) -> None:
    baseline = BASELINES[name]()
    assert baseline.parameters == expected
    assert type(baseline)(**baseline.parameters).parameters == expected


def test_parameters_are_those_in_use() -> None:
    assert ItemKNN(decay=0.9, window=3).parameters == {"decay": 0.9, "window": 3}
    assert TransitionsText(power=0).parameters == {"power": 0}


def test_bad_input_is_refused() -> None:
    for name in BASELINES:
        with pytest.raises(DataError, match="holds item 6"):
            BASELINES[name]().fit([np.array([6])], ITEMS)
    for decay, window in ((0.0, 1), (1.5, 1), (0.8, 0)):
        with pytest.raises(ConfigError, match="decay"):
            ItemKNN(decay=decay, window=window)
    with pytest.raises(ConfigError, match="power"):
        TransitionsText(power=2)
    with pytest.raises(ConfigError, match="at least 1"):
        recommend(Popularity().fit([], ITEMS), [], 0)
