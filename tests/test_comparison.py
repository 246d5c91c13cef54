from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from genrec import comparison, metrics, significance
from genrec.errors import ConfigError
from genrec.report import Report
from genrec.report.numbers import preferred

RNG = np.random.default_rng(0)
RANKS = {name: RNG.integers(0, 12, 30) for name in ("popularity", "old", "new", "newer")}
PROTOCOL = {"data": "data/x", "data_hash": "abc", "split": "leave_one_out", "ties": "file", "cases": 30, "versions": {}}


def report(name: str, kinds: dict[str, str], k: int = 10, **protocol: Any) -> Report:
    users = [f"u{case}" for case in range(30)]
    rows = {label: {f"{m}@{k}": {"mean": 0.1, "low": 0.0, "high": 0.2} for m in ("recall", "ndcg")} for label in kinds}
    cases = [
        pl.DataFrame({"user_id": users, "target": ["i1"] * 30, "recommender": [label] * 30, "rank": RANKS[label]})
        for label in kinds
    ]
    return Report(name, {}, {**PROTOCOL, **protocol}, kinds, rows, cases=pl.concat(cases))


A = report("first", {"popularity": "baseline", "old": "adapter"})
B = report("second", {"popularity": "baseline", "new": "adapter", "newer": "adapter"}, versions={"torch": "3"})


def test_adapters_are_crossed_and_shared_rows_compared() -> None:
    found = comparison.compare(A, B)
    pairs = [("old", "new"), ("old", "newer")]  # Popularity is the same on both sides.
    assert [(test["metric"], test["a"], test["b"]) for test in found.tests] == [
        (metric, *pair) for metric in ("recall@10", "ndcg@10") for pair in pairs
    ]
    for name in ("recall", "ndcg"):
        tests = [test for test in found.tests if test["metric"] == f"{name}@10"]
        value = metrics.METRICS[name]
        for test in tests:
            expected = significance.paired(value(RANKS[test["a"]], 10), value(RANKS[test["b"]], 10))
            assert expected == {key: test[key] for key in expected}
        assert [test["p_holm"] for test in tests] == significance.holm([test["p"] for test in tests]).tolist()


def test_a_report_beside_itself_tests_its_adapters_once() -> None:
    found = comparison.compare(B, B)
    assert [(test["a"], test["b"]) for test in found.tests] == [("new", "newer")] * 2
    assert found.tests[0]["p_holm"] == found.tests[0]["p"]
    with pytest.raises(
        ConfigError, match=r"found the same under the same names \(old, popularity\), so nothing is left"
    ):
        comparison.compare(A, A)


def test_lists_are_tested_as_adapters_are() -> None:
    today = report("today", {"popularity": "baseline", "old": "against"})
    found = comparison.compare(today, B)
    assert [(test["a"], test["b"]) for test in found.tests[:2]] == [("old", "new"), ("old", "newer")]
    assert "A: old" in found.markdown().split("\n\n")[1]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"data_hash": "xyz"}, 'data_hash is "abc" in one and "xyz" in the other'),
        ({"split": "temporal"}, 'split is "leave_one_out" in one and "temporal"'),
        ({"ties": "shuffled"}, 'ties is "file" in one and "shuffled"'),
        ({"exclude_seen": False}, "exclude_seen is null in one and false"),
    ],
)
def test_reports_of_different_protocols_are_refused(other: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        comparison.compare(A, report("other", {"new": "adapter"}, **other))


def test_reports_of_other_cases_are_refused() -> None:
    other = dataclasses.replace(B, cases=B.cases.with_columns(target=pl.lit("i2")))
    with pytest.raises(ConfigError, match=r"case 1 is \('u0', 'i1'\) in one and \('u0', 'i2'\) in the other"):
        comparison.compare(A, other)
    fewer = dataclasses.replace(B, cases=B.cases.filter(pl.col("user_id") != "u4"))
    with pytest.raises(ConfigError, match="30 cases in one and 29 in the other"):
        comparison.compare(A, fewer)


def test_reports_without_a_common_k_or_row_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"k is \[10\] in one and \[5\] in the other"):
        comparison.compare(A, report("other", {"new": "adapter"}, k=5))
    with pytest.raises(ConfigError, match="share no recommender"):
        comparison.compare(A, report("other", {"new": "baseline"}))


def test_a_report_is_found_by_its_file_its_spec_and_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = tmp_path / "eval" / "results" / "first.json"
    A.save(saved.parent)
    monkeypatch.chdir(tmp_path)
    for name in (saved, "eval/results/first.json", "eval/first.toml", "first"):
        assert comparison.saved_report(name).resolve() == saved
    with pytest.raises(ConfigError, match=r"there is no report eval/results/none\.json"):
        comparison.saved_report("none")
    with pytest.raises(ConfigError, match=r"there is no report eval/results/none\.json"):
        comparison.saved_report("eval/none.toml")


def test_a_comparison_is_saved(tmp_path: Path) -> None:
    written = comparison.save(comparison.compare(A, B), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first-against-second.html", "first-against-second.md"]
    assert "A: old" in written.read_text()


def test_preferred_cut_off() -> None:
    assert preferred((1, 5, 10, 50)) == 10
    assert preferred((1, 5, 20)) == 20


def test_reports_are_tested_at_a_cut_off_of_both_whichever_comes_first() -> None:
    short = report("short", {"new": "adapter"}, k=5)
    both = report("both", {"old": "adapter"})
    wide = dataclasses.replace(both, rows={"old": {**both.rows["old"], **short.rows["new"]}})
    for pair in ((short, wide), (wide, short)):
        assert {test["metric"] for test in comparison.compare(*pair).tests} == {"recall@5", "ndcg@5"}
