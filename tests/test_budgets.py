"""Where a history is cut: between items, before the newest ones that fit, and alike in training and inference."""

from __future__ import annotations

from functools import cache
from itertools import chain

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec import base
from genrec.errors import PromptError
from genrec.identifiers import Identifiers
from genrec.prompts import Prompt
from genrec.tokenization import IGNORE, Tokenization, add_identifier_tokens

N_ITEMS = 12
HEADS = {
    "fixed": "{% block user %}Next:{% endblock %}",
    "told": "{% block system %}{{ user.name }}{% endblock %}{% block user %}{{ context.query }}{% endblock %}",
    "none": "",
}
ITEMS = {
    "bare": "{% block item %}{{ item.identifier }}{% endblock %}",
    "titles": "{% block item %}{{ item.identifier }} {{ item.title }};{% endblock %}",
}
QUESTION = Prompt.parse(
    "{% block user %}{{ user.name }}{% for past in history %}{{ past.title }}{{ past.identifier }}{% endfor %}?"
    "{% endblock %}"
    "{% block assistant %}{{ item.identifier }} {{ item.title }}{% endblock %}",
    "question",
)


@cache
def parts() -> tuple[object, Identifiers, pl.DataFrame]:
    items = pl.DataFrame(
        {
            "item_id": [f"i{n}" for n in range(N_ITEMS)],
            "title": ["a long film " * (n % 4) + str(n) for n in range(N_ITEMS)],
        }
    )
    identifiers = Identifiers.build("random", items["item_id"].to_list(), levels=2, codes=4)
    tokenizer = base.train_tokenizer(items["title"].to_list(), 280)
    add_identifier_tokens(tokenizer, identifiers)
    return tokenizer, identifiers, items


def tokenization(max_length: int) -> Tokenization:
    tokenizer, identifiers, items = parts()
    return Tokenization(tokenizer, identifiers, items, max_length=max_length)


names = st.text(alphabet="ab <|>é", max_size=12)
histories = st.lists(st.integers(0, N_ITEMS - 1), max_size=20)


@pytest.mark.parametrize("item", ITEMS)
@pytest.mark.parametrize("head", HEADS)
@settings(max_examples=15)
@given(history=histories, target=st.integers(0, N_ITEMS - 1), room=st.integers(0, 120), name=names, query=names)
def test_a_sequence_keeps_the_newest_whole_items_that_fit(
    head: str, item: str, history: list[int], target: int, room: int, name: str, query: str
) -> None:
    prompt = Prompt.parse(HEADS[head] + ITEMS[item], "test")
    user, context, events = {"name": name}, {"query": query}, np.array(history, dtype=np.int64)
    begin = tokenization(10_000).head_ids(prompt, user, context).tolist()
    made = tokenization(len(begin) + room + 2)
    pieces = [[index for span in made.fragment_spans(prompt, one) for index in span.ids] for one in history]
    ids = made.sequence(prompt, events, user, context).tolist()
    # One of the ends of the history, whole, and one more item would be too many.
    ends = [[*begin, *chain(*pieces[len(pieces) - n :])] for n in range(len(history) + 1)]
    kept = ends.index(ids)
    assert len(ids) + 2 <= made.max_length
    assert kept == len(history) or len(ids) + len(pieces[-kept - 1]) + 2 > made.max_length
    # A row that trains what comes next is this prompt and the identifier, ...
    window = np.append(events[len(events) - kept :], target)
    row = made.sequence_row(prompt, window, user=user, context=context)
    assert row.ids.tolist() == [*ids, *made.identifier(target).tolist()]
    # ... and before every identifier in it stands the prompt of the items before that.
    trained = np.flatnonzero(row.labels != IGNORE)[::2]
    for place, start in enumerate(trained.tolist()):
        assert made.sequence(prompt, window[:place], user, context).tolist() == row.ids[:start].tolist()


@settings(max_examples=40)
@given(
    history=histories,
    target=st.integers(0, N_ITEMS - 1),
    length=st.integers(8, 160),
    name=names,
    room=st.integers(0, 60),
)
def test_a_question_keeps_the_newest_whole_items_that_fit(
    history: list[int], target: int, length: int, name: str, room: int
) -> None:
    user, whole, made = {"name": name}, tokenization(10_000), tokenization(length)
    answer = [index for span in whole.question(QUESTION, target)[1] for index in span.ids]
    spare = length - max(room, len(answer))
    tails = [
        whole.question_ids(QUESTION, target, history=history[len(history) - n :], user=user, room=0).tolist()
        for n in range(len(history) + 1)
    ]
    fits = [n for n, ids in enumerate(tails) if len(ids) <= spare]
    if not fits:
        with pytest.raises(PromptError, match="and max_length is"):
            made.question(QUESTION, target, history=history, user=user, room=room)
        return
    row = made.question_row(QUESTION, target, history=history, user=user, room=room)
    assert row.ids.tolist() == [*tails[max(fits)], *answer]
    asked = made.question_ids(QUESTION, target, history=history, user=user, room=max(room, len(answer)))
    assert asked.tolist() == tails[max(fits)]
