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
    History,
    HowVllm,
    Json,
    KeepSeen,
    NumBeams,
    PromptFile,
    Untrained,
    User,
    UsersData,
    Where,
    asked,
    context_of,
    restrictions,
    say_not_as_trained,
)
from genrec.cli.output import print_json, print_table


def recommend(
    adapter: Annotated[Path, typer.Argument(help="An adapter folder.")],
    vllm: HowVllm = None,
    user: User = None,
    history: History = None,
    data: UsersData = None,
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
    recommender, items, row = asked(
        "recommend", adapter, user, history, data,
        engine=engine, vllm=vllm, device=device, dtype=dtype, prompt=prompt, untrained=untrained,
    )  # fmt: skip
    found = recommender.recommend(
        [items], k, users=[row], contexts=[context_of(context, recommender.adapter.prompt)], num_beams=num_beams,
        **restrictions(where, allowed, blocked, keep_seen),
    )[0]  # fmt: skip
    if found.reason is not None:
        progress.say(f"{len(found)} items instead of {k}: {found.reason}")
    say_not_as_trained(recommender, prompt)
    if json_:
        print_json([asdict(item) for item in found])
    else:
        rows = [[item.rank, item.item_id, item.title, f"{item.score:.3f}"] for item in found]
        title = f"after {len(items)} item{'' if len(items) == 1 else 's'}"
        print_table(title, ["rank", "item", "title", "score"], rows, right=(0, 3))
