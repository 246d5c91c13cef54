from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.batch.users import ERRORS, Checked, Survey, Users, check, error_frame, fault
from genrec.errors import DataError

INDEX = {f"i{item}": item for item in range(9)}
TEXTS = pl.List(pl.String)


def frame_of(rows: list[dict[str, Any]]) -> pl.DataFrame:
    names = dict.fromkeys(name for row in rows for name in row)
    lists = {name: TEXTS for name in ("history", "allowed", "blocked") if name in names}
    return pl.DataFrame([{name: row.get(name) for name in names} for row in rows], schema_overrides=lists)


def checked(source: Any, *, max_events: int = 5) -> Checked:
    users = Users.open(source)
    survey = users.survey()
    return check(users.read(0, survey.rows), 0, survey, INDEX, max_events=max_events)


def surveyed(users: Users, before: int) -> Survey:
    """As if so many rows stood before."""
    found = users.survey()
    repeated = np.concatenate([np.zeros(before, dtype=bool), found.repeated])
    hashes = np.concatenate([np.zeros(before, dtype="V16"), found.hashes])
    return Survey(before + found.rows, found.digest, repeated, hashes)


def jsonl(folder: Path, *lines: str) -> Path:
    (folder / "users.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "users.jsonl"


# Survey


@given(ids=st.lists(st.sampled_from(["a", "b", "c", "d", "", None]), min_size=1, max_size=12))
@settings(max_examples=60)
def test_survey_tells_which_ids_stand_in_an_earlier_row(ids: list[str | None]) -> None:
    frame = pl.DataFrame({"user_id": ids, "history": [[]] * len(ids)}, schema={"user_id": pl.String, "history": TEXTS})
    survey = Users.open(frame).survey()
    assert survey.rows == len(ids)
    assert survey.repeated.tolist() == [bool(one) and one in ids[:number] for number, one in enumerate(ids)]


def test_survey_of_more_rows_than_are_held_at_once() -> None:
    numbers = np.arange(10_000) % 9_000
    frame = pl.DataFrame({"user_id": [f"u{n}" for n in numbers], "history": [["i1"]] * 10_000})
    survey = Users.open(frame).survey()
    assert survey.rows == 10_000
    assert survey.repeated.tolist() == [False] * 9_000 + [True] * 1_000
    assert survey.digest != Users.open(frame.head(9_999)).survey().digest


def test_digest_is_of_the_rows_in_their_order() -> None:
    rows = [{"user_id": "a", "history": ["i1"], "age": 3}, {"user_id": "b", "history": [], "age": None}]
    digest = Users.open(frame_of(rows)).survey().digest
    same = [
        frame_of(rows).select("age", "history", "user_id"),
        frame_of(rows).with_columns(pl.col("age").cast(pl.Int8)),
        frame_of([rows[0], {**rows[1], "history": None}]),
    ]
    others = [
        frame_of(rows[::-1]),
        frame_of(rows).rename({"age": "years"}),
        frame_of(rows).with_columns(age=pl.lit(3)),
        frame_of([{**rows[0], "history": ["i1", "i1"]}, rows[1]]),
        frame_of([{**rows[0], "user_id": "A"}, rows[1]]),
    ]
    assert [Users.open(one).survey().digest for one in same] == [digest] * 3
    assert len({digest, *(Users.open(one).survey().digest for one in others)}) == 6


def test_row_hash_is_that_of_canonical_json(tmp_path: Path) -> None:
    """It is compared with that of other days, whatever versions of what reads files were installed then."""
    text = '{"age":31,"history":["i1","i2"],"note":"né","share":0.5,"user_id":"7"}'
    expected = hashlib.blake2b(text.encode(), digest_size=16).digest()
    row = {"user_id": 7, "history": ["i1", "i2"], "note": "né", "age": 31, "share": 0.5}
    assert checked(frame_of([row])).frame["row_hash"].to_list() == [expected]
    assert checked(jsonl(tmp_path, json.dumps(row))).frame["row_hash"].to_list() == [expected]
    survey = Users.open(frame_of([row, {**row, "user_id": 7}])).survey()
    assert survey.digest == hashlib.sha256(expected * 2).hexdigest()


def test_an_input_without_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "users.csv").write_text("user_id,history\n")
    for source in (tmp_path / "users.csv", pl.DataFrame(schema={"user_id": pl.String, "history": TEXTS})):
        with pytest.raises(DataError, match=r"there is no user in it"):
            Users.open(source).survey()


# Good rows


def test_good_rows_as_they_go_on() -> None:
    rows = [
        {"user_id": "a", "history": ["i3", "i1", "i3"], "age": 3, "allowed": ["i1", "nix"], "where": "x > 1",
         "blocked": None},
        {"user_id": "b", "history": None, "age": None, "allowed": None, "where": None, "blocked": []},
    ]  # fmt: skip
    users = Users.open(frame_of(rows))
    found = check(users.read(0, 2), 40, surveyed(users, 40), INDEX, max_events=3)
    assert [one.tolist() for one in found.histories] == [[3, 1, 3], []]
    assert all(one.dtype == np.int32 for one in found.histories)
    assert found.errors.is_empty()
    assert found.frame.drop("row_hash").to_dicts() == [
        {"row": 40, "user_id": "a", "history": ["i3", "i1", "i3"], "allowed": ["i1", "nix"], "blocked": None,
         "where": "x > 1", "age": 3},
        {"row": 41, "user_id": "b", "history": [], "allowed": None, "blocked": [], "where": None, "age": None},
    ]  # fmt: skip
    kinds = {"row": pl.Int64, "user_id": pl.String, "history": TEXTS, "row_hash": pl.Binary, "allowed": TEXTS,
             "blocked": TEXTS, "where": pl.String, "age": pl.Int64}  # fmt: skip
    assert dict(found.frame.schema) == kinds
    assert found.errors.schema == pl.Schema(ERRORS)


def test_ids_that_are_numbers_become_text(tmp_path: Path) -> None:
    index = {"1": 0, "2": 1, "2.5": 2}
    for source in (
        pl.DataFrame({"user_id": [7], "history": [[1, 2]]}),
        pl.DataFrame({"user_id": [7], "history": [[1, 2]]}, schema_overrides={"history": pl.Array(pl.Int8, 2)}),
        jsonl(tmp_path, '{"user_id": 7, "history": [1, "2"]}'),
    ):
        users = Users.open(source)
        found = check(users.read(0, 1), 0, users.survey(), index, max_events=3)
        assert found.frame["user_id"].to_list() == ["7"]
        assert found.frame["history"].to_list() == [["1", "2"]]
        assert found.histories[0].tolist() == [0, 1]


@pytest.mark.parametrize("nothing", ["", " ", "[]", None])
def test_no_history_is_an_empty_one(nothing: str | None) -> None:
    found = checked(pl.DataFrame({"user_id": ["a", "b"], "history": [nothing, '["i1"]']}))
    assert found.frame["history"].to_list() == [[], ["i1"]]
    assert found.errors.is_empty()
    found = checked(pl.DataFrame({"user_id": ["a"], "history": [None]}))
    assert found.frame["history"].to_list() == [[]]
    assert found.frame.schema["history"] == TEXTS


def test_no_predicate_is_none(tmp_path: Path) -> None:
    told = [None, "", "  ", "in_stock"]
    frame = pl.DataFrame({"user_id": list("abcd"), "history": ["[]"] * 4, "where": told})
    frame.write_csv(tmp_path / "users.csv")
    for source in (frame, tmp_path / "users.csv"):
        assert checked(source).frame["where"].to_list() == [None, None, None, "in_stock"]
    assert checked(frame.with_columns(where=None)).frame["where"].to_list() == [None] * 4


def test_no_rows_at_all_keep_their_types() -> None:
    users = Users.open(pl.DataFrame({"user_id": ["a"], "history": [["nix"]], "allowed": ["[1]"], "where": ["x"]}))
    found = check(users.read(0, 1), 0, users.survey(), INDEX, max_events=3)
    assert len(found.frame) == len(found.histories) == 0
    assert found.frame.schema == pl.Schema(
        {"row": pl.Int64, "user_id": pl.String, "history": TEXTS, "row_hash": pl.Binary, "allowed": TEXTS,
         "where": pl.String}
    )  # fmt: skip


# Bad rows


@pytest.mark.parametrize(
    ("row", "column", "value", "reason"),
    [
        ({"user_id": "", "history": []}, "user_id", "", "is empty, or neither a text nor a number"),
        ({"user_id": None, "history": []}, "user_id", "", "is empty, or neither a text nor a number"),
        ({"user_id": "a", "history": ["i1", None]}, "history", '["i1", null]', "holds a null among the item ids"),
        ({"user_id": "a", "history": ["i1", "I7"]}, "history", "I7", "item 'I7' is not in the catalogue"),
        ({"user_id": "a", "history": [""]}, "history", "", "item '' is not in the catalogue"),
        ({"user_id": "a", "history": ["i1"] * 6}, "history", json.dumps(["i1"] * 6),
         "has 6 events, above max_events, which is 5"),
        ({"user_id": "a", "history": [], "allowed": [None]}, "allowed", "[null]", "holds a null among the item ids"),
        ({"user_id": "a", "history": [], "blocked": ["i1", None]}, "blocked", '["i1", null]',
         "holds a null among the item ids"),
    ],
)  # fmt: skip
def test_a_bad_row_says_what_is_wrong(row: dict[str, Any], column: str, value: str, reason: str) -> None:
    found = checked(frame_of([{"user_id": "x", "history": ["i1"]}, row, {"user_id": "z", "history": ["i2"]}]))
    assert found.frame["user_id"].to_list() == ["x", "z"]
    assert found.frame["row"].to_list() == [0, 2]
    assert [one.tolist() for one in found.histories] == [[1], [2]]
    user = row["user_id"] or None
    assert found.errors.to_dicts() == [{"row": 1, "user_id": user, "column": column, "value": value, "reason": reason}]


@pytest.mark.parametrize(
    "text", ["i1,i2", "{}", '"i1"', "7", "[true]", '[["i1"]]', '[{"a": 1}]', "[", '["\\ud800"]', "[" * 9999]
)
@pytest.mark.parametrize("column", ["history", "allowed", "blocked"])
def test_a_text_that_is_no_list_of_ids_makes_a_bad_row(text: str, column: str) -> None:
    frame = pl.DataFrame({"user_id": ["x", "y"], "history": ["[]", "[]"]}).with_columns(pl.Series(column, ["[]", text]))
    found = checked(frame)
    assert found.frame["user_id"].to_list() == ["x"]
    assert found.errors.select("row", "user_id", "column", "value").row(0) == (1, "y", column, text[:200])
    assert found.errors["reason"][0] == 'is no JSON list of item ids, such as ["id1", "id2"]'


def test_values_of_the_wrong_type_in_json_lines_make_bad_rows(tmp_path: Path) -> None:
    lines = [
        '{"user_id": "a", "history": []}', '{"user_id": "b", "history": {"i1": 1}}', '{"user_id": "c", "history": 7}',
        '{"user_id": "d", "history": [], "allowed": true}', "[]", '{"user_id": "f"}',
        '{"user_id": [1], "history": []}',
    ]  # fmt: skip
    found = checked(jsonl(tmp_path, *lines))
    assert found.frame["user_id"].to_list() == ["a", "f"]
    assert found.errors.select("row", "user_id", "column", "value").rows() == [
        (1, "b", "history", '{"i1": 1}'), (2, "c", "history", "7"), (3, "d", "allowed", "true"), (4, None, "row", "[]"),
        (6, None, "user_id", ""),
    ]  # fmt: skip


def test_the_first_row_of_a_user_stays_even_if_it_is_bad() -> None:
    rows = [
        {"user_id": "a", "history": ["i1"]}, {"user_id": "b", "history": ["nix"]}, {"user_id": "a", "history": ["i2"]},
        {"user_id": "b", "history": ["i3"]}, {"user_id": "a", "history": ["nix"]},
    ]  # fmt: skip
    found = checked(frame_of(rows))
    assert found.frame.select("row", "user_id").rows() == [(0, "a")]
    assert found.errors.select("row", "user_id", "column", "reason").rows() == [
        (1, "b", "history", "item 'nix' is not in the catalogue"),
        *((row, user, "user_id", "stands in an earlier row too") for row, user in ((2, "a"), (3, "b"), (4, "a"))),
    ]


def test_unknown_items_may_stand_in_allowed_and_blocked() -> None:
    found = checked(frame_of([{"user_id": "a", "history": [], "allowed": ["nix"], "blocked": ["nix", "i1"]}]))
    assert found.errors.is_empty()


GOOD = st.fixed_dictionaries({"history": st.lists(st.sampled_from(list(INDEX)), max_size=5), "age": st.integers(0, 99)})
BAD = st.sampled_from(
    [{"history": ["nix"]}, {"history": ["i1"] * 6}, {"history": [None]}, {"user_id": None, "history": []}]
)


@given(rows=st.lists(st.tuples(st.booleans(), GOOD, BAD), min_size=1, max_size=12), start=st.integers(0, 1000))
@settings(max_examples=60)
def test_good_rows_are_those_of_a_clean_input(rows: list[tuple[bool, Any, Any]], start: int) -> None:
    mixed = [{"user_id": f"u{n}", **(bad if is_bad else good)} for n, (is_bad, good, bad) in enumerate(rows)]
    clean = [row for row, (is_bad, _, _) in zip(mixed, rows, strict=True) if not is_bad]
    schema = {"user_id": pl.String, "history": TEXTS, "age": pl.Int64}
    both = []
    for some in (mixed, clean):
        users = Users.open(pl.DataFrame(some, schema=schema)) if some else None
        raw = pl.DataFrame(some, schema=schema) if users is None else users.read(0, len(some))
        survey = surveyed(users, start) if users else Survey(0, "", np.zeros(0, dtype=bool), np.zeros(0, dtype="V16"))
        both.append(check(raw, start, survey, INDEX, max_events=5))
    assert both[0].frame.drop("row").equals(both[1].frame.drop("row"))
    assert [one.tolist() for one in both[0].histories] == [one.tolist() for one in both[1].histories]
    assert sorted([*both[0].frame["row"], *both[0].errors["row"]]) == list(range(start, start + len(rows)))
    assert both[0].errors["row"].to_list() == [start + n for n, (is_bad, _, _) in enumerate(rows) if is_bad]


def test_long_values_are_cut_and_what_no_file_can_hold_is_replaced() -> None:
    one = fault(3, None, "where", "é" * 500 + "x", "because \ud800")
    assert (len(one["value"]), one["reason"]) == (200, "because ?")
    frame = error_frame([one, fault(1, "a", "history", None, "y")])
    assert frame.schema == pl.Schema(ERRORS)
    assert frame["row"].to_list() == [1, 3]
    assert error_frame([]).schema == pl.Schema(ERRORS)


# Types as in training


def test_a_value_that_is_none_of_its_type_is_told_with_its_column(tmp_path: Path) -> None:
    lines = ['{"user_id": "a", "history": ["i1"], "age": 3}', '{"user_id": "b", "history": [], "age": [3]}']
    users = Users.open(jsonl(tmp_path, *lines), types={"age": pl.Int64()})
    found = check(users.read(0, 2), 0, users.survey(), INDEX, max_events=5)
    assert found.frame.select("user_id", "age").rows() == [("a", 3)]
    assert "__column" not in found.frame.columns
    assert found.errors.rows() == [(1, "b", "age", "[3]", "is no Int64, as in training")]


def test_an_id_that_is_no_number_is_no_id() -> None:
    found = checked(pl.DataFrame({"user_id": [1.0, float("nan"), None, float("nan")], "history": [[]] * 4}))
    assert found.frame["user_id"].to_list() == ["1"]  # As when a log is imported.
    assert found.errors.select("row", "user_id", "reason").rows() == [
        (row, None, "is empty, or neither a text nor a number") for row in (1, 2, 3)
    ]


def test_pieces_of_an_input_are_put_together() -> None:
    users = Users.open(
        frame_of([{"user_id": name, "history": [item]} for name, item in zip("abc", ("i1", "nix", "i2"), strict=True)])
    )
    survey = users.survey()
    pieces = [check(users.read(row, row + 1), row, survey, INDEX, max_events=5) for row in range(3)]
    whole, parts = checked(users.read(0, 3)), Checked.concat(pieces)
    assert parts.frame.equals(whole.frame)
    assert parts.errors.equals(whole.errors)
    assert [one.tolist() for one in parts.histories] == [[1], [2]]


# Context


def test_a_context_is_the_same_in_every_format(tmp_path: Path) -> None:
    contexts = [{"query": "tea", "hour": 18}, {"query": None, "hour": 7}, None, {"query": None, "hour": None}]
    users = pl.DataFrame({"user_id": ["a", "b", "c", "d"], "history": [["i1"]] * 4, "context": contexts})
    texts = ['{"hour": 18, "query": "tea"}', '{"hour": 7}', "", "{}"]
    users.write_parquet(tmp_path / "users.parquet")
    text = users.with_columns(history=pl.lit('["i1"]'), context=pl.Series(texts))
    text.write_csv(tmp_path / "users.csv")
    lines = [
        json.dumps({"user_id": user, "history": ["i1"], "context": json.loads(told or "null")})
        for user, told in zip(users["user_id"], texts, strict=True)
    ]
    found = [checked(source) for source in (users, tmp_path / "users.parquet", tmp_path / "users.csv")]
    found.append(checked(jsonl(tmp_path, *lines)))
    for one in found:
        assert one.frame["context"].to_list() == ['{"hour":18,"query":"tea"}', '{"hour":7}', None, None]
        assert one.frame["row_hash"].to_list() == found[0].frame["row_hash"].to_list()
        assert not len(one.errors)
    other = checked(users.with_columns(context=pl.lit('{"hour": 8}')))
    assert other.frame["row_hash"].to_list() != found[0].frame["row_hash"].to_list()
    without = checked(users.drop("context")).frame
    assert without["row_hash"].to_list()[2:] == found[0].frame["row_hash"].to_list()[2:]
    assert "context" not in without.columns


@pytest.mark.parametrize("wrong", ["tea", "[1]", '{"query": {"text": "tea"}}', '{"query": "\\ud800"}', "{"])
def test_a_context_that_is_no_object_of_plain_values_makes_a_bad_row(wrong: str) -> None:
    users = pl.DataFrame({"user_id": ["a", "b"], "history": [["i1"]] * 2, "context": [wrong, '{"tags": ["x", 3]}']})
    found = checked(users)
    assert found.frame["context"].to_list() == ['{"tags":["x",3]}']
    assert found.errors.rows() == [
        (0, "a", "context", wrong, 'is no JSON object of plain values, such as {"query": "tea"}')
    ]


def test_a_column_context_of_numbers_is_refused() -> None:
    with pytest.raises(DataError, match="column context is Int64; it takes structs, or JSON objects as texts"):
        checked(pl.DataFrame({"user_id": ["a"], "history": [["i1"]], "context": [3]}))
