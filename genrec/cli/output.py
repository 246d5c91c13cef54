"""How commands print: JSON, tables that no pipe cuts, and the tables of evaluations."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, ensure_ascii=False, default=str))


def print_table(title: str, columns: list[str], rows: list[list[Any]], right: tuple[int, ...] = ()) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable

    table: Table = RichTable(show_header=any(columns))
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row))
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = 100_000  # What is piped takes the width that it needs; nothing is folded.
    console.print(title, style="bold")  # Not the table's own, which is folded to the width of its columns.
    console.print(table)


def print_report(title: str, rows: dict[str, dict[str, dict[str, float]]]) -> None:
    from genrec.report.numbers import cell, headline

    k = headline(rows)
    shown = [f"recall@{k}", f"ndcg@{k}", f"coverage@{k}"]  # With intervals, more would not fit 80 columns.
    table = [[name, *(cell(row[metric]) for metric in shown)] for name, row in rows.items()]
    print_table(title, ["", *shown], table, right=tuple(range(1, len(shown) + 1)))


def print_tests(tests: list[dict[str, Any]]) -> None:
    """One line a test: who is ahead, by how much, and how sure that is."""
    from genrec.report.numbers import significant

    for test in tests:
        names, values = (test["a"], test["b"]), (test["difference"], test["low"], test["high"])
        if test["difference"] < 0:
            names, values = names[::-1], (-test["difference"], -test["high"], -test["low"])
        more, low, high = values
        told = "beats" if significant(test) else "is ahead of, but cannot be told from," if more else "does as well as"
        metric, p = test["metric"], test["p_holm"]
        print(f"{names[0]} {told} {names[1]}: {metric} {more:+.4f} [{low:+.4f}, {high:+.4f}], Holm-corrected p {p:.4f}")


def print_summary(title: str, summary: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(summary)
        return
    rows = []
    for key, value in summary.items():
        if isinstance(value, dict):
            value = ", ".join(f"{inner}: {_number(found)}" for inner, found in value.items())
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        rows.append([key.replace("_", " "), _number(value)])
    print_table(title, ["", ""], rows)


def _number(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
