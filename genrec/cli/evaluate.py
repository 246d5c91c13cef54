"""`genrec eval`: adapters, baselines and other lists on one split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from genrec.cli.options import Assignments, Device, Dtype, Json
from genrec.cli.output import print_json, print_report, print_table, print_tests


def eval_(
    spec: Annotated[Path | None, typer.Argument(help="A spec, such as eval/shop.toml.")] = None,
    assignments: Assignments = None,
    name: Annotated[str | None, typer.Option(help="Of the report; unset: the spec's.")] = None,
    against: Annotated[
        list[Path] | None,
        typer.Option(help="Lists from elsewhere, to score beside: Parquet or CSV with user_id, rank, item_id."),
    ] = None,
    tune_baselines: Annotated[
        bool, typer.Option("--tune-baselines", help="Choose the baselines' options on validation first, and keep them.")
    ] = False,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="A B", help="Two reports or specs that were evaluated, to test against each other."),
    ] = None,
    engine: Annotated[Literal["local", "vllm"] | None, typer.Option(help="Unset: the spec's, or local.")] = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    json_: Json = False,
) -> None:
    """Evaluate adapters, baselines and other lists on one split; the report goes to eval/results/."""
    from genrec.report import Report, question_table

    if compare is not None:
        runs = engine is not None or device != "cpu" or dtype != "float32"
        if spec is not None or name is not None or against or tune_baselines or runs:
            raise typer.BadParameter("--compare reads two saved reports; leave SPEC and the other options out.")
        from genrec import comparison

        paths = [comparison.saved_report(name) for name in compare]
        both = comparison.compare(*(Report.load(path) for path in paths))
        written = comparison.save(both, paths[0].parent)
        tests = [{**test, "a": f"A: {test['a']}", "b": f"B: {test['b']}"} for test in both.tests]
        if json_:
            print_json({"name": both.name, "rows": both.rows, "tests": tests})
            return
        print_report(both.name, both.rows)
        print_tests(tests)
        print(f"page: {written.with_suffix('.html')}")
        print(f"report: {written}")
        return
    if spec is None:
        raise typer.BadParameter("write genrec eval eval/shop.toml, or genrec eval --compare A B.", param_hint="SPEC")
    from genrec.evaluation import evaluate

    flags = [] if engine is None else [f"engine={engine}"]
    report = evaluate(
        spec, name=name, assignments=[*flags, *(assignments or [])], device=device, dtype=dtype, against=against or (),
        tune_baselines=tune_baselines,
    )  # fmt: skip
    written = report.save(spec.absolute().parent / "results")
    if json_:
        print_json(json.loads(written.with_suffix(".json").read_text(encoding="utf-8")))
        return
    print_report(f"{report.name}: {report.protocol['split']}, {report.protocol['cases']} cases", report.rows)
    print_tests(report.tests)
    for prompt, found in report.questions.items():
        columns, rows = question_table(found)
        print_table(f"{prompt} (95% intervals)", columns, rows, right=tuple(range(1, len(columns) - 1)))
        for label, row in found.items():
            for note in row["notes"]:
                print(f"{label}: {note}")
    print(f"page: {written.with_suffix('.html')}")
    print(f"report: {written}")
