"""The curriculum of a training run: which rows, in which order, made when they are asked for.

Rows come from histories (cut into windows of whole items), from walks over textual neighbours, and from question
prompts about items, histories and events. It knows token ids and nothing of models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from genrec import features
from genrec.config import Recipe
from genrec.errors import ConfigError, DataError, PromptError
from genrec.prompts import Prompt
from genrec.tokenization import IGNORE, Row, Tokenization, event_answers

HISTORY, WALK, ITEM = 0, 1, 2  # What a row is about; a question about an event is about its history and what followed.
_POOL = 64  # Batches whose rows are sorted by length together.


def windows(lengths: np.ndarray, budget: int, first: int) -> list[tuple[int, int, int]]:
    """Cut a history into windows that fit, so that every event is a target exactly once.

    Args:
        lengths: int [events], tokens of each event.
        budget: Tokens of the events before the last one of a window, at most.
        first: Events of the first window, at most (0: as many as fit); shifts where the later ones begin.

    Returns:
        ``(start, stop, context)`` per window: events ``start:stop``, of which the first ``context`` carry no loss
        because they are targets of the window before. ``context`` is 0 for the first window, else 1.
    """
    total = np.concatenate([[0], np.cumsum(lengths)])
    result: list[tuple[int, int, int]] = []
    start, context = 0, 0
    while True:
        # The last event of a window is its identifier alone, so only the events before it count: total[stop - 1].
        stop = int(np.searchsorted(total, total[start] + budget, side="right"))
        stop = min(max(stop, start + context + 1), len(lengths))
        if not result and first and stop < len(lengths):
            stop = min(stop, first)
        result.append((start, stop, context))
        if stop >= len(lengths):
            return result
        start, context = stop - 1, 1


def later_windows(lengths: np.ndarray, budget: int, begin: int, end: int) -> list[tuple[int, int, int]]:
    """Windows in which the events ``begin:end`` of a history are targets exactly once, after as much as fits.

    Targets take up to half of the budget, so that the other half is left for what came before them.

    Args:
        lengths: int [events], tokens of each event.
        budget: Tokens of the events before the last one of a window, at most.

    Returns:
        ``(start, stop, context)`` per window, as ``windows`` gives them.
    """
    total = np.concatenate([[0], np.cumsum(lengths)])
    result: list[tuple[int, int, int]] = []
    while begin < end:
        stop = int(np.searchsorted(total, total[begin] + budget // 2, side="right"))
        stop = min(max(stop, begin + 1), end)
        start = int(np.searchsorted(total, total[stop - 1] - budget, side="left"))
        result.append((start, stop, begin - start))
        begin = stop
    return result


@dataclass(frozen=True, eq=False)
class Fresh:
    """What training goes on with where a model has been trained on a part of the events already.

    Attributes:
        known: int [users], how many events of each training history it was trained on: the first ones.
        held: int [users], the place of an event that must not become a target, or -1.
        replay: Rows of known events per row of new ones, against forgetting.
    """

    known: np.ndarray
    held: np.ndarray
    replay: float

    def new(self, user: int, events: int) -> list[tuple[int, int]]:
        """The runs ``(begin, end)`` of new targets in a training history of so many events."""
        known, held = int(self.known[user]), int(self.held[user])
        runs = [(known, held), (held + 1, events)] if known <= held < events else [(known, events)]
        return [(begin, end) for begin, end in runs if begin < end]


def bucketed(
    table: np.ndarray, size: np.ndarray, batch_size: int, rng: np.random.Generator, first: int = 0
) -> np.ndarray:
    """Rows in random batches, each of about one length where it can be, so that little of them is padding.

    Args:
        table: int32 [rows, 7], as in ``Plan``.
        size: float [rows], about the tokens of each row.
        batch_size: Rows of a batch.
        rng: Draws the rows of a pool and the order of the batches.
        first: Rows that fill the batch that stands before these.

    Returns:
        int32 [rows, 7], the rows of ``table``, each once: ``first`` of them, then whole batches, then what is left,
        which stays last, since it would shift all batches after it.
    """
    drawn = rng.permutation(len(table))
    pools = [drawn[start : start + _POOL * batch_size] for start in range(0, len(drawn), _POOL * batch_size)]
    order = np.concatenate([drawn[:0], *(pool[np.argsort(size[pool], kind="stable")] for pool in pools)])
    begun, order = order[:first], order[first:]
    whole = len(order) // batch_size * batch_size
    batches = rng.permutation(order[:whole].reshape(-1, batch_size))
    return table[np.concatenate([begun, batches.ravel(), order[whole:]])]


def _askable(prompt: Prompt, tokenization: Tokenization) -> np.ndarray:
    """Indices of the items that a question can be asked about: with a title if it is read, and an answer."""
    about = np.arange(len(tokenization.items))
    if "title" in prompt.reads["item"]:
        about = about[(tokenization.items["title"] != "").to_numpy()]
    answered = [bool(prompt.render("assistant", item=tokenization.item(int(item)))) for item in about]
    return about[np.array(answered, dtype=bool)]


def _first_events(train: Sequence[np.ndarray]) -> np.ndarray:
    """int64 [users + 1]: where the events of each user begin in a table of all training events."""
    return np.concatenate([[0], np.cumsum([len(history) for history in train])]).astype(np.int64)


def _given(prompt: Prompt, events: pl.DataFrame | None) -> pl.DataFrame:
    if events is None:
        raise DataError(f"prompt {prompt.name} asks about events, and none were given. Pass Split.train_events.")
    return events


@dataclass(frozen=True)
class Plan:
    """The rows of a whole training run in the order in which they are trained.

    Attributes:
        table: int32 [rows, 7]: epoch, task, kind (history, walk or item), index of it, start, stop, context.
        walks: The walks that rows refer to.
    """

    table: np.ndarray
    walks: list[np.ndarray]


def plan(
    recipe: Recipe,
    prompts: Sequence[Prompt],
    tokenization: Tokenization,
    train: Sequence[np.ndarray],
    neighbours: np.ndarray | None,
    users: Sequence[Mapping[str, Any]] | None = None,
    *,
    epochs: int,
    batch_size: int,
    events: pl.DataFrame | None = None,
    fresh: Fresh | None = None,
) -> Plan:
    """Decide the rows of every epoch: all windows of all histories, walks, and questions by weight.

    One row of the first sequence prompt per window is weight 1; other tasks get ``weight`` rows per such row. In the
    opening epochs (``walks.alone``, one at least where there are two or more) walks stand in the place of histories.
    ``events`` are those of ``train``, as ``Split.train_events`` has them: what questions about events are answered by.
    With ``fresh`` its new events and a share of the known ones are targets, in the place of all histories.

    Raises:
        PromptError: An event or a head that leaves no room for a row.
        DataError: A question about events that no event answers.
        ConfigError: No row at all, or none of the prompt that the adapter recommends with.
    """
    rng = np.random.default_rng([recipe.seed, 1])
    active = [
        user for user, history in enumerate(train)
        if (len(history) if fresh is None else fresh.new(user, len(history)))
    ]  # fmt: skip
    leader = next((number for number, prompt in enumerate(prompts) if prompt.kind == "sequence"), 0)
    unit = recipe.tasks[leader].weight
    if unit == 0:
        raise ConfigError(
            f"recipe: prompt {prompts[leader].name} is the first sequence prompt, which the adapter recommends with, "
            "and its weight is 0. Give it a weight, or put another sequence prompt before it."
        )
    opening = round(recipe.walks.alone * epochs) if neighbours is not None else 0
    if neighbours is not None and recipe.walks.alone > 0 and epochs > 1:
        opening = max(opening, 1)  # A small share of few epochs is one epoch, not none.
    walks: list[np.ndarray] = []
    asked: dict[str, np.ndarray] = {}
    begin = _first_events(train)
    lengths: dict[int, list[np.ndarray]] = {}
    budgets: dict[int, list[int]] = {}  # Per user: a head may read the user's columns.
    # What tells about how long a row is: per prompt the tokens of its head and those that each item adds.
    before: dict[int, int] = {}
    adds: dict[int, np.ndarray] = {}
    question_sizes: dict[tuple[int, int], int] = {}
    for number, prompt in enumerate(prompts):
        if prompt.kind == "sequence":
            lengths[number] = [tokenization.fragment_lengths(prompt, history) for history in train]
            heads = (tokenization.head_ids(prompt, users[user] if users else None) for user in range(len(train)))
            budgets[number] = [tokenization.history_budget(head) for head in heads]
            # Of the whole catalogue: what fits no row in training would silently empty a history later.
            catalogue = tokenization.fragment_lengths(prompt, np.arange(len(tokenization.items)))
            longest, budget = int(catalogue.argmax()), min(budgets[number], default=recipe.max_length)
            before[number], adds[number] = recipe.max_length - budget, catalogue
            if catalogue[longest] > budget:
                raise PromptError(
                    f"prompt {prompt.name}: item {tokenization.items['item_id'][longest]!r} takes "
                    f"{catalogue[longest]} tokens and max_length {recipe.max_length} leaves {budget} for the history. "
                    "Raise max_length, or shorten its block item."
                )

    def history_rows(number: int) -> list[tuple[int, ...]]:
        result: list[tuple[int, ...]] = []
        if fresh is not None:
            for user in active:
                for begin_, end in fresh.new(user, len(train[user])):
                    cut = later_windows(lengths[number][user], budgets[number][user], begin_, end)
                    result += [(HISTORY, user, *window) for window in cut]
            old = [user for user in range(len(train)) if fresh.known[user]]
            known = whole(number, old, fresh.known)
            again = rng.choice(len(known), min(len(known), round(fresh.replay * len(result))), replace=False)
            return result + [known[row] for row in again]
        return whole(number, active, None)

    def whole(number: int, users: Sequence[int], ends: np.ndarray | None) -> list[tuple[int, ...]]:
        result: list[tuple[int, ...]] = []
        for user in users:
            length, budget = lengths[number][user], budgets[number][user]
            length = length if ends is None else length[: ends[user]]
            cut = windows(length, budget, 0)
            if len(cut) > 1:  # Other places to cut in every epoch.
                cut = windows(length, budget, int(rng.integers(1, cut[0][1] + 1)))
            result += [(HISTORY, user, *window) for window in cut]
        return result

    def walk_rows(prompt: Prompt, count: int) -> list[tuple[int, ...]]:
        if neighbours is None or count == 0:
            return []
        drawn = features.walks(neighbours, count, recipe.walks.length, rng, mean_rank=recipe.walks.mean_rank)
        budget = tokenization.history_budget(tokenization.head_ids(prompt))
        # A walk ends where the row is full.
        drawn = [walk[: windows(tokenization.fragment_lengths(prompt, walk), budget, 0)[0][1]] for walk in drawn]
        begin = len(walks)
        walks.extend(drawn)
        return [(WALK, begin + number, 0, len(walk), 0) for number, walk in enumerate(drawn)]

    def question_rows(prompt: Prompt, count: int) -> list[tuple[int, ...]]:
        if prompt.subject == "history" and fresh is not None:
            order = mixed(np.arange(begin[-1]), count)
            whose = np.searchsorted(begin, order, side="right") - 1
            at = order - begin[whose]
            return [(HISTORY, user, 0, end + 1, end) for user, end in zip(whose.tolist(), at.tolist(), strict=True)]
        if prompt.subject == "history":
            chosen = rng.choice(active, count)
            ends = [int(rng.integers(0, len(train[user]))) for user in chosen]
            return [(HISTORY, int(user), 0, end + 1, end) for user, end in zip(chosen, ends, strict=True)]
        if prompt.name not in asked:
            asked[prompt.name] = _askable(prompt, tokenization) if prompt.subject == "item" else answered(prompt)
        about = asked[prompt.name]
        rounds = math.ceil(count / len(about)) if len(about) else 0
        order = np.concatenate([rng.permutation(about) for _ in range(rounds)])[:count] if rounds else about
        if prompt.subject == "event" and fresh is not None:
            order = mixed(about, count)
        if prompt.subject == "item":
            return [(ITEM, int(item), 0, 0, 0) for item in order]
        whose = np.searchsorted(begin, order, side="right") - 1
        at = order - begin[whose]
        return [(HISTORY, user, 0, end + 1, end) for user, end in zip(whose.tolist(), at.tolist(), strict=True)]

    def mixed(among: np.ndarray, count: int) -> np.ndarray:
        """Numbers of events out of ``among``: new targets, and the share of known ones that is to be repeated."""
        assert fresh is not None
        user = np.searchsorted(begin, among, side="right") - 1
        place = among - begin[user]
        known = place < fresh.known[user]
        new, old = among[~known & (place != fresh.held[user])], among[known]
        repeated = round(count * fresh.replay / (1 + fresh.replay)) if len(old) else 0
        repeated = count if not len(new) and len(old) else repeated
        parts = [rng.choice(part, size) for part, size in ((new, count - repeated), (old, repeated)) if len(part)]
        return np.concatenate(parts).astype(np.int64) if parts else among[:0]

    def answered(prompt: Prompt) -> np.ndarray:
        told = event_answers(prompt, _given(prompt, events))
        found = np.flatnonzero([bool(answer) for answer in told])
        if not len(found):
            raise DataError(
                f"prompt {prompt.name}: none of the {len(told)} training interactions has an answer; it reads "
                f"{', '.join(sorted(prompt.reads['event']))}. Import a log that has them, or leave the task out."
            )
        return found

    def size(row: tuple[int, ...]) -> float:
        """About the tokens of a row; a question about a history or an event goes by its events."""
        _, number, kind, index, start, stop, _ = row
        if kind == ITEM:
            if (number, index) not in question_sizes:
                question_sizes[number, index] = len(tokenization.question_row(prompts[number], index).ids)
            return question_sizes[number, index]
        if number not in adds:
            return stop - start
        return before[number] + float(adds[number][(walks if kind == WALK else train)[index][start:stop]].sum())

    tables: list[np.ndarray] = []
    for epoch in range(epochs):
        rows: list[tuple[int, ...]] = []
        windows_now = len(active)
        for number in sorted(range(len(prompts)), key=lambda number: number != leader):
            prompt, weight = prompts[number], recipe.tasks[number].weight / unit
            if weight == 0:
                continue
            if prompt.kind == "sequence":
                made = [] if epoch < opening else history_rows(number)
                if number == leader:
                    windows_now = len(made) or len(active)
                else:
                    made = [made[index] for index in rng.choice(len(made), round(weight * windows_now))] if made else []
                share = 1.0 if epoch < opening else recipe.walks.share
                made += walk_rows(prompt, round(weight * share * len(active)))
            elif prompt.subject != "item" and epoch < opening:
                continue
            else:
                made = question_rows(prompt, round(weight * windows_now))
            rows += [(epoch, number, *row) for row in made]
        first = -sum(len(table) for table in tables) % batch_size
        drawn = np.array(rows, dtype=np.int32).reshape(-1, 7)
        tables.append(bucketed(drawn, np.array([size(row) for row in rows]), batch_size, rng, first))
    table = np.concatenate([np.empty((0, 7), dtype=np.int32), *tables])
    if not len(table):
        raise ConfigError(
            "recipe: its tasks, weights and whole epochs make no training row. Raise a weight or "
            "training.num_train_epochs, or add interactions."
        )
    return Plan(table, walks)


class Rows:
    """Makes the rows of a plan when they are asked for."""

    def __init__(
        self,
        made: Plan,
        prompts: Sequence[Prompt],
        tokenization: Tokenization,
        train: Sequence[np.ndarray],
        users: Sequence[Mapping[str, Any]] | None = None,
        weights: Sequence[np.ndarray] | None = None,
        events: pl.DataFrame | None = None,
    ) -> None:
        self.plan, self.prompts, self.tokenization, self.train, self.users = made, prompts, tokenization, train, users
        self.weights = weights  # Of the events of ``train``; scaled so that their mean is 1.
        if weights is not None:
            mean = np.concatenate(list(weights)).mean(dtype=np.float64)
            self.weights = [(weight / mean).astype(np.float32) for weight in weights]
        self.events = events  # Of ``train``, as ``Split.train_events`` has them.
        self.rooms = {
            prompt.name: tokenization.answer_room(prompt, event_answers(prompt, _given(prompt, events)))
            for prompt in prompts
            if prompt.subject == "event"
        }
        self._begin = _first_events(train)

    def __len__(self) -> int:
        return len(self.plan.table)

    def row(self, number: int) -> Row:
        """Row ``number`` of the plan."""
        _, task, kind, index, start, stop, context = self.plan.table[number].tolist()
        prompt = self.prompts[task]
        user = self.users[index] if self.users is not None and kind == HISTORY else None
        if prompt.kind == "sequence":
            if kind == WALK:
                return self.tokenization.sequence_row(prompt, self.plan.walks[index])
            weights = None if self.weights is None else self.weights[index][start:stop]
            events = self.train[index][start:stop]
            return self.tokenization.sequence_row(prompt, events, user=user, context=context, weights=weights)
        if kind == HISTORY:
            item, past, event = int(self.train[index][stop - 1]), self.train[index][: stop - 1], None
            if prompt.subject == "event":
                event = _given(prompt, self.events).row(int(self._begin[index]) + stop - 1, named=True)
            room = self.rooms.get(prompt.name, 0)
            return self.tokenization.question_row(prompt, item, history=past, user=user, event=event, room=room)
        return self.tokenization.question_row(prompt, index)

    def batch(self, numbers: Sequence[int], pad: int) -> dict[str, np.ndarray]:
        """Rows ``numbers``, padded: ``input_ids``, ``labels``, ``attention_mask``, each int64 [rows, longest].

        Where events have weights, also ``weights``, float32 of the same shape.
        """
        made = [self.row(number) for number in numbers]
        shape = (len(made), max(len(row.ids) for row in made))
        result = {
            "input_ids": np.full(shape, pad, dtype=np.int64),
            "labels": np.full(shape, IGNORE, dtype=np.int64),
            "attention_mask": np.zeros(shape, dtype=np.int64),
        }
        for place, row in enumerate(made):
            result["input_ids"][place, : len(row.ids)] = row.ids
            result["labels"][place, : len(row.ids)] = row.labels
            result["attention_mask"][place, : len(row.ids)] = 1
        if self.weights is not None:
            result["weights"] = np.ones(shape, dtype=np.float32)
            for place, row in enumerate(made):
                if row.weights is not None:
                    result["weights"][place, : len(row.ids)] = row.weights
        return result
