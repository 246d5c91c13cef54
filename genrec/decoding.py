"""The constraint: a trie of all legal identifiers, and the state of a beam search through it.

Pure NumPy, and ignorant of models: an engine asks a ``BeamSearch`` which tokens may come next, gives their
log-probabilities, and is told which beams live on. All engines run this same search.

The score of an item is the sum of the log-probabilities of its identifier's tokens under the model's softmax over the
*whole* vocabulary. Illegal continuations are left out and nothing is renormalised; there is no length penalty.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from genrec import files
from genrec.errors import DecodingError, IdentifierError

MAX_BEAMS = 65_536
_MARK = 0x45495254  # "TRIE", the first of the numbers in a saved trie; the second is the version of the format.
_VERSION, _HEADER = 1, 16  # The header is 16 numbers: mark, version, nodes, items, longest identifier, 3 unused, hash.
_CHUNK = 2**16
_SLACK = 1.25  # Levels go ahead where they make a forward at most so many times as wide as those that they save.
_BELOW = np.array([(1 << bit) - 1 for bit in range(64)], dtype=np.uint64)  # The bits below each bit of a word.

Ints = NDArray[np.integer[Any]]
Bools = NDArray[np.bool_]
Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True, eq=False)
class Trie:
    """The immutable set of legal identifiers, as arrays in breadth-first order (CSR). Node 0 is the root.

    The items are sorted by identifier, so that the items below a node are an interval of *positions* in that order:
    restrictions on items become restrictions on nodes. Use ``Trie.build``.

    Attributes:
        token: int32 [nodes]; the token on the edge to each node (-1 at the root).
        first_child: int32 [nodes + 1]; the children of node ``v`` are ``first_child[v] .. first_child[v + 1] - 1``,
            in ascending order of their tokens; a leaf has none.
        lo: int32 [nodes]; the first position of a node's interval.
        items: int32 [items]; the item index at each position.
        max_length: The tokens of the longest identifier.
    """

    token: NDArray[np.int32]
    first_child: NDArray[np.int32]
    lo: NDArray[np.int32]
    items: NDArray[np.int32]
    max_length: int

    @classmethod
    def build(cls, identifiers: Ints) -> Trie:
        """Compile identifiers.

        Args:
            identifiers: Integers [items, longest]; row ``i`` is item ``i``'s identifier, padded at its end with -1.

        Raises:
            IdentifierError: No items, an empty identifier, padding before a token, two items with one identifier, or
                an identifier that is the beginning of another.
        """
        table = np.asarray(identifiers)
        if table.ndim != 2 or not np.issubdtype(table.dtype, np.integer) or not table.size:
            raise IdentifierError(
                f"identifiers must be integers [items >= 1, tokens >= 1], not {table.dtype} {list(table.shape)}"
            )
        n, longest = table.shape
        if table.min() < -1 or table.max() >= 2**31 - 1:
            found = f"{table.min()} .. {table.max()}"
            raise IdentifierError(f"identifier tokens must lie in 0 .. 2**31 - 2 (padding is -1), found {found}")
        columns = [np.ascontiguousarray(table[:, level], dtype=np.int32) for level in range(longest)]
        for level, column in enumerate(columns):
            wrong = column < 0 if level == 0 else (columns[level - 1] < 0) & (column >= 0)
            if wrong.any():
                item = int(np.argmax(wrong))
                raise IdentifierError(f"the identifier of item {item} is empty or padded before its end: {table[item]}")
        order = np.lexsort(columns[::-1])
        columns = [column[order] for column in columns]

        # Position p opens a new node of a level where its identifier, up to that level, differs from the one before.
        # Padding sorts first, so an identifier stands directly before those that it is the beginning of.
        opens = np.zeros(n, dtype=bool)
        opens[0] = True
        starts: list[NDArray[np.int32]] = []
        for level, column in enumerate(columns):
            opens[1:] |= column[1:] != column[:-1]
            ends = np.ones(n, dtype=bool) if level == longest - 1 else columns[level + 1] < 0
            clash = np.flatnonzero((ends & (column >= 0))[:-1] & ~opens[1:])
            if clash.size:
                first, second = int(order[clash[0]]), int(order[clash[0] + 1])
                names = [tuple(int(t) for t in table[i] if t >= 0) for i in (first, second)]
                how = (
                    "have one identifier"
                    if names[0] == names[1]
                    else "have identifiers, one the beginning of the other"
                )
                raise IdentifierError(f"items {first} and {second} {how}: {names[0]} and {names[1]}")
            if (opened := np.flatnonzero(opens & (column >= 0))).size:
                starts.append(opened.astype(np.int32))

        sizes = np.cumsum([1, *map(len, starts)])
        lo = np.concatenate([np.zeros(1, dtype=np.int32), *starts])
        token = np.concatenate([np.full(1, -1, dtype=np.int32), *(columns[i][s] for i, s in enumerate(starts))])
        first_child = np.full(len(lo) + 1, len(lo), dtype=np.int32)
        first_child[0] = 1
        for level in range(len(starts) - 1):
            children = np.searchsorted(starts[level + 1], starts[level])
            first_child[sizes[level] : sizes[level + 1]] = sizes[level + 1] + children
        arrays = (token, first_child, lo, order.astype(np.int32))
        for array in arrays:
            array.setflags(write=False)
        return cls(*arrays, max_length=len(starts))

    def save(self, path: str | Path) -> None:
        """Write the trie to one file, whole or not at all.

        Loading an adapter builds its trie, which takes a second for a million items. Saving is for services: many
        processes that ``load`` one file start at once and share its pages. The file is an int32 ``.npy`` array.

        Raises:
            StorageError: The disk refused.
        """
        header = np.zeros(_HEADER, dtype="<i4")
        header[:5] = _MARK, _VERSION, len(self.lo), self.n_items, self.max_length
        header[8:] = np.frombuffer(self._digest, dtype="<i4")
        content = np.concatenate([header, *self._arrays], dtype="<i4")
        with files.new_file(Path(path)) as temporary, open(temporary, "wb") as file:
            np.save(file, content)

    @classmethod
    def load(cls, path: str | Path) -> Trie:
        """Map a saved trie into memory and check it (SHA-256, some 20 ms for a million items).

        Raises:
            IdentifierError: There is no trie at ``path``, or it was cut short or changed.
        """
        again = "Save the trie again with Trie.save."
        try:
            content = np.load(path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError:
            raise IdentifierError(f"there is no trie at {path}. {again}") from None
        except (OSError, ValueError, EOFError) as error:
            raise IdentifierError(f"{path} is no trie, or was cut short: {error}. {again}") from error
        if not isinstance(content, np.ndarray) or content.dtype != "<i4" or content.ndim != 1 or len(content) < _HEADER:
            raise IdentifierError(f"{path} is no trie: it is not one array of int32. {again}")
        content = np.asarray(content)  # Still mapped, and without the cost of a subclass at every look.
        mark, version, nodes, items, longest = content[:5].tolist()
        if mark != _MARK or version != _VERSION:
            raise IdentifierError(f"{path} is no trie of format {_VERSION}: it begins {mark:#x}, {version}. {again}")
        sizes = np.array([nodes, nodes + 1, nodes, items], dtype=np.int64)
        if nodes < 2 or items < 1 or longest < 1 or len(content) != _HEADER + sizes.sum():
            found = f"{nodes} nodes and {items} items do not make {len(content)} numbers"
            raise IdentifierError(f"{path} is no trie, or was changed: {found}. {again}")
        token, first_child, lo, order = np.split(content[_HEADER:], np.cumsum(sizes)[:-1])
        trie = cls(token, first_child, lo, order, max_length=longest)
        if trie._digest != content[8:_HEADER].tobytes():
            raise IdentifierError(f"{path} was changed since it was saved: its content has another hash. {again}")
        return trie

    @property
    def _arrays(self) -> tuple[NDArray[np.int32], ...]:
        return (self.token, self.first_child, self.lo, self.items)

    @cached_property
    def _digest(self) -> bytes:
        digest = hashlib.sha256(np.array([self.max_length, len(self.lo), self.n_items], dtype="<i4").tobytes())
        for array in self._arrays:
            digest.update(array.astype("<i4", copy=False).data)
        return digest.digest()

    @property
    def n_items(self) -> int:
        return len(self.items)

    @cached_property
    def position(self) -> NDArray[np.int32]:
        """int32 [items]: the position of each item, the inverse of ``items``."""
        position = np.empty(self.n_items, dtype=np.int32)
        position[self.items] = np.arange(self.n_items, dtype=np.int32)
        return position

    def by_position(self, mask: Bools) -> Bools:
        """A mask of the items, bool [items], in the order of their positions."""
        result = np.empty(self.n_items, dtype=bool)
        for start in range(0, self.n_items, _CHUNK):  # In one piece NumPy would copy all indices as int64 first.
            chunk = slice(start, start + _CHUNK)
            mask.take(self.items[chunk], out=result[chunk], mode="clip")
        return result

    @cached_property
    def hash(self) -> str:
        """The first 16 hexadecimal digits of SHA-256 over the content."""
        return self._digest.hex()[:16]

    def children(self, nodes: Ints) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int64]]:
        """The children of all given nodes, one after the other: (index into ``nodes``, token, child node)."""
        first = self.first_child[nodes].astype(np.int64)
        counts = self.first_child[np.asarray(nodes) + 1] - first
        rows = np.repeat(np.arange(len(first)), counts)
        child = np.arange(len(rows)) + np.repeat(first - (np.cumsum(counts) - counts), counts)
        return rows, self.token[child], child

    def is_leaf(self, nodes: Ints) -> Bools:
        return self.first_child[nodes] == self.first_child[np.asarray(nodes) + 1]

    def interval(self, nodes: Ints) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """The positions ``lo .. hi - 1`` of the items below each node. ``hi`` is found by going down last children."""
        last = np.asarray(nodes)
        while True:
            end = self.first_child[last + 1]
            inner = self.first_child[last] < end
            if not inner.any():
                return self.lo[nodes], self.lo[last] + 1
            last = np.where(inner, end - 1, last)


class Level(NamedTuple):
    """Nodes of one level, sorted by owner: int [m] each, with the meaning that they have in ``BeamSearch``.

    ``parent`` is a row of the level above; of the first level, of the live beams of the step before.
    """

    owner: Ints
    node: Ints
    token: Ints
    parent: Ints

    def find(self, owner: Ints, node: Ints) -> NDArray[np.int64]:
        """The rows of nodes that are among these."""
        keys = (self.owner.astype(np.int64) << 32) + self.node
        order = np.argsort(keys)
        return order[np.searchsorted(keys, (owner.astype(np.int64) << 32) + node, sorter=order)]


@dataclass(frozen=True)
class Beams:
    """The items found for n prompts, best first.

    Attributes:
        items: int32 [n, B] item indices, padded with -1. B is the number of beams asked for, or of items if smaller.
        scores: float32 [n, B] sums of log-probabilities, padded with -inf.
        reasons: For each prompt, why it got fewer items than beams were asked for, or None.
    """

    items: NDArray[np.int32]
    scores: NDArray[np.float32]
    reasons: list[str | None]


class BeamSearch:
    """The state of one constrained beam search for n prompts.

    In a step, ``candidates`` names the legal continuations of the live beams and ``advance`` takes their
    log-probabilities and keeps, for each prompt, the best ``num_beams`` of finished and open beams together (a score
    only falls as its beam grows). With as many beams as items nothing is ever cut, and the result is exact.

    Args:
        trie: The legal identifiers.
        n: The number of prompts.
        num_beams: Beams per prompt, 1 .. 65,536; lowered to the number of items.
        allowed: bool [items] shared by all prompts; None allows all.
        blocked: For each prompt, item indices that may not come out (-1 is ignored), or None.
        only: For each prompt, the item indices that alone may come out (-1 is ignored), or None for all.
        numbers: What errors call the prompts; their places in ``range(n)`` unless given.

    Attributes (live beams, m of them, sorted by owner and then best first):
        owner: int32 [m], the prompt.  node: int32 [m], the place in the trie.  token: int32 [m], the last token.
        parent: int32 [m], the row among the live beams of the step before.  score: float64 [m], the sum so far.

    Raises:
        DecodingError: ``num_beams`` or a restriction is out of range.
    """

    def __init__(
        self,
        trie: Trie,
        n: int,
        num_beams: int,
        allowed: Bools | None = None,
        blocked: Sequence[Ints | None] | None = None,
        only: Sequence[Ints | None] | None = None,
        numbers: Ints | None = None,
    ) -> None:
        check_request(n, num_beams, blocked, only)
        self.trie, self.n, self.asked, self.num_beams = trie, n, num_beams, min(num_beams, trie.n_items)
        self.numbers = np.arange(n) if numbers is None else np.asarray(numbers)
        self.allowed: Bools | None = None  # by position
        if allowed is not None:
            allowed = np.asarray(allowed)
            if allowed.shape != (trie.n_items,) or allowed.dtype != np.bool_:
                raise DecodingError(f"allowed must be bool [{trie.n_items}], not {allowed.dtype} {list(allowed.shape)}")
            self.allowed = trie.by_position(allowed)
        lists: list[list[Ints | None]] = [[None] * n if one is None else list(one) for one in (blocked, only)]
        self._blocked, self._only = self._positions("blocked", lists[0]), self._positions("only", lists[1])
        self.has_only = np.array([positions is not None for positions in self._only], dtype=bool)
        self._open = self._restrict(*lists)
        self.n_allowed = np.full(n, trie.n_items) if self._open is None else self._open.total[self._row]
        self.owner = np.flatnonzero(self.n_allowed > 0).astype(np.int32)
        self.node, self.score = np.zeros_like(self.owner), np.zeros(len(self.owner))
        self.token, self.parent = np.full_like(self.owner, -1), np.full_like(self.owner, -1)
        self._done_owner, self._done_node, self._done_score = self.owner[:0], self.node[:0], self.score[:0]
        self._rows = self._nodes = np.zeros(0, dtype=np.int64)

    def _positions(self, name: str, lists: list[Ints | None]) -> list[Ints | None]:
        """Item lists as lists of positions; None stays None."""
        result: list[Ints | None] = [None] * self.n
        for prompt, one in enumerate(lists):
            if one is None:
                continue
            items = np.asarray(one)
            if len(items):
                if not np.issubdtype(items.dtype, np.integer) or items.min() < -1 or items.max() >= self.trie.n_items:
                    found = f"{items.min()} .. {items.max()}"
                    raise DecodingError(f"{name} must hold item indices 0 .. {self.trie.n_items - 1}, found {found}")
                items = self.trie.position[items[items >= 0] if items.min() < 0 else items]
            result[prompt] = items.astype(np.int32, copy=False)
        return result

    def _restrict(self, blocked: list[Ints | None], only: list[Ints | None]) -> _Ranks | None:
        """The open positions: one row of bits for every different restriction; ``_row`` says which is each prompt's."""
        if self.allowed is None and all(one is None for one in (*blocked, *only)):
            return None
        rows: dict[tuple[int, int], int] = {}  # Prompts that are given the very same lists share a row.
        pairs = zip(blocked, only, strict=True)
        self._row = np.array([rows.setdefault((id(one), id(other)), len(rows)) for one, other in pairs], dtype=np.int64)
        mask, ranks = np.empty(self.trie.n_items, dtype=bool), _Ranks(len(rows), self.trie.n_items)
        for row, prompt in enumerate(np.unique(self._row, return_index=True)[1]):
            opened, shut = self._only[prompt], self._blocked[prompt]
            if opened is not None:
                mask[:] = False
                mask[opened] = True if self.allowed is None else self.allowed[opened]
            else:
                mask[:] = True if self.allowed is None else self.allowed
            if shut is not None:
                mask[shut] = False
            ranks.set(row, mask)
        ranks.finish()
        return ranks

    def restrictions(self) -> tuple[Bools | None, tuple[Ints, Ints], tuple[Ints, Ints]]:
        """For an engine that selects from a whole level: the shared mask by position, and pairs (prompt, position) that
        are blocked, and that alone are open for the prompts in ``has_only`` (whatever the first two say)."""
        only: list[Ints | None] = [None] * self.n
        if self._open is not None:
            for prompt in np.flatnonzero(self.has_only):
                only[prompt] = self._open.positions(int(self._row[prompt]))
        return self.allowed, _pairs(self._blocked), _pairs(only)

    @property
    def done(self) -> bool:
        return not len(self.node)

    def candidates(self) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """The legal continuations of the live beams: (row of the live beam [c], token [c])."""
        self._rows, tokens, self._nodes = self._children(self.owner, self.node)
        return self._rows, tokens

    def _children(self, owner: Ints, node: Ints) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int64]]:
        """``Trie.children`` of nodes of some prompts, those alone below which an item is open."""
        rows, tokens, nodes = self.trie.children(node)
        if self._open is not None and len(rows):
            # Siblings divide the interval of their parent: one ends where the next begins, the last with the parent.
            own = self._row[owner]
            before = self._open.rank(own.take(rows), self.trie.lo.take(nodes))
            last = np.searchsorted(rows, np.arange(len(own)), side="right") - 1
            after = np.append(before[1:], 0)
            after[last] = self._open.rank(own, self.trie.interval(node)[1])
            legal = np.flatnonzero(after > before)
            rows, tokens, nodes = rows.take(legal), tokens.take(legal), nodes.take(legal)
        return rows, tokens, nodes

    def ahead(self, most: int) -> list[Level]:
        """The live beams, and after them the levels below that an engine does well to feed in the same forward.

        Where identifiers hardly branch any more, whole levels are hardly more than the beams that will live on in them,
        and feeding them now saves their forwards. The search is the same: it takes the steps one by one.

        Args:
            most: Nodes of all levels, at most so many times ``num_beams``, for any one prompt: the forward is padded
                to the prompt with the most.
        """
        levels = [Level(self.owner, self.node, self.token, self.parent)]
        fed = np.bincount(self.owner)
        needed = int(fed.max())
        while True:
            above = levels[-1]
            rows, tokens, nodes = self._children(above.owner, above.node)
            inner = np.flatnonzero(~self.trie.is_leaf(nodes))
            owner = above.owner[rows[inner]]
            counts = np.bincount(owner, minlength=len(fed))
            fed, needed = fed + counts, needed + int(np.minimum(counts, self.num_beams).max())
            if not len(inner) or fed.max() > min(_SLACK * needed, most * self.num_beams):
                return levels
            levels.append(Level(owner, nodes[inner], tokens[inner], rows[inner]))

    def advance(self, logprobs: Floats, rows: Ints | None = None, nodes: Ints | None = None) -> None:
        """Take one step.

        Args:
            logprobs: Floats [c]; the log-probability of each candidate, in the order of ``candidates``.
            rows, nodes: Given instead of a call of ``candidates`` by an engine that has itself selected legal
                candidates, among them the best ``num_beams`` of each prompt.

        Raises:
            DecodingError: A log-probability is not finite; the prompt is named.
        """
        rows, nodes = (self._rows, self._nodes) if rows is None or nodes is None else (rows, nodes)
        if not (finite := np.isfinite(logprobs)).all():
            raise not_finite(self.numbers[self.owner[rows[np.argmin(finite)]]])
        # Finished beams compete with the candidates. They are leaves, and that is how they are told apart below.
        owner = np.concatenate([self._done_owner, self.owner[rows]])
        node = np.concatenate([self._done_node, nodes]).astype(np.int32)
        score = np.concatenate([self._done_score, self.score[rows] + logprobs])
        parent = np.concatenate([np.full(len(self._done_owner), -1), rows]).astype(np.int32)
        best = self._best(owner, node, score)
        owner, node, score, parent = owner[best], node[best], score[best], parent[best]
        leaf = self.trie.is_leaf(node)
        self._done_owner, self._done_node, self._done_score = owner[leaf], node[leaf], score[leaf]
        self.owner, self.node, self.score, self.parent = owner[~leaf], node[~leaf], score[~leaf], parent[~leaf]
        self.token = self.trie.token[self.node]

    def _best(self, owner: Ints, node: Ints, score: Floats) -> NDArray[np.int64]:
        """The best ``num_beams`` of each owner, by owner, then best first; ties by the index of the first item."""
        order = np.argsort(owner, kind="stable")
        bounds = np.searchsorted(owner[order], np.arange(self.n + 1))
        kept = []
        for start, stop in itertools.pairwise(bounds):
            group = order[start:stop]
            if len(group) > self.num_beams:
                scores = score[group]
                group = group[scores >= np.partition(scores, -self.num_beams)[-self.num_beams]]
            kept.append(group)
        order = np.concatenate([*kept, order[:0]])
        order = order[np.lexsort((self.trie.items[self.trie.lo[node[order]]], -score[order], owner[order]))]
        return order[_places(owner[order]) < self.num_beams]

    def result(self) -> Beams:
        """The finished items. Call it when ``done``."""
        owner, place = self._done_owner, _places(self._done_owner)
        items = np.full((self.n, self.num_beams), -1, dtype=np.int32)
        scores = np.full((self.n, self.num_beams), -np.inf, dtype=np.float32)
        items[owner, place] = self.trie.items[self.trie.lo[self._done_node]]
        scores[owner, place] = self._done_score
        return Beams(items, scores, [self._reason(int(count)) for count in self.n_allowed])

    def _reason(self, count: int) -> str | None:
        if count >= self.asked:
            return None
        if count == 0:
            return "no item is allowed: the restrictions leave nothing of the catalogue"
        what = "the catalogue has" if count == self.trie.n_items else "the restrictions leave"
        return f"{what} only {count} items"


class Searches:
    """The searches of one call, for engines that make it in batches of prompts; arguments as of ``BeamSearch``."""

    def __init__(
        self,
        n: int,
        trie: Trie,
        num_beams: int,
        allowed: Bools | None,
        blocked: Sequence[Ints | None] | None,
        only: Sequence[Ints | None] | None,
    ) -> None:
        self._trie, self._num_beams, self._allowed, self._lists = trie, num_beams, allowed, (blocked, only)
        shape = (n, min(num_beams, trie.n_items))
        self.beams = Beams(np.full(shape, -1, dtype=np.int32), np.full(shape, -np.inf, dtype=np.float32), [None] * n)

    def of(self, batch: Ints) -> BeamSearch:
        """The search of some prompts, by their numbers."""
        blocked, only = (None if lists is None else [lists[i] for i in batch] for lists in self._lists)
        return BeamSearch(self._trie, len(batch), self._num_beams, self._allowed, blocked, only, batch)

    def keep(self, batch: Ints, search: BeamSearch) -> None:
        """Put what a search found among ``beams``."""
        found = search.result()
        self.beams.items[batch], self.beams.scores[batch] = found.items, found.scores
        for i, reason in zip(batch, found.reasons, strict=True):
            self.beams.reasons[i] = reason


class _Ranks:
    """Rows of bits, one bit a position, that tell how many are set before a position: a bit vector with the counts
    before each of its words (Jacobson, 1989). 1.5 bits a position and row."""

    def __init__(self, rows: int, n: int) -> None:
        self.n, self.width = n, n // 64 + 1  # The last word always has a free bit, so that rank(n) needs no exception.
        self.words = np.zeros((rows, self.width), dtype="<u8")

    def set(self, row: int, mask: Bools) -> None:
        packed = np.packbits(mask, bitorder="little")
        self.words[row].view(np.uint8)[: len(packed)] = packed

    def finish(self) -> None:
        """Count, once all rows are set."""
        counts = np.cumsum(np.bitwise_count(self.words), axis=1, dtype=np.int32)
        self.total, self._before = counts[:, -1].astype(np.int64), np.zeros_like(counts)
        self._before[:, 1:] = counts[:, :-1]

    def rank(self, rows: Ints, positions: Ints) -> NDArray[np.int32]:
        """int32: the set bits of each row before each position."""
        place = rows * self.width + (positions >> 6)
        inside = self.words.ravel().take(place) & _BELOW.take(positions & 63)
        return self._before.ravel().take(place) + np.bitwise_count(inside)

    def positions(self, row: int) -> NDArray[np.int64]:
        """The positions whose bits are set."""
        return np.flatnonzero(np.unpackbits(self.words[row].view(np.uint8), count=self.n, bitorder="little"))


def _pairs(lists: Sequence[Ints | None]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(prompt, position) of all positions of the lists."""
    filled = [(prompt, one) for prompt, one in enumerate(lists) if one is not None]
    prompts = np.repeat(np.array([prompt for prompt, _ in filled], dtype=np.int64), [len(one) for _, one in filled])
    return prompts, np.concatenate([np.zeros(0, dtype=np.int64), *(one for _, one in filled)])


def check_request(
    n: int, num_beams: int, blocked: Sequence[Ints | None] | None, only: Sequence[Ints | None] | None
) -> None:
    """Refuse a number of beams that is none or out of range, and lists that are not one for each of ``n`` prompts."""
    if not isinstance(num_beams, int | np.integer) or not 1 <= num_beams <= MAX_BEAMS:
        raise DecodingError(f"num_beams must be 1 .. {MAX_BEAMS}, not {num_beams}")
    for name, one in (("blocked", blocked), ("only", only)):
        if one is not None and len(one) != n:
            raise DecodingError(f"{name} has {len(one)} lists for {n} prompts")


def not_finite(number: int) -> DecodingError:
    """The error for a prompt whose logits hold NaN or infinity."""
    return DecodingError(
        f"prompt {number}: the model's logits are not finite; check its weights, or load it in float32"
    )


def _places(owner: Ints) -> NDArray[np.int64]:
    """The place of each row within its run of equal owners."""
    return np.arange(len(owner)) - np.searchsorted(owner, owner)
