"""Options that several commands share, and the texts that they take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from genrec.config import override, suggestion
from genrec.errors import ConfigError, UnknownIdError

if TYPE_CHECKING:
    from genrec.prompts import Prompt
    from genrec.recommender import Recommender

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there, once the new is complete.")]
Assignments = Annotated[list[str] | None, typer.Argument(help="Changes to the file: key=value, dotted keys allowed.")]
SplitName = Annotated[Literal["leave_one_out", "temporal"], typer.Option(help="Only its training part is read.")]
Device = Annotated[str, typer.Option(help="Where the model runs, as PyTorch names it: cpu, cuda, ...")]
Dtype = Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of the model's weights.")]
NumBeams = Annotated[int | None, typer.Option(help="Beams of the search; unset: max(50, 2k).")]
Where = Annotated[str | None, typer.Option(help="Only items where it holds: \"market = 'DE'\".")]
Allowed = Annotated[str | None, typer.Option(help='Item ids that alone may come out: "id,id".')]
Blocked = Annotated[str | None, typer.Option(help='Item ids that may not come out: "id,id".')]
KeepSeen = Annotated[bool, typer.Option("--keep-seen", help="Items of the history may come out.")]
PromptFile = Annotated[Path | None, typer.Option(help="Another prompt file than the adapter's own.")]
Untrained = Annotated[
    bool, typer.Option("--untrained", help="Read --prompt even where the adapter was not trained with it.")
]
Context = Annotated[
    list[str] | None, typer.Option(help="What the prompt's head reads of the choice: hour=9; again for more.")
]
EngineName = Annotated[Literal["local", "dummy"], typer.Option(help="local; or dummy, pseudo-random items.")]


def pairs(given: list[str] | None, option: str) -> dict[str, str] | None:
    """What was given as ``ours=theirs``, by ours; None where nothing was. Raises ConfigError, naming the option."""
    found = {}
    for text in given or []:
        ours, equals, theirs = text.partition("=")
        if not equals or not ours or not theirs:
            raise ConfigError(f"{option} {text!r}: write ours=theirs, such as user_id=customer.")
        found[ours] = theirs
    return found or None


def item_ids(text: str) -> list[str]:
    """The item ids of a text such as "id, id"."""
    return [part.strip() for part in text.split(",") if part.strip()]


def history_of(
    recommender: Recommender, user: str | None, history: str | None, data: Path | None
) -> tuple[list[str], dict[str, Any] | None]:
    """What ``--user`` and ``--data``, or ``--history``, say: a history, and the columns of its user."""
    if user is None:
        return item_ids(history or ""), None
    try:
        return recommender.user_history(user, data)
    except UnknownIdError as error:
        raise UnknownIdError(f'{error} Or pass a history: --history "id,id"') from None


def context_of(given: list[str] | None, prompt: Prompt) -> dict[str, Any] | None:
    """What ``--context key=value`` says, values as in TOML (a bare word is text); None where nothing was given.

    Raises:
        ConfigError: No assignment, or a key that the prompt does not read, with the ones that it does.
    """
    if not given:
        return None
    context, reads = override({}, given, example="page=section"), prompt.reads["context"]
    for key in context.keys() - reads:
        hint = suggestion(key, reads) if reads else "It reads nothing of `context`: leave --context out."
        raise ConfigError(f"--context {key}: the prompt {prompt.name} does not read `context.{key}`. {hint}")
    return context
