"""`genrec data`: data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from genrec import progress
from genrec.cli.options import Json, Overwrite, pairs
from genrec.cli.output import print_json, print_summary
from genrec.errors import ConfigError

app = typer.Typer(help="Fetch, import, export and inspect data sets.", no_args_is_help=True)


@app.command("fetch")
def fetch(
    name: Annotated[str, typer.Argument(help="movielens-100k")],
    cache: Annotated[Path, typer.Option(help="Where the download is kept.")] = Path("data/cache"),
) -> None:
    """Download a public data set; prints the folder to import."""
    from genrec.readers import fetch

    print(fetch(name, cache))


@app.command("import")
def import_(
    out: Annotated[Path, typer.Option(help="The data set folder to write, such as data/shop.")],
    paths: Annotated[list[Path] | None, typer.Argument(help="A folder, or a log, items… and users… files.")] = None,
    format_: Annotated[str | None, typer.Option("--format", help="Such as amazon; unset: what files show.")] = None,
    interactions: Annotated[list[Path] | None, typer.Option(help="A log, whatever its name.")] = None,
    items: Annotated[Path | None, typer.Option(help="The catalogue, whatever its name.")] = None,
    users: Annotated[Path | None, typer.Option(help="The users table, whatever its name.")] = None,
    column: Annotated[list[str] | None, typer.Option(help="Of the log: ours=theirs, such as user_id=customer.")] = None,
    item_column: Annotated[list[str] | None, typer.Option(help="Of the catalogue: ours=theirs.")] = None,
    user_column: Annotated[list[str] | None, typer.Option(help="Of the users table: ours=theirs.")] = None,
    min_rating: Annotated[float | None, typer.Option(help="Only ratings from here on count.")] = None,
    event: Annotated[list[str] | None, typer.Option(help="A positive event, or event=weight; no others.")] = None,
    keep_seen: Annotated[bool, typer.Option(help="Items may be taken again: leave out none of a history.")] = False,
    context: Annotated[list[str] | None, typer.Option(help="A column of the log to keep for prompts: query.")] = None,
    core: Annotated[int, typer.Option(help="Keep users and items with at least so many interactions.")] = 0,
    on_bad_row: Annotated[Literal["fail", "skip"], typer.Option(help="Stop at them, or save and skip them.")] = "fail",
    all_items: Annotated[bool, typer.Option(help="Of Amazon's metadata, items without reviews too.")] = False,
    name: Annotated[str | None, typer.Option(help="Of the data set; unset: the name of the folder.")] = None,
    overwrite: Overwrite = False,
    json_: Json = False,
) -> None:
    """Import a log, a catalogue and a users table as a data set folder."""
    from genrec.readers import import_files

    events: Any = None
    if event:
        events = {}
        for text in event:
            kind, _, weight = text.partition("=")
            try:
                events[kind] = float(weight) if weight else 1.0
            except ValueError:
                raise ConfigError(f"--event {text!r}: the weight after = is no number.") from None
        if not any("=" in text for text in event):
            events = list(events)  # Without weights, as in Python.
    data = import_files(
        paths or (),
        format=format_,
        interactions=interactions,
        items=items,
        users=users,
        columns=pairs(column, "--column"),
        item_columns=pairs(item_column, "--item-column"),
        user_columns=pairs(user_column, "--user-column"),
        min_rating=min_rating,
        events=events,
        exclude_seen=not keep_seen,
        context=context or (),
        name=name or out.name,
        on_bad_row=on_bad_row,
        all_items=all_items,
    )
    if core:
        data = data.k_core(core, core)
    data.save(out, overwrite=overwrite)
    print_summary(str(out), data.summary(), json_)
    if data.bad_rows.height:
        progress.say(f"bad rows: {out / 'bad_rows.csv'}")


@app.command("export")
def export(
    data: Annotated[Path, typer.Argument(help="A data set folder.")],
    out: Annotated[Path, typer.Argument(help="The folder to write; its files are called as it is.")],
    to: Annotated[Literal["recbole"], typer.Option(help="recbole: its atomic files (.inter, .item, .user).")],
    overwrite: Overwrite = False,
    json_: Json = False,
) -> None:
    """Write a data set in another library's format, and say what that cannot carry."""
    from genrec.dataset import Dataset
    from genrec.readers import export_recbole

    lost = export_recbole(Dataset.load(data), out, overwrite=overwrite)
    written = sorted(str(path) for path in out.iterdir())
    if json_:
        print_json({"files": written, "lost": lost})
    else:
        print(*written, *(f"not carried: {loss}" for loss in lost), sep="\n")


@app.command("inspect")
def inspect(path: Annotated[Path, typer.Argument(help="A data set folder.")], json_: Json = False) -> None:
    """Counts, sparsity, duplicates, ties, time range, titles missing, cold items."""
    from genrec.dataset import Dataset

    print_summary(str(path), Dataset.load(path).summary(), json_)
