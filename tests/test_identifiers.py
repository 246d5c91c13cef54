from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.errors import ConfigError, IdentifierError, UnknownIdError
from genrec.identifiers import LONGEST_TITLE, SCHEMES, Identifiers

ids = st.lists(st.text(min_size=1, max_size=5), min_size=0, max_size=30, unique=True)


WORDS = ["tea", "Ġpot", "红", "楼", "👩", "<0x0A>", "<|item_3|>", "</s>", "<unk>", "<|title|>", "title_end"]
titles_of = st.lists(st.lists(st.sampled_from(WORDS), max_size=4) | st.lists(st.text(min_size=1), max_size=40))


def vectors_of(n: int, kind: str = "normal") -> np.ndarray:
    return np.random.default_rng(0).normal(size=(n, 4)) if kind == "normal" else np.ones((n, 4))


@settings(max_examples=60)
@given(ids, st.sampled_from(sorted(SCHEMES)), st.sampled_from(["normal", "equal"]), st.integers(0, 3))
def test_always_a_prefix_free_bijection(item_ids: list[str], scheme: str, kind: str, seed: int) -> None:
    vectors = vectors_of(len(item_ids), kind)
    titles = [item_id.split("a") if kind == "normal" else [] for item_id in item_ids]
    titles = [[token for token in title if token] for title in titles]
    made = Identifiers.build(scheme, item_ids, vectors, titles=titles, levels=3, codes=4, seed=seed)
    assert made.item_ids == item_ids
    assert len(set(made.tokens)) == len(item_ids)
    for a in made.tokens:
        assert not any(a != b and b[: len(a)] == a for b in made.tokens)
    used = {token for tokens in made.tokens for token in tokens}
    assert set(made.vocabulary) == used - {token for title in titles for token in title}
    assert len(set(made.vocabulary)) == len(made.vocabulary)
    again = Identifiers.build(scheme, item_ids, vectors, titles=titles, levels=3, codes=4, seed=seed)
    assert (again, again.hash) == (made, made.hash)


def test_spelling_and_vocabulary() -> None:
    atomic = Identifiers.build("atomic", list("abcdefghijkl"))
    assert atomic.tokens[10] == ("<|item_10|>",)
    assert atomic.vocabulary == [f"<|item_{n}|>" for n in range(12)]
    full = Identifiers.build("random", [str(n) for n in range(144)], levels=2, codes=12, seed=1)
    assert full.vocabulary == [f"<|{level}_{code}|>" for level in "ab" for code in range(12)]
    assert sorted(full.tokens) == sorted((f"<|a_{a}|>", f"<|b_{b}|>") for a in range(12) for b in range(12))
    few = Identifiers.build("random", ["x"], levels=3, codes=256)
    assert len(few.vocabulary) == 3


def test_random_depends_on_the_seed_and_semantic_on_the_vectors() -> None:
    names = [str(n) for n in range(20)]
    assert Identifiers.build("random", names, seed=1).hash != Identifiers.build("random", names, seed=2).hash
    near = np.repeat(np.eye(2), 10, axis=0) + 0.01 * vectors_of(20)[:, :2]
    made = Identifiers.build("semantic", names, near, levels=2, codes=10)
    assert not {t[0] for t in made.tokens[:10]} & {t[0] for t in made.tokens[10:]}


def test_identifiers_of_training_vectors_do_not_see_test_interactions() -> None:
    from genrec import features

    items = pl.DataFrame({"item_id": [str(n) for n in range(8)], "title": ["tea"] * 8})
    rng = np.random.default_rng(0)
    log = [rng.permutation(8)[:5] for _ in range(12)]
    other = [np.concatenate([h[:-1], [(h[-1] + 1) % 8]]) for h in log]

    def build(histories: list[np.ndarray]) -> str:
        vectors = features.item_vectors(items, histories, dimensions=4).vectors
        return Identifiers.build("semantic", items["item_id"].to_list(), vectors, levels=2, codes=4).hash

    assert build([h[:-1] for h in log]) == build([h[:-1] for h in other])
    assert build(log) != build(other)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([("x",), ("y",), ("x",)], "identifier x of item 'a' is also that of item 'c'"),
        ([("x", "y"), ("z",), ("x",)], r"identifier x of item 'c' begins that \(xy\) of item 'a'"),
        ([("x",), (), ("y",)], "item 'b' .*one or more"),
        ([("x",), ("",), ("y",)], "item 'b' .*non-empty"),
        ([("x",), ("y",)], "3 items but 2 identifiers"),
    ],
)
def test_what_is_no_bijection_is_refused(tokens: list[tuple[str, ...]], message: str) -> None:
    with pytest.raises(IdentifierError, match=message):
        Identifiers("custom", ["a", "b", "c"], tokens)


def test_variable_length_is_accepted_when_prefix_free() -> None:
    made = Identifiers("custom", ["a", "b", "c"], [("x", "y"), ("x", "z", "z"), ("w",)])
    assert made.vocabulary == ["w", "x", "y", "z"]


def test_repeated_item_ids_are_refused() -> None:
    with pytest.raises(IdentifierError, match="'a' stands at rows 0 and 2"):
        Identifiers.build("atomic", ["a", "b", "a"])


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown identifier scheme 'semantik'\. Did you mean 'semantic'"):
        Identifiers.build("semantik", ["a"])
    with pytest.raises(ConfigError, match="made from vectors"):
        Identifiers.build("semantic", ["a"])
    with pytest.raises(IdentifierError, match=r"shape \[1, d\], found \[2, 4\]"):
        Identifiers.build("semantic", ["a"], vectors_of(2))
    for scheme in ("semantic", "random"):
        with pytest.raises(ConfigError, match=r"5 items do not fit .*codes = 3 would fit"):
            Identifiers.build(scheme, list("abcde"), vectors_of(5), levels=2, codes=2)


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_save_and_load(tmp_path: Path, scheme: str) -> None:
    titles = [["tea"], [], ["tea"], ["红", "楼"]]
    made = Identifiers.build(scheme, ["a", "日本", "-", "0012"], vectors_of(4), titles=titles, levels=2, codes=3)
    made.save(tmp_path / "identifiers.parquet")
    assert pl.read_parquet(tmp_path / "identifiers.parquet").columns == ["item_id", "tokens"]
    loaded = Identifiers.load(tmp_path / "identifiers.parquet")
    assert loaded == made
    assert (loaded.scheme, loaded.hash, loaded.vocabulary) == (scheme, made.hash, made.vocabulary)


def test_an_empty_catalogue_is_saved_too(tmp_path: Path) -> None:
    Identifiers.build("atomic", []).save(tmp_path / "i.parquet")
    assert Identifiers.load(tmp_path / "i.parquet").tokens == []


def test_load_refuses_what_is_not_identifiers(tmp_path: Path) -> None:
    path = tmp_path / "identifiers.parquet"
    with pytest.raises(IdentifierError, match=r"no identifiers at .*genrec ids build"):
        Identifiers.load(path)
    path.write_text("item_id,tokens\n")
    with pytest.raises(IdentifierError, match="cannot be read as Parquet"):
        Identifiers.load(path)
    pl.DataFrame({"item_id": ["a"], "tokens": ["x"]}).write_parquet(path, metadata={"scheme": "atomic"})
    with pytest.raises(IdentifierError, match="not a file of identifiers"):
        Identifiers.load(path)
    table = pl.DataFrame({"item_id": ["a", "b"], "tokens": [["x"], ["x"]]})
    table.write_parquet(path)
    with pytest.raises(IdentifierError, match="scheme None"):
        Identifiers.load(path)
    table.write_parquet(path, metadata={"scheme": "atomic"})
    with pytest.raises(IdentifierError, match="'a' is also that of item 'b'"):
        Identifiers.load(path)
    pl.DataFrame({"item_id": ["a"], "tokens": [["x", None]]}).write_parquet(path, metadata={"scheme": "atomic"})
    with pytest.raises(IdentifierError, match="missing item id or token"):
        Identifiers.load(path)


def test_hash_sees_ids_tokens_and_their_borders() -> None:
    hashes = {
        Identifiers("s", ["a", "b"], [("x", "y"), ("z",)]).hash,
        Identifiers("s", ["a", "b"], [("x",), ("y", "z")]).hash,
        Identifiers("s", ["b", "a"], [("x", "y"), ("z",)]).hash,
        Identifiers("t", ["a", "b"], [("x", "y"), ("z",)]).hash,
    }
    assert len(hashes) == 4


def test_token_vectors_are_means() -> None:
    made = Identifiers("custom", ["a", "b", "c"], [("x", "y"), ("x", "z"), ("y", "z", "z")])
    vectors = np.array([[1.0, 0.0], [3.0, 2.0], [5.0, 8.0]])
    means = dict(zip(made.vocabulary, made.token_vectors(vectors).tolist(), strict=True))
    assert means == {"x": [2.0, 1.0], "y": [3.0, 4.0], "z": [4.0, 5.0]}
    atomic = Identifiers.build("atomic", ["a", "b", "c"])
    rows = atomic.token_vectors(vectors)
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, vectors.astype(np.float32))
    with pytest.raises(IdentifierError, match=r"3 items need vectors"):
        made.token_vectors(vectors[:2])
    assert Identifiers.build("atomic", []).token_vectors(np.zeros((0, 4))).shape == (0, 4)


# ---- Titles ----------------------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(titles_of, st.integers(0, 20))
def test_titles_make_a_prefix_free_bijection_that_grows_at_its_end(titles: list[list[str]], more: int) -> None:
    item_ids = [str(number) for number in range(len(titles))]
    made = Identifiers.build("title", item_ids, titles=titles)
    assert len(set(made.tokens)) == len(titles)
    for title, tokens in zip(titles, made.tokens, strict=True):
        kept = title[:LONGEST_TITLE]
        assert list(tokens[: len(kept)]) == kept
        assert tokens[-1] == "<|title_end|>"
        assert tokens.count("<|title_end|>") == 1  # So none is the beginning of another.
        assert set(tokens[len(kept) : -1]) <= set(made.vocabulary)
        assert not set(kept) & set(made.vocabulary)
    added = ([*titles, []] * more)[:more]
    grown = Identifiers.build("title", [*item_ids, *(f"new {n}" for n in range(more))], titles=[*titles, *added])
    assert grown.tokens[: len(titles)] == made.tokens
    assert made.vocabulary == [token for token in grown.vocabulary if token in set(made.vocabulary)]


def test_equal_empty_and_long_titles_are_numbered_in_catalogue_order() -> None:
    long = [str(n) for n in range(LONGEST_TITLE)]
    titles = [["a"], ["a", "b"], [], ["a"], [], long, [*long, "x"], [*long, "y"], long[:-1]]
    made = Identifiers.build("title", [str(n) for n in range(9)], titles=titles)
    end = "<|title_end|>"
    assert made.tokens[:5] == [
        ("a", end), ("a", "b", end), (end,), ("a", "<|title_1|>", end), ("<|title_1|>", end)
    ]  # fmt: skip
    assert made.tokens[5:] == [
        (*long, end), (*long, "<|title_1|>", end), (*long, "<|title_2|>", end), (*long[:-1], end)
    ]  # fmt: skip
    assert made.vocabulary == [end, "<|title_1|>", "<|title_2|>"]
    assert Identifiers.build("title", ["x"], titles=[["a"]]).vocabulary == [end]


def test_any_number_of_equal_titles_takes_257_new_tokens() -> None:
    n = 66_000
    made = Identifiers.build("title", [str(number) for number in range(n)], titles=[["mug"]] * n)
    assert made.tokens[255] == ("mug", "<|title_255|>", "<|title_end|>")
    assert made.tokens[256] == ("mug", "<|title_1|>", "<|title_0|>", "<|title_end|>")
    assert made.tokens[65_536] == ("mug", "<|title_1|>", "<|title_0|>", "<|title_0|>", "<|title_end|>")
    assert made.vocabulary == ["<|title_end|>", *(f"<|title_{number}|>" for number in range(256))]


def test_what_makes_no_titles_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"spelled in the tokens of a base.*or pass base="):
        Identifiers.build("title", ["a"])
    with pytest.raises(ConfigError, match="2 items need as many titles in tokens of the base, found 1"):
        Identifiers.build("title", ["a", "b"], titles=[["x"]])
    with pytest.raises(IdentifierError, match=r"makes '<\|title_7\|>' of plain text"):
        Identifiers.build("title", ["a"], titles=[["x", "<|title_7|>"]])


def test_only_the_new_tokens_of_titles_get_vectors() -> None:
    made = Identifiers.build("title", ["a", "b", "c"], titles=[["x"], ["x"], ["y", "y"]])
    vectors = np.array([[1.0, 0.0], [3.0, 2.0], [5.0, 4.0]])
    assert made.vocabulary == ["<|title_end|>", "<|title_1|>"]
    assert made.token_vectors(vectors).tolist() == [[3.0, 2.0], [3.0, 2.0]]


@settings(max_examples=60)
@given(
    st.sampled_from(sorted(SCHEMES)),
    st.integers(1, 20),
    st.lists(st.integers(1, 8), min_size=1, max_size=3),
    st.integers(1, 4),
    st.integers(0, 3),
)
def test_extended_identifiers_keep_the_old_ones_and_tell_all_items_apart(
    scheme: str, n: int, parts: list[int], words: int, seed: int
) -> None:
    total = n + sum(parts)
    names = [f"i{number}" for number in range(total)]
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(total, 3)).round(1)
    titles = [[f"w{word}" for word in rng.integers(words, size=rng.integers(0, 3))] for _ in range(total)]
    made = Identifiers.build(scheme, names[:n], vectors[:n], titles=titles[:n], levels=3, codes=4, seed=seed)
    for part in parts:
        have, before = len(made.item_ids), made
        stop = have + part
        options: dict[str, Any] = {"vectors": vectors[:stop], "titles": titles[have:stop], "codes": 4, "seed": seed}
        made = before.extend(names[have:stop], **options)  # That they are prefix-free is checked as they are made.
        assert made.item_ids == names[:stop]
        assert made.tokens[:have] == before.tokens
        assert len(set(made.tokens)) == stop
        assert set(before.vocabulary) <= set(made.vocabulary)
        assert made == before.extend(names[have:stop], **options)
    if scheme in ("semantic", "random"):
        assert {len(tokens) for tokens in made.tokens} == {3}
    if scheme == "title":
        assert all(tuple(title) == tokens[: len(title)] for title, tokens in zip(titles, made.tokens, strict=True))


def test_extend_refuses_what_it_cannot_do() -> None:
    made = Identifiers.build("random", list("abcd"), levels=2, codes=3)
    with pytest.raises(ConfigError, match=r"10 items do not fit into 3 \*\* 2"):
        made.extend(list("efghij"), codes=3)
    assert len(set(made.extend(list("efghij"), codes=4).tokens)) == 10  # A larger codebook makes room.
    with pytest.raises(IdentifierError, match="'a' stands at rows 0 and 4"):
        made.extend(["a"], codes=3)
    with pytest.raises(ConfigError, match="made from vectors"):
        Identifiers.build("semantic", ["a"], np.ones((1, 2)), levels=1).extend(["b"])
    with pytest.raises(IdentifierError, match="not codes as"):
        Identifiers("semantic", ["a"], [("x",)]).extend(["b"], vectors=np.ones((2, 1)))
    with pytest.raises(ConfigError, match="spelled in the tokens of a base"):
        Identifiers.build("title", ["a"], titles=[["x"]]).extend(["b"])
    own = Identifiers("own", ["a"], [("x",)])
    assert own.extend([]) == own
    with pytest.raises(ConfigError, match="unknown identifier scheme 'own'"):
        own.extend(["b"])


def test_what_codes_were_fitted_on_is_kept_where_vectors_are_read(tmp_path: Path) -> None:
    vectors, path = vectors_of(4), tmp_path / "i.parquet"
    for scheme in SCHEMES:
        made = Identifiers.build(scheme, list("abcd"), vectors, titles=[["x"]] * 4, levels=2, codes=3, fitted_on="abc")
        assert made.fitted_on == ("abc" if scheme == "semantic" else "")
        made.save(path)
        assert Identifiers.load(path).fitted_on == made.fitted_on
    pl.DataFrame({"item_id": ["a"], "tokens": [["<x>"]]}).write_parquet(path, metadata={"scheme": "own"})
    assert Identifiers.load(path) == Identifiers("own", ["a"], [("<x>",)])


def test_summary_and_indices() -> None:
    made = Identifiers("random", ["tea", "pot", "cup"], [("<a>", "<x>"), ("<a>", "<y>"), ("<b>",)], "abc")
    assert made.summary(["cup", "tea"]) == {
        "scheme": "random", "items": 3, "tokens_in_vocabulary": 4, "items_by_length": {1: 1, 2: 2}, "first_tokens": 2,
        "most_items_on_a_first_token": 2, "fitted_on": "abc", "hash": made.hash, "cup": "<b>", "tea": "<a><x>",
    }  # fmt: skip
    found = made.indices(["cup", "tea"], "here")
    assert (found.tolist(), found.dtype) == ([2, 0], np.int32)
    assert made.indices([], "here").tolist() == []
    with pytest.raises(UnknownIdError, match=r"^item 'teas' is not in the catalogue of here\. Did you mean 'tea'\?$"):
        made.indices(["pot", "teas"], "here")
    with pytest.raises(UnknownIdError, match=r"'zzz' is not in the catalogue of these identifiers\. It has 3 items"):
        made.summary(["zzz"])
    with pytest.raises(TypeError):
        made.indices([["tea"]], "here")  # type: ignore[list-item]
    assert Identifiers.build("atomic", []).summary()["most_items_on_a_first_token"] == 0
