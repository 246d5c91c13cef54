from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score

from genrec import metrics
from genrec.errors import ConfigError, DataError

rank_lists = st.lists(st.integers(0, 30), min_size=1, max_size=40)


def slow(name: str, recommended: list[int], target: int, k: int) -> float:
    """The textbook definitions over relevance lists, independent of ranks."""
    relevance = [1.0 if item == target else 0.0 for item in recommended[:k]]
    if name == "recall":
        return sum(relevance)
    if name == "ndcg":
        dcg = sum((2**rel - 1) / math.log2(place + 2) for place, rel in enumerate(relevance))
        return dcg / (1 / math.log2(2))
    return max((rel / (place + 1) for place, rel in enumerate(relevance)), default=0.0)


@given(st.data(), st.integers(1, 12), st.integers(1, 8))
def test_metrics_equal_the_slow_reference(data: st.DataObject, k: int, n: int) -> None:
    lists = [data.draw(st.permutations(range(12)))[: data.draw(st.integers(0, 12))] for _ in range(n)]
    padded = np.array([row + [-1] * (12 - len(row)) for row in lists], dtype=np.int32)
    targets = np.array([data.draw(st.integers(0, 14)) for _ in range(n)], dtype=np.int32)
    ranks = metrics.ranks(padded, targets)
    assert ranks.dtype == np.int32
    for name, metric in metrics.METRICS.items():
        values = metric(ranks, k)
        assert values.dtype == np.float64
        assert values == pytest.approx([slow(name, row, t, k) for row, t in zip(lists, targets, strict=True)])


@pytest.mark.parametrize("k", [1, 5, 10])
def test_closed_forms(k: int) -> None:
    every_rank = np.arange(1, 21)
    assert metrics.recall(every_rank, k).mean() == pytest.approx(k / 20)
    assert metrics.mrr(every_rank, k).mean() == pytest.approx(sum(1 / r for r in range(1, k + 1)) / 20)
    assert metrics.ndcg(every_rank, k).mean() == pytest.approx(sum(1 / math.log2(r + 1) for r in range(1, k + 1)) / 20)
    for metric in metrics.METRICS.values():
        assert metric([1], k) == [1.0]
        assert metric([0], k) == [0.0]
        assert metric([k + 1], k) == [0.0]


@given(rank_lists, st.integers(1, 30))
def test_order_and_monotony(ranks: list[int], k: int) -> None:
    recall, ndcg, mrr = (metrics.METRICS[name](ranks, k) for name in ("recall", "ndcg", "mrr"))
    assert (mrr <= ndcg).all()
    assert (ndcg <= recall).all()
    for metric in metrics.METRICS.values():
        assert (metric(ranks, k) <= metric(ranks, k + 1)).all()


def test_ranks_ignore_padding_and_count_the_first_place() -> None:
    recommended = np.array([[3, 5, -1], [5, 3, 3], [-1, -1, -1]])
    assert metrics.ranks(recommended, np.array([5, 3, 0])).tolist() == [2, 2, 0]
    assert metrics.ranks(np.empty((2, 0), int), np.array([0, 1])).tolist() == [0, 0]
    assert metrics.ranks(np.empty((0, 3), int), np.empty(0, int)).tolist() == []


def test_bad_input_is_refused() -> None:
    with pytest.raises(DataError, match="target of case 1 is -1"):
        metrics.ranks(np.array([[1, -1], [1, -1]]), np.array([1, -1]))
    with pytest.raises(DataError, match="one target per case"):
        metrics.ranks(np.array([[1, 2]]), np.array([1, 2]))
    for metric in metrics.METRICS.values():
        with pytest.raises(ConfigError, match="found 0"):
            metric([1], 0)
    with pytest.raises(DataError, match="finite value per case"):
        metrics.bootstrap([])
    with pytest.raises(DataError, match="finite value per case"):
        metrics.bootstrap([1.0, math.nan])
    with pytest.raises(ConfigError, match="confidence"):
        metrics.bootstrap([1.0], confidence=1)
    with pytest.raises(ConfigError, match="samples"):
        metrics.bootstrap([1.0], samples=0)
    with pytest.raises(ConfigError, match="n_items"):
        metrics.coverage([[0]], 1, 0)


def test_bootstrap_is_near_the_normal_interval() -> None:
    values = np.random.default_rng(0).random(2000) < 0.2
    low, high = metrics.bootstrap(values)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=half / 10)
    assert high == pytest.approx(values.mean() + half, abs=half / 10)
    narrow = metrics.bootstrap(values, confidence=0.5)
    assert low < narrow[0] < narrow[1] < high


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.integers(0, 5))
def test_bootstrap_is_deterministic_and_bounded(values: list[float], seed: int) -> None:
    low, high = metrics.bootstrap(values, samples=50, seed=seed)
    assert (low, high) == metrics.bootstrap(values[::-1], samples=50, seed=seed)
    slack = 1e-9 * max(1.0, *map(abs, values))
    assert min(values) - slack <= low <= high <= max(values) + slack


def test_bootstrap_of_equal_values_is_a_point() -> None:
    assert metrics.bootstrap([0.25] * 7) == (0.25, 0.25)


# Answers

two_classes = st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=40).filter(
    lambda cases: len({truth for _, truth in cases}) == 2
)


@given(two_classes, st.randoms())
def test_auc_counts_pairs(cases: list[tuple[int, bool]], random: Any) -> None:
    scores, truth = np.array([score for score, _ in cases]), np.array([truth for _, truth in cases])
    pairs = [(up > down) + (up == down) / 2 for up in scores[truth] for down in scores[~truth]]
    found = metrics.auc(scores, truth)
    assert found == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
    assert found == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)
    assert metrics.auc(np.exp(scores), truth) == found == pytest.approx(1 - metrics.auc(-scores, truth))
    weights = np.array([[random.randint(0, 3) for _ in cases] for _ in range(3)])
    for row, weighted in zip(weights, metrics.auc(scores, truth, weights), strict=True):
        again = np.repeat(truth, row)
        if again.all() or not again.any():
            assert np.isnan(weighted)
        else:
            assert weighted == pytest.approx(roc_auc_score(again, np.repeat(scores, row)), abs=1e-12)


def test_auc_of_one_class_is_none_and_bad_scores_are_refused() -> None:
    assert np.isnan(metrics.auc([0.1, 0.2], [True, True]))
    assert np.isnan(metrics.auc([], []))
    for scores, truth in (([0.1, math.nan], [True, False]), ([0.1], [True, False])):
        with pytest.raises(DataError, match="one finite score and one truth per case"):
            metrics.auc(scores, truth)


def test_auc_interval_is_near_that_of_hanley_and_mcneil() -> None:
    rng = np.random.default_rng(1)
    truth = np.arange(600) < 250
    scores = rng.normal(size=600) + truth
    area = float(metrics.auc(scores, truth))
    one, two = area / (2 - area), 2 * area**2 / (1 + area)
    spread = area * (1 - area) + 249 * (one - area**2) + 349 * (two - area**2)
    half = 1.96 * math.sqrt(spread / (250 * 350))
    low, high = metrics.auc_interval(scores, truth)
    assert low == pytest.approx(area - half, abs=half / 5)
    assert high == pytest.approx(area + half, abs=half / 5)
    assert (low, high) == metrics.auc_interval(scores, truth)


@given(st.lists(st.tuples(*[st.floats(-20, 5)] * 3, st.integers(0, 2)), min_size=1, max_size=20))
def test_log_loss_equals_that_of_sklearn(cases: list[tuple[float, float, float, int]]) -> None:
    scores, truth = np.array([case[:3] for case in cases]), np.array([case[3] for case in cases])
    shares = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    found = metrics.log_loss(scores, truth)
    assert found.shape == truth.shape
    assert found.mean() == pytest.approx(log_loss(truth, shares, labels=[0, 1, 2]), rel=1e-6, abs=1e-6)
    assert metrics.log_loss(scores - 500, truth) == pytest.approx(found)


def test_coverage() -> None:
    recommended = np.array([[0, 1, 2], [1, 3, -1]])
    assert metrics.coverage(recommended, 1, 8) == 2 / 8
    assert metrics.coverage(recommended, 2, 8) == 3 / 8
    assert metrics.coverage(recommended, 9, 8) == 4 / 8


def test_interval_is_the_mean_and_its_bootstrap() -> None:
    values = np.array([True, False, False, True, True])
    low, high = metrics.bootstrap(values)
    assert metrics.interval(values) == {"mean": 0.6, "low": low, "high": high}
