"""Metrics: rankings of next-item recommendation, lists whatever their targets, and answers to questions about events.

Of rankings: one relevant item per case, ranks within the full catalogue's list. ``ranks`` are 1-based and 0 where the
target is not in the list; every metric of ``METRICS`` maps ranks to one value per case, and the mean over cases is what
reports print. With a single relevant item, recall@k equals the hit rate.

Of lists: ``recommended`` is int [n, >= 1], best first, padded with -1; a shorter list counts as it is. An entry that is
neither -1 nor an item index is a place that names no item. Metrics of ``LIST_METRICS`` give one number, or one value
per case, which is nan where the case has none (an empty list, say), and the mean is over the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from genrec.errors import ConfigError, DataError

Metric = Callable[[ArrayLike, int], NDArray[np.float64]]
ListMetric = Callable[[ArrayLike, int, "Background"], "float | NDArray[np.float64]"]

_CHUNK = 2048  # Lists whose text is summed at once.


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


def hit_rate(ranks: ArrayLike, k: int) -> NDArray[np.float64]:
    r"""Hit rate@k: whether any relevant item is among the first k; with one relevant item, recall@k.

    .. math:: \mathrm{HR@}k = [1 \le r \le k]

    Returns float64 [n]. Raises ConfigError when k < 1.
    """
    return _within(ranks, k).astype(np.float64)


def precision(ranks: ArrayLike, k: int) -> NDArray[np.float64]:
    r"""Precision@k: the share of the first k places that are relevant, at most 1/k with one relevant item.

    .. math:: \mathrm{P@}k = [1 \le r \le k] / k

    A list that is shorter than k is divided by k too. Returns float64 [n]. Raises ConfigError when k < 1.
    """
    return _within(ranks, k) / k


def f1(ranks: ArrayLike, k: int) -> NDArray[np.float64]:
    r"""F1@k (van Rijsbergen, 1979), the harmonic mean of precision@k and recall@k; with one relevant item

    .. math:: \mathrm{F1@}k = 2\,[1 \le r \le k] / (k + 1)

    Returns float64 [n]. Raises ConfigError when k < 1.
    """
    return 2 * _within(ranks, k) / (k + 1)


METRICS: dict[str, Metric] = {
    "recall": recall,
    "ndcg": ndcg,
    "mrr": mrr,
    "hit_rate": hit_rate,
    "precision": precision,
    "f1": f1,
}  # Under the names that ranx has; a test compares with it.
ACRONYMS = ("ndcg", "mrr", "f1")  # In capitals in prose.


@dataclass(frozen=True, eq=False)
class Background:
    """What metrics of lists read beside the lists.

    Attributes:
        popularity: int [n_items], how many training users have each item.
        users: How many users have a training event.
        text: TF-IDF vectors of the items, csr [n_items, V], rows of unit length or empty (``features.text``).
        histories: The history of each case, as the recommenders were given it.
    """

    popularity: NDArray[np.integer]
    users: int
    text: sparse.csr_matrix
    histories: Sequence[NDArray[np.integer]]

    @property
    def n_items(self) -> int:
        return len(self.popularity)


def coverage(recommended: ArrayLike, k: int, background: Background) -> float:
    """Catalogue coverage@k (Ge et al., 2010, RecSys): the share of the catalogue that is in some case's first k."""
    return float((_exposure(recommended, k, background) > 0).mean())


def gini(recommended: ArrayLike, k: int, background: Background) -> float:
    r"""Gini index of how often each item is recommended (Shani and Gunawardana, 2011, Recommender Systems Handbook).

    .. math:: G = \frac{1}{n - 1} \sum_{j=1}^{n} (2j - n - 1)\, p_{(j)}

    where :math:`p_{(1)} \le \dots \le p_{(n)}` are the shares of all n items of the catalogue, never recommended ones
    included, among the places. 0: all items equally often; 1: always the same one. nan where nothing is recommended.
    """
    counts = np.sort(_exposure(recommended, k, background))
    n, total = len(counts), counts.sum()
    if not total:
        return float("nan")
    return float((2 * np.arange(1, n + 1) - n - 1) @ counts / total / max(n - 1, 1))


def novelty(recommended: ArrayLike, k: int, background: Background) -> NDArray[np.float64]:
    r"""Mean self-information of the recommended items, in bits (Zhou et al., 2010, PNAS 107(10)).

    .. math:: \frac{1}{|L|} \sum_{i \in L} -\log_2 \frac{\max(u_i, 1)}{u}

    with :math:`u_i` of the u training users having item i. An item without any counts as if one user had it, for its
    self-information would be infinite.
    """
    bits = -np.log2(np.maximum(background.popularity, 1) / max(background.users, 1))
    return _mean_of_items(recommended, k, bits)


def diversity(recommended: ArrayLike, k: int, background: Background) -> NDArray[np.float64]:
    r"""Intra-list diversity (Ziegler et al., 2005, WWW): 1 less the mean cosine of all pairs of a list.

    .. math:: 1 - \frac{2}{m (m - 1)} \sum_{a < b} \cos(x_a, x_b)

    over the m items of a list, x their TF-IDF vectors; an item without a word is like none. The sum over pairs is
    :math:`(\lVert \sum_a x_a \rVert^2 - \sum_a \lVert x_a \rVert^2) / 2`, so that no pair is formed. nan of a list with
    fewer than two items, and of all lists where no item has a word.
    """
    lists = _first(recommended, k)
    values = np.full(len(lists), np.nan)
    text = background.text.astype(np.float64)
    if not text.nnz:
        return values
    lengths = np.asarray(text.multiply(text).sum(axis=1)).ravel()
    for start in range(0, len(lists), _CHUNK):
        part = lists[start : start + _CHUNK]
        real = _real(part, background)
        rows, columns = np.nonzero(real)
        items = part[rows, columns]
        chosen = sparse.csr_matrix((np.ones(len(rows)), (rows, items)), shape=(len(part), background.n_items))
        sums = chosen @ text
        sums.data **= 2
        squares = np.asarray(sums.sum(axis=1)).ravel()
        m = real.sum(axis=1)
        pairs = m * (m - 1)
        same = squares - chosen @ lengths
        values[start : start + _CHUNK] = 1 - np.divide(same, pairs, out=np.full(len(part), np.nan), where=pairs > 0)
    return values


def log_popularity_difference(recommended: ArrayLike, k: int, background: Background) -> NDArray[np.float64]:
    r"""How much more popular the list is than the user's own history; the popularity lift of Abdollahpouri et al.
    (2019, RMSE at RecSys) with logarithms.

    .. math:: \frac{1}{|L|} \sum_{i \in L} \ln(1 + u_i) - \frac{1}{|H|} \sum_{j \in H} \ln(1 + u_j)

    with :math:`u_i` the number of training users who have item i. Above 0 the list is more popular than the history.
    nan of an empty list or history.
    """
    logs = np.log1p(background.popularity)
    lengths = np.array([len(history) for history in background.histories], dtype=np.int64)
    events = np.concatenate([np.empty(0, np.int64), *background.histories]).astype(np.int64)
    case = np.repeat(np.arange(len(lengths)), lengths)
    sums = np.bincount(case, weights=logs[events], minlength=len(lengths))
    own = np.divide(sums, lengths, out=np.full(len(lengths), np.nan), where=lengths > 0)
    return _mean_of_items(recommended, k, logs) - own


def invalid(recommended: ArrayLike, k: int, background: Background) -> float:
    """The share of places that name no item of the catalogue; 0 of everything that is decoded within it."""
    lists = _first(recommended, k)
    given = lists != -1
    return float((given & ~_real(lists, background)).sum() / max(given.sum(), 1))


def repeated(recommended: ArrayLike, k: int, background: Background) -> float:
    """The share of places that name an item which stands further up in the same list."""
    lists = np.sort(_first(recommended, k), axis=1)
    again = (lists[:, 1:] == lists[:, :-1]) & _real(lists[:, 1:], background)
    return float(again.sum() / max((lists != -1).sum(), 1))


LIST_METRICS: dict[str, ListMetric] = {
    "coverage": coverage,
    "gini": gini,
    "novelty": novelty,
    "diversity": diversity,
    "log_popularity_difference": log_popularity_difference,
    "invalid": invalid,
    "repeated": repeated,
}

# What reports say of each metric of lists.
EXPLANATIONS = {
    "coverage": "share of the catalogue that is in at least one user's list; higher: more of the catalogue is shown.",
    "gini": "how unevenly the places in the lists are spread over the catalogue; 0: every item as often, 1: one item "
    "has all.",
    "novelty": "how little known the recommended items are: mean of -log2 of the share of training users who have the "
    "item; one bit more: half as well known.",
    "diversity": "how different the items of one list are from each other (1 minus the mean cosine similarity of their "
    "texts); higher: more varied lists.",
    "log_popularity_difference": "how much more popular the list is than the user's own history (difference of mean "
    "log popularity); above 0: the list leans to what is popular more than the user does.",
    "invalid": "share of recommended places that name no item of the catalogue; it must be 0.",
    "repeated": "share of recommended places that name an item which stands further up in the same list; it must be 0.",
}  # fmt: skip


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


def auc_interval(scores: ArrayLike, positive: ArrayLike) -> tuple[float, float]:
    """95% percentile bootstrap interval of ``auc`` over cases; resamples of one class alone are left out.

    Args:
        scores, positive: As in ``auc``; both classes occur.
    """
    samples = 2000
    n = np.asarray(scores).size
    rng = np.random.default_rng(0)
    chunk = max(1, 4_000_000 // n)
    drawn = (rng.multinomial(n, np.full(n, 1 / n), size=min(chunk, samples - i)) for i in range(0, samples, chunk))
    found = np.concatenate([auc(scores, positive, weights) for weights in drawn])
    low, high = np.nanquantile(found, [0.025, 0.975])
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


def _first(recommended: ArrayLike, k: int) -> NDArray[np.integer]:
    _check_k(k)
    return np.asarray(recommended)[:, :k]


def _real(lists: NDArray[np.integer], background: Background) -> NDArray[np.bool_]:
    """Which places name an item of the catalogue."""
    return (lists >= 0) & (lists < background.n_items)


def _exposure(recommended: ArrayLike, k: int, background: Background) -> NDArray[np.int64]:
    """int64 [n_items], in how many places of all lists each item stands."""
    lists = _first(recommended, k)
    return np.bincount(lists[_real(lists, background)], minlength=background.n_items)


def _mean_of_items(recommended: ArrayLike, k: int, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """float64 [n], the mean of ``values`` (one per item) over the items of each list; nan of an empty one."""
    lists = _first(recommended, k)
    real = (lists >= 0) & (lists < len(values))
    sums = np.where(real, values[np.where(real, lists, 0)], 0).sum(axis=1)
    m = real.sum(axis=1)
    return np.divide(sums, m, out=np.full(len(lists), np.nan), where=m > 0)


def _within(ranks: ArrayLike, k: int) -> NDArray[np.bool_]:
    _check_k(k)
    r = np.asarray(ranks)
    return (r >= 1) & (r <= k)
