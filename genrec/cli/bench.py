"""`genrec bench`: measurements."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from genrec import progress
from genrec.cli.options import Device, Dtype, Json
from genrec.cli.output import print_json, print_table
from genrec.config import vllm_options
from genrec.errors import ConfigError

Out = Annotated[Path | None, typer.Option(help="Write the JSON and a picture to this folder.")]
Threads = Annotated[int | None, typer.Option(help="Of PyTorch; unset: one per core.")]
Repeats = Annotated[int, typer.Option(help="Rounds whose medians are reported.")]
Clock = Annotated[Literal["wall", "cpu"], typer.Option(help="cpu: processor time, on a busy machine.")]
Quick = Annotated[bool, typer.Option("--quick", help="Tiny settings, to see that it runs.")]
Done = tuple[Any, bool, Path | None, str]  # A report, whether as JSON, and where and as what to save it.


def _print(done: Done) -> None:
    """Save and print what a command found."""
    report, as_json, out, name = done
    written = [] if out is None else report.save(out, name)
    if as_json:
        print_json(asdict(report))
    else:
        columns = ["part", "setting", "what", "value", "", "n", "goal", ""]
        print_table(f"genrec bench {report.name}", columns, report.table(), right=(3, 5))
        print(report.told())
    for path in written:
        progress.say(str(path))
    if not report.agrees:
        progress.say("the sides of a comparison give different items: see the rows of places that differ")
        raise typer.Exit(8)


app = typer.Typer(
    help="Measure decoding, tries, training, jobs, prompts, accuracy and start-up here.",
    no_args_is_help=True,
    result_callback=_print,
)


@app.command("decode")
def decode(
    assignments: Annotated[list[str] | None, typer.Argument(help="How vLLM runs: vllm.key=value ...")] = None,
    engine: Annotated[Literal["local", "vllm"], typer.Option(help="Whose decoding is measured.")] = "local",
    model: Annotated[
        str, typer.Option(help="A base by name or folder, random-small, random-135m or random-0.6b.")
    ] = "smollm2",
    part: Annotated[
        list[str] | None,
        typer.Option(
            help="generate, floor, atomic, prefix, throughput, profile or beam-loss; of vllm: atomic or semantic; "
            "unset: all."
        ),
    ] = None,
    users: Annotated[int, typer.Option(help="Prompts of one call.")] = 4,
    load: Annotated[int, typer.Option(help="Users of the throughput part, and of vllm at full load.")] = 1000,
    tokens: Annotated[
        int | None, typer.Option(help="Prompt tokens of a setting of your own, with --beams; of vllm: 100.")
    ] = None,
    beams: Annotated[
        int | None,
        typer.Option(help="Beams of a setting of your own, with --tokens; of vllm: 20 and 50, on a GPU 50 and 128."),
    ] = None,
    threads: Threads = None,
    repeats: Repeats = 5,
    clock: Clock = "wall",
    device: Device = "cpu",
    dtype: Dtype = "float32",
    data: Annotated[Path | None, typer.Option(help="A data set folder for beam-loss; unset: generated data.")] = None,
    out: Out = None,
    quick: Quick = False,
    json_: Json = False,
) -> Done:
    """The engine beside `generate`, and beside the floor that operations give; takes some minutes.

    With --engine vllm: genrec's vLLM engine beside vLLM's own one-token requests and beam search, and beside local.
    """
    if engine == "vllm":
        from genrec.benchmarks import vllm

        vllm.check(device, clock, data)
        report = vllm.decode(
            model, parts=part or vllm.PARTS, users=users, load=load, threads=threads, repeats=repeats, dtype=dtype,
            quick=quick, tokens=tokens, beams=beams, options=vllm_options("vllm", assignments or [], "bench decode"),
        )  # fmt: skip
        return report, json_, out, "decode-vllm"
    if assignments:
        raise ConfigError(f"bench decode: {assignments[0]!r} goes with --engine vllm. Add it, or leave this out.")
    from genrec.benchmarks import decode as benchmark

    report = benchmark.decode(
        model, parts=part or benchmark.PARTS, users=users, load=load, threads=threads, repeats=repeats, clock=clock,
        device=device, dtype=dtype, data=data, quick=quick, tokens=tokens, beams=beams,
    )  # fmt: skip
    return report, json_, out, "decode"


@app.command("trie")
def trie(
    items: Annotated[int, typer.Option(help="Of the catalogue.")] = 1_000_000,
    users: Annotated[int, typer.Option(help="Whose masks are set at once.")] = 8,
    beams: Annotated[int, typer.Option(help="Of the masked searches.")] = 50,
    history: Annotated[int, typer.Option(help="Items that a user has seen.")] = 200,
    repeats: Repeats = 9,
    clock: Clock = "wall",
    out: Out = None,
    json_: Json = False,
) -> Done:
    """Building, size, children, masks and saving of a trie, beside a trie of Python dicts."""
    from genrec.benchmarks import trie as benchmark

    report = benchmark.trie(items, users=users, num_beams=beams, history=history, repeats=repeats, clock=clock)
    return report, json_, out, "trie"


@app.command("train")
def train(
    model: Annotated[str, typer.Option(help="A base by name or folder, random-135m or random-0.6b.")] = "smollm2",
    part: Annotated[list[str] | None, typer.Option(help="step, rows, items, padding or accuracy; unset: all.")] = None,
    threads: Threads = None,
    repeats: Repeats = 5,
    clock: Clock = "wall",
    data: Annotated[
        Path | None, typer.Option(help="A data set folder for items, padding and accuracy; unset: generated data.")
    ] = None,
    minutes: Annotated[float, typer.Option(help="Of training on each side of the part accuracy.")] = 2.0,
    out: Out = None,
    quick: Quick = False,
    json_: Json = False,
) -> Done:
    """Training steps beside a plain loop and TRL's, and whole histories beside one row per target."""
    from genrec.benchmarks import train as benchmark

    report = benchmark.train(
        model, parts=part or benchmark.PARTS, threads=threads, repeats=repeats, clock=clock, data=data,
        minutes=minutes, quick=quick,
    )  # fmt: skip
    return report, json_, out, "train"


@app.command("accuracy")
def accuracy(
    data: Annotated[Path, typer.Argument(help="A data set folder.")],
    assignments: Annotated[list[str] | None, typer.Argument(help="Changes to the recipe: key=value ...")] = None,
    recipe: Annotated[Path, typer.Option(help="Whose base, data and seed are replaced.")] = Path(
        "adapters/default.toml"
    ),
    seeds: Annotated[int, typer.Option(help="How many, from 0 on, one after another.")] = 1,
    base: Annotated[str | None, typer.Option(help="By name or folder; unset: a small one made here.")] = None,
    width: Annotated[int, typer.Option(help="Hidden size of the small base.")] = 128,
    layers: Annotated[int, typer.Option(help="Its depth.")] = 2,
    heads: Annotated[int, typer.Option(help="Its attention heads per layer.")] = 4,
    threads: Threads = None,
    beams: Annotated[int, typer.Option(help="Of the evaluation on test.")] = 50,
    out: Out = None,
    json_: Json = False,
) -> Done:
    """A recipe from a data set to its test figures; each key=value tells what it buys."""
    from genrec.benchmarks import accuracy as benchmark

    report = benchmark.accuracy(
        data, recipe, assignments or [], seeds=range(seeds), base=base, width=width, layers=layers, heads=heads,
        threads=threads, beams=beams,
    )  # fmt: skip
    return report, json_, out, f"accuracy-{data.name}"


@app.command("batch")
def batch(
    adapter: Annotated[Path, typer.Argument(help="An adapter folder.")],
    part: Annotated[list[str] | None, typer.Option(help="throughput or memory; unset: both.")] = None,
    users: Annotated[int, typer.Option(help="Of the part throughput.")] = 8192,
    size: Annotated[
        list[int] | None, typer.Option(help="Of a job of the part memory; unset: 10,000 and 1,000,000.")
    ] = None,
    k: Annotated[int, typer.Option("-k", help="Items per user.")] = 20,
    shard_size: Annotated[int, typer.Option(help="Users per shard.")] = 4096,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    threads: Threads = None,
    repeats: Repeats = 5,
    clock: Clock = "wall",
    out: Out = None,
    json_: Json = False,
) -> Done:
    """A job beside its engine alone, and the memory of small and large jobs."""
    from genrec.benchmarks import batch as benchmark

    report = benchmark.batch(
        adapter, parts=part or benchmark.PARTS, users=users, sizes=size or (10_000, 1_000_000), k=k,
        shard_size=shard_size, device=device, dtype=dtype, threads=threads, repeats=repeats, clock=clock,
    )  # fmt: skip
    return report, json_, out, "batch"


@app.command("startup")
def startup(
    adapter: Annotated[Path | None, typer.Argument(help="Whose `genrec recommend` is measured too.")] = None,
    user: Annotated[str | None, typer.Option(help="Of its data set; unset: a history of one item.")] = None,
    repeats: Repeats = 5,
    out: Out = None,
    json_: Json = False,
) -> Done:
    """Commands from a cold process to their end, beside what they import and an empty process."""
    from genrec.benchmarks import startup as benchmark

    return benchmark.startup(adapter, user=user, repeats=repeats), json_, out, "startup"


@app.command("prompts")
def prompts(
    data: Annotated[Path, typer.Argument(help="A data set folder.")],
    adapter: Annotated[
        Path | None, typer.Argument(help="Trained on it; unset: shipped prompts and atomic identifiers.")
    ] = None,
    users: Annotated[int, typer.Option(help="Prompts of one round.")] = 8192,
    max_length: Annotated[int, typer.Option(help="Of prompts without an adapter.")] = 256,
    processes: Annotated[int | None, typer.Option(help="At the same time; unset: one per core.")] = None,
    repeats: Repeats = 5,
    clock: Clock = "wall",
    out: Out = None,
    json_: Json = False,
) -> Done:
    """Prompts made of histories per second, sequences and questions, on one core and on all."""
    from genrec.benchmarks import prompts as benchmark

    report = benchmark.prompts(
        data, adapter, users=users, max_length=max_length, processes=processes, repeats=repeats, clock=clock
    )
    return report, json_, out, "prompts"
