"""Batch jobs: the users of a table in, Parquet shards with one row per user and rank out.

A job loses nothing and doubles nothing, whenever it is killed (``output``); bad rows of the input are set apart
(``users``); what may come out is restricted inside the decoder, and lists are changed by plain steps after it
(``steps``). Unchanged users are carried over from an earlier output (``previous``), outputs are compared (``churn``)
and published (``publication``).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from genrec import progress
from genrec.batch import churn, output, runners, shards
from genrec.batch.churn import Churn
from genrec.batch.output import Output, open_output
from genrec.batch.previous import Previous
from genrec.batch.shards import Loaded, load, recommend_rows
from genrec.batch.users import Checked, Survey, Users
from genrec.config import JOB_PATHS, Job, Thresholds
from genrec.errors import DataError, GateError, StorageError
from genrec.toml import from_table

if TYPE_CHECKING:
    from genrec.recommender import Recommender

__all__ = [
    "Estimate",
    "Summary",
    "estimate",
    "job_of",
    "load",
    "recommend_rows",
    "refusal",
    "report",
    "run",
    "run_batch",
]

SAMPLE = 512  # Rows that an estimate times, at most, in runs of:
RUN = 32


@dataclass(frozen=True)
class Summary:
    """What a batch job did.

    Attributes:
        out: The output folder.
        users: Users with a list, in the whole output.
        rows: Rows of all lists.
        shards: Of the output.
        shards_reused: How many of them were there already.
        users_with_fewer: Users whose list is shorter than k; _index/ tells why.
        bad_rows: Rows of the input that are in errors/ with the reason.
        carried: Users whose row is that of the previous output, and so is their list.
        unknown_items: Rows of the job's item table that the adapter has no identifier for.
        retired_items: Items of the adapter that are not in the job's item table.
        digest: Of the content: see ``output.digest``.
        churn: The comparison with an earlier output, where the job asks for one.
        problems: The thresholds that it exceeds.
    """

    out: str
    users: int
    rows: int
    shards: int
    shards_reused: int
    users_with_fewer: int
    bad_rows: int = 0
    carried: int = 0
    unknown_items: int = 0
    retired_items: int = 0
    digest: str = ""
    churn: Churn | None = None
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Estimate:
    """What a job will take, from a sample of its rows.

    Attributes:
        rows: Of the input.
        sample: Rows that were timed.
        bad_rows: Of those.
        users_per_second: Of one worker, without loading and writing.
        hours: Of the whole job, on its workers.
        hours_per_million: Of a million users.
        cost, cost_per_million: The same times the price of an hour; None where the job names none.
    """

    rows: int
    sample: int
    bad_rows: int
    users_per_second: float
    hours: float
    hours_per_million: float
    cost: float | None
    cost_per_million: float | None


def job_of(keys: Mapping[str, Any]) -> Job:
    """A job from the keys of ``config.Job``; paths, ``Thresholds`` and ``VllmOptions`` may be given as such.

    Raises:
        ConfigError: A key is unknown, of the wrong type or out of range.
    """
    return from_table(
        Job, {key: str(value) if isinstance(value, Path) else value for key, value in keys.items()}, "job"
    )


def run_batch(
    adapter: str | Path | Recommender, users: str | Path | pl.DataFrame | Any, out: str | Path, **keys: Any
) -> Summary:
    """Recommend for every user of a table and write ``user_id, rank, item_id, title, score, source`` to ``out``.

    Started again, it goes on with the shards that are missing; see ``genrec.batch.output`` for what is in the folder.

    Args:
        adapter: An adapter folder, or a recommender.
        users: A file, a data set folder or a data frame: see ``Users.open``.
        out: The output folder.
        **keys: Of ``genrec.config.Job``: ``k``, ``where``, ``steps``, ``shard_size``, ``previous``, ...

    Raises:
        DataError: The users are no table of users, or more rows are bad than ``max_bad_share`` allows.
        ConfigError: ``out`` holds another job (what differs is named), or a key is wrong.
        StorageError: ``out`` holds something else, another process writes there, or the disk refused; whole shards
            stay, and the same command goes on.
        EngineError: vLLM, where it is the engine, died or stopped answering; whole shards stay, and the same command
            goes on.
        GateError: The output is whole, and further from that of ``compare`` than ``thresholds`` allow.
    """
    recommender = None if isinstance(adapter, str | Path) else adapter
    source = None if isinstance(users, str | Path) else users
    path = str(adapter) if recommender is None else str(recommender.adapter.path)
    table = str(users) if source is None else "users"
    done = run(job_of({"adapter": path, "users": table, "out": out, **keys}), recommender, source)
    if done.problems:
        raise GateError(refusal(done))
    return done


def refusal(done: Summary) -> str:
    """What a GateError says."""
    lines = "\n".join(f"- {problem}" for problem in done.problems)
    return f"{done.out} is whole, and not to be published as it is:\n{lines}"


def report(done: Summary, job: Job) -> list[str]:
    """What a job did, in lines."""
    lines = [
        f"{done.rows:,} rows for {done.users:,} users in {done.shards} shard{'s' * (done.shards != 1)} "
        f"({done.shards_reused} were there)",
    ]
    if job.previous:
        lines.append(
            f"{done.carried:,} users were carried over from {job.previous}, {done.users - done.carried:,} computed"
        )
    if job.items:
        told = f"{done.retired_items:,} items of the adapter are not in it and retired"
        lines.append(f"{job.items}: {told}; {done.unknown_items:,} of its items are unknown to the adapter")
    if job.compare is None and job.thresholds != Thresholds():
        lines.append("the thresholds were not checked: there is no --compare")
    if done.bad_rows:
        lines.append(f"{done.bad_rows:,} bad rows: {done.out}/errors/*.parquet")
    if done.users_with_fewer:
        lines.append(f"{done.users_with_fewer:,} users got fewer than {job.k} items: {done.out}/_index/*.parquet")
    return [*lines, f"{done.out}/*.parquet"]


def run(job: Job, recommender: Recommender | None = None, users: Any = None) -> Summary:
    """``run_batch`` for a job; thresholds that are exceeded are told in the summary, not raised.

    Args:
        job: The job.
        recommender: In the place of its adapter, with the runner ``local``; others load their own.
        users: A data frame in the place of its file.
    """
    runners.check(job, recommender)
    if job.runner != "local":
        given = {key: getattr(job, key) for key in JOB_PATHS}  # Workers have working directories of their own.
        paths: dict[str, Any] = {key: str(Path(path).absolute()) for key, path in given.items() if path}
        job = dataclasses.replace(job, **paths)
    folder = Path(job.out)
    output.check_free(folder)
    if job.compare is not None:
        output.finished(Path(job.compare))  # Before hours of work, not after them.
    loaded = load(job, recommender, model=False)
    source = Users.open(job.users if users is None else users, types=loaded.user_columns)
    shards.check_columns(loaded, source)
    survey = source.survey()
    identity = {
        **loaded.identity,
        "input": survey.digest,
        "rows": survey.rows,
        "previous": output.digest(Path(job.previous)) if job.previous else None,
    }
    previous = Previous(job.previous, identity, survey.hashes) if job.previous else None
    count = -(-survey.rows // job.shard_size)
    with open_output(folder, identity, count) as opened:
        reused = len(opened.done)
        if opened.finished:
            _check_files(opened)
        missing = [shard for shard in range(count) if shard not in opened.done]
        work = runners.Work(job, loaded.identity, source, survey, folder)
        _check_bad(job, opened, survey.rows, sum(record.bad for record in opened.done.values()))
        if missing:
            with ExitStack() as engine:
                if recommender is None and job.runner == "local":
                    loaded = loaded.with_model()
                    engine.callback(loaded.recommender.close)
                _run(work, loaded, previous, opened, missing, survey)
        sums = opened.finish()
    done = Summary(
        str(folder), sums.users, sums.rows, count, reused, sums.fewer, sums.bad, sums.carried,
        loaded.unknown_items, loaded.retired_items, sums.digest,
    )  # fmt: skip
    if job.compare is None:
        return done
    found = churn.compare(folder, Path(job.compare), cold=shards.cold_items(job, loaded.recommender))
    return dataclasses.replace(done, churn=found, problems=tuple(churn.problems(found, job.thresholds)))


def _run(
    work: runners.Work, loaded: Loaded, previous: Previous | None, opened: Output, missing: list[int], survey: Survey
) -> None:
    """Make the missing shards and commit each as it comes."""
    job = work.job
    sizes = {shard: min(job.shard_size, survey.rows - shard * job.shard_size) for shard in missing}
    began, made, bad = time.perf_counter(), 0, sum(one.bad for one in opened.done.values())
    with progress.bar("recommending", sum(sizes.values())) as advance:
        for record in runners.RUNNERS[job.runner](work, loaded, previous, missing):
            opened.commit(record)
            made += sizes[record.shard]
            rate = made / max(time.perf_counter() - began, 1e-9)
            bad += record.bad
            advance(sizes[record.shard], note=f"{rate:,.0f} users/s, {bad:,} bad rows")
            _check_bad(job, opened, survey.rows, bad)


def _check_files(opened: Output) -> None:
    """Refuse a finished output from which a file was removed: it would be told to be done."""
    names = (name for record in opened.done.values() for name in record.files)
    gone = next((name for name in names if not (opened.folder / name).is_file()), None)
    if gone is not None:
        raise StorageError(
            f"{opened.folder / gone} is missing, though the output was finished. To make it again, remove "
            f"{opened.folder / '_SUCCESS'} and run the same command; genrec verify {opened.folder} tells what else is "
            "wrong."
        )


def _check_bad(job: Job, opened: Output, rows: int, bad: int) -> None:
    """Stop a job whose input is worse than it allows."""
    if bad <= job.max_bad_share * rows:
        return
    first = min(record.shard for record in opened.done.values() if record.bad)
    example = output.read(opened.folder, opened.done[first], "errors").row(0, named=True)
    raise DataError(
        f"{bad:,} of {rows:,} rows of {job.users} are bad, more than max_bad_share allows ({job.max_bad_share:.2%}). "
        f"{opened.folder / 'errors'} lists those found so far, with the reason. {shards.told(example)} "
        "Raise max_bad_share, and the same command goes on; with repaired rows name another --out."
    )


def estimate(job: Job) -> Estimate:
    """What a job will take: up to 512 rows, evenly spread over the input, are timed; nothing is written."""
    runners.check(job, None)
    loaded = load(job, model=False)
    source = Users.open(job.users, types=loaded.user_columns)
    shards.check_columns(loaded, source)
    survey = source.survey()
    starts = [0] if survey.rows <= SAMPLE else np.linspace(0, survey.rows - RUN, SAMPLE // RUN).astype(int).tolist()
    size = min(survey.rows, SAMPLE) if len(starts) == 1 else RUN
    rows = min(size, survey.rows) * len(starts)
    loaded = loaded.with_model()
    with closing(loaded.recommender):
        shards.make(loaded, shards.check(loaded, source, survey, starts[0], size))  # Makes what all users share.
        began = time.perf_counter()
        pieces = [shards.check(loaded, source, survey, start, size) for start in starts]
        made = shards.make(loaded, Checked.concat(pieces))  # At once, as a shard is: a GPU takes many users at a time.
        speed = rows / max(time.perf_counter() - began, 1e-9)
    hours = survey.rows / speed / 3600 / job.workers
    million = 1e6 / speed / 3600 / job.workers
    price = job.price_per_hour
    return Estimate(
        survey.rows, rows, made.errors.height, speed, hours, million,
        None if price is None else hours * price, None if price is None else million * price,
    )  # fmt: skip
