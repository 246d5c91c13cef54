from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse
from sklearn.metrics import log_loss, roc_auc_score

from genrec import metrics
from genrec.errors import ConfigError, DataError

rank_lists = st.lists(st.integers(0, 30), min_size=1, max_size=40)


# The textbook definitions over relevance lists, independent of ranks.
SLOW: dict[str, Callable[[list[float], int], float]] = {
    "recall": lambda relevance, k: sum(relevance),
    "hit_rate": lambda relevance, k: max(relevance, default=0.0),
    "precision": lambda relevance, k: sum(relevance) / k,
    "f1": lambda relevance, k: 2 / (k + 1) if sum(relevance) else 0.0,
    "ndcg": lambda relevance, k: sum((2**rel - 1) / math.log2(place + 2) for place, rel in enumerate(relevance)),
    "mrr": lambda relevance, k: max((rel / (place + 1) for place, rel in enumerate(relevance)), default=0.0),
}


def slow(name: str, recommended: list[int], target: int, k: int) -> float:
    return SLOW[name]([1.0 if item == target else 0.0 for item in recommended[:k]], k)


def test_every_metric_is_documented_explained_and_compared() -> None:
    text = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text(encoding="utf-8")
    for name in (*metrics.METRICS, *metrics.LIST_METRICS):
        assert f"`{name}@k`" in text
    assert set(metrics.EXPLANATIONS) == set(metrics.LIST_METRICS)
    assert set(metrics.ACRONYMS) <= set(metrics.METRICS)
    assert set(SLOW) == set(metrics.METRICS)


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
    for name, metric in metrics.METRICS.items():
        assert metric([1], k) == pytest.approx([{"precision": 1 / k, "f1": 2 / (k + 1)}.get(name, 1.0)])
        assert metric([0], k) == [0.0]
        assert metric([k + 1], k) == [0.0]


@given(rank_lists, st.integers(1, 30))
def test_order_and_monotony(ranks: list[int], k: int) -> None:
    recall, ndcg, mrr = (metrics.METRICS[name](ranks, k) for name in ("recall", "ndcg", "mrr"))
    assert (mrr <= ndcg).all()
    assert (ndcg <= recall).all()
    for name in ("recall", "ndcg", "mrr", "hit_rate"):
        assert (metrics.METRICS[name](ranks, k) <= metrics.METRICS[name](ranks, k + 1)).all()
    precision, f1 = metrics.precision(ranks, k), metrics.f1(ranks, k)
    harmonic = np.divide(2 * precision * recall, precision + recall, out=np.zeros_like(f1), where=recall > 0)
    assert f1 == pytest.approx(harmonic, abs=1e-12)


def test_metrics_agree_with_ranx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")  # Compiling what is called once takes most of a minute.
    import ranx

    rng = np.random.default_rng(6)
    runs, lists = 1000, np.full((1000, 30), -1)
    for row, length in enumerate(rng.integers(1, 31, runs)):
        lists[row, :length] = rng.permutation(40)[:length]
    targets = rng.integers(0, 40, runs)
    places = metrics.ranks(lists, targets)
    assert 0.3 < (places > 0).mean() < 0.5
    truth = ranx.Qrels({f"q{case}": {str(target): 1} for case, target in enumerate(targets)})
    run = ranx.Run(
        {
            f"q{case}": {str(item): 1 / (place + 1) for place, item in enumerate(row[row >= 0])}
            for case, row in enumerate(lists)
        }
    )
    for k in (1, 5, 10, 20, 50):
        names = {f"{name}@{k}": metric(places, k) for name, metric in metrics.METRICS.items()}
        ranx.evaluate(truth, run, list(names))  # Leaves the values of every run in ``run.scores``.
        for name, ours in names.items():
            theirs = np.array([run.scores[name][f"q{case}"] for case in range(runs)])
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9, err_msg=name)


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
    for list_metric in metrics.LIST_METRICS.values():
        with pytest.raises(ConfigError, match="found 0"):
            list_metric([[0]], 0, background(3))


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


# Lists


def background(
    n_items: int, popularity: list[int] | None = None, users: int = 8, text: Any = None, histories: Any = ()
) -> metrics.Background:
    counts = np.array([1] * n_items if popularity is None else popularity)
    vectors = sparse.csr_matrix((n_items, 0)) if text is None else sparse.csr_matrix(text)
    return metrics.Background(counts, users, vectors, [np.array(history, dtype=int) for history in histories])


def test_coverage() -> None:
    recommended = np.array([[0, 1, 2], [1, 3, -1]])
    assert metrics.coverage(recommended, 1, background(8)) == 2 / 8
    assert metrics.coverage(recommended, 2, background(8)) == 3 / 8
    assert metrics.coverage(recommended, 9, background(8)) == 4 / 8


def test_gini_closed_forms() -> None:
    assert metrics.gini(np.arange(6).reshape(3, 2), 2, background(6)) == pytest.approx(0, abs=1e-12)
    assert metrics.gini([[3], [3], [3]], 1, background(6)) == pytest.approx(1)
    # m of n items equally often, the others never: (n - m) / (n - 1).
    assert metrics.gini([[0, 1], [1, 0]], 2, background(6)) == pytest.approx(4 / 5)
    assert metrics.gini([[0]], 1, background(1)) == 0
    assert math.isnan(metrics.gini([[-1, -2]], 2, background(6)))


def test_novelty_is_in_bits() -> None:
    known = background(4, popularity=[8, 4, 1, 0], users=8)
    found = metrics.novelty([[0, 1, 2], [2, 3, -1], [-1, -1, -1]], 3, known)
    assert found[:2] == pytest.approx([(0 + 1 + 3) / 3, 3])  # Without any user as with one.
    assert math.isnan(found[2])


def test_log_popularity_difference() -> None:
    known = background(4, popularity=[8, 4, 1, 0], histories=[[0, 1], [2], []])
    found = metrics.log_popularity_difference([[0, 2], [2, -1], [0, 1]], 2, known)
    first = (math.log(9) + math.log(2)) / 2 - (math.log(9) + math.log(5)) / 2
    assert found[:2] == pytest.approx([first, 0])
    assert math.isnan(found[2])


def test_invalid_and_repeated_places() -> None:
    recommended = np.array([[0, 1, 0, -1], [5, -2, 2, 2], [-1, -1, -1, -1]])
    assert metrics.invalid(recommended, 4, background(5)) == pytest.approx(2 / 7)
    assert metrics.repeated(recommended, 4, background(5)) == pytest.approx(2 / 7)
    assert metrics.invalid(recommended, 1, background(6)) == 0
    assert metrics.repeated(recommended, 2, background(5)) == 0
    assert metrics.invalid(recommended[2:], 4, background(5)) == 0


@given(st.integers(0, 1000), st.integers(2, 7), st.booleans())
def test_diversity_equals_the_mean_over_pairs(seed: int, k: int, wordless: bool) -> None:
    rng = np.random.default_rng(seed)
    text = rng.random((9, 5)) * (rng.random((9, 5)) < 0.5)
    text[0] = [1, 0, 0, 0, 0]
    lengths = np.linalg.norm(text, axis=1, keepdims=True)
    text = np.divide(text, lengths, out=np.zeros_like(text), where=lengths > 0)
    lists = np.stack([rng.permutation(9)[:7] for _ in range(6)])
    lists[1, 3:] = -1
    lists[2, 1:] = -1
    lists[3, 2] = -2  # No item: no pair.
    expected = []
    for row in lists:
        items = [item for item in row[:k] if item >= 0]
        pairs = [text[a] @ text[b] for at, a in enumerate(items) for b in items[at + 1 :]]
        expected.append(1 - np.mean(pairs) if pairs else np.nan)
    found = metrics.diversity(lists, k, background(9, text=text if not wordless else np.zeros((9, 5))))
    assert found == pytest.approx(np.full(6, np.nan) if wordless else expected, abs=1e-12, nan_ok=True)


def test_diversity_is_summed_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    known = background(9, text=np.eye(9)[rng.integers(0, 3, 9)])
    lists = rng.integers(0, 9, (20, 5))
    whole = metrics.diversity(lists, 4, known)
    monkeypatch.setattr(metrics, "_CHUNK", 3)
    np.testing.assert_array_equal(metrics.diversity(lists, 4, known), whole)


def test_lists_of_the_smallest_catalogues() -> None:
    assert metrics.gini(np.array([[0]]), 1, background(2)) == 1  # One of two items has all places.
    assert metrics.gini(np.array([[0, 1]]), 2, background(2)) == 0
    assert metrics.invalid(np.array([[5]]), 1, background(5)) == 1
    assert metrics.novelty(np.array([[0]]), 1, background(2, [1, 1], users=1)).tolist() == [0]
    # A place that names no item says nothing of novelty, the first behind the catalogue as little as any other.
    assert metrics.novelty(np.array([[0, 2], [2, 1]]), 2, background(2, [4, 2], users=8)).tolist() == [1, 2]
    # Places that name no item are not taken for the first ones.
    assert metrics.log_popularity_difference(
        np.array([[1, -1]]), 2, background(2, [7, 0], histories=[[1]])
    ).tolist() == [0]
