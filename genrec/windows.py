"""Windows of whole events: where the rows of a sequence prompt cut histories that do not fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import polars as pl

from genrec.errors import PromptError
from genrec.prompts import Prompt
from genrec.tokenization import Tokenization


def windows(lengths: np.ndarray, budget: int, first: int) -> list[tuple[int, int, int]]:
    """Cut a history into windows that fit, so that every event is a target exactly once.

    Args:
        lengths: int [events], tokens of each event.
        budget: Tokens of the events before the last one of a window, at most.
        first: Events of the first window, at most (0: as many as fit); shifts where the later ones begin.

    Returns:
        ``(start, stop, skip)`` per window: events ``start:stop``, of which the first ``skip`` carry no loss because
        they are targets of the window before. ``skip`` is 0 for the first window, else 1.
    """
    total = np.concatenate([[0], np.cumsum(lengths)])
    result: list[tuple[int, int, int]] = []
    start, skip = 0, 0
    while True:
        # The last event of a window is its identifier alone, so only the events before it count: total[stop - 1].
        stop = int(np.searchsorted(total, total[start] + budget, side="right"))
        stop = min(max(stop, start + skip + 1), len(lengths))
        if not result and first and stop < len(lengths):
            stop = min(stop, first)
        result.append((start, stop, skip))
        if stop >= len(lengths):
            return result
        start, skip = stop - 1, 1


def later_windows(lengths: np.ndarray, budget: int, begin: int, end: int) -> list[tuple[int, int, int]]:
    """Windows in which the events ``begin:end`` of a history are targets exactly once, after as much as fits.

    Targets take up to half of the budget, so that the other half is left for what came before them.

    Args:
        lengths: int [events], tokens of each event.
        budget: Tokens of the events before the last one of a window, at most.

    Returns:
        ``(start, stop, skip)`` per window, as ``windows`` gives them.
    """
    total = np.concatenate([[0], np.cumsum(lengths)])
    result: list[tuple[int, int, int]] = []
    while begin < end:
        stop = int(np.searchsorted(total, total[begin] + budget // 2, side="right"))
        stop = min(max(stop, begin + 1), end)
        start = int(np.searchsorted(total, total[stop - 1] - budget, side="left"))
        result.append((start, stop, begin - start))
        begin = stop
    return result


def begins(train: Sequence[np.ndarray]) -> np.ndarray:
    """int64 [users + 1]: where the events of each user begin in a table of all training events."""
    return np.concatenate([[0], np.cumsum([len(history) for history in train])]).astype(np.int64)


@dataclass(frozen=True, eq=False)
class Cuts:
    """What decides where a sequence prompt cuts histories.

    Attributes:
        catalogue: int64 [items], tokens of an event with each item.
        lengths: Per user int64 [events], tokens of each event.
        budgets: Per user the tokens left for the history: a head may read the user's columns.
        least: The smallest of them, for rows that are no user's; 0 without users.
        told: The same for a user and the place of the event to be predicted, where the head reads its context.
    """

    catalogue: np.ndarray
    lengths: list[np.ndarray]
    budgets: list[int]
    least: int
    told: Callable[[int, int], int] | None

    @classmethod
    def measure(
        cls,
        prompt: Prompt,
        tokenization: Tokenization,
        train: Sequence[np.ndarray],
        users: Sequence[Mapping[str, Any]] | None,
        told: pl.DataFrame | None,
    ) -> Cuts:
        """``told`` has the contexts of the events of ``train``. Raises PromptError where an item fits no row."""
        # Of the whole catalogue: what fits no row in training would silently empty a history later.
        catalogue = tokenization.fragment_lengths(prompt, np.arange(len(tokenization.items)))
        longest, begin = int(catalogue.argmax()), begins(train)

        def budget(user: int, context: Mapping[str, Any] | None = None) -> int:
            left = tokenization.history_budget(tokenization.head_ids(prompt, users[user] if users else None, context))
            if catalogue[longest] > left:
                raise PromptError(
                    f"prompt {prompt.name}: item {tokenization.items['item_id'][longest]!r} takes "
                    f"{catalogue[longest]} tokens and max_length {tokenization.max_length} leaves {left} for the "
                    "history. Raise max_length, or shorten its block item."
                )
            return left

        @cache
        def at(user: int, event: int) -> int:
            assert told is not None
            return budget(user, told.row(int(begin[user]) + event, named=True))

        lengths = [catalogue[history] for history in train]
        budgets = [*map(budget, range(len(train)))]
        return cls(catalogue, lengths, budgets, min(budgets, default=0), at if prompt.reads["context"] else None)

    def budget(self, user: int, event: int) -> int:
        """Tokens left for the history of a user where the event at this place of it is predicted."""
        return self.budgets[user] if self.told is None else self.told(user, event)
