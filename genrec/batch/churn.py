"""Today's output beside yesterday's: how much changed, and whether that is more than a job allows."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from genrec.batch import output
from genrec.config import Thresholds
from genrec.errors import StorageError

BUCKET = 1 << 16  # Users that are compared at once, about.
TOLERANCE = 1e-9  # Of means in floating point, so that a mean of tenths is not above a tenth.
ROW = np.dtype([("user", "<u8"), ("item", "<i4"), ("score", "<f4")])  # A row of a list; the score of a fill-up is NaN.


@dataclass(frozen=True)
class Churn:
    """How two outputs differ. What there is nothing to take the mean of is None.

    L(u) and M(u) are the lists of user u today and yesterday, fill-ups included.

    Attributes:
        users_both, users_new, users_gone: Users of both outputs, of today's alone, of yesterday's alone.
        churn: Mean of |M(u) - L(u)| / |M(u)| over the users of both outputs with a list yesterday.
        same_first: Share of those users whose first item is the same.
        coverage_today, coverage_yesterday: Distinct items in all lists.
        cold_today, cold_yesterday: Share of rows whose item is cold; None where it is not known which items are.
        drift: Mean score of today's rows of the model (fill-ups have scores of another kind) less that of yesterday's.
        pair_drift: Mean of |score today - score yesterday| over the pairs of user and item that the model gave on both
            days.
    """

    users_both: int
    users_new: int
    users_gone: int
    churn: float | None
    same_first: float | None
    coverage_today: int
    coverage_yesterday: int
    cold_today: float | None
    cold_yesterday: float | None
    drift: float | None
    pair_drift: float | None


def compare(today: Path, yesterday: Path, *, cold: Collection[str] | None) -> Churn:
    """Compare two finished outputs, of whatever shard sizes and orders of users.

    Memory holds one shard, the distinct items, and the lists of some 65,000 users. Rows are sorted into files in the
    system's temporary folder (TMPDIR) on the way, 16 bytes for each row of both days. Users are told apart by 64-bit
    hashes: among 10 million, two are taken for one with a chance of 3 in a million.

    Args:
        today, yesterday: Output folders.
        cold: The items without an event; None where they are not known.

    Raises:
        StorageError: An output is not finished, a shard of it was changed, or the temporary folder is full.
    """
    folders = (Path(today), Path(yesterday))
    outputs = [output.finished(folder) for folder in folders]
    largest = max(sum(record.users for record in records) for records in outputs)
    buckets = max(1, -(-largest // BUCKET))
    codes: dict[str, int] = {}
    try:
        with tempfile.TemporaryDirectory(prefix="genrec-") as scratch:
            places = [Path(scratch) / name for name in ("today", "yesterday")]
            days = [
                _sort(folder, records, codes, buckets, place)
                for folder, records, place in zip(folders, outputs, places, strict=True)
            ]
            totals = _Totals()
            for bucket in range(buckets):
                totals.add(_bucket(places[0], bucket), _bucket(places[1], bucket))
    except OSError as error:
        raise StorageError(
            f"{error.filename or tempfile.gettempdir()}: {error.strerror}. The comparison sorts rows through files in "
            "the temporary folder; TMPDIR names another."
        ) from error
    counts = [np.pad(day.counts, (0, len(codes) - len(day.counts))) for day in days]
    frozen = None if cold is None else np.array([codes[item] for item in set(cold) if item in codes], dtype=np.int64)
    cold_today, cold_yesterday = (
        None if frozen is None else _mean(int(count[frozen].sum()), int(count.sum())) for count in counts
    )
    now, before = (_mean(day.score, day.scored) for day in days)
    return Churn(
        users_both=totals.both,
        users_new=totals.new,
        users_gone=totals.gone,
        churn=_mean(totals.churn, totals.listed),
        same_first=_mean(totals.same, totals.listed),
        coverage_today=int((counts[0] > 0).sum()),
        coverage_yesterday=int((counts[1] > 0).sum()),
        cold_today=cold_today,
        cold_yesterday=cold_yesterday,
        drift=None if now is None or before is None else now - before,
        pair_drift=_mean(totals.moved, totals.pairs),
    )


def problems(churn: Churn, thresholds: Thresholds) -> list[str]:
    """A sentence for every threshold that is exceeded, and for every one whose measure there is not."""
    measures = (
        ("max_churn", churn.churn, "no user with a list yesterday stands in both outputs"),
        ("min_coverage", churn.coverage_today, ""),
        ("max_cold", churn.cold_today, "which items are cold is not known, or there is no list; a job's key data names "
         "the data set folder"),
        ("max_drift", None if churn.drift is None else abs(churn.drift), "on one of the days no row is of the model"),
    )  # fmt: skip
    found = []
    for name, value, why in measures:
        limit = getattr(thresholds, name)
        what = name.partition("_")[2]
        if limit is None:
            continue
        if value is None:
            found.append(f"{what} cannot be told, and {name} is {limit}: {why}.")
        elif name == "min_coverage" and value < limit:
            found.append(f"{what} is {value}, below {name}, which is {limit}.")
        elif name != "min_coverage" and value > limit + TOLERANCE:
            found.append(f"{what} is {value:.6g}, above {name}, which is {limit}.")
    return found


def _mean(total: float, count: int) -> float | None:
    return total / count if count else None


_Lists = tuple[NDArray[np.uint64], pl.DataFrame]  # Users, and their lists, of one bucket: see _bucket.


@dataclass
class _Day:
    """One output in sums.

    Attributes:
        counts: int64 [items met so far]: rows of each item, by code.
        score: Sum of the scores of the model's rows.
        scored: How many rows those are.
    """

    counts: NDArray[np.int64]
    score: float = 0.0
    scored: int = 0


def _sort(folder: Path, records: Sequence[output.Record], codes: dict[str, int], buckets: int, place: Path) -> _Day:
    """Sum up an output, and append its users and rows to files in ``place``, one pair for every bucket of users.

    ``codes`` numbers the items; new ones are added.
    """
    place.mkdir()
    day = _Day(np.zeros(0, dtype=np.int64))
    for record in records:
        users = output.read(folder, record, "index", ["user_id"])["user_id"].hash().to_numpy()
        _append(place, "users", buckets, users, users)
        lists = output.read(folder, record, "part", ["user_id", "item_id", "score", "source"])
        ids = lists["item_id"].unique().to_list()
        for item in ids:
            codes.setdefault(item, len(codes))
        numbers = {item: codes[item] for item in ids}
        rows = np.empty(len(lists), dtype=ROW)
        rows["user"] = lists["user_id"].hash().to_numpy()
        rows["item"] = lists["item_id"].replace_strict(numbers, return_dtype=pl.Int32).to_numpy() if ids else 0
        rows["score"] = lists["score"].to_numpy()
        model = (lists["source"] == "model").to_numpy()
        rows["score"][~model] = np.nan
        _append(place, "rows", buckets, rows["user"], rows)
        counts = np.bincount(rows["item"], minlength=len(codes))
        day.counts = np.pad(day.counts, (0, len(codes) - len(day.counts))) + counts
        day.score += float(rows["score"][model].sum(dtype=np.float64))
        day.scored += int(model.sum())
    return day


def _append(place: Path, name: str, buckets: int, users: NDArray[np.uint64], data: NDArray[Any]) -> None:
    """Append each row of ``data`` to the file of its user's bucket; rows keep their order."""
    bucket = users % np.uint64(buckets)
    for number in np.unique(bucket).tolist():
        with open(place / f"{name}-{number}", "ab") as file:
            file.write(data[bucket == number].tobytes())


def _bucket(place: Path, bucket: int) -> _Lists:
    """The users of a bucket, and their lists: user, item (a code), score (f64, NaN for a fill-up), best item first."""
    paths = place / f"users-{bucket}", place / f"rows-{bucket}"
    users = np.fromfile(paths[0], dtype=np.uint64) if paths[0].exists() else np.zeros(0, dtype=np.uint64)
    rows = np.fromfile(paths[1], dtype=ROW) if paths[1].exists() else np.zeros(0, dtype=ROW)
    columns = {name: np.ascontiguousarray(rows[name]) for name in ("user", "item", "score")}
    return users, pl.DataFrame(columns).with_columns(pl.col("score").cast(pl.Float64))


@dataclass
class _Totals:
    """What the users of both outputs come to: see ``Churn``.

    Attributes:
        listed: Users of both with a list yesterday; ``churn`` and ``same`` are sums over them.
        pairs: Pairs of user and item that the model gave on both days; ``moved`` is a sum over them.
    """

    both: int = 0
    new: int = 0
    gone: int = 0
    listed: int = 0
    churn: float = 0.0
    same: int = 0
    pairs: int = 0
    moved: float = 0.0

    def add(self, today: _Lists, yesterday: _Lists) -> None:
        """Add a bucket: its users and lists of both days."""
        (users, lists), (users_before, lists_before) = today, yesterday
        shared = np.intersect1d(users, users_before)
        self.both += len(shared)
        self.new += len(users) - len(shared)
        self.gone += len(users_before) - len(shared)
        rows = lists_before.filter(pl.col("user").is_in(pl.Series(shared).implode())).join(
            lists, on=["user", "item"], how="left", suffix="_now", maintain_order="left"
        )
        firsts = lists.group_by("user", maintain_order=True).agg(now=pl.col("item").first())
        told = (
            rows.group_by("user", maintain_order=True)
            .agg(churn=pl.col("score_now").is_null().mean(), first=pl.col("item").first())
            .join(firsts, on="user", how="left", maintain_order="left")
        )
        self.listed += len(told)
        self.churn += float(told["churn"].sum())
        self.same += int((told["first"] == told["now"]).sum())
        moved = (rows["score_now"] - rows["score"]).abs().drop_nulls().drop_nans()
        self.pairs += len(moved)
        self.moved += float(moved.sum())
