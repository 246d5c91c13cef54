"""Paired tests of recommenders on the same cases: within one report, and between two saved ones."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from genrec import files, metrics, progress
from genrec.errors import ConfigError
from genrec.report import Comparison, Report
from genrec.report.numbers import cutoffs, preferred
from genrec.significance import holm, paired

TESTED = ("recall", "ndcg")  # The metrics that are tested, at the preferred cut-off alone.

# Keys of a protocol that may differ between two reports that are compared: all others say what the cases are.
_FREE = {"data", "num_beams", "scoring", "baselines", "adapters", "against", "versions", "cases_drawn"}


def paired_tests(
    ours: Mapping[str, NDArray[Any]], theirs: Mapping[str, NDArray[Any]], pairs: Sequence[tuple[str, str]], k: int
) -> list[dict[str, Any]]:
    """Test every pair in recall and NDCG at k, corrected by Holm's method over the pairs of one metric.

    Args:
        ours: Name of a recommender -> ranks, int [cases], 0 where the target is not in the list.
        theirs: The same of the second of each pair, over the same cases.
        pairs: Names out of ``ours`` and ``theirs``.
        k: Cut-off.

    Returns:
        Per metric and pair ``metric``, ``a``, ``b``, ``difference`` (mean of a - b), ``low``, ``high``, ``p`` and
        ``p_holm``; see ``significance.paired``.
    """
    tests: list[dict[str, Any]] = []
    with progress.bar("testing differences", len(TESTED) * len(pairs)) as advance:
        for name in TESTED:
            found: list[dict[str, Any]] = []
            for a, b in pairs:
                value = metrics.METRICS[name]
                result = paired(value(ours[a], k), value(theirs[b], k))
                found.append({"metric": f"{name}@{k}", "a": a, "b": b, **result})
                advance()
            corrected = holm([test["p"] for test in found])
            tests += [{**test, "p_holm": float(p)} for test, p in zip(found, corrected, strict=True)]
    return tests


def saved_report(name: str | Path) -> Path:
    """The JSON file of a report: a path to it, a spec file or its name in ``eval/``.

    Raises:
        ConfigError: There is none; names where it was looked for.
    """
    path = Path(name)
    places = [path] if path.suffix == ".json" else []
    if path.suffix == ".toml":
        places.append(path.parent / "results" / f"{path.stem}.json")
    elif not places:
        places.append(Path("eval") / "results" / f"{path.name}.json")
    if not places[0].is_file():
        raise ConfigError(f"there is no report {places[0]}. Give a report's .json, or run `genrec eval` on the spec.")
    return places[0]


def compare(a: Report, b: Report) -> Comparison:
    """Test two reports against each other: every adapter and list of a against b's, and the baselines that differ.

    A report compared with itself tests its adapters against each other. The tests are at the preferred one of the
    cut-offs that both have.

    Args:
        a, b: Of the same data, split, order within equal timestamps and cases.

    Raises:
        ConfigError: They are not; names what differs.
    """
    for key in [*a.protocol, *(key for key in b.protocol if key not in a.protocol)]:
        ours, theirs = a.protocol.get(key), b.protocol.get(key)
        if key not in _FREE and json.dumps(ours) != json.dumps(theirs):
            raise ConfigError(
                f"{a.name} and {b.name} cannot be compared: {key} is {_short(ours)} in one and {_short(theirs)} in the "
                "other. Two reports must be of the same data, split and cases: evaluate one of them again."
            )
    ks = [cutoffs(metric for row in report.rows.values() for metric in row) for report in (a, b)]
    shared = set(ks[0]) & set(ks[1])
    if not shared:
        raise ConfigError(
            f"{a.name} and {b.name} cannot be compared: k is {ks[0]} in one and {ks[1]} in the other. Evaluate both at "
            "the same k."
        )
    keys, ours = _ranks(a)
    others, theirs = _ranks(b)
    if not keys.equals(others):
        if keys.height != others.height:
            what = f"{keys.height:,} cases in one and {others.height:,} in the other"
        else:
            same = (keys["user_id"] == others["user_id"]) & (keys["target"] == others["target"])
            row = int((~same).arg_max() or 0)
            what = f"case {row + 1} is {keys.row(row)} in one and {others.row(row)} in the other"
        raise ConfigError(
            f"{a.name} and {b.name} cannot be compared: they have different cases; {what}. Evaluate both with the same "
            "users and seed."
        )
    brought = [[label for label, kind in report.kinds.items() if kind != "baseline"] for report in (a, b)]
    crossed = [(first, second) for first in brought[0] for second in brought[1]]
    crossed += [(label, label) for label in a.rows if label in b.rows]
    equal = {label for label in ours if label in theirs and np.array_equal(ours[label], theirs[label])}
    pairs: list[tuple[str, str]] = []
    for first, second in dict.fromkeys(crossed):
        # What is the same on both sides would weaken the correction of what is not, and so would a test told twice.
        told = first == second or (second, first) in pairs
        if not (told and first in equal and second in equal):
            pairs.append((first, second))
    if crossed and not pairs:
        raise ConfigError(
            f"{a.name} and {b.name} found the same under the same names ({', '.join(sorted(equal))}), so nothing is "
            "left to test. Compare reports of different adapters or lists."
        )
    if not pairs:
        raise ConfigError(
            f"{a.name} and {b.name} share no recommender and have not both an adapter or a list: {list(a.rows)} and "
            f"{list(b.rows)}. Name one in both specs."
        )
    return Comparison(a, b, paired_tests(ours, theirs, pairs, preferred(shared)))


def save(comparison: Comparison, folder: Path) -> Path:
    """Write ``A-against-B.md`` and ``.html`` into ``folder``, by the reports' names; returns the Markdown file."""
    written = folder / f"{comparison.a.name}-against-{comparison.b.name}.md"
    files.write_text(written, comparison.markdown())
    files.write_text(written.parent / f"{written.name.removesuffix('.md')}.html", comparison.html())
    return written


def _ranks(report: Report) -> tuple[pl.DataFrame, dict[str, NDArray[Any]]]:
    """The cases of a report (user_id, target), and the ranks of each recommender over them."""
    parts = report.cases.partition_by("recommender", maintain_order=True, as_dict=True)
    keys = next(iter(parts.values())).select("user_id", "target")
    return keys, {str(label): part["rank"].to_numpy() for (label,), part in parts.items()}


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
