"""What a recommender gives: lists of items with titles and scores, and why a list is short."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import polars as pl

SCHEMA = {"rank": pl.Int32, "item_id": pl.String, "title": pl.String, "score": pl.Float64, "reason": pl.String}


@dataclass(frozen=True)
class Recommendation:
    """One item of a list.

    Attributes:
        rank: From 1.
        item_id: As in the catalogue.
        title: Of the item; "" where it has none.
        score: The log-probability of the item's identifier; of ``Recommender.similar`` the cosine.
    """

    rank: int
    item_id: str
    title: str
    score: float


@dataclass(frozen=True, repr=False)
class Recommendations(Sequence[Recommendation]):
    """The list of one history, best first: a sequence of ``Recommendation``; a slice of it is a tuple.

    Attributes:
        items: What the list holds.
        reason: Why it holds fewer items than were asked for; None where it does not.

    Example:
        >>> found = Recommendations((Recommendation(1, "tea-1", "Green tea", -0.5),), "the restrictions leave only 1")
        >>> found[0].title
        'Green tea'
        >>> found
        Recommendations of 1 item (the restrictions leave only 1)
          1  tea-1  Green tea  -0.500
    """

    items: tuple[Recommendation, ...]
    reason: str | None = None

    @overload
    def __getitem__(self, index: int) -> Recommendation: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Recommendation, ...]: ...
    def __getitem__(self, index: int | slice) -> Recommendation | tuple[Recommendation, ...]:
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Recommendation]:
        return iter(self.items)

    def __repr__(self) -> str:
        count = f"Recommendations of {len(self)} item{'' if len(self) == 1 else 's'}"
        table = [(str(one.rank), one.item_id, one.title[:60], f"{one.score:.3f}") for one in self.items]
        widths = [max((len(row[column]) for row in table), default=0) for column in range(3)]
        lines = [
            f"  {rank:>{widths[0]}}  {item_id:<{widths[1]}}  {title:<{widths[2]}}  {score}"
            for rank, item_id, title, score in table
        ]
        return "\n".join([f"{count} ({self.reason})" if self.reason else count, *lines])


def frame(lists: Sequence[Recommendations], key: pl.Series) -> pl.DataFrame:
    """Lists as a table.

    Args:
        lists: One per value of ``key``.
        key: The first column: who each list is for.

    Returns:
        ``key``, ``rank``, ``item_id``, ``title``, ``score`` and ``reason``, a row per item; an empty list has one row,
        without an item, so that nobody is lost.
    """
    owners: list[int] = []
    rows = []
    for owner, found in enumerate(lists):
        made = [(one.rank, one.item_id, one.title, one.score, found.reason) for one in found]
        made = made or [(None, None, None, None, found.reason)]  # type: ignore[list-item]
        owners += [owner] * len(made)
        rows += made
    return pl.concat([key[owners].to_frame(), pl.DataFrame(rows, schema=SCHEMA, orient="row")], how="horizontal")
