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

if TYPE_CHECKING:
    from genrec.explanations import Explanation

_READ_AT_MOST = 600  # Characters of the prompt that the table shows at its beginning and at its end, together.


def why(
    adapter: Annotated[Path, typer.Argument(help="An adapter folder.")],
    item: Annotated[str, typer.Option(help="The item id asked about.")],
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
    out: Annotated[Path | None, typer.Option(help="A folder for why.png and why.json.")] = None,
    engine: EngineName = "local",
    device: Device = "cpu",
    dtype: Dtype = "float32",
    json_: Json = False,
) -> None:
    """Why an item is in a list, or is not: prompt, search level by level, exact rank, and what each event does."""
    from genrec.recommender import Recommender

    if (user is None) == (history is None):
        raise ConfigError("why takes one of --user and --history.")
    recommender = Recommender.load(
        adapter, engine=engine, device=device, dtype=dtype, prompt=prompt, untrained=untrained
    )
    items, row = history_of(recommender, user, history, data)
    found = recommender.why(
        items, item, user=row, context=context_of(context, recommender.adapter.prompt), k=k, num_beams=num_beams,
        exclude_seen=False if keep_seen else None, where=where,
        allowed=None if allowed is None else item_ids(allowed),
        blocked=None if blocked is None else item_ids(blocked),
    )  # fmt: skip
    if recommender.not_as_trained:
        progress.say(f"not as trained: {adapter} was trained with another prompt than {prompt}")
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
