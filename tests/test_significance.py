from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genrec.errors import ConfigError, DataError
from genrec.significance import bootstrap, holm, interval, paired


def test_bootstrap_is_near_the_normal_interval() -> None:
    values = np.random.default_rng(0).random(2000) < 0.2
    low, high = bootstrap(values)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=half / 10)
    assert high == pytest.approx(values.mean() + half, abs=half / 10)
    narrow = bootstrap(values, confidence=0.5)
    assert low < narrow[0] < narrow[1] < high


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.integers(0, 5))
def test_bootstrap_is_deterministic_and_bounded(values: list[float], seed: int) -> None:
    low, high = bootstrap(values, samples=50, seed=seed)
    assert (low, high) == bootstrap(values[::-1], samples=50, seed=seed)
    slack = 1e-9 * max(1.0, *map(abs, values))
    assert min(values) - slack <= low <= high <= max(values) + slack


def test_bootstrap_of_equal_values_is_a_point() -> None:
    assert bootstrap([0.25] * 7) == (0.25, 0.25)


def test_interval_is_the_mean_and_its_bootstrap() -> None:
    values = np.array([True, False, False, True, True])
    low, high = bootstrap(values)
    assert interval(values) == {"mean": 0.6, "low": low, "high": high}


def test_bad_values_are_refused() -> None:
    with pytest.raises(DataError, match="finite value per case"):
        bootstrap([])
    with pytest.raises(DataError, match="finite value per case"):
        bootstrap([1.0, math.nan])
    with pytest.raises(ConfigError, match="confidence"):
        bootstrap([1.0], confidence=1)
    with pytest.raises(ConfigError, match="samples"):
        bootstrap([1.0], samples=0)
    with pytest.raises(DataError, match=r"both values of every case, found \[2\] and \[1\]"):
        paired([1.0, 0.0], [1.0])
    with pytest.raises(DataError, match="finite value per case"):
        paired([math.inf], [0.0])
    with pytest.raises(ConfigError, match="flips must be at least 1, found 0"):
        paired([1.0], [0.0], flips=0)
    with pytest.raises(DataError, match="p-values between 0 and 1"):
        holm([0.5, 1.5])
    with pytest.raises(DataError, match="p-values between 0 and 1"):
        holm([math.nan])


# The paired test


def exact(differences: np.ndarray) -> float:
    """The two-sided p-value over all assignments of signs."""
    signs = np.array(list(itertools.product([-1, 1], repeat=len(differences))))
    return float((np.abs(signs @ differences) >= abs(differences.sum()) - 1e-9).mean())


@given(st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.0, 0.3, 0.5, 1.0]), min_size=1, max_size=10))
def test_p_is_near_that_of_all_signs(differences: list[float]) -> None:
    array = np.array(differences)
    p = exact(array)
    found = paired(array + 0.25, np.full(len(array), 0.25), flips=4000)["p"]
    # Five standard errors of a share of 4,000, and one more that is counted.
    assert found == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / 4000) + 1 / 4001)
    assert 1 / 4001 <= found <= 1


def test_p_of_one_sign_is_a_binomial_one() -> None:
    # Seven differences of one size and sign: only all equal signs are as far from 0.
    found = paired(np.full(7, 0.5), np.zeros(7), flips=100_000)["p"]
    assert found == pytest.approx(2 / 2**7, abs=0.002)


def test_p_is_near_the_normal_one_of_many_cases() -> None:
    rng = np.random.default_rng(3)
    a, b = (np.where(rng.random(3000) < share, 1 / np.log2(rng.integers(2, 12, 3000)), 0) for share in (0.10, 0.085))
    found = paired(a, b)
    z = abs((a - b).sum()) / math.sqrt(((a - b) ** 2).sum())
    assert found["p"] == pytest.approx(math.erfc(z / math.sqrt(2)), abs=0.02)
    assert found["difference"] == pytest.approx(a.mean() - b.mean())
    assert (found["low"], found["high"]) == bootstrap(a - b)


def test_the_sides_are_alike_and_the_order_of_cases_does_not_matter() -> None:
    rng = np.random.default_rng(4)
    a, b = rng.integers(0, 3, 60) / 3, rng.integers(0, 3, 60) / 3
    one, other = paired(a, b), paired(b, a)
    assert one["p"] == other["p"]
    assert one["difference"] == -other["difference"]
    turned = paired(a[::-1], b[::-1])
    assert turned["p"] == one["p"]


def test_equal_and_far_apart() -> None:
    assert paired([0.5, 0.25], [0.5, 0.25]) == {"difference": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}
    assert paired(np.ones(200), np.zeros(200))["p"] == 1 / 10_001  # The smallest that there is.


# Holm


def holm_by_definition(p: list[float], level: float) -> list[bool]:
    """Step by step: reject the smallest while p <= level / (tests left), and stop at the first that is not."""
    rejected = [False] * len(p)
    for left, place in enumerate(sorted(range(len(p)), key=lambda place: p[place])):
        if p[place] > level / (len(p) - left):
            break
        rejected[place] = True
    return rejected


@given(st.lists(st.integers(0, 100), min_size=1, max_size=9, unique=True), st.integers(1, 99))
def test_holm_rejects_what_the_steps_reject(hundredths: list[int], level: int) -> None:
    p = [value / 100 for value in hundredths]
    # Between two hundredths, so that no rounding decides.
    height = level / 100 + 0.00123
    assert (holm(p) <= height).tolist() == holm_by_definition(p, height)


def test_holm_closed_form() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == pytest.approx([1, 1])
    assert holm([]).tolist() == []
