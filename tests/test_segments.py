from __future__ import annotations

import numpy as np
import polars as pl
from hypothesis import given
from hypothesis import strategies as st

from genrec.segments import segments


@given(
    st.lists(st.tuples(st.integers(0, 130), st.integers(0, 5)), min_size=1, max_size=30),
    st.lists(st.integers(0, 700), min_size=6, max_size=6),
    st.booleans(),
)
def test_segments_part_the_cases(cases: list[tuple[int, int]], popularity: list[int], spoken: bool) -> None:
    items = pl.DataFrame({"item_id": list("abcdef")})
    if spoken:
        items = items.with_columns(language=pl.Series(["en", "de", "en", None, "fr", ""]))
    histories = [np.zeros(length, dtype=int) for length, _ in cases]
    targets = np.array([target for _, target in cases])
    found = segments(histories, targets, np.array(popularity), items)
    assert ("language" in found) is spoken
    for parts in found.values():
        np.testing.assert_array_equal(np.sum(list(parts.values()), axis=0), 1)
        assert all(mask.any() for mask in parts.values())


def test_names_say_what_is_in_them() -> None:
    histories = [np.zeros(length, dtype=int) for length in (0, 1, 4, 5, 99, 100, 2000)]
    targets = np.array([0, 1, 2, 3, 4, 5, 5])
    popularity = np.array([0, 1, 5, 499, 500, 0])
    language = ["fr", "de", "de", None, "", "de"]
    found = segments(histories, targets, popularity, pl.DataFrame({"language": language}))
    assert {name: np.flatnonzero(mask).tolist() for name, mask in found["history length"].items()} == {
        "0": [0], "1 to 4": [1, 2], "5 to 9": [3], "50 to 99": [4], "100 or more": [5, 6],
    }  # fmt: skip
    assert {name: np.flatnonzero(mask).tolist() for name, mask in found["popularity of the target"].items()} == {
        "0": [0, 5, 6], "1 to 4": [1], "5 to 9": [2], "100 to 499": [3], "500 or more": [4],
    }  # fmt: skip
    assert {name: mask.sum() for name, mask in found["target seen in training"].items()} == {"seen": 4, "cold": 3}
    assert {name: mask.sum() for name, mask in found["language"].items()} == {"de": 4, "not given": 2, "fr": 1}


def test_many_languages_share_one_segment() -> None:
    language = [f"l{item}" for item in range(20)]
    found = segments(
        [np.zeros(1, int)] * 21, np.array([19, *range(20)]), np.ones(20, int), pl.DataFrame({"language": language})
    )
    assert len(found["language"]) == 13
    assert next(iter(found["language"])) == "l19"  # The most frequent first.
    assert found["language"]["others"].sum() == 8


def test_lists_of_languages_and_odd_names() -> None:
    targets = np.arange(4)
    language = pl.Series([["en"], ["en", "de"], [], None], dtype=pl.List(pl.String))
    found = segments([np.zeros(1, int)] * 4, targets, np.ones(4, int), pl.DataFrame({"language": language}))
    assert {name: np.flatnonzero(mask).tolist() for name, mask in found["language"].items()} == {
        "not given": [2, 3], "en": [0], "en, de": [1],
    }  # fmt: skip
    names = ["others", "others", "not given", None, *(f"l{item}" for item in range(20))]
    found = segments([np.zeros(1, int)] * 24, np.arange(24), np.ones(24, int), pl.DataFrame({"language": names}))
    np.testing.assert_array_equal(np.sum(list(found["language"].values()), axis=0), 1)
    assert found["language"]["others"][:2].all()
    assert found["language"]["not given"].sum() == 2
