"""`genrec bench`: measurements."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import typer

from genrec import progress
from genrec.benchmarks import commands
from genrec.cli.output import print_json, print_table


def _print_bench(done: Any) -> None:
    """What a command of `genrec bench` returned: its report, whether as JSON, and the files written."""
    report, as_json, written = done
    if as_json:
        print_json(asdict(report))
    else:
        columns = ["part", "setting", "what", "value", "", "n", "goal", ""]
        print_table(f"genrec bench {report.name}", columns, report.table(), right=(3, 5))
        print(report.told())
    for path in written:
        progress.say(str(path))
    if not report.agrees:
        progress.say("the sides of a comparison give different items: see the rows of places that differ")
        raise typer.Exit(8)


app = typer.Typer(
    help="Measure decoding, tries, training, prompts and accuracy here.",
    no_args_is_help=True,
    result_callback=_print_bench,
)
app.command("decode")(commands.decode)
app.command("trie")(commands.trie)
app.command("train")(commands.train)
app.command("accuracy")(commands.accuracy)
app.command("batch")(commands.batch)
app.command("prompts")(commands.prompts)
