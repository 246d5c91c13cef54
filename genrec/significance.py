"""How sure a difference is: bootstrap intervals, a paired randomisation test, and Holm's correction for many tests.

Everything is over cases: one value per case and recommender. Metrics take few distinct values (a rank decides them), so
resamples are drawn as counts of the distinct values, and 22,000 cases cost what their some hundred values do.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from genrec.errors import ConfigError, DataError


def bootstrap(
    values: ArrayLike, *, confidence: float = 0.95, samples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over cases (Efron, 1979, Annals of Statistics 7(1)).

    For the difference of two recommenders pass the differences per case: that is the paired interval.

    Args:
        values: float [n], one value per case, n >= 1.
        confidence: Share of the resampled means inside the interval, between 0 and 1.
        samples: Number of resamples, >= 1.
        seed: The same seed and the same values, in any order, give the same interval.

    Returns:
        (low, high).

    Raises:
        DataError: No values, or values that are not finite.
        ConfigError: ``confidence`` or ``samples`` out of range.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0 or not np.isfinite(array).all():
        raise DataError(
            f"an interval needs one finite value per case, found an array of shape {list(array.shape)}. "
            "Check that the split has cases to evaluate."
        )
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence must lie between 0 and 1, found {confidence}. The usual value is 0.95.")
    if samples < 1:
        raise ConfigError(f"samples must be at least 1, found {samples}. The usual value is 2000.")
    # A resample is a multinomial draw over the distinct values, and a metric has only a few of them.
    distinct, counts = np.unique(array, return_counts=True)
    rng = np.random.default_rng(seed)
    means = np.empty(samples)
    chunk = max(1, 4_000_000 // len(distinct))
    for start in range(0, samples, chunk):
        stop = min(start + chunk, samples)
        drawn = rng.multinomial(array.size, counts / array.size, size=stop - start)
        means[start:stop] = drawn @ distinct / array.size
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def interval(values: ArrayLike) -> dict[str, float]:
    """``mean``, and ``low`` and ``high`` of ``bootstrap``, of one value per case."""
    low, high = bootstrap(values)
    return {"mean": float(np.asarray(values).mean()), "low": low, "high": high}


def paired(a: ArrayLike, b: ArrayLike, *, flips: int = 10_000, seed: int = 0) -> dict[str, float]:
    r"""Whether ``a`` and ``b`` differ on the same cases: a randomisation test (Fisher, 1935; Smucker et al., 2007).

    If it did not matter which recommender a value came from, every difference :math:`d_i = a_i - b_i` could as well
    have the other sign. ``p`` is the share of random signs whose sum is at least as far from 0 as the one observed,
    with that one among them:

    .. math:: p = \frac{1 + \#\{|\sum_i s_i d_i| \ge |\sum_i d_i|\}}{1 + \mathrm{flips}}

    so the smallest p is ``1 / (1 + flips)``, 0.0001 as it stands; how many cases of one size change sign is binomial.

    Args:
        a, b: float [n], one value per case, in the same order.
        flips: Random assignments of signs, >= 1.
        seed: The same seed and differences, in any order, give the same numbers.

    Returns:
        ``difference`` (the mean of a - b), ``low`` and ``high`` of its 95% bootstrap interval, and ``p`` (two-sided).

    Raises:
        DataError: The shapes do not fit, there are no values, or some are not finite.
        ConfigError: ``flips`` is below 1.
    """
    ours, theirs = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if ours.shape != theirs.shape:
        raise DataError(
            f"a paired test needs both values of every case, found {list(ours.shape)} and {list(theirs.shape)}. "
            "Compare on the same cases."
        )
    if flips < 1:
        raise ConfigError(f"flips must be at least 1, found {flips}. The usual value is 10000.")
    differences = ours - theirs
    low, high = bootstrap(differences, seed=seed)
    sizes, counts = np.unique(np.abs(differences), return_counts=True)
    rng = np.random.default_rng(seed)
    sums = np.zeros(flips)
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        if size:
            sums += size * (2 * rng.binomial(count, 0.5, size=flips) - count)
    # Sums of the same numbers in another order differ in the last digits, and count as equal.
    slack = 1e-9 * float(sizes @ counts)
    further = int((np.abs(sums) >= abs(differences.sum()) - slack).sum())
    return {"difference": float(differences.mean()), "low": low, "high": high, "p": (1 + further) / (1 + flips)}


def holm(p: ArrayLike) -> NDArray[np.float64]:
    r"""p-values corrected for their number (Holm, 1979, Scandinavian Journal of Statistics 6(2)).

    .. math:: \tilde p_{(i)} = \max_{j \le i} \min(1, (m - j + 1)\, p_{(j)})

    for :math:`p_{(1)} \le \dots \le p_{(m)}`. Of all tests with a corrected value of at most .05, the chance that any
    of them has no difference behind it is at most .05.

    Args:
        p: float [m], each between 0 and 1.

    Returns:
        float64 [m], in the order of ``p``.

    Raises:
        DataError: A value is no probability.
    """
    values = np.asarray(p, dtype=np.float64)
    if values.ndim != 1 or not ((values >= 0) & (values <= 1)).all():
        raise DataError(f"Holm's correction takes a list of p-values between 0 and 1, found {values.tolist()}.")
    order = np.argsort(values, kind="stable")
    scaled = np.minimum(1, (len(values) - np.arange(len(values))) * values[order])
    corrected = np.empty(len(values))
    corrected[order] = np.maximum.accumulate(scaled)
    return corrected
