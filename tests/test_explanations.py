from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import semantic_adapter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from genrec import explanations
from genrec.cli import main
from genrec.decoding import Trie
from genrec.engines.dummy import DummyEngine
from genrec.errors import ConfigError, UnknownIdError
from genrec.explanations import Explanation, explain
from genrec.recommender import Recommender
from genrec.report import pictures

HISTORY = ["i3", "i4", "i5", "i9"]


@pytest.fixture(scope="module")
def rec(workspace: Path) -> Recommender:
    return Recommender.load(workspace / "adapters" / "lora")


@pytest.fixture(scope="module")
def semantic(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Recommender:
    """An adapter with semantic IDs of some levels, whose head tells the age of the user."""
    prompt = "{% block user %}Age {{ user.age }}{% endblock %}{% block item %}{{ item.identifier }}{% endblock %}"
    root = tmp_path_factory.mktemp("semantic") / "workspace"
    return Recommender.load(semantic_adapter(workspace, root, prompt, codes=5, max_length=48))


def slowly_ranked(rec: Recommender, history: list[str], item: str, shut: set[str], user: Any = None) -> int:
    """The place of an item among what is not shut, from the score of every one."""
    scores = rec.score(history, rec.item_ids, user=user)
    own = rec.item_ids.index(item)
    better = (scores > scores[own]) | ((scores == scores[own]) & (np.arange(len(scores)) < own))
    return 1 + sum(bool(better[index]) for index, other in enumerate(rec.item_ids) if other not in shut)


def check_story(found: Explanation, listed: list[str]) -> None:
    """What holds for every explanation."""
    assert (found.list_rank is None) == (found.item_id not in listed)
    assert (found.list_rank is None) == (found.dropped_by is not None) == (found.dropped_at is not None)
    if found.list_rank is not None:
        assert listed[found.list_rank - 1] == found.item_id
        assert not found.refused_by
        assert all(step.kept for step in found.steps)
    assert found.steps[[step.token != "" for step in found.steps].count(True) - 1].score == found.score
    scores = [step.score for step in found.steps]
    assert scores == sorted(scores, reverse=True)
    if found.dropped_by in ("mask", "beam"):
        assert [step.kept for step in found.steps].index(False) + 1 == found.dropped_at
    for step in found.steps:
        if step.bar is not None:
            assert step.kept == (step.score >= step.bar - 1e-4)


@pytest.mark.parametrize("engine", ["rec", "semantic"])
def test_every_item_is_explained_as_the_list_has_it(request: pytest.FixtureRequest, engine: str) -> None:
    recommender: Recommender = request.getfixturevalue(engine)
    user = {"age": 31}
    listed = [item.item_id for item in recommender.recommend([HISTORY], k=4, num_beams=5, users=[user])[0]]
    met = set()
    for item in ("i3", "i6", listed[0], listed[3], *recommender.item_ids[-4:]):
        found = explain(recommender, HISTORY, item, user=user, k=4, num_beams=5)
        check_story(found, listed)
        met.add(found.dropped_by)
        assert found.rank == slowly_ranked(recommender, HISTORY, item, set(HISTORY), user)
        assert found.allowed_items == 20
        assert found.score == pytest.approx(recommender.score(HISTORY, [item], user=user)[0], abs=1e-5)
        assert found.refused_by == (("seen",) if item in HISTORY else ())
    assert met >= {None, "mask", "beam" if engine == "semantic" else "length"}


@pytest.mark.parametrize("num_beams", [2, 3, 24])
def test_level_of_the_beam_is_that_of_a_search_by_hand(semantic: Recommender, num_beams: int) -> None:
    """Every level by plain scores: the best beginnings among the children of those that were kept before."""
    tokens = semantic.tokenization.tokens
    prompt = semantic.tokenization.sequence(semantic.adapter.prompt, semantic.indices(HISTORY))
    alive = {()}
    dropped: dict[int, int] = {}
    for level in range(1, tokens.shape[1] + 1):
        of = [tuple(int(token) for token in row[:level] if token >= 0) for row in tokens]
        ended = [tuple(int(token) for token in row[: level - 1] if token >= 0) for row in tokens]
        candidates = sorted({one for one, before in zip(of, ended, strict=True) if before in alive}, key=of.index)
        scores = semantic.engine.score([prompt] * len(candidates), [np.array(one) for one in candidates])
        alive = {candidates[place] for place in np.argsort(-scores, kind="stable")[:num_beams]}
        for item, beginning in enumerate(of):
            if beginning not in alive:
                dropped.setdefault(item, level)
    for item in range(0, len(tokens), 3):
        found = explain(semantic, HISTORY, semantic.item_ids[item], k=2, num_beams=num_beams, exclude_seen=False)
        if item in dropped:
            assert (found.dropped_by, found.dropped_at) == ("beam", dropped[item])
        else:
            assert found.dropped_by in (None, "length")


def test_rank_is_exact_where_branches_are_left_out(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With pieces of two and no room for rounding, the search by beginnings still counts what every score counts."""
    monkeypatch.setattr(explanations, "_TOGETHER", 2)
    check_rank()


class CoarseEngine(DummyEngine):
    """One whose log-probabilities are whole numbers, so that many beginnings and items score the same."""

    def _logprobs(self, states: Any, rows: Any, tokens: Any) -> Any:
        return -1.0 - np.floor(self.logits(states)[rows, tokens] / 2)


@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def check_rank(data: st.DataObject) -> None:
    names = data.draw(st.lists(st.text("abcd", min_size=1, max_size=4), min_size=2, max_size=30, unique=True))
    kept = [name for name in names if not any(other != name and name.startswith(other) for other in names)]
    tokens = np.full((len(kept), 4), -1, dtype=np.int32)
    for row, name in enumerate(kept):
        tokens[row, : len(name)] = [ord(letter) - 97 for letter in name]
    trie = Trie.build(tokens)
    engine = data.draw(st.sampled_from([DummyEngine, CoarseEngine]))(6, seed=data.draw(st.integers(0, 100)))
    prompt = np.array(data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=5)))
    scores = engine.score([prompt] * len(kept), [row[row >= 0] for row in tokens])
    allowed = np.array(data.draw(st.lists(st.booleans(), min_size=len(kept), max_size=len(kept))))
    item = data.draw(st.integers(0, len(kept) - 1))
    search = explanations._Search(engine, prompt, trie, tokens, allowed, item, float(scores[item]))
    before = (scores > scores[item]) | ((scores == scores[item]) & (np.arange(len(kept)) < item))
    assert search.rank() == 1 + int((before & allowed).sum())
    # What the levels say is what the search itself ends with.
    num_beams = data.draw(st.integers(1, 8))
    found = engine.beam_search([prompt], trie, num_beams, allowed).items[0].tolist()
    places = [search.at(level, num_beams).place for level in range(1, trie.max_length + 1)]
    assert (places[-1] is not None) == (item in found)
    assert item not in found or (None not in places and found[places[-1] - 1] == item)
    assert None not in places or set(places[places.index(None) :]) == {None}


def test_restrictions_that_shut_an_item_out_are_all_named(semantic: Recommender) -> None:
    found = explain(
        semantic, HISTORY, "i4", where="brand = 'studio 2'", allowed=["i20", "i21"], blocked=["i4"], num_beams=24
    )
    assert found.refused_by == ("seen", "where", "allowed", "blocked")
    assert (found.allowed_items, found.dropped_by) == (2, "mask")
    assert found.rank == slowly_ranked(semantic, HISTORY, "i4", set(semantic.item_ids) - {"i20", "i21"})
    assert "is not allowed: it is in the history" in found.answer
    assert "among the 2 allowed items" in found.answer
    again = explain(semantic, HISTORY, "i20", where="brand = 'studio 2'", allowed=["i20", "i21"], num_beams=24)
    assert again.refused_by == ()
    assert again.list_rank == again.rank
    nothing = explain(semantic, [], "i20", allowed=[])
    assert (nothing.rank, nothing.allowed_items, nothing.dropped_by, nothing.dropped_at) == (1, 0, "mask", 1)


def test_events_are_left_out_one_by_one(rec: Recommender) -> None:
    found = explain(rec, HISTORY, "i6")
    assert [event.item_id for event in found.events] == HISTORY
    assert [event.title for event in found.events] == [rec.titles[rec.index[item]] for item in HISTORY]
    for place, event in enumerate(found.events):
        without = rec.score(HISTORY[:place] + HISTORY[place + 1 :], ["i6"])[0]
        assert event.change == pytest.approx(without - found.score, abs=1e-4)


def test_prompt_is_the_one_that_is_read_and_cut_events_have_no_change(semantic: Recommender) -> None:
    history = [f"i{number % 24}" for number in range(60)]
    found = explain(semantic, history, "i6", user={"age": 44}, exclude_seen=False)
    assert "".join(span.text for span in found.prompt.read).count("Age 44") == 1
    ids = [index for span in found.prompt.read for index in span.ids]
    asked = semantic.tokenization.sequence(semantic.adapter.prompt, semantic.indices(history), {"age": 44})
    assert ids == asked.tolist()
    assert [event.change is None for event in found.events] == [place < found.prompt.cut for place in range(60)]
    assert 0 < found.prompt.cut < 60
    assert f"The {found.prompt.cut} oldest events" in found.answer
    assert found.prompt.tokens["free"] >= 0
    empty = explain(semantic, [], "i6")
    assert empty.events == ()
    assert empty.prompt.cut == 0


def test_answer_of_an_item_that_the_beam_lost(semantic: Recommender) -> None:
    """Random scores and one beam: the best item is often lost, and more beams find it, as the answer says."""
    dummy = Recommender.load(semantic.adapter.path, engine="dummy")
    met = 0
    for history in ([f"i{number}"] for number in range(8)):
        scores = dummy.score(history, dummy.item_ids)
        best = dummy.item_ids[int(np.argmax(scores))]
        found = explain(dummy, history, best, k=1, num_beams=1, exclude_seen=False)
        assert found.rank == 1
        lost = found.dropped_by == "beam"
        met += lost
        assert lost == (f"was dropped by the beam at level {found.dropped_at}: its identifier scores" in found.answer)
        assert lost == ("It belongs in the list: raise num_beams above 1." in found.answer)
        assert explain(dummy, history, best, k=1, num_beams=24, exclude_seen=False).list_rank == 1
        assert str(found) == found.answer
    assert met


def test_answer_of_an_item_that_is_lost_or_late(semantic: Recommender) -> None:
    order = np.argsort(-semantic.score([], semantic.item_ids))
    late = explain(semantic, [], semantic.item_ids[order[3]], k=1, num_beams=24)
    assert (late.dropped_by, late.rank) == ("length", 4)
    assert "ranks 4 of 24 allowed items, and the list ends at 1." in late.answer
    last = [semantic.item_ids[place] for place in order[-6:]]
    told = [explain(semantic, [], item, k=1, num_beams=1, blocked=[item]) for item in last]
    assert [("It is not allowed either: it is blocked." in one.answer) for one in told] == [
        one.dropped_by == "beam" for one in told
    ]
    assert "beam" in {one.dropped_by for one in told}


def test_no_beam_loses_an_item_of_one_token(rec: Recommender) -> None:
    last = rec.item_ids[int(np.argmin(rec.score([], rec.item_ids)))]
    found = explain(rec, [], last, k=4, num_beams=4)
    assert (found.rank, found.dropped_by, found.dropped_at) == (24, "length", 1)
    assert found.answer.endswith("ranks 24 of 24 allowed items, and the list ends at 4.")


def test_errors_are_those_of_recommend(rec: Recommender) -> None:
    with pytest.raises(UnknownIdError, match="item 'i99' is not in the catalogue"):
        explain(rec, HISTORY, "i99")
    with pytest.raises(ConfigError, match="num_beams is 3, below k"):
        explain(rec, HISTORY, "i6", num_beams=3)
    with pytest.raises(ConfigError, match="items have no column 'band'"):
        explain(rec, HISTORY, "i6", where="band = 'x'")


def test_method_is_the_function(rec: Recommender) -> None:
    assert rec.why(HISTORY, "i6", k=3) == explain(rec, HISTORY, "i6", k=3)


def test_picture(rec: Recommender, semantic: Recommender) -> None:
    found = explain(semantic, [f"i{number % 24}" for number in range(40)], "i6", num_beams=10, exclude_seen=False)
    assert found.picture().startswith(b"\x89PNG")
    empty = explain(rec, [], "i6")
    assert empty.picture() == empty._repr_png_()  # The same numbers, the same bytes.


@pytest.mark.parametrize(("tokens", "halves"), [(1, 1), (2, 2)])
def test_picture_shows_the_search_only_of_several_tokens(tokens: int, halves: int) -> None:
    steps = [("<|a|>", -1.0, None, True), ("<|b|>", -2.0, -1.5, False)][:tokens]
    assert len(pictures._explanation([("Tea", -0.5)], steps, "Pot").axes) == halves


def test_command_prints_a_table_and_writes_a_picture(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = str(workspace / "adapters" / "lora")

    def run(*words: str) -> str:
        monkeypatch.setattr("sys.argv", ["genrec", "--quiet", "why", adapter, *words])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code in (0, None), capsys.readouterr().err
        return capsys.readouterr().out

    printed = run("--user", "u3", "--item", "i6", "--out", str(tmp_path / "why"))
    assert "head, " in printed
    assert "last beam" in printed
    assert (tmp_path / "why" / "why.png").read_bytes().startswith(b"\x89PNG")
    noted = json.loads((tmp_path / "why" / "why.json").read_text("utf-8"))
    assert printed.startswith(noted["answer"])
    told = json.loads(run("--history", "i3,i4", "--item", "i6", "--json", "-k", "3", "--where", "brand = 'studio 0'"))
    assert told["allowed_items"] == 6
    assert [event["item_id"] for event in told["events"]] == ["i3", "i4"]
    assert json.loads(run("--history", "i3", "--item", "i3", "--json", "--keep-seen"))["refused_by"] == []
    only = json.loads(run("--history", "i3", "--item", "i6", "--json", "--allowed", "i4,i5", "--num-beams", "12"))
    assert (only["allowed_items"], only["refused_by"], only["num_beams"]) == (2, ["allowed"], 12)
    table = run("--history", "i3,i4", "--item", "i6").partition("the history, oldest first")[2]
    assert table.index("i3 ") < table.index("i4 ")  # As in JSON.
    assert json.loads(run("--history", "", "--item", "i3", "--json", "--blocked", "i3"))["refused_by"] == ["blocked"]
