"""Arguments as people give them: read as they are meant, or refused with what was found."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest

from genrec.asking import beams_for, counted, histories_of, listed, one_each, read_frame, whole
from genrec.errors import ConfigError, DataError
from genrec.prompts import Prompt

PLAIN = Prompt.parse("{% block item %}{{ item.identifier }}{% endblock %}", "plain")
AGED = Prompt.parse("{% block user %}{{ user.age }}{% endblock %}" + PLAIN.source, "aged")


@pytest.mark.parametrize(
    ("given", "histories", "one"),
    [
        ([], [], False), ([[]], [[]], False), (["a", "b"], [["a", "b"]], True),
        ([["a"], ["b", "c"]], [["a"], ["b", "c"]], False),
        ((("a",), pl.Series(["b"])), [["a"], ["b"]], False), (np.array(["a", "b"]), [["a", "b"]], True),
    ],
)  # fmt: skip
def test_one_history_and_many(given: Any, histories: list[list[str]], one: bool) -> None:
    assert histories_of(given) == (histories, one)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (5, "histories is 5"), ("a", "found the text 'a'"), ({"a"}, "keeps no order"), ([["a"], "b"], "such as 'b'"),
        (pl.DataFrame({"user_id": ["a"]}), "goes to recommend_frame"), ([{"a": 1}], "keeps no order"),
    ],
)  # fmt: skip
def test_what_is_no_history_is_refused(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        histories_of(given)


def test_rows_are_one_per_history() -> None:
    assert one_each(None, "users", 2) == [None, None]
    assert one_each({"age": 3}, "users", 1) == [{"age": 3}]
    assert one_each([{"age": 3}, None], "users", 2) == [{"age": 3}, None]
    for told, message in (
        ("tea", "contexts is 'tea'"),
        ([3], "contexts holds 3"),
        ([None], "2 histories and 1 row of contexts"),
    ):
        with pytest.raises(ConfigError, match=message):
            one_each(told, "contexts", 2)


def test_numbers() -> None:
    assert (whole(np.int64(3), "k"), beams_for(3, None), beams_for(40, None), beams_for(3, 4)) == (3, 50, 80, 4)
    for k, beams in (("3", None), (2.5, None), (True, None), (0, None), (3, 2), (3, 2.0)):
        with pytest.raises(ConfigError, match=r"^(k|num_beams) is "):
            beams_for(k, beams)  # type: ignore[arg-type]
    assert (counted(1, "row", "rows"), counted(2_000, "row", "rows")) == ("1 row", "2,000 rows")
    with pytest.raises(ConfigError, match=r"Write \['u'\]"):
        listed("u", "user_ids")


def test_a_frame_tells_histories_users_and_contexts() -> None:
    table = pl.DataFrame({"history": [["a"], None], "age": [3, None], "context": [{"hour": 7}, None]})
    ids, histories, users, contexts = read_frame(table, AGED)
    assert (ids.name, ids.to_list(), histories) == ("row", [0, 1], [["a"], []])
    assert (users, contexts) == ([{"age": 3}, {"age": None}], [{"hour": 7}, None])
    ids, histories, users, contexts = read_frame(pl.DataFrame({"user_id": [7]}), AGED)
    assert (ids.name, ids.to_list(), histories, users, contexts) == ("user_id", ["7"], None, None, None)
    for wrong, message in (
        ({"age": [3]}, "no column 'history' and no 'user_id'"),
        ({"history": ["a,b"]}, "takes lists of item ids"),
        ({"history": [["a"]]}, "`age`"),
        ({"history": [["a"]], "age": [3], "context": ["{}"]}, "takes structs"),
    ):
        with pytest.raises(DataError, match=message):
            read_frame(pl.DataFrame(wrong), AGED)
