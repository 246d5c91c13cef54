"""`genrec bench trie`: building, size, children, masks and saving of a trie, beside one of Python dicts."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from genrec.benchmarks import CLOCKS, Clock, Report, Row, begin, catalogue, conditions, figure, median
from genrec.decoding import BeamSearch, Ints, Trie
from genrec.errors import ConfigError

_CODES, _LEVELS = 256, 4
_BEAMS = 160  # Whose children are looked up.


class DictTrie:
    """Nested dicts, token -> below, as LC-Rec and MiniOneRec build them for ``prefix_allowed_tokens_fn``."""

    def __init__(self, identifiers: NDArray[np.int64]) -> None:
        self.root: dict[int, Any] = {}
        for identifier in identifiers.tolist():
            node = self.root
            for token in identifier:
                node = node.setdefault(token, {})

    def get(self, prefix: list[int]) -> list[int]:
        """The tokens that may follow a prefix."""
        node = self.root
        for token in prefix:
            node = node[token]
        return list(node)

    def bytes(self) -> int:
        """Size of all dicts (the integers are shared and not counted)."""
        total, level = 0, [self.root]
        while level:
            total += sum(map(sys.getsizeof, level))
            level = [below for node in level for below in node.values()]
        return total


def _seconds(work: Callable[[], Any], repeats: int, clock: Callable[[], float]) -> float:
    times = []
    for _ in range(repeats):
        began = clock()
        work()
        times.append(clock() - began)
    return median(times)


def _masked_search(trie: Trie, users: int, num_beams: int, clock: Callable[[], float], **masks: Any) -> float:
    """Seconds of one search without a model: set-up and legal candidates of every step, not the choice of beams."""
    rng = np.random.default_rng(1)
    began = clock()
    search = BeamSearch(trie, users, num_beams, **masks)
    total = clock() - began
    while not search.done:
        began = clock()
        rows, _ = search.candidates()
        total += clock() - began
        search.advance(-rng.random(len(rows)))
    return total


def trie(
    n_items: int = 1_000_000,
    *,
    users: int = 8,
    num_beams: int = 50,
    history: int = 200,
    repeats: int = 9,
    clock: Clock = "wall",
    seed: int = 0,
) -> Report:
    """Measure tries of ``n_items`` identifiers of 4 codes, and the masks of ``users`` users.

    Times of masks are what a mask adds to a whole search, per user: set-up and counting in every step, less the same
    search without a mask. The category is a tenth of the catalogue.

    Raises:
        ConfigError: A number out of range.
    """
    most = _CODES**_LEVELS // 2
    if not _BEAMS <= n_items <= most:
        raise ConfigError(f"bench trie: --items is {n_items}; it is {_BEAMS} .. {most:,}.")
    if not 1 <= history <= n_items:
        raise ConfigError(f"bench trie: --history is {history}; it is 1 .. {n_items:,}, the number of items.")
    begin("trie", users=users, beams=num_beams, repeats=repeats)
    given: dict[str, Any] = {
        "items": n_items,
        "users": users,
        "beams": num_beams,
        "history": history,
        "repeats": repeats,
    }
    given |= {"clock": clock, "seed": seed}
    rows = _measure(n_items, users, num_beams, history, repeats, seed, CLOCKS[clock])
    return Report(conditions(**given), rows, "trie")


def _measure(
    n_items: int, users: int, num_beams: int, history: int, repeats: int, seed: int, clock: Callable[[], float]
) -> list[Row]:
    codes, rng = catalogue(n_items, _LEVELS, _CODES, 0, seed), np.random.default_rng([seed, 1])
    rows: list[Row] = []
    setting = f"{n_items:,} items"

    def told(part: str, what: str, value: float, unit: str, goal: float | None = None) -> None:
        rows.append(figure(part, setting, what, float(value), unit, most=goal))

    made = Trie.build(codes)
    builds = min(3, repeats)
    told("build", f"identifiers of {_LEVELS} codes", _seconds(lambda: Trie.build(codes), builds, clock), "s", 2)
    told(
        "size",
        "all arrays",
        sum(array.nbytes for array in (made.token, made.first_child, made.lo, made.items)) / 1e6,
        "MB",
        32,
    )
    began = clock()
    peer = DictTrie(codes)
    told("build", "Python dicts", clock() - began, "s")
    told("size", "Python dicts", peer.bytes() / 1e6, "MB")

    beams = _BEAMS
    some = rng.choice(n_items, beams, replace=False)
    prefixes = codes[some, :1].tolist()
    nodes: Ints = np.searchsorted(made.token[1 : made.first_child[1]], codes[some, 0]) + 1
    found = [made.token[made.first_child[node] : made.first_child[node + 1]].tolist() for node in nodes]
    differ = sum(one != sorted(peer.get(prefix)) for one, prefix in zip(found, prefixes, strict=True))
    told("children", f"{beams} beams: places with other children", differ, "", 0)
    told("children", f"{beams} beams", _seconds(lambda: made.children(nodes), 50 * repeats, clock) * 1e3, "ms", 0.3)
    told(
        "children",
        f"{beams} beams, Python dicts",
        _seconds(lambda: [peer.get(prefix) for prefix in prefixes], 50 * repeats, clock) * 1e3,
        "ms",
    )

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trie.npy"
        told("file", "save", _seconds(lambda: made.save(path), builds, clock), "s")
        told("file", "load, mapped and checked", _seconds(lambda: Trie.load(path), repeats, clock) * 1e3, "ms")

    _ = made.position  # Made once for a trie, by the first mask.
    histories = [rng.choice(n_items, history, replace=False) for _ in range(users)]
    categories = [rng.choice(n_items, max(1, n_items // 10), replace=False) for _ in range(users)]
    stock = np.zeros(n_items, dtype=bool)
    stock[categories[0]] = True
    for count in dict.fromkeys((1, users)):
        masks: dict[str, dict[str, Any]] = {
            f"a history of {history} blocked": {"blocked": histories[:count]},
            f"a category of {len(categories[0]):,}, one mask for all": {"allowed": stock},
            f"a category of {len(categories[0]):,}, another for each user": {"only": categories[:count]},
            f"all but {len(categories[0]):,} in stock, and a history": {
                "allowed": ~stock,
                "blocked": histories[:count],
            },
        }
        added: dict[str, list[float]] = {name: [] for name in masks}
        for _ in range(repeats):
            free = _masked_search(made, count, num_beams, clock)
            for name, mask in masks.items():
                added[name].append(_masked_search(made, count, num_beams, clock, **mask) - free)
        for name, times in added.items():
            told("mask", f"{name}; {count} at once", median(times) / count * 1e3, "ms per user", 2)
    return rows
