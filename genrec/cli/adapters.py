"""`genrec train`, `update` and `export`: adapters made, taken on, and written for other programs."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from genrec import config, progress
from genrec.cli.options import Assignments, Json, Overwrite, pairs
from genrec.cli.output import print_json, print_table
from genrec.errors import ConfigError


def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe, such as adapters/shop.toml.")],
    assignments: Assignments = None,
    name: Annotated[str | None, typer.Option(help="Of the adapter; unset: the recipe's.")] = None,
    overwrite: Overwrite = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where this run was interrupted.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write nothing; say what the run would take.")] = False,
    json_: Json = False,
) -> None:
    """Train as a recipe says; writes adapters/NAME, where NAME is the recipe's or that of --name."""
    from genrec.adapter import Adapter
    from genrec.training import estimate, is_main
    from genrec.training import train as run

    if dry_run:
        found = estimate(recipe, name=name, assignments=assignments or [])
        if is_main() and json_:
            print_json(asdict(found))
        elif is_main():
            print_table(f"genrec train {recipe}", ["", ""], found.table())
        return
    made = run(recipe, name=name, assignments=assignments or [], overwrite=overwrite, resume=resume)
    out = Path(os.path.relpath(made))
    if not is_main():  # Of several processes one speaks.
        return
    manifest = Adapter.load(out).manifest
    kept = manifest["kept"]
    if json_:
        print_json({"adapter": str(out), "kept": kept})
    else:
        print(out)
        told = f"NDCG@10 {kept['ndcg@10']:.4f}, recall@10 {kept['recall@10']:.4f}"
        print(f"kept step {kept['step']}: validation {told}")
        print(f"learning curve: {out / 'learning_curve.png'}")
    if not kept["step"]:
        progress.say(
            "No validation was better than that of the weights that training began with, so these were kept: the "
            "adapter holds nothing of this run, nor of its other tasks. Train longer, or with another "
            "training.learning_rate."
            + (" Its first epochs were walks alone (walks.alone)." if manifest["recipe"]["walks"]["alone"] else "")
        )


def update(
    adapter: Annotated[Path, typer.Argument(help="An adapter folder.")],
    interactions: Annotated[list[Path], typer.Option(help="A log of what came since, as `genrec data import` reads.")],
    assignments: Annotated[
        list[str] | None, typer.Argument(help="Changes to the adapter's recipe: key=value, dotted keys allowed.")
    ] = None,
    items: Annotated[Path | None, typer.Option(help="New items, and new cells of known ones.")] = None,
    users: Annotated[Path | None, typer.Option(help="The same of the users table.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the new adapter; unset: the old one's with -updated.")] = None,
    data_out: Annotated[
        str | None, typer.Option(help="The data set of both logs to write; unset: the old one's with -updated.")
    ] = None,
    replay: Annotated[float, typer.Option(help="Rows of old events per row of new ones.")] = 0.5,
    cases: Annotated[int, typer.Option(help="Cases of each period that are measured, at most (0: all).")] = 1000,
    format_: Annotated[str | None, typer.Option("--format", help="Of the files; unset: by their names.")] = None,
    column: Annotated[list[str] | None, typer.Option(help="Of the log: ours=theirs, such as user_id=customer.")] = None,
    item_column: Annotated[list[str] | None, typer.Option(help="Of the items: ours=theirs.")] = None,
    user_column: Annotated[list[str] | None, typer.Option(help="Of the users: ours=theirs.")] = None,
    on_bad_row: Annotated[Literal["fail", "skip"], typer.Option(help="Stop at them, or save and skip them.")] = "fail",
    overwrite: Overwrite = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where this update was interrupted.")] = False,
    json_: Json = False,
) -> None:
    """Train an adapter on with interactions and items that came later; says what it gained and what it forgot."""
    from genrec.adapter import Adapter
    from genrec.update import table
    from genrec.update import update as run

    made = run(
        adapter, interactions, items, users,
        name=name, data_out=data_out, assignments=assignments or [], replay=replay, cases=cases,
        overwrite=overwrite, resume=resume, format=format_, columns=pairs(column, "--column"),
        item_columns=pairs(item_column, "--item-column"), user_columns=pairs(user_column, "--user-column"),
        on_bad_row=on_bad_row,
    )  # fmt: skip
    out = Path(os.path.relpath(made))
    manifest = Adapter.load(out).manifest
    told = manifest["update"]
    if json_:
        print_json({"adapter": str(out), "data": manifest["data"]["path"], "kept": manifest["kept"], "update": told})
        return
    columns, rows = table(told)
    print_table(f"{told['adapter']} -> {out.name} (95% intervals)", columns, rows, right=tuple(range(2, len(columns))))
    for note in told["notes"]:
        print(note)
    kept = manifest["kept"]
    print(f"kept step {kept['step']}: validation NDCG@10 {kept['ndcg@10']:.4f}, recall@10 {kept['recall@10']:.4f}")
    print(f"data set: {manifest['data']['path']}")
    print(out)


def export(
    adapter: Annotated[Path, typer.Argument(help="An adapter folder; with --check any that PEFT wrote.")],
    out: Annotated[Path | None, typer.Argument(help="The folder to write.")] = None,
    to: Annotated[
        Literal["vllm", "merged"] | None, typer.Option(help="vllm: a base and a LoRA beside it; merged: one model.")
    ] = None,
    name: Annotated[str, typer.Option(help="Of vllm, the folder of the LoRA in OUT.")] = "adapter",
    dtype: Annotated[config.Dtype | None, typer.Option(help="Of the model's weights; unset: the recipe's.")] = None,
    data: Annotated[Path | None, typer.Option(help="The data set of --measure; unset: the adapter's.")] = None,
    measure: Annotated[
        bool | None,
        typer.Option("--measure/--no-measure", help="Validate again what was written; unset: where tuning is qlora."),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Say what vLLM would not load; write nothing.")] = False,
    overwrite: Overwrite = False,
    json_: Json = False,
) -> None:
    """Write an adapter for other programs: a Hugging Face checkpoint, or a base and a LoRA for vLLM and PEFT."""
    from genrec.export import export as run
    from genrec.vllm_files import check_vllm

    if check:
        problems = check_vllm(adapter)
        if json_:
            print_json({"adapter": str(adapter), "problems": problems})
        else:
            print("\n".join(problems) or f"{adapter}: good")
        raise typer.Exit(7 if problems else 0)
    if out is None or to is None:
        raise ConfigError("export takes a folder to write and a form: genrec export ADAPTER --to vllm|merged OUT")
    done = run(adapter, out, to=to, name=name, dtype=dtype, data=data, measured=measure, overwrite=overwrite)
    if json_:
        print_json({"model": str(done.model), "lora": done.lora and str(done.lora), **done.table})
        return
    print(f"{done.model}{' (was there)' if done.reused else ''}")
    if done.lora:
        print(done.lora)
    if figures := done.table["ndcg@10"]:
        told = "trained {trained:.4f}, exported {exported:.4f}, change {change:+.4f}".format(**figures)
        print(f"validation NDCG@10: {told}")
    if done.lora:
        rank = done.table["max_lora_rank"]
        serve = f"--enable-lora --lora-modules {done.lora.name}={done.lora} --max-lora-rank {rank}"
        print(f"vllm serve {done.model} {serve}")
    elif to == "vllm":
        print(f"vllm serve {done.model}")
