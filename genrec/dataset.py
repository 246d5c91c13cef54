"""The data set: interactions, items and users that fit one another, with k-core, histories, splits and content hash.

Conventions: an item index is the row number in ``Dataset.items``, a user index the position in ``Dataset.user_ids``.
Item and user ids stay the source's own strings. Timestamps are Unix seconds. Histories are oldest first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from genrec import splits, tables
from genrec.errors import ConfigError, DataError
from genrec.files import new_folder
from genrec.splits import Split

FORMAT_VERSION = 1


@dataclass(frozen=True, eq=False)
class Dataset:
    """An interaction log, a catalogue and, if there is one, a users table, checked against one another.

    Attributes:
        interactions: ``user_id`` str, ``item_id`` str, ``timestamp`` i64 (Unix seconds, null if unknown), ``order`` i32
            (0-based position within the user) and, if the source has them, ``rating`` f32, ``weight`` f32, ``event``
            str, and the columns that the import kept as ``context``. Sorted by user (in order of first appearance in
            the source) and order.
        items: ``item_id`` str, ``title`` str ("" if missing), optionally ``categories`` list[str] (paths flattened),
            and every other column of the source.
        users: ``user_id`` and any columns, or None.
        manifest: name, source, what counts as a positive, where the order comes from ("timestamp", "order" or "file")
            and how its ties are broken ("order" or "file"), ``exclude_seen``, counts.
        bad_rows: rows left out under ``on_bad_row="skip"``: source, line, column, value, reason.

    Examples:
        >>> import polars as pl
        >>> log = pl.DataFrame({"customer": ["a", "a", "b"], "sku": ["tea", "pot", "tea"], "time": [10, 20, 15]})
        >>> names = {"user_id": "customer", "item_id": "sku", "timestamp": "time"}
        >>> data = Dataset.from_frames(log, columns=names)
        >>> data.user_ids, data.item_ids
        (['a', 'b'], ['tea', 'pot'])
        >>> [history.tolist() for history in data.histories]
        [[0, 1], [0]]
    """

    interactions: pl.DataFrame
    items: pl.DataFrame
    users: pl.DataFrame | None
    manifest: dict[str, Any]
    bad_rows: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=tables.BAD_ROWS))

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
        context: Iterable[str] = (),
        name: str = "data",
        on_bad_row: Literal["fail", "skip"] = "fail",
    ) -> Dataset:
        """Check tables and make a data set of them.

        Args:
            interactions: Polars, pandas or Arrow table with at least ``user_id`` and ``item_id``. ``timestamp`` may be
                whole Unix seconds, ISO dates (without a zone they mean UTC) or datetimes. Missing timestamps take the
                one before them within the user. Without timestamps, a column ``order`` gives the order, else the rows.
                A column ``weight`` (0 or more, 1 where it is empty) multiplies the training loss of predicting the
                event.
            items: The catalogue. None makes one of the item ids in the log, without titles.
            users: Columns about users, for the head of a prompt.
            columns: genrec's name -> the name in ``interactions``, such as ``{"user_id": "customer"}``.
            item_columns: The same for ``items``; its id may be called as in the log without saying so again.
            user_columns: The same for ``users``.
            min_rating: Keep interactions rated at least this.
            events: Keep these events only; a mapping gives each a weight above 0, by which training multiplies the
                loss of predicting it, on top of the column ``weight``.
            exclude_seen: Whether recommendations leave out what the user has consumed; stated in the manifest.
            context: Further columns of ``interactions`` to keep, such as "query" or "page": what was known before the
                choice, for prompts that read ``context``. Other columns of the log are left out.
            name: Name of the data set.
            on_bad_row: "fail" raises on malformed rows and names them, "skip" leaves them out and keeps the list.

        Raises:
            DataError: A column is missing, rows are malformed, or no interaction is left.
            ConfigError: An argument is wrong.
        """
        if events is not None and not isinstance(events, str | Mapping):
            events = list(events)
        checked = tables.check(
            interactions,
            items,
            users,
            columns=columns,
            item_columns=item_columns,
            user_columns=user_columns,
            min_rating=min_rating,
            events=events,
            context=context,
            on_bad_row=on_bad_row,
        )
        manifest: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "name": name,
            "positives": {
                "min_rating": min_rating,
                "events": dict(events) if isinstance(events, Mapping) else None if events is None else sorted(events),
            },
            "exclude_seen": bool(exclude_seen),
            **checked.facts,
        }
        return cls(checked.interactions, checked.items, checked.users, manifest, checked.bad_rows).counted()

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
            stored = manifest.pop("hash", None)
            interactions = pl.read_parquet(path / "interactions.parquet")
            items = pl.read_parquet(path / "items.parquet")
            users = pl.read_parquet(path / "users.parquet") if (path / "users.parquet").exists() else None
            bad_rows = pl.DataFrame(schema=tables.BAD_ROWS)
            if (path / "bad_rows.csv").exists():
                bad_rows = pl.read_csv(path / "bad_rows.csv", schema=tables.BAD_ROWS).with_columns(
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
        data = cls(interactions, items, users, manifest, bad_rows)
        if data.hash != stored:
            raise DataError(
                f"the tables in {path} have hash {data.hash}, and manifest.json says {stored}: they were changed "
                "or cut after the import. Import the data again."
            )
        return data

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write interactions, items, users and the manifest to a folder, whole or not at all.

        Raises:
            StorageError: ``path`` exists and ``overwrite`` is off, or the operating system refused.
        """
        with new_folder(Path(path), overwrite=overwrite) as folder:
            for name, table in (("interactions", self.interactions), ("items", self.items), ("users", self.users)):
                if table is not None:
                    table.write_parquet(folder / f"{name}.parquet")
            if self.bad_rows.height:
                (folder / "bad_rows.csv").write_text(self.bad_rows.write_csv(), encoding="utf-8")
            text = json.dumps({**self.manifest, "hash": self.hash}, indent=2, ensure_ascii=False)
            (folder / "manifest.json").write_text(text + "\n", encoding="utf-8")

    @cached_property
    def user_ids(self) -> list[str]:
        """Users of the log, in the order of ``interactions``; the position is the user index."""
        return self.interactions["user_id"].unique(maintain_order=True).to_list()

    @cached_property
    def user_index(self) -> dict[str, int]:
        """User id -> user index."""
        return {user: index for index, user in enumerate(self.user_ids)}

    @cached_property
    def item_ids(self) -> list[str]:
        """Item ids of the catalogue; the position is the item index."""
        return self.items["item_id"].to_list()

    @property
    def context_columns(self) -> list[str]:
        """Columns of the interactions that are none of genrec's own: kept for prompts that read ``context``."""
        return [c for c in self.interactions.columns if c not in tables.INTERACTION_COLUMNS]

    @cached_property
    def events(self) -> pl.DataFrame:
        """What the log says of each interaction beside user, item and order: what a prompt may read of an ``event``."""
        return self.interactions.drop("user_id", "item_id", "order")

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
        return splits.pieces(items, starts)

    @cached_property
    def user_rows(self) -> list[dict[str, Any]] | None:
        """Per user index the columns of the users table, for the head of a prompt; None without such a table."""
        if self.users is None:
            return None
        frame = pl.DataFrame({"user_id": self.user_ids}).join(
            self.users, on="user_id", how="left", maintain_order="left"
        )
        return frame.to_dicts()

    def of_user(self, user: int) -> tuple[list[str], dict[str, Any] | None, pl.DataFrame]:
        """Of a user index: the whole history as item ids, its entry of ``user_rows``, and its rows of ``events``."""
        starts = self._codes[2]
        history = [self.item_ids[item] for item in self.histories[user].tolist()]
        row = None if self.user_rows is None else self.user_rows[user]
        return history, row, self.events[int(starts[user]) : int(starts[user + 1])]

    @property
    def readable(self) -> tuple[list[str], list[str], list[str]]:
        """The columns that a prompt may read of an item, of a user and of an event."""
        return self.items.columns, [] if self.users is None else self.users.columns, self.events.columns

    def history_frame(self) -> pl.DataFrame:
        """``user_id`` and ``history`` (list[str], oldest first) of every user: the input of a batch job."""
        return self.interactions.group_by("user_id", maintain_order=True).agg(history=pl.col("item_id"))

    @cached_property
    def hash(self) -> str:
        """The first 16 digits of ``sha256``."""
        return self.sha256[:16]

    @cached_property
    def sha256(self) -> str:
        """SHA-256 (64 hex digits) of the content: every value of every column, each user's order of events.

        The order of users, items and columns, the integer width and the manifest do not count.
        """
        digest = hashlib.sha256()
        sorted_tables = {
            "interactions": self.interactions.sort("user_id", "order"),
            "items": self.items.sort("item_id"),
            "users": None if self.users is None else self.users.sort("user_id"),
        }
        for name, table in sorted_tables.items():
            digest.update(f"table {name} {-1 if table is None else table.height}\n".encode())
            for column in sorted([] if table is None else table.columns):
                digest.update(f"column {column}\n".encode())
                tables.add_to_hash(digest, table[column])  # type: ignore[index]
        return digest.hexdigest()

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
        return Dataset(log, catalogue, people, manifest, self.bad_rows).counted()

    def append(self, new: Dataset) -> tuple[Dataset, dict[str, int]]:
        """This data set with the interactions of another one after it, and its tables in the place of these.

        Every row of this log stays as it is and in its order; new events of a user come after the old ones, new users
        after the old ones. Left out are events that stand here already (same user, item, timestamp and event) and
        those older than the last old event of their user, since histories that were trained on would change. A user
        whose old events have no timestamps gets none; missing ones take the one before them.

        Args:
            new: Checked interactions; its catalogue begins with the items here, in their order.

        Returns:
            The data set, and how many events were left out: ``repeated`` and ``late``, and ``filled``, how many got
            the timestamp before them.

        Raises:
            DataError: The catalogue is another one.
        """
        if new.item_ids[: len(self.item_ids)] != self.item_ids:
            raise DataError("the items to append to do not begin with the items here, in their order.")
        log = new.interactions
        keys = [c for c in ("user_id", "item_id", "timestamp", "event") if c in log.columns]
        keys = [c for c in keys if c in self.interactions.columns]
        stamped = self.interactions.filter(pl.col("timestamp").is_not_null())
        fresh = log.join(stamped.select(keys).unique(), on=keys, how="anti", nulls_equal=True, maintain_order="left")
        last = self.interactions.group_by("user_id").agg(__last=pl.col("timestamp").max(), __known=pl.lit(True))
        fresh = fresh.join(last, on="user_id", how="left", maintain_order="left")
        kept = fresh.filter(~(pl.col("timestamp") < pl.col("__last")).fill_null(False))
        told = {"repeated": log.height - fresh.height, "late": fresh.height - kept.height}
        untimed = pl.col("__known").fill_null(False) & pl.col("__last").is_null()
        kept = kept.with_columns(timestamp=pl.when(~untimed).then(pl.col("timestamp"))).drop("__last", "__known")
        both = pl.concat([self.interactions, kept], how="diagonal_relaxed")
        timeless = both["timestamp"].null_count()
        number = pl.DataFrame({"user_id": both["user_id"].unique(maintain_order=True)}).with_row_index("__user")
        both = both.join(number, on="user_id", how="left", maintain_order="left").sort("__user", maintain_order=True)
        both = both.drop("__user").with_columns(
            timestamp=pl.col("timestamp").forward_fill().over("user_id"),
            order=pl.int_range(pl.len(), dtype=pl.Int32).over("user_id"),
        )
        told["filled"] = timeless - both["timestamp"].null_count()
        if "weight" in both.columns:
            both = both.with_columns(pl.col("weight").fill_null(1))
        log = both.select(*(c for c in tables.INTERACTION_COLUMNS if c in both.columns), *self.context_columns)
        bad_rows = pl.concat([self.bad_rows, new.bad_rows])
        return Dataset(log, new.items, new.users, self.manifest, bad_rows).counted(), told

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
            "dropped": self.manifest.get("dropped") or None,
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
        weights = self.interactions["weight"].to_numpy() if "weight" in self.interactions.columns else None
        events = self.events
        if ties == "shuffled":
            order = splits.shuffle_ties(user_codes, times, known, seed)
            item_codes = item_codes[order]
            weights = None if weights is None else weights[order]
            events = events[order]
        if kind == "leave_one_out":
            cut = splits.leave_one_out(np.diff(starts))
        else:
            cut = splits.temporal(
                user_codes, times, known, starts, valid_fraction=valid_fraction, test_fraction=test_fraction
            )
        protocol = {
            "split": kind,
            "ties": ties,
            "seed": seed if ties == "shuffled" else None,
            "order": self.manifest.get("order"),
            "ties_in_source": self.manifest.get("ties"),
            "positives": self.manifest.get("positives"),
            "exclude_seen": self.manifest.get("exclude_seen", True),
            "data_hash": self.hash,
        }
        return splits.make(
            splits.pieces(item_codes, starts),
            cut,
            protocol,
            user_ids=self.user_ids,
            item_ids=self.item_ids,
            times=splits.pieces(times, starts) if kind == "temporal" else None,
            weights=None if weights is None else splits.pieces(weights, starts),
            events=events,
        )

    def counted(self) -> Dataset:
        """The same data set with the counts of its manifest brought up to date."""
        counts = {
            "users": self.interactions["user_id"].n_unique(),
            "items": self.items.height,
            "interactions": self.interactions.height,
            "titles_missing": int((self.items["title"] == "").sum()),
            "bad_rows": self.bad_rows.height,
        }
        return replace(self, manifest={**self.manifest, "counts": counts})


def _iso(seconds: Any) -> str:
    return pl.select(pl.from_epoch(pl.lit(int(seconds)), time_unit="s").dt.to_string("%Y-%m-%dT%H:%M:%SZ")).item()
