"""Prompts as a model reads them, for people to look at: spans by origin, the token budget, what is cut and trained.

No model is loaded. A prompt is rendered with the tokenizer and the identifiers of an adapter; or, before anything is
trained, with those that a training on a base and a data set would begin with.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from genrec import base as bases
from genrec.adapter import Adapter
from genrec.config import Recipe
from genrec.dataset import Dataset
from genrec.errors import ConfigError, DataError, UnknownIdError, closest
from genrec.identifiers import Identifiers
from genrec.prompts import Problem, Prompt
from genrec.splits import contexts
from genrec.tokenization import Span, Tokenization, add_identifier_tokens, event_answers, kept_from

COLOURS = {"frame": "grey50", "template": "cyan", "data": "green", "identifier": "magenta"}  # As rich names them.
_HTML_COLOURS = {**COLOURS, "frame": "grey", "template": "teal"}


@dataclass(frozen=True)
class Rendered:
    """A prompt as the model reads it.

    Attributes:
        kind: ``sequence`` or ``question``.
        read: Spans of everything that is read, in order.
        answer: Spans of the answer that is trained; of a sequence prompt the identifier that came next, where there
            is one.
        tokens: Counts: head, history, answer, free, max_length. Of a question that shows a history, ``history`` counts
            what the question is longer by than without one.
        cut: Events of the history that did not fit, the oldest ones.
        history: Item ids of the whole history, oldest first, those that were cut included.
    """

    kind: Literal["sequence", "question"]
    read: list[Span]
    answer: list[Span]
    tokens: dict[str, int]
    cut: int
    history: list[str]

    @property
    def trained(self) -> list[Span]:
        """The spans that training puts its loss on: of a sequence prompt every identifier, of a question the answer."""
        if self.kind == "question":
            return self.answer
        return [span for span in [*self.read, *self.answer] if span.kind == "identifier"]

    @property
    def text(self) -> str:
        """All that is read, as one text: its tokens, spelled."""
        return "".join(span.text for span in self.read)

    @property
    def budget(self) -> str:
        """Where the tokens go, and what was cut, in one line."""
        told = self.tokens
        line = (
            f"{told['head']} head, {told['history']} history, {told['answer']} answer, {told['free']} of "
            f"{told['max_length']} free"
        )
        if not self.cut:
            return f"{line}; nothing was cut"
        shown = ", ".join(self.history[: min(self.cut, 5)]) + (", ..." if self.cut > 5 else "")
        return f"{line}; cut: the {self.cut} oldest of {len(self.history)} events ({shown})"

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        answer = [Span("frame", " → ", []), *self.answer] if self.answer else []
        spans = "".join(
            f'<span style="color:{_HTML_COLOURS[span.kind]}">{escape(span.text)}</span>' for span in self.read + answer
        )
        legend = " ".join(f'<span style="color:{colour}">{kind}</span>' for kind, colour in _HTML_COLOURS.items())
        return f'<pre style="white-space:pre-wrap">{spans}\n\n{legend}; tokens: {escape(self.budget)}</pre>'


def render(
    prompt: Prompt | str | Path,
    adapter: str | Path | None = None,
    *,
    data: str | Path | None = None,
    base: str | None = None,
    max_length: int | None = None,
    user: str | None = None,
    history: Sequence[str] | None = None,
    item: str | None = None,
    context: Mapping[str, Any] | None = None,
) -> Rendered:
    """Render a prompt with an adapter's tokenizer, identifiers and items, or with those of a data set and a base.

    Args:
        prompt: A prompt or its file; it need not be one that the adapter was trained with.
        adapter, data, base, max_length: See ``Setting.of``.
        user, history, item, context: See ``Setting.render``.

    Raises:
        ConfigError, DataError, UnknownIdError: See ``Setting.of`` and ``Setting.render``.
        PromptError: The prompt is none, or it does not fit.
    """
    prompt = prompt if isinstance(prompt, Prompt) else Prompt.load(prompt)
    setting = Setting.of(adapter, data=data, base=base, max_length=max_length)
    return setting.render(prompt, user=user, history=history, item=item, context=context)


@dataclass(frozen=True)
class Setting:
    """What prompts are rendered with.

    Attributes:
        tokenization: Tokenizer, identifiers and items.
        adapter: The adapter that it is of, or None.
        data: The folder of the data set whose users are rendered.
    """

    tokenization: Tokenization
    adapter: Adapter | None
    data: Path

    @classmethod
    def of(
        cls,
        adapter: str | Path | None = None,
        *,
        data: str | Path | None = None,
        base: str | None = None,
        max_length: int | None = None,
    ) -> Setting:
        """The setting of an adapter, or of a data set and a base.

        Args:
            adapter: An adapter's folder; or
            base: a base, with ``data``: identifiers are those that the base brings, or atomic ones.
            data: The data set's folder; of an adapter the one that it was trained on, where it is not given.
            max_length: Tokens of a prompt with its answer, at most, where no adapter says so; unset: as in a recipe
                that does not say.

        Raises:
            ConfigError: Neither an adapter nor both of data and base, or both, or a base with identifiers of others.
            DataError: ``data`` is no data set.
        """
        if adapter is not None:
            if base is not None or max_length is not None:
                raise ConfigError("an adapter has its own base and max_length. Leave --base and --max-length out.")
            loaded = Adapter.load(adapter)
            setting = cls(loaded.tokenization(), loaded, loaded.data_folder if data is None else Path(data))
            if data is not None:
                _ = setting.dataset  # What was named has to be there.
            return setting
        if data is None or base is None:
            raise ConfigError(
                "a prompt is rendered with an adapter, adapters/NAME, or before there is one with a data set and a "
                "base: --data data/NAME --base smollm2."
            )
        dataset, found = Dataset.load(data), bases.find(base)
        if (found.folder / "identifiers.parquet").exists():
            identifiers = Identifiers.load(found.folder / "identifiers.parquet")
            if list(identifiers.item_ids) != dataset.item_ids:
                raise ConfigError(f"base {base} brings identifiers of other items than those of {data}. Name its data.")
        else:
            identifiers = Identifiers.build("atomic", dataset.item_ids)
        tokenizer = found.tokenizer()
        add_identifier_tokens(tokenizer, identifiers)
        limit = Recipe.max_length if max_length is None else max_length
        setting = cls(Tokenization(tokenizer, identifiers, dataset.items, max_length=limit), None, Path(data))
        setting.__dict__["dataset"] = dataset  # Read already.
        return setting

    @cached_property
    def dataset(self) -> Dataset:
        """The data set whose users are rendered, read when it is first asked for."""
        return Dataset.load(self.data)

    @property
    def columns(self) -> tuple[list[str], list[str] | None, list[str] | None]:
        """Those of items, users and interactions; of the latter two None where the data set is elsewhere.

        An adapter holds all that its prompts are rendered with, and may be where its data set is not.
        """
        if not (self.data / "manifest.json").exists():
            return self.tokenization.items.columns, None, None
        return self.tokenization.items.columns, *self.dataset.readable[1:]

    @cached_property
    def _rooms(self) -> dict[str, int]:
        return {}

    def _room(self, prompt: Prompt) -> int:
        """Tokens that training leaves for the answer: of a question about an event, those of the longest in the log."""
        if prompt.subject != "event":
            return 0
        if prompt.hash not in self._rooms:
            answers = event_answers(prompt, self.dataset.events)
            self._rooms[prompt.hash] = self.tokenization.answer_room(prompt, answers)
        return self._rooms[prompt.hash]

    def indices(self, items: Sequence[str]) -> np.ndarray:
        """Item ids -> int32 item indices. Raises UnknownIdError for an item without an identifier."""
        where = self.data if self.adapter is None else self.adapter.path
        return self.tokenization.identifiers.indices(items, str(where))

    def problems(self, prompt: Prompt) -> list[Problem]:
        """What looks wrong in a prompt here: as ``Prompt.check`` with ``columns`` and the tokenizer."""
        return prompt.check(*self.columns, tokenization=self.tokenization)

    def case(self, prompt: Prompt, user: str) -> Rendered | None:
        """The last choice of a user: the events before it, and as the answer what came. None: it is not asked about.

        Raises:
            DataError: The interactions lack a column that the prompt reads.
            UnknownIdError: An item or a user that is not known.
        """
        history, row, log = self._user(user)
        if prompt.subject == "event" and not self._is_asked(prompt, log[-1:]):
            return None
        events = self.indices(history)
        context = contexts(log[-1:]).row(0, named=True) if prompt.reads["context"] else None
        return self._rendered(prompt, events[:-1], int(events[-1]), row, context, log.row(-1, named=True))

    def render(
        self,
        prompt: Prompt,
        *,
        user: str | None = None,
        history: Sequence[str] | None = None,
        item: str | None = None,
        context: Mapping[str, Any] | None = None,
    ) -> Rendered:
        """A prompt for one user or history.

        Args:
            prompt: Of either kind.
            user: A user of the data set, with the whole history; or
            history: item ids, oldest first.
            item: What a question is about, or what came next; the last of the history where it is not given. A question
                about an event takes the last event of ``user`` with it.
            context: What is known of the choice (query, hour, ...). Of a question about the last event of ``user`` it
                is that of the event, where it is not given.

        Raises:
            ConfigError: Both a user and a history, a question without an item, or one about an event without a user who
                has one with the item.
            DataError: The interactions lack a column that the prompt reads.
            UnknownIdError: An item or a user that is not known.
        """
        if user is not None and history is not None:
            raise ConfigError("a prompt is rendered for one of --user and --history. Leave one out.")
        row = log = None
        if user is not None:
            history, row, log = self._user(user)
        events = self.indices(history or [])
        target = None if item is None else int(self.indices([item])[0])
        if prompt.kind == "sequence":
            return rendered_sequence(self.tokenization, prompt, events, target, row, context)
        place, event = len(events), None  # Where in the history the question is asked.
        if prompt.subject == "event":
            place, event = self._event(prompt, user, events, target, log)
        elif target is None:
            place -= 1
        if target is None:
            if place < 0:
                raise ConfigError(f"{prompt.name} asks about an item. Pass --item ID, --user U or --history.")
            target = int(events[place])
        if context is None and log is not None and place < len(events) and prompt.reads["context"]:
            context = contexts(log[place : place + 1]).row(0, named=True)
        return self._rendered(prompt, events[:place], target, row, context, event)

    def _event(
        self, prompt: Prompt, user: str | None, events: np.ndarray, target: int | None, log: pl.DataFrame | None
    ) -> tuple[int, dict[str, Any]]:
        """Which of a user's events a question is about, and its row of the log."""
        if user is None or log is None:
            raise ConfigError(f"{prompt.name} asks about an interaction of a data set. Pass --user U.")
        places = np.flatnonzero(events == (events[-1] if target is None else target))
        if not len(places):
            item = self.tokenization.identifiers.item_ids[target or 0]
            raise ConfigError(f"user {user!r} has no interaction with item {item!r}. Leave --item out for the last.")
        event = log.row(int(places[-1]), named=True)
        if not self._is_asked(prompt, log[int(places[-1])]):
            raise ConfigError(f"{prompt.name} is not asked about this interaction: its answer is empty ({event}).")
        return int(places[-1]), event

    def _is_asked(self, prompt: Prompt, event: pl.DataFrame) -> bool:
        """Whether a question is asked about one row of the log: none of what its answer reads is empty there."""
        anyhow = prompt.check()
        for problem in prompt.check(event_columns=event.columns):
            if problem not in anyhow:
                raise DataError(f"{prompt.name}:{problem} The interactions are those of {self.data}.")
        return bool(event_answers(prompt, event)[0])

    def _user(self, user: str) -> tuple[list[str], dict[str, Any] | None, pl.DataFrame]:
        """The whole history of a user, the user's columns, and what the log says of each event."""
        known = self.dataset.user_index
        if user not in known:
            hint = closest(user, known, f"It has {len(known)} users.")
            raise UnknownIdError(f'user {user!r} is not in {self.data}. {hint} Or pass a history: --history "id,id"')
        return self.dataset.of_user(known[user])

    def _rendered(
        self,
        prompt: Prompt,
        events: np.ndarray,
        target: int,
        user: Mapping[str, Any] | None,
        context: Mapping[str, Any] | None,
        event: Mapping[str, Any] | None,
    ) -> Rendered:
        if prompt.kind == "sequence":
            return rendered_sequence(self.tokenization, prompt, events, target, user, context)
        tokenization, told, cut = self.tokenization, [], 0
        read, answer = tokenization.question(
            prompt, target, history=events, user=user, context=context,
            event=event if prompt.subject == "event" else {}, room=self._room(prompt),
        )  # fmt: skip
        size = head = _size(read)
        if prompt.subject != "item":
            told = [tokenization.item(int(item)) for item in events]
            about = tokenization.item(target)

            def larger(first: int) -> int:  # Grows with ``first``, as bisect asks.
                return -_size(tokenization.head(prompt, user, context, item=about, history=told[first:]))

            cut = bisect_left(range(len(told)), -size, key=larger)
            head = -larger(len(told))
        counts = {"head": head, "history": size - head, "answer": _size(answer)}
        return _told(tokenization, prompt, read, answer, counts, cut, events if told else events[:0])


def rendered_sequence(
    tokenization: Tokenization,
    prompt: Prompt,
    events: np.ndarray,
    target: int | None,
    user: Mapping[str, Any] | None = None,
    context: Mapping[str, Any] | None = None,
) -> Rendered:
    """A sequence prompt as read.

    Args:
        tokenization: What makes it.
        prompt: A sequence prompt.
        events: int [events], item indices of the history, oldest first.
        target: The item that came next, or None.
        user, context: What the head may read.

    Raises:
        PromptError: The head leaves no room for an identifier.
    """
    head = tokenization.head(prompt, user, context)
    size = _size(head)
    kept = len(tokenization.sequence(prompt, events, user, context)) - size
    cut = kept_from(tokenization.fragment_lengths(prompt, events), kept)
    items = [span for event in events[cut:].tolist() for span in tokenization.fragment_spans(prompt, event)]
    answer = [] if target is None else tokenization.fragment_spans(prompt, target)[:1]
    counts = {"head": size, "history": kept, "answer": _size(answer)}
    return _told(tokenization, prompt, head + items, answer, counts, cut, events)


def _told(
    tokenization: Tokenization,
    prompt: Prompt,
    read: list[Span],
    answer: list[Span],
    counts: dict[str, int],
    cut: int,
    events: np.ndarray,
) -> Rendered:
    counts |= {"free": tokenization.max_length - sum(counts.values()), "max_length": tokenization.max_length}
    item_ids = tokenization.identifiers.item_ids
    return Rendered(prompt.kind, read, answer, counts, cut, [item_ids[event] for event in events.tolist()])


def _size(spans: Sequence[Span]) -> int:
    return sum(len(span.ids) for span in spans)
