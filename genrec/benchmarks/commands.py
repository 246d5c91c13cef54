"""The commands of `genrec bench`, which the command line takes in and prints. They import PyTorch when they run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from genrec.benchmarks import Report
from genrec.config import vllm_options
from genrec.errors import ConfigError

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Out = Annotated[Path | None, typer.Option(help="Write the JSON and a picture to this folder.")]


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
    threads: Annotated[int | None, typer.Option(help="Of PyTorch; unset: one per core.")] = None,
    repeats: Annotated[int, typer.Option(help="Rounds whose medians are reported.")] = 5,
    clock: Annotated[Literal["wall", "cpu"], typer.Option(help="cpu: processor time, on a busy machine.")] = "wall",
    device: Annotated[str, typer.Option(help="Where the model runs, as PyTorch names it.")] = "cpu",
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of the weights.")] = "float32",
    data: Annotated[Path | None, typer.Option(help="A data set folder for beam-loss; unset: generated data.")] = None,
    out: Out = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny settings, to see that it runs.")] = False,
    json_: Json = False,
) -> tuple[Report, bool, list[Path]]:
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
        return report, json_, report.save(out, "decode-vllm") if out is not None else []
    if assignments:
        raise ConfigError(f"bench decode: {assignments[0]!r} goes with --engine vllm. Add it, or leave this out.")
    from genrec.benchmarks import decode as benchmark

    report = benchmark.decode(
        model, parts=part or benchmark.PARTS, users=users, load=load, threads=threads, repeats=repeats, clock=clock,
        device=device, dtype=dtype, data=data, quick=quick, tokens=tokens, beams=beams,
    )  # fmt: skip
    return report, json_, report.save(out, "decode") if out is not None else []


def trie(
    items: Annotated[int, typer.Option(help="Of the catalogue.")] = 1_000_000,
    users: Annotated[int, typer.Option(help="Whose masks are set at once.")] = 8,
    beams: Annotated[int, typer.Option(help="Of the masked searches.")] = 50,
    history: Annotated[int, typer.Option(help="Items that a user has seen.")] = 200,
    repeats: Annotated[int, typer.Option(help="Rounds whose medians are reported.")] = 9,
    clock: Annotated[Literal["wall", "cpu"], typer.Option(help="cpu: processor time, on a busy machine.")] = "wall",
    out: Out = None,
    json_: Json = False,
) -> tuple[Report, bool, list[Path]]:
    """Building, size, children, masks and saving of a trie, beside a trie of Python dicts."""
    from genrec.benchmarks import trie as benchmark

    report = benchmark.trie(items, users=users, num_beams=beams, history=history, repeats=repeats, clock=clock)
    return report, json_, report.save(out, "trie") if out is not None else []


def train(
    model: Annotated[str, typer.Option(help="A base by name or folder, random-135m or random-0.6b.")] = "smollm2",
    part: Annotated[list[str] | None, typer.Option(help="step, rows, items, padding or accuracy; unset: all.")] = None,
    threads: Annotated[int | None, typer.Option(help="Of PyTorch; unset: one per core.")] = None,
    repeats: Annotated[int, typer.Option(help="Rounds whose medians are reported.")] = 5,
    clock: Annotated[Literal["wall", "cpu"], typer.Option(help="cpu: processor time, on a busy machine.")] = "wall",
    data: Annotated[
        Path | None, typer.Option(help="A data set folder for items, padding and accuracy; unset: generated data.")
    ] = None,
    minutes: Annotated[float, typer.Option(help="Of training on each side of the part accuracy.")] = 2.0,
    out: Out = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny settings, to see that it runs.")] = False,
    json_: Json = False,
) -> tuple[Report, bool, list[Path]]:
    """Training steps beside a plain loop and TRL's, and whole histories beside one row per target."""
    from genrec.benchmarks import train as benchmark

    report = benchmark.train(
        model, parts=part or benchmark.PARTS, threads=threads, repeats=repeats, clock=clock, data=data,
        minutes=minutes, quick=quick,
    )  # fmt: skip
    return report, json_, report.save(out, "train") if out is not None else []


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
    threads: Annotated[int | None, typer.Option(help="Of PyTorch; unset: one per core.")] = None,
    beams: Annotated[int, typer.Option(help="Of the evaluation on test.")] = 50,
    out: Out = None,
    json_: Json = False,
) -> tuple[Report, bool, list[Path]]:
    """A recipe from a data set to its test figures; each key=value tells what it buys."""
    from genrec.benchmarks import accuracy as benchmark

    report = benchmark.accuracy(
        data, recipe, assignments or [], seeds=range(seeds), base=base, width=width, layers=layers, heads=heads,
        threads=threads, beams=beams,
    )  # fmt: skip
    return report, json_, report.save(out, f"accuracy-{data.name}") if out is not None else []


def batch(
    adapter: Annotated[Path, typer.Argument(help="An adapter folder.")],
    part: Annotated[list[str] | None, typer.Option(help="throughput or memory; unset: both.")] = None,
    users: Annotated[int, typer.Option(help="Of the part throughput.")] = 8192,
    size: Annotated[
        list[int] | None, typer.Option(help="Of a job of the part memory; unset: 10,000 and 1,000,000.")
    ] = None,
    k: Annotated[int, typer.Option("-k", help="Items per user.")] = 20,
    shard_size: Annotated[int, typer.Option(help="Users per shard.")] = 4096,
    device: Annotated[str, typer.Option(help="Where the model runs, as PyTorch names it.")] = "cpu",
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of the weights.")] = "float32",
    threads: Annotated[int | None, typer.Option(help="Of PyTorch; unset: one per core.")] = None,
    repeats: Annotated[int, typer.Option(help="Rounds whose medians are reported.")] = 5,
    clock: Annotated[Literal["wall", "cpu"], typer.Option(help="cpu: processor time, on a busy machine.")] = "wall",
    out: Out = None,
    json_: Json = False,
) -> tuple[Report, bool, list[Path]]:
    """A job beside its engine alone, and the memory of small and large jobs."""
    from genrec.benchmarks import batch as benchmark

    report = benchmark.batch(
        adapter, parts=part or benchmark.PARTS, users=users, sizes=size or (10_000, 1_000_000), k=k,
        shard_size=shard_size, device=device, dtype=dtype, threads=threads, repeats=repeats, clock=clock,
    )  # fmt: skip
    return report, json_, report.save(out, "batch") if out is not None else []


def prompts(
    data: Annotated[Path, typer.Argument(help="A data set folder.")],
    adapter: Annotated[
        Path | None, typer.Argument(help="Trained on it; unset: shipped prompts and atomic identifiers.")
    ] = None,
    users: Annotated[int, typer.Option(help="Prompts of one round.")] = 8192,
    max_length: Annotated[int, typer.Option(help="Of prompts without an adapter.")] = 256,
    processes: Annotated[int | None, typer.Option(help="At the same time; unset: one per core.")] = None,
    repeats: Annotated[int, typer.Option(help="Rounds whose medians are reported.")] = 5,
    clock: Annotated[Literal["wall", "cpu"], typer.Option(help="cpu: processor time, on a busy machine.")] = "wall",
    out: Out = None,
    json_: Json = False,
) -> tuple[Report, bool, list[Path]]:
    """Prompts made of histories per second, sequences and questions, on one core and on all."""
    from genrec.benchmarks import prompts as benchmark

    report = benchmark.prompts(
        data, adapter, users=users, max_length=max_length, processes=processes, repeats=repeats, clock=clock
    )
    return report, json_, report.save(out, "prompts") if out is not None else []
