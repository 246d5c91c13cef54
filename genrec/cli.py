"""The command line: one command is one call of one function. Results on standard output, the rest on standard error."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from genrec import __version__, progress
from genrec.benchmarks import commands
from genrec.errors import ConfigError, GateError, GenrecError, StorageError

if TYPE_CHECKING:
    from rich.table import Table

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there, once the new is complete.")]
Assignments = Annotated[list[str] | None, typer.Argument(help="Changes to the file: key=value, dotted keys allowed.")]
SplitName = Annotated[Literal["leave_one_out", "temporal"], typer.Option(help="Only its training part is read.")]
Device = Annotated[str, typer.Option(help="Where the model runs, as PyTorch names it: cpu, cuda, ...")]
Dtype = Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of the model's weights.")]
EngineName = Annotated[Literal["local", "dummy"], typer.Option(help="local; or dummy, pseudo-random items.")]

app = typer.Typer(
    name="genrec",
    help="An interaction log and a catalogue in, a generative recommender out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="Exit codes: 0 done, 1 other error, 2 wrong usage, 3 configuration, 4 data, 5 prompt, 6 identifiers, "
    "7 adapter or base, 8 decoding, 9 storage, 10 too far from the output before, 130 interrupted.",
)
data_app = typer.Typer(help="Fetch, import, export and inspect data sets.", no_args_is_help=True)
ids_app = typer.Typer(help="Build and inspect identifiers.", no_args_is_help=True)
base_app = typer.Typer(help="Make small bases.", no_args_is_help=True)
prompts_app = typer.Typer(help="List, show, check and render prompts.", no_args_is_help=True)


def _print_bench(done: Any) -> None:
    """What a command of `genrec bench` returned: its report, whether as JSON, and the files written."""
    report, as_json, written = done
    if as_json:
        _print_json(asdict(report))
    else:
        columns = ["part", "setting", "what", "value", "", "n", "goal", ""]
        _print_table(f"genrec bench {report.name}", columns, report.table(), right=(3, 5))
        print(report.told())
    for path in written:
        progress.say(str(path))
    if not report.agrees:
        progress.say("the sides of a comparison give different items: see the rows of places that differ")
        raise typer.Exit(8)


bench_app = typer.Typer(
    help="Measure decoding, tries, training and accuracy here.", no_args_is_help=True, result_callback=_print_bench
)
for name, part in (
    ("data", data_app),
    ("ids", ids_app),
    ("base", base_app),
    ("prompts", prompts_app),
    ("bench", bench_app),
):
    app.add_typer(part, name=name)


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", help="Print the version and stop.", callback=_version, is_eager=True)
]


@app.callback()
def _main(
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on standard error.")] = False,
    version: Version = False,
) -> None:
    progress.quiet = quiet


def main() -> None:
    """The console script: errors that a user can cause become one message and their exit code."""
    try:
        app()
    except GenrecError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:  # Of standard output itself; files raise StorageError.
        print(f"error: {error}", file=sys.stderr)
        sys.exit(StorageError.exit_code)
    except SystemExit as stop:
        if stop.code == 130:
            print("interrupted; nothing was left half-written, and the same command starts again.", file=sys.stderr)
        raise


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, ensure_ascii=False, default=str))


def _print_table(title: str, columns: list[str], rows: list[list[Any]], right: tuple[int, ...] = ()) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable

    table: Table = RichTable(show_header=any(columns))
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row))
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = 100_000  # What is piped takes the width that it needs; nothing is folded.
    console.print(title, style="bold")  # Not the table's own, which is folded to the width of its columns.
    console.print(table)


def _pairs(given: list[str] | None, option: str) -> dict[str, str] | None:
    pairs = {}
    for text in given or []:
        ours, equals, theirs = text.partition("=")
        if not equals or not ours or not theirs:
            raise ConfigError(f"{option} {text!r}: write ours=theirs, such as user_id=customer.")
        pairs[ours] = theirs
    return pairs or None


def _print_report(title: str, rows: dict[str, dict[str, dict[str, float]]]) -> None:
    from genrec.report.numbers import cell, headline

    k = headline(rows)
    shown = [f"recall@{k}", f"ndcg@{k}", f"coverage@{k}"]  # With intervals, more would not fit 80 columns.
    table = [[name, *(cell(row[metric]) for metric in shown)] for name, row in rows.items()]
    _print_table(title, ["", *shown], table, right=tuple(range(1, len(shown) + 1)))


def _print_tests(tests: list[dict[str, Any]]) -> None:
    """One line a test: who is ahead, by how much, and how sure that is."""
    from genrec.report.numbers import significant

    for test in tests:
        names, values = (test["a"], test["b"]), (test["difference"], test["low"], test["high"])
        if test["difference"] < 0:
            names, values = names[::-1], (-test["difference"], -test["high"], -test["low"])
        more, low, high = values
        told = "beats" if significant(test) else "is ahead of, but cannot be told from," if more else "does as well as"
        metric, p = test["metric"], test["p_holm"]
        print(f"{names[0]} {told} {names[1]}: {metric} {more:+.4f} [{low:+.4f}, {high:+.4f}], Holm-corrected p {p:.4f}")


@app.command()
def quickstart(
    workspace: Annotated[Path, typer.Option(help="Where prompts/, adapters/, eval/ and data/ are.")] = Path(),
    json_: Json = False,
) -> None:
    """The whole flow on MovieLens-100K, with a table and pictures at the end."""
    from genrec.quickstart import NAME, run

    result = run(workspace)
    if json_:
        _print_json(asdict(result))
        return
    protocol = result.report["protocol"]
    print()
    _print_report(
        f"MovieLens-100K, leave-one-out, {protocol['cases']} users, all {protocol['catalogue']} items ranked, seen "
        "items left out (95% intervals)",
        result.report["rows"],
    )
    for example in result.examples:
        print()
        pairs = [[*pair] for pair in zip_longest(example["history"], example["recommended"])]
        title = f"user {example['user_id']}, after {example['events']} films"
        _print_table(title, ["the last ones", "recommended"], pairs)
    print()
    stages = [
        [name, f"{seconds:.1f}", "reused" if name in result.reused else ""] for name, seconds in result.seconds.items()
    ]
    total = sum(result.seconds.values())
    _print_table("seconds per stage", ["stage", "seconds", ""], [*stages, ["all", f"{total:.1f}", ""]], right=(1,))
    assert result.batch is not None
    print(f"\nlists of all {result.batch.users} users: {result.batch.out}/*.parquet")
    print(f"report: {workspace / 'eval' / 'results' / NAME}.md")
    for curve in result.curves:
        print(f"learning curve: {curve}")
    print(
        "\nnext:\n"
        f"  genrec recommend adapters/{NAME} --user 42 -k 5 --json\n"
        f"  genrec prompts render prompts/next_item.jinja adapters/{NAME} --user 42\n"
        f"  genrec eval eval/{NAME}.toml\n"
        "  docs/own-data.md: the same with your own log in ten minutes"
    )


@app.command()
def init(folder: Annotated[Path, typer.Argument(help="The workspace to make.")]) -> None:
    """Make a workspace: the shipped prompts, recipes and specs. What is there already stays."""
    from genrec.quickstart import init as make

    written = make(folder)
    for path in written:
        print(path)
    progress.say(f"{len(written)} files written. Next: cd {folder}, then `genrec quickstart`, or `genrec data import`.")


@app.command()
def doctor(json_: Json = False) -> None:
    """What is installed, what works here, what to install for the rest. Exit code 1 when something is missing."""
    from genrec.doctor import examine

    found = examine(Path.cwd())
    if json_:
        _print_json([asdict(finding) for finding in found])
    else:
        rows = [["ok" if f.ok else "MISSING" if f.needed else "-", f.name, f.found, f.advice] for f in found]
        _print_table("genrec doctor", ["", "what", "found", "advice"], rows)
    if any(finding.needed and not finding.ok for finding in found):
        raise typer.Exit(1)


@data_app.command("fetch")
def data_fetch(
    name: Annotated[str, typer.Argument(help="movielens-100k")],
    cache: Annotated[Path, typer.Option(help="Where the download is kept.")] = Path("data/cache"),
) -> None:
    """Download a public data set; prints the folder to import."""
    from genrec.readers import fetch

    print(fetch(name, cache))


@data_app.command("import")
def data_import(
    out: Annotated[Path, typer.Option(help="The data set folder to write, such as data/shop.")],
    paths: Annotated[list[Path] | None, typer.Argument(help="A folder, or a log, items… and users… files.")] = None,
    format_: Annotated[str | None, typer.Option("--format", help="Such as amazon; unset: what files show.")] = None,
    interactions: Annotated[list[Path] | None, typer.Option(help="A log, whatever its name.")] = None,
    items: Annotated[Path | None, typer.Option(help="The catalogue, whatever its name.")] = None,
    users: Annotated[Path | None, typer.Option(help="The users table, whatever its name.")] = None,
    column: Annotated[list[str] | None, typer.Option(help="Of the log: ours=theirs, such as user_id=customer.")] = None,
    item_column: Annotated[list[str] | None, typer.Option(help="Of the catalogue: ours=theirs.")] = None,
    user_column: Annotated[list[str] | None, typer.Option(help="Of the users table: ours=theirs.")] = None,
    min_rating: Annotated[float | None, typer.Option(help="Only ratings from here on count.")] = None,
    event: Annotated[list[str] | None, typer.Option(help="A positive event, or event=weight; no others.")] = None,
    keep_seen: Annotated[bool, typer.Option(help="Items may be taken again: leave out none of a history.")] = False,
    core: Annotated[int, typer.Option(help="Keep users and items with at least so many interactions.")] = 0,
    on_bad_row: Annotated[Literal["fail", "skip"], typer.Option(help="Stop at them, or save and skip them.")] = "fail",
    all_items: Annotated[bool, typer.Option(help="Of Amazon's metadata, items without reviews too.")] = False,
    name: Annotated[str | None, typer.Option(help="Of the data set; unset: the name of the folder.")] = None,
    overwrite: Overwrite = False,
    json_: Json = False,
) -> None:
    """Import a log, a catalogue and a users table as a data set folder."""
    from genrec.readers import import_files

    events: Any = None
    if event:
        events = {}
        for text in event:
            kind, _, weight = text.partition("=")
            try:
                events[kind] = float(weight) if weight else 1.0
            except ValueError:
                raise ConfigError(f"--event {text!r}: the weight after = is no number.") from None
    data = import_files(
        paths or (),
        format=format_,
        interactions=interactions,
        items=items,
        users=users,
        columns=_pairs(column, "--column"),
        item_columns=_pairs(item_column, "--item-column"),
        user_columns=_pairs(user_column, "--user-column"),
        min_rating=min_rating,
        events=events,
        exclude_seen=not keep_seen,
        name=name or out.name,
        on_bad_row=on_bad_row,
        all_items=all_items,
    )
    if core:
        data = data.k_core(core, core)
    data.save(out, overwrite=overwrite)
    _print_summary(str(out), data.summary(), json_)


@data_app.command("export")
def data_export(
    data: Annotated[Path, typer.Argument(help="A data set folder.")],
    out: Annotated[Path, typer.Argument(help="The folder to write; its files are called as it is.")],
    to: Annotated[Literal["recbole"], typer.Option(help="recbole: its atomic files (.inter, .item, .user).")],
    overwrite: Overwrite = False,
    json_: Json = False,
) -> None:
    """Write a data set in another library's format, and say what that cannot carry."""
    from genrec.dataset import Dataset
    from genrec.readers import export_recbole

    lost = export_recbole(Dataset.load(data), out, overwrite=overwrite)
    written = sorted(str(path) for path in out.iterdir())
    if json_:
        _print_json({"files": written, "lost": lost})
    else:
        print(*written, *(f"not carried: {loss}" for loss in lost), sep="\n")


@data_app.command("inspect")
def data_inspect(path: Annotated[Path, typer.Argument(help="A data set folder.")], json_: Json = False) -> None:
    """Counts, sparsity, duplicates, ties, time range, titles missing, cold items."""
    from genrec.dataset import Dataset

    _print_summary(str(path), Dataset.load(path).summary(), json_)


def _print_summary(title: str, summary: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _print_json(summary)
        return
    rows = []
    for key, value in summary.items():
        if isinstance(value, dict):
            value = ", ".join(f"{inner}: {_number(found)}" for inner, found in value.items())
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        rows.append([key.replace("_", " "), _number(value)])
    _print_table(title, ["", ""], rows)


def _number(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


@ids_app.command("build")
def ids_build(
    data: Annotated[Path, typer.Argument(help="A data set folder.")],
    out: Annotated[Path, typer.Option(help="The file to write, such as data/shop-identifiers.parquet.")],
    scheme: Annotated[str, typer.Option(help="atomic, semantic, title or random.")] = "atomic",
    base: Annotated[str | None, typer.Option(help="The base whose tokens spell the titles, of title.")] = None,
    levels: Annotated[int, typer.Option(help="Codes per identifier, of semantic and random.")] = 3,
    codes: Annotated[int, typer.Option(help="Different codes per level, of semantic and random.")] = 256,
    split: SplitName = "leave_one_out",
    ties: Annotated[Literal["file", "shuffled"], typer.Option(help="Order within equal timestamps.")] = "file",
    dimensions: Annotated[int, typer.Option("--features", help="Dimensions of the text vectors.")] = 64,
    split_seed: Annotated[int, typer.Option(help="Of shuffled ties.")] = 0,
    seed: Annotated[int, typer.Option(help="Of features and clusters.")] = 0,
) -> None:
    """Give every item an identifier. A recipe uses the file by identifiers.file."""
    from genrec.identification import build_identifiers

    sizes = {"levels": levels, "codes": codes, "dimensions": dimensions}
    made = build_identifiers(data, scheme, base=base, split=split, ties=ties, split_seed=split_seed, seed=seed, **sizes)
    made.save(out)
    print(out)


@ids_app.command("inspect")
def ids_inspect(
    path: Annotated[Path, typer.Argument(help="An identifiers file, or an adapter folder.")],
    item: Annotated[list[str] | None, typer.Option(help="Show the identifiers of these items.")] = None,
    json_: Json = False,
) -> None:
    """Scheme, tokens per item, and how the items spread over the first codes."""
    from genrec.identifiers import Identifiers

    found = Identifiers.load(path / "identifiers.parquet" if path.is_dir() else path)
    _print_summary(str(path), found.summary(item or []), json_)


@base_app.command("create")
def base_create(
    data: Annotated[Path, typer.Argument(help="A data set folder; its titles train the tokenizer.")],
    out: Annotated[Path, typer.Option(help="The folder to write, such as adapters/small-random.")],
    vocabulary: Annotated[int, typer.Option(help="Tokens of the tokenizer, at most.")] = 2000,
    width: Annotated[int, typer.Option(help="Hidden size.")] = 64,
    layers: Annotated[int, typer.Option(help="Depth.")] = 2,
    heads: Annotated[int, typer.Option(help="Attention heads per layer.")] = 2,
    context: Annotated[int, typer.Option(help="The longest sequence of tokens.")] = 1024,
    seed: Annotated[int, typer.Option(help="Of the random weights.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Make a small language model with random weights, and its tokenizer, to be pretrained by `genrec train`."""
    from genrec.base import create
    from genrec.dataset import Dataset

    texts = Dataset.load(data).items["title"].to_list()
    sizes: dict[str, int] = {"vocabulary": vocabulary, "width": width, "layers": layers, "heads": heads}
    print(create(texts, out, **sizes, context=context, seed=seed, overwrite=overwrite))


@app.command()
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
            _print_json(asdict(found))
        elif is_main():
            _print_table(f"genrec train {recipe}", ["", ""], found.table())
        return
    made = run(recipe, name=name, assignments=assignments or [], overwrite=overwrite, resume=resume)
    out = Path(os.path.relpath(made))
    if not is_main():  # Of several processes one speaks.
        return
    kept = Adapter.load(out).manifest["kept"]
    if json_:
        _print_json({"adapter": str(out), "kept": kept})
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
        )


@app.command()
def recommend(
    adapter: Annotated[Path, typer.Argument(help="An adapter folder.")],
    user: Annotated[str | None, typer.Option(help="A user of the data set, with the whole history.")] = None,
    history: Annotated[str | None, typer.Option(help='Item ids, oldest first: "id,id"; may be empty.')] = None,
    data: Annotated[Path | None, typer.Option(help="The data set of --user; unset: the adapter's.")] = None,
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
    recommender = Recommender.load(adapter, engine=engine, device=device, dtype=dtype)
    items, row = recommender.user_history(user, data) if user is not None else (_ids(history or ""), None)
    found = recommender.recommend([items], k, users=[row])[0]
    if len(found) < k:
        reason = recommender.search([recommender.indices(items)], k, users=[row]).reasons[0]
        progress.say(f"{len(found)} items instead of {k}: {reason}")
    if json_:
        _print_json([asdict(item) for item in found])
    else:
        rows = [[item.rank, item.item_id, item.title, f"{item.score:.3f}"] for item in found]
        _print_table(f"after {len(items)} items", ["rank", "item", "title", "score"], rows, right=(0, 3))


def _ids(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


@app.command("batch")
def batch_(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ADAPTER] [KEY=VALUE]...", help="An adapter folder; keys of a job: max_events=500."),
    ] = None,
    users: Annotated[str | None, typer.Option(help="user_id, history, ...: a file, or a data set folder.")] = None,
    out: Annotated[str | None, typer.Option(help="The output folder.")] = None,
    k: Annotated[int | None, typer.Option("-k", help="Items per user; unset: 20.")] = None,
    where: Annotated[
        str | None, typer.Option(help="Only items where it holds: \"market = 'DE' AND stock > 0\".")
    ] = None,
    items: Annotated[str | None, typer.Option(help="Today's item columns, by item_id; others are retired.")] = None,
    shard_size: Annotated[int | None, typer.Option(help="Users per Parquet file; unset: 4096.")] = None,
    job: Annotated[Path | None, typer.Option(help="A TOML file with keys of a job; flags go before it.")] = None,
    previous: Annotated[str | None, typer.Option(help="An output whose unchanged users are carried over.")] = None,
    compare: Annotated[str | None, typer.Option(help="An output to compare with; thresholds.max_churn=0.5 ...")] = None,
    runner: Annotated[Literal["local", "ray"] | None, typer.Option(help="This process, or Ray.")] = None,
    workers: Annotated[int | None, typer.Option(help="Of Ray.")] = None,
    engine: Annotated[Literal["local", "dummy"] | None, typer.Option(help="dummy: pseudo-random items.")] = None,
    device: Annotated[str | None, typer.Option(help="Where the model runs, as PyTorch names it.")] = None,
    dtype: Annotated[Literal["float32", "bfloat16"] | None, typer.Option(help="Of the model's weights.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write nothing; say what the job would take.")] = False,
    json_: Json = False,
) -> None:
    """Recommend for all users of a table; started again, it goes on with the shards that are missing."""
    from genrec import batch
    from genrec.config import load_job

    flags = {
        "users": users, "out": out, "k": k, "where": where, "items": items, "shard_size": shard_size,
        "previous": previous, "compare": compare, "runner": runner, "workers": workers, "engine": engine,
        "device": device, "dtype": dtype,
    }  # fmt: skip
    assignments = list(arguments or [])
    if assignments and "=" not in assignments[0]:
        flags["adapter"] = assignments.pop(0)
    told = load_job(job, {key: value for key, value in flags.items() if value is not None}, assignments)
    if dry_run:
        found = batch.estimate(told)
        _print_summary(f"genrec batch, {found.sample} of {found.rows:,} rows timed", asdict(found), json_)
        return
    done = batch.run(told)
    if json_:
        _print_json(asdict(done))
    else:
        print(*batch.report(done, told), sep="\n")
        if done.churn is not None:
            _print_summary(f"beside {told.compare}", asdict(done.churn), False)
    if done.problems:
        raise GateError(batch.refusal(done))


@app.command()
def verify(out: Annotated[Path, typer.Argument(help="An output folder of a job.")], json_: Json = False) -> None:
    """Check every byte of a batch job's output. Exit code 9 where any is changed, missing or foreign."""
    from genrec.batch.output import verify as check

    found = check(out)
    _print_summary(f"{out}: whole", asdict(found), json_)


@app.command()
def publish(
    link: Annotated[Path, typer.Option(help="The symbolic link that readers follow, such as recommendations/current.")],
    out: Annotated[Path | None, typer.Argument(help="An output folder of a job.")] = None,
    back: Annotated[bool, typer.Option("--back", help="Let the link lead again to where it led before.")] = False,
    json_: Json = False,
) -> None:
    """Verify a batch job's output and move a link to it, in one rename; or move it back."""
    from genrec.batch import publication

    if (out is None) != back:
        raise ConfigError("publish takes one of DIR and --back: genrec publish DIR --link LINK")
    if out is None:
        publication.publish_back(link)
    else:
        publication.publish(out, link)
    if json_:
        _print_json({"link": str(link), "target": os.readlink(link)})
    else:
        print(f"{link} -> {os.readlink(link)}")


@app.command("eval")
def eval_(
    spec: Annotated[Path | None, typer.Argument(help="A spec, such as eval/shop.toml.")] = None,
    assignments: Assignments = None,
    name: Annotated[str | None, typer.Option(help="Of the report; unset: the spec's.")] = None,
    against: Annotated[
        list[Path] | None,
        typer.Option(help="Lists from elsewhere, to score beside: Parquet or CSV with user_id, rank, item_id."),
    ] = None,
    tune_baselines: Annotated[
        bool, typer.Option("--tune-baselines", help="Choose the baselines' options on validation first, and keep them.")
    ] = False,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(help="Two reports or specs that were evaluated, to test against each other."),
    ] = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    json_: Json = False,
) -> None:
    """Evaluate adapters, baselines and other lists on one split; the report goes to eval/results/."""
    from genrec.report import Report, question_table

    if compare is not None:
        if spec is not None or name is not None or against or tune_baselines:
            raise typer.BadParameter("--compare reads two saved reports; leave SPEC and the other options out.")
        from genrec import comparison

        paths = [comparison.saved_report(name) for name in compare]
        both = comparison.compare(*(Report.load(path) for path in paths))
        written = comparison.save(both, paths[0].parent)
        if json_:
            _print_json({"name": both.name, "rows": both.rows, "tests": both.tests})
            return
        _print_report(both.name, both.rows)
        _print_tests([{**test, "a": f"A: {test['a']}", "b": f"B: {test['b']}"} for test in both.tests])
        print(f"page: {written.with_suffix('.html')}")
        print(f"report: {written}")
        return
    if spec is None:
        raise typer.BadParameter("write genrec eval eval/shop.toml, or genrec eval --compare A B.", param_hint="SPEC")
    from genrec.evaluation import evaluate
    from genrec.recommender import Recommender

    load = partial(Recommender.load, device=device, dtype=dtype)
    report = evaluate(
        spec, name=name, assignments=assignments or [], load=load, against=against or (),
        tune_baselines=tune_baselines,
    )  # fmt: skip
    written = report.save(spec.absolute().parent / "results")
    if json_:
        _print_json(json.loads(written.with_suffix(".json").read_text(encoding="utf-8")))
        return
    _print_report(f"{report.name}: {report.protocol['split']}, {report.protocol['cases']} cases", report.rows)
    _print_tests(report.tests)
    for prompt, found in report.questions.items():
        columns, rows = question_table(found)
        _print_table(f"{prompt} (95% intervals)", columns, rows, right=tuple(range(1, len(columns) - 1)))
        for label, row in found.items():
            for note in row["notes"]:
                print(f"{label}: {note}")
    print(f"page: {written.with_suffix('.html')}")
    print(f"report: {written}")


@app.command()
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
        overwrite=overwrite, resume=resume, format=format_, columns=_pairs(column, "--column"),
        item_columns=_pairs(item_column, "--item-column"), user_columns=_pairs(user_column, "--user-column"),
        on_bad_row=on_bad_row,
    )  # fmt: skip
    out = Path(os.path.relpath(made))
    manifest = Adapter.load(out).manifest
    told = manifest["update"]
    if json_:
        _print_json({"adapter": str(out), "data": manifest["data"]["path"], "kept": manifest["kept"], "update": told})
        return
    columns, rows = table(told)
    _print_table(f"{told['adapter']} -> {out.name} (95% intervals)", columns, rows, right=tuple(range(2, len(columns))))
    for note in told["notes"]:
        print(note)
    kept = manifest["kept"]
    print(f"kept step {kept['step']}: validation NDCG@10 {kept['ndcg@10']:.4f}, recall@10 {kept['recall@10']:.4f}")
    print(f"data set: {manifest['data']['path']}")
    print(out)


@app.command()
def export(
    adapter: Annotated[Path, typer.Argument(help="An adapter folder; with --check any that PEFT wrote.")],
    out: Annotated[Path | None, typer.Argument(help="The folder to write.")] = None,
    to: Annotated[
        Literal["vllm", "merged"] | None, typer.Option(help="vllm: a base and a LoRA beside it; merged: one model.")
    ] = None,
    name: Annotated[str, typer.Option(help="Of vllm, the folder of the LoRA in OUT.")] = "adapter",
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None, typer.Option(help="Of the model's weights; unset: the recipe's.")
    ] = None,
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
    from genrec.export import check_vllm
    from genrec.export import export as run

    if check:
        problems = check_vllm(adapter)
        if json_:
            _print_json({"adapter": str(adapter), "problems": problems})
        else:
            print("\n".join(problems) or f"{adapter}: good")
        raise typer.Exit(7 if problems else 0)
    if out is None or to is None:
        raise ConfigError("export takes a folder to write and a form: genrec export ADAPTER --to vllm|merged OUT")
    done = run(adapter, out, to=to, name=name, dtype=dtype, data=data, measured=measure, overwrite=overwrite)
    if json_:
        _print_json({"model": str(done.model), "lora": done.lora and str(done.lora), **done.table})
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


@prompts_app.command("list")
def prompts_list(
    folder: Annotated[Path, typer.Argument(help="The folder of prompts.")] = Path("prompts"), json_: Json = False
) -> None:
    """The prompts of a folder, their kind and what they read."""
    from genrec.errors import PromptError
    from genrec.prompts import Prompt, list_prompts

    rows: list[dict[str, Any]] = []
    for path in list_prompts(folder):
        try:
            prompt = Prompt.load(path)
            reads = [f"{what}.{column}" for what, columns in sorted(prompt.reads.items()) for column in sorted(columns)]
            rows.append({"path": str(path), "kind": prompt.kind, "reads": reads, "problem": None})
        except PromptError as error:
            rows.append({"path": str(path), "kind": None, "reads": [], "problem": str(error)})
    if json_:
        _print_json(rows)
    else:
        table = [[row["path"], row["kind"], ", ".join(row["reads"]), row["problem"]] for row in rows]
        _print_table(str(folder), ["prompt", "kind", "reads", "problem"], table)


@prompts_app.command("show")
def prompts_show(path: Annotated[Path, typer.Argument(help="A prompt file.")]) -> None:
    """The text of a prompt file, once it is known to be a good one."""
    from genrec.prompts import Prompt

    print(Prompt.load(path).source, end="")


@prompts_app.command("check")
def prompts_check(
    paths: Annotated[list[Path], typer.Argument(help="Prompt files.")],
    data: Annotated[Path | None, typer.Option(help="A data set folder, whose columns they may read.")] = None,
    json_: Json = False,
) -> None:
    """All problems of prompt files, with line, column and fix. Exit code 5 when there are any."""
    from genrec.prompts import check

    items = users = events = None
    if data is not None:
        from genrec.dataset import Dataset

        loaded = Dataset.load(data)
        items, users = loaded.items.columns, loaded.users.columns if loaded.users is not None else []
        events = loaded.events.columns
    found = {str(path): check(path, items, users, events) for path in paths}
    if json_:
        _print_json({path: [asdict(problem) for problem in problems] for path, problems in found.items()})
    else:
        for path, problems in found.items():
            for problem in problems:
                print(f"{path}:{problem}")
            if not problems:
                print(f"{path}: good" + ("" if data else " (columns were not checked: name them with --data)"))
    if any(found.values()):
        raise typer.Exit(5)


@prompts_app.command("render")
def prompts_render(
    path: Annotated[Path, typer.Argument(help="A prompt file.")],
    adapter: Annotated[Path, typer.Argument(help="An adapter folder: its tokenizer, identifiers and items.")],
    user: Annotated[str | None, typer.Option(help="A user of the adapter's data set.")] = None,
    history: Annotated[str | None, typer.Option(help='Item ids, oldest first: "id,id".')] = None,
    item: Annotated[str | None, typer.Option(help="The item of a question; unset: the last of the history.")] = None,
    data: Annotated[Path | None, typer.Option(help="The data set of --user; unset: the adapter's.")] = None,
    json_: Json = False,
) -> None:
    """A prompt as the model reads it: its tokens by origin, what is cut, and what is trained."""
    from genrec.recommender import render

    found = render(path, adapter, user=user, history=None if history is None else _ids(history), item=item, data=data)
    if json_:
        _print_json(asdict(found))
        return
    from rich.console import Console
    from rich.text import Text

    styles = {"frame": "dim", "template": "cyan", "data": "green", "identifier": "magenta"}
    console = Console(highlight=False, soft_wrap=True)
    for title, spans in (("read", found.read), ("trained" if found.kind == "question" else "next", found.answer)):
        if spans:
            text = [(span.text, styles[span.kind]) for span in spans]
            console.print(Text.assemble((f"{title}: ", "bold"), *text))
    if console.is_terminal:
        legend = [part for kind, style in styles.items() for part in (" ", (kind, style))]
        console.print(Text.assemble("colours:", *legend))
    print(
        f"tokens: {found.tokens['head']} head, {found.tokens['history']} history, {found.tokens['answer']} answer, "
        f"{found.tokens['free']} of {found.tokens['max_length']} free; {found.cut} oldest events were cut"
    )


bench_app.command("decode")(commands.decode)
bench_app.command("trie")(commands.trie)
bench_app.command("train")(commands.train)
bench_app.command("accuracy")(commands.accuracy)
bench_app.command("batch")(commands.batch)


if __name__ == "__main__":
    main()
