from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import genrec
from genrec import training
from genrec.errors import ConfigError, DataError, DecodingError, PromptError, UnknownIdError
from genrec.recommender import Recommender, render

HISTORIES = [["i3", "i4", "i5"], [], ["i20"], [f"i{item}" for item in range(24)] * 3, ["i7", "i7", "i0", "i23", "i11"]]


@pytest.fixture(scope="module")
def rec(workspace: Path) -> Recommender:
    return Recommender.load(workspace / "adapters" / "lora")


@pytest.fixture(scope="module")
def aged(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Recommender:
    """An adapter with semantic IDs, whose prompt tells the age of the user and the titles of the history."""
    root = tmp_path_factory.mktemp("aged") / "workspace"
    shutil.copytree(workspace, root)
    (root / "prompts" / "aged.jinja").write_text(
        "{% block system %}Films.{% endblock %}{% block user %}Age {{ user.age }}{% endblock %}"
        "{% block item %}{{ item.identifier }}{{ item.brand }}{% endblock %}"
    )
    (root / "adapters" / "aged.toml").write_text(
        'base = "adapters/random"\ndata = "data/tiny"\ntuning = "full"\nmax_length = 96\nfeatures = 8\n'
        '[[tasks]]\nprompt = "prompts/aged.jinja"\n[identifiers]\nscheme = "semantic"\nlevels = 2\ncodes = 8\n'
        "[training]\nnum_train_epochs = 1\nlearning_rate = 1e-2\n"
    )
    return Recommender.load(training.train(root / "adapters" / "aged.toml"))


def by_score(rec: Recommender, history: list[str], leave_out: set[str], user: Any = None) -> list[tuple[str, float]]:
    """The whole catalogue in the order of ``score``, the slow way."""
    scores = rec.score(history, rec.item_ids, user=user)
    ranked = sorted(zip(-scores, range(len(scores)), rec.item_ids, strict=True))
    return [(item, -negative) for negative, _, item in ranked if item not in leave_out]


# Lists


@pytest.mark.parametrize("exclude_seen", [True, False])
def test_list_is_the_catalogue_ranked_by_score(rec: Recommender, exclude_seen: bool) -> None:
    found = rec.recommend(HISTORIES, k=7, exclude_seen=exclude_seen)
    for history, items in zip(HISTORIES, found, strict=True):
        expected = by_score(rec, history, set(history) if exclude_seen else set())[:7]
        assert [item.item_id for item in items] == [item for item, _ in expected]
        np.testing.assert_allclose([item.score for item in items], [score for _, score in expected], atol=1e-4)
        assert [item.rank for item in items] == list(range(1, len(expected) + 1))
        assert all(item.title == rec.titles[rec.item_ids.index(item.item_id)] for item in items)


def test_atomic_list_is_exact_with_any_number_of_beams(rec: Recommender) -> None:
    assert rec.recommend(HISTORIES[:3], k=4, num_beams=4) == rec.recommend(HISTORIES[:3], k=4, num_beams=24)


def test_list_of_semantic_ids_is_the_catalogue_ranked_by_score(aged: Recommender) -> None:
    users = [{"age": 20 + number} for number in range(len(HISTORIES))]
    found = aged.recommend(HISTORIES, k=5, num_beams=24, users=users)
    for history, user, items in zip(HISTORIES, users, found, strict=True):
        expected = by_score(aged, history, set(history), user)[:5]
        assert [item.item_id for item in items] == [item for item, _ in expected]
        np.testing.assert_allclose([item.score for item in items], [score for _, score in expected], atol=1e-4)


def test_score_is_a_sum_of_log_probabilities_over_the_whole_vocabulary(rec: Recommender) -> None:
    scores = rec.score(["i1", "i2"], rec.item_ids)
    assert scores.dtype == np.float64
    assert (scores < 0).all()
    assert np.exp(scores).sum() < 1  # The rest is what the model gives to words.


def test_shorter_list_is_the_beginning_of_a_longer_one(rec: Recommender) -> None:
    short, long = rec.recommend(HISTORIES, k=2), rec.recommend(HISTORIES, k=10)
    assert short == [items[:2] for items in long]
    assert [len(items) for items in long] == [10, 10, 10, 0, 10]


def test_fewer_items_where_fewer_are_allowed(rec: Recommender) -> None:
    all_but_two = rec.item_ids[2:]
    assert {item.item_id for item in rec.recommend([all_but_two], k=10)[0]} == set(rec.item_ids[:2])
    assert rec.recommend([rec.item_ids], k=10) == [[]]
    assert len(rec.recommend([rec.item_ids], k=100, exclude_seen=False)[0]) == len(rec.item_ids)


def test_search_gives_the_reason_for_a_short_list(rec: Recommender) -> None:
    whole = np.arange(len(rec.item_ids), dtype=np.int32)
    found = rec.search([whole, whole[:1]], 3)
    assert found.items[0].tolist() == [-1, -1, -1]
    assert found.reasons[0]
    assert (found.items[1] >= 0).all()


@pytest.mark.parametrize("engine", ["rec", "aged", "dummy"])
@pytest.mark.parametrize("exclude_seen", [True, False])
def test_restrictions_hold_together_and_leave_no_list_short(
    request: pytest.FixtureRequest, workspace: Path, engine: str, exclude_seen: bool
) -> None:
    if engine == "dummy":
        recommender = Recommender.load(workspace / "adapters" / "lora", engine="dummy")
    else:
        recommender = request.getfixturevalue(engine)
    rng, n, k = np.random.default_rng(0), len(recommender.item_ids), 6
    histories = [recommender.indices(history) for history in HISTORIES]
    shared = np.arange(0, n, 2)
    blocked = [None, np.array([1, 2]), shared[:0], np.arange(n), np.array([11, 11, 3])]
    only = [shared, None, shared, shared, np.array([3, 4, 5, 11, 12, 13, 14, 15, 16, 17])]
    allowed = rng.random(n) < 0.8
    users = [{"age": 30}] * 5
    found = recommender.search(histories, k, num_beams=n, exclude_seen=exclude_seen, users=users,
                               allowed=allowed, blocked=blocked, only=only)  # fmt: skip
    whole = recommender.search(histories, n, num_beams=n, exclude_seen=False, users=users)
    for case, (history, shut, opened) in enumerate(zip(histories, blocked, only, strict=True)):
        legal = allowed.copy()
        if opened is not None:
            legal &= np.isin(np.arange(n), opened)
        legal[[] if shut is None else shut] = False
        if exclude_seen:
            legal[history] = False
        expected = [item for item in whole.items[case].tolist() if legal[item]][:k]
        assert [item for item in found.items[case].tolist() if item >= 0] == expected
        assert len(expected) == min(k, int(legal.sum()))
        assert (found.reasons[case] is None) == (len(expected) == k)


def test_restrictions_are_one_for_each_history(rec: Recommender) -> None:
    history = rec.indices(["i1"])
    for options in ({"blocked": [None]}, {"only": [None] * 3}):
        for exclude_seen in (True, False):
            with pytest.raises(DecodingError, match=r"(blocked|only) has . lists for 2 prompts"):
                rec.search([history, history], 3, exclude_seen=exclude_seen, **options)
    with pytest.raises(DecodingError, match=r"blocked must hold item indices 0 \.\. 23, found 1 \.\. 24"):
        rec.search([history], 3, blocked=[np.array([24])])


def test_list_is_the_same_alone_and_among_others(rec: Recommender) -> None:
    together = rec.recommend(HISTORIES, k=6)
    for history, items in zip(HISTORIES, together, strict=True):
        alone = rec.recommend([history], k=6)[0]
        assert [item.item_id for item in alone] == [item.item_id for item in items]
        np.testing.assert_allclose([item.score for item in alone], [item.score for item in items], atol=1e-5)


def test_no_histories_no_lists(rec: Recommender) -> None:
    assert rec.recommend([]) == []


def test_empty_history_is_answered_by_the_head(rec: Recommender) -> None:
    head = rec.prompt([])
    assert head.endswith("<|assistant|>")
    assert rec.prompt(["i1", "i2"]) == f"{head}<|item_1|><|item_2|>"
    assert len(rec.recommend([[]], k=5)[0]) == 5


def test_data_set_says_whether_seen_items_are_left_out(workspace: Path, tmp_path: Path) -> None:
    root = tmp_path / "workspace"
    shutil.copytree(workspace, root)
    note = root / "adapters" / "lora" / "genrec.json"
    manifest = json.loads(note.read_text())
    manifest["data"]["manifest"]["exclude_seen"] = False
    note.write_text(json.dumps(manifest))
    again = Recommender.load(note.parent)
    assert len(again.recommend([again.item_ids], k=24)[0]) == 24
    assert again.recommend([again.item_ids], k=24, exclude_seen=True) == [[]]


# Users


def test_columns_of_the_user_reach_the_head(aged: Recommender) -> None:
    assert "Age 37" in aged.prompt(["i1"], user={"age": 37})
    young, old = aged.score(["i1"], ["i2", "i3"], user={"age": 18}), aged.score(["i1"], ["i2", "i3"], user={"age": 79})
    assert not np.allclose(young, old, atol=1e-7)
    both = aged.recommend([["i1"], ["i1"]], k=24, num_beams=24, users=[{"age": 18}, {"age": 79}])
    for items, scores in zip(both, (young, old), strict=True):
        told = {item.item_id: item.score for item in items}
        np.testing.assert_allclose([told["i2"], told["i3"]], scores, atol=1e-4)


def test_user_without_columns_leaves_the_place_empty(aged: Recommender) -> None:
    assert "Age<|end|>" in aged.prompt([])
    assert aged.recommend([["i1"]], users=[None]) == aged.recommend([["i1"]], users=[{"age": None}])


def test_users_and_histories_must_be_as_many(rec: Recommender) -> None:
    with pytest.raises(ConfigError, match="2 histories and 1 users"):
        rec.recommend([["i1"], ["i2"]], users=[None])


def test_user_history_is_the_whole_one(rec: Recommender, workspace: Path, tmp_path: Path) -> None:
    data = genrec.Dataset.load(workspace / "data" / "tiny")
    log = data.interactions.filter(pl.col("user_id") == "u7")
    history, row = rec.user_history("u7")
    assert history == log["item_id"].to_list()
    assert data.users is not None
    assert row == data.users.row(by_predicate=pl.col("user_id") == "u7", named=True)
    other = genrec.Dataset.from_frames(pl.DataFrame({"user_id": ["new", "new"], "item_id": ["i2", "i1"]}))
    other.save(tmp_path / "other")
    assert rec.user_history("new", tmp_path / "other") == (["i2", "i1"], None)


def test_unknown_user_is_named_with_the_closest(rec: Recommender) -> None:
    with pytest.raises(UnknownIdError, match=r"user 'U7' is not in .*tiny\. Did you mean 'u7'\?"):
        rec.user_history("U7")
    with pytest.raises(UnknownIdError, match=r"It has 40 users\. Or pass a history: --history"):
        rec.user_history("somebody else")


# The dummy engine


def test_dummy_engine_answers_by_its_own_scores(workspace: Path, rec: Recommender) -> None:
    dummy = Recommender.load(workspace / "adapters" / "lora", engine="dummy")
    for history, items in zip(HISTORIES, dummy.recommend(HISTORIES, k=5), strict=True):
        assert [item.item_id for item in items] == [item for item, _ in by_score(dummy, history, set(history))[:5]]
    again = Recommender.load(workspace / "adapters" / "lora", engine="dummy")
    assert again.recommend(HISTORIES) == dummy.recommend(HISTORIES) != rec.recommend(HISTORIES)


def test_model_in_bfloat16_scores_nearly_the_same(workspace: Path, rec: Recommender) -> None:
    half = Recommender.load(workspace / "adapters" / "lora", dtype="bfloat16")
    exact, rounded = rec.score(["i3", "i4"], rec.item_ids), half.score(["i3", "i4"], rec.item_ids)
    assert not np.array_equal(exact, rounded)
    np.testing.assert_allclose(exact, rounded, atol=0.2)


# Bad input


def test_unknown_item_is_named_with_the_closest(rec: Recommender) -> None:
    with pytest.raises(UnknownIdError, match=r"item 'I5' is not in the catalogue of .*lora\. Did you mean 'i5'\?"):
        rec.recommend([["i1"], ["i2", "I5"]])
    with pytest.raises(UnknownIdError, match=r"item 'whatever' .* The adapter knows the items"):
        rec.score(["i1"], ["whatever"])
    with pytest.raises(UnknownIdError, match="item 17 is not"):
        rec.recommend([[17]])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda rec: rec.recommend("i1"), "takes a list of histories"),
        (lambda rec: rec.recommend(["i1", "i2"]), "takes a list of histories"),
        (lambda rec: rec.recommend([["i1"], "i2"]), "takes a list of histories"),
        (lambda rec: rec.score("i1", ["i2"]), r"a list of item ids is wanted, found the text 'i1'. Write \['i1'\]"),
        (lambda rec: rec.score(["i1"], "i2"), "found the text 'i2'"),
        (lambda rec: rec.prompt("i1"), "found the text 'i1'"),
    ],
)
def test_text_instead_of_a_list_is_refused(rec: Recommender, call: Callable[[Recommender], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call(rec)


def test_numbers_out_of_range_are_refused(rec: Recommender) -> None:
    with pytest.raises(ConfigError, match=r"k is 0\. It is at least 1"):
        rec.recommend([["i1"]], k=0)
    with pytest.raises(ConfigError, match="num_beams is 4, below k, which is 5"):
        rec.recommend([["i1"]], k=5, num_beams=4)
    with pytest.raises(DecodingError, match="65536"):
        rec.recommend([["i1"]], k=5, num_beams=65_537)


def test_unknown_engine_or_device_is_refused(workspace: Path) -> None:
    path = workspace / "adapters" / "lora"
    with pytest.raises(ConfigError, match=r"engine is 'locl'. Did you mean 'local'\?"):
        Recommender.load(path, engine="locl")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="device is 'toaster', and PyTorch refused it"):
        Recommender.load(path, device="toaster")


# Rendering


def text_of(spans: list[Any]) -> str:
    return "".join(span.text for span in spans)


def test_rendered_sequence_is_what_the_model_reads(workspace: Path, rec: Recommender) -> None:
    found = render(workspace / "prompts" / "next_item.jinja", rec.adapter.path, history=["i1", "i2"], item="i3")
    ids = [index for span in found.read for index in span.ids]
    prompt = rec.adapter.prompt
    assert ids == rec.tokenization.sequence(prompt, rec.indices(["i1", "i2"])).tolist()
    assert text_of(found.read) == rec.prompt(["i1", "i2"])
    assert [span.kind for span in found.read] == ["frame", "template", "frame", "identifier", "identifier"]
    assert (found.kind, found.cut, text_of(found.answer)) == ("sequence", 0, "<|item_3|>")
    head = len(ids) - 2
    assert found.tokens == {"head": head, "history": 2, "answer": 1, "free": 64 - head - 3, "max_length": 64}


def test_rendered_sequence_of_a_user_has_the_columns_and_no_answer(workspace: Path, aged: Recommender) -> None:
    history, row = aged.user_history("u2")
    assert row is not None
    found = render(aged.adapter.path.parent.parent / "prompts" / "aged.jinja", aged.adapter.path, user="u2")
    assert text_of(found.read) == aged.prompt(history, user=row)
    assert f"Age {row['age']}" in text_of(found.read)
    assert found.answer == []
    assert {span.kind for span in found.read} == {"frame", "template", "data", "identifier"}


def test_rendered_sequence_says_how_many_events_were_cut(workspace: Path, rec: Recommender) -> None:
    long = [f"i{number % 24}" for number in range(100)]
    found = render(workspace / "prompts" / "next_item.jinja", rec.adapter.path, history=long)
    kept = [span.text for span in found.read if span.kind == "identifier"]
    assert kept == [f"<|item_{item[1:]}|>" for item in long[found.cut :]]
    assert found.cut == 100 - found.tokens["history"] > 0
    assert found.tokens["free"] == 1  # Room for the next identifier.
    assert text_of(found.read) == rec.prompt(long)


def test_rendered_question_shows_what_is_trained(workspace: Path, rec: Recommender) -> None:
    found = render(workspace / "prompts" / "title_to_item.jinja", rec.adapter.path, item="i5")
    assert found.kind == "question"
    assert '"Film 5 of series 1"' in text_of(found.read)
    assert text_of(found.answer) == "<|item_5|>"
    size = sum(len(span.ids) for span in found.read)
    assert found.tokens == {"head": size, "history": 0, "answer": 1, "free": 64 - size - 1, "max_length": 64}
    last = render(workspace / "prompts" / "title_to_item.jinja", rec.adapter.path, history=["i1", "i5"])
    assert last == found
    title = render(workspace / "prompts" / "item_to_title.jinja", rec.adapter.path, item="i5")
    assert text_of(title.answer) == "Film 5 of series 1<|end|>"


def test_rendered_question_about_a_history_says_how_many_events_were_cut(rec: Recommender, tmp_path: Path) -> None:
    path = tmp_path / "told.jinja"
    path.write_text(
        "{% block user %}{% for event in history %}{{ event.title }};{% endfor %}{% endblock %}"
        "{% block assistant %}{{ item.identifier }}{% endblock %}"
    )
    events = [f"i{item}" for item in range(14)]
    found = render(path, rec.adapter.path, history=events, item="i20")
    told = [f"Film {item} of series {item // 4};" for item in range(14)]
    assert 0 < found.cut < 14
    assert "".join(told[found.cut :]) in text_of(found.read)
    assert told[found.cut - 1] not in text_of(found.read)
    assert render(path, rec.adapter.path, history=events[:2], item="i20").cut == 0
    assert text_of(render(path, rec.adapter.path, history=events).answer) == "<|item_13|>"


def test_rendered_question_about_an_event(workspace: Path, rec: Recommender, tmp_path: Path) -> None:
    data = genrec.Dataset.load(workspace / "data" / "tiny")
    log = data.interactions.with_columns(rating=1.0 + pl.col("order")).drop("order")
    genrec.Dataset.from_frames(log, data.items, data.users).save(tmp_path / "rated")
    path, adapter = workspace / "prompts" / "rating.jinja", rec.adapter.path
    history, _ = rec.user_history("u7")
    last = render(path, adapter, user="u7", data=tmp_path / "rated")
    assert text_of(last.answer) == f"{len(history)}<|end|>"
    identifiers = [f"<|item_{item[1:]}|>" for item in history]
    assert text_of(last.read).startswith("<|begin|><|user|>" + "".join(identifiers[:-1]) + " Rating of ")
    assert f" {identifiers[-1]}?" in text_of(last.read)
    at = len(history) - 1 - history[::-1].index(history[1])
    second = render(path, adapter, user="u7", item=history[1], data=tmp_path / "rated")
    assert text_of(second.answer) == f"{at + 1}<|end|>"
    assert [span.text for span in second.read if span.kind == "identifier"] == [*identifiers[:at], identifiers[at]]
    assert rec.user_events("u7", tmp_path / "rated")[1]["rating"] == 2.0
    with pytest.raises(ConfigError, match=r"rating asks about an interaction of a data set\. Pass --user U\."):
        render(path, adapter, history=history)
    new = next(item for item in rec.item_ids if item not in history)
    with pytest.raises(ConfigError, match=f"user 'u7' has no interaction with item '{new}'"):
        render(path, adapter, user="u7", item=new, data=tmp_path / "rated")
    with pytest.raises(DataError, match=r"rating\.jinja:\d+:\d+: the table of `event` has no column `rating`"):
        render(path, adapter, user="u7")


def test_question_needs_an_item(workspace: Path, rec: Recommender) -> None:
    with pytest.raises(ConfigError, match=r"title_to_item asks about an item\. Pass --item ID"):
        render(workspace / "prompts" / "title_to_item.jinja", rec.adapter.path)
    with pytest.raises(UnknownIdError, match="item 'nix'"):
        render(workspace / "prompts" / "title_to_item.jinja", rec.adapter.path, item="nix")


def test_rendering_needs_a_good_prompt(rec: Recommender, tmp_path: Path) -> None:
    (tmp_path / "broken.jinja").write_text("{% block user %}{{ item.title }}")
    with pytest.raises(PromptError, match=r"broken\.jinja:1"):
        render(tmp_path / "broken.jinja", rec.adapter.path, item="i1")


def test_a_reason_is_told_only_where_fewer_than_k_came(workspace: Path) -> None:
    rec = Recommender.load(workspace / "adapters" / "lora")
    n = len(rec.item_ids)
    histories = [rec.indices(rec.item_ids[:2]), rec.indices(rec.item_ids[: n - 3]), rec.indices([])]
    found = rec.search(histories, 10)
    assert found.reasons == [None, "the restrictions leave only 3 items", None]
    assert rec.search([rec.indices([])], n + 5).reasons == [f"the catalogue has only {n} items"]


def test_the_default_number_of_beams_is_one_that_engines_take(workspace: Path) -> None:
    rec = Recommender.load(workspace / "adapters" / "lora", engine="dummy")
    assert len(rec.recommend([[]], k=40_000)[0]) == len(rec.item_ids)
    with pytest.raises(ConfigError, match="k is 70000"):
        rec.recommend([[]], k=70_000)


def test_an_edited_prompt_of_the_same_name_gets_the_frame_of_its_own_blocks(workspace: Path, tmp_path: Path) -> None:
    source = (workspace / "prompts" / "next_item.jinja").read_text()
    for name in ("next_item", "other"):
        (tmp_path / f"{name}.jinja").write_text("{% block system %}Be brief.{% endblock %}" + source)
    same, other = (
        render(tmp_path / f"{name}.jinja", workspace / "adapters" / "lora", history=[])
        for name in ("next_item", "other")
    )
    assert same.read == other.read
    assert any("<|system|>" in span.text for span in same.read)
