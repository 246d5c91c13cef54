"""The report of an evaluation, for whoever decides: JSON, Markdown, and one HTML page with pictures.

The page begins with who wins, by how much and how sure, says where an adapter loses, and ends with the protocol. Its
sentences are made from the numbers, so they say so too where an adapter loses or nothing can be told.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from genrec import files
from genrec.errors import ConfigError, DataError
from genrec.metrics import EXPLANATIONS
from genrec.report import blocks, pictures, words
from genrec.report.blocks import Block, Bullets, Heading, Paragraph, Picture, Table
from genrec.report.numbers import (
    Rows,
    cell,
    cutoffs,
    difference_cell,
    found_metric,
    headline,
    metric_name,
    p_text,
    question_table,
    ranked,
    significant,
)

__all__ = ["Comparison", "Report", "cell", "question_table"]

_KINDS = ("adapter", "baseline", "against")
_STORED = (
    "name", "spec", "protocol", "kinds", "rows", "segments", "cold", "tests", "examples", "questions",
)  # fmt: skip
_TITLE = 70  # Characters of a title that are shown; shops put whole descriptions into titles.


def _no_cases() -> pl.DataFrame:
    return pl.DataFrame(
        schema={"user_id": pl.String, "target": pl.String, "recommender": pl.String, "rank": pl.Int32}
    )  # fmt: skip


@dataclass(frozen=True)
class Report:
    """What an evaluation found. A value is ``{"mean": ..., "low": ..., "high": ...}`` with a 95% interval, or a mean.

    Attributes:
        name: Of the spec.
        spec: The spec as tables.
        protocol: What was measured, and how.
        kinds: Name of a recommender -> ``"adapter"``, ``"baseline"`` or ``"against"`` (a list brought by the user).
        rows: Name of a recommender -> ``{"recall@10": value, ..., "coverage@10": value, ...}``.
        segments: Kind of segment -> name of a segment -> ``{"cases", "share", "rows"}``, the rows with recall and NDCG.
        cold: None, or ``{"cases", "items", "rows"}`` of the cases whose target has no training interaction; the rows
            with ``recall@10``, ``ndcg@10``, ``recall@10 among cold`` and ``ndcg@10 among cold``.
        tests: ``{"metric", "a", "b", "difference", "low", "high", "p", "p_holm"}``: an adapter a against another
            recommender b, paired over the same cases.
        examples: ``{"user_id", "history", "events", "target", "lists"}``: titles, and the first places of each list as
            ``{"item_id", "title", "hit"}``.
        questions: Name of a prompt -> name of an adapter -> what ``ask`` found.
        lists: Name of a recommender -> int32 [cases, max(k)] item indices, padded with -1. Not saved.
        cases: user_id, target (item_id), recommender, rank (1-based, 0: not in the list) of every case and recommender.

    Raises:
        DataError: There is no row, or a row whose kind is not given.
    """

    name: str
    spec: dict[str, Any]
    protocol: dict[str, Any]
    kinds: dict[str, str]
    rows: dict[str, dict[str, dict[str, float]]]
    segments: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    cold: dict[str, Any] | None = None
    tests: list[dict[str, Any]] = field(default_factory=list)
    examples: list[dict[str, Any]] = field(default_factory=list)
    questions: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    lists: dict[str, np.ndarray] = field(default_factory=dict, compare=False, repr=False)
    cases: pl.DataFrame = field(default_factory=_no_cases, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.rows:
            raise DataError(f"the report {self.name!r} has no recommender. Name adapters or baselines in the spec.")
        for label in self.rows:
            if self.kinds.get(label) not in _KINDS:
                raise DataError(
                    f"the report {self.name!r} gives {label!r} the kind {self.kinds.get(label)!r}. It is one of "
                    f"{', '.join(_KINDS)}; evaluate again with this version of genrec."
                )

    def markdown(self) -> str:
        """The report as Markdown, without pictures."""
        return blocks.markdown(self.name, self._blocks(drawn=False))

    def html(self) -> str:
        """The report as one HTML page that needs no network and no script."""
        return blocks.page(self.name, self._blocks(drawn=True))

    def save(self, folder: Path) -> Path:
        """Write ``NAME.cases.parquet``, ``NAME.json``, ``NAME.md`` and ``NAME.html`` into ``folder``.

        Each is written whole or not at all. The JSON file holds the hash of the cases it belongs to, so that a run
        which was killed between the two is noticed.

        Returns:
            The Markdown file.
        """
        folder = Path(folder)
        texts = {"md": self.markdown(), "html": self.html()}
        cases = folder / f"{self.name}.cases.parquet"
        with files.new_file(cases) as temporary:
            self.cases.write_parquet(temporary)
        table = {name: _storable(getattr(self, name)) for name in _STORED}
        table["cases"] = {"file": cases.name, "sha256": files.sha256(cases)}
        text = json.dumps(table, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        files.write_text(folder / f"{self.name}.json", text)
        for ending, text in texts.items():
            files.write_text(folder / f"{self.name}.{ending}", text)
        return folder / f"{self.name}.md"

    @classmethod
    def load(cls, path: Path | str) -> Report:
        """Read ``NAME.json`` and the ``NAME.cases.parquet`` beside it; ``lists`` are not saved and come back empty.

        Raises:
            ConfigError: A file is missing.
            DataError: A file is no report, or the two are not of one run.
        """
        path = Path(path)
        again = "Run `genrec eval` on the spec again."
        if not path.is_file():
            raise ConfigError(f"{path}: no such report. Give the NAME.json that `genrec eval` wrote.")
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
            values = {name: table[name] for name in _STORED}
            stamp, cases = table["cases"]["sha256"], path.with_name(table["cases"]["file"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is no report of this version of genrec ({error!r}). {again}") from error
        if not cases.is_file():
            raise ConfigError(f"{cases}: missing; it belongs to {path.name}. Copy both, or: {again}")
        if files.sha256(cases) != stamp:
            raise DataError(f"{cases} is not of the same run as {path.name}. {again}")
        return cls(**values, cases=pl.read_parquet(cases))

    def _blocks(self, *, drawn: bool) -> list[Block]:
        k = headline(self.rows)
        cases = int(self.protocol.get("cases", 0))
        first, *rest = words.summary(self.rows, self.kinds, self.tests, cases)
        sure, open_ = words.losses(self.segments, self.kinds, k)
        out: list[Block] = [Paragraph(first, strong=True), *map(Paragraph, rest)]
        if self.segments and "adapter" in self.kinds.values() and len(set(self.kinds.values())) > 1:
            out.append(Paragraph(_segment_sentence(sure)))
        out += map(Paragraph, words.cautions(self.protocol, self.segments))
        invented = [label for label, row in self.rows.items() if row.get(f"invalid@{k}", {}).get("mean")]
        if invented:
            out.append(
                Paragraph(f"Beware: lists of {', '.join(invented)} hold items that the catalogue does not have.")
            )
        out += [Heading("Accuracy")]
        if drawn:
            caption = (
                "Full catalogue, item level; lines are 95% bootstrap intervals over users. Blue: adapters; grey: "
                "baselines; orange: lists brought by the user."
            )
            out.append(Picture(pictures.bars(self.rows, self.kinds, k), caption))
        out.append(_headline_table(self.rows, self.kinds, k))
        out.append(Paragraph(f"Means over {cases:,} test cases, with 95% bootstrap intervals over users."))
        if self.tests:
            out += [Heading("Differences, and how sure they are"), *_test_blocks(self.tests, k, drawn=drawn)]
        if self.segments:
            out += [Heading("Where it loses"), *self._segment_blocks(sure, open_, k, drawn=drawn)]
        out += _beyond_blocks(self.rows, k)
        if self.cold is not None and self.cold["cases"]:
            out += _cold_blocks(self.cold, self.kinds, k)
        for prompt, found in self.questions.items():
            columns, table = question_table(found)
            notes = [f"{label}: {note}" for label, row in found.items() for note in row["notes"]]
            out += [Heading(f"Answers to {prompt}"), Table(columns, table), *([Bullets(notes)] if notes else [])]
        if self.examples:
            out += _example_blocks(self.examples, ranked(self.rows, f"ndcg@{k}"))
        out += [Heading("Every metric"), *_metric_blocks(self.rows, ranked(self.rows, f"recall@{k}"))]
        return [*out, Heading("Protocol"), Bullets(words.protocol(self.protocol, self.spec))]

    def _segment_blocks(self, sure: Sequence[str], open_: Sequence[str], k: int, *, drawn: bool) -> list[Block]:
        out: list[Block] = []
        if "adapter" in self.kinds.values():
            if sure:
                out += [Paragraph("An adapter's interval lies wholly below another recommender's in:"), Bullets(sure)]
            else:
                out.append(
                    Paragraph("In no segment does an adapter's interval lie wholly below another recommender's.")
                )
            if open_:
                text = "Below, but with overlapping intervals, so that nothing can be told: " + "; ".join(open_) + "."
                out.append(Paragraph(text))
            text = "These are looks at many segments without a correction for their number; take them as hints."
            out.append(Paragraph(text))
        order = ranked(self.rows, f"recall@{k}")
        # Adapters and the list of today first, then the strongest baselines.
        shown = sorted(order, key=lambda label: (self.kinds[label] == "baseline", order.index(label)))
        shown = sorted(shown[: pictures.SHOWN], key=order.index)
        shown = [label for label in shown if any(label in part["rows"] for parts in self.segments.values()
                                                 for part in parts.values())]  # fmt: skip
        filled = {title: parts for title, parts in self.segments.items() if any(p["cases"] for p in parts.values())}
        if drawn and filled and shown:
            caption = "Below each segment: its share of the test cases. Lines are 95% intervals."
            if len(order) > len(shown):
                caption += f" The picture shows {len(shown)} of {len(order)} recommenders; the tables have all."
            if any(len(parts) > pictures.SEGMENTS_SHOWN for parts in filled.values()):
                caption += f" Of many segments, the {pictures.SEGMENTS_SHOWN} largest are drawn."
            out.append(Picture(pictures.multiples(filled, shown, k), caption))
        for title, parts in filled.items():
            columns = ["", *(f"{part} ({found['cases']:,})" for part, found in parts.items())]
            out.append(Heading(f"By {title}", 3))
            for name in ("recall", "ndcg"):
                table, used = [], None
                for label in order:
                    cells = [label]
                    for found in parts.values():
                        metric = found_metric(found["rows"].get(label, {}), name, k)
                        cells.append("" if metric is None else cell(found["rows"][label][metric]))
                        used = used or metric
                    table.append(cells)
                if used is not None:
                    out.append(Table([metric_name(used), *columns[1:]], table))
        return out


def _segment_sentence(sure: Sequence[str]) -> str:
    if not sure:
        return "In no segment of users or items does an adapter clearly lose, as far as intervals can tell."
    more = f" There are {len(sure)} such cases; see Where it loses." if len(sure) > 1 else ""
    return f"Where an adapter clearly loses, by its interval: {sure[0]}{more}"


def _headline_table(rows: Rows, kinds: Mapping[str, str], k: int) -> Table:
    measured = {metric for row in rows.values() for metric in row}
    columns = [metric for name in ("recall", "ndcg", "mrr") if (metric := f"{name}@{k}") in measured]
    order = ranked(rows, f"recall@{k}")
    table = [
        [label, pictures.KIND_WORDS[kinds[label]], *(cell(rows[label][m]) if m in rows[label] else "" for m in columns)]
        for label in order
    ]
    best = [max(row[metric]["mean"] for row in rows.values() if metric in row) for metric in columns]
    marked = frozenset(
        (at, place + 2)
        for at, label in enumerate(order)
        for place, metric in enumerate(columns)
        if len(rows) > 1 and metric in rows[label] and rows[label][metric]["mean"] == best[place]
    )
    return Table(["", "kind", *map(metric_name, columns)], table, marked)


def _test_blocks(tests: Sequence[Mapping[str, Any]], k: int, *, drawn: bool) -> list[Block]:
    measured = list(dict.fromkeys(test["metric"] for test in tests))
    shown = [metric for metric in (f"recall@{k}", f"ndcg@{k}") if metric in measured] or measured[:2]
    out: list[Block] = []
    if drawn:
        caption = (
            "Differences over the same users with 95% intervals; right of zero is better. Filled blue: significantly "
            "better; filled orange: significantly worse; open grey: cannot be told from chance."
        )
        out.append(Picture(pictures.forest(tests, shown), caption))
    table = []
    marked = set()
    for at, test in enumerate(tests):
        found = "better" if test["difference"] > 0 else "worse"
        sure = significant(test)
        table.append([
            f"{test['a']} minus {test['b']}", metric_name(test["metric"]), difference_cell(test),
            p_text(test["p"]), p_text(test["p_holm"]), f"significantly {found}" if sure else "not significant",
        ])  # fmt: skip
        if sure and test["difference"] < 0:
            marked.add((at, 5))
    columns = ["first minus second", "metric", "difference", "p", "Holm-corrected p", "the first is"]
    return [*out, Table(columns, table, frozenset(marked))]


def _beyond_blocks(rows: Rows, k: int) -> list[Block]:
    measured = {metric for row in rows.values() for metric in row}
    columns = [name for name in EXPLANATIONS if f"{name}@{k}" in measured]
    if not columns:
        return []
    table = [
        [label, *(cell(row[f"{name}@{k}"]) if f"{name}@{k}" in row else "" for name in columns)]
        for label, row in ((label, rows[label]) for label in ranked(rows, f"recall@{k}"))
    ]
    explained = [f"{metric_name(name)}: {EXPLANATIONS[name]}" for name in columns]
    return [
        Heading("Beyond accuracy"),
        Paragraph(
            f"Of the first {k} places of every list. Invalid and repeated places are faults; none of the others is "
            "good or bad by itself."
        ),
        Table(["", *map(metric_name, columns)], table),
        Bullets(explained),
    ]


def _cold_blocks(cold: Mapping[str, Any], kinds: Mapping[str, str], k: int) -> list[Block]:
    rows = cold["rows"]
    columns = list(dict.fromkeys(metric for row in rows.values() for metric in row))
    order, chance = ranked(rows, f"recall@{k} among cold"), min(1.0, k / max(cold["items"], 1))
    table = [[label, *(cell(rows[label][m]) if m in rows[label] else "" for m in columns)] for label in order]
    heads = [
        metric_name(m.removesuffix(" among cold")) + (" among cold" if m.endswith(" cold") else "") for m in columns
    ]
    out: list[Block] = [
        Heading("Cold items"),
        Paragraph(
            f"{cold['cases']:,} test cases have a target without any interaction in training; the catalogue has "
            f"{cold['items']:,} such items. Among cold: the lists hold cold items alone, which tells how well they "
            f"are told apart from each other; {k} of them drawn at random have a recall of {chance:.4f}, and what "
            "scores all of them alike, such as popularity, lists them in the catalogue's order."
        ),
        Table(["", *heads], table),
    ]
    adapters = [label for label in ranked(rows, f"recall@{k}") if kinds.get(label) == "adapter"]
    others = [label for label in ranked(rows, f"recall@{k}") if kinds.get(label) != "adapter"]
    metric = f"recall@{k}"
    if adapters and others and metric in rows[adapters[0]] and metric in rows[others[0]]:
        mine, other = rows[adapters[0]][metric], rows[others[0]][metric]
        name = metric_name(metric)
        text = f"Among all items, {adapters[0]} reaches {name} {cell(mine)} on them, {others[0]} {cell(other)}"
        lower = "; the intervals overlap, so nothing can be told."
        if "low" in mine and "low" in other and not (mine["low"] <= other["high"] and other["low"] <= mine["high"]):
            lower = ": clearly more." if mine["mean"] > other["mean"] else ": clearly less."
        out.append(Paragraph(text + (lower if "low" in mine and "low" in other else ".")))
    return out


def _example_blocks(examples: Sequence[Mapping[str, Any]], order: Sequence[str]) -> list[Block]:
    hits = {label: sum(any(e["hit"] for e in x["lists"].get(label, ())) for x in examples) for label in order}
    out: list[Block] = [
        Heading("Example users"),
        Paragraph(
            f"{len(examples)} users drawn by the seed, not picked. A hit is the item that really came next; it is "
            "marked with ✓. Hits among the places shown: " + ", ".join(f"{name} {n}" for name, n in hits.items()) + "."
        ),
    ]
    for example in examples:
        shown = [_title(title) for title in example["history"]]
        count = example["events"]
        text = f"History, the last {len(shown)} of {count:,}: " if count > len(shown) else "History: "
        out += [
            Heading(f"User {example['user_id']}", 3),
            Paragraph(text + " → ".join(shown)),
            Paragraph(f"What came next: {_title(example['target'])}"),
        ]
        lists = [(label, example["lists"][label]) for label in order if label in example["lists"]]
        places = max((len(entries) for _, entries in lists), default=0)
        table, marked = [], set()
        for at, (label, entries) in enumerate(lists):
            cells = [("✓ " if entry["hit"] else "") + _title(entry["title"]) for entry in entries]
            marked |= {(at, place + 1) for place, entry in enumerate(entries) if entry["hit"]}
            table.append([label, *cells, *[""] * (places - len(cells))])
        out.append(Table(["", *map(str, range(1, places + 1))], table, frozenset(marked), prose=True))
    return out


def _title(title: Any) -> str:
    line = " ".join(str(title).split())
    return line if len(line) <= _TITLE else line[: _TITLE - 1].rstrip() + "…"


def _metric_blocks(rows: Rows, order: Sequence[str]) -> list[Block]:
    out: list[Block] = []
    measured = list(dict.fromkeys(metric for row in rows.values() for metric in row))
    for name in dict.fromkeys(metric.partition("@")[0] for metric in measured):
        columns = [metric for metric in measured if metric.partition("@")[0] == name]
        columns = [f"{name}@{k}" for k in cutoffs(columns)] or columns
        table = [[label, *(cell(rows[label][m]) if m in rows[label] else "" for m in columns)] for label in order]
        out.append(Table(["", *map(metric_name, columns)], table))
    return out


def _storable(value: Any) -> Any:
    """Numbers as JSON has them: NumPy's become Python's, and what is not finite becomes null."""
    if isinstance(value, Mapping):
        return {str(name): _storable(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_storable(entry) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Comparison:
    """Two reports on the same cases, side by side.

    Attributes:
        a, b: The reports.
        tests: As in ``Report.tests``, with ``a`` a recommender of the first report and ``b`` one of the second.
    """

    a: Report
    b: Report
    tests: list[dict[str, Any]] = field(default_factory=list)

    @property
    def rows(self) -> dict[str, dict[str, dict[str, float]]]:
        """The rows of both, under ``A: NAME`` and ``B: NAME``."""
        return {f"{side}: {label}": row for side, report in self._sides for label, row in report.rows.items()}

    @property
    def kinds(self) -> dict[str, str]:
        """The kind of each row."""
        return {f"{side}: {label}": report.kinds[label] for side, report in self._sides for label in report.rows}

    @property
    def _sides(self) -> tuple[tuple[str, Report], tuple[str, Report]]:
        return (("A", self.a), ("B", self.b))

    @property
    def name(self) -> str:
        """``A against B``, by the names of the reports."""
        return f"{self.a.name} against {self.b.name}"

    def markdown(self) -> str:
        """The comparison as Markdown, without pictures."""
        return blocks.markdown(self.name, self._blocks(drawn=False))

    def html(self) -> str:
        """The comparison as one HTML page that needs no network and no script."""
        return blocks.page(self.name, self._blocks(drawn=True))

    def _blocks(self, *, drawn: bool) -> list[Block]:
        rows, kinds = self.rows, self.kinds
        k = headline(rows)
        named = [{**test, "a": f"A: {test['a']}", "b": f"B: {test['b']}"} for test in self.tests]
        first, *rest = self._summary(named, k)
        out: list[Block] = [Paragraph(first, strong=True), *map(Paragraph, rest)]
        out.append(Paragraph(f"A is the report {self.a.name}, B the report {self.b.name}."))
        out.append(Heading("Accuracy"))
        if drawn:
            caption = "Lines are 95% intervals. Blue: adapters; grey: baselines; orange: lists brought by the user."
            out.append(Picture(pictures.bars(rows, kinds, k), caption))
        out.append(_headline_table(rows, kinds, k))
        if named:
            out += [Heading("Differences, and how sure they are"), *_test_blocks(named, k, drawn=drawn)]
        out += _beyond_blocks(rows, k)
        out += [Heading("Every metric"), *_metric_blocks(rows, ranked(rows, f"recall@{k}"))]
        out.append(Heading("Protocol"))
        told = [words.protocol(report.protocol, report.spec) for _, report in self._sides]
        same = [line for line in told[0] if line in told[1]]
        out += [Paragraph("What both share:"), Bullets(same)] if same else []
        for (side, _), lines in zip(self._sides, told, strict=True):
            own = [line for line in lines if line not in same]
            out += [Paragraph(f"Only {side}:"), Bullets(own)] if own else []
        return out

    def _summary(self, tests: Sequence[Mapping[str, Any]], k: int) -> list[str]:
        """The best adapter of A against the best of B; where they were not tested, the best that were."""
        if not tests:
            return [
                "No recommender of A was tested against one of B: nothing can be told from this page but the means."
            ]
        order = ranked(self.rows, f"ndcg@{k}")
        pairs = dict.fromkeys((test["a"], test["b"]) for test in tests)
        # A baseline that both have says nothing of what the two reports are compared for, however good it is.
        adapters = [names for names in pairs if {self.kinds[name] for name in names} == {"adapter"}]
        brought = [names for names in pairs if "baseline" not in {self.kinds[name] for name in names}]
        pair = min(adapters or brought or pairs, key=lambda names: [order.index(name) for name in names])
        told = {test["metric"]: test for test in tests if (test["a"], test["b"]) == pair}
        signs = {words.sign(test) for metric, test in told.items() if metric in (f"recall@{k}", f"ndcg@{k}")}
        users = f"{int(self.a.protocol.get('cases', 0)):,} users"
        if signs == {1}:
            head = f"{pair[0]} is significantly better than {pair[1]}."
        elif signs == {-1}:
            head = f"{pair[1]} is significantly better than {pair[0]}."
        else:
            head = f"{pair[0]} and {pair[1]} cannot be told apart with certainty."
        out = [head]
        values = [self.rows[name] for name in pair]
        for metric in (f"recall@{k}", f"ndcg@{k}"):
            if all(metric in row for row in values):
                first, second = ((name, row[metric]) for name, row in zip(pair, values, strict=True))
                test = told.get(metric)
                out.append(
                    words.recall_sentence(first, second, k, users, test)
                    if metric.startswith("recall")
                    else words.ndcg_sentence(first, second, k, test)
                )
        return out
