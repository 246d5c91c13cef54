from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.batch import churn, output
from genrec.batch.churn import Churn, compare, problems
from genrec.config import Thresholds
from genrec.errors import StorageError

Row = tuple[str, float, str]
Lists = Mapping[str, Sequence[Row]]  # user -> (item, score, source), best first


def model(*items: str, best: float = 0.0) -> list[Row]:
    return [(item, best - place, "model") for place, item in enumerate(items)]


def write(folder: Path, lists: Lists, size: int = 100) -> Path:
    users = list(lists)
    with output.open_output(folder, {}, -(-len(users) // size)) as out:
        for shard, start in enumerate(range(0, len(users), size)):
            chosen = users[start : start + size]
            rows = [(user, rank, *row) for user in chosen for rank, row in enumerate(lists[user], 1)]
            schema = {
                "user_id": pl.String,
                "rank": pl.Int32,
                "item_id": pl.String,
                "score": pl.Float32,
                "source": pl.String,
            }
            index = pl.DataFrame(
                {"user_id": chosen, "reason": [None] * len(chosen)}, schema_overrides={"reason": pl.String}
            )
            frame = pl.DataFrame(rows, schema=schema, orient="row")
            out.commit(output.write_shard(folder, shard, frame, index, pl.DataFrame(), {}))
        out.finish()
    return folder


def naive(today: Lists, yesterday: Lists, cold: set[str] | None) -> Churn:
    """The definitions, one user after the other."""

    def mean(values: Sequence[float]) -> float | None:
        return float(np.mean(values)) if values else None

    def rows(lists: Lists) -> list[Row]:
        return [row for items in lists.values() for row in items]

    both = [user for user in today if user in yesterday]
    listed = [user for user in both if yesterday[user]]
    names = {
        day: {user: [row[0] for row in items] for user, items in lists.items()}
        for day, lists in (("t", today), ("y", yesterday))
    }
    scores = [[row[1] for row in rows(lists) if row[2] == "model"] for lists in (today, yesterday)]
    now, before = mean(scores[0]), mean(scores[1])
    given_before = {(user, row[0]): row[1] for user, items in yesterday.items() for row in items if row[2] == "model"}
    moved = [
        abs(row[1] - given_before[user, row[0]])
        for user, items in today.items()
        for row in items
        if row[2] == "model" and (user, row[0]) in given_before
    ]
    frozen = [None if cold is None else mean([row[0] in cold for row in rows(lists)]) for lists in (today, yesterday)]
    return Churn(
        len(both),
        len(today) - len(both),
        len(yesterday) - len(both),
        mean([len(set(names["y"][u]) - set(names["t"][u])) / len(names["y"][u]) for u in listed]),
        mean([names["t"][u][:1] == names["y"][u][:1] for u in listed]),
        len({row[0] for row in rows(today)}),
        len({row[0] for row in rows(yesterday)}),
        frozen[0],
        frozen[1],
        None if now is None or before is None else now - before,
        mean(moved),
    )


def equal(found: Churn, wanted: Churn) -> None:
    for name, value in vars(wanted).items():
        assert getattr(found, name) == (value if value is None else pytest.approx(value, abs=1e-6)), name


def test_two_days_by_hand(tmp_path: Path) -> None:
    today = {
        "ann": model("a", "b", "c", "d", best=-1.0),
        "bob": [("x", -2.0, "model"), ("y", 7.0, "fill-up")],
        "dora": model("a"),
    }
    yesterday = {
        "bob": [("y", -1.0, "model"), ("x", 9.0, "fill-up")],
        "cleo": model("a", "z"),
        "ann": model("a", "c", "e", "f"),
    }
    found = compare(write(tmp_path / "t", today), write(tmp_path / "y", yesterday, 1), cold=["z", "d", "d", "never"])
    assert (found.users_both, found.users_new, found.users_gone) == (2, 1, 1)
    assert found.churn == pytest.approx((0.5 + 0) / 2)  # Of ann's a c e f two are gone; bob's are the same two.
    assert found.same_first == pytest.approx(0.5)
    assert (found.coverage_today, found.coverage_yesterday) == (6, 7)
    assert (found.cold_today, found.cold_yesterday) == (pytest.approx(1 / 7), pytest.approx(1 / 8))
    today_mean = (-1 - 2 - 3 - 4 - 2 + 0) / 6
    yesterday_mean = (-1 + 0 - 1 + 0 - 1 - 2 - 3) / 7
    assert found.drift == pytest.approx(today_mean - yesterday_mean)
    assert found.pair_drift == pytest.approx((1 + 2) / 2)  # Ann's a and c; bob has no pair of the model on both days.
    equal(found, naive(today, yesterday, {"z", "d", "never"}))


def test_same_output(tmp_path: Path) -> None:
    out = write(tmp_path, {"a": model("x", "y"), "b": [], "c": model("z")})
    found = compare(out, out, cold=None)
    assert found == Churn(3, 0, 0, 0.0, 1.0, 3, 3, None, None, 0.0, 0.0)


def test_nothing_in_common(tmp_path: Path) -> None:
    one, other = write(tmp_path / "a", {"a": model("x")}), write(tmp_path / "b", {"b": []})
    assert compare(one, other, cold=[]) == Churn(0, 1, 1, None, None, 1, 0, 0.0, None, None, None)
    nobody = write(tmp_path / "c", {})
    assert compare(nobody, nobody, cold=[]) == Churn(0, 0, 0, None, None, 0, 0, None, None, None, None)


def test_user_without_a_list_today_counts_as_all_changed(tmp_path: Path) -> None:
    found = compare(write(tmp_path / "t", {"a": []}), write(tmp_path / "y", {"a": model("x", "y")}), cold=None)
    assert (found.users_both, found.churn, found.same_first) == (1, 1.0, 0.0)


ROWS = st.lists(
    st.tuples(st.sampled_from("abcdefgh"), st.floats(-9, 0, width=32), st.sampled_from(["model", "fill-up"])),
    max_size=5,
    unique_by=lambda row: row[0],
)
DAYS = st.dictionaries(st.sampled_from([f"u{number}" for number in range(12)]), ROWS, max_size=12)


@settings(max_examples=40)
@given(DAYS, DAYS, st.integers(1, 5), st.integers(1, 5), st.none() | st.sets(st.sampled_from("abcxy")))
def test_measures_are_those_of_their_definitions_whatever_the_shards_and_buckets(
    tmp_path_factory: pytest.TempPathFactory,
    today: dict[str, list[Row]],
    yesterday: dict[str, list[Row]],
    size: int,
    bucket: int,
    cold: set[str] | None,
) -> None:
    root = tmp_path_factory.mktemp("days")
    outputs = write(root / "t", today, size), write(root / "y", yesterday, 6 - size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(churn, "BUCKET", bucket)
        equal(compare(*outputs, cold=cold), naive(today, yesterday, cold))


def test_unfinished_and_changed_outputs_are_refused(tmp_path: Path) -> None:
    one, other = write(tmp_path / "a", {"a": model("x")}), write(tmp_path / "b", {"a": model("x")})
    (other / "part-00000.parquet").write_bytes(b"")
    with pytest.raises(StorageError, match=r"part-00000.parquet was changed"):
        compare(one, other, cold=None)
    (other / "_SUCCESS").unlink()
    with pytest.raises(StorageError, match="the job is not finished"):
        compare(one, other, cold=None)


def test_nothing_is_left_in_the_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    out = write(tmp_path / "out", {"a": model("x")})
    compare(out, out, cold=None)
    assert list(scratch.iterdir()) == []
    scratch.rmdir()
    with pytest.raises(StorageError, match=r"No such file or directory. The comparison sorts .* TMPDIR names another"):
        compare(out, out, cold=None)


KNOWN = Churn(9, 1, 1, 0.3, 0.5, 100, 90, 0.1, 0.1, -0.4, 0.5)
BLIND = Churn(0, 1, 1, None, None, 0, 0, None, None, None, None)


@pytest.mark.parametrize(
    ("found", "thresholds", "message"),
    [
        (KNOWN, Thresholds(max_churn=0.2), "churn is 0.3, above max_churn, which is 0.2."),
        (KNOWN, Thresholds(min_coverage=101), "coverage is 100, below min_coverage, which is 101."),
        (KNOWN, Thresholds(max_cold=0.05), "cold is 0.1, above max_cold, which is 0.05."),
        (KNOWN, Thresholds(max_drift=0.3), "drift is 0.4, above max_drift, which is 0.3."),
        (BLIND, Thresholds(max_churn=1.0), "churn cannot be told, and max_churn is 1.0: no user with a list"),
        (BLIND, Thresholds(min_coverage=1), "coverage is 0, below"),
        (
            BLIND,
            Thresholds(max_cold=1.0),
            "cold cannot be told, and max_cold is 1.0: which items are cold is not known",
        ),
        (BLIND, Thresholds(max_drift=9.0), "drift cannot be told, and max_drift is 9.0: on one of the days"),
    ],
)
def test_threshold_that_is_exceeded_or_cannot_be_told(found: Churn, thresholds: Thresholds, message: str) -> None:
    told = problems(found, thresholds)
    assert len(told) == 1
    assert told[0].startswith(message)


def test_thresholds_that_hold() -> None:
    assert problems(BLIND, Thresholds()) == []
    assert problems(KNOWN, Thresholds(max_churn=0.3, min_coverage=100, max_cold=0.1, max_drift=0.4)) == []
    tenths = Churn(9, 1, 1, 0.1 + 0.2, 0.5, 100, 90, 0.1, 0.1, -0.4, 0.5)
    assert problems(tenths, Thresholds(max_churn=0.3)) == []
    everything = problems(KNOWN, Thresholds(max_churn=0.0, min_coverage=200, max_cold=0.0, max_drift=0.0))
    assert [sentence.split(" ")[0] for sentence in everything] == ["churn", "coverage", "cold", "drift"]
