"""`genrec bench prompts`: how many prompts are made of histories per second, on one core and on all."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import BrokenBarrierError
from typing import Any, Protocol

import numpy as np

from genrec.adapter import Adapter
from genrec.base import train_tokenizer
from genrec.benchmarks import CLOCKS, Clock, Report, Row, begin, conditions, figure, median
from genrec.benchmarks.materials import shipped_prompt
from genrec.dataset import Dataset
from genrec.errors import ConfigError
from genrec.identifiers import Identifiers
from genrec.prompts import Prompt
from genrec.splits import contexts
from genrec.tokenization import Tokenization, add_identifier_tokens

PROMPTS = ("next_item", "next_item_titles", "title_to_item", "titles_to_item")  # Of a data set without an adapter.
_GOAL = 20_000  # Sequence prompts per second on all cores.
_QUESTIONS = 512  # Each is rendered anew, so that fewer of them tell as much.
_CALL = 512  # Histories of one call.
_ROOM = 16  # Tokens that a question leaves for its answer.
_VOCABULARY = 8192
_ready: _Barrier | None = None  # Where the processes of one measurement wait for each other.


class _Barrier(Protocol):
    def wait(self) -> int: ...
    def abort(self) -> None: ...


@dataclass(frozen=True)
class _Load:
    data: Path
    adapter: Path | None
    users: int
    max_length: int
    repeats: int
    clock: Clock


@dataclass(frozen=True)
class _Measured:
    """Of one prompt in one process: ``seconds`` of each round of ``prompts``; ``first`` of that which met the items."""

    name: str
    kind: str
    prompts: int
    tokens: int
    first: float
    seconds: list[float]


def prompts(
    data: Path,
    adapter: Path | None = None,
    *,
    users: int = 8192,
    max_length: int = 256,
    processes: int | None = None,
    repeats: int = 5,
    clock: Clock = "wall",
) -> Report:
    """Measure prompts made of the histories of a data set, of whose users each is asked for the last item.

    Args:
        data: A data set folder.
        adapter: Whose prompts, tokenizer and identifiers; unset: four shipped prompts, atomic identifiers, and a
            tokenizer of the titles.
        users: Prompts of one round; users are taken again where the data set has fewer. Questions: 512 at most.
        max_length: Of the prompts without an adapter.
        processes: That work at the same time; unset: one per core.
        repeats: Rounds whose medians are reported, after one that is not counted.
        clock: ``cpu`` is processor time, on a busy machine.

    Raises:
        ConfigError: A number that is too small, or an adapter of another catalogue.
        DataError: No such data set.
        AdapterError: The folder is no adapter.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = cores if processes is None else processes
    begin("prompts", users=users, processes=processes, repeats=repeats)
    load = _Load(Path(data), adapter, users, max_length, repeats, clock)
    rows = _rows([_measure(load)], "one process", goal=processes == 1)
    if processes > 1:
        context = multiprocessing.get_context("spawn")  # Polars and tokenizers hold threads, which no fork takes over.
        with ProcessPoolExecutor(processes, context, _share, (context.Barrier(processes),)) as pool:
            rows += _rows(list(pool.map(_together, [load] * processes)), f"{processes} processes", goal=True)
    told = {"data": load.data.name, "adapter": None if adapter is None else Path(adapter).name, "users": users}
    return Report(conditions(**told, processes=processes, repeats=repeats, clock=clock), rows, "prompts")


def _rows(measured: list[list[_Measured]], setting: str, *, goal: bool) -> list[Row]:
    """The figures of one or more processes that ran at the same time, of which each measured the same prompts."""
    rows = []
    for same in zip(*measured, strict=True):
        one = same[0]
        rate = sum(each.prompts / median(each.seconds) for each in same)
        least = _GOAL if goal and one.kind == "sequence" else None
        rows.append(figure(one.kind, setting, one.name, rate, "prompts/s", least=least, samples=[one.seconds]))
        if len(same) == 1:  # What every process finds.
            rows.append(figure("size", setting, one.name, one.tokens / one.prompts, "tokens per prompt"))
            if one.kind == "sequence":
                rows.append(figure("first time", setting, one.name, one.first / one.prompts * 1e6, "µs per prompt"))
    return rows


def _share(ready: _Barrier) -> None:
    global _ready
    _ready = ready


def _together(load: _Load) -> list[_Measured]:
    assert _ready is not None
    try:
        return _measure(load, _ready.wait)
    except BrokenBarrierError:
        raise
    except BaseException:
        _ready.abort()  # The others would wait for ever.
        raise


def _measure(load: _Load, ready: Callable[[], Any] = lambda: None) -> list[_Measured]:
    data = Dataset.load(load.data)
    made, chosen = _prepared(load, data)
    n_users = len(data.histories)
    users = np.arange(load.users) % n_users
    histories = [data.histories[user][:-1] for user in users]
    items = [int(data.histories[user][-1]) for user in users]
    people = [None if data.user_rows is None else data.user_rows[user] for user in users]
    told: list[dict[str, Any] | None] = [None] * load.users
    if any(prompt.reads["context"] for prompt in chosen):
        ends = np.cumsum([len(history) for history in data.histories]) - 1
        told = contexts(data.events)[ends[users].tolist()].to_dicts()
    read, found = CLOCKS[load.clock], []
    for prompt in chosen:

        def sequences(prompt: Prompt = prompt) -> int:
            size = 0
            for first in range(0, load.users, _CALL):
                part = slice(first, first + _CALL)
                ids = made.sequences(prompt, histories[part], people[part], told[part])
                size += sum(map(len, ids))
            return size

        def questions(prompt: Prompt = prompt) -> int:
            asked = zip(items, histories, people, told, strict=True)
            return sum(
                len(made.question_ids(prompt, item, room=_ROOM, history=history, user=user, context=context))
                for _, (item, history, user, context) in zip(range(_QUESTIONS), asked, strict=False)
            )

        work = sequences if prompt.kind == "sequence" else questions
        seconds = []
        for _ in range(load.repeats + 1):
            ready()
            began = read()
            tokens = work()
            seconds.append(read() - began)
        count = load.users if prompt.kind == "sequence" else min(load.users, _QUESTIONS)
        found.append(_Measured(prompt.name, prompt.kind, count, tokens, seconds[0], seconds[1:]))
    return found


def _prepared(load: _Load, data: Dataset) -> tuple[Tokenization, list[Prompt]]:
    if load.adapter is not None:
        adapter = Adapter.load(load.adapter)
        if adapter.identifiers.item_ids != data.item_ids:
            raise ConfigError(
                f"bench prompts: {load.adapter} and {load.data} have other items, or the same in another order. "
                f"Name the data set that it was trained on: {adapter.manifest['data']['path']}."
            )
        return adapter.tokenization(), list(adapter.prompts.values())
    identifiers = Identifiers.build("atomic", data.item_ids)
    tokenizer = train_tokenizer(data.items["title"].to_list(), _VOCABULARY)
    add_identifier_tokens(tokenizer, identifiers)
    made = Tokenization(tokenizer, identifiers, data.items, max_length=load.max_length)
    return made, [Prompt.parse(shipped_prompt(name), name) for name in PROMPTS]
