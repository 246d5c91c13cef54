"""Metrics: rankings of next-item recommendation, and answers of question prompts about events.

Of rankings: one relevant item per case, ranks within the full catalogue's list.

The conventions: ``ranks`` are 1-based and 0 where the target is not in the list; every metric maps ranks to one value
per case, and the mean over cases is what reports print. With a single relevant item, recall@k equals the hit rate.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from genrec.errors import ConfigError, DataError

Metric = Callable[[ArrayLike, int], NDArray[np.float64]]


def ranks(recommended: ArrayLike, targets: ArrayLike) -> NDArray[np.int32]:
    """Position of each case's target in its list.

    Args:
        recommended: int [n, k] item indices, best first, padded with -1.
        targets: int [n] the item that came next, >= 0.

    Returns:
        int32 [n], 1 for the first place, 0 when the target is not in the list. A list that holds an item twice
        counts its first place.

    Raises:
        DataError: The shapes do not fit, or a target is negative (it would match the padding).
    """
    lists, wanted = np.asarray(recommended), np.asarray(targets)
    if lists.ndim != 2 or wanted.shape != (lists.shape[0],):
        raise DataError(
            f"recommended must be [n, k] and targets [n], found {list(lists.shape)} and {list(wanted.shape)}. "
            "Pass one list and one target per case."
        )
    if wanted.size and wanted.min() < 0:
        case = int(np.argmax(wanted < 0))
        raise DataError(
            f"the target of case {case} is {wanted[case]}, not an item index. Leave cases without a target out."
        )
    if lists.shape[1] == 0:
        return np.zeros(len(wanted), dtype=np.int32)
    hits = lists == wanted[:, None]
    return np.where(hits.any(axis=1), hits.argmax(axis=1) + 1, 0).astype(np.int32)


def recall(ranks: ArrayLike, k: int) -> NDArray[np.float64]:
    r"""Recall@k: the share of relevant items that are among the first k.

    .. math:: \mathrm{recall@}k = [1 \le r \le k]

    With one relevant item this is the hit rate. Returns float64 [n]. Raises ConfigError when k < 1.
    """
    return _within(ranks, k).astype(np.float64)


def ndcg(ranks: ArrayLike, k: int) -> NDArray[np.float64]:
    r"""NDCG@k (Järvelin and Kekäläinen, 2002, ACM TOIS 20(4)), binary relevance, one relevant item.

    .. math:: \mathrm{NDCG@}k = [1 \le r \le k] / \log_2(r + 1)

    The ideal DCG of one relevant item is 1, so nothing is left to divide by. Returns float64 [n]. Raises ConfigError
    when k < 1.
    """
    r = np.asarray(ranks, dtype=np.float64)
    return np.where(_within(ranks, k), 1.0 / np.log2(np.maximum(r, 1) + 1), 0.0)


def mrr(ranks: ArrayLike, k: int) -> NDArray[np.float64]:
    r"""Reciprocal rank at cut-off k (Voorhees, 1999, TREC-8 question answering); its mean is MRR@k.

    .. math:: \mathrm{RR@}k = [1 \le r \le k] / r

    Returns float64 [n]. Raises ConfigError when k < 1.
    """
    r = np.asarray(ranks, dtype=np.float64)
    return np.where(_within(ranks, k), 1.0 / np.maximum(r, 1), 0.0)


METRICS: dict[str, Metric] = {"recall": recall, "ndcg": ndcg, "mrr": mrr}


def coverage(recommended: ArrayLike, k: int, n_items: int) -> float:
    """Catalogue coverage@k (Ge et al., 2010, RecSys): the share of the catalogue that is in some case's first k.

    Args:
        recommended: int [n, >=1] item indices, best first, padded with -1.
        k: Cut-off, >= 1; a shorter list counts as it is.
        n_items: Size of the catalogue, >= 1.

    Returns:
        A share between 0 and 1.
    """
    _check_k(k)
    if n_items < 1:
        raise ConfigError(f"n_items must be at least 1, found {n_items}. Coverage needs the size of the catalogue.")
    items = np.unique(np.asarray(recommended)[:, :k])
    return float((items >= 0).sum() / n_items)


def bootstrap(
    values: ArrayLike, *, confidence: float = 0.95, samples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over cases (Efron, 1979, Annals of Statistics 7(1)).

    For the difference of two recommenders pass the differences per case: that is the paired interval.

    Args:
        values: float [n], one value per case, n >= 1.
        confidence: Share of the resampled means inside the interval, between 0 and 1.
        samples: Number of resamples, >= 1.
        seed: The same seed and the same values, in any order, give the same interval.

    Returns:
        (low, high).

    Raises:
        DataError: No values, or values that are not finite.
        ConfigError: ``confidence`` or ``samples`` out of range.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0 or not np.isfinite(array).all():
        raise DataError(
            f"an interval needs one finite value per case, found an array of shape {list(array.shape)}. "
            "Check that the split has cases to evaluate."
        )
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence must lie between 0 and 1, found {confidence}. The usual value is 0.95.")
    if samples < 1:
        raise ConfigError(f"samples must be at least 1, found {samples}. The usual value is 2000.")
    # A resample is a multinomial draw over the distinct values, and a metric has only a few of them.
    distinct, counts = np.unique(array, return_counts=True)
    rng = np.random.default_rng(seed)
    means = np.empty(samples)
    chunk = max(1, 4_000_000 // len(distinct))
    for start in range(0, samples, chunk):
        stop = min(start + chunk, samples)
        drawn = rng.multinomial(array.size, counts / array.size, size=stop - start)
        means[start:stop] = drawn @ distinct / array.size
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def auc(scores: ArrayLike, positive: ArrayLike, weights: ArrayLike | None = None) -> NDArray[np.float64]:
    r"""Area under the ROC curve (Hanley and McNeil, 1982, Radiology 143(1)): how well scores tell positives apart.

    .. math:: \mathrm{AUC} = P(s^+ > s^-) + P(s^+ = s^-) / 2

    Args:
        scores: float [n], finite; only their order matters.
        positive: bool [n].
        weights: float [..., n], how often each case counts; None: once.

    Returns:
        float64 [...]; nan where no positive or no negative case counts.

    Raises:
        DataError: The shapes do not fit, or a score is not finite.
    """
    values, wanted = np.asarray(scores, dtype=np.float64), np.asarray(positive, dtype=bool)
    if values.ndim != 1 or wanted.shape != values.shape or not np.isfinite(values).all():
        raise DataError(
            f"AUC takes one finite score and one truth per case, found {list(values.shape)} and {list(wanted.shape)}. "
            "Check that no score is nan."
        )
    counts = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=np.float64)
    distinct, group = np.unique(values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    begin = np.searchsorted(group[order], np.arange(len(distinct)))
    if not len(distinct):
        return np.full(counts.shape[:-1], np.nan)
    up = np.add.reduceat((counts * wanted)[..., order], begin, axis=-1)
    down = np.add.reduceat((counts * ~wanted)[..., order], begin, axis=-1)
    below = np.cumsum(down, axis=-1) - down / 2
    pairs = up.sum(axis=-1) * down.sum(axis=-1)
    return np.divide((up * below).sum(axis=-1), pairs, out=np.full(pairs.shape, np.nan), where=pairs > 0)


def interval(values: ArrayLike) -> dict[str, float]:
    """``mean``, and ``low`` and ``high`` of ``bootstrap``, of one value per case."""
    low, high = bootstrap(values)
    return {"mean": float(np.asarray(values).mean()), "low": low, "high": high}


def auc_interval(
    scores: ArrayLike, positive: ArrayLike, *, confidence: float = 0.95, samples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of ``auc`` over cases; resamples of one class alone are left out.

    Args:
        scores, positive: As in ``auc``; both classes occur.
        confidence, samples, seed: As in ``bootstrap``.
    """
    n = np.asarray(scores).size
    rng = np.random.default_rng(seed)
    chunk = max(1, 4_000_000 // n)
    drawn = (rng.multinomial(n, np.full(n, 1 / n), size=min(chunk, samples - i)) for i in range(0, samples, chunk))
    found = np.concatenate([auc(scores, positive, weights) for weights in drawn])
    low, high = np.nanquantile(found, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def log_loss(scores: ArrayLike, truth: ArrayLike) -> NDArray[np.float64]:
    r"""Logarithmic loss of the true answer among several, in nats; 0 is perfect.

    .. math:: -\log \frac{\exp s_t}{\sum_j \exp s_j}

    Args:
        scores: float [n, answers], log-probabilities up to a constant per case.
        truth: int [n], the place of the true answer.

    Returns:
        float64 [n], one value per case.
    """
    values, places = np.asarray(scores, dtype=np.float64), np.asarray(truth)
    return np.logaddexp.reduce(values, axis=1) - values[np.arange(len(values)), places]


def _check_k(k: int) -> None:
    if k < 1:
        raise ConfigError(f"the cut-off k must be at least 1, found {k}. The usual value is 10.")


def _within(ranks: ArrayLike, k: int) -> NDArray[np.bool_]:
    _check_k(k)
    r = np.asarray(ranks)
    return (r >= 1) & (r <= k)
