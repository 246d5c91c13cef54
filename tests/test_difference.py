from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

import genrec
from genrec import metrics
from genrec.difference import Pair, difference
from genrec.engines.local import LocalEngine
from genrec.errors import ConfigError, DataError
from genrec.export import validation_sets
from genrec.prompts import Prompt
from genrec.recommender import Recommender
from genrec.rendering import render


@pytest.fixture(scope="module")
def rec(workspace: Path) -> Recommender:
    return Recommender.load(workspace / "adapters" / "lora")


@pytest.fixture
def titles(tmp_path: Path) -> Path:
    """The default prompt with titles in the history."""
    path = tmp_path / "titles.jinja"
    path.write_text(
        "{% block user %}Next:{% endblock %}{% block item %}{{ item.identifier }} {{ item.title }}{% endblock %}"
    )
    return path


def words(pair: Pair, kind: str, around: int | None = None) -> list[str]:
    return [text for found, text in pair.pieces(around) if found == kind]


def test_difference_of_a_data_set_and_a_base(workspace: Path, titles: Path) -> None:
    tiny, base = workspace / "data" / "tiny", str(workspace / "adapters" / "random")
    default = workspace / "prompts" / "next_item.jinja"
    found = difference(default, titles, data=tiny, base=base, users=7)
    assert len(found.pairs) == len({pair.user_id for pair in found.pairs}) == 7
    assert (found.same_contract, found.ndcg, found.not_as_trained, found.notes) == (False, None, [], [])
    for pair in found.pairs:
        assert words(pair, "removed") == []
        assert "Film" in "".join(words(pair, "added"))
        assert (
            "".join(text for kind, text in pair.pieces() if kind == "same")
            == f"{pair.a.text} → {pair.a.answer[0].text}"
        )
    assert found == difference(default, titles, data=tiny, base=base, users=7)


def test_tokens_are_means_over_the_users(workspace: Path, titles: Path) -> None:
    tiny, base = workspace / "data" / "tiny", str(workspace / "adapters" / "random")
    found = difference(workspace / "prompts" / "next_item.jinja", titles, data=tiny, base=base, max_length=64, users=9)
    for side in ("a", "b"):
        shown = [getattr(pair, side) for pair in found.pairs]
        for name, counts in (
            ("history", [one.tokens["history"] for one in shown]),
            ("read", [sum(len(span.ids) for span in one.read) for one in shown]),
            ("events cut", [one.cut for one in shown]),
        ):
            assert found.tokens[name][side] == pytest.approx(np.mean(counts))
    assert found.tokens["history"]["change"] > 0
    assert found.tokens["events cut"]["change"] > 0
    assert found.tokens["head"]["change"] == found.tokens["answer"]["change"] == 0


def test_ndcg_of_both_prompts_in_memory(workspace: Path, rec: Recommender, titles: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in workspace.rglob("*")}
    default = workspace / "prompts" / "next_item.jinja"
    found = difference(default, titles, rec.adapter.path, users=2)
    assert found.ndcg is not None
    assert found.ndcg["a"] == pytest.approx(rec.adapter.manifest["kept"]["ndcg@10"], abs=1e-6)
    assert found.ndcg["change"] == pytest.approx(found.ndcg["b"] - found.ndcg["a"])
    assert found.ndcg["low"] <= found.ndcg["change"] <= found.ndcg["high"]
    assert found.not_as_trained == ["b"]
    (cases,) = validation_sets(rec.adapter, rec.tokenization, [Prompt.load(titles)])
    assert isinstance(rec.engine, LocalEngine)
    assert found.ndcg["b"] == pytest.approx(metrics.METRICS["ndcg"](cases.ranks(rec.engine), 10).mean(), abs=1e-6)
    assert found.ndcg["cases"] == len(cases.targets)
    assert {path: path.stat().st_mtime_ns for path in workspace.rglob("*")} == before
    assert difference(default, titles, rec.adapter.path, users=2, measured=False).ndcg is None


def test_a_comment_changes_nothing(workspace: Path, rec: Recommender, tmp_path: Path) -> None:
    default = workspace / "prompts" / "next_item.jinja"
    (tmp_path / "mine.jinja").write_text("{# Mine. #}\n" + default.read_text())
    found = difference(default, tmp_path / "mine.jinja", rec.adapter.path, users=3)
    assert found.same_contract
    assert found.not_as_trained == []
    assert found.ndcg is not None
    assert found.ndcg["change"] == 0
    assert all(kind == "same" for pair in found.pairs for kind, _ in pair.pieces())


def test_questions_are_compared_and_not_measured(workspace: Path, rec: Recommender) -> None:
    prompts = [workspace / "prompts" / f"{name}.jinja" for name in ("item_to_title", "title_to_item")]
    found = difference(prompts[0], prompts[1], rec.adapter.path, users=4)
    assert found.ndcg is None
    assert all(words(pair, "removed") and words(pair, "added") for pair in found.pairs)
    with pytest.raises(ConfigError, match="two sequence prompts, and item_to_title is a question"):
        difference(*prompts, rec.adapter.path, measured=True)
    default, tiny = workspace / "prompts" / "next_item.jinja", workspace / "data" / "tiny"
    with pytest.raises(ConfigError, match="no adapter was given"):
        difference(default, default, data=tiny, base=str(workspace / "adapters" / "random"), measured=True)
    with pytest.raises(ConfigError, match="users is 0"):
        difference(*prompts, rec.adapter.path, users=0)


def test_users_who_are_not_asked_are_counted(workspace: Path, rec: Recommender, tmp_path: Path) -> None:
    rating = workspace / "prompts" / "rating.jinja"
    with pytest.raises(DataError, match="no column `rating`"):
        difference(rating, rating, rec.adapter.path)
    data = genrec.Dataset.load(workspace / "data" / "tiny")
    second = pl.col("order") == 1
    log = data.interactions.with_columns(rating=pl.when(second).then(4.0)).drop("order")
    genrec.Dataset.from_frames(log, data.items, data.users).save(tmp_path / "rated")
    found = difference(rating, rating, rec.adapter.path, data=tmp_path / "rated", users=5)
    assert found.pairs == []
    assert found.tokens == {}
    assert found.notes == ["5 of 5 users are not asked: their last event has no answer"]


def test_columns_that_are_misspelt_are_noted(workspace: Path, tmp_path: Path) -> None:
    """Of a user nothing is said where a column is not given, so that nothing else would tell."""
    path = tmp_path / "aged.jinja"
    path.write_text(
        "{% block user %}Aged {{ user.aeg }}{% endblock %}{% block item %}{{ item.identifier }}{% endblock %}"
    )
    tiny, base = workspace / "data" / "tiny", str(workspace / "adapters" / "random")
    found = difference(path, path, data=tiny, base=base, users=1)
    assert found.notes == [f"{path}:1:30: the table of `user` has no column `aeg`. Did you mean 'age'?"]


def test_unchanged_words_are_shortened_beside_a_change(workspace: Path, rec: Recommender, titles: Path) -> None:
    long = [f"i{item}" for item in range(9)]
    default = workspace / "prompts" / "next_item.jinja"
    a = render(default, rec.adapter.path, history=long)
    (whole,) = Pair("x", a, a).pieces()
    assert whole == ("same", a.text)
    (piece,) = Pair("x", a, a).pieces(20)
    assert piece == ("same", "<|begin|><|user|>Next … <|item_7|><|item_8|>")
    b = render(default, rec.adapter.path, history=[*long[:4], *long[5:]])
    pieces = Pair("x", a, b).pieces(20)
    assert [kind for kind, _ in pieces] == ["same", "removed", "same"]
    assert pieces[0][1] == " … <|item_2|><|item_3|>"
    assert pieces[1][1] == "<|item_4|>"
    assert pieces[2][1] == "<|item_5|><|item_6|> … "
    assert Pair("x", a, b).pieces(1000) == Pair("x", a, b).pieces()
