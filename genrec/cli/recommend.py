"""`genrec recommend`: the items of one user or history."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from genrec import progress
from genrec.cli.options import Context, Device, Dtype, EngineName, Json, context_of, item_ids
from genrec.cli.output import print_json, print_table
from genrec.errors import ConfigError


def recommend(
    adapter: Annotated[Path, typer.Argument(help="An adapter folder.")],
    user: Annotated[str | None, typer.Option(help="A user of the data set, with the whole history.")] = None,
    history: Annotated[str | None, typer.Option(help='Item ids, oldest first: "id,id"; may be empty.')] = None,
    data: Annotated[Path | None, typer.Option(help="The data set of --user; unset: the adapter's.")] = None,
    context: Context = None,
    where: Annotated[str | None, typer.Option(help="Only items where it holds: \"market = 'DE'\".")] = None,
    prompt: Annotated[Path | None, typer.Option(help="Another prompt file than the adapter's own.")] = None,
    untrained: Annotated[
        bool, typer.Option("--untrained", help="Read --prompt even where the adapter was not trained with it.")
    ] = False,
    k: Annotated[int, typer.Option("-k", help="Items.")] = 10,
    engine: EngineName = "local",
    device: Device = "cpu",
    dtype: Dtype = "float32",
    json_: Json = False,
) -> None:
    """The best items for one user or history."""
    from genrec.recommender import Recommender

    if (user is None) == (history is None):
        raise ConfigError("recommend takes one of --user and --history.")
    recommender = Recommender.load(
        adapter, engine=engine, device=device, dtype=dtype, prompt=prompt, untrained=untrained
    )
    items, row = recommender.user_history(user, data) if user is not None else (item_ids(history or ""), None)
    found = recommender.recommend([items], k, users=[row], contexts=[context_of(context)], where=where)[0]
    if found.reason is not None:
        progress.say(f"{len(found)} items instead of {k}: {found.reason}")
    if recommender.not_as_trained:
        progress.say(f"not as trained: {adapter} was trained with another prompt than {prompt}")
    if json_:
        print_json([asdict(item) for item in found])
    else:
        rows = [[item.rank, item.item_id, item.title, f"{item.score:.3f}"] for item in found]
        print_table(f"after {len(items)} items", ["rank", "item", "title", "score"], rows, right=(0, 3))
