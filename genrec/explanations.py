"""Why an item is in a list or is not: the prompt as read, the search by levels, the exact rank, the events.

Everything here is asked of an engine from outside, with the same two calls that answer and measure. A search over the
beginnings of identifiers, of one length, with the same restrictions, ends with the very beams that the real search
holds after that many tokens; and since a beginning scores at least what any identifier with it scores, whole branches
are left out of the exact rank as soon as they fall below the item (branch and bound; Land and Doig, 1960).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from genrec.asking import beams_for, listed, one_each
from genrec.decoding import MAX_BEAMS, Bools, Ints, Trie
from genrec.engines import Engine
from genrec.recommender import Recommender
from genrec.rendering import Rendered, rendered_sequence
from genrec.report import pictures

# Beginnings that one copy of the prompt decodes together, where there are beams to feed: their mask is quadratic.
_TOGETHER = 512
# Branches are left out only where they are so much below the item: what rounding makes of bfloat16 logits, and more.
_MARGIN = 0.1


@dataclass(frozen=True)
class Step:
    """One token of the item's identifier, as the search sees it.

    Attributes:
        level: From 1, as many tokens as the beginning has.
        token: The token, spelled as in the vocabulary; "" after the end of an identifier that is shorter than others.
        score: The log-probability of the beginning up to here.
        bar: That of the last beam kept at this level; None where there was room for all, or the search was over for
            the item before.
        kept: Whether the beginning was among the beams.
    """

    level: int
    token: str
    score: float
    bar: float | None
    kept: bool


@dataclass(frozen=True)
class Event:
    """One event of the history and what it does for the item.

    Attributes:
        item_id: Of the event.
        title: Of the event.
        change: The score of the explained item where this event is left out, minus its score with the whole history:
            below 0 where the event speaks for the item. None for an event that was cut, which the model did not see.
    """

    item_id: str
    title: str
    change: float | None


@dataclass(frozen=True, repr=False)
class Explanation:
    """Why an item is in the list of a history, or why it is not.

    Attributes:
        item_id: The item that was asked about.
        title: Of the item.
        prompt: The prompt as the model reads it, in spans, with its counts of tokens and the events that were cut; its
            answer is the identifier of the item.
        score: The log-probability of the item's identifier after the prompt.
        rank: The exact place of the item, from 1, among the allowed items by score, whatever the beams; of an item that
            is not allowed, the place that it would have.
        allowed_items: How many items the restrictions leave.
        refused_by: The restrictions that shut the item out: ``seen``, ``where``, ``allowed``, ``blocked``.
        k: The items of the list.
        num_beams: The beams of the search.
        list_rank: The place of the item in the list, from 1; None where it is not in it.
        dropped_by: What kept it out: the ``mask`` of the restrictions, the ``beam``, or the ``length`` of the list:
            the search found it but after the first k, or identifiers have one token, so that no beam can lose what
            belongs in the list; None where it is in the list.
        dropped_at: The level where that was, from 1; None where it is in the list.
        steps: The item's identifier token by token.
        events: The history, oldest first.

    Examples:
        >>> import genrec
        >>> rec = genrec.Recommender.load("adapters/shop")
        >>> why = rec.why(["i3", "i4"], "i3")
        >>> why.refused_by, why.dropped_by, why.dropped_at
        (('seen',), 'mask', 1)
        >>> [event.item_id for event in why.events]
        ['i3', 'i4']
        >>> rec.why(["i3", "i4"], "i3", exclude_seen=False).allowed_items
        24
    """

    item_id: str
    title: str
    prompt: Rendered
    score: float
    rank: int
    allowed_items: int
    refused_by: tuple[str, ...]
    k: int
    num_beams: int
    list_rank: int | None
    dropped_by: Literal["mask", "beam", "length"] | None
    dropped_at: int | None
    steps: tuple[Step, ...]
    events: tuple[Event, ...]

    @property
    def answer(self) -> str:
        """The explanation in a few sentences."""
        name = f"{self.item_id} ({self.title})" if self.title else self.item_id
        place = f"number {self.rank:,} of {self.allowed_items:,} allowed items"
        if self.list_rank is not None:
            told = f"{name} is in the list at rank {self.list_rank}; by exact score it is {place}."
        elif self.dropped_by == "length":
            told = f"{name} ranks {self.rank:,} of {self.allowed_items:,} allowed items, and the list ends at {self.k}."
        elif self.dropped_by == "mask":
            shut = " and ".join(_REFUSALS[name] for name in self.refused_by)
            told = (
                f"{name} is not allowed: {shut}. The mask shut it out at level {self.dropped_at} of its identifier. By "
                f"score it would be number {self.rank:,} among the {self.allowed_items:,} allowed items."
            )
        else:
            lost = self.steps[(self.dropped_at or 1) - 1]
            told = (
                f"{name} was dropped by the beam at level {lost.level}: its identifier scores {lost.score:.3f} so far, "
                f"and the last of {self.num_beams} beams {lost.bar:.3f}. By exact score it is {place}."
            )
            if self.refused_by:
                told += f" It is not allowed either: {' and '.join(_REFUSALS[name] for name in self.refused_by)}."
            elif self.rank <= self.k:
                told += f" It belongs in the list: raise num_beams above {self.num_beams}."
        cut = self.prompt.cut
        if cut:
            told += f" The {cut} oldest events of the history did not fit the prompt, and were not read."
        return told

    def __repr__(self) -> str:
        return self.answer

    def picture(self) -> bytes:
        """PNG: the change of score by each of the events that change it most, and the search level by level."""
        return pictures.explanation(
            [(event.title or event.item_id, event.change) for event in self.events if event.change is not None],
            [(step.token, step.score, step.bar, step.kept) for step in self.steps],
            f"{self.title or self.item_id}: score {self.score:.2f}, {self.rank:,} of {self.allowed_items:,}",
        )

    def _repr_png_(self) -> bytes:
        return self.picture()


_REFUSALS = {
    "seen": "it is in the history, and seen items are left out",
    "where": "the predicate where does not hold for it",
    "allowed": "it is none of the items that alone are allowed",
    "blocked": "it is blocked",
}


class _Beginnings(NamedTuple):
    """The different beginnings, of one length, of all identifiers; identifiers that are shorter stand whole.

    Attributes:
        trie: Of the beginnings, numbered by their first items, so that ties fall as in the search of items.
        of: int32 [items]; the beginning of each item.
    """

    trie: Trie
    of: NDArray[np.int32]

    @classmethod
    def build(cls, trie: Trie, tokens: Ints, level: int) -> _Beginnings:
        """Of the identifiers ``tokens``, int [items, longest], whose trie is ``trie``, the first ``level`` tokens."""
        ordered = tokens[trie.items, :level]
        opens = np.ones(len(ordered), dtype=bool)
        opens[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
        starts = np.flatnonzero(opens)
        order = np.argsort(trie.items[starts])
        number = np.empty(len(order), dtype=np.int32)
        number[order] = np.arange(len(order), dtype=np.int32)
        of = np.empty(len(ordered), dtype=np.int32)
        of[trie.items] = number[np.cumsum(opens) - 1]
        return cls(Trie.build(ordered[starts[order]]), of)


class _Found(NamedTuple):
    """What a search holds of an item at one level.

    Attributes:
        allowed: Whether an allowed item has its beginning.
        place: Of its beginning among the beams, from 1; None where it is not among them.
        bar: The score of the last beam; None where there was room for every allowed beginning.
    """

    allowed: bool
    place: int | None
    bar: float | None


class _Search:
    """One prompt, one trie, and what is allowed: what a search holds at each level, and exact scores."""

    def __init__(
        self, engine: Engine, prompt: Ints, trie: Trie, tokens: Ints, allowed: Bools, item: int, score: float
    ) -> None:
        self.engine, self.prompt, self.trie, self.tokens = engine, prompt, trie, tokens
        self.allowed, self.item, self.score = allowed, item, score
        self._levels: dict[int, _Beginnings] = {}

    def _level(self, level: int) -> _Beginnings:
        if level not in self._levels:
            whole = level == self.trie.max_length
            every = np.arange(self.trie.n_items, dtype=np.int32)
            made = _Beginnings(self.trie, every) if whole else _Beginnings.build(self.trie, self.tokens, level)
            self._levels[level] = made
        return self._levels[level]

    def at(self, level: int, num_beams: int) -> _Found:
        """What the search holds of the item at ``level``."""
        beginnings = self._level(level)
        own, n = int(beginnings.of[self.item]), beginnings.trie.n_items
        allowed = np.zeros(n, dtype=bool)
        allowed[beginnings.of[self.allowed]] = True
        found = self.engine.beam_search([self.prompt], beginnings.trie, num_beams, allowed)
        items, scores = found.items[0], found.scores[0]
        full = int(allowed.sum()) > num_beams
        places = np.flatnonzero(items == own)
        return _Found(
            bool(allowed[own]),
            int(places[0]) + 1 if len(places) else None,
            float(scores[items >= 0].min()) if full else None,
        )

    def rank(self) -> int:
        """The exact place of the item among the allowed ones, from 1; the order is that of every list."""
        left = self.allowed.copy()
        left[self.item] = True
        level = 0
        # What is left is scored whole as soon as it fits one piece.
        while int(left.sum()) > _TOGETHER and (level := level + 1) < self.trie.max_length:
            beginnings = self._level(level)
            found = self._scores(beginnings.trie, np.unique(beginnings.of[left]))
            left &= (found >= self.score - _MARGIN)[beginnings.of]
            left[self.item] = True
        scores = self._scores(self.trie, np.flatnonzero(left))
        own = scores[self.item]
        better = scores > own
        better[: self.item] |= scores[: self.item] == own
        return 1 + int((better & self.allowed).sum())

    def _scores(self, trie: Trie, wanted: Ints) -> NDArray[np.float32]:
        """float32 [items of ``trie``]: the scores of the ``wanted`` ones, exactly; -inf for the others.

        Each copy of the prompt decodes as many as it has beams, so that nothing is cut.
        """
        together = MAX_BEAMS if trie.max_length == 1 else _TOGETHER
        near = wanted[np.argsort(trie.position[wanted])]  # Neighbours share their beginnings.
        pieces = [near[start : start + together] for start in range(0, len(near), together)]
        found = self.engine.beam_search([self.prompt] * len(pieces), trie, max(map(len, pieces)), only=pieces)
        result = np.full(trie.n_items, -np.inf, dtype=np.float32)
        real = found.items >= 0
        result[found.items[real]] = found.scores[real]
        return result


def explain(
    recommender: Recommender,
    history: Sequence[str],
    item: str,
    *,
    user: Mapping[str, Any] | None = None,
    context: Mapping[str, Any] | None = None,
    k: int = 10,
    num_beams: int | None = None,
    exclude_seen: bool | None = None,
    where: str | None = None,
    allowed: Sequence[str] | None = None,
    blocked: Sequence[str] | None = None,
) -> Explanation:
    """Why ``recommend``, called with the same arguments, has ``item`` in its list for ``history``, or has not.

    The prompt is searched once per token of an identifier, the exact rank searches on until nothing is left that could
    beat the item, and ``Engine.score`` is called once, with the history and with the history less each event. An event
    that is left out may make room for an older one that was cut.

    Args:
        recommender: What recommends.
        history: Item ids, oldest first; may be empty.
        item: The item id asked about.
        user: Columns of the users table that the prompt's head may read.
        context: What the prompt's head may read of the choice itself.
        k, num_beams, exclude_seen, where, allowed, blocked: As in ``Recommender.recommend``.

    Raises:
        UnknownIdError: An item that the adapter does not know.
        ConfigError: ``k``, ``num_beams`` or ``where`` is none that ``recommend`` takes.
    """
    tokenization, prompt = recommender.tokenization, recommender.adapter.prompt
    beams = beams_for(k, num_beams)
    (user,), (context,) = one_each([user], "user", 1), one_each([context], "context", 1)
    history = listed(history, "history")
    events, target = recommender.indices(history), int(recommender.indices([item])[0])
    open_to = recommender.masks(where, allowed, blocked)
    if recommender.exclude_seen if exclude_seen is None else exclude_seen:
        open_to = {"seen": ~recommender.among(events), **open_to}
    legal = np.logical_and.reduce([np.ones(len(recommender.item_ids), dtype=bool), *open_to.values()])

    rendered = rendered_sequence(tokenization, prompt, events, target, user, context)
    places = range(rendered.cut, len(events))
    histories = [events, *(np.delete(events, place) for place in places)]
    asked = tokenization.sequences(prompt, histories, [user] * len(histories), [context] * len(histories))
    identifier = tokenization.identifier(target)
    beginnings = [identifier[: level + 1] for level in range(len(identifier))]
    scores = recommender.engine.score([asked[0]] * len(beginnings) + asked[1:], beginnings + [identifier] * len(places))
    so_far, without = scores[: len(beginnings)], scores[len(beginnings) :]
    score = float(so_far[-1])

    search = _Search(recommender.engine, asked[0], recommender.trie, tokenization.tokens, legal, target, score)
    spelled: list[str] = tokenization.tokenizer.convert_ids_to_tokens(identifier.tolist())
    steps: list[Step] = []
    dropped_by: Literal["mask", "beam", "length"] | None = None
    dropped_at: int | None = None
    place: int | None = None
    for level in range(1, recommender.trie.max_length + 1):
        # An identifier that is shorter than others has to hold its place while they go on.
        token = spelled[level - 1] if level <= len(spelled) else ""
        reached = float(so_far[min(level, len(so_far)) - 1])
        if dropped_by is None:
            found = search.at(level, beams)
            place = found.place
            steps.append(Step(level, token, reached, found.bar, place is not None))
            if place is None:
                # With one level the beams are simply the best items, so that it stands too low for the list.
                missed: Literal["beam", "length"] = "beam" if recommender.trie.max_length > 1 else "length"
                dropped_by, dropped_at = missed if found.allowed else "mask", level
        elif token:
            steps.append(Step(level, token, reached, None, False))
    if place is not None and place > k:
        place, dropped_by, dropped_at = None, "length", recommender.trie.max_length
    changes = [None] * rendered.cut + (without - score).tolist()
    return Explanation(
        item_id=item,
        title=recommender.titles[target],
        prompt=rendered,
        score=score,
        rank=search.rank(),
        allowed_items=int(legal.sum()),
        refused_by=tuple(name for name, mask in open_to.items() if not mask[target]),
        k=k,
        num_beams=beams,
        list_rank=place,
        dropped_by=dropped_by,
        dropped_at=dropped_at,
        steps=tuple(steps),
        events=tuple(
            Event(event, recommender.titles[index], change)
            for event, index, change in zip(history, events.tolist(), changes, strict=True)
        ),
    )
