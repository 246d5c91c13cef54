"""Semantic IDs: every item's features become a distinct tuple of codes, similar items sharing a prefix.

Top-down residual k-means (residual quantisation as in TIGER, Rajput et al., 2023, without a network) under capacities,
so that the codes are distinct by construction and need no extra code to tell duplicates apart.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from genrec.errors import ConfigError, DataError


def codes(vectors: ArrayLike, *, levels: int = 3, codes: int = 256, seed: int = 0) -> NDArray[np.int32]:
    """One distinct code tuple per item.

    At every level k-means is fitted on what the levels before left over (the residuals of all items; one codebook
    per level). A code under a prefix takes at most ``codes ** (levels - level - 1)`` items, which is as many as the
    levels below can tell apart; items beyond that go to the nearest code with room, those nearest to the centroid
    staying. On the last level, where there is room for one, items under a prefix are assigned to distinct codes at the
    smallest total squared distance (Hungarian method).

    Args:
        vectors: float [n, d], finite. They may all be equal.
        levels: Codes per item, >= 1.
        codes: Size of each level's codebook, >= 1.
        seed: Of the k-means; the same seed and vectors give the same codes.

    Returns:
        int32 [n, levels], values 0 to ``codes`` - 1, all rows distinct.

    Raises:
        ConfigError: n > codes ** levels, or a number out of range.
        DataError: ``vectors`` is not a finite matrix.
    """
    rows = np.asarray(vectors, dtype=np.float64)
    if rows.ndim != 2:
        raise DataError(f"features must be a matrix [items, dimensions], found shape {list(rows.shape)}.")
    if not np.isfinite(rows).all():
        row, column = np.argwhere(~np.isfinite(rows))[0]
        raise DataError(
            f"the features of item {row} hold {rows[row, column]} at dimension {column}. "
            "Every value must be finite; build the features again."
        )
    n = len(rows)
    if rows.shape[1] == 0:  # Nothing is known of any item: all are equal.
        rows = np.zeros((n, 1))
    check_room(n, levels, codes)
    scale = np.abs(rows).max(initial=0.0)
    residual = (rows / scale if scale > 0 else rows).astype(np.float32)
    rng = np.random.default_rng(seed)
    result = np.zeros((n, levels), dtype=np.int32)
    prefix = np.zeros(n, dtype=np.int64)  # Number of the node that an item has reached.
    for level in range(levels if n else 0):
        centroids = _kmeans(residual, codes, rng)
        code = _nearest(residual, centroids)
        capacity = codes ** (levels - level - 1)
        for members in _overfull(prefix, code, capacity):
            distances = cdist(residual[members], centroids, "sqeuclidean")
            if capacity == 1:
                code[members] = linear_sum_assignment(distances)[1]
            else:
                code[members] = _with_room(distances, capacity)
        result[:, level] = code
        residual -= centroids[code]
        prefix = np.unique(prefix * codes + code, return_inverse=True)[1]
    return result


def extend(old: ArrayLike, vectors: ArrayLike, new_vectors: ArrayLike, *, codes: int = 256) -> NDArray[np.int32]:
    """Codes for items that come later, the old ones staying as they are.

    A code's centroid is the mean residual of the old items that have it: level by level, what the centroids of the
    levels before leave over. A new item takes, level by level, the nearest code under which a tuple is still free; a
    code that no old item has comes last. Items are served in their order.

    Args:
        old: int [n, levels], codes of the old items, all rows distinct.
        vectors: float [n, d], finite, of the old items.
        new_vectors: float [m, d], finite, of the new ones, made in the same way.
        codes: Size of each level's codebook, at least what ``old`` has.

    Returns:
        int32 [m, levels], distinct among themselves and from ``old``.

    Raises:
        ConfigError: n + m > codes ** levels.
    """
    given, wanted = np.asarray(old, dtype=np.int64), np.array(new_vectors, dtype=np.float64)
    residual = np.array(vectors, dtype=np.float64)
    (n, levels), codes = given.shape, max(codes, int(given.max(initial=-1)) + 1)
    check_room(n + len(wanted), levels, codes)
    centroids = np.full((levels, codes, residual.shape[1]), np.nan)
    for level in range(levels):
        for code in np.unique(given[:, level]):
            centroids[level, code] = residual[given[:, level] == code].mean(axis=0)
        residual -= centroids[level, given[:, level]]
    taken = Counter(tuple(row[:depth]) for row in given.tolist() for depth in range(1, levels + 1))
    result = np.zeros((len(wanted), levels), dtype=np.int32)
    for item, rest in enumerate(wanted):
        prefix: tuple[int, ...] = ()
        for level in range(levels):
            distance = ((centroids[level] - rest) ** 2).sum(axis=1)
            # NaN sorts last: a code without old items has no centroid.
            room = codes ** (levels - level - 1)
            code = next(c for c in np.argsort(distance, kind="stable").tolist() if taken[(*prefix, c)] < room)
            prefix = (*prefix, code)
            taken[prefix] += 1
            rest = rest - np.nan_to_num(centroids[level, code])
        result[item] = prefix
    return result


def check_room(n: int, levels: int, codes: int) -> None:
    """Raise ConfigError unless n items fit into ``codes ** levels`` tuples (and the numbers are in range)."""
    if levels < 1 or levels > 26 or codes < 1 or codes**levels > 2**62:
        raise ConfigError(
            f"levels = {levels}, codes = {codes} is out of range: levels must be 1 to 26, codes at least 1, "
            "and codes ** levels at most 2 ** 62. The usual values are levels = 3, codes = 256."
        )
    if n > codes**levels:
        enough = max(1, int(n ** (1 / levels)) - 1)
        while enough**levels < n:
            enough += 1
        raise ConfigError(
            f"{n} items do not fit into {codes} ** {levels} = {codes**levels} identifiers (codes = {codes}, "
            f"levels = {levels}). With levels = {levels}, codes = {enough} would fit."
        )


def _overfull(prefix: NDArray[np.int64], code: NDArray[np.int64], capacity: int) -> list[NDArray[np.int64]]:
    """The items of every node one of whose codes holds more than ``capacity`` items."""
    children, count = np.unique(np.stack([prefix, code]), axis=1, return_counts=True)
    crowded = np.unique(children[0, count > capacity])
    if not len(crowded):
        return []
    order = np.argsort(prefix, kind="stable")
    starts = np.searchsorted(prefix[order], crowded, side="left")
    stops = np.searchsorted(prefix[order], crowded, side="right")
    return [order[a:b] for a, b in zip(starts, stops, strict=True)]


def _with_room(distances: NDArray[np.float64], capacity: int) -> NDArray[np.int64]:
    """Nearest centroid with room: every round each item asks the nearest open one, which takes the nearest askers.

    ``distances`` [m, codes] is overwritten. Every round either places all items or fills a centroid.
    """
    m, n_codes = distances.shape
    code = np.full(m, -1, dtype=np.int64)
    room = np.full(n_codes, capacity, dtype=np.int64)
    waiting = np.arange(m)
    while len(waiting):
        distances[:, room == 0] = np.inf
        asked = distances[waiting].argmin(axis=1)
        order = np.lexsort((waiting, distances[waiting, asked], asked))
        waiting, asked = waiting[order], asked[order]
        place = np.arange(len(asked)) - np.searchsorted(asked, asked)  # 0 for the nearest asker of each centroid.
        taken = place < room[asked]
        code[waiting[taken]] = asked[taken]
        room -= np.bincount(asked[taken], minlength=n_codes)
        waiting = np.sort(waiting[~taken])
    return code


def _kmeans(points: NDArray[np.float32], n_codes: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Lloyd's algorithm from k-means++ starts; float32 [n_codes, d]. Fitted on at most 256 points per centroid.

    With fewer points than codes the points themselves are the centroids, over and over.
    """
    from sklearn.cluster import kmeans_plusplus

    if len(points) > 256 * n_codes:
        points = points[np.sort(rng.choice(len(points), 256 * n_codes, replace=False))]
    if len(points) <= n_codes:
        return np.resize(points, (n_codes, points.shape[1]))
    # One trial per centroid: the default of 2 + ln(codes) is several times slower and gains little after Lloyd.
    start = int(rng.integers(2**31))
    centroids = kmeans_plusplus(points, n_codes, random_state=start, n_local_trials=1)[0].astype(np.float32)
    code = np.full(len(points), -1, dtype=np.int64)
    for _ in range(25):
        before, code = code, _nearest(points, centroids)
        if np.array_equal(before, code):
            break
        member = sparse.csr_matrix((np.ones(len(code), np.float32), (code, np.arange(len(code)))), (n_codes, len(code)))
        count = np.bincount(code, minlength=n_codes)
        full = count > 0  # A centroid without points stays where it is.
        centroids[full] = (member @ points)[full] / count[full, None]
    return centroids


def _nearest(points: NDArray[np.float32], centroids: NDArray[np.float32]) -> NDArray[np.int64]:
    """Index of the nearest centroid of each point, ties to the first; in chunks."""
    norms = (centroids * centroids).sum(axis=1)
    nearest = np.empty(len(points), dtype=np.int64)
    chunk = max(1, 4_000_000 // len(centroids))
    for start in range(0, len(points), chunk):
        part = points[start : start + chunk]
        nearest[start : start + chunk] = (norms - 2 * part @ centroids.T).argmin(axis=1)
    return nearest
