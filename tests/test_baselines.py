from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec import features, metrics, progress
from genrec.baselines import BASELINES, EASE, Baseline, ItemKNN, Popularity, Text, TransitionsText, recommend, tune
from genrec.errors import ConfigError, DataError

TITLES = ["red tea", "green tea", "red lipstick", "matt lipstick", "baby wipes", ""]
ITEMS = pl.DataFrame({"item_id": [f"i{n}" for n in range(6)], "title": TITLES})
N = len(TITLES)
history = st.lists(st.integers(0, N - 1), max_size=8).map(lambda h: np.array(h, dtype=np.int32))
logs = st.lists(history, max_size=8)
EMPTY = np.array([], dtype=np.int32)
# Small enough for a test to train; what is tested here holds for any size.
SMALL = {"width": 8, "epochs": 2, "negatives": 3, "window": 4, "batch": 4}


def make(name: str) -> Baseline:
    return BASELINES[name](**(SMALL if name.startswith("sasrec") else {}))


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    progress.quiet, before = True, progress.quiet
    yield
    progress.quiet = before


@given(logs)
def test_popularity_counts(train: list[np.ndarray]) -> None:
    counts = [sum(int((h == item).sum()) for h in train) for item in range(N)]
    scores = Popularity().fit(train, ITEMS).scores([EMPTY, np.array([1])])
    assert scores.dtype == np.float32
    assert scores.tolist() == [counts, counts]


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


@pytest.mark.parametrize(("decay", "window"), [(1.0, 100), (0.5, 2)])
def test_ease_equals_a_direct_solution(decay: float, window: int) -> None:
    """Each column on its own: ridge regression of one item on the others, the problem that EASE's formula solves."""
    rng = np.random.default_rng(0)
    n = 1030  # More than one block of those that mirror the triangle.
    train = [rng.choice(n, rng.integers(1, 9), replace=False) for _ in range(300)]
    x = features.interaction_matrix(train, n).toarray().astype(np.float64)
    seen = rng.choice(n, 5, replace=False)
    fitted = EASE(l2=3.0, decay=decay, window=window).fit(train, pl.DataFrame({"item_id": np.arange(n)}))
    scores = fitted.scores([seen, EMPTY])
    for item in (0, int(seen[0]), 511, 1029):
        others = np.delete(np.arange(n), item)
        gram = x[:, others].T @ x[:, others] + 3 * np.eye(n - 1)
        weights = np.insert(np.linalg.solve(gram, x[:, others].T @ x[:, item]), item, 0)
        expected = sum(decay**age * weights[other] for age, other in enumerate(seen[::-1][:window]))
        np.testing.assert_allclose(scores[0, item], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(scores[1], x.sum(axis=0))


def test_ease_refuses_a_catalogue_that_it_cannot_invert() -> None:
    items = pl.DataFrame({"item_id": np.arange(EASE.MOST_ITEMS + 1)})
    with pytest.raises(DataError, match=r"at most 20,000 items; the catalogue has 20,001"):
        EASE().fit([np.array([1])], items)


@settings(max_examples=40)
@given(
    logs,
    history.filter(len),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.5]),
    st.sampled_from([0.0, 2.0]),
    st.sampled_from([(0.5, 1), (0.7, 3), (1.0, 20)]),
)
def test_transitions_text_equals_the_slow_reference(
    train: list[np.ndarray],
    seen: np.ndarray,
    power: float,
    reach: int,
    back: float,
    text: float,
    recency: tuple[float, int],
) -> None:
    decay, window = recency
    tfidf = features.text(ITEMS).toarray()
    forth = np.zeros((N, N))
    for h in train:
        for a in range(len(h)):
            for b in range(a + 1, min(a + 1 + reach, len(h))):
                forth[h[a], h[b]] += 1 / (b - a)
    expected = np.zeros(N)
    for age, item in enumerate(seen[::-1][:window]):
        followed = max(sum(int(a == item) for h in train for a, _ in pairwise(h)), 1)
        expected += decay**age * (forth[item] + back * forth[:, item]) / followed**power
        expected += decay**age * text * tfidf @ tfidf[item]
    fitted = TransitionsText(decay=decay, window=window, power=power, reach=reach, back=back, text=text)
    scores = fitted.fit(train, ITEMS).scores([EMPTY, seen, EMPTY, seen[-window:]])
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores[1], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(scores[1], scores[3], rtol=1e-6)


def test_transitions_by_hand() -> None:
    """Item 0 was followed by 1 twice and by 2 once; texts are left out."""
    train = [np.array([0, 1, 4]), np.array([0, 2]), np.array([0, 1])]
    fitted = TransitionsText(decay=0.5, power=1.0, reach=2, back=0.0, text=0.0).fit(train, ITEMS)
    np.testing.assert_allclose(fitted.scores([np.array([0])]), [[0, 2 / 3, 1 / 3, 0, 0.5 / 3, 0]], rtol=1e-6)
    # Item 1 was followed by 4 alone; item 0 stands one step back and counts half.
    np.testing.assert_allclose(fitted.scores([np.array([0, 1])]), [[0, 1 / 3, 1 / 6, 0, 1 + 0.25 / 3, 0]], rtol=1e-6)


def test_text_is_a_sum_of_cosines() -> None:
    tfidf = features.text(ITEMS).toarray()
    scores = Text(decay=0.5, window=2).fit([], ITEMS).scores([np.array([4, 0, 3]), np.array([5])])
    np.testing.assert_allclose(scores[0], tfidf @ (tfidf[3] + 0.5 * tfidf[0]), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(scores[1], np.zeros(N))


@pytest.mark.parametrize("name", sorted(BASELINES))
class TestContract:
    """What every baseline keeps to."""

    train = (np.array([3, 1, 3]), np.array([3, 0]), EMPTY, np.array([0, 1, 2]))

    def test_shape_type_and_order(self, name: str) -> None:
        fitted = make(name).fit(self.train, ITEMS)
        asked = [np.array([2, 1]), EMPTY, np.arange(N), np.array([0, 0, 0, 0, 0, 1])]
        scores = fitted.scores(asked)
        assert scores.dtype == np.float32
        assert scores.shape == (4, N)
        assert np.isfinite(scores).all()
        assert fitted.scores([]).shape == (0, N)
        # A history is scored as if it were alone, up to rounding.
        for row, one in zip(scores, asked, strict=True):
            np.testing.assert_allclose(row, fitted.scores([one])[0], rtol=1e-4, atol=1e-6)

    def test_an_empty_history_is_scored_by_popularity(self, name: str) -> None:
        fitted = make(name).fit(self.train, ITEMS)
        assert fitted.scores([EMPTY, EMPTY]).tolist() == [[2, 2, 1, 3, 0, 0]] * 2
        assert recommend(fitted, [EMPTY], 3).tolist() == [[3, 0, 1]]

    def test_seen_items_are_left_out(self, name: str) -> None:
        fitted = make(name).fit(self.train, ITEMS)
        assert set(recommend(fitted, [np.array([3, 0])], N)[0]) == {1, 2, 4, 5, -1}
        assert set(recommend(fitted, [np.array([3, 0])], N, exclude_seen=False)[0]) == set(range(N))

    def test_only_allowed_items_are_recommended(self, name: str) -> None:
        allowed = np.array([False, True, False, True, True, False])
        fitted = make(name).fit(self.train, ITEMS)
        lists = recommend(fitted, [np.array([3, 0]), EMPTY], N, allowed=allowed)
        assert set(lists[0]) == {1, 4, -1}
        assert lists[1].tolist() == [3, 1, 4, -1, -1, -1]
        whole = recommend(fitted, [np.array([3, 0])], N)[0]
        assert [item for item in whole if item in (1, 4)] == lists[0, :2].tolist()

    def test_scoring_changes_nothing(self, name: str) -> None:
        fitted = make(name).fit(self.train, ITEMS)
        before = fitted.scores([np.array([2])])
        recommend(fitted, [np.array([2]), EMPTY], 6)
        np.testing.assert_array_equal(before, fitted.scores([np.array([2])]))

    def test_parameters_make_the_same_again(self, name: str) -> None:
        first = make(name).fit(self.train, ITEMS)
        again = BASELINES[name](**first.parameters)
        assert again.parameters == first.parameters
        asked = [np.array([2, 1]), np.array([0])]
        np.testing.assert_array_equal(first.scores(asked), again.fit(self.train, ITEMS).scores(asked))

    def test_the_grid_starts_with_the_default(self, name: str) -> None:
        build = BASELINES[name]
        default, first = build().parameters, build(**build.GRID[0]).parameters
        assert {key: value for key, value in first.items() if key != "epochs"} == {
            key: value for key, value in default.items() if key != "epochs"
        }
        told = [build(**options).parameters for options in build.GRID]
        assert all(one not in told[:place] for place, one in enumerate(told))

    def test_planted_leaks_are_seen(self, name: str) -> None:
        """What is fitted depends on training events alone; fitted on test events too, it would give itself away."""
        rng = np.random.default_rng(0)
        log = [rng.permutation(N)[:5] for _ in range(10)]
        other = [np.concatenate([h[:-2], (h[-2:] + 1) % N]) for h in log]
        train = [h[:-2] for h in log]
        asked = [h[:-1] for h in log]
        honest = make(name).fit(train, ITEMS).scores(asked)
        np.testing.assert_array_equal(honest, make(name).fit([h[:-2] for h in other], ITEMS).scores(asked))
        if name != "text":  # It learns nothing from events.
            leaked = make(name).fit(log, ITEMS).scores(asked)
            assert not np.allclose(honest, leaked)
            assert not np.allclose(leaked, make(name).fit(other, ITEMS).scores(asked))

    def test_items_outside_the_catalogue_are_refused(self, name: str) -> None:
        with pytest.raises(DataError, match="holds item 6"):
            make(name).fit([np.array([6])], ITEMS)


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


def test_parameters_are_those_in_use() -> None:
    assert Popularity().parameters == {}
    assert ItemKNN(decay=0.9, window=3).parameters == {"decay": 0.9, "window": 3}
    assert EASE(l2=5, decay=0.9, window=3).parameters == {"l2": 5, "decay": 0.9, "window": 3}
    assert Text(decay=0.9).parameters == {"decay": 0.9, "window": 20}
    asked = {"decay": 0.9, "window": 3, "power": 0, "reach": 1, "back": 1, "text": 2}
    assert TransitionsText(**asked).parameters == asked


def _log(seed: int) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Training histories, and validation histories with their targets, of a random walk around the items."""
    rng = np.random.default_rng(seed)
    log = [np.cumsum(rng.integers(0, 3, size=6)) % N for _ in range(30)]
    return [h[:-1] for h in log], [h[:-1] for h in log], np.array([h[-1] for h in log])


@pytest.mark.parametrize("exclude_seen", [True, False])
@pytest.mark.parametrize("name", ["item_knn", "transitions_text", "popularity"])
def test_tune_picks_what_the_validation_says(name: str, exclude_seen: bool) -> None:
    train, histories, targets = _log(0)
    tuned = tune(name, train, ITEMS, histories, targets, exclude_seen=exclude_seen)
    expected = []
    for options in BASELINES[name].GRID:
        fitted = BASELINES[name](**options).fit(train, ITEMS)
        ranks = metrics.ranks(recommend(fitted, histories, 10, exclude_seen), targets)
        told = {"ndcg@10": metrics.ndcg(ranks, 10).mean(), "recall@10": metrics.recall(ranks, 10).mean()}
        expected.append({"options": fitted.parameters, **told})
    assert tuned.settings == expected
    best = max(expected, key=lambda setting: setting["ndcg@10"])
    assert tuned.options == best["options"] == tuned.baseline.parameters
    again = BASELINES[name](**tuned.options).fit(train, ITEMS)
    np.testing.assert_array_equal(again.scores(histories), tuned.baseline.scores(histories))


def test_tuned_sasrec_is_trained_again_without_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    train, histories, targets = _log(1)
    grid = [{**SMALL, "epochs": 12, "learning_rate": rate} for rate in (0.001, 0.03)]
    monkeypatch.setattr(BASELINES["sasrec"], "GRID", grid)
    tuned = tune("sasrec", train, ITEMS, histories, targets, exclude_seen=False)
    assert len(tuned.settings) == 2
    best = max(tuned.settings, key=lambda setting: setting["ndcg@10"])
    assert tuned.options == best["options"]
    assert tuned.options["epochs"] in (4, 8, 12)
    again = BASELINES["sasrec"](**tuned.options).fit(train, ITEMS)
    np.testing.assert_array_equal(again.scores(histories), tuned.baseline.scores(histories))
    ranks = metrics.ranks(recommend(again, histories, 10, exclude_seen=False), targets)
    assert metrics.ndcg(ranks, 10).mean() == best["ndcg@10"]


def test_bad_input_is_refused() -> None:
    for decay, window in ((0.0, 1), (1.5, 1), (0.8, 0)):
        for build in (ItemKNN, EASE, Text, TransitionsText):
            with pytest.raises(ConfigError, match="decay"):
                build(decay=decay, window=window)
    for wrong in ({"power": 2}, {"reach": 0}, {"back": 2}, {"text": -1}):
        with pytest.raises(ConfigError, match="power"):
            TransitionsText(**wrong)
    with pytest.raises(ConfigError, match="l2"):
        EASE(l2=0)
    fitted = Popularity().fit([], ITEMS)
    with pytest.raises(ConfigError, match="at least 1"):
        recommend(fitted, [], 0)
    for allowed in (np.ones(5, dtype=bool), np.arange(N)):
        with pytest.raises(DataError, match=r"allowed must be bool \[6\]"):
            recommend(fitted, [EMPTY], 1, allowed=allowed)
    with pytest.raises(ConfigError, match="Did you mean 'ease'"):
        tune("eas", [], ITEMS, [], [])
    with pytest.raises(DataError, match="needs validation cases"):
        tune("popularity", [], ITEMS, [], [])
