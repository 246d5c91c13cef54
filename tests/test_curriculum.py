from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import numpy as np
import polars as pl
import pytest

from genrec import base, features
from genrec.config import Recipe, Task, WalkRecipe
from genrec.curriculum import HISTORY, ITEM, WALK, Fresh, Plan, Rows, bucketed, plan
from genrec.errors import ConfigError, DataError, PromptError
from genrec.identifiers import Identifiers
from genrec.prompts import Prompt
from genrec.tokenization import IGNORE, Tokenization, add_identifier_tokens

N_ITEMS, UNTITLED = 12, (3, 8)
ITEMS = pl.DataFrame(
    {
        "item_id": [f"i{item}" for item in range(N_ITEMS)],
        "title": ["" if item in UNTITLED else f"Film {item} of series {item // 4}" for item in range(N_ITEMS)],
        "brand": [f"studio {item % 3}" for item in range(N_ITEMS)],
    }
)
RNG = np.random.default_rng(0)
TRAIN = [RNG.integers(0, N_ITEMS, size).astype(np.int32) for size in (1, 5, 0, 40, 12, 2, 7, 25)]
USERS: list[dict[str, Any]] = [{"user_id": f"u{user}", "age": 10 + user} for user in range(len(TRAIN))]
ACTIVE = sum(len(history) > 0 for history in TRAIN)

NEXT = Prompt.parse("{% block user %}Next:{% endblock %}{% block item %}{{ item.identifier }}{% endblock %}", "next")
WITH_TEXT = Prompt.parse(
    "{% block user %}Seen:{% endblock %}{% block item %}{{ item.identifier }} {{ item.title }};{% endblock %}", "text"
)
WITH_USER = Prompt.parse(
    "{% block user %}Age {{ user.age }}{% endblock %}{% block item %}{{ item.identifier }}{% endblock %}", "aged"
)
TO_ITEM = Prompt.parse(
    '{% block user %}"{{ item.title }}"?{% endblock %}{% block assistant %}{{ item.identifier }}{% endblock %}',
    "to_item",
)
TO_TITLE = Prompt.parse(
    "{% block user %}{{ item.identifier }}?{% endblock %}{% block assistant %}{{ item.title }}{% endblock %}",
    "to_title",
)
FROM_HISTORY = Prompt.parse(
    "{% block user %}{% for past in history %}{{ past.identifier }}{% endfor %}?{% endblock %}"
    "{% block assistant %}{{ item.identifier }}{% endblock %}",
    "from_history",
)


@cache
def tokenization(max_length: int = 40, scheme: str = "atomic") -> Tokenization:
    tokenizer = base.train_tokenizer(ITEMS["title"].to_list(), 300)
    identifiers = Identifiers.build(scheme, ITEMS["item_id"].to_list(), levels=2, codes=4)
    add_identifier_tokens(tokenizer, identifiers)
    return Tokenization(tokenizer, identifiers, ITEMS, max_length=max_length)


@cache
def neighbours() -> np.ndarray:
    return features.neighbours(features.text(ITEMS), 5)


def recipe(*weights: float, **changes: Any) -> Recipe:
    return Recipe("b", "d", tuple(Task("p", weight) for weight in weights), **{"max_length": 40, **changes})


def make(
    prompts: list[Prompt],
    weights: list[float] | None = None,
    *,
    epochs: int = 2,
    batch_size: int = 4,
    length: int = 40,
    **changes: Any,
) -> tuple[Plan, Rows]:
    made = plan(
        recipe(*(weights or [1.0] * len(prompts)), max_length=length, **changes),
        prompts,
        tokenization(length),
        TRAIN,
        neighbours() if "walks" in changes else None,
        USERS,
        epochs=epochs,
        batch_size=batch_size,
    )
    return made, Rows(made, prompts, tokenization(length), TRAIN, USERS)


def counts(made: Plan, *columns: int) -> Counter[tuple[int, ...]]:
    return Counter(tuple(row) for row in made.table[:, columns].tolist())


def targets(made: Plan, task: int = 0) -> Counter[tuple[int, int, int]]:
    """(epoch, user, event) of every event of a history that is predicted."""
    found: Counter[tuple[int, int, int]] = Counter()
    for epoch, number, kind, index, start, stop, skip in made.table.tolist():
        if number == task and kind == HISTORY:
            found.update((epoch, index, event) for event in range(start + skip, stop))
    return found


# The plan


def test_a_plan_is_decided_by_its_seed() -> None:
    walks = WalkRecipe(share=0.5, alone=0.3)
    prompts = [NEXT, TO_ITEM, FROM_HISTORY]
    first, again, other = (make(prompts, epochs=3, walks=walks, seed=seed, length=16)[0] for seed in (3, 3, 4))
    np.testing.assert_array_equal(first.table, again.table)
    assert [walk.tolist() for walk in first.walks] == [walk.tolist() for walk in again.walks]
    assert first.table.tolist() != other.table.tolist()
    assert first.table.dtype == np.int32


@pytest.mark.parametrize("length", [12, 20, 64])
@pytest.mark.parametrize("prompt", [NEXT, WITH_USER], ids=lambda prompt: prompt.name)
def test_every_interaction_is_predicted_once_per_epoch(prompt: Prompt, length: int) -> None:
    made, rows = make([prompt], epochs=3, length=length)
    expected = {(epoch, user, event): 1 for epoch in range(3) for user in range(8) for event in range(len(TRAIN[user]))}
    assert targets(made) == expected
    assert len(rows) == len(made.table)
    made_rows = [rows.row(number) for number in range(len(rows))]
    assert max(len(row.ids) for row in made_rows) <= length
    assert sum(int((row.labels != IGNORE).sum()) for row in made_rows) == 3 * sum(map(len, TRAIN))
    assert [len(row) for row in made.table.tolist()] == [7] * len(made.table)
    assert made.table[:, 0].tolist() == sorted(made.table[:, 0])


def test_cut_histories_begin_elsewhere_in_every_epoch() -> None:
    made, _ = make([NEXT], epochs=12, length=12)
    starts = [
        tuple(sorted(row[4] for row in made.table.tolist() if row[0] == epoch and row[3] == 3)) for epoch in range(12)
    ]
    assert len(set(starts)) > 1


def test_weights_count_rows_per_row_of_the_first_sequence_prompt() -> None:
    made, _ = make([TO_ITEM, NEXT, FROM_HISTORY, WITH_USER, TO_TITLE], [1.0, 2.0, 0.5, 4.0, 0.0], length=64)
    assert counts(made, 0, 1) == {
        **{(epoch, 1): ACTIVE for epoch in range(2)},
        **{(epoch, 0): round(ACTIVE / 2) for epoch in range(2)},
        **{(epoch, 2): round(ACTIVE / 4) for epoch in range(2)},
        **{(epoch, 3): 2 * ACTIVE for epoch in range(2)},
    }
    assert counts(made, 1, 2).keys() == {(0, ITEM), (1, HISTORY), (2, HISTORY), (3, HISTORY)}


def test_the_unit_of_weight_is_a_window() -> None:
    made, _ = make([NEXT, TO_ITEM], [1.0, 1.0], length=16, epochs=1)
    by_task = counts(made, 1)
    assert by_task[(0,)] > ACTIVE
    assert by_task[(1,)] == by_task[(0,)]


def test_opening_epochs_hold_walks_and_no_interaction() -> None:
    walks = WalkRecipe(share=0.5, alone=0.5, length=4)
    made, rows = make([NEXT, TO_ITEM, FROM_HISTORY], epochs=4, walks=walks, length=64)
    by_kind = counts(made, 0, 1, 2)
    for epoch in (0, 1):
        assert by_kind[epoch, 0, WALK] == ACTIVE
        assert by_kind[epoch, 0, HISTORY] == by_kind[epoch, 2, HISTORY] == 0
        assert by_kind[epoch, 1, ITEM] == ACTIVE
    for epoch in (2, 3):
        assert by_kind[epoch, 0, HISTORY] == ACTIVE
        assert by_kind[epoch, 0, WALK] == round(ACTIVE / 2)
    assert len(made.walks) == 2 * ACTIVE + 2 * round(ACTIVE / 2)
    for number, row in enumerate(made.table.tolist()):
        if row[2] == WALK:
            walk = made.walks[row[3]]
            assert 1 <= len(walk) <= 4
            expected = tokenization(64).sequence_row(NEXT, walk)
            np.testing.assert_array_equal(rows.row(number).ids, expected.ids)
            np.testing.assert_array_equal(rows.row(number).labels, expected.labels)


def test_variants_are_histories_told_with_near_items_after_the_opening() -> None:
    walks = WalkRecipe(alone=0.25, variants=0.5, replaced=0.5)
    made, rows = make([NEXT], epochs=4, walks=walks, length=64)
    by_kind = counts(made, 0, 1, 2)
    assert by_kind[0, 0, WALK] == ACTIVE  # Walks alone.
    near = neighbours()
    whole = {len(history) for history in TRAIN}
    for epoch in (1, 2, 3):
        assert by_kind[epoch, 0, HISTORY] == ACTIVE
        assert by_kind[epoch, 0, WALK] == round(ACTIVE / 2)
    for row in made.table.tolist():
        if row[0] and row[2] == WALK:
            told = made.walks[row[3]]
            assert len(told) in whole
            assert any(
                len(history) == len(told)
                and all(new == old or new in near[old] for old, new in zip(history, told, strict=True))
                for history in TRAIN
            )
    assert len(rows) == len(made.table)


def test_a_variant_of_a_long_history_is_a_piece_of_it() -> None:
    made, rows = make([NEXT], epochs=2, walks=WalkRecipe(variants=1.0, replaced=0.0), length=12)
    pieces = [made.walks[row[3]] for row in made.table.tolist() if row[2] == WALK]
    assert pieces
    for piece in pieces:
        assert any(
            np.array_equal(piece, history[start : start + len(piece)])
            for history in TRAIN
            for start in range(len(history))
        )
    assert all(len(rows.row(number).ids) <= 12 for number in range(len(rows)))


@pytest.mark.parametrize("loss", ["every", "answer"])
def test_newcomers_come_after_near_items_in_histories_after_the_opening(loss: str) -> None:
    """Each as often as told, as the one target of a row, after a near item and what came before it."""
    held = {int(item) for history in TRAIN for item in history}
    gone = sorted(held)[:2]
    train = [history[~np.isin(history, gone)] for history in TRAIN]
    told, made_of = recipe(1.0, max_length=24, walks=WalkRecipe(alone=0.25, newcomers=1.5), loss=loss), tokenization(24)
    made = plan(told, [NEXT], made_of, train, neighbours(), None, epochs=4, batch_size=4)
    held = {int(item) for history in train for item in history}
    unseen = set(range(len(made_of.items))) - held
    assert set(gone) <= unseen
    rows, found = Rows(made, [NEXT], made_of, train), Counter[tuple[int, int]]()
    for number, (epoch, _, kind, index, start, stop, skip) in enumerate(made.table.tolist()):
        if kind != WALK or epoch == 0:
            continue
        piece = made.walks[index]
        assert (start, stop, skip) == (0, len(piece), len(piece) - 1)
        *before, item = piece.tolist()
        found[epoch, item] += 1
        assert before[-1] in neighbours()[item]
        assert any(
            history[end - len(before) : end].tolist() == before
            for history in train
            for end in range(len(before), len(history) + 1)
        )
        row = rows.row(number)
        assert len(row.ids) <= 24
        assert row.labels[row.labels != IGNORE].tolist() == made_of.tokens[item][made_of.tokens[item] >= 0].tolist()
    able = {item for item in unseen if held & set(neighbours()[item].tolist())}
    assert {item for _, item in found} == able
    assert set(found.values()) <= {1, 2}
    assert len(found) == 3 * len(able)


def test_what_is_known_already_is_not_told_in_another_way() -> None:
    """An update holds old test targets back, and they must not become targets by a variant or beside a newcomer."""
    known, held = np.array([len(history) // 2 for history in TRAIN]), np.array([len(h) // 2 for h in TRAIN])
    walks = WalkRecipe(variants=1.0, replaced=0.0, newcomers=5.0)
    made = plan(
        recipe(1.0, walks=walks), [NEXT], tokenization(), TRAIN, neighbours(), None,
        epochs=1, batch_size=4, fresh=Fresh(known, held, 0.5),
    )  # fmt: skip
    assert len(made.table)
    assert not made.walks
    assert not (made.table[:, 2] == WALK).any()


def test_walks_read_no_interaction() -> None:
    """The leak guard of walks: other training histories give the same walks."""
    walks, other = WalkRecipe(alone=0.9), [history[::-1].copy() for history in TRAIN]
    drawn = [
        plan(recipe(1.0, walks=walks), [NEXT], tokenization(), train, neighbours(), None, epochs=1, batch_size=4)
        for train in (TRAIN, other)
    ]
    assert [walk.tolist() for walk in drawn[0].walks] == [walk.tolist() for walk in drawn[1].walks]
    assert drawn[0].walks


def test_items_without_a_title_are_asked_no_title_and_answer_none() -> None:
    made, _ = make([NEXT, TO_ITEM, TO_TITLE], [1.0, 5.0, 5.0], epochs=1, length=64)
    for task in (1, 2):
        asked = Counter(row[3] for row in made.table.tolist() if row[1] == task)
        assert set(asked) == set(range(N_ITEMS)) - set(UNTITLED)
        assert max(asked.values()) - min(asked.values()) <= 1  # All are asked before one is asked again.
    assert TO_TITLE.reads["item"] == {"title"}


def test_questions_about_histories_ask_for_an_event_and_show_those_before() -> None:
    made, rows = make([NEXT, FROM_HISTORY], [1.0, 6.0], epochs=1, length=64)
    seen = set()
    for number, (_, task, kind, user, start, stop, skip) in enumerate(made.table.tolist()):
        if task == 1:
            seen.add((user, stop - 1))
            assert (kind, start, skip) == (HISTORY, 0, stop - 1)
            expected = tokenization(64).question_row(
                FROM_HISTORY, int(TRAIN[user][stop - 1]), history=TRAIN[user][: stop - 1]
            )
            np.testing.assert_array_equal(rows.row(number).ids, expected.ids)
            np.testing.assert_array_equal(rows.row(number).labels, expected.labels)
    assert {stop for _, stop in seen} > {0}
    assert all(0 <= event < len(TRAIN[user]) for user, event in seen)


RATED = pl.DataFrame({"rating": RNG.integers(1, 6, sum(map(len, TRAIN))).astype(np.float32)}).with_columns(
    rating=pl.when(pl.int_range(pl.len()) % 7 == 3).then(None).otherwise("rating")
)
CLICK = Prompt.parse(
    "{% block user %}{% for past in history %}{{ past.identifier }}{% endfor %} {{ item.identifier }} {{ user.age }}?"
    '{% endblock %}{% block assistant %}{{ "rather good" if event.rating >= 4 else "no" }}{% endblock %}',
    "click",
)


def test_questions_about_events_are_answered_by_what_the_log_says() -> None:
    made = plan(
        recipe(1.0, 9.0), [NEXT, CLICK], tokenization(), TRAIN, None, USERS, epochs=1, batch_size=4, events=RATED
    )
    rows = Rows(made, [NEXT, CLICK], tokenization(), TRAIN, USERS, events=RATED)
    begin = np.concatenate([[0], np.cumsum([len(history) for history in TRAIN])])
    room = rows.rooms["click"]
    assert room == len(tokenization().answer_ids(CLICK, "rather good"))
    asked: Counter[int] = Counter()
    for number, (_, task, kind, user, start, stop, skip) in enumerate(made.table.tolist()):
        if task == 0:
            continue
        assert (kind, start, skip) == (HISTORY, 0, stop - 1)
        event = int(begin[user]) + stop - 1
        asked[event] += 1
        answer = "rather good" if RATED["rating"][event] >= 4 else "no"
        question = tokenization().question_ids(
            CLICK, int(TRAIN[user][stop - 1]), room=room, history=TRAIN[user][: stop - 1], user=USERS[user]
        )
        row, answered = rows.row(number), tokenization().answer_ids(CLICK, answer)
        np.testing.assert_array_equal(row.ids, [*question, *answered])
        np.testing.assert_array_equal(row.labels, [IGNORE] * len(question) + answered.tolist())
    rated = np.flatnonzero(RATED["rating"].is_not_null().to_numpy()).tolist()
    windows_made = sum(row[1] == 0 for row in made.table.tolist())
    assert asked.total() == 9 * windows_made
    assert set(asked) <= set(rated)
    if asked.total() >= len(rated):
        assert set(asked) == set(rated)
    assert max(asked.values()) - min(asked.values()) <= 1


def test_questions_about_events_wait_for_the_end_of_the_opening() -> None:
    walks = WalkRecipe(share=0.5, alone=0.5)
    made = plan(
        recipe(1.0, 2.0, walks=walks), [NEXT, CLICK], tokenization(), TRAIN, neighbours(), USERS,
        epochs=4, batch_size=4, events=RATED,
    )  # fmt: skip
    assert {row[0] for row in made.table.tolist() if row[1] == 1} == {2, 3}


@pytest.mark.parametrize(("prompt", "length"), [(NEXT, 12), (NEXT, 40), (WITH_TEXT, 48)])
def test_with_the_loss_on_the_answer_every_row_has_one_target(prompt: Prompt, length: int) -> None:
    walks = WalkRecipe(share=0.5, variants=0.5)
    made, rows = make([prompt], epochs=20, length=length, walks=walks, loss="answer")
    identifier = tokenization(length).tokens.shape[1]
    for number, (_, _, kind, user, start, stop, skip) in enumerate(made.table.tolist()):
        row = rows.row(number)
        assert skip == stop - start - 1
        assert len(row.ids) <= length
        np.testing.assert_array_equal(np.flatnonzero(row.labels != IGNORE), np.arange(-identifier, 0) + len(row.ids))
        last = (TRAIN[user] if kind == HISTORY else made.walks[user])[stop - 1]
        np.testing.assert_array_equal(row.ids[-identifier:], tokenization(length).identifier(int(last)))
    per_user = counts(Plan(made.table[made.table[:, 2] == HISTORY], []), 0, 3)
    assert set(per_user.values()) == {1}
    assert len(per_user) == 20 * sum(len(history) > 0 for history in TRAIN)
    drawn = {(user, event) for _, user, event in targets(made)}
    assert len(drawn) > len({user for user, _ in drawn})


def test_questions_that_no_event_answers_are_refused() -> None:
    unrated = RATED.with_columns(rating=pl.lit(None, pl.Float32))
    given = (recipe(1.0, 1.0), [NEXT, CLICK], tokenization(), TRAIN, None, USERS)
    size = len(RATED)
    with pytest.raises(DataError, match=f"prompt click: none of the {size} training interactions has an answer"):
        plan(*given, epochs=1, batch_size=4, events=unrated)
    with pytest.raises(DataError, match=r"prompt click reads what the log says of events.*Split\.train_events"):
        plan(*given, epochs=1, batch_size=4)


def test_rows_of_a_user_are_headed_by_that_users_columns() -> None:
    made, rows = make([WITH_USER, FROM_HISTORY], walks=WalkRecipe(share=1.0), epochs=1)
    decode = tokenization().tokenizer.decode
    for number, (_, task, kind, index, *_) in enumerate(made.table.tolist()):
        if task == 0:
            age = str(10 + index) if kind == HISTORY else ""
            assert decode(rows.row(number).ids).startswith(f"<|begin|><|user|>Age{' ' if age else ''}{age}<|end|>")


@pytest.mark.parametrize(("prompt", "name"), [(WITH_TEXT, "text"), (NEXT, "next")])
def test_an_item_that_does_not_fit_is_refused_with_the_prompts_name(prompt: Prompt, name: str) -> None:
    head = len(tokenization().head_ids(prompt))
    with pytest.raises(PromptError, match=f"prompt {name}: .* max_length") as error:
        make([prompt], length=head + 1)
    assert "Raise max_length" in str(error.value) or "raise max_length" in str(error.value)


def test_a_walk_ends_where_its_row_is_full() -> None:
    """Item 5 has a long text and stands in no history."""
    items = ITEMS.with_columns(title=pl.when(pl.col("item_id") == "i5").then(pl.lit("x " * 6)).otherwise("title"))
    known = tokenization()
    tight = Tokenization(known.tokenizer, known.identifiers, items, max_length=60)
    train = [np.array([0, 1, 2], dtype=np.int32)] * 4
    walking = recipe(1.0, max_length=60, walks=WalkRecipe(share=20.0, length=9))
    made = plan(walking, [WITH_TEXT], tight, train, neighbours(), None, epochs=1, batch_size=4)
    rows = Rows(made, [WITH_TEXT], tight, train)
    walked = [made.walks[index] for _, _, kind, index, *_ in made.table.tolist() if kind == WALK]
    assert len(walked) == 80
    assert {5} < set(np.concatenate(walked).tolist())
    assert max(len(rows.row(number).ids) for number in range(len(rows))) <= 60
    assert len({len(walk) for walk in walked}) > 1


@pytest.mark.parametrize("train", [[], [np.array([], dtype=np.int32)] * 3])
def test_no_interaction_at_all_makes_no_row(train: list[np.ndarray]) -> None:
    for prompts in ([NEXT], [NEXT, FROM_HISTORY]):
        with pytest.raises(ConfigError, match="make no training row"):
            plan(recipe(*[1.0] * len(prompts)), prompts, tokenization(), train, None, None, epochs=1, batch_size=4)


def test_no_epoch_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="make no training row"):
        make([NEXT], epochs=0)


def test_the_prompt_that_recommends_cannot_have_weight_zero() -> None:
    with pytest.raises(ConfigError, match=r"prompt next is the first sequence prompt, .* its weight is 0"):
        make([NEXT, TO_ITEM], [0.0, 1.0])
    with pytest.raises(ConfigError, match="prompt next is the first"):
        make([TO_ITEM, NEXT, WITH_TEXT], [1.0, 0.0, 1.0])
    assert {task for (task,) in counts(make([NEXT, TO_ITEM], [1.0, 0.0])[0], 1)} == {0}


@pytest.mark.parametrize(
    ("alone", "epochs", "opening"), [(0.1, 4, 1), (0.1, 1, 0), (0.1, 12, 1), (0.3, 12, 4), (0, 4, 0)]
)
def test_a_small_opening_is_one_epoch_and_not_none(alone: float, epochs: int, opening: int) -> None:
    made, _ = make([NEXT], epochs=epochs, walks=WalkRecipe(alone=alone))
    alone_in = set(range(epochs)) - {epoch for epoch, kind in counts(made, 0, 2) if kind == HISTORY}
    assert alone_in == set(range(opening))


@pytest.mark.parametrize("text", [False, True])
def test_a_second_sequence_prompt_of_weight_one_predicts_every_event_once_too(text: bool) -> None:
    second = Prompt.parse(NEXT.source.replace("}}", "}};") if text else NEXT.source, "second")
    length = 128 if text else 16  # Of one window each, or of several.
    made, _ = make([NEXT, second], [1.0, 1.0], epochs=3, length=length)
    expected = {(epoch, user, event): 1 for epoch in range(3) for user in range(8) for event in range(len(TRAIN[user]))}
    assert targets(made, 0) == targets(made, 1) == expected


def test_windows_of_a_second_sequence_prompt_come_again_when_all_have_come() -> None:
    made, _ = make([NEXT, WITH_USER], [1.0, 2.5], epochs=1, length=128)
    again = Counter(row[3] for row in made.table.tolist() if row[1] == 1)
    assert set(again) == {user for user in range(8) if len(TRAIN[user])}
    assert again.total() == round(2.5 * ACTIVE)
    assert set(again.values()) == {2, 3}


def test_a_weight_that_rounds_to_no_row_makes_none() -> None:
    made, _ = make([NEXT, TO_ITEM], [1.0, 0.01])
    assert {task for (task,) in counts(made, 1)} == {0}


TITLES = Prompt.parse(
    "{% block user %}{% for past in history %}{{ past.title }}{% if not loop.last %}; {% endif %}{% endfor %} next:"
    "{% endblock %}{% block assistant %}{{ item.identifier }}{% endblock %}",
    "titles",
)


@pytest.mark.parametrize(("scheme", "length"), [("atomic", 128), ("random", 96)])
def test_batches_of_questions_about_histories_and_events_are_hardly_padded(scheme: str, length: int) -> None:
    """Users as in a shop: most of a few events, some of very many."""
    rng = np.random.default_rng(1)
    train = [rng.integers(0, N_ITEMS, 2 + int(rng.pareto(1.2) * 3) % 150).astype(np.int32) for _ in range(300)]
    events = pl.DataFrame({"rating": rng.integers(1, 6, sum(map(len, train))).astype(np.float32)})
    tokens, users = tokenization(length, scheme), [USERS[0]] * len(train)
    for prompts in ([NEXT, TITLES, TO_ITEM], [NEXT, CLICK], [NEXT, TO_TITLE, TITLES, CLICK]):
        made = plan(
            recipe(1.0, *[2.0] * (len(prompts) - 1), max_length=length), prompts, tokens, train, None, users,
            epochs=1, batch_size=8, events=events,
        )  # fmt: skip
        rows = Rows(made, prompts, tokens, train, users, events=events)
        sizes = np.array([len(rows.row(number).ids) for number in range(len(rows) // 8 * 8)])
        assert sizes.max() <= length
        assert 1 - sizes.sum() / (8 * sizes.reshape(-1, 8).max(axis=1).sum()) < 0.1


def test_fresh_questions_ask_for_all_new_events_before_one_again() -> None:
    known = np.array([len(history) // 2 for history in TRAIN])
    held = np.full(len(TRAIN), -1)
    held[3] = len(TRAIN[3]) - 1
    fresh = Fresh(known, held, 0.25)
    for prompt, task in ((FROM_HISTORY, "history"), (CLICK, "event")):
        made = plan(
            recipe(1.0, 20.0), [NEXT, prompt], tokenization(64), TRAIN, None, USERS,
            epochs=1, batch_size=4, events=RATED.with_columns(rating=pl.lit(4.0)), fresh=fresh,
        )  # fmt: skip
        assert prompt.subject == task
        asked = Counter((row[3], row[5] - 1) for row in made.table.tolist() if row[1] == 1)
        new = {(user, event) for user in range(8) for event in range(known[user], len(TRAIN[user]))} - {(3, held[3])}
        old = {event: count for event, count in asked.items() if event not in new}
        assert all(event < known[user] for user, event in old)
        assert sum(old.values()) == round(asked.total() * 0.2)
        again = [asked[event] for event in new]
        assert min(again) >= 1
        assert max(again) - min(again) <= 1


# Rows


def test_rows_are_the_same_in_whatever_order_they_are_asked_for() -> None:
    walks = WalkRecipe(share=0.5)
    _, rows = make([NEXT, TO_ITEM, FROM_HISTORY], epochs=2, walks=walks, length=24)
    forward = [rows.row(number).ids.tolist() for number in range(len(rows))]
    _, again = make([NEXT, TO_ITEM, FROM_HISTORY], epochs=2, walks=walks, length=24)
    for number in np.random.default_rng(0).permutation(len(again)):
        assert again.row(int(number)).ids.tolist() == forward[number]


def test_a_batch_is_its_rows_padded_to_the_longest() -> None:
    made, rows = make([NEXT, TO_ITEM, TO_TITLE, FROM_HISTORY], epochs=1)
    numbers = np.random.default_rng(0).permutation(len(rows))[:9].tolist()
    batch = rows.batch(numbers, pad=7)
    single = [rows.row(number) for number in numbers]
    longest = max(len(row.ids) for row in single)
    assert {key: value.shape for key, value in batch.items()} == dict.fromkeys(
        ("input_ids", "labels", "attention_mask"), (9, longest)
    )
    assert min(len(row.ids) for row in single) < longest
    for place, row in enumerate(single):
        size = len(row.ids)
        assert batch["input_ids"][place].tolist() == row.ids.tolist() + [7] * (longest - size)
        assert batch["labels"][place].tolist() == row.labels.tolist() + [IGNORE] * (longest - size)
        assert batch["attention_mask"][place].tolist() == [1] * size + [0] * (longest - size)
    assert len(made.table) == len(rows)


def test_batches_hold_rows_of_similar_length_and_every_row() -> None:
    made, rows = make([NEXT], epochs=1, length=64, batch_size=2)
    sizes = np.array([len(rows.row(number).ids) for number in range(len(rows))])
    inside = np.mean([np.ptp(sizes[start : start + 2]) for start in range(0, len(sizes), 2)])
    assert inside < np.ptp(sizes) / 2
    assert sorted(row[3] for row in made.table.tolist()) == [user for user in range(8) if len(TRAIN[user])]


def test_event_weights_lie_on_the_events_identifier_and_mean_one() -> None:
    given = [np.linspace(1, 3, len(history)).astype(np.float32) for history in TRAIN]
    made, _ = make([NEXT, TO_ITEM])
    rows = Rows(made, [NEXT, TO_ITEM], tokenization(), TRAIN, weights=given)
    mean = float(np.concatenate(given).mean())
    for number, (_, task, kind, user, start, stop, _) in enumerate(made.table.tolist()):
        row = rows.row(number)
        if task == 0 and kind == HISTORY:
            assert row.weights is not None
            carried = row.weights[-(stop - start) :]  # One token per event after the head.
            np.testing.assert_allclose(carried, given[user][start:stop] / mean, rtol=1e-6)
        else:
            assert row.weights is None
    numbers = list(range(min(6, len(rows))))
    batch = rows.batch(numbers, 0)
    assert batch["weights"].dtype == np.float32
    assert batch["weights"].shape == batch["labels"].shape
    assert "weights" not in Rows(made, [NEXT, TO_ITEM], tokenization(), TRAIN).batch(numbers, 0)


@pytest.mark.parametrize("first", [0, 3])
def test_whole_batches_of_one_length_stand_where_the_trainer_cuts_them(first: int) -> None:
    """Every batch that is cut from the order holds one size, although neither the begin nor the end is whole."""
    sizes = np.repeat([1, 5, 9, 13], 8).astype(float)
    table = np.zeros((len(sizes) + 3, 7), dtype=np.int32)
    table[:, 3] = np.arange(len(table))
    sizes = np.concatenate([np.full(first, 1.0), sizes, np.full(3 - first, 13.0)])
    found = bucketed(table, sizes, 8, np.random.default_rng(0), first)
    assert sorted(found[:, 3].tolist()) == list(range(len(table)))
    batches = sizes[found[first : first + 32, 3]].reshape(4, 8)
    assert sorted(batch.tolist() for batch in batches) == [[size] * 8 for size in (1.0, 5.0, 9.0, 13.0)]


def test_batches_stay_whole_from_epoch_to_epoch() -> None:
    """Titles of very unequal lengths, epochs of 17 rows, batches of 4: nearly no batch mixes short and long rows."""
    made, rows = make([NEXT, TO_ITEM], [1.0, 2.0], epochs=40, length=64, batch_size=4)
    assert len(made.table) // 40 % 4
    sizes = np.array([len(rows.row(number).ids) for number in range(len(rows) // 4 * 4)]).reshape(-1, 4)
    drawn = np.random.default_rng(0).permutation(sizes.ravel()).reshape(-1, 4)
    # A batch in which two epochs meet may: one of every epoch.
    assert np.sort(np.ptp(sizes, axis=1))[:-40].mean() < np.ptp(drawn, axis=1).mean() / 2


# Context

TOLD = Prompt.parse(
    "{% block user %}{{ context.query }} {{ context.hour }}{% endblock %}"
    "{% block item %}{{ item.identifier }}{% endblock %}",
    "told",
)
_NUMBERS = np.arange(sum(map(len, TRAIN)))
# Queries of another length for every event, and an hour that follows from its time.
SAID = pl.DataFrame({"timestamp": 3600 * _NUMBERS, "query": ["q" * int(1 + number % 9) for number in _NUMBERS]})


def test_a_row_has_the_context_of_its_only_target() -> None:
    walks, made_of = WalkRecipe(share=0.5), tokenization(28)
    told = recipe(1.0, max_length=28, walks=walks, loss="answer")
    made = plan(told, [TOLD], made_of, TRAIN, neighbours(), USERS, epochs=6, batch_size=4, events=SAID)
    rows = Rows(made, [TOLD], made_of, TRAIN, USERS, events=SAID)
    begins = np.concatenate([[0], np.cumsum([len(history) for history in TRAIN])])
    sizes = set()
    for number, (_, _, kind, index, start, stop, skip) in enumerate(made.table.tolist()):
        row, context = rows.row(number), None
        assert skip == stop - start - 1
        assert len(row.ids) <= 28
        if kind == HISTORY:
            event = int(begins[index]) + stop - 1
            context = {"query": "q" * (1 + event % 9), "hour": event % 24}
            asked = made_of.sequence(TOLD, TRAIN[index][: stop - 1], USERS[index], context)
            assert row.ids[: len(asked)].tolist() == asked.tolist()  # As much of the history as fits, too.
        head = made_of.head_ids(TOLD, None, context)
        assert row.ids[: len(head)].tolist() == head.tolist()
        sizes.add(len(head))
    assert len(sizes) > 3


def test_a_question_has_the_context_of_the_event_that_it_asks_about() -> None:
    asking = Prompt.parse(
        "{% block user %}{{ context.query }} {{ context.hour }}? {{ item.identifier }}{% endblock %}"
        "{% block assistant %}{{ event.word }}{% endblock %}",
        "asking",
    )
    prompts, said = [NEXT, asking], SAID.with_columns(word=pl.lit("yes"))
    made = plan(recipe(1.0, 4.0), prompts, tokenization(), TRAIN, None, USERS, epochs=2, batch_size=4, events=said)
    rows = Rows(made, prompts, tokenization(), TRAIN, USERS, events=said)
    begins = np.concatenate([[0], np.cumsum([len(history) for history in TRAIN])])
    asked = 0
    for number, (_, task, _, user, _, stop, _) in enumerate(made.table.tolist()):
        if task == 1:
            event = int(begins[user]) + stop - 1
            context = {"query": "q" * (1 + event % 9), "hour": event % 24}
            ids = tokenization().question_ids(asking, int(TRAIN[user][stop - 1]), room=9, context=context)
            assert rows.row(number).ids[: len(ids)].tolist() == ids.tolist()
            asked += 1
    assert asked > 20


def test_a_row_of_many_targets_has_no_context() -> None:
    with pytest.raises(ConfigError, match=r'loss is "every", and the head of the prompt told reads context\.hour'):
        plan(recipe(1.0), [TOLD], tokenization(), TRAIN, None, USERS, epochs=1, batch_size=4, events=SAID)
    with pytest.raises(DataError, match=r"prompt told reads what the log says of events\. Pass events="):
        plan(recipe(1.0, loss="answer"), [TOLD], tokenization(), TRAIN, None, USERS, epochs=1, batch_size=4)


def test_a_context_that_leaves_no_room_is_refused() -> None:
    long = SAID.with_columns(query=pl.lit("many words here " * 20))
    with pytest.raises(PromptError, match="told: its head takes"):
        plan(
            recipe(1.0, loss="answer"), [TOLD], tokenization(), TRAIN, None, USERS,
            epochs=1, batch_size=4, events=long,
        )  # fmt: skip
