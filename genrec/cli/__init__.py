"""The command line: one command is one call of one function. Results on standard output, the rest on standard error."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from genrec import __version__, progress
from genrec.cli import adapters, base, batch, bench, data, evaluate, ids, prompts, recommend, start, why
from genrec.errors import GenrecError, StorageError

app = typer.Typer(
    name="genrec",
    help="An interaction log and a catalogue in, a generative recommender out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="Exit codes: 0 done, 1 other error, 2 wrong usage, 3 configuration, 4 data, 5 prompt, 6 identifiers, "
    "7 adapter or base, 8 decoding, 9 storage, 10 too far from the output before, 11 engine, 130 interrupted.",
)
app.command()(start.quickstart)
app.command()(start.init)
app.command()(start.doctor)
app.command()(adapters.train)
app.command()(recommend.recommend)
app.command()(why.why)
app.command("batch")(batch.batch_)
app.command()(batch.verify)
app.command()(batch.publish)
app.command("eval")(evaluate.eval_)
app.command()(adapters.update)
app.command()(adapters.export)
for name, group in (("data", data), ("ids", ids), ("base", base), ("prompts", prompts), ("bench", bench)):
    app.add_typer(group.app, name=name)


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
            told = "nothing is left half-written. Run the same command again; `train` and `update` with --resume."
            print(f"interrupted; {told}", file=sys.stderr)
        raise
