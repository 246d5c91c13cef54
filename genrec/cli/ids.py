"""`genrec ids`: identifiers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from genrec.cli.options import Json, SplitName
from genrec.cli.output import print_summary

app = typer.Typer(help="Build and inspect identifiers.", no_args_is_help=True)


@app.command("build")
def build(
    data: Annotated[Path, typer.Argument(help="A data set folder.")],
    out: Annotated[Path, typer.Option(help="The file to write, such as data/shop-identifiers.parquet.")],
    scheme: Annotated[str, typer.Option(help="atomic, semantic, title or random.")] = "atomic",
    base: Annotated[str | None, typer.Option(help="The base whose tokens spell the titles, of title.")] = None,
    levels: Annotated[int, typer.Option(help="Codes per identifier, of semantic and random.")] = 3,
    codes: Annotated[int, typer.Option(help="Different codes per level, of semantic and random.")] = 256,
    split: SplitName = "leave_one_out",
    ties: Annotated[Literal["file", "shuffled"], typer.Option(help="Order within equal timestamps.")] = "file",
    dimensions: Annotated[int, typer.Option("--features", help="Dimensions of the text vectors.")] = 64,
    rows_of: Annotated[
        Path | None,
        typer.Option(help="An adapter with atomic identifiers whose rows, beside text, make the codes of semantic."),
    ] = None,
    split_seed: Annotated[int, typer.Option(help="Of shuffled ties.")] = 0,
    seed: Annotated[int, typer.Option(help="Of features, clusters and random codes.")] = 0,
) -> None:
    """Give every item an identifier. A recipe uses the file by identifiers.file."""
    from genrec.identification import build_identifiers

    sizes = {"levels": levels, "codes": codes, "dimensions": dimensions}
    seeds = {"split_seed": split_seed, "seed": seed}
    made = build_identifiers(data, scheme, base=base, split=split, ties=ties, rows_of=rows_of, **sizes, **seeds)
    made.save(out)
    print(out)


@app.command("inspect")
def inspect(
    path: Annotated[Path, typer.Argument(help="An identifiers file, or an adapter folder.")],
    item: Annotated[list[str] | None, typer.Option(help="Show the identifiers of these items.")] = None,
    json_: Json = False,
) -> None:
    """Scheme, tokens per item, and how the items spread over the first codes."""
    from genrec.identifiers import Identifiers

    found = Identifiers.load(path / "identifiers.parquet" if path.is_dir() else path)
    print_summary(str(path), found.summary(item or []), json_)
