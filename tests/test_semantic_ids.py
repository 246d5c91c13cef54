from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec import semantic_ids
from genrec.errors import ConfigError, DataError


def assert_distinct(codes: np.ndarray, n: int, levels: int, size: int) -> None:
    assert codes.shape == (n, levels)
    assert codes.dtype == np.int32
    assert len(np.unique(codes, axis=0)) == n
    assert n == 0 or (codes.min() >= 0 and codes.max() < size)


@settings(max_examples=100)
@given(st.data(), st.integers(1, 4), st.integers(1, 5), st.integers(0, 3))
def test_always_a_bijection(data: st.DataObject, levels: int, size: int, seed: int) -> None:
    n = data.draw(st.integers(0, min(60, size**levels)))
    kind = data.draw(st.sampled_from(["equal", "few", "normal", "any"]))
    rng = np.random.default_rng(seed)
    if kind == "equal":
        vectors = np.full((n, 3), 7.5)
    elif kind == "few":
        vectors = rng.integers(0, 2, size=(n, 3)).astype(float)
    elif kind == "normal":
        vectors = rng.normal(size=(n, 3))
    else:
        value = st.floats(allow_nan=False, allow_infinity=False)
        vectors = np.array([[data.draw(value) for _ in range(2)] for _ in range(n)]).reshape(n, 2)
    codes = semantic_ids.codes(vectors, levels=levels, codes=size, seed=seed)
    assert_distinct(codes, n, levels, size)
    np.testing.assert_array_equal(codes, semantic_ids.codes(vectors, levels=levels, codes=size, seed=seed))


@pytest.mark.parametrize("equal", [True, False])
def test_every_tuple_can_be_used(equal: bool) -> None:
    vectors = np.ones((512, 4)) if equal else np.random.default_rng(0).normal(size=(512, 4))
    assert_distinct(semantic_ids.codes(vectors, levels=3, codes=8), 512, 3, 8)
    assert_distinct(semantic_ids.codes(vectors, levels=1, codes=512), 512, 1, 512)


def test_all_equal_at_the_usual_size() -> None:
    assert_distinct(semantic_ids.codes(np.zeros((700, 2), np.float32)), 700, 3, 256)


def test_vectors_without_dimensions_or_items() -> None:
    assert_distinct(semantic_ids.codes(np.zeros((9, 0)), levels=2, codes=3), 9, 2, 3)
    assert_distinct(semantic_ids.codes(np.zeros((0, 4))), 0, 3, 256)


def test_similar_items_share_prefixes() -> None:
    rng = np.random.default_rng(1)
    cluster = np.repeat(np.arange(8), 20)
    vectors = 10 * np.eye(8)[cluster] + 0.1 * rng.normal(size=(160, 8))
    codes = semantic_ids.codes(vectors, levels=3, codes=16, seed=0)
    first = codes[:, 0]
    same = cluster[:, None] == cluster
    shared = first[:, None] == first
    off = ~np.eye(160, dtype=bool)
    assert not shared[~same].any()
    # 16 codes for 8 clusters: some are split in two, so two items of one cluster share a code half of the time or more.
    assert shared[same & off].mean() > 0.4
    assert_distinct(codes, 160, 3, 16)


def test_crowded_codes_keep_the_nearest() -> None:
    # Six items lie together and a first code takes four: the two farthest from the middle go to the next with room.
    vectors = np.array([0.5, 0.0, 0.0, -0.6, 0.0, 0.0, 100.0, 200.0, 300.0])[:, None]
    codes = semantic_ids.codes(vectors, levels=2, codes=4, seed=0)
    assert_distinct(codes, 9, 2, 4)
    first = codes[:, 0]
    assert len({int(c) for c in first[[1, 2, 4, 5]]}) == 1
    assert first[0] == first[3] == first[6]
    assert len({int(c) for c in first[[1, 6, 7, 8]]}) == 4


def test_more_items_than_k_means_is_fitted_on() -> None:
    vectors = np.random.default_rng(0).normal(size=(600, 2))
    assert_distinct(semantic_ids.codes(vectors, levels=10, codes=2), 600, 10, 2)


def test_the_last_level_is_assigned_at_the_smallest_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(semantic_ids, "_kmeans", lambda points, codes, rng: np.array([[0.0], [1.0]], np.float32))
    # Both are nearest to 0. Were the nearer one to stay there, the sum would be .01 + 4; the other way it is .81 + 1.
    codes = semantic_ids.codes(np.array([[0.1], [-1.0]]), levels=1, codes=2)
    assert codes.tolist() == [[1], [0]]


def test_bad_input_is_refused() -> None:
    vectors = np.zeros((28, 2))
    with pytest.raises(ConfigError, match=r"28 items do not fit into 3 \*\* 3 = 27 .*codes = 4 would fit"):
        semantic_ids.codes(vectors, levels=3, codes=3)
    for levels, size in ((0, 256), (3, 0), (27, 2), (20, 256)):
        with pytest.raises(ConfigError, match="out of range"):
            semantic_ids.codes(vectors, levels=levels, codes=size)
    for bad in (np.nan, np.inf, -np.inf):
        vectors = np.zeros((5, 2))
        vectors[3, 1] = bad
        with pytest.raises(DataError, match=r"item 3 hold .* dimension 1"):
            semantic_ids.codes(vectors)
    with pytest.raises(DataError, match="matrix"):
        semantic_ids.codes(np.zeros(5))


@given(st.integers(2, 10**6), st.integers(1, 5))
def test_the_value_that_would_fit_is_the_smallest(n: int, levels: int) -> None:
    with pytest.raises(ConfigError, match="would fit") as caught:
        semantic_ids.check_room(n, levels, 1)
    fits = int(str(caught.value).rsplit("codes = ", 1)[1].split(" ")[0])
    assert fits**levels >= n > (fits - 1) ** levels
    semantic_ids.check_room(n, levels, fits)


def test_a_new_item_takes_the_codes_of_its_like_or_the_nearest_free_ones() -> None:
    old = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    vectors = np.array([[0.0, 0.0], [0.0, 1.0], [9.0, 0.0], [9.0, 1.0]])
    new = np.array([[8.9, 0.1], [8.9, 0.9], [9.0, 0.0]])
    # The codes of its like are taken, so the first takes the code that no old item has, and then the next level above.
    assert semantic_ids.extend(old, vectors, new, codes=3).tolist() == [[1, 2], [0, 2], [2, 0]]
    assert semantic_ids.extend(old[:3], vectors[:3], new[1:2], codes=2).tolist() == [[1, 1]]


def test_the_codes_of_each_level_are_of_what_the_levels_before_leave_over() -> None:
    # Both halves of the catalogue have the same residuals, ten apart: a level that did not subtract would mix them.
    old = np.array([[a, b, c] for a in (0, 1) for b in (0, 1) for c in (0, 1)])
    vectors = 10.0 * old[:, :1] + 2.0 * old[:, 1:2] + 0.5 * old[:, 2:]
    for own, near in zip(old.tolist(), vectors, strict=True):
        new = semantic_ids.extend(old, vectors, near[None] + 0.01, codes=3)[0].tolist()
        assert (new[:2], new[2]) == (own[:2], 2)  # The last code is the free one.
    # A codebook that is given too small is at least what the old items have.
    assert semantic_ids.extend(old[:-1], vectors[:-1], vectors[-1:], codes=1).tolist() == [[1, 1, 1]]
