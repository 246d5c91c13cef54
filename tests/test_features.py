from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from genrec import features
from genrec.errors import ConfigError, DataError

CHINESE = [
    "绿茶洁面乳 控油清洁",
    "红色口红 哑光持久",
    "绿茶洁面泡沫 温和清洁",
    "哑光口红 豆沙色",
    "婴儿纸尿裤 超薄透气",
    "超薄纸尿裤 婴儿专用",
]


def catalogue(titles: list[str], **columns: object) -> pl.DataFrame:
    return pl.DataFrame({"item_id": [f"i{n}" for n in range(len(titles))], "title": titles, **columns})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Café de PARIS, 50ml!", ["café", "de", "paris", "50ml"]),
        ("绿茶 tea", ["绿", "茶", "绿茶", "tea"]),
        ("iPhone手机壳", ["iphone", "手", "机", "壳", "手机", "机壳"]),
        ("カメラ", ["カ", "メ", "ラ", "カメ", "メラ"]),
        ("화장품", ["화", "장", "품", "화장", "장품"]),
        ("ชา", ["ช", "า", "ชา"]),
        ("हिन्दी किताब", ["हिन्दी", "किताब"]),
        ("كتاب جديد", ["كتاب", "جديد"]),
        ("\uff26\uff35\uff2c\uff2c \uff11\uff12", ["full", "12"]),
        ("a_b - !? ...", ["a", "b"]),
        ("Straße ПРИВЕТ", ["straße", "привет"]),
        ("", []),
    ],
)
def test_words_in_any_language(text: str, expected: list[str]) -> None:
    assert features.words(text) == expected


@given(st.text())
def test_words_take_any_text(text: str) -> None:
    assert all(features.words(text))


def test_similar_chinese_titles_are_neighbours() -> None:
    nearest = features.neighbours(features.text(catalogue(CHINESE)), k=3)
    assert nearest[:, 0].tolist() == [2, 3, 0, 1, 5, 4]


def test_text_equals_the_formula() -> None:
    items = catalogue(
        ["red red tea", "green tea", ""],
        brand=["acme", None, None],
        categories=[["food", "drink"], None, []],
        price=[1.0, 2.0, 3.0],
    )
    documents = [["red", "red", "tea", "acme", "food", "drink"], ["green", "tea"], []]
    terms = sorted({term for document in documents for term in document})
    expected = np.zeros((3, len(terms)))
    for row, document in enumerate(documents):
        for term, count in Counter(document).items():
            frequency = sum(term in other for other in documents)
            expected[row, terms.index(term)] = (1 + math.log(count)) * (math.log(4 / (1 + frequency)) + 1)
        if document:
            expected[row] /= np.linalg.norm(expected[row])
    tfidf = features.text(items)
    assert tfidf.dtype == np.float32
    assert sparse.issparse(tfidf)
    np.testing.assert_allclose(tfidf.toarray(), expected, atol=1e-6)


def test_every_text_column_is_read() -> None:
    items = pl.DataFrame(
        {name: ["word", "word"] if name != "categories" else [["word"], ["word"]] for name in features.TEXT_COLUMNS}
    )
    for name in features.TEXT_COLUMNS:
        assert features.text(items.select(name)).nnz == 2
    assert features.text(pl.DataFrame({"item_id": ["a"], "colour": ["red"]})).shape == (1, 0)


@pytest.mark.parametrize("titles", [["", "", ""], ["!", "?", "-"], []])
def test_no_words_at_all(titles: list[str]) -> None:
    items = catalogue(titles)
    n = len(titles)
    made = features.item_vectors(items, [], dimensions=4)
    assert made.tfidf.shape == (n, 0)
    assert made.vectors.shape == (n, 8)
    assert not made.vectors.any()
    assert (features.neighbours(made.tfidf, 2) == -1).all()


def test_all_titles_equal() -> None:
    made = features.item_vectors(catalogue(["same words"] * 5), [np.array([0, 1])], dimensions=3)
    assert made.vectors.shape == (5, 6)
    assert np.isfinite(made.vectors).all()
    np.testing.assert_allclose(np.linalg.norm(made.vectors[:, :3], axis=1), 1, atol=1e-5)
    assert features.neighbours(made.tfidf, 2).tolist() == [[1, 2], [0, 2], [0, 1], [0, 1], [0, 1]]


def test_text_vectors_keep_the_products_and_are_padded() -> None:
    tfidf = features.text(catalogue(CHINESE))
    vectors = features.text_vectors(tfidf, 40, seed=1)
    assert vectors.shape == (6, 40)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors @ vectors.T, (tfidf @ tfidf.T).toarray(), atol=1e-4)
    assert not vectors[:, 6:].any()
    np.testing.assert_array_equal(vectors, features.text_vectors(tfidf, 40, seed=1))


def test_collaborative_keeps_the_products() -> None:
    train = [np.array([0, 1, 1]), np.array([1, 2]), np.array([], dtype=int), np.array([0, 1, 2])]
    vectors = features.collaborative(train, 5, 8, seed=0)
    users = np.array([[1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [1, 1, 1, 0, 0]], dtype=float)
    scaled = users / np.sqrt(users.sum(1, keepdims=True)) / np.sqrt(np.maximum(users.sum(0), 1))
    np.testing.assert_allclose(vectors @ vectors.T, scaled.T @ scaled, atol=1e-5)
    assert not vectors[3:].any()
    assert vectors.dtype == np.float32


def test_collaborative_of_nothing_is_zero() -> None:
    assert not features.collaborative([], 4, 3).any()
    assert not features.collaborative([np.array([], dtype=np.int32)], 4, 3).any()


def test_parts_have_unit_length_or_are_zero() -> None:
    made = features.item_vectors(catalogue([*CHINESE, ""]), [np.array([0, 1, 6])], dimensions=4)
    text, behaviour = np.linalg.norm(made.vectors[:, :4], axis=1), np.linalg.norm(made.vectors[:, 4:], axis=1)
    np.testing.assert_allclose(text[:6], 1, atol=1e-5)
    assert text[6] == 0
    np.testing.assert_allclose(behaviour, [1, 1, 0, 0, 0, 0, 1], atol=1e-5)


def test_features_see_what_they_are_given_and_nothing_else() -> None:
    items = catalogue(CHINESE)
    log = [np.array([0, 1, 2, 3]), np.array([3, 4, 5, 0]), np.array([2, 4, 1, 5])]
    other = [np.concatenate([h[:-1], [(h[-1] + 1) % 6]]) for h in log]
    fitted = [features.item_vectors(items, [h[:-2] for h in histories]).vectors for histories in (log, other)]
    np.testing.assert_array_equal(*fitted)
    leaked = features.item_vectors(items, log).vectors
    assert not np.allclose(leaked, fitted[0])


def test_bad_input_is_refused() -> None:
    with pytest.raises(DataError, match=r"user 1 holds item 9, but the catalogue has 3 items"):
        features.collaborative([np.array([0]), np.array([1, 9])], 3, 2)
    with pytest.raises(ConfigError, match="dimensions"):
        features.text_vectors(features.text(catalogue(CHINESE)), 0)
    with pytest.raises(ConfigError, match="k must be"):
        features.neighbours(features.text(catalogue(CHINESE)), 0)
    with pytest.raises(ConfigError, match="length"):
        features.walks(np.zeros((2, 1), int), 1, 0, np.random.default_rng(0))
    with pytest.raises(DataError, match="empty"):
        features.walks(np.zeros((0, 1), int), 1, 3, np.random.default_rng(0))


@settings(max_examples=30)
@given(st.lists(st.text("abc ", max_size=8), min_size=1, max_size=12), st.integers(1, 14))
def test_neighbours_equal_brute_force(titles: list[str], k: int) -> None:
    tfidf = features.text(catalogue(titles))
    nearest = features.neighbours(tfidf, k)
    assert nearest.shape == (len(titles), k)
    assert nearest.dtype == np.int32
    similar = (tfidf @ tfidf.T).toarray()
    for item, row in enumerate(nearest):
        others = [j for j in range(len(titles)) if j != item and similar[item, j] > 0]
        found = row[row >= 0].tolist()
        assert len(found) == min(k, len(others))
        assert row[len(found) :].tolist() == [-1] * (k - len(found))
        best = sorted((similar[item, j] for j in others), reverse=True)[: len(found)]
        np.testing.assert_allclose(similar[item, found], best, atol=1e-6)


@settings(max_examples=50)
@given(st.integers(1, 12), st.integers(0, 5), st.integers(1, 6), st.integers(0, 99))
def test_walks_follow_neighbours(n_items: int, k: int, length: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    near = rng.integers(-1, n_items, size=(n_items, k))
    drawn = features.walks(near, 20, length, np.random.default_rng(seed))
    assert len(drawn) == 20
    for walk in drawn:
        assert walk.dtype == np.int32
        assert 1 <= len(walk) <= length
        assert len(set(walk.tolist())) == len(walk)
        assert all(b in near[a] for a, b in pairwise(walk))
        if len(walk) < length:  # It was stuck.
            assert set(near[walk[-1]].tolist()) <= {-1, *walk.tolist()}
    again = features.walks(near, 20, length, np.random.default_rng(seed))
    assert all(np.array_equal(a, b) for a, b in zip(drawn, again, strict=True))


def test_walks_draw_ranks_exponentially() -> None:
    near = np.array([[1, 2, 3, 4]] + [[-1] * 4] * 4)
    second = Counter(int(w[1]) for w in features.walks(near, 100_000, 2, np.random.default_rng(0)) if len(w) == 2)
    share = np.array([second[item] for item in range(1, 5)]) / sum(second.values())
    expected = np.exp(-np.arange(4) / 2)
    np.testing.assert_allclose(share, expected / expected.sum(), atol=0.02)


@settings(max_examples=50)
@given(st.integers(1, 12), st.integers(0, 5), st.floats(0, 1), st.integers(0, 99))
def test_variants_replace_items_by_their_neighbours_alone(n_items: int, k: int, replaced: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    near = rng.integers(-1, n_items, size=(n_items, k))
    histories = [rng.integers(0, n_items, size=size).astype(np.int32) for size in (3, 0, 1, 7)]
    before = [history.copy() for history in histories]
    told = features.variants(near, histories, replaced, np.random.default_rng(seed))
    assert [len(variant) for variant in told] == [3, 0, 1, 7]
    for history, variant, kept in zip(histories, told, before, strict=True):
        assert variant.dtype == np.int32
        assert np.array_equal(history, kept)
        assert all(new == old or new in near[old] for old, new in zip(history, variant, strict=True))
        if replaced == 0:
            assert np.array_equal(history, variant)
    again = features.variants(near, histories, replaced, np.random.default_rng(seed))
    assert all(np.array_equal(a, b) for a, b in zip(told, again, strict=True))


def test_variants_replace_as_many_as_they_should() -> None:
    near = np.array([[1, 2], [0, 2], [-1, -1]])
    told = features.variants(near, [np.zeros(50_000, dtype=np.int32)], 0.3, np.random.default_rng(0))[0]
    assert abs((told != 0).mean() - 0.3) < 0.01
    assert abs((told == 1).sum() / (told != 0).sum() - 1 / (1 + np.exp(-0.5))) < 0.02
    assert (features.variants(near, [np.full(9, 2)], 1.0, np.random.default_rng(0))[0] == 2).all()
    assert features.variants(near, [], 0.5, np.random.default_rng(0)) == []
    with pytest.raises(ConfigError, match=r"found 1\.5 and 2"):
        features.variants(near, [], 1.5, np.random.default_rng(0))


@settings(max_examples=50)
@given(st.integers(1, 12), st.integers(0, 5), st.integers(0, 99))
def test_a_newcomer_comes_after_a_near_item_that_some_history_holds(n_items: int, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    near = rng.integers(-1, n_items, size=(n_items, k))
    histories = [rng.integers(0, n_items, size=size).astype(np.int32) for size in (2, 0, 1, 3)]
    held = {int(item) for history in histories for item in history}
    unseen = np.setdiff1d(np.arange(n_items), list(held)).repeat(3)
    placed = features.newcomers(near, unseen, histories, np.random.default_rng(seed))
    able = [item for item in unseen.tolist() if held & set(near[item].tolist())]
    assert [item for item, _, _ in placed] == able
    assert all(histories[user][place] in near[item] for item, user, place in placed)
    assert placed == features.newcomers(near, unseen, histories, np.random.default_rng(seed))


def test_newcomers_draw_ranks_exponentially_and_events_evenly() -> None:
    near = np.array([[-1, -1, -1]] * 4 + [[2, 0, 1]])  # Nobody has item 2, so 0 is the nearest, and 1 the next.
    histories = [np.array([0, 1]), np.array([3, 0, 0])]
    placed = features.newcomers(near, np.full(40_000, 4), histories, np.random.default_rng(0))
    drawn = Counter((user, place) for _, user, place in placed)
    assert set(drawn) == {(0, 0), (0, 1), (1, 1), (1, 2)}
    assert abs(drawn[0, 1] / len(placed) - 1 / (1 + np.exp(0.5))) < 0.02
    assert max(drawn[event] for event in [(0, 0), (1, 1), (1, 2)]) - drawn[0, 0] < 1000
    with pytest.raises(ConfigError, match="mean_rank > 0, found 0"):
        features.newcomers(near, np.array([4]), histories, np.random.default_rng(0), mean_rank=0)


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(
    st.lists(
        st.lists(st.one_of(st.sampled_from([0.0, -0.0, 1.0, -math.inf]), finite), min_size=6, max_size=6),
        min_size=1,
        max_size=5,
    ),
    st.integers(1, 8),
)
def test_top_k_equals_a_stable_sort(scores: list[list[float]], k: int) -> None:
    for row, found in zip(scores, features.top_k(np.array(scores, np.float32), k), strict=True):
        expected = [c for c in sorted(range(6), key=lambda c: (-row[c], c)) if row[c] > -math.inf][:k]
        assert found.tolist() == expected + [-1] * (k - len(expected))
