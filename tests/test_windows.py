"""Windows by themselves; that rows are cut as they say is held in test_curriculum.py and test_tokenization.py."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.windows import later_windows, windows


@settings(max_examples=300)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=60),
    room=st.integers(0, 40),
    first=st.integers(0, 60),
)
def test_every_event_is_a_target_once_and_every_window_fits(lengths: list[int], room: int, first: int) -> None:
    budget = max(lengths) + room
    found = windows(np.array(lengths), budget, first)
    predicted = [event for start, stop, skip in found for event in range(start + skip, stop)]
    assert predicted == list(range(len(lengths)))
    assert [skip for _, _, skip in found] == [0] + [1] * (len(found) - 1)
    assert all(sum(lengths[start : stop - 1]) <= budget for start, stop, _ in found)
    if first and len(found) > 1:
        assert found[0][1] <= max(first, 1)
    # No window could be longer: the next event would not fit, but for the first, which is cut on purpose.
    for number, (start, stop, _) in enumerate(found[:-1]):
        assert sum(lengths[start:stop]) > budget or (number == 0 and stop == first)


@settings(max_examples=100)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=30), budget=st.integers(0, 60))
def test_windows_end_even_where_nothing_fits(lengths: list[int], budget: int) -> None:
    found = windows(np.array(lengths), budget, 0)
    assert [event for start, stop, skip in found for event in range(start + skip, stop)] == [*range(len(lengths))]


def test_a_history_that_fits_is_one_window() -> None:
    assert windows(np.array([2, 2, 9]), 4, 0) == [(0, 3, 0)]
    assert windows(np.array([2, 2, 9]), 3, 0) == [(0, 2, 0), (1, 3, 1)]
    assert windows(np.array([1] * 6), 3, 2) == [(0, 2, 0), (1, 5, 1), (4, 6, 1)]
    assert windows(np.array([5]), 5, 1) == [(0, 1, 0)]


@settings(max_examples=100)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=40), budget=st.integers(9, 40), data=st.data())
def test_later_windows_have_each_of_some_events_as_a_target_once(
    lengths: list[int], budget: int, data: st.DataObject
) -> None:
    begin = data.draw(st.integers(0, len(lengths)))
    end = data.draw(st.integers(begin, len(lengths)))
    found = later_windows(np.array(lengths), budget, begin, end)
    assert [event for start, stop, skip in found for event in range(start + skip, stop)] == [*range(begin, end)]
    assert all(sum(lengths[start : stop - 1]) <= budget for start, stop, _ in found)
