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
from genrec.errors import ConfigError, DataError
from genrec.prompts import Prompt
from genrec.splits import contexts
from genrec.tokenization import IGNORE, Row, Tokenization, event_answers
from genrec.windows import Cuts, begins, later_windows, windows

HISTORY, WALK, ITEM = 0, 1, 2  # What a row is about; a question about an event is about its history and what followed.
_POOL = 64  # Batches whose rows are sorted by length together.


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


@dataclass(frozen=True)
class Plan:
    """The rows of a whole training run in the order in which they are trained.

    Attributes:
        table: int32 [rows, 7]: epoch, task, kind (history, walk or item), index of it, start, stop, skip.
        walks: The walks, and the variants of histories, that rows refer to.
    """

    table: np.ndarray
    walks: list[np.ndarray]


def _in_rounds(among: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """``count`` of ``among`` at random: all of them before one comes again."""
    rounds = math.ceil(count / len(among)) if len(among) else 0
    return np.concatenate([among[:0], *(rng.permutation(among) for _ in range(rounds))])[:count]


class _Histories:
    """Makes the rows that are about training histories, of which all events are targets.

    Rows are ``(kind, index, start, stop, skip)``; an event is told by its place in a table of all of them.
    """

    def __init__(self, train: Sequence[np.ndarray], rng: np.random.Generator) -> None:
        self.train, self.rng, self.begin = train, rng, begins(train)
        self.active = [user for user, history in enumerate(train) if len(history)]
        self.retold: Sequence[np.ndarray] = train  # What walks may tell in another way.

    def windows(self, cuts: Cuts) -> list[tuple[int, ...]]:
        """A sequence prompt's rows of an epoch."""
        return self._whole(cuts, self.active, [len(history) for history in self.train])

    def _whole(self, cuts: Cuts, users: Sequence[int], ends: Sequence[int] | np.ndarray) -> list[tuple[int, ...]]:
        result: list[tuple[int, ...]] = []
        for user in users:
            length, budget = cuts.lengths[user][: ends[user]], cuts.budgets[user]
            cut = windows(length, budget, 0)
            if len(cut) > 1:  # Other places to cut in every epoch.
                cut = windows(length, budget, int(self.rng.integers(1, cut[0][1] + 1)))
            result += [(HISTORY, user, *window) for window in cut]
        return result

    def answers(self, cuts: Cuts) -> list[tuple[int, ...]]:
        """A sequence prompt's rows of an epoch in which one event of every history is a target, after what fits."""
        result: list[tuple[int, ...]] = []
        for user in self.active:
            event = self._drawn(user)
            cut = later_windows(cuts.lengths[user], cuts.budget(user, event), event, event + 1)
            result += [(HISTORY, user, *row) for row in cut]
        return result

    def _drawn(self, user: int) -> int:
        return int(self.rng.integers(len(self.train[user])))

    def what_came_next(self, count: int) -> list[tuple[int, ...]]:
        """Rows of a question about histories: a user, and an event that the question asks for."""
        chosen = self.rng.choice(self.active, count)
        ends = [int(self.rng.integers(0, len(self.train[user]))) for user in chosen]
        return [(HISTORY, int(user), 0, end + 1, end) for user, end in zip(chosen, ends, strict=True)]

    def about_events(self, among: np.ndarray, count: int) -> list[tuple[int, ...]]:
        """Rows of a question about events, out of ``among``."""
        return self._asked(_in_rounds(among, count, self.rng))

    def _places(self, events: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of events: their users, and their places in those users' histories."""
        users = np.searchsorted(self.begin, events, side="right") - 1
        return users, events - self.begin[users]

    def _asked(self, events: np.ndarray) -> list[tuple[int, ...]]:
        users, places = self._places(events)
        return [(HISTORY, user, 0, end + 1, end) for user, end in zip(users.tolist(), places.tolist(), strict=True)]


class _FreshHistories(_Histories):
    """The same where a part of the events is known already: the new ones are targets, and a share of the known ones."""

    def __init__(self, train: Sequence[np.ndarray], rng: np.random.Generator, fresh: Fresh) -> None:
        super().__init__(train, rng)
        self.fresh = fresh
        self.retold = []  # It would make targets of known events, and of those that are held back.
        self.active = [user for user in self.active if fresh.new(user, len(train[user]))]

    def windows(self, cuts: Cuts) -> list[tuple[int, ...]]:
        result: list[tuple[int, ...]] = []
        for user in self.active:
            for begin, end in self.fresh.new(user, len(self.train[user])):
                cut = later_windows(cuts.lengths[user], cuts.budgets[user], begin, end)
                result += [(HISTORY, user, *window) for window in cut]
        old = [user for user in range(len(self.train)) if self.fresh.known[user]]
        known = self._whole(cuts, old, self.fresh.known)
        again = min(len(known), round(self.fresh.replay * len(result)))
        return result + [known[row] for row in self.rng.choice(len(known), again, replace=False)]

    def _drawn(self, user: int) -> int:
        new = [event for run in self.fresh.new(user, len(self.train[user])) for event in range(*run)]
        return int(self.rng.choice(new))

    def what_came_next(self, count: int) -> list[tuple[int, ...]]:
        return self.about_events(np.arange(self.begin[-1]), count)

    def about_events(self, among: np.ndarray, count: int) -> list[tuple[int, ...]]:
        users, places = self._places(among)
        known = places < self.fresh.known[users]
        new, old = among[~known & (places != self.fresh.held[users])], among[known]
        repeated = round(count * self.fresh.replay / (1 + self.fresh.replay)) if len(old) else 0
        repeated = repeated if len(new) else count
        drawn = [_in_rounds(new, count - repeated, self.rng), _in_rounds(old, repeated, self.rng)]
        return self._asked(np.concatenate(drawn))


class _Walks:
    """Makes walks over textual neighbours, variants of histories, and the rows of both; keeps them in ``made``."""

    def __init__(
        self, recipe: Recipe, tokenization: Tokenization, neighbours: np.ndarray | None, rng: np.random.Generator
    ) -> None:
        self.recipe, self.tokenization, self.neighbours, self.rng = recipe, tokenization, neighbours, rng
        self.made: list[np.ndarray] = []

    def rows(self, prompt: Prompt, catalogue: np.ndarray, count: int) -> list[tuple[int, ...]]:
        """Rows of a sequence prompt; ``catalogue`` has the tokens of an event with each item."""
        if self.neighbours is None or count == 0:
            return []
        told = self.recipe.walks
        drawn = features.walks(self.neighbours, count, told.length, self.rng, mean_rank=told.mean_rank)
        return self._cut(drawn, catalogue, self._budget(prompt))

    def variants(
        self, prompt: Prompt, catalogue: np.ndarray, histories: Sequence[np.ndarray], count: int
    ) -> list[tuple[int, ...]]:
        """Rows of ``count`` of the ``histories``, all of them before one comes again, told with near items."""
        if self.neighbours is None or count == 0 or not histories:
            return []
        told, budget = self.recipe.walks, self._budget(prompt)
        chosen = []
        for number in _in_rounds(np.arange(len(histories)), count, self.rng):
            fits = windows(catalogue[histories[number]], budget, 0)[0][1]
            start = int(self.rng.integers(len(histories[number]) - fits + 1))
            chosen.append(histories[number][start : start + fits])
        drawn = features.variants(self.neighbours, chosen, told.replaced, self.rng, mean_rank=told.mean_rank)
        return self._cut(drawn, catalogue, budget)

    def newcomers(
        self, prompt: Prompt, catalogue: np.ndarray, histories: Sequence[np.ndarray], unseen: np.ndarray
    ) -> list[tuple[int, ...]]:
        """Rows in which each of ``unseen`` is what came next in a history, right after a near item."""
        if self.neighbours is None or not len(unseen):
            return []
        mean_rank, budget = self.recipe.walks.mean_rank, self._budget(prompt)
        result: list[tuple[int, ...]] = []
        for item, user, place in features.newcomers(self.neighbours, unseen, histories, self.rng, mean_rank):
            told = np.append(histories[user][: place + 1], item).astype(np.int32)
            ((start, stop, skip),) = later_windows(catalogue[told], budget, place + 1, place + 2)
            result.append((WALK, len(self.made), 0, stop - start, skip))
            self.made.append(told[start:stop])
        return result

    def _budget(self, prompt: Prompt) -> int:
        return self.tokenization.history_budget(self.tokenization.head_ids(prompt))

    def _cut(self, drawn: Sequence[np.ndarray], catalogue: np.ndarray, budget: int) -> list[tuple[int, ...]]:
        # A walk ends where the row is full.
        drawn = [walk[: windows(catalogue[walk], budget, 0)[0][1]] for walk in drawn]
        begin = len(self.made)
        self.made.extend(drawn)
        last = self.recipe.loss == "answer"
        return [(WALK, begin + number, 0, len(walk), len(walk) - 1 if last else 0) for number, walk in enumerate(drawn)]


def _askable(prompt: Prompt, tokenization: Tokenization) -> np.ndarray:
    """Indices of the items that a question can be asked about: with a title if it is read, and an answer."""
    about = np.arange(len(tokenization.items))
    if "title" in prompt.reads["item"]:
        about = about[(tokenization.items["title"] != "").to_numpy()]
    answered = [bool(prompt.render("assistant", item=tokenization.item(int(item)))) for item in about]
    return about[np.array(answered, dtype=bool)]


def _given(prompt: Prompt, events: pl.DataFrame | None) -> pl.DataFrame:
    if events is None:
        raise DataError(f"prompt {prompt.name} reads what the log says of events. Pass events=Split.train_events.")
    return events


def _contexts(prompts: Sequence[Prompt], events: pl.DataFrame | None) -> pl.DataFrame | None:
    """The contexts of ``events``, where one of the prompts reads them."""
    reading = next((prompt for prompt in prompts if prompt.reads["context"]), None)
    return None if reading is None else contexts(_given(reading, events))


def _check_loss(recipe: Recipe, prompts: Sequence[Prompt]) -> None:
    """Refuse rows of many targets below a head that tells the context of one."""
    for prompt in prompts:
        if prompt.kind == "sequence" and prompt.reads["context"] and recipe.loss == "every":
            raise ConfigError(
                f'recipe: loss is "every", and the head of the prompt {prompt.name} reads context.'
                f"{min(prompt.reads['context'])}, which is that of one event, while a row would train all of them. "
                'Set loss = "answer", or take context out of the prompt.'
            )


def _answered(prompt: Prompt, answers: Sequence[str]) -> np.ndarray:
    """Numbers of the events that answer a question.

    Raises:
        DataError: There are none.
    """
    found = np.flatnonzero([bool(answer) for answer in answers])
    if not len(found):
        raise DataError(
            f"prompt {prompt.name}: none of the {len(answers)} training interactions has an answer; it reads "
            f"{', '.join(sorted(prompt.reads['event']))}. Import a log that has them, or leave the task out."
        )
    return found


class _QuestionSizes:
    """About how many tokens the rows of a question prompt have, from what each item adds, which is rendered once.

    Args:
        answers: Of a question about events: int [events], tokens of the answer that each gives.
    """

    def __init__(self, prompt: Prompt, tokenization: Tokenization, answers: np.ndarray | None) -> None:
        self.prompt, self.tokenization, self.answers = prompt, tokenization, answers
        self.room = 0 if answers is None else int(answers.max(initial=0))
        self.alone: dict[int, int] = {}
        self.adds = np.full(len(tokenization.items), np.nan)

    def _without(self, item: int) -> int:
        """Tokens of a row with no history, of a question about events without its answer."""
        if item not in self.alone:
            if self.answers is None:
                self.alone[item] = len(self.tokenization.question_row(self.prompt, item).ids)
            else:
                self.alone[item] = len(self.tokenization.question_ids(self.prompt, item, room=self.room))
        return self.alone[item]

    def size(self, item: int, history: np.ndarray, event: int) -> float:
        """About the tokens of a row about ``item``, which came after ``history``; ``event`` is its number."""
        most = self.tokenization.max_length - self.room
        newest = history[-self.tokenization.max_length :]  # Most events have a token; spares looking at the rest.
        for index in np.unique(newest[np.isnan(self.adds[newest])]).tolist():
            # What a second one adds, so that a text between two events counts too.
            one, two = (self.tokenization.question_size(self.prompt, index, [index] * count) for count in (1, 2))
            self.adds[index] = two - one
        asked = min(self._without(item) + float(self.adds[newest].sum()), most)
        return asked if self.answers is None else asked + float(self.answers[event])


def _leader(recipe: Recipe, prompts: Sequence[Prompt]) -> int:
    """Number of the prompt that the adapter recommends with, whose rows weights count by."""
    leader = next((number for number, prompt in enumerate(prompts) if prompt.kind == "sequence"), 0)
    if recipe.tasks[leader].weight == 0:
        raise ConfigError(
            f"recipe: prompt {prompts[leader].name} is the first sequence prompt, which the adapter recommends with, "
            "and its weight is 0. Give it a weight, or put another sequence prompt before it."
        )
    return leader


def _opening(recipe: Recipe, epochs: int) -> int:
    """Epochs of walks alone: a small share of few epochs is one epoch, not none."""
    share = recipe.walks.alone
    return max(round(share * epochs), 1 if share > 0 and epochs > 1 else 0)


def _question(
    prompt: Prompt, tokenization: Tokenization, events: pl.DataFrame | None
) -> tuple[np.ndarray, _QuestionSizes]:
    """Items or events that a question can be asked about (none where it asks what came next), and the rows' sizes."""
    if prompt.subject == "event":
        answers = event_answers(prompt, _given(prompt, events))
        lengths = {answer: len(tokenization.answer_ids(prompt, answer)) for answer in set(answers)}
        tokens = np.array([lengths[answer] for answer in answers])
        return _answered(prompt, answers), _QuestionSizes(prompt, tokenization, tokens)
    about = _askable(prompt, tokenization) if prompt.subject == "item" else np.empty(0, dtype=np.int64)
    return about, _QuestionSizes(prompt, tokenization, None)


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

    One row of the first sequence prompt per window is weight 1; questions get ``weight`` rows per such row. Another
    sequence prompt cuts windows of its own, and weight 1 is each of them once. In the opening epochs (``walks.alone``,
    one at least where there are two or more) walks stand in the place of histories. ``events`` are those of
    ``train``, as ``Split.train_events`` has them: what questions about events are answered by. With ``fresh`` its
    new events and a share of the known ones are targets, in the place of all histories.

    Raises:
        PromptError: An event or a head that leaves no room for a row.
        DataError: A question about events that no event answers.
        ConfigError: No row at all, or none of the prompt that the adapter recommends with, or a sequence prompt that
            reads the context of the event to be predicted where every event of a row is.
    """
    _check_loss(recipe, prompts)
    told = _contexts(prompts, events)
    rng = np.random.default_rng([recipe.seed, 1])
    leader = _leader(recipe, prompts)
    # The leader first: the number of its windows is what the others are counted by.
    weights = [task.weight / recipe.tasks[leader].weight for task in recipe.tasks]
    order = [leader, *(number for number in range(len(prompts)) if number != leader and weights[number])]
    opening = _opening(recipe, epochs) if neighbours is not None else 0
    histories = _Histories(train, rng) if fresh is None else _FreshHistories(train, rng, fresh)
    walks = _Walks(recipe, tokenization, neighbours, rng)
    held = np.unique(np.concatenate([np.empty(0, dtype=np.int64), *train]))
    unseen = np.setdiff1d(np.arange(len(tokenization.items)), held)
    cuts: dict[int, Cuts] = {}
    about: dict[int, np.ndarray] = {}  # Items or events that a question can be asked about.
    questions: dict[int, _QuestionSizes] = {}
    for number, prompt in enumerate(prompts):
        if prompt.kind == "sequence":
            cuts[number] = Cuts.measure(prompt, tokenization, train, users, told)
        elif number in order:
            about[number], questions[number] = _question(prompt, tokenization, events)

    def size(row: tuple[int, ...]) -> float:
        """About the tokens of a row."""
        _, number, kind, index, start, stop, _ = row
        if kind == ITEM:
            return questions[number].size(index, np.empty(0, dtype=np.int32), 0)
        seen = (walks.made if kind == WALK else train)[index][start:stop]
        if number in questions:
            return questions[number].size(int(seen[-1]), seen[:-1], int(histories.begin[index]) + stop - 1)
        cut = cuts[number]
        budget = cut.budget(index, stop - 1) if kind == HISTORY else cut.least
        head = tokenization.max_length - budget - tokenization.tokens.shape[1]
        return head + float(cut.catalogue[seen[:-1]].sum() + tokenization.lengths[seen[-1]])

    tables: list[np.ndarray] = []
    for epoch in range(epochs):
        rows: list[tuple[int, ...]] = []
        windows_now = len(histories.active)
        for number in order:
            prompt, made = prompts[number], list[tuple[int, ...]]()
            if prompt.kind == "sequence":
                if epoch >= opening:
                    made = (histories.windows if recipe.loss == "every" else histories.answers)(cuts[number])
                if number == leader:
                    windows_now = len(made) or windows_now
                else:
                    count = round(weights[number] * len(made))  # Of its own, so that weight 1 has every event once.
                    made = [made[row] for row in _in_rounds(np.arange(len(made)), count, rng)]
                share = 1.0 if epoch < opening else recipe.walks.share
                count = round(weights[number] * share * len(histories.active))
                made += walks.rows(prompt, cuts[number].catalogue, count)
                if epoch >= opening and recipe.walks.variants:
                    count = round(weights[number] * recipe.walks.variants * len(histories.active))
                    longer = [history for history in histories.retold if len(history) > 1]
                    made += walks.variants(prompt, cuts[number].catalogue, longer, count)
                if epoch >= opening and recipe.walks.newcomers:
                    count = round(weights[number] * recipe.walks.newcomers * len(unseen))
                    chosen = _in_rounds(unseen, count, rng)
                    made += walks.newcomers(prompt, cuts[number].catalogue, histories.retold, chosen)
            else:
                count = round(weights[number] * windows_now)
                if prompt.subject == "item":
                    made = [(ITEM, int(item), 0, 0, 0) for item in _in_rounds(about[number], count, rng)]
                elif epoch < opening:
                    continue
                elif prompt.subject == "event":
                    made = histories.about_events(about[number], count)
                else:
                    made = histories.what_came_next(count)
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
    return Plan(table, walks.made)


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
        self.contexts = _contexts(prompts, events)
        self.rooms = {
            prompt.name: tokenization.answer_room(prompt, event_answers(prompt, _given(prompt, events)))
            for prompt in prompts
            if prompt.subject == "event"
        }
        self._begin = begins(train)

    def __len__(self) -> int:
        return len(self.plan.table)

    def row(self, number: int) -> Row:
        """Row ``number`` of the plan."""
        _, task, kind, index, start, stop, skip = self.plan.table[number].tolist()
        prompt = self.prompts[task]
        user = self.users[index] if self.users is not None and kind == HISTORY else None
        context = None
        if kind == HISTORY and prompt.reads["context"] and self.contexts is not None:
            context = self.contexts.row(int(self._begin[index]) + stop - 1, named=True)
        if prompt.kind == "sequence":
            if kind == WALK:
                return self.tokenization.sequence_row(prompt, self.plan.walks[index], skip=skip)
            weights = None if self.weights is None else self.weights[index][start:stop]
            events = self.train[index][start:stop]
            return self.tokenization.sequence_row(
                prompt, events, user=user, context=context, skip=skip, weights=weights
            )
        if kind == HISTORY:
            item, past, event = int(self.train[index][stop - 1]), self.train[index][: stop - 1], None
            if prompt.subject == "event":
                event = _given(prompt, self.events).row(int(self._begin[index]) + stop - 1, named=True)
            room = self.rooms.get(prompt.name, 0)
            return self.tokenization.question_row(
                prompt, item, history=past, user=user, context=context, event=event, room=room
            )
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
