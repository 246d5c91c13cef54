"""Numbers of a report as text, and which of them a report puts first."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from genrec.metrics import ACRONYMS

SIGNIFICANT = 0.05  # The level at which a Holm-corrected p-value counts.

Value = Mapping[str, float]
Rows = Mapping[str, Mapping[str, Value]]

_WORDS = {5: "five", 10: "ten", 20: "twenty", 50: "fifty"}


def short(number: float | None, *, signed: bool = False) -> str:
    """Four decimals without the leading zero: ``.1234``, ``-.0120``, ``1.0000``; ``n/a`` for what is no number."""
    if number is None or not math.isfinite(number):
        return "n/a"
    text = f"{number:+.4f}" if signed else f"{number:.4f}"
    text = "+0.0000" if signed and text == "-0.0000" else "0.0000" if text == "-0.0000" else text
    return re.sub(r"^([+-]?)0\.", r"\1.", text)


def cell(value: Value) -> str:
    """One metric as text: ``.1234 [.1100, .1360]``, or the mean alone where there is no interval."""
    return short(value["mean"]) + (f" [{short(value['low'])}, {short(value['high'])}]" if "low" in value else "")


def difference_cell(test: Mapping[str, Any]) -> str:
    """The difference of a paired test as text: ``+.0123 [+.0100, +.0150]``."""
    low, high = short(test["low"], signed=True), short(test["high"], signed=True)
    return f"{short(test['difference'], signed=True)} [{low}, {high}]"


def p_text(p: float | None) -> str:
    """A p-value as text: ``p < .001``, ``p = .012``."""
    if p is None or not math.isfinite(p):
        return "p not known"
    if p < 0.001:
        return "p < .001"
    return "p = " + re.sub(r"^0\.", ".", f"{p:.3f}")


def significant(test: Mapping[str, Any]) -> bool:
    """Whether the Holm-corrected p-value of a paired test is below the level; one that is not known is not."""
    p = test["p_holm"]
    return p is not None and bool(p < SIGNIFICANT)


def percent(share: float) -> str:
    """A share as text: ``11.6%``."""
    return f"{100 * share:.1f}%"


def joined(names: Sequence[str]) -> str:
    """Names as a part of a sentence: ``a``, ``a and b``, ``a, b and c``."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def metric_name(metric: str) -> str:
    """A metric as prose and headings write it: ``NDCG@10`` for ``ndcg@10``."""
    name, _, k = metric.partition("@")
    shown = name.upper() if name in ACRONYMS else name.replace("_", " ")
    return f"{shown}@{k}" if k else shown


def first_places(k: int) -> str:
    """The cut-off k in prose: ``among its first ten``."""
    return "in the first place" if k == 1 else f"among its first {_WORDS.get(k, k)}"


def cutoffs(names: Iterable[str]) -> list[int]:
    """The cut-offs of the metrics called ``NAME@k``, ascending."""
    return sorted({int(name.rpartition("@")[2]) for name in names if "@" in name})


def preferred(ks: Collection[int]) -> int:
    """The cut-off of tests, segments and what stands first: 10, or the largest where 10 is not among them."""
    return 10 if 10 in ks or not ks else max(ks)


def headline(rows: Rows) -> int:
    """The preferred cut-off of those at which every row was measured; two reports may differ in theirs."""
    found = [set(cutoffs(row)) for row in rows.values()]
    return preferred(set.intersection(*found) or set.union(*found))


def ranked(rows: Rows, metric: str) -> list[str]:
    """The names of the rows, best mean of ``metric`` first; equal ones, and those without it at the end, as given."""

    def key(name: str) -> float:
        mean = rows[name].get(metric, {}).get("mean")
        return math.inf if mean is None or math.isnan(mean) else -mean

    return sorted(rows, key=key)


def found_metric(row: Mapping[str, Any], name: str, k: int) -> str | None:
    """``NAME@k`` where a row has it, else the row's largest other cut-off of it, else None."""
    ks = cutoffs(metric for metric in row if metric.startswith(f"{name}@"))
    return f"{name}@{k if k in ks else ks[-1]}" if ks else None


def question_table(found: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """What adapters found of one question as columns and rows of text: metrics beside what always says the same."""
    names = list(dict.fromkeys(name for row in found.values() for name in row["metrics"]))
    rows = []
    for label, row in found.items():
        shares = ", ".join(f"{answer}: {share:.1%}" for answer, share in row["shares"].items())
        cells = [cell(row["metrics"][name]) if name in row["metrics"] else "" for name in names]
        rows.append([label, *cells, f"{row['cases']:,}", shares])
    return ["", *names, "cases", "answers"], rows
