"""Recommenders without a language model, to compare with on the same split; fitted on training histories only.

Histories are integer arrays of item indices, oldest first. Scores are comparable within one history, not between two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray
from scipy import linalg, sparse

from genrec import features, metrics
from genrec.errors import ConfigError, DataError, suggestion
from genrec.progress import bar
from genrec.sasrec import SASRec, SASRecText

Histories = Sequence[NDArray[np.integer]]


class Baseline(Protocol):
    """What every baseline offers. ``GRID`` holds the settings that ``tune`` tries, the default first."""

    GRID: ClassVar[Sequence[dict[str, Any]]]

    @property
    def parameters(self) -> dict[str, Any]:
        """What the scores depend on beside the data, by name, for reports; the class called with them is the same."""

    def fit(self, train: Histories, items: pl.DataFrame) -> Self:
        """Learn from training histories (one per user) and the catalogue; the row number in ``items`` is the index."""

    def scores(self, histories: Histories) -> NDArray[np.float32]:
        """float32 [n, n_items], larger is better. Seen items are scored like all others."""


class Popularity:
    """Every history gets the same scores: the number of training interactions of each item."""

    GRID: ClassVar[Sequence[dict[str, Any]]] = ({},)

    @property
    def parameters(self) -> dict[str, Any]:
        return {}

    def fit(self, train: Histories, items: pl.DataFrame) -> Self:
        self._popularity = features.counts(train, items.height).astype(np.float32)
        return self

    def scores(self, histories: Histories) -> NDArray[np.float32]:
        return np.tile(self._popularity, (len(histories), 1))


class _Recency:
    """Reads the last ``window`` items of a history, each step back weighing ``decay`` times as much.

    A history without items is scored by popularity.
    """

    def __init__(self, *, decay: float = 0.6, window: int = 20) -> None:
        if not 0 < decay <= 1 or window < 1:
            raise ConfigError(
                f"{type(self).__name__} needs 0 < decay <= 1 and window >= 1, found {decay} and {window}. The usual "
                "values are 0.7 and 20."
            )
        self.decay = decay
        self.window = window

    @property
    def parameters(self) -> dict[str, Any]:
        return {"decay": self.decay, "window": self.window}

    def fit(self, train: Histories, items: pl.DataFrame) -> Self:
        self._popularity = features.counts(train, items.height).astype(np.float32)
        return self

    def scores(self, histories: Histories) -> NDArray[np.float32]:
        recent = [history[-self.window :] for history in histories]
        lengths = np.array([len(h) for h in recent], dtype=np.int64)
        rows = np.repeat(np.arange(len(recent)), lengths)
        columns = np.concatenate([np.empty(0, np.int64), *recent]).astype(np.int64)
        ages = np.cumsum(lengths)[rows] - 1 - np.arange(len(columns))
        weights = (self.decay**ages).astype(np.float32)
        scores = self._near(sparse.csr_matrix((weights, (rows, columns)), shape=(len(recent), len(self._popularity))))
        scores[lengths == 0] = self._popularity
        return scores

    def _near(self, recent: sparse.csr_matrix) -> NDArray[np.float32]:
        """float32 [n, n_items] from the weights of the last items, float32 csr [n, n_items]."""
        raise NotImplementedError


class ItemKNN(_Recency):
    """Item-based nearest neighbours with recency (Sarwar et al., 2001, WWW; all items are neighbours).

    The score of item i after the history h_1 ... h_n is the sum over its last ``window`` items of
    ``decay ** (n - t) * cos(i, h_t)``, where cos is the cosine of the two items' sets of training users and an item is
    no neighbour of itself. An empty history is scored by popularity.

    Args:
        decay: Weight per step back, above 0 and at most 1; 1 is plain ItemKNN over the window.
        window: How many of the last items count, >= 1.

    The default decay has the best mean, over three data sets, of the NDCG@10 relative to the set's best. Leave-one-out
    validation, all items ranked, seen ones left out, window 20:

    ==============  =====  =====  =====  =====  =====
    decay             0.5    0.6    0.7    0.8    0.9
    ==============  =====  =====  =====  =====  =====
    MovieLens-100K  .1155  .1184  .1157  .1101  .1010
    Beauty          .0475  .0480  .0476  .0465  .0447
    Scientific      .0742  .0764  .0786  .0806  .0805
    relative mean    .962   .983   .981   .966   .927
    ==============  =====  =====  =====  =====  =====

    Beauty is Amazon 2014 (5-core), Scientific Amazon 2018 (5-core, as UniSRec prepared it).
    """

    GRID: ClassVar[Sequence[dict[str, Any]]] = (
        {"decay": 0.6},
        {"decay": 0.4},
        {"decay": 0.5},
        {"decay": 0.7},
        {"decay": 0.8},
        {"decay": 0.9},
        {"decay": 1.0, "window": 1000},
    )

    def fit(self, train: Histories, items: pl.DataFrame) -> Self:
        super().fit(train, items)
        users = features.interaction_matrix(train, items.height)
        degree = np.asarray(users.sum(axis=0)).ravel()
        scale = sparse.diags(np.divide(1, np.sqrt(degree), out=np.zeros_like(degree), where=degree > 0))
        similar = (scale @ (users.T @ users) @ scale).tocsr().astype(np.float32)
        similar.setdiag(0)
        similar.eliminate_zeros()
        self._similar = similar
        return self

    def _near(self, recent: sparse.csr_matrix) -> NDArray[np.float32]:
        return (recent @ self._similar).toarray()


class EASE(_Recency):
    """Embarrassingly shallow autoencoder (Steck, 2019, WWW), a linear item-to-item model in closed form, with recency.

    With X the matrix of who consumed what and ``P = (X'X + l2 I)^-1``, the weight of item j on item i is
    ``-P[j, i] / P[i, i]``, and 0 on itself. The score of i after h_1 ... h_n is the sum of the weights of its last
    ``window`` items, those t steps back times ``decay ** t``; decay 1 and a window over the whole history are Steck's
    EASE. An empty history is scored by popularity.

    Args:
        l2: Ridge penalty, > 0.
        decay, window: As in ``ItemKNN``.

    The matrix is inverted in place, in float32: fitting holds at most two dense float32 matrices of n_items x n_items,
    3.2 GB for 20,000 items, and the fitted model one of them. Time grows with the cube of n_items, so ``fit`` raises a
    DataError beyond ``MOST_ITEMS``.

    The default is the best of these, measured as for ``ItemKNN`` and relative to the best of any l2 (decay 1 over the
    whole history):

    ==============  =====  =====  =====  =====  =====  =====
    decay             0.5    0.6    0.7    0.8    0.9      1
    ==============  =====  =====  =====  =====  =====  =====
    l2 = 500
    MovieLens-100K  .1097  .1156  .1175  .1207  .1232  .0792
    Beauty          .0578  .0579  .0567  .0547  .0521  .0485
    Scientific      .0887  .0903  .0913  .0919  .0906  .0876
    relative mean    .934   .956   .958   .958   .945   .796
    l2 = 100
    MovieLens-100K  .0903  .0937  .0981  .1040  .1112  .0878
    Beauty          .0579  .0599  .0598  .0589  .0562  .0513
    ==============  =====  =====  =====  =====  =====  =====
    """

    MOST_ITEMS: ClassVar[int] = 20_000
    GRID: ClassVar[Sequence[dict[str, Any]]] = (
        {},
        {"l2": 100.0},
        {"l2": 100.0, "decay": 0.9},
        {"decay": 0.9},
        {"l2": 1000.0, "decay": 0.8},
        {"decay": 1.0, "window": 1000},
    )

    def __init__(self, *, l2: float = 500.0, decay: float = 0.7, window: int = 20) -> None:
        if not l2 > 0:
            raise ConfigError(f"EASE needs an l2 above 0, found {l2}. Usual values are 100 to 1000.")
        super().__init__(decay=decay, window=window)
        self.l2 = l2

    @property
    def parameters(self) -> dict[str, Any]:
        return {"l2": self.l2, **super().parameters}

    def fit(self, train: Histories, items: pl.DataFrame) -> Self:
        n_items = items.height
        if n_items > self.MOST_ITEMS:
            raise DataError(
                f"EASE inverts a matrix of items x items and is meant for at most {self.MOST_ITEMS:,} items; the "
                f"catalogue has {n_items:,}. Leave 'ease' out of the baselines; 'item_knn' stays sparse."
            )
        super().fit(train, items)
        users = features.interaction_matrix(train, n_items)
        gram = (users.T @ users).toarray(order="F").astype(np.float32, copy=False)
        gram[np.diag_indices(n_items)] += self.l2
        # Cholesky, then the inverse from the factor. Both work in place and fill the lower triangle alone.
        inverse, failed = linalg.lapack.spotrf(gram, lower=1, overwrite_a=1)
        if not failed:
            inverse, failed = linalg.lapack.spotri(inverse, lower=1, overwrite_c=1)
        if failed:
            raise ConfigError(f"EASE: the matrix cannot be inverted with l2 = {self.l2}. Raise l2; 100 is usual.")
        for start in range(0, n_items, 1024):
            stop = start + 1024
            inverse[start:stop, stop:] = inverse[stop:, start:stop].T
            corner = np.tril(inverse[start:stop, start:stop])
            inverse[start:stop, start:stop] = corner + np.tril(corner, -1).T
        inverse /= -np.diag(inverse).copy()
        inverse[np.diag_indices(n_items)] = 0
        self._weights = np.ascontiguousarray(inverse)
        return self

    def _near(self, recent: sparse.csr_matrix) -> NDArray[np.float32]:
        return recent @ self._weights


class Text(_Recency):
    """Items that read like the last ones; nothing is learnt, so it is the baseline for items without interactions.

    The score of item i after h_1 ... h_n is the sum over the last ``window`` items of
    ``decay ** (n - t) * cos(text(h_t), text(i))``, the cosine of their TF-IDF vectors (``features.text``). An empty
    history is scored by popularity.

    Args:
        decay, window: As in ``ItemKNN``.
    """

    GRID: ClassVar[Sequence[dict[str, Any]]] = (
        {"decay": 0.6},
        {"decay": 0.2},
        {"decay": 0.4},
        {"decay": 0.8},
        {"decay": 1.0},
    )

    def fit(self, train: Histories, items: pl.DataFrame) -> Self:
        super().fit(train, items)
        self._text = features.text(items)
        self._text_columns = self._text.T.tocsr()
        return self

    def _near(self, recent: sparse.csr_matrix) -> NDArray[np.float32]:
        return _cosines(recent @ self._text, self._text_columns)


class TransitionsText(_Recency):
    """Counts of the items that came next after the last items, plus text; nothing is trained.

    The score of item i after h_1 ... h_n is the sum over its last ``window`` items of ``decay ** (n - t)`` times
    ``count(h_t, i) / count(h_t) ** power + text * cos(text(h_t), text(i))``. count(j, i) is how often i followed j in
    training, d events later (at most ``reach``) weighted with 1 / d, plus ``back`` times how often j followed i in the
    same way; count(j) is how often anything followed j directly; the cosine is that of TF-IDF vectors
    (``features.text``). An empty history is scored by popularity.

    Args:
        decay, window: As in ``ItemKNN``.
        power: 1 divides by how often j was followed, 0 leaves the plain counts; between 0 and 1.
        reach: Events between two items that still count, >= 1; 1: direct followers alone.
        back: Weight of the other direction, from 0 to 1.
        text: Weight of the cosine, >= 0.

    The default is the best of these for window 20, power 0.25 and reach 10, measured as for ``ItemKNN``:

    ==============  =====  =====  =====  =====  =====  =====  =====  =====
    decay             0.5    0.5    0.6    0.7    0.7    0.7    0.7    0.8
    back                0      0      0      0   0.25    0.5    0.5      1
    text                1      2      2      2      2      2      4      2
    ==============  =====  =====  =====  =====  =====  =====  =====  =====
    MovieLens-100K  .1086  .1113  .1132  .1147  .1205  .1193  .1215  .1183
    Beauty          .0812  .0820  .0823  .0811  .0799  .0781  .0749  .0706
    Scientific      .0953  .0973  .0988  .1002  .1034  .1052  .1003  .1068
    relative mean    .924   .941   .952   .956   .977   .972   .950   .944
    ==============  =====  =====  =====  =====  =====  =====  =====  =====
    """

    GRID: ClassVar[Sequence[dict[str, Any]]] = (
        {},
        {"back": 0.5},
        {"back": 0.5, "text": 4.0},
        {"text": 1.0},
        {"decay": 0.5, "back": 0.0, "text": 1.0},
        {"decay": 0.6, "back": 0.0},
        {"decay": 0.8, "back": 1.0},
        {"decay": 0.9, "back": 1.0},
        {"power": 0.5, "back": 0.5},
    )

    def __init__(
        self,
        *,
        decay: float = 0.7,
        window: int = 20,
        power: float = 0.25,
        reach: int = 10,
        back: float = 0.25,
        text: float = 2.0,
    ) -> None:
        super().__init__(decay=decay, window=window)
        if not (0 <= power <= 1 and reach >= 1 and 0 <= back <= 1 and text >= 0):
            raise ConfigError(
                "TransitionsText needs power and back between 0 and 1, reach >= 1 and text >= 0, "
                f"found {power}, {back}, {reach} and {text}. The usual values are 0.25, 0.25, 10 and 2."
            )
        self.power, self.reach, self.back, self.text = power, reach, back, text

    @property
    def parameters(self) -> dict[str, Any]:
        own = {"power": self.power, "reach": self.reach, "back": self.back, "text": self.text}
        return {**super().parameters, **own}

    def fit(self, train: Histories, items: pl.DataFrame) -> Self:
        super().fit(train, items)
        n_items = items.height
        shape = (n_items, n_items)
        counts = sparse.csr_matrix(shape, dtype=np.float32)
        scale = np.ones(n_items)
        for distance in range(1, self.reach + 1):
            pairs = [np.empty((2, 0), np.int64)]
            pairs += [np.stack([h[:-distance], h[distance:]]) for h in train if len(h) > distance]
            before, after = np.concatenate(pairs, axis=1).astype(np.int64)
            if distance == 1:
                scale = np.maximum(np.bincount(before, minlength=n_items), 1) ** -float(self.power)
            weight = np.full(len(before), 1 / distance, dtype=np.float32)
            counts = counts + sparse.csr_matrix((weight, (before, after)), shape=shape)
        if self.back:
            counts = counts + self.back * counts.T
        self._transitions = (sparse.diags(scale) @ counts).tocsr().astype(np.float32)
        self._text = features.text(items)
        self._text_columns = self._text.T.tocsr()
        return self

    def _near(self, recent: sparse.csr_matrix) -> NDArray[np.float32]:
        scores = (recent @ self._transitions).toarray()
        if self.text:
            scores += np.float32(self.text) * _cosines(recent @ self._text, self._text_columns)
        return scores


BASELINES: dict[str, type[Baseline]] = {
    "popularity": Popularity,
    "item_knn": ItemKNN,
    "ease": EASE,
    "transitions_text": TransitionsText,
    "text": Text,
    "sasrec": SASRec,
    "sasrec_text": SASRecText,
}


@dataclass(frozen=True, eq=False)
class Tuned:
    """What tuning chose.

    ``options`` builds the baseline again, ``settings`` holds every setting that was tried with its NDCG@10 and
    recall@10 on the validation cases, in the order tried, and ``baseline`` is the chosen one, fitted.
    """

    options: dict[str, Any]
    settings: list[dict[str, Any]]
    baseline: Baseline


def tune(
    name: str,
    train: Histories,
    items: pl.DataFrame,
    histories: Histories,
    targets: ArrayLike,
    *,
    exclude_seen: bool = True,
) -> Tuned:
    """Fit every setting of the baseline's ``GRID`` and keep the one with the best NDCG@10 on validation cases.

    The whole catalogue is ranked. SASRec is validated as it trains, and the epoch that was best is part of its options;
    of two settings that are equal, the earlier one is kept.

    Args:
        name: Out of ``BASELINES``.
        train: Training histories, one per user.
        items: The catalogue.
        histories: n validation histories, oldest first. Test cases have no place here.
        targets: int [n], the item that came next.
        exclude_seen: Rank the items of the history last, as the report does.
    """
    if name not in BASELINES:
        raise ConfigError(f"unknown baseline {name!r}. {suggestion(name, BASELINES)}")
    wanted = np.asarray(targets, dtype=np.int64)
    if not len(wanted) or len(wanted) != len(histories):
        raise DataError(
            f"tuning {name} needs validation cases, found {len(histories)} histories and {len(wanted)} targets. "
            "Choose a split that holds validation events, or do not tune."
        )
    build = BASELINES[name]
    settings: list[dict[str, Any]] = []
    chosen: Baseline | None = None

    def measure(baseline: Baseline) -> dict[str, float]:
        ranks = metrics.ranks(recommend(baseline, histories, 10, exclude_seen), wanted)
        return {"ndcg@10": float(metrics.ndcg(ranks, 10).mean()), "recall@10": float(metrics.recall(ranks, 10).mean())}

    def keep(baseline: Baseline) -> None:
        nonlocal chosen
        found = measure(baseline)
        if chosen is None or found["ndcg@10"] > max(setting["ndcg@10"] for setting in settings):
            chosen = baseline
        settings.append({"options": baseline.parameters, **found})

    if issubclass(build, SASRec):
        for number, options in enumerate(build.GRID, 1):
            title = f"tuning {name}, setting {number} of {len(build.GRID)}"
            keep(build(**options).fit(train, items, lambda network: measure(network)["ndcg@10"], title=title))
    else:
        with bar(f"tuning {name}", len(build.GRID)) as advance:
            for options in build.GRID:
                keep(build(**options).fit(train, items))
                advance(note=f"NDCG@10 {settings[-1]['ndcg@10']:.4f}")
    assert chosen is not None  # No grid is empty.
    return Tuned(chosen.parameters, settings, chosen)


def recommend(
    baseline: Baseline,
    histories: Histories,
    k: int,
    exclude_seen: bool = True,
    batch: int = 256,
    allowed: NDArray[np.bool_] | None = None,
) -> NDArray[np.int32]:
    """The k items that a fitted baseline scores highest for each history.

    Args:
        baseline: Fitted on training histories.
        histories: n histories, oldest first; at test they include the validation item.
        k: Length of the lists, >= 1.
        exclude_seen: Leave out the items of the history.
        batch: Histories scored at once; ``batch`` x n_items floats are held in memory.
        allowed: bool [n_items], the items that may be recommended, such as those without interactions; None: all.

    Returns:
        int32 [n, k] best first, ties by item index, padded with -1 when fewer than k items are left.
    """
    if k < 1 or batch < 1:
        raise ConfigError(f"k and batch must be at least 1, found {k} and {batch}.")
    lists = np.full((len(histories), k), -1, dtype=np.int32)
    # Histories of like length are scored together, which spares a sequence model the padding.
    order = np.argsort([len(history) for history in histories], kind="stable")
    for start in range(0, len(histories), batch):
        cases = order[start : start + batch]
        part = [histories[case] for case in cases]
        scores = baseline.scores(part)
        if allowed is not None:
            if allowed.dtype != np.bool_ or allowed.shape != scores.shape[1:]:
                raise DataError(
                    f"allowed must be bool [{scores.shape[1]}], one for each item, found {allowed.dtype} "
                    f"{list(allowed.shape)}. Pass a mask over the catalogue."
                )
            scores[:, ~allowed] = -np.inf
        if exclude_seen:
            for row, history in enumerate(part):
                scores[row, history] = -np.inf
        lists[cases] = features.top_k(scores, k)
    return lists


def _cosines(asked: sparse.csr_matrix, columns: sparse.csr_matrix) -> NDArray[np.float32]:
    """``asked`` [n, V] times ``columns`` [V, n_items], dense; only the words that are asked for are made dense."""
    words = np.unique(asked.indices)
    return np.ascontiguousarray((columns[words].T @ asked[:, words].toarray().T).T, dtype=np.float32)
