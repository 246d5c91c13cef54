from __future__ import annotations

import polars as pl

from genrec.recommendations import Recommendation, Recommendations, frame

LIST = Recommendations(
    tuple(
        Recommendation(rank, f"i{rank}", title, -rank / 3)
        for rank, title in enumerate(("Tea", "", "A pot for tea"), start=1)
    )
)


def test_a_list_is_a_sequence_that_shows_itself() -> None:
    found = LIST
    assert found[0] == next(iter(found)) == found[:1][0] == found[-3]
    assert found[0] in found
    assert [one.rank for one in found] == [1, 2, 3]
    lines = repr(found).splitlines()
    assert lines[0] == "Recommendations of 3 items"
    assert all(one.item_id in line and one.title in line for one, line in zip(found, lines[1:], strict=True))
    assert repr(Recommendations((), "nothing is left")) == "Recommendations of 0 items (nothing is left)"
    one = Recommendations((Recommendation(1, "a", "A", -1.0),))
    assert one != Recommendations(one.items, "short")
    assert hash(one) == hash(Recommendations(one.items))


def test_an_empty_list_has_a_row_of_its_own_in_a_frame() -> None:
    made = frame([LIST, Recommendations((), "nothing is left")], pl.Series("user_id", ["a", "b"]))
    assert made["user_id"].to_list() == ["a"] * 3 + ["b"]
    assert made.row(0) == ("a", 1, "i1", "Tea", -1 / 3, None)
    assert made.row(3) == ("b", None, None, None, None, "nothing is left")
    assert made.schema == frame([], pl.Series("user_id", [], dtype=pl.String)).schema
