"""Vectors of items from their text and from the training histories. Nothing here ever sees a validation or test event.

Item index = row number in ``items``. Histories are integer arrays of item indices, oldest first, one per user.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from genrec.errors import ConfigError, DataError

TEXT_COLUMNS = ("title", "brand", "categories", "description", "text")

# Scripts that are written without spaces between words, or (Hangul) whose words carry endings: Han, Kana, Hangul, Thai,
# Lao, Myanmar, Khmer. Their runs are cut into single characters and pairs.
_UNSPACED = (
    "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
    "\u3041-\u3096\u3099\u309a\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff"
    "\u1100-\u11ff\u3131-\u318e\uac00-\ud7a3\u0e01-\u0e3a\u0e40-\u0e59\u0e81-\u0eff\u1000-\u109f\u1780-\u17ff"
)


@cache
def _pattern() -> re.Pattern[str]:
    r"""Runs of unspaced script, or words. ``\w`` alone would break Indic words, which hold combining marks."""
    points = [p for p in range(sys.maxunicode + 1) if unicodedata.category(chr(p))[0] == "M"]
    starts = [p for p, before in zip(points, [-2, *points[:-1]], strict=True) if p != before + 1]
    stops = [p for p, after in zip(points, [*points[1:], -2], strict=True) if p != after - 1]
    marks = "".join(f"{chr(a)}-{chr(b)}" for a, b in zip(starts, stops, strict=True))
    return re.compile(
        f"([{_UNSPACED}]+)|((?:(?![{_UNSPACED}])[^\\W_])(?:(?![{_UNSPACED}])[^\\W_]|[{marks}\u200c\u200d])*)"
    )


def words(text: str) -> list[str]:
    """Lower-cased words of ``text`` in any language; runs of unspaced scripts as single characters and pairs.

    Text is brought to Unicode form NFKC first, so that full-width and composed spellings are the same.

    >>> words("Café de Paris 50ml")
    ['café', 'de', 'paris', '50ml']
    >>> words("绿茶 tea")
    ['绿', '茶', '绿茶', 'tea']
    """
    found: list[str] = []
    for match in _pattern().finditer(unicodedata.normalize("NFKC", text).lower()):
        run = match[1]
        if run:
            found += [*run, *(run[i : i + 2] for i in range(len(run) - 1))]
        else:
            found.append(match[0])
    return found


def text(items: pl.DataFrame) -> sparse.csr_matrix:
    """TF-IDF of what is written about each item (Salton and Buckley, 1988), in any language.

    Reads the columns title, brand, categories, description and text, those that there are. Term weight
    ``(1 + ln tf) * (ln((1 + n) / (1 + df)) + 1)``, rows of unit length.

    Args:
        items: n rows; text columns are strings or lists of strings, nulls count as empty.

    Returns:
        float32 [n, V]. An item without a word has an empty row; V is 0 when no item has any.
    """
    documents: list[list[str]] = [[] for _ in range(items.height)]
    for name in TEXT_COLUMNS:
        if name in items.columns:
            for document, value in zip(documents, items[name].to_list(), strict=True):
                for part in value if isinstance(value, list) else [value]:
                    if part is not None:
                        document += words(str(part))
    if not any(documents):
        return sparse.csr_matrix((items.height, 0), dtype=np.float32)
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(analyzer=list, sublinear_tf=True, dtype=np.float32)
    return sparse.csr_matrix(vectorizer.fit_transform(documents))


def text_vectors(tfidf: sparse.csr_matrix, dimensions: int, seed: int = 0) -> NDArray[np.float32]:
    """Dense text vectors: latent semantic analysis (Deerwester et al., 1990), U * S of a truncated SVD of ``tfidf``.

    Returns:
        float32 [n, dimensions]; dimensions beyond the rank are zero. Deterministic under ``seed``.
    """
    return _svd(tfidf, dimensions, seed)


def collaborative(
    train: Sequence[NDArray[np.integer]], n_items: int, dimensions: int, seed: int = 0
) -> NDArray[np.float32]:
    """Item vectors from who consumed what in training: U * S of a truncated SVD of the degree-normalised matrix
    ``D_item^-1/2 R D_user^-1/2`` with R[i, u] = 1 where user u consumed item i. (The normalisation, as in spectral
    clustering, keeps the leading dimensions from being mere popularity and long histories.)

    Returns:
        float32 [n_items, dimensions]; items without a training interaction, and dimensions beyond the rank, are zero.
    """
    matrix = interaction_matrix(train, n_items)
    by_user = np.asarray(matrix.sum(axis=1)).ravel()
    by_item = np.asarray(matrix.sum(axis=0)).ravel()
    scaled = sparse.diags(_inverse_root(by_item)) @ matrix.T @ sparse.diags(_inverse_root(by_user))
    return _svd(sparse.csr_matrix(scaled, dtype=np.float32), dimensions, seed)


@dataclass(frozen=True)
class Features:
    """What is known of the items: ``tfidf`` float32 csr [n, V] and ``vectors`` float32 [n, 2 * dimensions]."""

    tfidf: sparse.csr_matrix
    vectors: NDArray[np.float32]


def item_vectors(
    items: pl.DataFrame, train: Sequence[NDArray[np.integer]], *, dimensions: int = 64, seed: int = 0
) -> Features:
    """Text vectors and collaborative vectors side by side, each part of unit length; zero rows stay zero.

    Args:
        items: The catalogue, n rows.
        train: Training histories only.
        dimensions: Size of each of the two parts.
        seed: Of the randomised SVDs.
    """
    tfidf = text(items)
    parts = [text_vectors(tfidf, dimensions, seed), collaborative(train, items.height, dimensions, seed)]
    return Features(tfidf, np.concatenate([unit(part) for part in parts], axis=1))


def neighbours(tfidf: sparse.csr_matrix, k: int = 10) -> NDArray[np.int32]:
    """The k items nearest to each by cosine, itself excluded, best first, ties by item index.

    Args:
        tfidf: float32 [n, V] with rows of unit length or zero.
        k: Neighbours per item, >= 1.

    Returns:
        int32 [n, k], -1 where no further item shares a word.
    """
    if k < 1:
        raise ConfigError(f"k must be at least 1, found {k}. The usual number of neighbours is 10.")
    n = tfidf.shape[0]
    nearest = np.full((n, k), -1, dtype=np.int32)
    columns = tfidf.T.tocsr()
    chunk = max(1, 8_000_000 // max(n, 1))
    for start in range(0, n, chunk):
        similar = (tfidf[start : start + chunk] @ columns).toarray()
        rows = np.arange(len(similar))
        similar[similar <= 0] = -np.inf
        similar[rows, start + rows] = -np.inf
        nearest[start : start + chunk] = top_k(similar, k)
    return nearest


def walks(
    neighbours: NDArray[np.integer], n: int, length: int, rng: np.random.Generator, mean_rank: float = 2.0
) -> list[NDArray[np.int32]]:
    """Walks over the catalogue: sequences of items, each textually near the one before, drawn without any user.

    A walk starts at an item drawn uniformly. The next item is the r-th nearest of the one before (r = 0, 1, ...), drawn
    with probability proportional to ``exp(-r / mean_rank)`` among those that the walk has not visited.

    Args:
        neighbours: int [n_items, k], best first, padded with -1.
        n: Number of walks.
        length: Items per walk, >= 1; a walk that is stuck is shorter.
        rng: Source of randomness; the same state gives the same walks.
        mean_rank: Scale of the exponential, > 0; small stays with the nearest.

    Returns:
        n int32 arrays of 1 to ``length`` distinct items.
    """
    if length < 1 or n < 0 or not mean_rank > 0:
        raise ConfigError(f"walks need length >= 1, n >= 0 and mean_rank > 0, found {length}, {n} and {mean_rank}.")
    n_items, k = neighbours.shape
    if n_items == 0:
        raise DataError("the catalogue is empty, so there is nothing to walk over. Import items first.")
    path = np.full((n, length), -1, dtype=np.int32)
    path[:, 0] = rng.integers(n_items, size=n)
    weight = np.exp(-np.arange(k) / mean_rank)
    walking = np.arange(n)
    for step in range(1, length if k else 1):
        near = neighbours[path[walking, step - 1]]
        free = (near >= 0) & ~(near[:, :, None] == path[walking, None, :step]).any(axis=2)
        cumulative = np.cumsum(weight * free, axis=1)
        total = cumulative[:, -1]
        draw = rng.random(len(walking)) * total
        moves = total > 0
        walking, near, draw, cumulative = walking[moves], near[moves], draw[moves], cumulative[moves]
        # The first rank whose cumulative weight exceeds the draw is free, because a taken rank adds no weight.
        rank = np.argmax(cumulative > draw[:, None], axis=1)
        path[walking, step] = near[np.arange(len(walking)), rank]
    lengths = (path >= 0).sum(axis=1)
    return [row[:m] for row, m in zip(path, lengths, strict=True)]


def variants(
    neighbours: NDArray[np.integer],
    histories: Sequence[NDArray[np.integer]],
    replaced: float,
    rng: np.random.Generator,
    mean_rank: float = 2.0,
) -> list[NDArray[np.int32]]:
    """Histories in which some items are replaced by one that is near in text.

    Each item is replaced with probability ``replaced`` by its r-th nearest, drawn with probability proportional to
    ``exp(-r / mean_rank)``; an item without that neighbour stays.

    Args:
        neighbours: int [n_items, k], best first, padded with -1.
        histories: What to vary; they are not changed.
        replaced: From 0 to 1.
        rng: Source of randomness.
        mean_rank: Scale of the exponential, > 0.

    Returns:
        int32 arrays of the same lengths.
    """
    if not 0 <= replaced <= 1 or not mean_rank > 0:
        raise ConfigError(f"variants need replaced from 0 to 1 and mean_rank > 0, found {replaced} and {mean_rank}.")
    lengths = np.array([len(history) for history in histories], dtype=np.int64)
    flat = np.concatenate([np.empty(0, dtype=np.int32), *histories]).astype(np.int32)
    k = neighbours.shape[1]
    if k:
        weight = np.exp(-np.arange(k) / mean_rank)
        near = neighbours[flat, rng.choice(k, size=len(flat), p=weight / weight.sum())]
        flat = np.where((rng.random(len(flat)) < replaced) & (near >= 0), near, flat).astype(np.int32)
    return np.split(flat, np.cumsum(lengths)[:-1]) if len(lengths) else []


def newcomers(
    neighbours: NDArray[np.integer],
    items: NDArray[np.integer],
    histories: Sequence[NDArray[np.integer]],
    rng: np.random.Generator,
    mean_rank: float = 2.0,
) -> list[tuple[int, int, int]]:
    """Events after which items that no history holds could have come: those of near items.

    For each item one of its neighbours that some history holds is drawn, the r-th of these with probability
    proportional to ``exp(-r / mean_rank)``, and one of that neighbour's events, evenly. An item without such a
    neighbour is left out.

    Args:
        neighbours: int [n_items, k], best first, padded with -1.
        items: The items to place, each as often as it is named.
        histories: The histories of all users.
        rng: Source of randomness.
        mean_rank: Scale of the exponential, > 0.

    Returns:
        ``(item, history, place)`` of each: it could have come after the event at that place of that history.
    """
    if not mean_rank > 0:
        raise ConfigError(f"newcomers need mean_rank > 0, found {mean_rank}.")
    lengths = np.array([len(history) for history in histories], dtype=np.int64)
    flat = np.concatenate([np.empty(0, dtype=np.int64), *histories]).astype(np.int64)
    order, counts = np.argsort(flat, kind="stable"), np.bincount(flat, minlength=len(neighbours))
    first = np.cumsum(counts) - counts
    weight = np.exp(-np.arange(neighbours.shape[1]) / mean_rank)
    near = neighbours[items]
    held = (near >= 0) & (counts[near] > 0)
    if not held.any():
        return []
    cumulative = np.cumsum(weight[np.cumsum(held, axis=1) - 1] * held, axis=1)
    found = held.any(axis=1)
    items, near, cumulative = items[found], near[found], cumulative[found]
    rank = np.argmax(cumulative > (rng.random(len(items)) * cumulative[:, -1])[:, None], axis=1)
    before = near[np.arange(len(items)), rank]
    events = order[first[before] + (rng.random(len(items)) * counts[before]).astype(np.int64)]
    users = np.searchsorted(np.cumsum(lengths), events, side="right")
    places = events - (np.cumsum(lengths) - lengths)[users]
    return list(zip(items.tolist(), users.tolist(), places.tolist(), strict=True))


def interaction_matrix(train: Sequence[NDArray[np.integer]], n_items: int) -> sparse.csr_matrix:
    """Who consumed what: float32 csr [n_users, n_items], 1 where a user's history holds the item.

    Raises:
        DataError: A history holds something that is not an item index.
    """
    lengths, columns = _flat(train, n_items)
    rows = np.repeat(np.arange(len(train)), lengths)
    matrix = sparse.csr_matrix((np.ones(len(columns), np.float32), (rows, columns)), shape=(len(train), n_items))
    matrix.data[:] = 1  # A repeated item was summed.
    return matrix


def counts(train: Sequence[NDArray[np.integer]], n_items: int) -> NDArray[np.int64]:
    """How many training events each item has: int64 [n_items].

    Raises:
        DataError: A history holds something that is not an item index.
    """
    return np.bincount(_flat(train, n_items)[1], minlength=n_items)


def _flat(train: Sequence[NDArray[np.integer]], n_items: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The lengths of the histories, and their items one after another."""
    lengths = np.fromiter((len(h) for h in train), dtype=np.int64, count=len(train))
    columns = np.concatenate([np.empty(0, dtype=np.int64), *train]).astype(np.int64)
    if columns.size and (columns.min() < 0 or columns.max() >= n_items):
        wrong = int(np.argmax((columns < 0) | (columns >= n_items)))
        user = int(np.searchsorted(np.cumsum(lengths), wrong, side="right"))
        raise DataError(
            f"the history of user {user} holds item {columns[wrong]}, but the catalogue has {n_items} items. "
            "Use the items and the histories of one data set."
        )
    return lengths, columns


def unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows scaled to length 1; zero rows stay zero."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)


def top_k(scores: ArrayLike, k: int) -> NDArray[np.int32]:
    """Columns of the k largest scores of each row, best first, ties by column; -1 instead of a score of -inf.

    Args:
        scores: float32 [n, m] without NaN.
        k: >= 1; when it exceeds m the rest is -1.

    Returns:
        int32 [n, k].
    """
    values = np.asarray(scores, dtype=np.float32) + np.float32(0)  # -0.0 becomes 0.0, so that the two tie.
    n, m = values.shape
    best = np.full((n, k), -1, dtype=np.int32)
    width = min(k, m)
    if n == 0 or width == 0:
        return best
    # One int64 key per cell, unique within a row: the float's bits in an order that integers share, then the column.
    bits = values.view(np.int32)
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).astype(np.int64) << 32
    keys += np.arange(m, 0, -1)
    columns = np.argpartition(keys, m - width, axis=1)[:, m - width :]
    order = np.argsort(-np.take_along_axis(keys, columns, axis=1), axis=1)
    columns = np.take_along_axis(columns, order, axis=1)
    best[:, :width] = np.where(np.take_along_axis(values, columns, axis=1) == -np.inf, -1, columns)
    return best


def _inverse_root(degrees: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.divide(1, np.sqrt(degrees), out=np.zeros_like(degrees), where=degrees > 0)


def _svd(matrix: sparse.csr_matrix, dimensions: int, seed: int) -> NDArray[np.float32]:
    """U * S of the truncated SVD by randomised projection (Halko et al., 2011), float32 [rows, dimensions]."""
    if dimensions < 1:
        raise ConfigError(f"dimensions must be at least 1, found {dimensions}. The usual value is 64.")
    vectors = np.zeros((matrix.shape[0], dimensions), dtype=np.float32)
    if matrix.nnz == 0:
        return vectors
    from sklearn.utils.extmath import randomized_svd

    width = min(dimensions, *matrix.shape)
    left, singular, _ = randomized_svd(matrix.astype(np.float64), width, n_iter=4, random_state=seed)
    # Beyond the rank there is only rounding noise, which scaling to unit length would blow up.
    singular[singular < 1e-6 * singular[0]] = 0
    vectors[:, :width] = left * singular
    vectors[np.diff(matrix.indptr) == 0] = 0
    return vectors
