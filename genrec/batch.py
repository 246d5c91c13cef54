"""Batch jobs: the users of a table in, Parquet shards with one row per user and rank out.

Shards are deterministic. Each is written under a temporary name and renamed, so a job that was stopped leaves whole
shards only, and the same command goes on with those that are missing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from genrec import files, progress, readers
from genrec.dataset import Dataset
from genrec.errors import ConfigError, DataError, StorageError
from genrec.recommender import Recommender, beams_for
from genrec.splits import histories_hash
from genrec.tables import as_polars


@dataclass(frozen=True)
class Summary:
    """What a batch job did: users and rows in the whole output, and how many of its shards were there already."""

    out: str
    users: int
    rows: int
    shards: int
    shards_reused: int
    users_with_fewer: int


def read_users(source: str | Path | pl.DataFrame | Any) -> pl.DataFrame:
    """The users to recommend for: ``user_id``, ``history: list[str]`` (oldest first), and columns for the head.

    Args:
        source: A data set folder (whole histories), a Parquet, CSV or JSON lines file, or a data frame. In CSV the
            history is a JSON list.

    Raises:
        DataError: A column is missing or of the wrong type, a user stands twice, or there is no user.
    """
    if isinstance(source, str | Path):
        path = Path(source)
        if path.is_dir():
            data = Dataset.load(path)
            frame = data.history_frame()
            if data.users is not None:
                frame = frame.join(data.users, on="user_id", how="left", maintain_order="left")
        else:
            frame = readers.read_table(path)
        where = str(path)
    else:
        frame, where = as_polars(source, "users"), "users"
    for column in ("user_id", "history"):
        if column not in frame.columns:
            raise DataError(f"{where}: no column {column!r}; it has {', '.join(frame.columns)}. Rename one of them.")
    if frame["history"].dtype == pl.String:
        rows = []
        for number, text in enumerate(frame["history"].to_list(), start=1):
            try:
                history = json.loads(text or "[]")
                if not isinstance(history, list):
                    raise ValueError
            except ValueError:
                raise DataError(
                    f'{where}: row {number} column history: {text!r} is no JSON list, such as ["id1", "id2"].'
                ) from None
            rows.append([None if item is None else str(item) for item in history])
        frame = frame.with_columns(pl.Series("history", rows, dtype=pl.List(pl.String)))
    if not isinstance(frame["history"].dtype, pl.List):
        raise DataError(f"{where}: column history is {frame['history'].dtype}; it takes lists of item ids.")
    frame = frame.with_columns(pl.col("user_id").cast(pl.String), pl.col("history").cast(pl.List(pl.String)))
    if frame["user_id"].null_count():
        number = int(frame["user_id"].is_null().arg_max() or 0) + 1
        raise DataError(f"{where}: row {number} column user_id is empty. Give every user an id.")
    holes = frame["history"].list.eval(pl.element().is_null()).list.any().fill_null(False)
    if holes.any():
        number = int(holes.arg_max() or 0) + 1
        raise DataError(f"{where}: row {number} column history holds a null among the item ids. Leave it out.")
    doubled = frame.filter(pl.col("user_id").is_duplicated())
    if len(doubled):
        raise DataError(f"{where}: user {doubled['user_id'][0]!r} stands in {len(doubled)} rows at once. Keep one.")
    if not len(frame):
        raise DataError(f"{where}: there is no user in it.")
    return frame.with_columns(pl.col("history").fill_null([]))


def run_batch(
    adapter: str | Path | Recommender,
    users: str | Path | pl.DataFrame | Any,
    out: str | Path,
    *,
    k: int = 20,
    num_beams: int | None = None,
    shard_size: int = 4096,
    engine: str = "local",
) -> Summary:
    """Recommend for every user of a table and write ``user_id, rank, item_id, title, score`` to ``out``.

    ``out`` gets ``part-00000.parquet`` and so on, and ``job.json``, which says what the job is. Started again, it
    skips the shards that are there.

    Args:
        adapter: An adapter folder, or a recommender.
        users: See ``read_users``.
        out: The output folder.
        k: Items per user.
        num_beams: See ``Recommender.recommend``.
        shard_size: Users per shard.
        engine: ``local`` or ``dummy``, for an adapter folder.

    Raises:
        DataError, UnknownIdError: Something is wrong with the users; nothing is written.
        ConfigError: ``out`` holds another job (what differs is named), or a key is out of range.
        StorageError: ``out`` holds something else, or the disk refused; whole shards stay, and the same command goes
            on.
    """
    beams_for(k, num_beams)
    if shard_size < 1:
        raise ConfigError(f"shard_size is {shard_size}. It is at least 1.")
    recommender = adapter if isinstance(adapter, Recommender) else Recommender.load(adapter, engine=engine)  # type: ignore[arg-type]
    frame = read_users(users)
    prompt = recommender.adapter.prompt
    for problem in prompt.check(user_columns=frame.columns):
        raise DataError(f"the users do not fit prompt {prompt.name}, {problem}")
    histories = []
    for user, history in zip(frame["user_id"], frame["history"].to_list(), strict=True):
        try:
            histories.append(recommender.indices(history))
        except DataError as error:
            raise type(error)(f"user {user!r}, column history: {error}") from None
    read = [column for column in sorted(prompt.reads["user"]) if column in frame.columns]
    told = frame.select(read).to_dicts() if read else None
    folder = Path(out)
    job = {
        "adapter": recommender.adapter.path.name,
        "adapter_hash": recommender.adapter.hash,
        # Titles and what a prompt tells of items may change without training.
        "items_hash": files.file_hash(recommender.adapter.path / "items.parquet"),
        "engine": type(recommender.engine).__name__,
        "users": len(frame),
        "users_hash": files.text_hash(
            histories_hash(histories, recommender.item_ids), *frame["user_id"], json.dumps(told, default=str)
        ),
        "k": k,
        "num_beams": num_beams,
        "shard_size": shard_size,
    }
    _claim(folder, job)
    rows = reused = fewer = 0
    starts = range(0, len(frame), shard_size)
    with progress.bar("recommending", len(frame)) as advance:
        for number, start in enumerate(starts):
            shard = folder / f"part-{number:05d}.parquet"
            chosen = slice(start, start + shard_size)
            if shard.exists():
                done = pl.read_parquet(shard)
                reused += 1
            else:
                done = _shard(
                    recommender, frame["user_id"][chosen].to_list(), histories[chosen],
                    told[chosen] if told is not None else None, k, num_beams,
                )  # fmt: skip
                with files.new_file(shard) as temporary:
                    done.write_parquet(temporary)
            rows += len(done)
            size = len(histories[chosen])
            counts = done.group_by("user_id").len()["len"]
            fewer += int((counts < k).sum()) + size - len(counts)
            advance(size)
    return Summary(str(folder), len(frame), rows, len(starts), reused, fewer)


def _claim(folder: Path, job: dict[str, Any]) -> None:
    """Note in ``folder`` what the job is, or check that it is the one noted there."""
    note = folder / "job.json"
    if note.exists():
        try:
            there = dict(json.loads(note.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise StorageError(
                f"{note} does not say what the job is ({error}). Name another --out, or remove the folder."
            ) from error
        for key, value in job.items():
            if there.get(key) != value:
                raise ConfigError(
                    f"{folder} holds another job: {key} was {there.get(key)!r}, now {value!r}. "
                    "Name another --out, or remove the folder."
                )
        return
    if folder.exists() and any(folder.iterdir()):
        raise StorageError(f"{folder} is not empty and holds no batch job. Name another --out.")
    files.write_text(note, json.dumps(job, indent=1) + "\n")


def _shard(
    recommender: Recommender,
    user_ids: Sequence[str],
    histories: Sequence[Any],
    users: Sequence[dict[str, Any]] | None,
    k: int,
    num_beams: int | None,
) -> pl.DataFrame:
    """The output rows of some users, in their order."""
    found = recommender.search(histories, k, num_beams=num_beams, users=users)
    case, place = (found.items >= 0).nonzero()
    items = found.items[case, place]
    return pl.DataFrame(
        {
            "user_id": pl.Series([user_ids[index] for index in case.tolist()], dtype=pl.String),
            "rank": pl.Series(place + 1, dtype=pl.Int32),
            "item_id": pl.Series([recommender.item_ids[item] for item in items], dtype=pl.String),
            "title": pl.Series([recommender.titles[item] for item in items], dtype=pl.String),
            "score": pl.Series(found.scores[case, place], dtype=pl.Float32),
        }
    )
