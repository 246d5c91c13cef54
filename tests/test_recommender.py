from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from conftest import semantic_adapter

import genrec
from genrec.errors import AdapterError, ConfigError, DataError, DecodingError, PromptError, UnknownIdError
from genrec.prompts import Prompt
from genrec.recommender import Recommender

HISTORIES = [["i3", "i4", "i5"], [], ["i20"], [f"i{item}" for item in range(24)] * 3, ["i7", "i7", "i0", "i23", "i11"]]


@pytest.fixture(scope="module")
def rec(workspace: Path) -> Recommender:
    return Recommender.load(workspace / "adapters" / "lora")


@pytest.fixture(scope="module")
def aged(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Recommender:
    """An adapter with semantic IDs, whose prompt tells the age of the user and the titles of the history."""
    prompt = (
        "{% block system %}Films.{% endblock %}{% block user %}Age {{ user.age }}{% endblock %}"
        "{% block item %}{{ item.identifier }}{{ item.brand }}{% endblock %}"
    )
    root = tmp_path_factory.mktemp("aged") / "workspace"
    return Recommender.load(semantic_adapter(workspace, root, prompt, codes=8, max_length=96))


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
    assert [items[:2] for items in short] == [items[:2] for items in long]
    assert [len(items) for items in long] == [10, 10, 10, 0, 10]


def test_fewer_items_where_fewer_are_allowed(rec: Recommender) -> None:
    all_but_two = rec.item_ids[2:]
    assert {item.item_id for item in rec.recommend([all_but_two], k=10)[0]} == set(rec.item_ids[:2])
    (found,) = rec.recommend([rec.item_ids], k=10)
    assert (len(found), found.reason) == (0, "no item is allowed: the restrictions leave nothing of the catalogue")
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
        asked = Recommender.load(workspace / "adapters" / "lora", engine="dummy")
    else:
        asked = request.getfixturevalue(engine)
    rng, n, k = np.random.default_rng(0), len(asked.item_ids), 6
    histories = [asked.indices(history) for history in HISTORIES]
    shared = np.arange(0, n, 2)
    blocked = [None, np.array([1, 2]), shared[:0], np.arange(n), np.array([11, 11, 3])]
    only = [shared, None, shared, shared, np.array([3, 4, 5, 11, 12, 13, 14, 15, 16, 17])]
    allowed = rng.random(n) < 0.8
    users = [{"age": 30}] * 5
    found = asked.search(histories, k, num_beams=n, exclude_seen=exclude_seen, users=users,
                               allowed=allowed, blocked=blocked, only=only)  # fmt: skip
    whole = asked.search(histories, n, num_beams=n, exclude_seen=False, users=users)
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
    assert not again.recommend(again.item_ids, k=24, exclude_seen=True)


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
    with pytest.raises(ConfigError, match="2 histories and 1 row of users"):
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
    with pytest.raises(UnknownIdError, match=r"It has 40 users\.$"):
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


# Restrictions, and what is asked


def test_one_history_or_user_gives_one_list_and_many_give_many(rec: Recommender, workspace: Path) -> None:
    whole = {user: rec.user_history(user)[0] for user in ("u3", "u7")}
    several = rec.recommend([whole["u3"], whole["u7"]], k=4)
    assert several == rec.recommend(user_ids=["u3", "u7"], k=4)
    assert several == [rec.recommend(whole[user], k=4) for user in whole]
    assert several[1] == rec.recommend("u7", k=4) == rec.recommend("u7", k=4, data=workspace / "data" / "tiny")
    other = genrec.Dataset.from_frames(pl.DataFrame({"user_id": ["new", "new"], "item_id": ["i2", "i1"]}))
    assert rec.recommend("new", k=3, data=other) == rec.recommend(["i2", "i1"], k=3)
    assert rec.recommend(user_ids=[]) == []
    assert rec.recommend(user_ids=np.array(["u3", "u7"]), k=4) == several  # type: ignore[call-overload]
    assert rec.recommend(user_ids=pl.Series(["u3", "u7"]), k=4) == several  # type: ignore[call-overload]
    with pytest.raises(UnknownIdError, match=r"user 7 is not in .*tiny\. Did you mean 'u7'\?"):
        rec.recommend(user_ids=[7])  # type: ignore[list-item]
    with pytest.raises(UnknownIdError, match=r"user 'i7' is not in .*It is an item: a history is a list, \['i7'\]"):
        rec.recommend("i7")


@pytest.mark.parametrize("which", ["rec", "aged"])
def test_restrictions_of_a_call_hold_within_the_search(request: pytest.FixtureRequest, which: str) -> None:
    rec: Recommender = request.getfixturevalue(which)
    history, legal = ["i9", "i1"], {"i8", "i10", "i12"}
    found = rec.recommend(
        history, 5, num_beams=24, where="brand = 'studio 1'", allowed=[*legal, "i9", "i11", "i20"], blocked=["i11"]
    )
    expected = [item for item, _ in by_score(rec, history, set(rec.item_ids) - legal)]
    assert [one.item_id for one in found] == expected
    assert found.reason == "the restrictions leave only 3 items"
    assert rec.recommend(history, 3, num_beams=24, allowed=sorted(legal)).reason is None
    with pytest.raises(ConfigError, match="items have no column 'brnd'"):
        rec.recommend(history, where="brnd = 'studio 1'")
    with pytest.raises(UnknownIdError, match="item 'nix'"):
        rec.recommend(history, blocked=["nix"])


@pytest.mark.parametrize("kind", ["polars", "pandas", "arrow"])
def test_frame_in_and_frame_out(rec: Recommender, kind: str) -> None:
    frame = pl.DataFrame({"user_id": ["a", "b", "c"], "history": [["i1", "i2"], rec.item_ids, None]})
    change = {"polars": lambda table: table, "pandas": pl.DataFrame.to_pandas, "arrow": pl.DataFrame.to_arrow}[kind]
    given = change(frame)
    made = rec.recommend_frame(given, 2, blocked=["i3"])
    assert type(made) is type(given)
    back = pl.DataFrame(made) if kind != "pandas" else pl.from_pandas(made)
    assert back.columns == ["user_id", "rank", "item_id", "title", "score", "reason"]
    assert back["user_id"].to_list() == ["a", "a", "b", "c", "c"]
    first, _, last = rec.recommend([["i1", "i2"], rec.item_ids, []], 2, blocked=["i3"])
    ids = [one.item_id for one in first] + [None] + [one.item_id for one in last]
    assert back["item_id"].to_list() == ids
    assert back["reason"].is_not_null().to_list() == [False, False, True, False, False]
    rows = rec.recommend_frame(change(frame.select("history").head(1)), 2)
    assert pl.DataFrame(rows)["row"].to_list() == [0, 0]


def test_frame_of_users_alone_takes_histories_and_columns_from_the_data(aged: Recommender) -> None:
    found = aged.recommend_frame(pl.DataFrame({"user_id": ["u3", "u5"]}), 3)
    expected = aged.recommend(user_ids=["u3", "u5"], k=3)
    assert found["item_id"].to_list() == [one.item_id for list_ in expected for one in list_]
    history, row = aged.user_history("u3")
    told = pl.DataFrame({"history": [history], "age": [(row or {})["age"]]})
    assert aged.recommend_frame(told, 3)["item_id"].to_list() == found["item_id"].to_list()[:3]
    with pytest.raises(DataError, match=r"the users do not fit prompt aged, .*no column `age`"):
        aged.recommend_frame(told.drop("age"))
    with pytest.raises(DataError, match="no column 'history' and no 'user_id'; it has age"):
        aged.recommend_frame(told.drop("history"))
    with pytest.raises(DataError, match="column history is String; it takes lists"):
        aged.recommend_frame(pl.DataFrame({"history": ["i1"], "age": [3]}))
    with pytest.raises(DataError, match="column context is String; it takes structs"):
        aged.recommend_frame(told.with_columns(context=pl.lit("{}")))
    assert aged.recommend_frame(told.clear()).is_empty()


def test_what_is_told_of_a_user_goes_before_what_the_data_set_says(aged: Recommender) -> None:
    aged = Recommender.load(aged.adapter.path, engine="dummy")  # Any other head gives another list.
    history, row = aged.user_history("u3")
    older = {**(row or {}), "age": 99}
    assert aged.recommend("u3", 3, users={"age": 99}) == aged.recommend(history, 3, users=older)
    assert aged.recommend("u3", 3, users={"unread": 1}) == aged.recommend("u3", 3) != aged.recommend(history, 3)
    both = aged.recommend(user_ids=["u3", "u5"], k=3, users=[None, {"age": 99}])
    assert both == [aged.recommend("u3", 3), aged.recommend("u5", 3, users={"age": 99})]
    found = aged.recommend_frame(pl.DataFrame({"user_id": ["u3", "u5"], "age": [99, 20]}), 3)
    expected = aged.recommend(user_ids=["u3", "u5"], k=3, users=[{"age": 99}, {"age": 20}])
    assert found["item_id"].to_list() == [one.item_id for list_ in expected for one in list_]
    with pytest.raises(ConfigError, match="2 histories and 1 row of users were given; it takes one per history"):
        aged.recommend(user_ids=["u3", "u5"], users=[{"age": 3}])


@pytest.mark.parametrize("which", ["rec", "aged"])
def test_similar_items_have_near_rows(request: pytest.FixtureRequest, which: str) -> None:
    rec: Recommender = request.getfixturevalue(which)
    weight = rec.engine.model.get_input_embeddings().weight.detach().numpy()  # type: ignore[attr-defined]
    means = np.array([weight[rec.tokenization.identifier(item)].mean(axis=0) for item in range(24)])
    units = means / np.linalg.norm(means, axis=1, keepdims=True)
    found = rec.similar("i5", 6)
    expected = sorted((item for item in range(24) if item != 5), key=lambda item: -float(units[item] @ units[5]))[:6]
    np.testing.assert_allclose([one.score for one in found], [units[item] @ units[5] for item in expected], atol=1e-5)
    assert found[0].item_id == f"i{expected[0]}"
    everything = rec.similar("i5", 30)
    assert (len(everything), everything.reason) == (23, "the catalogue has only 23 other items")
    with pytest.raises(UnknownIdError, match="item 'nix'"):
        rec.similar("nix")


def test_similar_needs_a_model(workspace: Path) -> None:
    with pytest.raises(ConfigError, match="similar needs a model, and DummyEngine has none"):
        Recommender.load(workspace / "adapters" / "lora", engine="dummy").similar("i1")


def test_why_explains(rec: Recommender) -> None:
    told = rec.why(["i1", "i2"], "i3")
    np.testing.assert_allclose(told.score, rec.score(["i1", "i2"], ["i3"])[0], atol=1e-4)


def test_why_takes_a_user(aged: Recommender, workspace: Path) -> None:
    history, row = aged.user_history("u3")
    assert aged.why("u3", "i3", k=4) == aged.why(history, "i3", k=4, user=row)
    older = aged.why("u3", "i3", user={"age": 99}, data=workspace / "data" / "tiny")
    assert older == aged.why(history, "i3", user={**(row or {}), "age": 99})
    other = genrec.Dataset.from_frames(pl.DataFrame({"user_id": ["new", "new"], "item_id": ["i2", "i1"]}))
    assert aged.why("new", "i3", data=other) == aged.why(["i2", "i1"], "i3")
    with pytest.raises(UnknownIdError, match="user 'U3' is not in"):
        aged.why("U3", "i3")


# Prompts other than the adapter's

SHELL = "{{% block user %}}{}{{% endblock %}}{{% block item %}}{{{{ item.identifier }}}}{{% endblock %}}"


def test_a_prompt_that_reads_the_same_is_taken_and_another_one_refused(
    workspace: Path, rec: Recommender, tmp_path: Path
) -> None:
    path, folder = tmp_path / "mine.jinja", workspace / "adapters" / "lora"
    path.write_text("{# A remark. #}\n" + rec.adapter.prompt.source)
    same = Recommender.load(folder, engine="dummy", prompt=path)
    assert not same.not_as_trained
    assert same.prompt(["i1"]) == rec.prompt(["i1"])
    path.write_text(SHELL.format("Something new:"))
    with pytest.raises(AdapterError) as caught:
        rec.with_prompt(path)
    message = str(caught.value)
    assert f"{path} is not the prompt that {folder} was trained with:\n--- {folder}/prompts/next_item.jinja" in message
    assert "\n+{% block user %}Something new:" in message
    assert "{#" not in message  # No part of the contract.
    assert "Leave prompt out to keep the adapter's own, or train again" in message
    tried = rec.with_prompt(path, untrained=True)
    assert tried.not_as_trained
    assert not rec.not_as_trained
    assert "Something new:" in tried.prompt([])
    assert "Something new:" not in rec.prompt([])
    assert tried.recommend(["i1"], k=3) != rec.recommend(["i1"], k=3)
    assert Recommender.load(folder, engine="dummy", prompt=Prompt.load(path), untrained=True).not_as_trained
    question = Prompt.load(workspace / "prompts" / "title_to_item.jinja")
    with pytest.raises(AdapterError, match="title_to_item is a question prompt, and an adapter recommends with a seq"):
        rec.with_prompt(question, untrained=True)
    path.write_text(SHELL.format("Hm:").replace("identifier }}", "identifier }}{{ item.prise }}"))
    with pytest.raises(AdapterError, match=r"mine\.jinja:1:\d+: the table of `item` has no column `prise`"):
        rec.with_prompt(path, untrained=True)


def test_a_changed_file_is_read_again_in_place(workspace: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text(SHELL.format("One"))
    rec = Recommender.load(workspace / "adapters" / "lora", engine="dummy", prompt=path, untrained=True)
    asked = rec.prompt([])
    path.write_text(SHELL.format("Two"))
    assert rec.prompt([]) == asked
    rec.reload(untrained=True)
    assert rec.prompt([]) == asked.replace("One", "Two")
    path.write_text("{% block user %}")
    with pytest.raises(PromptError, match=r"mine\.jinja:1"):
        rec.reload(untrained=True)
    path.write_text(SHELL.format("Three"))
    with pytest.raises(AdapterError, match="is not the prompt"):
        rec.reload()
    assert rec.prompt([]) == asked.replace("One", "Two")
    rec.reload(workspace / "prompts" / "next_item.jinja")
    assert not rec.not_as_trained
    with pytest.raises(ConfigError, match=r"reads its own prompt, and no file was named\. Write reload\(path\)"):
        Recommender.load(workspace / "adapters" / "lora", engine="dummy").reload()


# Context


@pytest.fixture(scope="module")
def told(rec: Recommender) -> Recommender:
    """The adapter with a prompt whose head reads what is known of the choice."""
    text = "{{ context.query | default('anything') }} at {{ context.hour }}"
    return rec.with_prompt(Prompt.parse(SHELL.format(text), "told"), untrained=True)


def test_context_reaches_the_head(told: Recommender) -> None:
    context = {"query": "tea", "hour": 18, "unread": object()}
    assert "tea at 18" in told.prompt(["i1"], context=context)
    assert "anything at<|end|>" in told.prompt(["i1"])  # What is not given is empty.
    one, other = told.recommend([["i1"], ["i1"]], k=24, num_beams=24, contexts=[context, None])
    assert one == told.recommend(["i1"], k=24, num_beams=24, contexts=context)
    assert [item.score for item in one] != [item.score for item in other]
    by_id = {item.item_id: item.score for item in one}
    scores = told.score(["i1"], ["i2", "i3"], context=context)
    np.testing.assert_allclose([by_id["i2"], by_id["i3"]], scores, atol=1e-4)
    with pytest.raises(ConfigError, match="2 histories and 1 row of contexts were given; it takes one"):
        told.recommend([["i1"], ["i2"]], contexts=[context])
    frame = pl.DataFrame({"history": [["i1"], ["i1"]], "context": [{"query": "tea", "hour": 18}, None]})
    found = told.recommend_frame(frame, 24, num_beams=24)
    assert found["item_id"].to_list() == [item.item_id for list_ in (one, other) for item in list_]
    nothing = told.recommend_frame(frame.with_columns(context=None), 24, num_beams=24)  # As pandas has it.
    assert nothing["item_id"].to_list() == [item.item_id for _ in range(2) for item in other]


# Threads


def test_eight_threads_ask_one_recommender(workspace: Path, rec: Recommender, tmp_path: Path) -> None:
    """Every answer is whole: that of one prompt or of the other, while the file is read again and again."""
    files = [tmp_path / "one.jinja", tmp_path / "two.jinja"]
    for file, text in zip(files, ("Age {{ user.age }}", "{{ context.query }}, please"), strict=True):
        file.write_text(SHELL.format(text))
    # Of the dummy engine any other head gives another list; the tiny model hardly looks at its head.
    shared = Recommender.load(workspace / "adapters" / "lora", engine="dummy", prompt=files[0], untrained=True)
    histories = [["i1", "i2"], [], [f"i{item}" for item in range(12)], ["i20"]]
    options: dict[str, Any] = {"users": [{"age": age} for age in (20, 30, 40, 50)], "where": "brand <> 'studio 2'"}
    options["contexts"] = [{"query": word} for word in ("tea", "pot", "cup", "jar")]
    expected = []
    for file in files:
        shared.reload(file, untrained=True)
        expected.append(shared.recommend(histories, 5, **options))
    assert not any(one == other for one, other in zip(*expected, strict=True))
    model = rec.with_model()  # Its vectors for ``similar`` are made by one of the threads.
    lists = [[one.item_id for one in found] for found in rec.recommend(histories, 5)]
    likes = rec.similar("i3", 4)

    def ask(number: int) -> None:
        for turn in range(6):
            if number == 0:
                shared.reload(files[turn % 2], untrained=True)
            which = expected.index(shared.recommend(histories, 5, **options))
            assert number or which == turn % 2  # Nobody else reads the file again.
            assert len(shared.recommend(f"u{number}", 3)) == 3
            assert "<|item_3|>" in shared.prompt(["i3"])
            assert [[one.item_id for one in found] for found in model.recommend(histories, 5)] == lists
            assert model.similar("i3", 4) == likes

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(8)))


def test_what_asks_several_times_is_of_one_prompt(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rec = Recommender.load(workspace / "adapters" / "lora", engine="dummy")
    files = [tmp_path / "one.jinja", tmp_path / "two.jinja"]
    files[0].write_text(SHELL.format("Age {{ user.age }}"))
    files[1].write_text(SHELL.format("Not {{ user.size }}"))
    shared = rec.with_prompt(files[0], untrained=True)
    frame = pl.DataFrame({"user_id": ["u1", "u2"]})
    expected = shared.recommend_frame(frame, 24)
    ask = Recommender.user_history

    def late(self: Recommender, *arguments: Any) -> Any:
        shared.reload(files[1], untrained=True)
        return ask(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Recommender, "user_history", late)
        assert shared.recommend_frame(frame, 24).equals(expected)
    assert not shared.recommend_frame(frame, 24).equals(expected)

    asked: list[Recommender] = []
    monkeypatch.setattr("genrec.explanations.explain", lambda asking, *_, **__: asked.append(asking))
    shared.why(["i1"], "i2")
    shared.reload(files[0], untrained=True)
    assert "Not" in asked[0].prompt([])
    assert "Age" in shared.prompt([])


# Bad input


def test_unknown_item_is_named_with_the_closest(rec: Recommender) -> None:
    with pytest.raises(UnknownIdError, match=r"item 'I5' is not in the catalogue of .*lora\. Did you mean 'i5'\?"):
        rec.recommend([["i1"], ["i2", "I5"]])
    with pytest.raises(UnknownIdError, match=r"item 'whatever' .* It has 24 items"):
        rec.score(["i1"], ["whatever"])
    odd: Any
    for odd in (17, None, float("nan")):
        for given in ([[odd]], [odd], ["i1", odd]):
            with pytest.raises(UnknownIdError, match=f"item {odd} is not in the catalogue"):
                rec.recommend(given)
    with pytest.raises(UnknownIdError, match="item None is not"):
        rec.recommend_frame(pl.DataFrame({"history": [["i1", None]]}))


def test_users_in_the_place_of_items_are_hinted_at(workspace: Path) -> None:
    rec = Recommender.load(workspace / "adapters" / "lora", engine="dummy")
    with pytest.raises(UnknownIdError, match=r"item 'u1' is not .* Users go in user_ids=\[\.\.\.\]\.$"):
        rec.recommend(["u1", "u2"])
    rec.recommend("u1")  # Now there is a data set to look in.
    with pytest.raises(UnknownIdError, match=r"These are users: write user_ids=\['u1', 'u2'\]\.$"):
        rec.recommend(["u1", "u2"])
    with pytest.raises(UnknownIdError) as caught:
        rec.recommend(["i1", "u2"])
    assert "user_ids" not in str(caught.value)


def test_repr_is_a_line(workspace: Path) -> None:
    rec = Recommender.load(workspace / "adapters" / "lora", engine="dummy")
    told = f"Recommender({rec.adapter.path}: lora, 24 items, prompt next_item, DummyEngine"
    assert repr(rec) == f"{told})"
    other = Prompt.parse(SHELL.format("Hm:"), "other")
    assert repr(rec.with_prompt(other, untrained=True)) == f"{told.replace('next_item', 'other')}, not as trained)"


FRAME = pl.DataFrame({"history": [["i1"]]})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda rec: rec.recommend(5), "histories is 5. It takes a list of item ids"),
        (lambda rec: rec.recommend({"i1", "i2"}), "histories is a set, which keeps no order"),
        (lambda rec: rec.recommend([{"i1", "i2"}]), "a history is a set, which keeps no order"),
        (lambda rec: rec.recommend(FRAME), "histories is a DataFrame. A table goes to recommend_frame"),
        (lambda rec: rec.recommend(FRAME.to_pandas()), "histories is a DataFrame. A table goes to"),
        (lambda rec: rec.recommend(FRAME.to_arrow()), "histories is a Table. A table goes to"),
        (lambda rec: rec.recommend(user_ids=5), "user_ids is 5. It takes a list of user ids"),
        (lambda rec: rec.recommend(["i1"], k="3"), "k is '3', of type str. It takes a whole number"),
        (lambda rec: rec.recommend(["i1"], k=2.5), "k is 2.5, of type float"),
        (lambda rec: rec.recommend(["i1"], k=True), "k is True, of type bool"),
        (lambda rec: rec.recommend(["i1"], num_beams="9"), "num_beams is '9', of type str"),
        (lambda rec: rec.recommend(["i1"], where=float("nan")), "where is nan, of type float. Write one such as"),
        (lambda rec: rec.why(["i1"], "i2", where=["x"]), r"where is \['x'\], of type list"),
        (lambda rec: rec.recommend(["i1"], contexts="tea"), "contexts is 'tea'. It takes a mapping of columns"),
        (lambda rec: rec.recommend(["i1"], users="x"), "users is 'x'. It takes a mapping"),
        (lambda rec: rec.recommend("u1", users="x"), "users is 'x'. It takes a mapping"),
        (lambda rec: rec.recommend(["i1"], users=["x"]), "users holds 'x'. It takes a mapping"),
        (lambda rec: rec.score(["i1"], ["i2"], context="tea"), "context.* 'tea'. It takes a mapping"),
        (lambda rec: rec.why(["i1"], "i2", user="x"), "user.* 'x'. It takes a mapping"),
        (lambda rec: rec.score(["i1"], {"i2"}), "items is a set"),
        (lambda rec: rec.score({"i1"}, ["i2"]), "history is a set"),
        (lambda rec: rec.recommend(["i1"], blocked=[["i2"]]), r"an item id is a text, found \['i2'\]"),
        (lambda rec: rec.similar(["i1"]), r"similar takes one item id, a text, found \['i1'\]"),
        (lambda rec: rec.similar("i1", k="3"), "k is '3'"),
    ],
)
def test_arguments_of_another_kind_are_refused(
    rec: Recommender, call: Callable[[Recommender], Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        call(rec)


def test_allowed_and_blocked_may_be_sets(rec: Recommender) -> None:
    allowed: Any = {"i3", "i4"}
    assert rec.recommend(["i1"], allowed=allowed) == rec.recommend(["i1"], allowed=["i3", "i4"])


def test_nothing_in_the_place_of_a_list_is_an_empty_history(rec: Recommender) -> None:
    frame = pl.DataFrame({"history": [["i1"], None]}).to_pandas()
    frame.loc[1, "history"] = float("nan")
    found = rec.recommend_frame(frame, 2)
    assert found["item_id"].to_list()[2:] == [one.item_id for one in rec.recommend([[]], 2)[0]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda rec: rec.recommend([["i1"], "i2"]), "takes a history, which is a list of item ids, or a list"),
        (lambda rec: rec.recommend(), "takes histories or user_ids, one of the two"),
        (lambda rec: rec.recommend(["i1"], user_ids=["u1"]), "takes histories or user_ids, one of the two"),
        (lambda rec: rec.recommend(user_ids="u1"), r"user_ids is the text 'u1'. Write recommend\('u1'\) for one user"),
        (lambda rec: rec.recommend(["i1"], allowed="i2"), "found the text 'i2'"),
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
    with pytest.raises(ConfigError, match=r"dtype is 'bfloat61'. Did you mean 'bfloat16'\?"):
        Recommender.load(path, dtype="bfloat61")


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
