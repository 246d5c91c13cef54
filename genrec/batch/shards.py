"""One shard of a job: rows of users in, rows of lists out.

The same function for every runner, and for tables that other engines hold (``recommend_rows``).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from genrec import readers, restrictions, tables
from genrec.batch import output, steps, users
from genrec.batch.previous import Previous
from genrec.config import Job
from genrec.dataset import Dataset
from genrec.errors import ConfigError, DataError, PromptError

if TYPE_CHECKING:
    from genrec.recommender import Recommender

VERSION = metadata.version("genrec")

Bools = NDArray[np.bool_]
Items = NDArray[np.int32]

LISTS = {
    "user_id": pl.String,
    "rank": pl.Int32,
    "item_id": pl.String,
    "title": pl.String,
    "score": pl.Float32,
    "source": pl.String,
}
INDEX = {"row": pl.Int64, "user_id": pl.String, "row_hash": pl.Binary, "items": pl.Int32, "reason": pl.String}
SOURCES = pl.Series(["model", "fill-up"])
HELD = 2**25  # Item indices that the predicates of rows may take at once: 128 MiB.


@dataclass(frozen=True, eq=False)
class Made:
    """What a run of rows of the input becomes.

    Attributes:
        lists: One row per user and rank: ``user_id``, ``rank`` (from 1), ``item_id``, ``title`` (unless the job leaves
            it out), ``score`` (f32) and ``source`` ("model" or "fill-up").
        index: One row per user: ``row`` (its place in the input, from 0), ``user_id``, ``row_hash`` (16 bytes),
            ``items`` (rows in the list) and ``reason`` (why they are fewer than k, or null).
        errors: One row per bad row: ``row``, ``user_id``, ``column``, ``value``, ``reason``.
        carried: Users whose lists were carried over.
    """

    lists: pl.DataFrame
    index: pl.DataFrame
    errors: pl.DataFrame
    carried: int


@dataclass(frozen=True, eq=False)
class Loaded:
    """A job with everything that its shards take, loaded once per process by ``load``.

    Attributes:
        job: The job.
        recommender: Its adapter, with today's item columns.
        allowed: bool [n_items], the items that may come out: those for which ``where`` holds, without retired ones.
        steps: What happens to lists after decoding, in order.
        identity: Everything but the input that decides the lists, JSON values: what job.json says.
        unknown_items: Rows of the job's item table that the adapter has no identifier for.
        retired_items: Items of the adapter that are not in the job's item table.
    """

    job: Job
    recommender: Recommender
    allowed: Bools
    steps: steps.Prepared
    identity: dict[str, Any]
    unknown_items: int = 0
    retired_items: int = 0

    def with_model(self) -> Loaded:
        """The same with the model loaded, where the job's engine has one; to be closed by whoever asks for it."""
        if self.job.engine == "dummy":
            return self
        job = self.job
        answering = self.recommender.with_model(engine=job.engine, device=job.device, dtype=job.dtype, vllm=job.vllm)
        return replace(self, recommender=answering)

    @cached_property
    def item_ids(self) -> pl.Series:
        return pl.Series("item_id", self.recommender.item_ids, dtype=pl.String)

    @cached_property
    def titles(self) -> pl.Series:
        return pl.Series("title", self.recommender.titles, dtype=pl.String)

    @property
    def metadata(self) -> dict[str, str]:
        """What every shard's file says of its origin, for joining exposures to models."""
        names = ("adapter", "adapter_hash", "identifiers_hash", "prompt_hash", "catalogue_hash")
        return {"genrec": str(self.identity["genrec"]), **{name: str(self.identity[name]) for name in names}}

    @property
    def user_columns(self) -> dict[str, pl.DataType]:
        """Types of the users' columns that the head of the prompt reads, as in training."""
        adapter = self.recommender.adapter
        return {name: kind for name, kind in adapter.user_columns.items() if name in adapter.prompt.reads["user"]}

    @cached_property
    def predicate(self) -> Callable[[str], Items]:
        """A row's own ``where`` -> int32 indices of the items that it and the job allow.

        Raises:
            ConfigError: See ``restrictions.predicate``.
        """

        @lru_cache(maxsize=64)
        def packed(where: str) -> NDArray[np.uint8]:  # A bit an item, where indices would take up to 32.
            return np.packbits(restrictions.predicate(where, self.recommender.adapter.items, lasting=True))

        def items(where: str) -> Items:
            mask = np.unpackbits(packed(where), count=len(self.allowed)).view(np.bool_)
            return np.flatnonzero(mask & self.allowed).astype(np.int32)

        return items


def load(job: Job, recommender: Recommender | None = None, *, model: bool = True) -> Loaded:
    """Load the adapter, today's items and what the steps read.

    Args:
        job: The job.
        recommender: In the place of the job's ``adapter``, ``engine``, ``device`` and ``dtype``.
        model: False leaves the model out, for what can be told of a job without one; see ``Loaded.with_model``.

    Raises:
        AdapterError, ConfigError, DataError: See ``Recommender.load``, ``restrictions.predicate``, ``steps.prepare``
            and ``today``; or ``where`` holds for no item.
    """
    from genrec.asking import beams_for
    from genrec.loading import check_engine, vllm_version
    from genrec.recommender import Recommender

    beams = beams_for(job.decoded, job.num_beams)
    if recommender is None:
        check_engine(job.engine, job.device)
        engine: str = job.engine
        dtype = None if engine == "dummy" else job.dtype
        device = job.device.partition(":")[0] if job.engine == "local" else None  # vLLM chooses for itself.
        options = job.vllm
        recommender = Recommender.load(job.adapter, engine="dummy")
    else:
        model = False
        kind = type(recommender.engine).__name__
        engine = {"LocalEngine": "local", "DummyEngine": "dummy", "VllmEngine": "vllm"}.get(kind, kind)
        network = getattr(recommender.engine, "model", None)
        held = getattr(recommender.engine if network is None else network, "dtype", None)
        dtype = None if held is None else str(held).removeprefix("torch.")  # type: ignore[assignment]
        device = None if network is None else network.device.type
        options = getattr(recommender.engine, "options", job.vllm)
    adapter = recommender.adapter
    retired, unknown = np.zeros(adapter.items.height, dtype=bool), 0
    if job.items is not None:
        items, retired, unknown = today(adapter.items, readers.read_table(job.items), job.items)
        recommender = recommender.with_items(items)
        adapter = recommender.adapter
    allowed = ~retired
    if job.where is not None:
        allowed &= restrictions.predicate(job.where, adapter.items)
        if not allowed.any():
            gone = f" ({int(retired.sum())} are retired)" if retired.any() else ""
            raise ConfigError(f"where: {job.where!r} holds for none of {len(allowed)} items{gone}. Every list would be "
                              "empty. Change it, or see to the item columns.")  # fmt: skip
    source = _Source(job, recommender)
    prepared = steps.prepare(job.steps, steps.Catalogue(adapter.items, source.train), job.k)
    seen = recommender.exclude_seen if job.exclude_seen is None else job.exclude_seen
    identity = {
        "genrec": _major(VERSION),
        "adapter": adapter.path.name,
        "adapter_hash": adapter.hash,
        "identifiers_hash": adapter.manifest["identifiers"]["hash"],
        "prompt_hash": adapter.prompt.hash,
        "catalogue_hash": catalogue_hash(adapter.items, retired),
        "engine": engine,
        "dtype": dtype,
        "device": device,
        "k": job.k,
        "candidates": job.decoded,
        "num_beams": beams,
        "exclude_seen": seen,
        "where": job.where,
        "allowed": hashlib.sha256(np.packbits(allowed).tobytes()).hexdigest(),  # What where says may change by itself.
        "steps": [dict(step) for step in job.steps],
        "data_hash": source.data.sha256 if prepared.reads_data else None,
        "titles": job.titles,
        "shard_size": job.shard_size,
        "max_events": job.max_events,
    }
    if engine == "vllm":  # Its other options say how fast, and may be changed for a job to go on.
        identity["vllm"] = {"version": vllm_version(), "quantization": options.quantization}
    loaded = Loaded(job, recommender, allowed, prepared, identity, unknown, int(retired.sum()))
    return loaded.with_model() if model else loaded


def _major(version: str) -> str:
    """The version up to which outputs may be continued: the major one, below 1 the minor one too."""
    parts = version.split(".")
    return ".".join(parts[:2]) if parts[0] == "0" else parts[0]


def today(items: pl.DataFrame, table: pl.DataFrame, name: str) -> tuple[pl.DataFrame, Bools, int]:
    """The adapter's items with today's columns.

    A column of ``table`` takes the place of the adapter's of that name; of an item that is not in it, the adapter's
    value stays, for histories still tell of it.

    Args:
        items: The adapter's items.
        table: ``item_id`` and any columns.
        name: What errors call it.

    Returns:
        The items, in the adapter's order; bool [n_items], which are retired: not in ``table``; and how many rows of
        ``table`` the adapter does not know.

    Raises:
        DataError: No column ``item_id``, an empty id, or one that stands twice.
    """
    if "item_id" not in table.columns:
        raise DataError(f"{name}: no column 'item_id'; it has {', '.join(table.columns)}. Rename one of them.")
    table = table.with_columns(pl.col("item_id").cast(pl.String))
    for wrong, what in ((table["item_id"].is_null(), "is empty"), (table["item_id"].is_duplicated(), "stands twice")):
        if wrong.any():
            row = int(wrong.arg_max() or 0)
            raise DataError(f"{name}: row {row + 1} column item_id: {table['item_id'][row]!r} {what}. Keep one row per "
                            "item.")  # fmt: skip
    both = items.select("item_id").join(
        table.with_columns(__here=pl.lit(True)), on="item_id", how="left", maintain_order="left"
    )
    here = both["__here"].fill_null(False)
    columns = {}
    for column in dict.fromkeys([*items.columns, *table.columns]):
        if column == "item_id" or column not in table.columns:
            columns[column] = items[column]
            continue
        columns[column] = now = both[column]
        if column in items.columns:
            before = items[column]
            if before.dtype != now.dtype:
                before = before.cast(now.dtype, strict=False) if not before.dtype.is_nested() else now.clear(len(now))
            columns[column] = now.zip_with(here, before)
    title = columns["title"].cast(pl.String).fill_null("")
    made = pl.DataFrame({**columns, "title": title})
    return made, ~here.to_numpy(), table.height - int(here.sum())


def catalogue_hash(items: pl.DataFrame, retired: Bools) -> str:
    """SHA-256 (hex) over every column of the items, by name, and over which of them are retired."""
    digest = hashlib.sha256(np.packbits(retired).tobytes())
    for column in sorted(items.columns):
        digest.update(f"column {column}\n".encode())
        tables.add_to_hash(digest, items[column])
    return digest.hexdigest()


class _Source:
    """What steps read of the catalogue and of the data set, which is loaded when it is first asked for."""

    def __init__(self, job: Job, recommender: Recommender) -> None:
        self.job = job
        self.recommender = recommender

    @cached_property
    def data(self) -> Dataset:
        return Dataset.load(data_folder(self.job, self.recommender))

    def train(self) -> list[Items]:
        """Histories of the data set, without items that the adapter does not know."""
        index = np.array([self.recommender.index.get(item, -1) for item in self.data.item_ids], dtype=np.int32)
        return [known[known >= 0] for known in (index[history] for history in self.data.histories)]


def data_folder(job: Job, recommender: Recommender) -> Path:
    """The data set folder that a job reads: its own, or that of the adapter."""
    if job.data is not None:
        return Path(job.data)
    return recommender.adapter.data_folder


def cold_items(job: Job, recommender: Recommender) -> set[str] | None:
    """The items of the adapter without an event in the data set folder; None where there is no such folder."""
    folder = data_folder(job, recommender)
    if job.data is None and not (folder / "manifest.json").is_file():
        return None
    return set(recommender.item_ids) - set(Dataset.load(folder).interactions["item_id"].unique().to_list())


def check(loaded: Loaded, source: users.Users, survey: users.Survey, start: int, size: int) -> users.Checked:
    """Read ``size`` rows of the input from ``start`` on, and tell the good ones from the bad."""
    raw = source.read(start, min(start + size, survey.rows))
    return users.check(raw, start, survey, loaded.recommender.index, max_events=loaded.job.max_events)


def make(loaded: Loaded, checked: users.Checked, previous: Previous | None = None) -> Made:
    """Lists for rows of the input.

    Args:
        loaded: The job.
        checked: The rows.
        previous: Where lists of unchanged rows are carried over from.
    """
    frame, errors = checked.frame, [checked.errors]
    places = np.full(len(frame), -1) if previous is None else previous.places[frame["row"]]
    fresh, known = np.flatnonzero(places < 0), np.flatnonzero(places >= 0)
    lists, index, bad = _recommend(loaded, frame[fresh], [checked.histories[case] for case in fresh])
    errors.append(bad)
    if previous is not None and len(known):
        carried = previous.take(frame["row"].to_numpy()[known])
        there = frame[known].select("row", "user_id", "row_hash")
        old = carried.lists.select(pl.lit(0, dtype=pl.Int64).alias("row"), *lists.columns[1:], "case")
        old = old.with_columns(row=there["row"].gather(old["case"])).drop("case")
        lists = pl.concat([lists, old]).sort("row", maintain_order=True)
        index = pl.concat([index, there.hstack(carried.index)]).sort("row")
    return Made(
        lists.drop("row").rechunk(), index.rechunk(), pl.concat(errors).sort("row", maintain_order=True), len(known)
    )


def write(
    loaded: Loaded, source: users.Users, survey: users.Survey, shard: int, folder: Path, previous: Previous | None
) -> output.Record:
    """Make a shard and write its files."""
    size = loaded.job.shard_size
    made = make(loaded, check(loaded, source, survey, shard * size, size), previous)
    return output.write_shard(folder, shard, made.lists, made.index, made.errors, loaded.metadata, carried=made.carried)


def recommend_rows(
    loaded: Loaded, rows: pl.DataFrame | Any, *, on_bad_row: Literal["fail", "skip"] = "fail"
) -> pl.DataFrame:
    """Lists for a data frame of users, without files: what a shard does, for tables that another engine cuts up.

    Args:
        loaded: What ``load`` gave; once per worker.
        rows: ``user_id``, ``history`` and further columns, as in an input file: a Polars, pandas or Arrow table.
        on_bad_row: "fail" raises on bad rows, "skip" leaves them out.

    Returns:
        ``Made.lists``; of a table without rows, whatever its columns, one without rows.

    Raises:
        DataError: A row is bad, or the table is.
    """
    if on_bad_row not in ("fail", "skip"):
        raise ConfigError(f"on_bad_row is {on_bad_row!r}; it must be 'fail' or 'skip'.")
    rows = tables.as_polars(rows, "users")
    if not len(rows):  # As an empty partition is, whose columns have no types.
        return _columns(loaded.job, pl.DataFrame(schema=LISTS))
    source = users.Users.open(rows, types=loaded.user_columns)
    check_columns(loaded, source)
    survey = source.survey()
    made = make(loaded, check(loaded, source, survey, 0, survey.rows))
    if on_bad_row == "fail" and made.errors.height:
        raise DataError(f"{told(made.errors.row(0, named=True))} {made.errors.height} of {survey.rows} rows are bad.")
    return made.lists


def told(error: Mapping[str, Any]) -> str:
    """A row of ``errors`` as a sentence."""
    return f"Row {error['row']} (from 0) column {error['column']}: {error['value']!r}: {error['reason'].rstrip('.')}."


def check_columns(loaded: Loaded, source: users.Users) -> None:
    """Refuse users who lack a column that the head of the prompt reads."""
    prompt = loaded.recommender.adapter.prompt
    for problem in prompt.check(user_columns=source.columns):
        raise DataError(f"the users do not fit prompt {prompt.name}, {problem}")
    if "context" in source.columns:
        return  # What an object holds differs from row to row.
    for problem in prompt.check(event_columns=()):
        raise DataError(
            f"the users do not fit prompt {prompt.name}, {problem.line}:{problem.column}: its head reads context, and "
            'they have no such column. Add one of structs, or of JSON objects as text: {"query": "tea"}.'
        )


def _recommend(
    loaded: Loaded, frame: pl.DataFrame, histories: list[Items]
) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Lists (with ``row``), index and errors of good rows; rows whose predicate or head is none are bad."""
    parts = []
    for cases, blocked, only, errors in _restricted(loaded, frame):
        chosen = [histories[case] for case in cases]
        lists, index, wrong = _lists(loaded, frame[cases], chosen, blocked, only)
        parts.append((lists, index, pl.concat([errors, wrong])))
    if len(parts) == 1:
        return parts[0]
    lists, index, errors = (pl.concat(some) for some in zip(*parts, strict=True))
    return lists, index, errors


def _lists(
    loaded: Loaded,
    frame: pl.DataFrame,
    histories: list[Items],
    blocked: list[Items | None],
    only: list[Items | None],
) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """``_recommend`` with the restrictions of each row."""
    job, recommender, errors = loaded.job, loaded.recommender, users.error_frame([])
    if not len(frame):
        index = pl.DataFrame(schema=INDEX)
        return _columns(job, pl.DataFrame(schema={"row": pl.Int64, **LISTS})), index, errors
    read = [column for column in sorted(recommender.adapter.prompt.reads["user"]) if column in frame.columns]
    told = frame.select(read).to_dicts() if read else None
    contexts = _contexts(loaded, frame)
    try:
        found = recommender.search(
            histories, job.decoded, num_beams=job.num_beams, exclude_seen=job.exclude_seen, users=told,
            contexts=contexts, allowed=None if loaded.allowed.all() else loaded.allowed, blocked=blocked, only=only,
        )  # fmt: skip
    except PromptError:
        errors = _bad_heads(loaded, frame, told, contexts)
        if not len(errors):
            raise
        good = np.flatnonzero((~frame["row"].is_in(errors["row"].implode())).to_numpy()).tolist()
        rest = [histories[case] for case in good]
        lists, index, _ = _lists(
            loaded, frame[good], rest, [blocked[case] for case in good], [only[case] for case in good]
        )
        return lists, index, errors
    seen = bool(loaded.identity["exclude_seen"])

    def legal(case: int) -> Bools:
        mask = loaded.allowed.copy()
        one, other = only[case], blocked[case]
        if one is not None:
            mask[:] = False
            mask[one] = loaded.allowed[one]
        if other is not None:
            mask[other] = False
        if seen:
            mask[histories[case]] = False
        return mask

    before = steps.Lists(found.items, found.scores, np.zeros(found.items.shape, dtype=bool), histories, legal)
    done = loaded.steps(before)
    items, scores, filled = (values[:, : job.k] for values in (done.items, done.scores, done.filled))
    decoded, counts = (found.items >= 0).sum(axis=1), (items >= 0).sum(axis=1)
    case, place = (items >= 0).nonzero()
    chosen = items[case, place]
    rows = pl.DataFrame(
        {
            "row": frame["row"].gather(case),
            "user_id": frame["user_id"].gather(case),
            "rank": pl.Series(place + 1, dtype=pl.Int32),
            "item_id": loaded.item_ids.gather(chosen),
            "title": loaded.titles.gather(chosen),
            "score": pl.Series(scores[case, place], dtype=pl.Float32),
            "source": SOURCES.gather(filled[case, place].astype(np.int64)),
        },
        schema={"row": pl.Int64, **LISTS},
    )
    reasons = [
        None if count >= job.k else _reason(int(count), int(before), reason)
        for count, before, reason in zip(counts, decoded, found.reasons, strict=True)
    ]
    index = frame.select("row", "user_id", "row_hash").with_columns(
        items=pl.Series(counts, dtype=pl.Int32), reason=pl.Series(reasons, dtype=pl.String)
    )
    return _columns(job, rows), index, errors


def _columns(job: Job, rows: pl.DataFrame) -> pl.DataFrame:
    return rows if job.titles else rows.drop("title")


def _reason(count: int, decoded: int, reason: str | None) -> str:
    """Why a list has only ``count`` items, of ``decoded`` that came out of the search."""
    if count < decoded or reason is None:
        return f"the steps leave only {count} of {decoded} candidates"
    return reason


def _contexts(loaded: Loaded, frame: pl.DataFrame) -> list[dict[str, Any] | None] | None:
    """The contexts of rows, where the head of the prompt reads them."""
    if "context" not in frame.columns or not loaded.recommender.adapter.prompt.reads["context"]:
        return None
    return [None if text is None else json.loads(text) for text in frame["context"].to_list()]


def _bad_heads(
    loaded: Loaded,
    frame: pl.DataFrame,
    told: list[dict[str, Any]] | None,
    contexts: list[dict[str, Any] | None] | None,
) -> pl.DataFrame:
    """The rows of which the head of the prompt cannot be made: it would be too long, or a value has no text."""
    adapter, errors = loaded.recommender.adapter, []
    if told is None and contexts is None:  # The head is the same for all, and so no fault of any.
        return users.error_frame([])
    for place, (row, user) in enumerate(zip(frame["row"], frame["user_id"], strict=True)):
        columns = None if told is None else told[place]
        context = None if contexts is None else contexts[place]
        try:
            loaded.recommender.tokenization.head_ids(adapter.prompt, columns, context)
        except PromptError as error:
            read = {**(columns or {}), **({} if context is None else {"context": context})}
            value = json.dumps(read, ensure_ascii=False, default=str)
            reason = str(error).replace(f"{adapter.path}{os.sep}", "")  # The same wherever the adapter lies.
            errors.append(users.fault(row, user, "row", value, reason))
    return users.error_frame(errors)


def _restricted(
    loaded: Loaded, frame: pl.DataFrame
) -> Iterator[tuple[list[int], list[Items | None], list[Items | None], pl.DataFrame]]:
    """Groups of rows whose predicates take ``HELD`` item indices at most, or are one row alone; at least one group.

    Yields:
        The good rows; of each the items that may not come out, and those that alone may; and the rows of the group
        whose predicate is none.
    """
    blocked, own = _indices(loaded, frame, "blocked"), _indices(loaded, frame, "allowed")
    texts = frame["where"].to_list() if "where" in frame.columns else [None] * len(frame)
    found: dict[str, Items | ConfigError] = {}  # Equal texts share an array, and decoding a mask.
    cases: list[int] = []
    only: list[Items | None] = []
    errors: list[dict[str, Any]] = []
    held = 0
    for case, text in enumerate(texts):
        legal = None if text is None else found.get(text)
        if text is not None and legal is None:
            try:
                legal = loaded.predicate(text)
                if held and held + len(legal) > HELD:
                    yield cases, [blocked[case] for case in cases], only, users.error_frame(errors)
                    found, cases, only, errors, held = {}, [], [], [], 0
                held += len(legal)
            except ConfigError as error:
                legal = error
            found[text] = legal
        if isinstance(legal, ConfigError):
            errors.append(users.fault(frame["row"][case], frame["user_id"][case], "where", text, str(legal)))
            continue
        cases.append(case)
        listed = own[case]
        if listed is not None and legal is not None:
            legal = np.intersect1d(listed, legal)
        only.append(listed if legal is None else legal)
    yield cases, [blocked[case] for case in cases], only, users.error_frame(errors)


def _indices(loaded: Loaded, frame: pl.DataFrame, column: str) -> list[Items | None]:
    """A column of lists of item ids as item indices; ids that the adapter does not know cannot come out anyway."""
    if column not in frame.columns:
        return [None] * len(frame)
    index = loaded.recommender.index
    return [
        None if ids is None else np.array([index[item] for item in ids if item in index], dtype=np.int32)
        for ids in frame[column].to_list()
    ]
