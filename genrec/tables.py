"""From raw tables to checked ones: columns named and cast, events ordered, malformed rows set apart with a reason.

A row keeps where it stands in its source (the columns ``SOURCE`` and ``LINE``) until it has been checked.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import polars as pl

from genrec.errors import ConfigError, DataError, suggestion

# Columns by which a reader tells where a row stands, and that it could not be read at all (reason and text).
SOURCE, LINE, FAULT, VALUE = "__source", "__line", "__fault", "__value"
INTERACTION_COLUMNS = ("user_id", "item_id", "timestamp", "order", "rating", "weight", "event")
BAD_ROWS = {"source": pl.String, "line": pl.Int64, "column": pl.String, "value": pl.String, "reason": pl.String}
MILLISECONDS = 10**11  # Later than the year 5000 as seconds, 1973 as milliseconds.

_ISO = (
    r"^(?<date>\d{4}-\d{2}-\d{2})(?:[T ](?<time>\d{2}:\d{2}(?::\d{2})?)(?:[.,]\d+)?"
    r" ?(?:Z|(?<sign>[+-])(?<hours>\d{2}):?(?<minutes>\d{2}))?)?$"
)


class Checked(NamedTuple):
    """Tables as ``Dataset`` describes them, the rows that were left out, and what its manifest is to tell of them."""

    interactions: pl.DataFrame
    items: pl.DataFrame
    users: pl.DataFrame | None
    bad_rows: pl.DataFrame
    facts: dict[str, Any]


def check(
    interactions: Any,
    items: Any = None,
    users: Any = None,
    *,
    columns: Mapping[str, str] | None = None,
    item_columns: Mapping[str, str] | None = None,
    user_columns: Mapping[str, str] | None = None,
    min_rating: float | None = None,
    events: Iterable[str] | Mapping[str, float] | None = None,
    context: Iterable[str] = (),
    on_bad_row: Literal["fail", "skip"] = "fail",
) -> Checked:
    """Name, cast, check, filter and order the tables: ``Dataset.from_frames`` says what is taken and what is raised."""
    if on_bad_row not in ("fail", "skip"):
        raise ConfigError(f"on_bad_row is {on_bad_row!r}; it must be 'fail' or 'skip'.")
    if min_rating is not None and not np.isfinite(min_rating):
        raise ConfigError(f"min_rating is {min_rating}; it must be a finite number.")
    log = _table(as_polars(interactions, "interactions"), "interactions", columns, ("user_id", "item_id"))
    context = _context_columns(log, context)
    catalogue = people = None
    if items is not None:
        catalogue = as_polars(items, "items")
        catalogue = _table(catalogue, "items", _with_id("item_id", catalogue, columns, item_columns), ("item_id",))
    if users is not None:
        people = as_polars(users, "users")
        people = _table(people, "users", _with_id("user_id", people, columns, user_columns), ("user_id",))
    if items is None and item_columns:
        raise ConfigError("item_columns is given, but no items table.")
    if users is None and user_columns:
        raise ConfigError("user_columns is given, but no users table.")
    log_places = log[SOURCE].unique(maintain_order=True).to_list()
    places = pl.concat([table[SOURCE] for table in (log, catalogue, people) if table is not None])
    sources = list(dict.fromkeys(Path(place).name for place in places.unique(maintain_order=True)))
    bad = []
    if catalogue is not None:
        catalogue, faults = _check_entities(catalogue, "item_id")
        bad.append(faults)
    if people is not None:
        people, faults = _check_entities(people, "user_id")
        bad.append(faults)
    ignored = [c for c in log.columns if c not in (*INTERACTION_COLUMNS, *context) and not c.startswith("__")]
    rows = log.height
    log, faults = _check_interactions(
        log, catalogue, needs_rating=min_rating is not None, events=events, context=context
    )
    bad_rows = pl.concat([faults, *bad])
    if bad_rows.height and on_bad_row == "fail":
        raise DataError(_bad_rows_message(bad_rows))

    log, dropped = _positives(log, min_rating, events)
    if not log.height:
        detail = f"{rows:,} rows were read, {faults.height:,} of them malformed"
        detail += "".join(f", {count:,} dropped by {why}" for why, count in dropped.items())
        example = f" First of the malformed ones: {_row_text(faults, 0)}." if faults.height else ""
        read = ", ".join(dict.fromkeys(Path(place).name for place in log_places))
        hint = "Mend the rows, or ask for other events or ratings." if rows else "Give a log with events."
        raise DataError(f"no interactions are left in {read or 'the log'}: {detail}.{example} {hint}")
    log, order, filled = _ordered(log)
    if catalogue is None:
        ids = log.sort("__row").select("item_id").unique(maintain_order=True)
        catalogue = ids.with_columns(title=pl.lit(""))
    if "event" not in log.columns or log["event"].null_count() == log.height:
        log = log.drop("event", strict=False)
    facts = {
        "source": sources,
        "order": order,
        "ties": "order" if "__order" in log.columns else "file",
        "dropped": dropped,
        "ignored_columns": ignored,
        "filled_timestamps": filled,
    }
    kept = [c for c in (*INTERACTION_COLUMNS, *context) if c in log.columns]
    plain = _plain(log.select(kept))
    assert plain is not None
    return Checked(plain, _items(catalogue), _plain(people), bad_rows, facts)


def check_entities(
    table: Any,
    what: Literal["items", "users"],
    *,
    columns: Mapping[str, str] | None = None,
    log_columns: Mapping[str, str] | None = None,
    on_bad_row: Literal["fail", "skip"] = "fail",
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """A catalogue or a users table alone, as ``check`` takes it; and its bad rows.

    ``log_columns`` are those of the log, by whose name for the id the table's may go.
    """
    key = {"items": "item_id", "users": "user_id"}[what]
    given = as_polars(table, what)
    good, bad = _check_entities(_table(given, what, _with_id(key, given, log_columns, columns), (key,)), key)
    if bad.height and on_bad_row == "fail":
        raise DataError(_bad_rows_message(bad))
    plain = _items(good) if what == "items" else _plain(good)
    assert plain is not None
    return plain, bad


# From any frame to Polars, with the place of every row.


def as_polars(frame: Any, what: str) -> pl.DataFrame:
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


def _with_id(
    key: str, table: pl.DataFrame, log: Mapping[str, str] | None, own: Mapping[str, str] | None
) -> Mapping[str, str] | None:
    """The mapping ``own`` of a table, with the log's name for ``key`` where the table calls it the same."""
    name = (log or {}).get(key)
    if name is None or key in (own or {}) or key in table.columns or name not in table.columns:
        return own
    return {key: name, **(own or {})}


def _table(
    table: pl.DataFrame, what: str, columns: Mapping[str, str] | None, required: tuple[str, ...]
) -> pl.DataFrame:
    """``table`` under genrec's column names, with the columns SOURCE and LINE (1-based row unless a reader set it)."""
    theirs = [c for c in table.columns if not c.startswith("__")]
    for ours, source in (columns or {}).items():
        # Items and users may have any columns, so that any name can be mapped to; the log has fixed ones.
        if what == "interactions" and ours not in INTERACTION_COLUMNS:
            raise ConfigError(
                f"columns names {ours!r}, which genrec has no use for in interactions. "
                f"{suggestion(ours, INTERACTION_COLUMNS)}"
            )
        if source not in theirs:
            raise DataError(
                f"{_where(table, what)} has no column {source!r} (wanted as {ours!r}). {suggestion(source, theirs)}"
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
                f"{_where(table, what)} has no column {name!r}. {suggestion(name, theirs)} "
                f"Name the right one: {flag}={{{name!r}: ...}}."
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
    return table.with_columns([as_ids(table[c]) for c in ids])


def _context_columns(log: pl.DataFrame, names: Iterable[str]) -> tuple[str, ...]:
    """Columns of the log that are kept beside genrec's own, for prompts that read the context of an event."""
    if isinstance(names, str):
        raise ConfigError(f"context is the text {names!r}; give a list of columns of the interactions: [{names!r}].")
    chosen = tuple(dict.fromkeys(names))
    for name in chosen:
        if name in INTERACTION_COLUMNS:
            raise ConfigError(f"context names {name!r}, which is kept without saying so. Leave it out.")
        if name not in log.columns or name.startswith("__"):
            known = [c for c in log.columns if c not in INTERACTION_COLUMNS and not c.startswith("__")]
            where = _where(log, "interactions")
            raise DataError(f"{where} has no column {name!r} for context. {suggestion(name, known)}")
        if log.schema[name].is_nested() or log.schema[name] == pl.Object:
            raise DataError(
                f"{_where(log, 'interactions')}: column {name!r} holds {log.schema[name]}; single values are expected."
            )
    return chosen


def _where(table: pl.DataFrame, what: str) -> str:
    return table[SOURCE][0] if SOURCE in table.columns and table.height else f"the {what} table"


def as_ids(series: pl.Series) -> pl.Series:
    """Ids as strings; nothing but white space counts as missing. Whole floats, which pandas makes, lose their ".0"."""
    if series.dtype.is_float():
        floats = series.fill_nan(None)
        whole = floats.set(floats % 1 != 0, None).cast(pl.Int64, strict=False)
        series = whole.cast(pl.String).zip_with(whole.is_not_null(), floats.cast(pl.String))
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
    log: pl.DataFrame,
    catalogue: pl.DataFrame | None,
    *,
    needs_rating: bool,
    events: Iterable[str] | None,
    context: Iterable[str],
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Parse the columns of the log and set malformed rows apart."""
    if needs_rating and "rating" not in log.columns:
        raise DataError(f"min_rating needs a column 'rating'; {_where(log, 'interactions')} has: {_names(log)}.")
    keep = [c for c in (*INTERACTION_COLUMNS, *context, SOURCE, LINE, FAULT, VALUE) if c in log.columns]
    log = log.select(keep).with_row_index("__row")
    checks = [(c, log[c].is_null(), "is missing") for c in ("user_id", "item_id")]
    parsed = []
    for name, parse, reason in (
        ("timestamp", _seconds, "is neither a whole number of seconds nor an ISO date (2026-01-31 14:45)"),
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
        # A log of events may hold a view and a purchase in one second; those are no duplicates. Nor are rows that the
        # source puts one after the other, or events that are to be dropped anyway.
        keys = [c for c in ("user_id", "item_id", "timestamp", "event", "order") if c in good.columns]
        again = good["timestamp"].is_not_null() & ~good.select(pl.struct(keys).is_first_distinct()).to_series()
        if events is not None and "event" in good.columns:
            again &= good["event"].is_in(list(events))
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
                raise DataError(f"no row has the event {event!r}. {suggestion(event, found)}")
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
    """Categories as list[str]: names are split at "|", lists of paths are joined; each name once, in order."""
    while isinstance(series.dtype, pl.Array):
        series = series.arr.to_list()
    if not isinstance(series.dtype, pl.List):
        series = series.cast(pl.String).str.split("|")
    while isinstance(series.dtype.inner, pl.List):  # type: ignore[attr-defined]
        series = series.list.eval(pl.element().explode(empty_as_null=False, keep_nulls=False))
    names = pl.element().cast(pl.String).str.split("|").explode(empty_as_null=False, keep_nulls=False).str.strip_chars()
    series = series.list.eval(names.filter(names.is_not_null() & (names != "")).unique(maintain_order=True))
    return series.fill_null(pl.Series([[]], dtype=pl.List(pl.String)))


def _plain(table: pl.DataFrame | None) -> pl.DataFrame | None:
    """NaN as null and categoricals as strings, so that equal content is equal whatever frame it came in."""
    if table is None:
        return None
    floats = [c.name for c in table if c.dtype.is_float()]
    labels = [c.name for c in table if c.dtype in (pl.Categorical, pl.Enum)]
    return table.with_columns(pl.col(floats).fill_nan(None), pl.col(labels).cast(pl.String))


def add_to_hash(digest: Any, series: pl.Series) -> None:
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
    elif known.dtype in (pl.UInt64, pl.Int128) and known.cast(pl.Int64, strict=False).null_count():
        digest.update(b"large" + json.dumps(known.to_list()).encode())
    elif known.dtype == pl.Boolean or known.dtype.is_integer():
        digest.update(b"whole" + known.cast(pl.Int64).to_numpy().astype("<i8").tobytes())
    elif known.dtype.is_float():
        digest.update(b"float" + known.cast(pl.Float64).to_numpy().astype("<f8").tobytes())
    elif isinstance(known.dtype, pl.List):
        digest.update(b"list" + known.list.len().cast(pl.Int64).to_numpy().astype("<i8").tobytes())
        add_to_hash(digest, known.explode(empty_as_null=False))
    else:
        text = json.dumps(known.to_list(), default=str, sort_keys=True, ensure_ascii=False)
        digest.update(b"json" + text.encode())
