"""Interactions, items and users: the checks that make them one data set, k-core, splits, histories, content hashes.

Conventions: an item index is the row number in ``Dataset.items``, a user index the position in ``Dataset.user_ids``.
Item and user ids stay the source's own strings. Timestamps are Unix seconds. Histories are oldest first.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from genrec.errors import ConfigError, DataError, LeakError
from genrec.files import new_folder

FORMAT_VERSION = 1
# Columns by which a reader tells where a row stands, and that it could not be read at all (reason and text).
SOURCE, LINE, FAULT, VALUE = "__source", "__line", "__fault", "__value"
INTERACTION_COLUMNS = ("user_id", "item_id", "timestamp", "order", "rating", "weight", "event")
BAD_ROWS = {"source": pl.String, "line": pl.Int64, "column": pl.String, "value": pl.String, "reason": pl.String}
MILLISECONDS = 10**11  # Later than the year 5000 as seconds, 1973 as milliseconds.

_ISO = (
    r"^(?<date>\d{4}-\d{2}-\d{2})(?:[T ](?<time>\d{2}:\d{2}(?::\d{2})?)(?:[.,]\d+)?"
    r" ?(?:Z|(?<sign>[+-])(?<hours>\d{2}):?(?<minutes>\d{2}))?)?$"
)


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


@dataclass(frozen=True, eq=False)
class Truth:
    """What a split was cut from, kept so that ``Split.check`` can tell what each part was allowed to see.

    ``sequences`` holds the whole history of every user and ``times`` its timestamps (None where a split does not use
    them). Events before ``train_ends[u]`` are for training; ``valid_at[u]`` and ``test_at[u]`` are the positions of the
    targets, -1 where the user has none. All three are int32 [n_users].
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


def histories_hash(histories: Sequence[np.ndarray], item_ids: Sequence[str]) -> str:
    """SHA-256 (first 16 hex digits) over histories as item ids, so that it does not depend on item indices."""
    names = np.frombuffer(b"".join(hashlib.sha256(item.encode()).digest()[:16] for item in item_ids), dtype="V16")
    lengths = np.fromiter((len(history) for history in histories), dtype="<i8", count=len(histories))
    digest = hashlib.sha256(lengths.tobytes())
    if lengths.sum():
        digest.update(names[np.concatenate(list(histories))].tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class Dataset:
    """An interaction log, a catalogue and, if there is one, a users table, checked against one another.

    Attributes:
        interactions: ``user_id`` str, ``item_id`` str, ``timestamp`` i64 (Unix seconds, null if unknown), ``order`` i32
            (0-based position within the user) and, if the source has them, ``rating`` f32, ``weight`` f32, ``event``
            str. Sorted by user (in order of first appearance in the source) and order.
        items: ``item_id`` str, ``title`` str ("" if missing), optionally ``categories`` list[str] (paths flattened),
            and every other column of the source.
        users: ``user_id`` and any columns, or None.
        manifest: name, source, what counts as a positive, where the order comes from ("timestamp", "order" or "file")
            and how its ties are broken ("order" or "file"), ``exclude_seen``, counts.
        bad_rows: rows left out under ``on_bad_row="skip"``: source, line, column, value, reason.
    """

    interactions: pl.DataFrame
    items: pl.DataFrame
    users: pl.DataFrame | None
    manifest: dict[str, Any]
    bad_rows: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=BAD_ROWS))

    @classmethod
    def from_frames(
        cls,
        interactions: Any,
        items: Any = None,
        users: Any = None,
        *,
        columns: Mapping[str, str] | None = None,
        item_columns: Mapping[str, str] | None = None,
        user_columns: Mapping[str, str] | None = None,
        min_rating: float | None = None,
        events: Iterable[str] | Mapping[str, float] | None = None,
        exclude_seen: bool = True,
        name: str = "data",
        on_bad_row: Literal["fail", "skip"] = "fail",
    ) -> Dataset:
        """Check tables and make a data set of them.

        Args:
            interactions: Polars, pandas or Arrow table with at least ``user_id`` and ``item_id``. ``timestamp`` may be
                whole Unix seconds, ISO dates (without a zone they mean UTC) or datetimes. Missing timestamps take the
                one before them within the user. Without timestamps, a column ``order`` gives the order, else the rows.
            items: The catalogue. None makes one of the item ids in the log, without titles.
            users: Columns about users, for the head of a prompt.
            columns: genrec's name -> the name in ``interactions``, such as ``{"user_id": "customer"}``.
            item_columns: The same for ``items``.
            user_columns: The same for ``users``.
            min_rating: Keep interactions rated at least this.
            events: Keep these events only; a mapping gives each a weight.
            exclude_seen: Whether recommendations leave out what the user has consumed; stated in the manifest.
            name: Name of the data set.
            on_bad_row: "fail" raises on malformed rows and names them, "skip" leaves them out and keeps the list.

        Raises:
            DataError: A column is missing, rows are malformed, or no interaction is left.
            ConfigError: An argument is wrong.
        """
        if on_bad_row not in ("fail", "skip"):
            raise ConfigError(f"on_bad_row is {on_bad_row!r}; it must be 'fail' or 'skip'.")
        if min_rating is not None and not np.isfinite(min_rating):
            raise ConfigError(f"min_rating is {min_rating}; it must be a finite number.")
        log = _table(interactions, "interactions", columns, ("user_id", "item_id"))
        catalogue = None if items is None else _table(items, "items", item_columns, ("item_id",))
        people = None if users is None else _table(users, "users", user_columns, ("user_id",))
        if items is None and item_columns:
            raise ConfigError("item_columns is given, but no items table.")
        if users is None and user_columns:
            raise ConfigError("user_columns is given, but no users table.")
        tables = [table[SOURCE] for table in (log, catalogue, people) if table is not None]
        sources = list(dict.fromkeys(Path(s).name for s in pl.concat(tables).unique(maintain_order=True)))
        bad = []
        if catalogue is not None:
            catalogue, faults = _check_entities(catalogue, "item_id")
            bad.append(faults)
        if people is not None:
            people, faults = _check_entities(people, "user_id")
            bad.append(faults)
        ignored = [c for c in log.columns if c not in INTERACTION_COLUMNS and not c.startswith("__")]
        rows = log.height
        log, faults = _check_interactions(log, catalogue, needs_rating=min_rating is not None)
        bad_rows = pl.concat([faults, *bad])
        if bad_rows.height and on_bad_row == "fail":
            raise DataError(_bad_rows_message(bad_rows))

        log, dropped = _positives(log, min_rating, events)
        if not log.height:
            detail = f"{rows:,} rows were read, {faults.height:,} of them malformed"
            detail += "".join(f", {count:,} dropped by {why}" for why, count in dropped.items())
            example = f" First of the malformed ones: {_row_text(faults, 0)}." if faults.height else ""
            raise DataError(f"no interactions are left in {', '.join(sources)}: {detail}.{example}")
        log, order, filled = _ordered(log)
        if catalogue is None:
            ids = log.sort("__row").select("item_id").unique(maintain_order=True)
            catalogue = ids.with_columns(title=pl.lit(""))
        if "event" not in log.columns or log["event"].null_count() == log.height:
            log = log.drop("event", strict=False)
        manifest: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "name": name,
            "source": sources,
            "positives": {
                "min_rating": min_rating,
                "events": dict(events) if isinstance(events, Mapping) else None if events is None else sorted(events),
            },
            "order": order,
            "ties": "order" if "__order" in log.columns else "file",
            "exclude_seen": bool(exclude_seen),
            "dropped": dropped,
            "ignored_columns": ignored,
            "filled_timestamps": filled,
        }
        kept = [c for c in INTERACTION_COLUMNS if c in log.columns]
        return cls(log.select(kept), _items(catalogue), _plain(people), manifest, bad_rows)._counted()

    @classmethod
    def load(cls, path: str | Path) -> Dataset:
        """Read the folder that ``save`` wrote.

        Raises:
            DataError: The folder holds no data set, or one that was damaged or written by another format version.
        """
        path = Path(path)
        if not (path / "manifest.json").is_file():
            raise DataError(
                f"{path} holds no data set (no manifest.json). Make one: genrec data import FILES --out {path}"
            )
        try:
            manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
            manifest.pop("hash", None)  # For people who read the file; ``Dataset.hash`` is computed from the tables.
            interactions = pl.read_parquet(path / "interactions.parquet")
            items = pl.read_parquet(path / "items.parquet")
            users = pl.read_parquet(path / "users.parquet") if (path / "users.parquet").exists() else None
            bad_rows = pl.DataFrame(schema=BAD_ROWS)
            if (path / "bad_rows.csv").exists():
                bad_rows = pl.read_csv(path / "bad_rows.csv", schema=BAD_ROWS).with_columns(
                    pl.col(pl.String).fill_null("")
                )
        except (OSError, ValueError, pl.exceptions.PolarsError) as error:
            raise DataError(f"cannot read the data set in {path}: {error}. Import it again.") from error
        if manifest.get("format_version") != FORMAT_VERSION:
            raise DataError(
                f"{path}/manifest.json has format_version {manifest.get('format_version')!r}; this genrec reads "
                f"{FORMAT_VERSION}. Import the data again."
            )
        for table, names, file in (
            (interactions, ("user_id", "item_id", "timestamp", "order"), "interactions"),
            (items, ("item_id", "title"), "items"),
        ):
            if missing := [c for c in names if c not in table.columns]:
                raise DataError(f"{path}/{file}.parquet has no column {missing[0]!r}. Import the data again.")
        return cls(interactions, items, users, manifest, bad_rows)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write interactions, items, users and the manifest to a folder, whole or not at all.

        Raises:
            StorageError: ``path`` exists and ``overwrite`` is off, or the operating system refused.
        """
        with new_folder(Path(path), overwrite=overwrite) as folder:
            for name, table in (("interactions", self.interactions), ("items", self.items), ("users", self.users)):
                if table is not None:
                    # Polars reports a full disk as an error of its own; bytes written by Python raise OSError.
                    buffer = io.BytesIO()
                    table.write_parquet(buffer)
                    (folder / f"{name}.parquet").write_bytes(buffer.getbuffer())
            if self.bad_rows.height:
                (folder / "bad_rows.csv").write_text(self.bad_rows.write_csv(), encoding="utf-8")
            text = json.dumps({**self.manifest, "hash": self.hash}, indent=2, ensure_ascii=False)
            (folder / "manifest.json").write_text(text + "\n", encoding="utf-8")

    @cached_property
    def user_ids(self) -> list[str]:
        """Users of the log, in the order of ``interactions``; the position is the user index."""
        return self.interactions["user_id"].unique(maintain_order=True).to_list()

    @cached_property
    def item_ids(self) -> list[str]:
        """Item ids of the catalogue; the position is the item index."""
        return self.items["item_id"].to_list()

    @cached_property
    def item_index(self) -> dict[str, int]:
        """Item id -> item index."""
        return {item: index for index, item in enumerate(self.item_ids)}

    @cached_property
    def _codes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Item index of every row of the log (int32 [m]), user index of every row, and where each user begins."""
        index = self.items.select("item_id").with_row_index("__index")
        ids = self.interactions.select("item_id")
        items = ids.join(index, on="item_id", how="left", maintain_order="left")["__index"]
        if items.null_count():
            row = int(items.is_null().arg_max() or 0)
            raise DataError(f"interaction {row} names item {ids['item_id'][row]!r}, which is not in the items.")
        runs = self.interactions["user_id"].rle().struct.unnest()
        if runs["value"].n_unique() != runs.height:
            raise DataError("the interactions are not sorted by user. Import the data again.")
        lengths = runs["len"].to_numpy().astype(np.int64)
        starts = np.concatenate([[0], np.cumsum(lengths)])
        return items.to_numpy().astype(np.int32), np.repeat(np.arange(len(lengths)), lengths), starts

    @cached_property
    def histories(self) -> list[np.ndarray]:
        """The whole history of every user index: int32 item indices, oldest first."""
        items, _, starts = self._codes
        return _pieces(items, starts)

    @cached_property
    def user_rows(self) -> list[dict[str, Any]] | None:
        """Per user index the columns of the users table, for the head of a prompt; None without such a table."""
        if self.users is None:
            return None
        frame = pl.DataFrame({"user_id": self.user_ids}).join(
            self.users, on="user_id", how="left", maintain_order="left"
        )
        return frame.to_dicts()

    def history_frame(self) -> pl.DataFrame:
        """``user_id`` and ``history`` (list[str], oldest first) of every user: the input of a batch job."""
        return self.interactions.group_by("user_id", maintain_order=True).agg(history=pl.col("item_id"))

    @cached_property
    def hash(self) -> str:
        """SHA-256 (first 16 hex digits) of the content: every value of every column, each user's order of events.

        The order of users, items and columns, the integer width and the manifest do not count.
        """
        digest = hashlib.sha256()
        tables = {
            "interactions": self.interactions.sort("user_id", "order"),
            "items": self.items.sort("item_id"),
            "users": None if self.users is None else self.users.sort("user_id"),
        }
        for name, table in tables.items():
            digest.update(f"table {name} {-1 if table is None else table.height}\n".encode())
            for column in sorted([] if table is None else table.columns):
                digest.update(f"column {column}\n".encode())
                _digest(digest, table[column])  # type: ignore[index]
        return digest.hexdigest()[:16]

    def k_core(self, users: int, items: int) -> Dataset:
        """The largest part in which every user has ``users`` interactions at least and every item ``items``.

        Items and users outside it leave their tables too, cold ones included; 0 sets no limit. Repeated interactions
        count each.

        Raises:
            DataError: Nothing is left.
        """
        if users < 0 or items < 0:
            raise ConfigError(f"k_core({users}, {items}): the least numbers of interactions cannot be negative.")
        item_codes, user_codes, _ = self._codes
        keep = np.ones(len(item_codes), dtype=bool)
        while True:
            per_user = np.bincount(user_codes[keep], minlength=len(self.user_ids))
            per_item = np.bincount(item_codes[keep], minlength=len(self.item_ids))
            fewer = keep & (per_user[user_codes] >= users) & (per_item[item_codes] >= items)
            if fewer.sum() == keep.sum():
                break
            keep = fewer
        if not keep.any():
            raise DataError(f"the ({users}, {items})-core is empty. Ask for fewer interactions per user or item.")
        log = self.interactions.filter(pl.Series(keep)).with_columns(
            order=pl.int_range(pl.len(), dtype=pl.Int32).over("user_id")
        )
        people = self.users
        if people is not None and users > 0:
            people = people.join(log.select("user_id").unique(), on="user_id", how="semi", maintain_order="left")
        catalogue = self.items.filter(pl.Series(per_item >= items))
        manifest = {**self.manifest, "k_core": {"users": users, "items": items}}
        return Dataset(log, catalogue, people, manifest, self.bad_rows)._counted()

    def summary(self) -> dict[str, Any]:
        """Counts and shapes that tell whether the data are what one thinks they are; JSON-able values."""
        log = self.interactions
        item_codes, user_codes, starts = self._codes
        n_users, n_items = len(self.user_ids), len(self.item_ids)
        lengths = np.diff(starts)
        pairs = np.unique(user_codes * n_items + item_codes).size
        stamped = log.filter(pl.col("timestamp").is_not_null())
        same = (pl.col("user_id") == pl.col("user_id").shift()) & (pl.col("timestamp") == pl.col("timestamp").shift())
        ties = int(log.select(same.sum()).item() or 0)
        first, last = stamped["timestamp"].min(), stamped["timestamp"].max()
        quantiles = np.quantile(lengths, [0, 0.25, 0.5, 0.75, 0.9, 0.99, 1])
        out: dict[str, Any] = {
            "name": self.manifest.get("name"),
            "hash": self.hash,
            "users": n_users,
            "items": n_items,
            "interactions": log.height,
            "sparsity": 1 - pairs / (n_users * n_items),
            "exact_duplicates": stamped.height - stamped.select("user_id", "item_id", "timestamp").n_unique(),
            "repeated_items": log.height - pairs,
            "order": self.manifest.get("order"),
            "ties": ties,
            "tied_share": ties / max(1, log.height - n_users),
            "missing_timestamps": log.height - stamped.height,
            "filled_timestamps": self.manifest.get("filled_timestamps", 0),
            "time_range": None if first is None else [_iso(first), _iso(last)],
            "titles_missing": int((self.items["title"] == "").sum()),
            "cold_items": int((np.bincount(item_codes, minlength=n_items) == 0).sum()),
            "users_with_fewer_than_3": int((lengths < 3).sum()),
            "history_length": {
                **dict(zip(("min", "p25", "median", "p75", "p90", "p99", "max"), map(float, quantiles), strict=True)),
                "mean": float(lengths.mean()),
            },
            "bad_rows": self.bad_rows.height,
            "positives": self.manifest.get("positives"),
            "item_columns": self.items.columns,
            "user_columns": [] if self.users is None else self.users.columns,
        }
        if "rating" in log.columns:
            out["rating_range"] = [log["rating"].min(), log["rating"].max()]
        if "event" in log.columns:
            counts = log["event"].value_counts(sort=True)
            out["events"] = dict(counts.iter_rows())
        return out

    def split(
        self,
        kind: Literal["leave_one_out", "temporal"] = "leave_one_out",
        *,
        ties: Literal["file", "shuffled"] = "file",
        seed: int = 0,
        valid_fraction: float = 0.1,
        test_fraction: float = 0.1,
    ) -> Split:
        """Cut the log into training histories, validation cases and test cases.

        ``leave_one_out``: the last event of a user is the test target, the one before it the validation target, whose
        history is the training history; the test history includes the validation item. Users with fewer than 3 events
        train only.

        ``temporal``: two points in time, below which lie ``1 - valid_fraction - test_fraction`` and
        ``1 - test_fraction`` of the events. Training sees what happened before the first; a user's validation target is
        the first event between the two, the test target the first one at or after the second, and the history of
        either is everything strictly before its point. Users without timestamps take no part, and are counted.

        Args:
            kind: The rule, see above.
            ties: Events of a user with equal timestamps keep the order of the source, or are shuffled.
            seed: Of the shuffle.
            valid_fraction: Share of the events in the validation period (temporal only).
            test_fraction: Share of the events in the test period (temporal only).

        Raises:
            DataError: The data have no timestamps, and the split needs them.
            ConfigError: An argument is wrong.
        """
        if kind not in ("leave_one_out", "temporal"):
            raise ConfigError(f"split kind is {kind!r}; it must be 'leave_one_out' or 'temporal'.")
        if ties not in ("file", "shuffled"):
            raise ConfigError(f"ties is {ties!r}; it must be 'file' or 'shuffled'.")
        item_codes, user_codes, starts = self._codes
        stamps = self.interactions["timestamp"]
        if stamps.null_count() == stamps.len() and (kind == "temporal" or ties == "shuffled"):
            what = "a temporal split" if kind == "temporal" else "ties='shuffled'"
            raise DataError(f"{what} needs timestamps; the data set has an order only ({self.manifest.get('order')}).")
        known = stamps.is_not_null().to_numpy()
        times = stamps.fill_null(0).to_numpy()
        if ties == "shuffled":
            shuffle = np.random.default_rng(seed).permutation(len(times))
            item_codes = item_codes[np.lexsort((np.where(known, shuffle, np.arange(len(times))), times, user_codes))]
        sequences = _pieces(item_codes, starts)
        lengths = np.diff(starts)
        protocol: dict[str, Any] = {
            "split": kind,
            "ties": ties,
            "seed": seed if ties == "shuffled" else None,
            "order": self.manifest.get("order"),
            "ties_in_source": self.manifest.get("ties"),
            "positives": self.manifest.get("positives"),
            "exclude_seen": self.manifest.get("exclude_seen", True),
            "data_hash": self.hash,
        }
        if kind == "leave_one_out":
            enough = lengths >= 3
            train_ends = np.where(enough, lengths - 2, lengths)
            valid_at, test_at = np.where(enough, lengths - 2, -1), np.where(enough, lengths - 1, -1)
            protocol |= {"min_interactions": 3, "test_history_includes_validation": True}
            extra: dict[str, Any] = {}
        else:
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
                    f"begin at {valid_time} and test at {test_time}. Use other fractions, or leave_one_out."
                )
            before_valid = np.bincount(user_codes, weights=known & (times < valid_time)).astype(np.int64)
            before_test = np.bincount(user_codes, weights=known & (times < test_time)).astype(np.int64)
            stamped = known[starts[:-1]]  # Gaps are filled within a user: all of a user's events have a time, or none.
            train_ends = before_valid
            valid_at = np.where(stamped & (before_test > before_valid), before_valid, -1)
            test_at = np.where(stamped & (lengths > before_test), before_test, -1)
            protocol |= {
                "valid_fraction": valid_fraction,
                "test_fraction": test_fraction,
                "valid_time": valid_time,
                "test_time": test_time,
                "users_without_time": int((~stamped).sum()),
            }
            extra = {"times": _pieces(times, starts), "valid_time": valid_time, "test_time": test_time}
        train = [sequence[:end] for sequence, end in zip(sequences, train_ends, strict=True)]
        valid, test = _cases(sequences, valid_at), _cases(sequences, test_at)
        protocol |= {
            "users": len(sequences),
            "train_interactions": int(train_ends.sum()),
            "valid_cases": len(valid),
            "test_cases": len(test),
        }
        ends, valid_places, test_places = (array.astype(np.int32) for array in (train_ends, valid_at, test_at))
        truth = Truth(self.user_ids, self.item_ids, sequences, ends, valid_places, test_places, **extra)
        return Split(protocol, train, valid, test, histories_hash(train, self.item_ids), truth)

    def _counted(self) -> Dataset:
        """The same data set with the counts of its manifest brought up to date."""
        counts = {
            "users": self.interactions["user_id"].n_unique(),
            "items": self.items.height,
            "interactions": self.interactions.height,
            "titles_missing": int((self.items["title"] == "").sum()),
            "bad_rows": self.bad_rows.height,
        }
        return replace(self, manifest={**self.manifest, "counts": counts})


def _pieces(flat: np.ndarray, starts: np.ndarray) -> list[np.ndarray]:
    """Views of ``flat`` between consecutive ``starts``."""
    return [flat[a:b] for a, b in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)]


def _cases(sequences: list[np.ndarray], at: np.ndarray) -> Cases:
    """One case per user with ``at[user] >= 0``: predict the event at that position from those before it."""
    users = np.flatnonzero(at >= 0).astype(np.int32)
    targets = np.array([sequences[user][at[user]] for user in users], dtype=np.int32)
    return Cases(users, [sequences[user][: at[user]] for user in users], targets)


def _iso(seconds: Any) -> str:
    return pl.select(pl.from_epoch(pl.lit(int(seconds)), time_unit="s").dt.to_string("%Y-%m-%dT%H:%M:%SZ")).item()


# Tables: from any frame to Polars, with the place of every row.


def closest(name: str, known: Iterable[str]) -> str:
    """A blank and a sentence with the one of ``known`` that ``name`` may be a slip of; "" where none is near."""
    folded = {other.casefold().replace("_", ""): other for other in known}
    near = difflib.get_close_matches(name.casefold().replace("_", ""), list(folded), n=1)
    return f" Did you mean {folded[near[0]]!r}?" if near else ""


def _polars(frame: Any, what: str) -> pl.DataFrame:
    """Polars, pandas or Arrow to Polars; pandas is never imported unless the frame is one."""
    if isinstance(frame, pl.DataFrame):
        return frame
    if isinstance(frame, pl.LazyFrame):
        return frame.collect()
    try:
        if type(frame).__module__.split(".")[0] == "pandas":
            table = pl.from_pandas(frame)
            # pandas turns whole numbers with gaps into floats; a year should stay a year.
            whole = [c.name for c in table if c.dtype.is_float() and c.null_count() and (c.drop_nulls() % 1 == 0).all()]
            return table.with_columns(pl.col(whole).cast(pl.Int64))
        if hasattr(frame, "__arrow_c_stream__"):
            return pl.DataFrame(frame)
    except (pl.exceptions.PolarsError, TypeError, ValueError) as error:
        raise DataError(f"the {what} table cannot be read: {error}.") from error
    raise DataError(f"{what} is a {type(frame).__name__}; it must be a Polars, pandas or Arrow table.")


def _table(frame: Any, what: str, columns: Mapping[str, str] | None, required: tuple[str, ...]) -> pl.DataFrame:
    """``frame`` under genrec's column names, with the columns SOURCE and LINE (1-based row unless a reader set it)."""
    table = _polars(frame, what)
    theirs = [c for c in table.columns if not c.startswith("__")]
    for ours, source in (columns or {}).items():
        # Items and users may have any columns, so that any name can be mapped to; the log has fixed ones.
        if what == "interactions" and ours not in INTERACTION_COLUMNS:
            raise ConfigError(
                f"columns names {ours!r}, which genrec has no use for in interactions; it can be one of "
                f"{', '.join(INTERACTION_COLUMNS)}.{closest(ours, INTERACTION_COLUMNS)}"
            )
        if source not in theirs:
            raise DataError(
                f"{_where(table, what)} has no column {source!r} (wanted as {ours!r}); it has: {', '.join(theirs)}."
                f"{closest(source, theirs)}"
            )
    if columns:
        mapped = {source: ours for ours, source in columns.items()}
        picked = [pl.col(source).alias(ours) for ours, source in columns.items()]
        rest = [c for c in table.columns if c not in mapped and c not in columns]
        table = table.select(*picked, *rest)
    for name in required:
        if name not in table.columns:
            flag = {"interactions": "columns", "items": "item_columns", "users": "user_columns"}[what]
            raise DataError(
                f"{_where(table, what)} has no column {name!r}; it has: {', '.join(theirs)}."
                f"{closest(name, theirs)} Name the right one: {flag}={{{name!r}: ...}}."
            )
    if SOURCE not in table.columns:
        table = table.with_columns(pl.lit(what).alias(SOURCE), pl.int_range(1, pl.len() + 1).alias(LINE))
    if FAULT not in table.columns:
        table = table.with_columns(pl.lit(None, pl.String).alias(FAULT), pl.lit(None, pl.String).alias(VALUE))
    single = INTERACTION_COLUMNS if what == "interactions" else (*required, "title")
    for column in table.select(c for c in single if c in table.columns):
        if column.dtype.is_nested() or column.dtype == pl.Object:
            raise DataError(
                f"{_where(table, what)}: column {column.name!r} holds {column.dtype}; single values are expected."
            )
    ids = [c for c in (*required, "event") if c in table.columns and (c != "event" or what == "interactions")]
    return table.with_columns([_text(table[c]) for c in ids])


def _where(table: pl.DataFrame, what: str) -> str:
    return table[SOURCE][0] if SOURCE in table.columns and table.height else f"the {what} table"


def _text(series: pl.Series) -> pl.Series:
    """Ids as strings; nothing but white space counts as missing. Whole floats, which pandas makes, lose their ".0"."""
    if series.dtype.is_float():
        series = series.fill_nan(None)
        if (series.drop_nulls() % 1 == 0).all():
            series = series.cast(pl.Int64, strict=False)
    series = series.cast(pl.String, strict=False)
    return series.set(series.str.strip_chars() == "", None)


def _stripped(series: pl.Series) -> pl.Series:
    """Raw values with blanks as null: white space around strings goes, and NaN is missing."""
    if series.dtype == pl.String:
        series = series.str.strip_chars()
        return series.set(series == "", None)
    if series.dtype.is_float():
        return series.fill_nan(None)
    return series.cast(pl.String) if series.dtype in (pl.Categorical, pl.Enum) else series


def _number(series: pl.Series) -> pl.Series:
    """float64, null where the value is no finite number."""
    out = series.cast(pl.Float64, strict=False)
    return out.set(~out.is_finite(), None)


def _whole(series: pl.Series) -> pl.Series:
    """int64, null where the value is no whole number; "12.0" is one."""
    if series.dtype.is_integer():
        return series.cast(pl.Int64, strict=False)
    if series.dtype == pl.String:
        out = series.cast(pl.Int64, strict=False)
    else:
        out = pl.repeat(None, series.len(), dtype=pl.Int64, eager=True)
    if out.null_count() > series.null_count():
        numbers = _number(series)
        whole = numbers.set((numbers % 1 != 0) | (numbers.abs() > 2**53), None).cast(pl.Int64)
        out = out.zip_with(out.is_not_null(), whole)
    return out


def _seconds(series: pl.Series) -> pl.Series:
    """Unix seconds from whole numbers, datetimes, dates or ISO text; null where it is none of these."""
    if series.dtype == pl.Date:
        series = series.cast(pl.Datetime("us"))
    if isinstance(series.dtype, pl.Datetime):
        return series.dt.epoch("s")
    out = _whole(series)
    if series.dtype == pl.String and out.null_count() > series.null_count():
        rest = series.filter(out.is_null() & series.is_not_null())
        part = rest.str.extract_groups(_ISO).struct.unnest()
        clock = part["time"].fill_null("00:00")
        clock = clock.zip_with(clock.str.len_bytes() > 5, clock + ":00")
        moment = (part["date"] + " " + clock).str.to_datetime("%Y-%m-%d %H:%M:%S", strict=False, time_unit="us")
        offset = part["hours"].cast(pl.Int64) * 3600 + part["minutes"].cast(pl.Int64) * 60
        offset = offset.zip_with(part["sign"].fill_null("+") == "+", -offset).fill_null(0)
        position = (out.is_null() & series.is_not_null()).arg_true()
        out = out.scatter(position, moment.dt.epoch("s") - offset)
    return out


# Checks: what is malformed goes into a table of its own.


def _faults(table: pl.DataFrame, checks: list[tuple[str, pl.Series, str]]) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Good rows, and a BAD_ROWS table of the others by the first check (column, wrong, reason) that each fails."""
    checks = [("row", table[FAULT].is_not_null(), ""), *checks]
    code = np.full(table.height, -1, dtype=np.int32)
    for number, (_, wrong, _) in reversed(list(enumerate(checks))):
        code[wrong.fill_null(False).to_numpy()] = number
    if (code < 0).all():
        return table, pl.DataFrame(schema=BAD_ROWS)
    bad = table.with_columns(pl.Series("__code", code)).filter(pl.col("__code") >= 0)
    names, values, reasons = [], [], []
    for i, (column, _, reason) in enumerate(checks):
        raw = VALUE if column == "row" else f"__raw_{column}" if f"__raw_{column}" in table.columns else column
        hit = pl.when(pl.col("__code") == i)
        names.append(hit.then(pl.lit(column)))
        values.append(hit.then(pl.col(raw).cast(pl.String)))
        reasons.append(hit.then(pl.col(FAULT) if column == "row" else pl.lit(reason)))
    report = bad.select(
        source=pl.col(SOURCE),
        line=pl.col(LINE).cast(pl.Int64),
        column=pl.coalesce(names),
        value=pl.coalesce(values).fill_null(""),
        reason=pl.coalesce(reasons),
    )
    return table.filter(pl.Series(code < 0)), report


def _check_interactions(
    log: pl.DataFrame, catalogue: pl.DataFrame | None, *, needs_rating: bool
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Parse the columns of the log and set malformed rows apart."""
    if needs_rating and "rating" not in log.columns:
        raise DataError(f"min_rating needs a column 'rating'; {_where(log, 'interactions')} has: {_names(log)}.")
    keep = [c for c in (*INTERACTION_COLUMNS, SOURCE, LINE, FAULT, VALUE) if c in log.columns]
    log = log.select(keep).with_row_index("__row")
    checks = [(c, log[c].is_null(), "is missing") for c in ("user_id", "item_id")]
    parsed = []
    for name, parse, reason in (
        ("timestamp", _seconds, "is neither a whole number of seconds nor an ISO date"),
        ("order", _whole, "is not a whole number"),
        ("rating", _number, "is not a number"),
        ("weight", _number, "is not a number"),
    ):
        if name not in log.columns:
            continue
        raw = _stripped(log[name])
        value = parse(raw).rename(name)
        checks.append((name, value.is_null() & raw.is_not_null(), reason))
        if name == "timestamp":
            late = "looks like milliseconds, where seconds are expected: divide by 1000"
            checks.append((name, value.abs() > MILLISECONDS, late))
        if name == "order":
            checks.append((name, raw.is_null(), "is missing"))
        if name == "rating" and needs_rating:
            checks.append((name, raw.is_null(), "is missing, and min_rating needs it"))
        if name == "weight":
            checks.append((name, value < 0, "is negative"))
        parsed += [log[name].rename(f"__raw_{name}"), value]
    log = log.with_columns(parsed)
    if catalogue is not None:
        unknown = log["item_id"].is_not_null() & ~log["item_id"].is_in(catalogue["item_id"].implode())
        checks.append(("item_id", unknown, "is not in the items"))
    good, report = _faults(log, checks)
    if "timestamp" in good.columns:
        # A log of events may hold a view and a purchase in one second; those are no duplicates.
        keys = [c for c in ("user_id", "item_id", "timestamp", "event") if c in good.columns]
        again = good["timestamp"].is_not_null() & ~good.select(pl.struct(keys).is_first_distinct()).to_series()
        good, more = _faults(good, [("item_id", again, "repeats an earlier row: same user, item and timestamp")])
        report = pl.concat([report, more])
    spent = [c for c in good.columns if c.startswith("__raw_")]
    return good.drop(*spent, FAULT, VALUE), report.sort("source", "line", maintain_order=True)


def _check_entities(table: pl.DataFrame, key: str) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Rows of items or users with an id of their own, and the rest."""
    good, report = _faults(table, [(key, table[key].is_null(), "is missing")])
    good, more = _faults(good, [(key, ~good[key].is_first_distinct(), "stands in an earlier row too")])
    return good.drop(SOURCE, LINE, FAULT, VALUE), pl.concat([report, more])


def _row_text(bad: pl.DataFrame, row: int) -> str:
    source, line, column, value, reason = bad.row(row)
    return f"{source}:{line} {column} {value[:80]!r} {reason}"


def _bad_rows_message(bad: pl.DataFrame) -> str:
    shown = min(5, bad.height)
    lines = "\n".join(f"  {_row_text(bad, row)}" for row in range(shown))
    more = f"\n  ... and {bad.height - shown:,} more" if bad.height > shown else ""
    rows = "1 malformed row" if bad.height == 1 else f"{bad.height:,} malformed rows"
    return (
        f"{rows}:\n{lines}{more}\nCorrect the source, or leave such rows out with on_bad_row='skip' "
        "(--on-bad-row skip): they are counted and saved beside the data."
    )


def _names(table: pl.DataFrame) -> str:
    return ", ".join(c for c in table.columns if not c.startswith("__"))


def _positives(
    log: pl.DataFrame, min_rating: float | None, events: Iterable[str] | Mapping[str, float] | None
) -> tuple[pl.DataFrame, dict[str, int]]:
    """Keep what counts as a positive, give events their weights, and count what was dropped by which key."""
    dropped = {}
    if "rating" in log.columns:
        log = log.with_columns(pl.col("rating").cast(pl.Float32))
        if log["rating"].null_count() == log.height:
            log = log.drop("rating")
    if min_rating is not None and "rating" in log.columns:
        kept = log.filter(pl.col("rating") >= min_rating)
        dropped["min_rating"] = log.height - kept.height
        log = kept
    if events is not None:
        if isinstance(events, str):
            raise ConfigError(f"events is the text {events!r}; give a list of event names, or a mapping to weights.")
        given = events if isinstance(events, Mapping) else dict.fromkeys(events, 1)
        weights = {event: float(weight) for event, weight in given.items()}
        if "event" not in log.columns:
            raise DataError(f"events needs a column 'event'; the log has: {_names(log)}.")
        found = sorted(log["event"].drop_nulls().unique())
        for event, weight in weights.items():
            if event not in found:
                raise DataError(
                    f"no row has the event {event!r}; the log has: {', '.join(found)}.{closest(event, found)}"
                )
            if not (np.isfinite(weight) and weight > 0):
                raise ConfigError(f"the weight of event {event!r} is {weight}; it must be a number above 0.")
        kept = log.filter(pl.col("event").is_in(list(weights)))
        dropped["events"] = log.height - kept.height
        log = kept
        if isinstance(events, Mapping):
            own = pl.col("weight").fill_null(1) if "weight" in log.columns else pl.lit(1.0)
            log = log.with_columns(weight=own * pl.col("event").replace_strict(weights, return_dtype=pl.Float64))
    if "weight" in log.columns:
        log = log.with_columns(pl.col("weight").fill_null(1).cast(pl.Float32))
    return log, dropped


def _ordered(log: pl.DataFrame) -> tuple[pl.DataFrame, str, int]:
    """Sort by user (first appearance) and time, fill missing timestamps, and number each user's events.

    Within a user: by timestamp; equal ones by the source's ``order`` if it has one, then by row.
    """
    log = log.sort("__row")
    first = log.select("user_id").unique(maintain_order=True).with_row_index("__user")
    log = log.join(first, on="user_id", how="left", maintain_order="left")
    has_order = "order" in log.columns
    log = log.rename({"order": "__order"}) if has_order else log
    log = log.sort(["__user", "__order", "__row"] if has_order else ["__user", "__row"])
    if "timestamp" not in log.columns:
        log = log.with_columns(timestamp=pl.lit(None, pl.Int64))
    missing = log["timestamp"].null_count()
    filled = 0
    if missing < log.height:
        if missing:
            # What comes before the first known time of a user takes that one.
            log = log.with_columns(pl.col("timestamp").forward_fill().backward_fill().over("__user"))
            filled = missing - log["timestamp"].null_count()
        log = log.sort("__user", "timestamp", maintain_order=True)
    order = "timestamp" if missing < log.height else "order" if has_order else "file"
    return log.with_columns(order=pl.int_range(pl.len(), dtype=pl.Int32).over("__user")), order, filled


def _items(table: pl.DataFrame) -> pl.DataFrame:
    """Titles without stray white space and never null, categories as flat lists, every other column as it is."""
    if "title" not in table.columns:
        table = table.with_columns(title=pl.lit(""))
    title = pl.col("title").cast(pl.String).str.replace_all(r"\s+", " ").str.strip_chars().fill_null("")
    table = table.with_columns(title)
    if "categories" in table.columns:
        table = table.with_columns(_flat(table["categories"]).rename("categories"))
    rest = [c for c in table.columns if c not in ("item_id", "title")]
    plain = _plain(table.select("item_id", "title", *rest))
    assert plain is not None
    return plain


def _flat(series: pl.Series) -> pl.Series:
    """Categories as list[str]: text is split at "|", lists of paths are joined; each name once, in order."""
    while isinstance(series.dtype, pl.Array):
        series = series.arr.to_list()
    if not isinstance(series.dtype, pl.List):
        series = series.cast(pl.String).str.split("|")
    while isinstance(series.dtype.inner, pl.List):  # type: ignore[attr-defined]
        series = series.list.eval(pl.element().explode(empty_as_null=False, keep_nulls=False))
    names = pl.element().cast(pl.String).str.strip_chars()
    series = series.list.eval(names.filter(names.is_not_null() & (names != "")).unique(maintain_order=True))
    return series.fill_null(pl.Series([[]], dtype=pl.List(pl.String)))


def _plain(table: pl.DataFrame | None) -> pl.DataFrame | None:
    """NaN as null and categoricals as strings, so that equal content is equal whatever frame it came in."""
    if table is None:
        return None
    floats = [c.name for c in table if c.dtype.is_float()]
    labels = [c.name for c in table if c.dtype in (pl.Categorical, pl.Enum)]
    return table.with_columns(pl.col(floats).fill_nan(None), pl.col(labels).cast(pl.String))


def _digest(digest: Any, series: pl.Series) -> None:
    """Feed one column to a hash: kind, which values are missing, then the values in a form free of widths and units."""
    known = series.drop_nulls()
    digest.update(np.packbits(series.is_null().to_numpy()).tobytes())
    if known.dtype in (pl.Categorical, pl.Enum):
        known = known.cast(pl.String)
    if known.dtype == pl.Date or isinstance(known.dtype, pl.Datetime):
        known = known.cast(pl.Datetime("us")).cast(pl.Int64)
    if known.dtype.is_float() and (known % 1 == 0).all() and (known.abs() < 2**53).all():
        known = known.cast(pl.Int64)
    if not known.len():
        digest.update(b"empty")
    elif known.dtype == pl.String:
        digest.update(b"text" + known.str.len_bytes().cast(pl.Int64).to_numpy().astype("<i8").tobytes())
        digest.update(known.str.join("").item().encode())
    elif known.dtype == pl.Boolean or known.dtype.is_integer():
        digest.update(b"whole" + known.cast(pl.Int64).to_numpy().astype("<i8").tobytes())
    elif known.dtype.is_float():
        digest.update(b"float" + known.cast(pl.Float64).to_numpy().astype("<f8").tobytes())
    elif isinstance(known.dtype, pl.List):
        digest.update(b"list" + known.list.len().cast(pl.Int64).to_numpy().astype("<i8").tobytes())
        _digest(digest, known.explode(empty_as_null=False))
    else:
        text = json.dumps(known.to_list(), default=str, sort_keys=True, ensure_ascii=False)
        digest.update(b"json" + text.encode())
