"""Segments: parts of the test cases in which recommenders are compared apart, by history, target and language.

A segment is a bool array [cases]; the segments of one title are disjoint, and together they are all cases.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

Bools = NDArray[np.bool_]

# Where the ranges begin. They are the same for every data set, so that two reports can be read side by side.
_LENGTHS = (0, 1, 5, 10, 20, 50, 100)
_POPULARITY = (0, 1, 5, 10, 20, 50, 100, 500)
_LANGUAGES = 12  # Languages with a segment of their own; the rest share one.


def segments(
    histories: Sequence[NDArray[np.integer]],
    targets: NDArray[np.integer],
    popularity: NDArray[np.integer],
    items: pl.DataFrame,
) -> dict[str, dict[str, Bools]]:
    """The segments of the test cases that have a case in them.

    Args:
        histories: What the recommenders are given of each case.
        targets: int [cases], the item that came next.
        popularity: int [n_items], how many training users have each item.
        items: The catalogue; a column ``language`` makes segments by the target's language.

    Returns:
        Title -> name of a segment -> bool [cases].
    """
    counts = popularity[targets]
    found = {
        "history length": _ranges(np.array([len(history) for history in histories], dtype=np.int64), _LENGTHS),
        "popularity of the target": _ranges(counts, _POPULARITY),
        "target seen in training": _some({"seen": counts > 0, "cold": counts == 0}),
    }
    if "language" in items.columns:
        language = items["language"]
        if isinstance(language.dtype, pl.List):
            language = language.list.eval(pl.element().cast(pl.String)).list.join(", ", ignore_nulls=True)
        language = language.cast(pl.String).fill_null("")
        spoken = language.set(language == "", "not given").to_numpy()[targets]
        names, sizes = np.unique(spoken, return_counts=True)
        own = names[np.argsort(-sizes, kind="stable")][:_LANGUAGES]
        parts = {str(name): spoken == name for name in own}
        rest = ~np.isin(spoken, own)
        parts["others"] = parts.get("others", rest) | rest
        found["language"] = _some(parts)
    return found


def _ranges(values: NDArray[np.integer], begins: Sequence[int]) -> dict[str, Bools]:
    """The values from each of ``begins`` to below the next, by a name such as ``5 to 9``."""
    parts = {}
    for low, after in zip(begins, [*begins[1:], None], strict=True):
        if after is None:
            parts[f"{low:,} or more"] = values >= low
        else:
            name = f"{low:,}" if after == low + 1 else f"{low:,} to {after - 1:,}"
            parts[name] = (values >= low) & (values < after)
    return _some(parts)


def _some(parts: dict[str, Bools]) -> dict[str, Bools]:
    return {name: mask for name, mask in parts.items() if mask.any()}
