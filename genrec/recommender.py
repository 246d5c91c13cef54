"""The Python API: an adapter, an engine, and histories in; items with titles and scores out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from genrec.adapter import Adapter
from genrec.config import suggestion, workspace_of
from genrec.dataset import Dataset
from genrec.decoding import MAX_BEAMS, Beams, Bools, Ints, Trie, check_request
from genrec.engines import Engine
from genrec.errors import ConfigError, DataError, UnknownIdError
from genrec.prompts import Prompt
from genrec.tokenization import Span, Tokenization, event_answers, kept_from

History = Sequence[str]


@dataclass(frozen=True)
class Recommendation:
    """One item of a list: ``rank`` from 1, and ``score``, the log-probability of the item's identifier."""

    rank: int
    item_id: str
    title: str
    score: float


def beams_for(k: int, num_beams: int | None) -> int:
    """The number of beams of a search for ``k`` items: ``num_beams``, or ``max(50, 2 * k)`` where it is None.

    Raises:
        ConfigError: ``k`` or ``num_beams`` out of range.
    """
    if not 1 <= k <= MAX_BEAMS:
        raise ConfigError(f"k is {k}. It is at least 1 and at most {MAX_BEAMS}.")
    beams = min(max(50, 2 * k), MAX_BEAMS) if num_beams is None else num_beams
    if beams < k:
        raise ConfigError(f"num_beams is {beams}, below k, which is {k}. Leave it out, or raise it.")
    return beams


class Recommender:
    """A loaded adapter that answers.

    Attributes:
        adapter: What was loaded.
        engine: What runs the model.
        tokenization: What makes prompts.
        trie: The legal identifiers.
        index: Item id -> item index.
        exclude_seen: Whether items of a history are left out of its list, unless a call says otherwise; as the
            data set that the adapter was trained on says.
    """

    def __init__(self, adapter: Adapter, engine: Engine, tokenization: Tokenization) -> None:
        self.adapter = adapter
        self.engine = engine
        self.tokenization = tokenization
        self.trie = Trie.build(self.tokenization.tokens)
        self.exclude_seen = bool(adapter.manifest["data"]["manifest"]["exclude_seen"])
        self.item_ids = list(adapter.identifiers.item_ids)
        self.index = {item_id: index for index, item_id in enumerate(self.item_ids)}
        self.titles = adapter.items["title"].to_list()

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        engine: Literal["local", "dummy"] = "local",
        device: str = "cpu",
        dtype: Literal["float32", "bfloat16"] = "float32",
    ) -> Recommender:
        """Load an adapter folder.

        Args:
            path: The adapter's folder.
            engine: ``local`` runs the model; ``dummy`` runs none and returns pseudo-random items, for trying a job.
            device: Where the model runs, as PyTorch names it.
            dtype: Of the weights.

        Raises:
            AdapterError: The folder is no adapter, was changed since training, or its base is missing.
            ConfigError: An unknown engine, device or dtype.
        """
        for name, value, known in (
            ("engine", engine, ("local", "dummy")),
            ("dtype", dtype, ("float32", "bfloat16")),
        ):
            if value not in known:
                raise ConfigError(f"{name} is {value!r}. {suggestion(value, known)}")
        from genrec.engines.dummy import DummyEngine

        adapter = Adapter.load(path)
        tokenization = adapter.tokenization()
        recommender = cls(adapter, DummyEngine(len(tokenization.tokenizer)), tokenization)
        return recommender if engine == "dummy" else recommender.with_model(device=device, dtype=dtype)

    def with_model(self, *, device: str = "cpu", dtype: Literal["float32", "bfloat16"] = "float32") -> Recommender:
        """The same, answered by the adapter's model. Arguments and errors as in ``load``."""
        import torch

        from genrec.engines.local import LocalEngine

        model: Any = self.adapter.model(self.tokenization, dtype=getattr(torch, dtype))
        try:
            model = model.to(device)
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(f"device is {device!r}, and PyTorch refused it: {error}") from error
        answering = copy(self)
        answering.engine = LocalEngine(model)
        return answering

    def with_items(self, items: pl.DataFrame) -> Recommender:
        """The same with other columns of the items, such as today's titles and stock; ids and their order stay."""
        old = self.tokenization
        tokenization = Tokenization(old.tokenizer, old.identifiers, items, max_length=old.max_length, frames=old.frames)
        changed = copy(self)  # Identifiers, and so the trie, stay.
        changed.adapter, changed.tokenization = replace(self.adapter, items=items), tokenization
        changed.titles = items["title"].to_list()
        return changed

    def indices(self, items: History) -> np.ndarray:
        """Item ids -> int32 item indices.

        Raises:
            ConfigError: A text instead of a list of item ids.
            UnknownIdError: An item that the adapter does not know, with the closest one that it does.
        """
        if isinstance(items, str):
            raise ConfigError(f"a list of item ids is wanted, found the text {items!r}. Write [{items!r}].")
        try:
            return np.array([self.index[item] for item in items], dtype=np.int32)
        except KeyError:
            unknown = next(item for item in items if item not in self.index)
            close = suggestion(str(unknown), self.item_ids) if len(self.item_ids) <= 50_000 else ""
            hint = close if close.startswith("Did") else "The adapter knows the items that it was trained with."
            raise UnknownIdError(f"item {unknown!r} is not in the catalogue of {self.adapter.path}. {hint}") from None

    def _prompts(self, histories: Sequence[np.ndarray], users: Sequence[Mapping[str, Any] | None] | None) -> list[Any]:
        told: Sequence[Mapping[str, Any] | None] = users if users is not None else [None] * len(histories)
        if len(told) != len(histories):
            raise ConfigError(f"{len(histories)} histories and {len(told)} users were given; one user per history.")
        return self.tokenization.sequences(self.adapter.prompt, histories, told)

    def search(
        self,
        histories: Sequence[np.ndarray],
        k: int,
        *,
        num_beams: int | None = None,
        exclude_seen: bool | None = None,
        users: Sequence[Mapping[str, Any] | None] | None = None,
        allowed: Bools | None = None,
        blocked: Sequence[Ints | None] | None = None,
        only: Sequence[Ints | None] | None = None,
    ) -> Beams:
        """``recommend`` on item indices and arrays: the best ``k`` of each history.

        Restrictions hold within the decoder, so that a list is short only where fewer than ``k`` items are left, and
        they all hold together. Other arguments as in ``recommend``.

        Args:
            allowed: bool [n_items]; the items that may come out in any list.
            blocked: Per history item indices that may not come out, beside those that it holds where seen items are
                left out, or None.
            only: Per history the item indices that alone may come out, or None for all. Histories that are given the
                very same array share the memory of the restriction where nothing else tells them apart.

        Raises:
            ConfigError: ``k`` or ``num_beams`` out of range, or another number of users than of histories.
            DecodingError: A restriction is not one for each history, or holds something that is no item index.
        """
        beams = beams_for(k, num_beams)
        check_request(len(histories), beams, blocked, only)
        if self.exclude_seen if exclude_seen is None else exclude_seen:
            shut: Sequence[Ints | None] = [None] * len(histories) if blocked is None else blocked
            blocked = [
                history if more is None else np.concatenate([history, more])
                for history, more in zip(histories, shut, strict=True)
            ]
        found = self.engine.beam_search(self._prompts(histories, users), self.trie, beams, allowed, blocked, only)
        # A reason is why fewer than ``beams`` came, and told only where fewer than k did.
        full = (found.items[:, :k] >= 0).sum(axis=1) == k
        reasons = [None if enough else reason for enough, reason in zip(full, found.reasons, strict=True)]
        return Beams(found.items[:, :k], found.scores[:, :k], reasons)

    def recommend(
        self,
        histories: Sequence[History],
        k: int = 10,
        *,
        num_beams: int | None = None,
        exclude_seen: bool | None = None,
        users: Sequence[Mapping[str, Any] | None] | None = None,
    ) -> list[list[Recommendation]]:
        """The best ``k`` items for each history, best first; fewer where fewer are allowed.

        Args:
            histories: Item ids, oldest first. An empty history is answered by the prompt's head.
            k: Items per history.
            num_beams: Beams of the search; unset: ``max(50, 2 * k)``. Atomic identifiers are exact with any number.
            exclude_seen: Leave out the items of the history; unset: as the data set says.
            users: Per history the columns of the users table that the prompt's head may read.

        Raises:
            UnknownIdError: An item that the adapter does not know.
            ConfigError: ``k`` or ``num_beams`` out of range.
        """
        if isinstance(histories, str) or any(isinstance(history, str) for history in histories):
            raise ConfigError("recommend takes a list of histories, each a list of item ids: recommend([[id, id]]).")
        found = self.search(
            [self.indices(history) for history in histories],
            k, num_beams=num_beams, exclude_seen=exclude_seen, users=users,
        )  # fmt: skip
        return [
            [
                Recommendation(rank, self.item_ids[item], self.titles[item], float(score))
                for rank, (item, score) in enumerate(zip(items, scores, strict=True), start=1)
                if item >= 0
            ]
            for items, scores in zip(found.items.tolist(), found.scores.tolist(), strict=True)
        ]

    def score(self, history: History, items: History, *, user: Mapping[str, Any] | None = None) -> np.ndarray:
        """float64 [items]: the score that ``recommend`` would give each of ``items`` after ``history``."""
        asked = self._prompts([self.indices(history)], [user])[0]
        answers = [self.tokenization.identifier(int(item)) for item in self.indices(items)]
        return self.engine.score([asked] * len(answers), answers)

    def prompt(self, history: History, *, user: Mapping[str, Any] | None = None) -> str:
        """The prompt of a history as the model reads it: its tokens, spelled."""
        return str(self.tokenization.tokenizer.decode(self._prompts([self.indices(history)], [user])[0]))

    def user_history(self, user: str, data: str | Path | None = None) -> tuple[list[str], dict[str, Any] | None]:
        """The whole history of a user of a data set, and the user's columns.

        Args:
            user: A user id.
            data: The data set folder; the one that the adapter was trained on where it is not given.

        Raises:
            UnknownIdError: A user that the data set does not know.
        """
        loaded, index = self._user(user, data)
        history = [loaded.item_ids[item] for item in loaded.histories[index]]
        return history, None if loaded.user_rows is None else loaded.user_rows[index]

    def user_events(self, user: str, data: str | Path | None = None) -> list[dict[str, Any]]:
        """What the log says of each event of ``user_history`` (rating, ...). Arguments and errors as there."""
        loaded, index = self._user(user, data)
        before = sum(map(len, loaded.histories[:index]))
        return loaded.events[before : before + len(loaded.histories[index])].to_dicts()

    def _user(self, user: str, data: str | Path | None) -> tuple[Dataset, int]:
        known = workspace_of(self.adapter.path) / self.adapter.manifest["data"]["path"]
        folder = Path(data) if data is not None else known
        loaded = Dataset.load(folder)
        if user not in loaded.user_ids:
            close = suggestion(user, loaded.user_ids)
            hint = close if close.startswith("Did") else f"It has {len(loaded.user_ids)} users."
            raise UnknownIdError(f'user {user!r} is not in {folder}. {hint} Or pass a history: --history "id,id"')
        return loaded, loaded.user_ids.index(user)


@dataclass(frozen=True)
class Rendered:
    """A prompt as the model reads it.

    Attributes:
        kind: ``sequence`` or ``question``.
        read: Spans of everything that is read, in order.
        answer: Spans of the answer that is trained; of a sequence prompt the identifier that came next, where there
            is one.
        tokens: Counts: head, history, answer, free, max_length.
        cut: Events of the history that did not fit, the oldest ones.
    """

    kind: str
    read: list[Span]
    answer: list[Span]
    tokens: dict[str, int]
    cut: int


def render(
    path: str | Path,
    adapter: str | Path,
    *,
    user: str | None = None,
    history: History | None = None,
    item: str | None = None,
    data: str | Path | None = None,
) -> Rendered:
    """Render a prompt file with an adapter's tokenizer, identifiers and items; no model is loaded.

    Args:
        path: The prompt file; it need not be one that the adapter was trained with.
        adapter: The adapter's folder.
        user: A user of a data set; or
        history: item ids, oldest first.
        item: What a question is about, or what came next; the last of the history where it is not given. A question
            about an event takes the last event of ``user`` with it.
        data: The data set of ``user``; the adapter's where it is not given.

    Raises:
        ConfigError: A question without an item, or one about an event without a user who has one with the item.
        DataError: The interactions lack a column that the prompt reads.
    """
    prompt = Prompt.load(path)
    recommender = Recommender.load(adapter, engine="dummy")
    tokenization = recommender.tokenization
    row = None
    if user is not None:
        history, row = recommender.user_history(user, data)
    events = recommender.indices(history or [])
    asked = int(recommender.indices([item])[0]) if item is not None else None
    if prompt.kind == "question":
        event = None
        if prompt.subject == "event":
            if user is None:
                raise ConfigError(f"{prompt.name} asks about an interaction of a data set. Pass --user U.")
            places = np.flatnonzero(events == (events[-1] if asked is None else asked))
            if not len(places):
                raise ConfigError(
                    f"user {user!r} has no interaction with item {item!r}. Leave --item out for the last."
                )
            event = recommender.user_events(user, data)[places[-1]]
            for problem in prompt.check(event_columns=event):
                raise DataError(f"{path}:{problem}")
            if not event_answers(prompt, pl.DataFrame([event]))[0]:
                raise ConfigError(f"{prompt.name} is not asked about this interaction: its answer is empty ({event}).")
            asked, events = int(events[places[-1]]), events[: places[-1]]
        if asked is None:
            if not len(events):
                raise ConfigError(f"{prompt.name} asks about an item. Pass --item ID, --user U or --history.")
            asked, events = int(events[-1]), events[:-1]
        read, answer = tokenization.question(prompt, asked, history=events, user=row, event=event)
        size = sum(len(span.ids) for span in read)
        counts = {"head": size, "history": 0}
        cut = 0
        if prompt.subject != "item":
            told = [tokenization.item(int(event)) for event in events]
            about = tokenization.item(asked)
            while tokenization.head(prompt, row, item=about, history=told[cut:]) != read:
                cut += 1
    else:
        head = tokenization.head(prompt, row)
        size = sum(len(span.ids) for span in head)
        kept = tokenization.sequence(prompt, events, row)[size:]
        cut = kept_from(tokenization.fragment_lengths(prompt, events), len(kept))
        read = head + [span for event in events[cut:] for span in tokenization.fragment_spans(prompt, int(event))]
        answer = tokenization.fragment_spans(prompt, asked)[:1] if asked is not None else []
        counts = {"head": size, "history": len(kept)}
    counts["answer"] = sum(len(span.ids) for span in answer)
    counts["free"] = tokenization.max_length - sum(counts.values())
    return Rendered(prompt.kind, read, answer, {**counts, "max_length": tokenization.max_length}, cut)
