"""Options that several commands share, and the texts that they take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from genrec import config, progress
from genrec.config import check_vllm_device, vllm_options
from genrec.errors import ConfigError, UnknownIdError, suggestion
from genrec.toml import override

if TYPE_CHECKING:
    from genrec.prompts import Prompt
    from genrec.recommender import Recommender

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there, once the new is complete.")]
Assignments = Annotated[list[str] | None, typer.Argument(help="Changes to the file: key=value, dotted keys allowed.")]
SplitName = Annotated[Literal["leave_one_out", "temporal"], typer.Option(help="Only its training part is read.")]
Device = Annotated[str, typer.Option(help="Where the model runs, as PyTorch names it: cpu, cuda, ...")]
Dtype = Annotated[config.Dtype, typer.Option(help="Of the model's weights.")]
User = Annotated[str | None, typer.Option(help="A user of the data set, with the whole history.")]
History = Annotated[str | None, typer.Option(help='Item ids, oldest first: "id,id"; may be empty.')]
UsersData = Annotated[Path | None, typer.Option(help="The data set of --user; unset: the adapter's.")]
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
EngineName = Annotated[
    Literal["local", "vllm", "dummy"], typer.Option(help="local, vllm; or dummy, pseudo-random items.")
]
HowVllm = Annotated[list[str] | None, typer.Argument(help="How vLLM runs: vllm.max_num_seqs=64, ...")]


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


def asked(
    command: str, adapter: Path, user: str | None, history: str | None, data: Path | None, *,
    engine: Literal["local", "vllm", "dummy"], vllm: list[str] | None, device: str, **options: Any,
) -> tuple[Recommender, list[str], dict[str, Any] | None]:  # fmt: skip
    """A recommender, loaded with ``options``, and what it is asked: a history, and the columns of its user.

    Raises:
        ConfigError: Not one of ``--user`` and ``--history``, as ``command`` takes.
        UnknownIdError: No such user.
    """
    if (user is None) == (history is None):
        raise ConfigError(f"{command} takes one of --user and --history.")
    how = vllm_options(engine, vllm or (), command)
    if engine == "vllm":
        check_vllm_device(device)
    from genrec.recommender import Recommender  # All that is wrong with the options is told before this loads PyTorch.

    recommender = Recommender.load(adapter, engine=engine, vllm=how, device=device, **options)
    if user is None:
        return recommender, item_ids(history or ""), None
    try:
        return recommender, *recommender.user_history(user, data)
    except UnknownIdError as error:
        raise UnknownIdError(f'{error} Or pass a history: --history "id,id"') from None


def restrictions(where: str | None, allowed: str | None, blocked: str | None, keep_seen: bool) -> dict[str, Any]:
    """The options of these names as arguments of ``Recommender.recommend`` and ``why``."""
    return {
        "where": where,
        "allowed": None if allowed is None else item_ids(allowed),
        "blocked": None if blocked is None else item_ids(blocked),
        "exclude_seen": False if keep_seen else None,
    }


def say_not_as_trained(recommender: Recommender, prompt: Path | None) -> None:
    """Say that ``--prompt`` is not what the adapter was trained with, where it is not."""
    if recommender.not_as_trained:
        progress.say(f"not as trained: {recommender.adapter.path} was trained with another prompt than {prompt}")


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
        if key in prompt.reads["user"]:
            hint = f"It reads `user.{key}`, a column of the users table: name somebody with --user."
        raise ConfigError(f"--context {key}: the prompt {prompt.name} does not read `context.{key}`. {hint}")
    return context
