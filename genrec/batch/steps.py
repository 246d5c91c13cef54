"""What happens to lists after decoding, in the order that a job writes its ``[[steps]]``.

Each step is a pure function of lists and of what is known of the items. Where several candidates are equal, they keep
the order that they had. The scores that are written stay the model's own, whatever a step sorts by.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy import sparse

from genrec import features
from genrec.errors import ConfigError, suggestion
from genrec.toml import from_table

Bools = NDArray[np.bool_]
Histories = Sequence[NDArray[np.integer]]

_CHUNK = 4_000_000  # Numbers in the largest array that a step makes beside the lists.


@dataclass(frozen=True, eq=False)
class Limit:
    """At most ``count`` items of one value in a list.

    Attributes:
        values: Per item the numbers of its values, each once; none where the item is not limited.
        count: >= 1.
    """

    values: Sequence[Sequence[int]]
    count: int

    @cached_property
    def items(self) -> list[NDArray[np.int64]]:
        """Per value its items."""
        found: list[list[int]] = [
            [] for _ in range(1 + max((value for own in self.values for value in own), default=-1))
        ]
        for item, own in enumerate(self.values):
            for value in own:
                found[value].append(item)
        return [np.array(items, dtype=np.int64) for items in found]


@dataclass(frozen=True, eq=False)
class Lists:
    """Lists of n items for each of some users, best first.

    Attributes:
        items: int32 [users, n]; -1 where a list has ended.
        scores: float32 [users, n]; of the model, or of a baseline where ``filled``; -inf where a list has ended.
        filled: bool [users, n]; whether a baseline gave the item.
        histories: Item indices of each user, oldest first.
        legal: The items that a user, by number, may get at all: bool [n_items].
        sorted_by: float64 [users, n]; what the lists are sorted by, from large to small, where that is not ``scores``.
        decoded: int32 [users, m]; all that came out of decoding, where steps have left out some of it; -1 is no item.
        limits: What the steps before have limited.
    """

    items: NDArray[np.int32]
    scores: NDArray[np.float32]
    filled: Bools
    histories: Histories
    legal: Callable[[int], Bools]
    sorted_by: NDArray[np.float64] | None = None
    decoded: NDArray[np.int32] | None = None
    limits: tuple[Limit, ...] = ()

    @property
    def keys(self) -> NDArray[np.float64]:
        """float64 [users, n]: what the lists are sorted by."""
        return self.scores.astype(np.float64) if self.sorted_by is None else self.sorted_by


@dataclass(frozen=True, eq=False)
class Catalogue:
    """What steps may ask for.

    Attributes:
        items: The item table; the row number is the item index.
        train: Gives the training histories: item indices, oldest first. Called only where a step counts or fits.
    """

    items: pl.DataFrame
    train: Callable[[], Histories]


# The steps


def min_score(lists: Lists, *, score: float) -> Lists:
    """Without the items that score below ``score``."""
    return _take(lists, np.argsort(lists.scores < score, axis=1, kind="stable"), lists.scores >= score)


def popularity_damping(lists: Lists, counts: NDArray[np.floating], *, strength: float) -> Lists:
    """Sorted anew, by what the lists were sorted by minus ``strength * ln(1 + count)``.

    Args:
        lists: Lists.
        counts: [n_items]; how often each item was consumed in training.
        strength: >= 0; 0 changes nothing.
    """
    keys = np.where(lists.items >= 0, lists.keys - strength * np.log1p(counts)[lists.items], -np.inf)
    return _take(dataclasses.replace(lists, sorted_by=keys), np.argsort(-keys, axis=1, kind="stable"))


def mmr(lists: Lists, vectors: sparse.csr_matrix, *, relevance: float) -> Lists:
    """Maximal marginal relevance (Carbonell and Goldstein, 1998, SIGIR): like the best, unlike those before.

    The next item of a list is, greedily, the one with the largest ``relevance * r - (1 - relevance) * s``, where r is
    what the list was sorted by, scaled to 0 .. 1 within the list, and s the largest cosine of its text with that of an
    item chosen before (0 for the first).

    Args:
        lists: Lists.
        vectors: float32 csr [n_items, V]; rows of unit length or zero (``features.text``).
        relevance: From 0 to 1; 1 changes nothing.
    """
    users, n = lists.items.shape
    order = np.tile(np.arange(n), (users, 1))
    keys = np.full((users, n), -np.inf)
    size = max(1, _CHUNK // max(n * n, 1))
    for start in range(0, users, size):
        chunk = slice(start, start + size)
        items, there = lists.items[chunk], lists.items[chunk] >= 0
        similar, rows = _cosines(vectors, items), np.arange(len(items))
        found = lists.keys[chunk]
        low = np.min(found, axis=1, where=there, initial=np.inf)[:, None]
        span = np.max(found, axis=1, where=there, initial=-np.inf)[:, None] - low
        scaled = np.divide(found - low, span, out=np.zeros(found.shape), where=there & (span > 0))
        nearest = np.zeros(found.shape)
        open_ = there.copy()
        for place in range(int(there.sum(axis=1).max(initial=0))):
            values = np.where(open_, relevance * scaled - (1 - relevance) * nearest, -np.inf)
            chosen = values.argmax(axis=1)
            going = open_[rows, chosen]  # Lists that have ended choose nothing, and keep their order.
            order[chunk][going, place] = chosen[going]
            keys[chunk][going, place] = values[rows, chosen][going]
            open_[rows, chosen] = False
            nearest = np.maximum(nearest, similar[rows, chosen])
    made = _take(lists, order, lists.items >= 0)
    return dataclasses.replace(made, sorted_by=keys)


def max_per(lists: Lists, limit: Limit) -> Lists:
    """From the best on, without items that would be more of a value than ``limit`` allows."""
    keep = np.zeros(lists.items.shape, dtype=bool)
    for user, items in enumerate(lists.items.tolist()):
        used: Counter[int] = Counter()
        for place, item in enumerate(items):
            own = limit.values[item] if item >= 0 else ()
            if item >= 0 and all(used[value] < limit.count for value in own):
                keep[user, place] = True
                used.update(own)
    made = _take(lists, np.argsort(~keep, axis=1, kind="stable"), keep)
    return dataclasses.replace(made, limits=(*lists.limits, limit))


def fill_up(lists: Lists, scores: Callable[[Histories], NDArray[np.float32]], *, k: int) -> Lists:
    """Lists of k items: the best, then those that a baseline scores highest, with its scores.

    Nothing comes back that a step before left out of the list, and the whole list keeps to the limits of those steps.

    Args:
        lists: Lists.
        scores: Of a fitted baseline: histories -> float32 [histories, n_items].
        k: Shorter lists are filled up, as far as legal items within the limits go; longer ones are cut.
    """
    users, n = lists.items.shape
    items = np.full((users, k), -1, dtype=np.int32)
    found = np.full((users, k), -np.inf, dtype=np.float32)
    filled = np.zeros((users, k), dtype=bool)
    width = min(n, k)
    items[:, :width], found[:, :width], filled[:, :width] = (
        one[:, :width] for one in (lists.items, lists.scores, lists.filled)
    )
    decoded = lists.items if lists.decoded is None else lists.decoded
    short = np.flatnonzero((items < 0).any(axis=1))
    size = max(1, _CHUNK // max(len(lists.legal(int(short[0]))), 1)) if len(short) else 1
    for start in range(0, len(short), size):
        chunk: NDArray[np.int64] = short[start : start + size]
        for user, given in zip(chunk.tolist(), scores([lists.histories[user] for user in chunk]), strict=True):
            open_ = lists.legal(user).copy()
            for there in (items[user], decoded[user]):
                open_[there[there >= 0]] = False
            have = int((items[user] >= 0).sum())
            more = _best(np.where(open_, given, -np.inf), k - have, items[user, :have].tolist(), lists.limits)
            new = slice(have, have + len(more))
            items[user, new], found[user, new], filled[user, new] = more, given[more], True
    return dataclasses.replace(lists, items=items, scores=found, filled=filled, sorted_by=None, decoded=decoded)


def _best(scores: NDArray[np.floating], count: int, there: Sequence[int], limits: Sequence[Limit]) -> list[int]:
    """Up to ``count`` items, best first, that keep to the limits beside those that are there.

    Args:
        scores: [n_items]; -inf for what must not be taken. Overwritten.
        count: How many, at most.
        there: Items of the list.
        limits: Of the list.
    """
    used = [Counter(value for item in there for value in limit.values[item]) for limit in limits]

    def close(limit: Limit, counts: Counter[int], values: Sequence[int]) -> None:
        for value in values:
            if counts[value] >= limit.count:
                scores[limit.items[value]] = -np.inf

    for limit, counts in zip(limits, used, strict=True):
        close(limit, counts, list(counts))
    chosen: list[int] = []
    while len(chosen) < count:
        best = features.top_k(scores[None], count - len(chosen))[0]
        best = best[best >= 0]
        if not len(best):
            break
        for item in best.tolist():
            if scores[item] == -np.inf:  # One that was chosen a moment ago was the last of a value.
                continue
            chosen.append(item)
            for limit, counts in zip(limits, used, strict=True):
                counts.update(limit.values[item])
                close(limit, counts, limit.values[item])
        scores[best] = -np.inf
    return chosen


def _take(lists: Lists, order: NDArray[np.integer], keep: Bools | None = None) -> Lists:
    """Lists in another order, int [users, n]; those of their items that ``keep``, bool [users, n], leaves out end them.

    ``order`` has the items that are left out last.
    """
    items = np.take_along_axis(lists.items, order, axis=1)
    scores = np.take_along_axis(lists.scores, order, axis=1)
    filled = np.take_along_axis(lists.filled, order, axis=1)
    keys = np.take_along_axis(lists.keys, order, axis=1)
    if keep is not None:
        gone = ~np.take_along_axis(keep, order, axis=1)
        items[gone], scores[gone], filled[gone], keys[gone] = -1, -np.inf, False, -np.inf
    decoded = lists.items if lists.decoded is None else lists.decoded
    return dataclasses.replace(lists, items=items, scores=scores, filled=filled, sorted_by=keys, decoded=decoded)


def _cosines(vectors: sparse.csr_matrix, items: NDArray[np.int32]) -> NDArray[np.float32]:
    """float32 [users, n, n]: products of the vectors of all pairs of items of a list; 0 where it has ended."""
    users, n = items.shape
    similar = np.zeros((users, n, n), dtype=np.float32)
    user, place = (items >= 0).nonzero()
    rows = vectors[items[user, place]]
    # One product for all lists: every user gets columns of their own, so that only items of one list meet.
    owner = np.repeat(user, np.diff(rows.indptr)).astype(np.int64)
    columns = rows.indices.astype(np.int64) + owner * max(vectors.shape[1], 1)
    shape = (len(user), users * max(vectors.shape[1], 1))
    apart = sparse.csr_matrix((rows.data, columns, rows.indptr.astype(np.int64)), shape=shape)
    pairs = (apart @ apart.T).tocoo()
    similar[user[pairs.row], place[pairs.row], place[pairs.col]] = pairs.data
    return similar


# Their options, as a job writes them


class Step:
    """The options of a step.

    Attributes:
        reads_data: Whether the step asks for the training histories.
    """

    reads_data: ClassVar[bool] = False

    def check(self, catalogue: Catalogue) -> None:
        """Raise a ConfigError where the items do not have what the step needs; nothing costly is done."""

    def bind(self, catalogue: Catalogue, k: int) -> Callable[[Lists], Lists]:
        """The step as a function of lists; what it counts or fits is counted and fitted here."""
        raise NotImplementedError


@dataclass(frozen=True)
class MinScore(Step):
    """Leave out items that score below ``score``, the log-probability of the identifier."""

    score: float

    def __post_init__(self) -> None:
        if math.isnan(self.score):
            raise ConfigError("score is nan. It is a log-probability, such as -8.0.")

    def bind(self, catalogue: Catalogue, k: int) -> Callable[[Lists], Lists]:
        return partial(min_score, score=self.score)


@dataclass(frozen=True)
class PopularityDamping(Step):
    """Lower items by ``strength`` times the logarithm of how often they were consumed."""

    reads_data: ClassVar[bool] = True

    strength: float

    def __post_init__(self) -> None:
        if not 0 <= self.strength < math.inf:
            raise ConfigError(f"strength is {self.strength}. It is at least 0; 0.1 is little, and 1 much.")

    def bind(self, catalogue: Catalogue, k: int) -> Callable[[Lists], Lists]:
        counts = features.counts(catalogue.train(), catalogue.items.height).astype(np.float64)
        return partial(popularity_damping, counts=counts, strength=self.strength)


@dataclass(frozen=True)
class Mmr(Step):
    """Put items first that are relevant and whose texts are unlike those before; ``relevance`` weighs the former."""

    relevance: float = 0.7

    def __post_init__(self) -> None:
        if not 0 <= self.relevance <= 1:
            raise ConfigError(f"relevance is {self.relevance}. It lies between 0 and 1; 0.7 is usual.")

    def bind(self, catalogue: Catalogue, k: int) -> Callable[[Lists], Lists]:
        return partial(mmr, vectors=features.text(catalogue.items), relevance=self.relevance)


@dataclass(frozen=True)
class MaxPer(Step):
    """Leave out items beyond ``count`` of one value of ``column``.

    Where the column holds lists, such as categories, an item counts for each of its values. Items without a value are
    not limited.
    """

    column: str
    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"count is {self.count}. It is at least 1.")

    def check(self, catalogue: Catalogue) -> None:
        items = catalogue.items
        if self.column not in items.columns:
            raise ConfigError(f"items have no column {self.column!r}. {suggestion(self.column, items.columns)}")
        found = items[self.column].dtype
        kind = found.inner if isinstance(found, pl.List | pl.Array) else found
        if kind.is_nested() or kind == pl.Object:
            raise ConfigError(f"column {self.column!r} is {found}. It must hold single values, or lists of them.")

    def bind(self, catalogue: Catalogue, k: int) -> Callable[[Lists], Lists]:
        numbers: dict[Any, int] = {}
        values = []
        for value in catalogue.items[self.column].to_list():
            own = value if isinstance(value, list) else [value]
            values.append(tuple({numbers.setdefault(one, len(numbers)): None for one in own if one is not None}))
        return partial(max_per, limit=Limit(values, self.count))


@dataclass(frozen=True)
class FillUp(Step):
    """Fill lists up to k with the items that a baseline, fitted to the data set, scores highest; the last step.

    Items that an earlier step left out stay out, and the limits of ``max_per`` hold for the filled list too.
    """

    reads_data: ClassVar[bool] = True

    baseline: str = "popularity"

    def check(self, catalogue: Catalogue) -> None:
        from genrec.baselines import BASELINES

        quick = [name for name in BASELINES if name not in _NETWORKS]
        if self.baseline in _NETWORKS:
            raise ConfigError(
                f"baseline is {self.baseline!r}, a network: every job, and each of its workers, would train it anew. "
                f"Take one of {', '.join(quick)}."
            )
        if self.baseline not in quick:
            raise ConfigError(f"baseline is {self.baseline!r}. {suggestion(self.baseline, quick)}")

    def bind(self, catalogue: Catalogue, k: int) -> Callable[[Lists], Lists]:
        from genrec.baselines import BASELINES

        fitted = BASELINES[self.baseline]().fit(catalogue.train(), catalogue.items)
        return partial(fill_up, scores=fitted.scores, k=k)


_NETWORKS = ("sasrec", "sasrec_text")

STEPS: dict[str, type[Step]] = {
    "min_score": MinScore,
    "popularity_damping": PopularityDamping,
    "mmr": Mmr,
    "max_per": MaxPer,
    "fill_up": FillUp,
}


class Prepared:
    """The steps of a job as one function of lists. What they count or fit is counted and fitted for the first lists.

    Args:
        options: Of each step, in order.
        catalogue: What they may ask for; it is held until then, and not longer.
        k: Items that a list has in the end.

    Attributes:
        reads_data: Whether a step asks for the training histories.
    """

    def __init__(self, options: Sequence[Step], catalogue: Catalogue, k: int) -> None:
        self.reads_data = any(one.reads_data for one in options)
        self._bind: Callable[[], list[Callable[[Lists], Lists]]] | None
        self._bind = lambda: [one.bind(catalogue, k) for one in options]
        self._functions: list[Callable[[Lists], Lists]] = []

    def __call__(self, lists: Lists) -> Lists:
        """What the steps make of lists, one step after the other.

        Raises:
            DataError: A baseline cannot be fitted to the data.
        """
        if self._bind is not None:
            self._functions, self._bind = self._bind(), None
        for function in self._functions:
            lists = function(lists)
        return lists


def prepare(steps: Sequence[Mapping[str, Any]], catalogue: Catalogue, k: int) -> Prepared:
    """Check the steps of a job; nothing is counted or fitted yet.

    Args:
        steps: Tables with the key ``step``, one of ``STEPS``, and that step's options.
        catalogue: What the steps may ask for.
        k: Items that a list has in the end.

    Raises:
        ConfigError: An unknown step or option, an option out of range or that the items do not fit, or a ``fill_up``
            that is not the last step.
    """
    checked = []
    for number, table in enumerate(steps):
        place = f"job: steps[{number}]"
        name = table.get("step")
        if not isinstance(name, str) or name not in STEPS:
            raise ConfigError(f"{place}: step is {name!r}. {suggestion(str(name), STEPS)}")
        if name == "fill_up" and number < len(steps) - 1:
            raise ConfigError(f"{place}: fill_up is followed by {steps[number + 1].get('step')!r}. Make it the last.")
        given = {key: value for key, value in table.items() if key != "step"}
        try:
            options = from_table(STEPS[name], given, name)
            options.check(catalogue)
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from error
        checked.append(options)
    return Prepared(checked, catalogue, k)
