"""The curriculum of a training run: which rows, in which order, made when they are asked for.

Rows come from histories (cut into windows of whole items), from walks over textual neighbours, and from question
prompts about items and histories. It knows token ids and nothing of models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from genrec import features
from genrec.config import Recipe
from genrec.errors import ConfigError, PromptError
from genrec.prompts import Prompt
from genrec.tokenization import IGNORE, Row, Tokenization

HISTORY, WALK, ITEM = 0, 1, 2  # What a row is about.
_POOL = 32  # Batches whose rows are sorted by length together.


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


def _askable(prompt: Prompt, tokenization: Tokenization) -> np.ndarray:
    """Indices of the items that a question can be asked about: with a title if it is read, and an answer."""
    about = np.arange(len(tokenization.items))
    if "title" in prompt.reads["item"]:
        about = about[(tokenization.items["title"] != "").to_numpy()]
    answered = [bool(prompt.render("assistant", item=tokenization.item(int(item)))) for item in about]
    return about[np.array(answered, dtype=bool)]


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
) -> Plan:
    """Decide the rows of every epoch: all windows of all histories, walks, and questions by weight.

    One row of the first sequence prompt per window is weight 1; other tasks get ``weight`` rows per such row. In the
    opening epochs (``walks.alone``, one at least where there are two or more) walks stand in the place of histories.

    Raises:
        PromptError: An event or a head that leaves no room for a row.
        ConfigError: No row at all, or none of the prompt that the adapter recommends with.
    """
    rng = np.random.default_rng([recipe.seed, 1])
    active = [user for user, history in enumerate(train) if len(history)]
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
    lengths: dict[int, list[np.ndarray]] = {}
    budgets: dict[int, list[int]] = {}  # Per user: a head may read the user's columns.
    for number, prompt in enumerate(prompts):
        if prompt.kind == "sequence":
            lengths[number] = [tokenization.fragment_lengths(prompt, history) for history in train]
            heads = (tokenization.head_ids(prompt, users[user] if users else None) for user in range(len(train)))
            budgets[number] = [tokenization.history_budget(head) for head in heads]
            # Of the whole catalogue: what fits no row in training would silently empty a history later.
            catalogue = tokenization.fragment_lengths(prompt, np.arange(len(tokenization.items)))
            longest, budget = int(catalogue.argmax()), min(budgets[number], default=recipe.max_length)
            if catalogue[longest] > budget:
                raise PromptError(
                    f"prompt {prompt.name}: item {tokenization.items['item_id'][longest]!r} takes "
                    f"{catalogue[longest]} tokens and max_length {recipe.max_length} leaves {budget} for the history. "
                    "Raise max_length, or shorten its block item."
                )

    def history_rows(number: int) -> list[tuple[int, ...]]:
        result: list[tuple[int, ...]] = []
        for user in active:
            length, budget = lengths[number][user], budgets[number][user]
            first = int(rng.integers(1, len(length) + 1)) if int(length[:-1].sum()) > budget else 0
            result += [(HISTORY, user, *window) for window in windows(length, budget, first)]
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
        if prompt.subject == "history":
            chosen = rng.choice(active, count)
            ends = [int(rng.integers(0, len(train[user]))) for user in chosen]
            return [(HISTORY, int(user), 0, end + 1, end) for user, end in zip(chosen, ends, strict=True)]
        if prompt.name not in asked:
            asked[prompt.name] = _askable(prompt, tokenization)
        about = asked[prompt.name]
        rounds = math.ceil(count / len(about)) if len(about) else 0
        order = np.concatenate([rng.permutation(about) for _ in range(rounds)]) if rounds else about
        return [(ITEM, int(item), 0, 0, 0) for item in order[:count]]

    def bucketed(rows: list[tuple[int, ...]]) -> np.ndarray:
        table = np.array(rows, dtype=np.int32).reshape(-1, 7)
        table = table[rng.permutation(len(table))]
        size = table[:, 5] - table[:, 4]  # Events; questions, which have none, stay together.
        pools = [
            part[np.argsort(size[start : start + len(part)], kind="stable")]
            for start in range(0, len(table), _POOL * batch_size)
            for part in [table[start : start + _POOL * batch_size]]
        ]
        table = np.concatenate(pools) if pools else table
        batches = [table[start : start + batch_size] for start in range(0, len(table), batch_size)]
        return np.concatenate([batches[number] for number in rng.permutation(len(batches))]) if batches else table

    tables = []
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
            elif prompt.subject == "history" and epoch < opening:
                continue
            else:
                made = question_rows(prompt, round(weight * windows_now))
            rows += [(epoch, number, *row) for row in made]
        tables.append(bucketed(rows))
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
    ) -> None:
        self.plan, self.prompts, self.tokenization, self.train, self.users = made, prompts, tokenization, train, users
        self.weights = weights  # Of the events of ``train``; scaled so that their mean is 1.
        if weights is not None:
            mean = np.concatenate(list(weights)).mean(dtype=np.float64)
            self.weights = [(weight / mean).astype(np.float32) for weight in weights]

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
            past = self.train[index][: stop - 1]
            return self.tokenization.question_row(prompt, int(self.train[index][stop - 1]), history=past, user=user)
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
