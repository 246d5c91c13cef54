"""Options that several commands share, and the texts that they take."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from genrec.config import override
from genrec.errors import ConfigError

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there, once the new is complete.")]
Assignments = Annotated[list[str] | None, typer.Argument(help="Changes to the file: key=value, dotted keys allowed.")]
SplitName = Annotated[Literal["leave_one_out", "temporal"], typer.Option(help="Only its training part is read.")]
Device = Annotated[str, typer.Option(help="Where the model runs, as PyTorch names it: cpu, cuda, ...")]
Dtype = Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of the model's weights.")]
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


def context_of(given: list[str] | None) -> dict[str, Any] | None:
    """What ``--context key=value`` says, values as in TOML (a bare word is text); None where nothing was given."""
    return override({}, given) if given else None
