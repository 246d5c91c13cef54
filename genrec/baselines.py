"""Recommenders without a language model, to compare with on the same split; fitted on training histories only.

Histories are integer arrays of item indices, oldest first. Scores are comparable within one history, not between two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Self

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy import sparse

from genrec import features
from genrec.errors import ConfigError

Histories = Sequence[NDArray[np.integer]]


class Baseline(Protocol):
    """What every baseline offers."""

    @property
    def parameters(self) -> dict[str, float]:
        """What the scores depend on beside the data, by name, for reports."""

    def fit(self, train: Histories, items: pl.DataFrame) -> Self:
        """Learn from training histories (one per user) and the catalogue; the row number in ``items`` is the index."""

    def scores(self, histories: Histories) -> NDArray[np.float32]:
        """float32 [n, n_items], larger is better. Seen items are scored like all others."""


class Popularity:
    """Every history gets the same scores: the number of training interactions of each item."""

    @property
    def parameters(self) -> dict[str, float]:
        return {}

    def fit(self, train: Histories, items: pl.DataFrame) -> Self:
        self._popularity = _popularity(train, items.height)
        return self

    def scores(self, histories: Histories) -> NDArray[np.float32]:
        return np.tile(self._popularity, (len(histories), 1))


class ItemKNN:
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

    def __init__(self, *, decay: float = 0.6, window: int = 20) -> None:
        if not 0 < decay <= 1 or window < 1:
            raise ConfigError(
                f"ItemKNN needs 0 < decay <= 1 and window >= 1, found {decay} and {window}. "
                "The usual values are 0.6 and 20."
            )
        self.decay = decay
        self.window = window

    @property
    def parameters(self) -> dict[str, float]:
        return {"decay": self.decay, "window": self.window}

    def fit(self, train: Histories, items: pl.DataFrame) -> Self:
        self._popularity = _popularity(train, items.height)
        users = features.interaction_matrix(train, items.height)
        degree = np.asarray(users.sum(axis=0)).ravel()
        scale = sparse.diags(np.divide(1, np.sqrt(degree), out=np.zeros_like(degree), where=degree > 0))
        similar = (scale @ (users.T @ users) @ scale).tocsr().astype(np.float32)
        similar.setdiag(0)
        similar.eliminate_zeros()
        self._similar = similar
        return self

    def scores(self, histories: Histories) -> NDArray[np.float32]:
        recent = [history[-self.window :] for history in histories]
        lengths = np.array([len(h) for h in recent], dtype=np.int64)
        rows = np.repeat(np.arange(len(recent)), lengths)
        columns = np.concatenate([np.empty(0, np.int64), *recent]).astype(np.int64)
        ages = np.cumsum(lengths)[rows] - 1 - np.arange(len(columns))
        weights = (self.decay**ages).astype(np.float32)
        shape = (len(recent), len(self._popularity))
        scores = (sparse.csr_matrix((weights, (rows, columns)), shape=shape) @ self._similar).toarray()
        scores[lengths == 0] = self._popularity
        return scores


class TransitionsText:
    """Next-item counts plus text, from the last item alone; nothing is trained.

    The score of item i after the last item j is ``count(j -> i) / count(j -> any) ** power + cos(text(j), text(i))``:
    how often i directly followed j in training, and the cosine of their TF-IDF vectors (``features.text``). An empty
    history is scored by popularity.

    Args:
        power: 1 makes the first part a conditional probability, 0 leaves the plain count; between 0 and 1.

    The default power is the best of these, measured as for ``ItemKNN``:

    ==============  =====  =====  =====  =====  =====
    power               0   0.25    0.5   0.75      1
    ==============  =====  =====  =====  =====  =====
    MovieLens-100K  .0734  .0735  .0682  .0412  .0243
    Beauty          .0668  .0705  .0691  .0626  .0555
    Scientific      .0705  .0743  .0775  .0764  .0755
    relative mean    .952   .986   .969   .811   .698
    ==============  =====  =====  =====  =====  =====
    """

    def __init__(self, *, power: float = 0.25) -> None:
        if not 0 <= power <= 1:
            raise ConfigError(f"TransitionsText needs a power between 0 and 1, found {power}. The usual value is 0.25.")
        self.power = power

    @property
    def parameters(self) -> dict[str, float]:
        return {"power": self.power}

    def fit(self, train: Histories, items: pl.DataFrame) -> Self:
        n_items = items.height
        self._popularity = _popularity(train, n_items)
        pairs = [np.empty((2, 0), np.int64)] + [np.stack([h[:-1], h[1:]]) for h in train if len(h) > 1]
        before, after = np.concatenate(pairs, axis=1).astype(np.int64)
        scale = np.maximum(np.bincount(before, minlength=n_items), 1) ** -self.power
        values = scale[before].astype(np.float32)
        self._transitions = sparse.csr_matrix((values, (before, after)), shape=(n_items, n_items))
        self._text = features.text(items)
        self._text_columns = self._text.T.tocsr()
        return self

    def scores(self, histories: Histories) -> NDArray[np.float32]:
        some = np.array([len(h) > 0 for h in histories], dtype=bool)
        scores = np.tile(self._popularity, (len(histories), 1))
        # Many histories end with the same item, so each last item is scored once.
        last, row = np.unique([int(h[-1]) for h in histories if len(h)], return_inverse=True)
        last = last.astype(np.int64)
        scored = self._transitions[last].toarray() + (self._text[last] @ self._text_columns).toarray()
        scores[some] = scored[row]
        return scores


BASELINES: dict[str, type[Baseline]] = {
    "popularity": Popularity,
    "item_knn": ItemKNN,
    "transitions_text": TransitionsText,
}


def recommend(
    baseline: Baseline, histories: Histories, k: int, exclude_seen: bool = True, batch: int = 256
) -> NDArray[np.int32]:
    """The k items that a fitted baseline scores highest for each history.

    Args:
        baseline: Fitted on training histories.
        histories: n histories, oldest first; at test they include the validation item.
        k: Length of the lists, >= 1.
        exclude_seen: Leave out the items of the history.
        batch: Histories scored at once; ``batch`` x n_items floats are held in memory.

    Returns:
        int32 [n, k] best first, ties by item index, padded with -1 when fewer than k items are left.
    """
    if k < 1 or batch < 1:
        raise ConfigError(f"k and batch must be at least 1, found {k} and {batch}.")
    lists = np.full((len(histories), k), -1, dtype=np.int32)
    for start in range(0, len(histories), batch):
        part = histories[start : start + batch]
        scores = baseline.scores(part)
        if exclude_seen:
            for row, history in enumerate(part):
                scores[row, history] = -np.inf
        lists[start : start + batch] = features.top_k(scores, k)
    return lists


def _popularity(train: Histories, n_items: int) -> NDArray[np.float32]:
    """Training interactions per item, float32 [n_items]; refuses histories that do not fit the catalogue."""
    features.interaction_matrix(train, n_items)
    return np.bincount(np.concatenate([np.empty(0, np.int64), *train]).astype(np.int64), minlength=n_items).astype(
        np.float32
    )
