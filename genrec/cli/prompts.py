"""`genrec prompts`: prompt files."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from genrec import progress
from genrec.cli.options import Context, Device, Json, context_of, item_ids
from genrec.cli.output import print_json, print_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from genrec.difference import Difference
    from genrec.rendering import Setting
    from genrec.tokenization import Span

AdapterFolder = Annotated[Path | None, typer.Option(help="An adapter folder: its tokenizer, identifiers and items.")]
DataFolder = Annotated[Path | None, typer.Option(help="A data set folder; unset: the adapter's.")]
BaseName = Annotated[str | None, typer.Option(help="Without an adapter, the base whose tokenizer reads --data.")]
MaxLength = Annotated[int | None, typer.Option(help="With --base, tokens of a row; unset: 256, as in a recipe.")]

_SHOWN = 60  # Characters of unchanged text that are shown beside a change.

app = typer.Typer(help="List, show, check, render, compare and begin prompts.", no_args_is_help=True)


@app.command("list")
def list_(
    folder: Annotated[Path, typer.Argument(help="The folder of prompts.")] = Path("prompts"), json_: Json = False
) -> None:
    """The prompts of a folder and of those below it, their kind and what they read."""
    from genrec.errors import PromptError
    from genrec.prompts import Prompt, list_prompts

    rows: list[dict[str, Any]] = []
    folders = [folder, *sorted(path for path in folder.rglob("*") if path.is_dir())]
    for path in (path for each in folders for path in list_prompts(each)):
        try:
            prompt = Prompt.load(path)
            reads = [f"{what}.{column}" for what, columns in sorted(prompt.reads.items()) for column in sorted(columns)]
            rows.append({"path": str(path), "kind": prompt.kind, "reads": reads, "problem": None})
        except PromptError as error:
            rows.append({"path": str(path), "kind": None, "reads": [], "problem": str(error)})
    if json_:
        print_json(rows)
    else:
        table = [[row["path"], row["kind"], ", ".join(row["reads"]), row["problem"]] for row in rows]
        print_table(str(folder), ["prompt", "kind", "reads", "problem"], table)


@app.command("show")
def show(path: Annotated[Path, typer.Argument(help="A prompt file.")]) -> None:
    """The text of a prompt file, once it is known to be a good one."""
    from genrec.prompts import Prompt

    print(Prompt.load(path).source, end="")


@app.command("new")
def new(
    path: Annotated[Path, typer.Argument(help="The file to write, such as prompts/mine.jinja.")],
    from_: Annotated[
        str, typer.Option("--from", help="A shipped prompt to begin with: next_item, shop/next_item, ...")
    ] = "next_item",
) -> None:
    """Write a prompt file to begin with, from a shipped one. A file that is there stays."""
    from genrec.quickstart import new_prompt

    print(new_prompt(path, from_))


@app.command("check")
def check_(
    paths: Annotated[list[Path], typer.Argument(help="Prompt files.")],
    adapter: AdapterFolder = None,
    data: Annotated[Path | None, typer.Option(help="A data set folder, whose columns they may read.")] = None,
    base: BaseName = None,
    max_length: MaxLength = None,
    json_: Json = False,
) -> None:
    """All problems of prompt files, with line, column and fix. Exit code 5 when there are any."""
    from genrec.prompts import check

    items = users = events = tokenization = None
    if adapter is not None or base is not None:
        from genrec.rendering import Setting

        setting = Setting.of(adapter, data=data, base=base, max_length=max_length)
        (items, users, events), tokenization = setting.columns, setting.tokenization
    elif data is not None:
        from genrec.dataset import Dataset

        items, users, events = Dataset.load(data).readable
    found = {str(path): check(path, items, users, events, tokenization=tokenization) for path in paths}
    if json_:
        print_json({path: [asdict(problem) for problem in problems] for path, problems in found.items()})
    else:
        unsaid = ""
        if items is None:
            unsaid = " (columns were not checked: name them with --data)"
        elif events is None:
            unsaid = " (columns of users and interactions were not checked: name them with --data)"
        elif tokenization is None:
            unsaid = " (whether it fits was not checked: add --adapter or --base)"
        for path, problems in found.items():
            for problem in problems:
                print(f"{path}:{problem}")
            if not problems:
                print(f"{path}: good{unsaid}")
    if any(found.values()):
        raise typer.Exit(5)


@app.command("render")
def render(
    path: Annotated[Path, typer.Argument(help="A prompt file.")],
    adapter: Annotated[
        Path | None, typer.Argument(help="An adapter folder: its tokenizer, identifiers and items.")
    ] = None,
    user: Annotated[str | None, typer.Option(help="A user of the data set.")] = None,
    history: Annotated[str | None, typer.Option(help='Item ids, oldest first: "id,id".')] = None,
    item: Annotated[str | None, typer.Option(help="The item of a question; unset: the last of the history.")] = None,
    context: Context = None,
    data: DataFolder = None,
    base: BaseName = None,
    max_length: MaxLength = None,
    json_: Json = False,
) -> None:
    """A prompt as the model reads it: its tokens by origin, the budget, what is cut, and what is trained."""
    from genrec.prompts import Prompt
    from genrec.rendering import Setting

    prompt = Prompt.load(path)
    setting = Setting.of(adapter, data=data, base=base, max_length=max_length)
    found = setting.render(
        prompt, user=user, history=None if history is None else item_ids(history), item=item,
        context=context_of(context, prompt),
    )  # fmt: skip
    _warn(setting, prompt, path)
    if json_:
        print_json(asdict(found))
        return
    _print_spans("read", found.read)
    if found.answer:
        _print_spans("trained" if found.kind == "question" else "next", found.answer)
    _print_legend()
    print(f"tokens: {found.budget}")
    count = sum(len(span.ids) for span in found.trained)
    what = 'the identifier of every item; with loss = "answer" that of the last alone'
    what = what if found.kind == "sequence" else "the answer"
    print(f"trained: {count} token{'' if count == 1 else 's'}, {what}")


@app.command("diff")
def diff(
    a: Annotated[Path, typer.Argument(help="A prompt file.")],
    b: Annotated[Path, typer.Argument(help="Another one.")],
    adapter: AdapterFolder = None,
    data: DataFolder = None,
    base: BaseName = None,
    max_length: MaxLength = None,
    users: Annotated[int, typer.Option(help="Users sampled, at most.")] = 100,
    show: Annotated[int, typer.Option(help="Of these, how many are shown.")] = 3,
    seed: Annotated[int, typer.Option(help="Of the sample.")] = 0,
    measure: Annotated[
        bool | None,
        typer.Option("--measure/--no-measure", help="Validation NDCG@10 with both; unset: where an adapter is given."),
    ] = None,
    device: Device = "cpu",
    json_: Json = False,
) -> None:
    """Two prompts side by side: rendered for sampled users, in tokens and, with an adapter, in validation NDCG@10."""
    from genrec.difference import difference

    found = difference(
        a, b, adapter, data=data, base=base, max_length=max_length, users=users, seed=seed, measured=measure,
        device=device,
    )  # fmt: skip
    if json_:
        print_json(asdict(found))
        return
    _print_difference(found, show)


def _warn(setting: Setting, prompt: Any, path: Path) -> None:
    if setting.columns[1] is None:
        progress.say(f"columns of users and interactions were not checked: no data set at {setting.data}. Name --data.")
    for problem in setting.problems(prompt):
        progress.say(f"{path}:{problem}")


def _print_spans(title: str, spans: Sequence[Span]) -> None:
    from rich.console import Console
    from rich.text import Text

    from genrec.rendering import COLOURS

    text = Text.assemble((f"{title}: ", "bold"), *((span.text, COLOURS[span.kind]) for span in spans))
    Console(highlight=False, soft_wrap=True).print(text)


def _print_legend() -> None:
    """Which colour is which, where there are colours."""
    from rich.console import Console
    from rich.text import Text

    from genrec.rendering import COLOURS

    console = Console(highlight=False, soft_wrap=True)
    if console.is_terminal:
        legend = [part for kind, colour in COLOURS.items() for part in (" ", (kind, colour))]
        console.print(Text.assemble("colours:", *legend))


def _print_difference(found: Difference, show: int) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for pair in found.pairs[:show]:
        text = Text.assemble((f"user {pair.user_id}: ", "bold"))
        for kind, words in pair.pieces(_SHOWN):
            if kind == "same":
                text.append(words)
            else:  # Signs too, for those who see no colours.
                text.append(
                    f"[-{words}-]" if kind == "removed" else f"{{+{words}+}}", "red" if kind == "removed" else "green"
                )
        console.print(text)
    rows = [
        [name, f"{told['a']:.1f}", f"{told['b']:.1f}", f"{told['change']:+.1f}"] for name, told in found.tokens.items()
    ]
    print_table(f"tokens, means of {len(found.pairs)} users", ["", found.a, found.b, "change"], rows, right=(1, 2, 3))
    for note in found.notes:
        print(note)
    if found.same_contract:
        print("the model sees the same in both: an adapter trained with one takes the other")
    if (ndcg := found.ndcg) is not None:
        marks = {side: " (not as trained)" if side in found.not_as_trained else "" for side in "ab"}
        print(
            f"validation NDCG@10 over {ndcg['cases']} cases: {ndcg['a']:.4f}{marks['a']} -> {ndcg['b']:.4f}{marks['b']}"
            f", change {ndcg['change']:+.4f} [{ndcg['low']:+.4f}, {ndcg['high']:+.4f}]"
        )
