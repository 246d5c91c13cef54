"""`genrec quickstart`, `init` and `doctor`: where somebody begins."""

from __future__ import annotations

from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import Annotated

import typer

from genrec import progress
from genrec.cli.options import Json
from genrec.cli.output import print_json, print_report, print_table


def quickstart(
    workspace: Annotated[Path, typer.Option(help="Where prompts/, adapters/, eval/ and data/ are.")] = Path(),
    json_: Json = False,
) -> None:
    """The whole flow on MovieLens-100K, with a table and pictures at the end."""
    from genrec.quickstart import NAME, run

    result = run(workspace)
    if json_:
        print_json(asdict(result))
        return
    protocol = result.report["protocol"]
    print()
    print_report(
        f"MovieLens-100K, leave-one-out, {protocol['cases']} users, all {protocol['catalogue']} items ranked, seen "
        "items left out (95% intervals)",
        result.report["rows"],
    )
    for example in result.examples:
        print()
        pairs = [[*pair] for pair in zip_longest(example["history"], example["recommended"])]
        title = f"user {example['user_id']}, after {example['events']} films"
        print_table(title, ["the last ones", "recommended"], pairs)
    print()
    stages = [
        [name, f"{seconds:.1f}", "reused" if name in result.reused else ""] for name, seconds in result.seconds.items()
    ]
    total = sum(result.seconds.values())
    print_table("seconds per stage", ["stage", "seconds", ""], [*stages, ["all", f"{total:.1f}", ""]], right=(1,))
    assert result.batch is not None
    print(f"\nlists of all {result.batch.users} users: {result.batch.out}/*.parquet")
    print(f"report: {workspace / 'eval' / 'results' / NAME}.md")
    for curve in result.curves:
        print(f"learning curve: {curve}")
    print(
        "\nnext:\n"
        f"  genrec recommend adapters/{NAME} --user 42 -k 5 --json\n"
        f"  genrec prompts render prompts/next_item.jinja adapters/{NAME} --user 42\n"
        f"  genrec eval eval/{NAME}.toml\n"
        "  docs/own-data.md: the same with your own log in ten minutes"
    )


def init(folder: Annotated[Path, typer.Argument(help="The workspace to make.")]) -> None:
    """Make a workspace: the shipped prompts, recipes and specs. What is there already stays."""
    from genrec.quickstart import init as make

    written = make(folder)
    for path in written:
        print(path)
    progress.say(f"{len(written)} files written. Next: cd {folder}, then `genrec quickstart`, or `genrec data import`.")


def doctor(json_: Json = False) -> None:
    """What is installed, what works here, what to install for the rest. Exit code 1 when something is missing."""
    from genrec.doctor import examine

    found = examine(Path.cwd())
    if json_:
        print_json([asdict(finding) for finding in found])
    else:
        rows = [["ok" if f.ok else "MISSING" if f.needed else "-", f.name, f.found, f.advice] for f in found]
        print_table("genrec doctor", ["", "what", "found", "advice"], rows)
    if any(finding.needed and not finding.ok for finding in found):
        raise typer.Exit(1)
