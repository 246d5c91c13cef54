"""Splits: training histories, and the cases of validation and test, with what tells whether one leaks into another.

Histories are int32 arrays of item indices, oldest first; a user index is a position in ``user_ids``.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from genrec.errors import ConfigError, DataError, LeakError


@dataclass(frozen=True, eq=False)
class Cases:
    """Predictions to make: ``targets[i]`` is the item that came next after ``histories[i]`` of user ``users[i]``.

    ``users`` and ``targets`` are int32 [n]; each history is int32, oldest first, and may be empty.
    """

    users: np.ndarray
    histories: list[np.ndarray]
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.targets)

    def draw(self, count: int, seed: Sequence[int]) -> np.ndarray:
        """Positions of ``count`` cases drawn by ``seed``, ascending; of all where ``count`` is 0 or not below them."""
        every = np.arange(len(self))
        if not 0 < count < len(self):
            return every
        return np.sort(np.random.default_rng(seed).choice(every, count, replace=False))

    def take(self, places: np.ndarray) -> Cases:
        """The cases at these positions."""
        return Cases(self.users[places], [self.histories[case] for case in places], self.targets[places])


@dataclass(frozen=True, eq=False)
class Truth:
    """What a split was cut from, kept so that ``Split.check`` can tell what each part was allowed to see.

    ``sequences`` holds the whole history of every user and ``times`` its timestamps (None where a split does not use
    them). Events before ``train_ends[u]`` are for training; ``valid_at[u]`` and ``test_at[u]`` are the positions of the
    targets, -1 where the user has none. All three are int32 [n_users]. ``events`` says more of every event (rating,
    ...), one row each in the order of ``sequences``, one user after another.
    """

    user_ids: list[str]
    item_ids: list[str]
    sequences: list[np.ndarray]
    train_ends: np.ndarray
    valid_at: np.ndarray
    test_at: np.ndarray
    times: list[np.ndarray] | None = None
    valid_time: int | None = None
    test_time: int | None = None
    events: pl.DataFrame | None = None


@dataclass(frozen=True, eq=False)
class Split:
    """Training histories, and validation and test cases. ``train`` is all that anything may be fitted on.

    ``train`` has one int32 array per user index, which may be empty. ``protocol`` states in JSON-able values how the
    split was made.
    """

    protocol: dict[str, Any]
    train: list[np.ndarray]
    valid: Cases
    test: Cases
    train_hash: str
    truth: Truth
    train_weights: list[np.ndarray] | None = None

    @cached_property
    def train_events(self) -> pl.DataFrame:
        """What the log says of every training event (rating, ...), in the order of ``train``, user after user."""
        lengths = np.array([len(sequence) for sequence in self.truth.sequences], dtype=np.int64)
        starts = np.cumsum(lengths) - lengths
        position = np.arange(lengths.sum()) - np.repeat(starts, lengths)
        return self._events.filter(pl.Series(position < np.repeat(self.truth.train_ends, lengths)))

    @cached_property
    def test_events(self) -> pl.DataFrame:
        """What the log says of the target of every test case, in the order of ``test``."""
        return self._targets(self.test.users, self.truth.test_at)

    @cached_property
    def valid_events(self) -> pl.DataFrame:
        """The same of every validation case, in the order of ``valid``."""
        return self._targets(self.valid.users, self.truth.valid_at)

    def _targets(self, users: np.ndarray, at: np.ndarray) -> pl.DataFrame:
        lengths = np.array([len(sequence) for sequence in self.truth.sequences], dtype=np.int64)
        starts = np.cumsum(lengths) - lengths
        return self._events[starts[users] + at[users]]

    @property
    def _events(self) -> pl.DataFrame:
        if self.truth.events is None:
            raise DataError("this split knows the order of its events alone. Make it with Dataset.split.")
        return self.truth.events

    def without_validation(self, user_ids: Collection[str]) -> Split:
        """The split without the validation cases of these users; their events stay out of training."""
        if not user_ids:
            return self
        names = set(user_ids)
        keep = np.array([self.truth.user_ids[user] not in names for user in self.valid.users], dtype=bool)
        valid = self.valid.take(np.flatnonzero(keep))
        return replace(self, valid=valid, protocol={**self.protocol, "valid_cases": len(valid)})

    def check_fitted(self, what: str, fitted_on: str, advice: str) -> None:
        """Refuse what was trained on other interactions than the training part, told by its ``train_hash``.

        Raises:
            LeakError: It was; ``what`` names it, and ``advice`` says what to do.
        """
        if fitted_on != self.train_hash:
            raise LeakError(
                f"{what} was trained on other interactions ({fitted_on[:16]}) than the training part of this split "
                f"({self.train_hash[:16]}), so it may have seen what is to be predicted. {advice}"
            )

    def check(self) -> None:
        """Compare every part with the events that it may hold.

        Raises:
            LeakError: A training history holds an event that is held out, or the history of a case holds its target
                or something later; names user, item and event.
        """
        truth = self.truth
        if len(self.train) != len(truth.sequences):
            raise LeakError(f"the split has {len(self.train)} training histories for {len(truth.sequences)} users.")
        for user, (history, end) in enumerate(zip(self.train, truth.train_ends, strict=True)):
            self._check_seen(user, history, int(end), "the training history")
        for name, cases, at, cut in (
            ("validation", self.valid, truth.valid_at, truth.valid_time),
            ("test", self.test, truth.test_at, truth.test_time),
        ):
            for user, history, target in zip(cases.users, cases.histories, cases.targets, strict=True):
                position = int(at[user])
                if position < 0:
                    raise LeakError(f"user {truth.user_ids[user]!r} has a {name} case, but no event held out for it.")
                expected = int(truth.sequences[user][position])
                if int(target) != expected:
                    raise LeakError(
                        f"user {truth.user_ids[user]!r}: the target of the {name} case is item "
                        f"{truth.item_ids[target]!r}, but event {position} of that user, which is held out, is "
                        f"{truth.item_ids[expected]!r}."
                    )
                self._check_seen(int(user), history, position, f"the history of the {name} case")
            if truth.times is not None and cut is not None:
                for user in cases.users:
                    times, position = truth.times[user], int(at[user])
                    if (times[:position] >= cut).any() or times[position] < cut:
                        raise LeakError(
                            f"user {truth.user_ids[user]!r}: event {position} is the target of the {name} case, but "
                            f"not all events before it lie before time {cut}, or it does itself."
                        )
        if truth.times is not None:
            for user, end in enumerate(truth.train_ends):
                if (truth.times[user][:end] >= truth.valid_time).any():
                    raise LeakError(
                        f"user {truth.user_ids[user]!r}: an event at or after time {truth.valid_time} is in training."
                    )

    def _check_seen(self, user: int, history: np.ndarray, end: int, what: str) -> None:
        """Refuse a history with an item more often than it stands among the user's first ``end`` events."""
        sequence = self.truth.sequences[user]
        if np.array_equal(history, sequence[:end]):
            return
        excess = Counter(history.tolist()) - Counter(sequence[:end].tolist())
        for item in excess:
            later = [event for event in range(end, len(sequence)) if sequence[event] == item]
            which = f"event {later[0]} of that user" if later else "no event of that user up to then"
            raise LeakError(
                f"user {self.truth.user_ids[user]!r}: {what} holds item {self.truth.item_ids[item]!r}, which is "
                f"{which}; only events before event {end} may be seen there."
            )


def contexts(events: pl.DataFrame) -> pl.DataFrame:
    """What a prompt may read of the ``context`` of each event: its columns in the log, and the time of day.

    Args:
        events: As ``Split.train_events`` and the like give them; n rows, ``timestamp`` in Unix seconds.

    Returns:
        n rows with the columns of ``events`` and, unless the log has columns of these names, ``hour`` (int, 0 to 23)
        and ``weekday`` (str, "Monday" to "Sunday"), both in UTC and null where the event has no time.
    """
    moment = pl.from_epoch(pl.col("timestamp"), time_unit="s")
    derived = {"hour": moment.dt.hour().cast(pl.Int64), "weekday": moment.dt.strftime("%A")}
    return events.with_columns(**{name: value for name, value in derived.items() if name not in events.columns})


def histories_hash(histories: Sequence[np.ndarray], item_ids: Sequence[str]) -> str:
    """SHA-256 (first 16 hex digits) over histories as item ids, so that it does not depend on item indices."""
    names = np.frombuffer(b"".join(hashlib.sha256(item.encode()).digest()[:16] for item in item_ids), dtype="V16")
    lengths = np.fromiter((len(history) for history in histories), dtype="<i8", count=len(histories))
    digest = hashlib.sha256(lengths.tobytes())
    if lengths.sum():
        digest.update(names[np.concatenate(list(histories))].tobytes())
    return digest.hexdigest()[:16]


class Cut(NamedTuple):
    """Where the history of each user is cut: what the rule of a split decides.

    ``train_ends``, ``valid_at`` and ``test_at`` are as in ``Truth``, ``protocol`` is what the rule adds to the
    protocol, and the times are the two points of a temporal split.
    """

    train_ends: np.ndarray
    valid_at: np.ndarray
    test_at: np.ndarray
    protocol: dict[str, Any]
    valid_time: int | None = None
    test_time: int | None = None


def leave_one_out(lengths: np.ndarray) -> Cut:
    """The last event of a user is for test, the one before it for validation; fewer than 3 events train only.

    Args:
        lengths: int [n_users], the number of events of each user.
    """
    enough = lengths >= 3
    return Cut(
        np.where(enough, lengths - 2, lengths),
        np.where(enough, lengths - 2, -1),
        np.where(enough, lengths - 1, -1),
        {"min_interactions": 3, "test_history_includes_validation": True},
    )


def temporal(
    users: np.ndarray,
    times: np.ndarray,
    known: np.ndarray,
    starts: np.ndarray,
    *,
    valid_fraction: float,
    test_fraction: float,
) -> Cut:
    """Two points in time, for everybody: see ``Dataset.split``.

    Args:
        users: int [n_events], the user index of each event, ascending.
        times: int [n_events], Unix seconds, ascending within a user.
        known: bool [n_events], whether the event has a time; all events of a user have one, or none.
        starts: int [n_users + 1], where the events of each user begin.
        valid_fraction: Share of the events in the validation period.
        test_fraction: Share of the events in the test period.

    Raises:
        ConfigError: The fractions leave nothing to train on, or are none.
        DataError: Too many events share a time for the two points to differ.
    """
    for name, share in (("valid_fraction", valid_fraction), ("test_fraction", test_fraction)):
        if not 0 < share < 1:
            raise ConfigError(f"{name} is {share}; it must lie between 0 and 1.")
    if valid_fraction + test_fraction >= 1:
        both = valid_fraction + test_fraction
        raise ConfigError(f"valid_fraction + test_fraction is {both}; nothing would be left to train on.")
    ordered = np.sort(times[known])
    # Rounded first, so that 10 * (1 - .3 - .2) = 4.999... counts as 5.
    valid_time, test_time = (
        int(ordered[min(int(round(len(ordered) * share, 6)), len(ordered) - 1)])
        for share in (1 - valid_fraction - test_fraction, 1 - test_fraction)
    )
    if not ordered[0] < valid_time < test_time:
        raise DataError(
            f"the timestamps are too coarse for a temporal split: the first is {ordered[0]}, validation would "
            f"begin at {valid_time} and test at {test_time}. Use leave_one_out."
        )
    before_valid = np.bincount(users, weights=known & (times < valid_time)).astype(np.int64)
    before_test = np.bincount(users, weights=known & (times < test_time)).astype(np.int64)
    stamped = known[starts[:-1]]  # Gaps are filled within a user: all of a user's events have a time, or none.
    return Cut(
        before_valid,
        np.where(stamped & (before_test > before_valid), before_valid, -1),
        np.where(stamped & (np.diff(starts) > before_test), before_test, -1),
        {
            "valid_fraction": valid_fraction,
            "test_fraction": test_fraction,
            "valid_time": valid_time,
            "test_time": test_time,
            "users_without_time": int((~stamped).sum()),
        },
        valid_time,
        test_time,
    )


def shuffle_ties(users: np.ndarray, times: np.ndarray, known: np.ndarray, seed: int) -> np.ndarray:
    """An order int [n_events] with the events of one user and time at random; the others stay where they are."""
    shuffle = np.random.default_rng(seed).permutation(len(times))
    return np.lexsort((np.where(known, shuffle, np.arange(len(times))), times, users))


def make(
    sequences: list[np.ndarray],
    cut: Cut,
    protocol: dict[str, Any],
    *,
    user_ids: list[str],
    item_ids: list[str],
    times: list[np.ndarray] | None = None,
    weights: list[np.ndarray] | None = None,
    events: pl.DataFrame | None = None,
) -> Split:
    """Cut the whole history of every user.

    ``times`` are the timestamps beside ``sequences``, for a temporal split; ``weights`` those of the events; ``events``
    as in ``Truth``.
    """
    train = [sequence[:end] for sequence, end in zip(sequences, cut.train_ends, strict=True)]
    valid, test = _cases(sequences, cut.valid_at), _cases(sequences, cut.test_at)
    protocol = {
        **protocol,
        **cut.protocol,
        "users": len(sequences),
        "train_interactions": int(cut.train_ends.sum()),
        "valid_cases": len(valid),
        "test_cases": len(test),
    }
    ends, valid_at, test_at = (array.astype(np.int32) for array in cut[:3])
    truth = Truth(user_ids, item_ids, sequences, ends, valid_at, test_at, times, cut.valid_time, cut.test_time, events)
    kept = None if weights is None else [all_[:end] for all_, end in zip(weights, cut.train_ends, strict=True)]
    return Split(protocol, train, valid, test, histories_hash(train, item_ids), truth, kept)


def pieces(flat: np.ndarray, starts: np.ndarray) -> list[np.ndarray]:
    """Views of ``flat`` between consecutive ``starts``."""
    return [flat[a:b] for a, b in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)]


def _cases(sequences: list[np.ndarray], at: np.ndarray) -> Cases:
    """One case per user with ``at[user] >= 0``: predict the event at that position from those before it."""
    users = np.flatnonzero(at >= 0).astype(np.int32)
    targets = np.array([sequences[user][at[user]] for user in users], dtype=np.int32)
    return Cases(users, [sequences[user][: at[user]] for user in users], targets)
