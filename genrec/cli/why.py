"""`genrec why`: why an item is in the list of a user or history, or why it is not."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from genrec import files, progress
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

if TYPE_CHECKING:
    from genrec.explanations import Explanation

_READ_AT_MOST = 600  # Characters of the prompt that the table shows at its beginning and at its end, together.


def why(
    adapter: Annotated[Path, typer.Argument(help="An adapter folder.")],
    item: Annotated[str, typer.Option(help="The item id asked about.")],
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
    out: Annotated[Path | None, typer.Option(help="A folder for why.png and why.json.")] = None,
    engine: EngineName = "local",
    device: Device = "cpu",
    dtype: Dtype = "float32",
    json_: Json = False,
) -> None:
    """Why an item is in a list, or is not: prompt, search level by level, exact rank, and what each event does."""
    recommender, items, row = asked(
        "why", adapter, user, history, data,
        engine=engine, vllm=vllm, device=device, dtype=dtype, prompt=prompt, untrained=untrained,
    )  # fmt: skip
    found = recommender.why(
        items, item, user=row, context=context_of(context, recommender.adapter.prompt), k=k, num_beams=num_beams,
        **restrictions(where, allowed, blocked, keep_seen),
    )  # fmt: skip
    say_not_as_trained(recommender, prompt)
    told = {"answer": found.answer, **asdict(found)}
    if json_:
        print_json(told)
    else:
        _print(found)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        with files.new_file(out / "why.png") as temporary:
            temporary.write_bytes(found.picture())
        files.write_text(out / "why.json", json.dumps(told, indent=1, ensure_ascii=False) + "\n")
        progress.say(f"{out / 'why.png'}\n{out / 'why.json'}")


def _print(found: Explanation) -> None:
    print(found.answer)
    read = found.prompt.text
    if len(read) > _READ_AT_MOST:
        half = _READ_AT_MOST // 2
        read = f"{read[:half]} … {read[-half:]}"
    print(f"\nread ({found.prompt.budget}):\n{read}\n")
    steps = [
        [step.level, step.token, _number(step.score), _number(step.bar), "yes" if step.kept else "no"]
        for step in found.steps
    ]
    print_table("the search", ["level", "token", "score", "last beam", "kept"], steps, right=(0, 2, 3))
    events = [
        [event.item_id, event.title, "cut" if event.change is None else f"{event.change:+.3f}"]
        for event in found.events
    ]
    title = "the history, oldest first: the score's change when the event is left out (below 0: it speaks for the item)"
    print_table(title, ["item", "title", "change"], events, right=(2,))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
