"""`genrec recommend`: the items of one user or history."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from genrec import progress
from genrec.cli.options import (
    Allowed,
    Blocked,
    Context,
    Device,
    Dtype,
    EngineName,
    Json,
    KeepSeen,
    NumBeams,
    PromptFile,
    Untrained,
    Where,
    context_of,
    history_of,
    item_ids,
)
from genrec.cli.output import print_json, print_table
from genrec.errors import ConfigError


def recommend(
    adapter: Annotated[Path, typer.Argument(help="An adapter folder.")],
    user: Annotated[str | None, typer.Option(help="A user of the data set, with the whole history.")] = None,
    history: Annotated[str | None, typer.Option(help='Item ids, oldest first: "id,id"; may be empty.')] = None,
    data: Annotated[Path | None, typer.Option(help="The data set of --user; unset: the adapter's.")] = None,
    context: Context = None,
    k: Annotated[int, typer.Option("-k", help="Items of the list.")] = 10,
    num_beams: NumBeams = None,
    where: Where = None,
    allowed: Allowed = None,
    blocked: Blocked = None,
    keep_seen: KeepSeen = False,
    prompt: PromptFile = None,
    untrained: Untrained = False,
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
    items, row = history_of(recommender, user, history, data)
    found = recommender.recommend(
        [items], k, users=[row], contexts=[context_of(context, recommender.adapter.prompt)], num_beams=num_beams,
        exclude_seen=False if keep_seen else None, where=where,
        allowed=None if allowed is None else item_ids(allowed),
        blocked=None if blocked is None else item_ids(blocked),
    )[0]  # fmt: skip
    if found.reason is not None:
        progress.say(f"{len(found)} items instead of {k}: {found.reason}")
    if recommender.not_as_trained:
        progress.say(f"not as trained: {adapter} was trained with another prompt than {prompt}")
    if json_:
        print_json([asdict(item) for item in found])
    else:
        rows = [[item.rank, item.item_id, item.title, f"{item.score:.3f}"] for item in found]
        title = f"after {len(items)} item{'' if len(items) == 1 else 's'}"
        print_table(title, ["rank", "item", "title", "score"], rows, right=(0, 3))
