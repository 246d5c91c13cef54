"""`genrec batch`, `verify` and `publish`: the lists of all users."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from genrec import config
from genrec.cli.options import Json
from genrec.cli.output import print_json, print_summary
from genrec.errors import ConfigError, GateError


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
    engine: Annotated[
        Literal["local", "vllm", "dummy"] | None, typer.Option(help="local, vllm; or dummy, pseudo-random items.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Where the model runs, as PyTorch names it; not for vllm.")] = None,
    dtype: Annotated[config.Dtype | None, typer.Option(help="Of the model's weights.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write nothing; say what the job would take.")] = False,
    json_: Json = False,
) -> None:
    """Recommend for all users of a table; started again, it goes on with the shards that are missing.

    How vLLM runs is told by keys such as vllm.tensor_parallel_size=2 and vllm.gpu_memory_utilization=0.8.
    """
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
        print_summary(f"genrec batch, {found.sample} of {found.rows:,} rows timed", asdict(found), json_)
        return
    done = batch.run(told)
    if json_:
        print_json(asdict(done))
    else:
        print(*batch.report(done, told), sep="\n")
        if done.churn is not None:
            print_summary(f"beside {told.compare}", asdict(done.churn), False)
    if done.problems:
        raise GateError(batch.refusal(done))


def verify(out: Annotated[Path, typer.Argument(help="An output folder of a job.")], json_: Json = False) -> None:
    """Check every byte of a batch job's output. Exit code 9 where any is changed, missing or foreign."""
    from genrec.batch.output import verify as check

    found = check(out)
    print_summary(f"{out}: whole", asdict(found), json_)


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
        print_json({"link": str(link), "target": os.readlink(link)})
    else:
        print(f"{link} -> {os.readlink(link)}")
