from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import genrec
from genrec.errors import ConfigError, DataError
from genrec.foreign_lists import UNKNOWN, ForeignLists, read_lists


@pytest.fixture(scope="module")
def data() -> genrec.Dataset:
    """Users 1, 2, 3 and 10, items a to e; ids that look like numbers must stay text."""
    log = pl.DataFrame(
        [(user, item, time) for user in ("1", "2", "3", "10") for time, item in enumerate("abc")],
        schema=["user_id", "item_id", "timestamp"], orient="row",
    )  # fmt: skip
    return genrec.Dataset.from_frames(log, pl.DataFrame({"item_id": list("abcde")}))


def lists_of(path: Path, text: str, data: genrec.Dataset, k: int = 3) -> ForeignLists:
    """Of the users 1, 2 and 10, whose histories are a, b."""
    path.write_text(text)
    users = np.array([0, 1, 3])
    return read_lists(path, data, users, [np.array([0, 1])] * 3, k)


def test_lists_are_taken_as_they_are(data: genrec.Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "today.csv"
    rows = [
        "user_id,rank,item_id,score",
        "10,2,c,.5", "10,1,e,.9",  # In any order.
        "1,1,x,1", "1,2,a,.5", "1,4,d,.1",  # An unknown item, one of the history, one beyond k.
        "3,1,a,1",  # Known, but without a case.
        "77,1,a,1", "77,2,b,1",  # Unknown.
    ]  # fmt: skip
    found = lists_of(path, "\n".join(rows) + "\n", data)
    assert found.lists.tolist() == [[UNKNOWN, 0, -1], [-1, -1, -1], [4, 2, -1]]
    assert found.lists.dtype == np.int32
    assert found.told == {
        "file": str(path),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "rows": 8,
        "users_without_list": 1,
        "users_without_case": 1,
        "unknown_users": 1,
        "unknown_items": 1,
        "rows_beyond_k": 1,
        "places": 4,
        "places_in_history": 1,
        "problems": [
            f"{path}: row 7, column user_id: '77' is not in the data set.",
            f"{path}: row 8, column user_id: '77' is not in the data set.",
            f"{path}: row 3, column item_id: 'x' is not in the catalogue.",
        ],
    }
    told = capsys.readouterr().err
    assert "1 test users have no list and count as missed" in told
    assert "row 3, column item_id: 'x' is not in the catalogue" in told


def test_parquet_with_numbers_as_ids(data: genrec.Dataset, tmp_path: Path) -> None:
    frame = pl.DataFrame({"user_id": [1, 10], "rank": [1.0, 1.0], "item_id": ["c", "d"]})
    frame.write_parquet(tmp_path / "today.parquet")
    found = read_lists(tmp_path / "today.parquet", data, np.array([0, 3]), [np.array([0])] * 2, 2, shown="mine")
    assert found.lists.tolist() == [[2, -1], [3, -1]]
    assert found.told["file"] == "mine"
    assert found.told["problems"] == []


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["user_id,place,item_id", "1,1,a"], r"the column 'rank' is missing\. .* user_id, rank and item_id"),
        (["user_id,rank,item_id", "1,1,a", "1,0,b"], r"row 2, column rank: 0 is no whole number from 1 on"),
        (["user_id,rank,item_id", "1,1,a", "1,first,b"], r"row 2, column rank: 'first' is no whole number"),
        (["user_id,rank,item_id", "1,1.5,a"], r"row 1, column rank: 1\.5 is no whole number"),
        (["user_id,rank,item_id", "1,1,a", "2,1,b", "1,1,c", "2,1,d"],
         r"row 3, column rank: 1 is there already for this user.*\(1 more rows like this"),
        (["user_id,rank,item_id", "1,1,a", "2,3,b", "2,2,c"], r"row 3, column rank: 2 is this user's first place"),
        (["user_id,rank,item_id", "1,1,a", ",1,b"], r"row 2, column user_id: .* is empty"),
        (["user_id,rank,item_id", "1,1,"], r"row 1, column item_id: .* is empty"),
        (["user_id,rank,item_id", "u1,1,a"], r"none of its 1 users has a test case \(the first is 'u1'; .* is of '1'"),
    ],
)  # fmt: skip
def test_bad_lists_are_refused(rows: list[str], message: str, data: genrec.Dataset, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message) as found:
        lists_of(tmp_path / "bad.csv", "\n".join(rows) + "\n", data)
    assert str(found.value).startswith(str(tmp_path / "bad.csv"))


def test_ids_that_became_floats_and_gaps_between_ranks(data: genrec.Dataset, tmp_path: Path) -> None:
    """As pandas writes a column of numbers that has passed through a join."""
    frame = pl.DataFrame({"user_id": [1.0, 1.0], "rank": [1, 3], "item_id": ["c", "d"]})
    frame.write_parquet(tmp_path / "today.parquet")
    found = read_lists(tmp_path / "today.parquet", data, np.array([0]), [np.array([0])], 4)
    assert found.lists.tolist() == [[2, -1, 3, -1]]


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        ({"user_id": ["1"], "rank": [1], "item_id": [["a", "b"]]},
         r"the column 'item_id' holds List\(String\), where one value is expected\. Write a row per place"),
        ({"user_id": ["1"], "rank": [1e300], "item_id": ["a"]}, r"row 1, column rank: 1e\+300 is no whole number"),
        ({"user_id": ["1"], "rank": [1], "item_id": [" "]}, r"row 1, column item_id: ' ' is empty"),
    ],
)  # fmt: skip
def test_bad_parquet_is_refused(
    frame: dict[str, list[Any]], message: str, data: genrec.Dataset, tmp_path: Path
) -> None:
    pl.DataFrame(frame).write_parquet(tmp_path / "bad.parquet")
    with pytest.raises(DataError, match=message):
        read_lists(tmp_path / "bad.parquet", data, np.array([0]), [np.array([0])], 4)


def test_a_missing_file_is_named(data: genrec.Dataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.csv"):
        read_lists(tmp_path / "none.csv", data, np.array([0]), [np.array([0])], 3)
