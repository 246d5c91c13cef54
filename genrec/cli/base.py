"""`genrec base`: small bases."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from genrec.cli.options import Overwrite

app = typer.Typer(help="Make small bases.", no_args_is_help=True)


@app.command("create")
def create(
    data: Annotated[Path, typer.Argument(help="A data set folder; its titles train the tokenizer.")],
    out: Annotated[Path, typer.Option(help="The folder to write, such as adapters/small-random.")],
    vocabulary: Annotated[int, typer.Option(help="Tokens of the tokenizer, at most.")] = 2000,
    width: Annotated[int, typer.Option(help="Hidden size.")] = 64,
    layers: Annotated[int, typer.Option(help="Depth.")] = 2,
    heads: Annotated[int, typer.Option(help="Attention heads per layer.")] = 2,
    context: Annotated[int, typer.Option(help="The longest sequence of tokens.")] = 1024,
    seed: Annotated[int, typer.Option(help="Of the random weights.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Make a small language model with random weights, and its tokenizer, to be pretrained by `genrec train`."""
    from genrec.base import create
    from genrec.dataset import Dataset

    texts = Dataset.load(data).items["title"].to_list()
    sizes: dict[str, int] = {"vocabulary": vocabulary, "width": width, "layers": layers, "heads": heads}
    print(create(texts, out, **sizes, context=context, seed=seed, overwrite=overwrite))
