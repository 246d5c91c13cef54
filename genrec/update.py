"""Updates: an adapter goes on with interactions and items that came later, and says what it gained and what it forgot.

Old items keep their identifiers. A new item's row is predicted from its text, by a ridge regression from the texts of
the old items to their trained rows, so that it can be recommended before any training. Training then goes on from the
trained weights: new events are the targets, and a share of old ones is repeated.

No event that is measured has been a target: neither the test targets of the old split nor the validation and test
targets of the split of both logs together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from peft import PeftModel
from safetensors.torch import load_file

from genrec import adapter as adapters
from genrec import base as bases
from genrec import features, metrics, progress, readers, tables, training
from genrec.adapter import Adapter
from genrec.config import Recipe, as_table, from_table, override, workspace_of
from genrec.curriculum import Fresh
from genrec.dataset import Dataset
from genrec.decoding import Trie
from genrec.engines.local import LocalEngine
from genrec.errors import ConfigError, DataError, IdentifierError, LeakError, StorageError
from genrec.identifiers import Identifiers
from genrec.options import training_options
from genrec.prompts import Prompt
from genrec.rows import train_rows
from genrec.splits import Cases, Split
from genrec.tokenization import Tokenization, add_identifier_tokens, text_tokens

K, BEAMS = 10, 50
TEXTS = 256  # Dimensions of the text vectors that rows are predicted from.
_CHUNK = 256  # Cases per call of an engine, so that the progress bar moves.
_RIDGES = tuple(10.0**power for power in range(-3, 4))  # Of the regression, times the mean variance of a dimension.
_FOLDS = 5
_FIXED = ("base", "data", "tuning", "split", "ties", "split_seed", "identifiers", "lora")
RULE = (
    "Targets of training were the events of the new training part that the old adapter was not trained on, without "
    "the old test targets, and a share of those that it was trained on. Validation and test targets of the split of "
    "both logs together were none, nor was any old test target. An old test case whose target serves validation now "
    "is left out."
)


# The data


def combine(
    old: Dataset,
    interactions: readers.PathLike | Sequence[readers.PathLike],
    items: readers.PathLike | None = None,
    users: readers.PathLike | None = None,
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    item_columns: Mapping[str, str] | None = None,
    user_columns: Mapping[str, str] | None = None,
    on_bad_row: Literal["fail", "skip"] = "fail",
    name: str | None = None,
) -> tuple[Dataset, dict[str, int]]:
    """A data set with what came later, read and checked as ``readers.import_files`` does, by the same positives.

    Cells of ``items`` and ``users`` replace those of known ones unless they are empty; unknown ones come after them.

    Returns:
        The data set, and counts: ``interactions``, ``users`` and ``items`` that are new, and interactions that were
        left out because they are there already (``repeated``) or older than the user's last old one (``late``).

    Raises:
        ConfigError, DataError: As there, or no new interaction is left.
    """
    mapped = [pair for mapping in (columns, item_columns, user_columns) for pair in (mapping or {}).items()]
    text = [*readers.TEXT_COLUMNS, *(theirs for ours, theirs in mapped if ours in readers.TEXT_COLUMNS)]
    read = readers.read((), format=format, interactions=interactions, items=items, users=users, text=text)
    catalogue, people, bad = old.items, old.users, [old.bad_rows]
    options: dict[str, Any] = {"log_columns": columns, "on_bad_row": on_bad_row}
    if read.items is not None:
        given, faults = tables.check_entities(read.items, "items", columns=item_columns, **options)
        catalogue = _merged(catalogue, given, "item_id", f"{items}")
        bad.append(faults)
    if read.users is not None:
        given, faults = tables.check_entities(read.users, "users", columns=user_columns, **options)
        people = given if people is None else _merged(people, given, "user_id", f"{users}")
        bad.append(faults)
    positives = old.manifest["positives"]
    events = positives["events"]
    if events is not None:
        # A day may lack an event that counts; the import of everything may not.
        column = (columns or {}).get("event", "event")
        there = set(read.interactions[column].cast(pl.String)) if column in read.interactions.columns else set(events)
        events = {e: w for e, w in events.items() if e in there} if isinstance(events, dict) else [
            e for e in events if e in there
        ]  # fmt: skip
        if not events:
            raise DataError(
                f"no new interactions: none has an event that counts ({', '.join(positives['events'])}); the log has "
                f"{', '.join(sorted(filter(None, there))[:5])}."
            )
    # A catalogue that an import made of a log grows with the log.
    bare = items is None and old.items.columns == ["item_id", "title"] and (old.items["title"] == "").all()
    new = Dataset.from_frames(
        read.interactions, None if bare else catalogue, people,
        columns=columns, min_rating=positives["min_rating"], events=events,
        exclude_seen=old.manifest["exclude_seen"], on_bad_row=on_bad_row,
    )  # fmt: skip
    if bare:
        catalogue = _merged(catalogue, new.items, "item_id", "the log")
    bad.append(new.bad_rows)
    both, left_out = old.append(replace(new, items=catalogue, users=people))
    added = both.interactions.height - old.interactions.height
    counts = {
        "interactions": added,
        "users": len(both.user_ids) - len(old.user_ids),
        "items": both.items.height - old.items.height,
        **left_out,
    }
    if not added:
        raise DataError(
            f"no new interactions: of {new.interactions.height:,} read, {left_out['repeated']:,} are in the old log "
            f"and {left_out['late']:,} are older than the last old event of their user. Give a log with later events."
        )
    sources = list(dict.fromkeys([*old.manifest.get("source", []), *new.manifest.get("source", [])]))
    manifest = {
        **both.manifest,
        "name": name or old.manifest["name"],
        "source": sources,
        "filled_timestamps": old.manifest.get("filled_timestamps", 0) + new.manifest.get("filled_timestamps", 0),
        "updates": [*old.manifest.get("updates", []), {"from": old.hash, **counts}],
    }
    return replace(both, manifest=manifest, bad_rows=pl.concat(bad)), counts


def _merged(old: pl.DataFrame, new: pl.DataFrame, key: str, where: str) -> pl.DataFrame:
    """``old`` with the cells of ``new`` that are not empty in the place of its own, and unknown rows after it."""
    shared = [c for c in new.columns if c in old.columns]
    for column in shared:
        try:
            new = new.with_columns(pl.col(column).cast(old.schema[column], strict=True))
        except pl.exceptions.PolarsError as error:
            raise DataError(
                f"{where}: column {column!r} is {new.schema[column]}, and {old.schema[column]} in the old data set: "
                f"{str(error).splitlines()[0]}. Write it as before, or under another name."
            ) from error
    known = old.join(new, on=key, how="left", suffix="__new", maintain_order="left")
    cells = []
    for column in shared:
        if column != key:
            cell = pl.col(f"{column}__new")
            kind = old.schema[column]
            empty = cell.list.len() == 0 if isinstance(kind, pl.List) else cell == "" if kind == pl.String else None
            cell = cell if empty is None else pl.when(~empty).then(cell)
            cells.append(pl.coalesce(cell, pl.col(column)).alias(column))
    known = known.with_columns(cells).drop(f"{column}__new" for column in shared if column != key)
    added = new.join(old, on=key, how="anti", maintain_order="left")
    both = pl.concat([known, added], how="diagonal")
    if "categories" in both.columns:
        both = both.with_columns(pl.col("categories").fill_null(pl.Series([[]], dtype=both.schema["categories"])))
    return both


# Identifiers, and the rows of new ones


@dataclass(frozen=True, eq=False)
class RowMap:
    """What makes an embedding row of a text vector: ``level + (text - middle) @ slope``.

    Attributes:
        middle: float64 [d].
        level: float64 [width], the mean row, which a text without any known word gets.
        slope: float64 [d, width]; zero where texts tell nothing of rows.
        told: ``ridge``; ``explained``, the share of the variance of held-out rows that the map explains (0: no more
            than the mean row); and ``fitted_on``, the number of tokens.
    """

    middle: NDArray[np.float64]
    level: NDArray[np.float64]
    slope: NDArray[np.float64]
    told: dict[str, float]

    @classmethod
    def fit(cls, texts: NDArray[Any], rows: NDArray[Any], weights: NDArray[Any], seed: int = 0) -> RowMap:
        """Ridge regression; its strength is the one with the least squared error on held-out tokens, in folds.

        Args:
            texts: float [n, d], n at least 1.
            rows: float [n, width].
            weights: float [n], above 0: how much a token counts.
            seed: Of the folds.
        """
        x, y, w = (np.asarray(values, dtype=np.float64) for values in (texts, rows, weights))
        fold = np.random.default_rng([seed, 5]).permutation(len(x)) % _FOLDS
        errors, variance = np.zeros(len(_RIDGES)), 0.0
        for held in range(_FOLDS if len(x) >= 2 * _FOLDS else 0):
            out = fold == held
            middle, level, slopes = _ridges(x[~out], y[~out], w[~out])
            variance += float(w[out] @ ((y[out] - level) ** 2).sum(axis=1))
            for place, slope in enumerate(slopes):
                errors[place] += float(w[out] @ ((y[out] - level - (x[out] - middle) @ slope) ** 2).sum(axis=1))
        best = int(errors.argmin())
        explained = max(1 - float(errors[best]) / variance, 0.0) if variance else 0.0
        middle, level, slopes = _ridges(x, y, w)
        slope = slopes[best] if explained > 0 else np.zeros_like(slopes[best])
        return cls(middle, level, slope, {"ridge": _RIDGES[best], "explained": explained, "fitted_on": len(x)})

    def rows(self, texts: NDArray[Any], scale: float = 1.0) -> NDArray[np.float32]:
        """float32 [m, width]: the rows of texts float [m, d], ``scale`` times as far from the mean row."""
        known = np.abs(texts).sum(axis=1) > 0
        return (self.level + scale * known[:, None] * ((texts - self.middle) @ self.slope)).astype(np.float32)


def _ridges(
    x: NDArray[np.float64], y: NDArray[np.float64], w: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], list[NDArray[np.float64]]]:
    """Weighted means of x and y, and the slope of every strength."""
    share = w / w.sum()
    middle, level = share @ x, share @ y
    left = (x - middle) * share[:, None]
    values, vectors = np.linalg.eigh(left.T @ (x - middle))
    right = vectors.T @ (left.T @ (y - level))
    scale = max(float(values.mean()), 1e-12)
    return middle, level, [vectors @ (right / (np.maximum(values, 0) + ridge * scale)[:, None]) for ridge in _RIDGES]


def _extended(old: Adapter, data: Dataset, split: Split, recipe: Recipe, texts: NDArray[np.float32]) -> Identifiers:
    new, made = data.item_ids[len(old.identifiers.item_ids) :], old.identifiers
    if new:
        tokenizer = bases.Base(old.path.name, old.path).tokenizer()
        titles = text_tokens(tokenizer, data.items["title"].to_list()[-len(new) :]) if made.scheme == "title" else None
        codes = recipe.identifiers.codes if recipe.identifiers is not None else 256
        made = made.extend(new, vectors=texts, titles=titles, codes=codes, seed=recipe.seed)
    return replace(made, fitted_on=split.train_hash) if made.scheme == "semantic" else made


@dataclass(frozen=True, eq=False)
class _OldTokens:
    """The identifier tokens of an adapter: their text vectors float32 [tokens, d], zero where nothing is known, and how
    many training events each is trained by, int64 [tokens]."""

    texts: NDArray[np.float32]
    events: NDArray[np.int64]

    @classmethod
    def of(cls, identifiers: Identifiers, texts: NDArray[np.float32], train: Sequence[np.ndarray]) -> _OldTokens:
        counts = np.bincount(
            np.concatenate([np.empty(0, np.int64), *train]).astype(np.int64), minlength=len(identifiers.item_ids)
        )
        place = {token: number for number, token in enumerate(identifiers.vocabulary)}
        events = np.zeros(len(place), dtype=np.int64)
        for tokens, count in zip(identifiers.tokens, counts.tolist(), strict=True):
            for token in set(tokens) & place.keys():
                events[place[token]] += count
        return cls(identifiers.token_vectors(texts), events)

    @property
    def trained(self) -> NDArray[np.int64]:
        """Numbers of the tokens that a map of texts to rows is fitted on."""
        return np.flatnonzero((self.events > 0) & (np.abs(self.texts).sum(axis=1) > 0))

    def map(self, rows: NDArray[Any], tokens: NDArray[np.int64], seed: int) -> RowMap:
        """A map fitted on some of the tokens, each as often as it was trained; without any, the mean of all rows."""
        if not len(tokens):
            return RowMap.fit(self.texts, rows, np.ones(len(rows)), seed)
        return RowMap.fit(self.texts[tokens], rows[tokens], self.events[tokens], seed)


def _scale(
    old: Adapter,
    model: Any,
    tokens: Tokenization,
    about: _OldTokens,
    group: _Group,
    data: Dataset,
    count: int,
    seed: int,
) -> dict[str, float]:
    """How far from the mean row predicted rows must lie for new items to be shown as often as old ones are.

    A regression shrinks, so that its rows lose against trained ones. Some old items get predicted rows in the place of
    their own, and the scale is the one with which they fill as many places of validation lists as they do with those.

    Args:
        old, model, tokens: The adapter; its rows are the old ones again afterwards.
        about: Its tokens.
        group: Validation cases.
        data: The data set of the cases.
        count: Items that are new.
        seed: Of drawing the items.

    Returns:
        ``scale``, and the shares of places: ``shown`` of items with predicted rows, ``shown_trained`` of the same ones.
    """
    trained = about.trained
    kept = load_file(old.path / "rows.safetensors")
    rng = np.random.default_rng([seed, 7])
    held = np.sort(rng.choice(trained, min(max(count, 5), len(trained) // 4), replace=False))
    rest = np.setdiff1d(trained, held)
    maps = {key: about.map(values.float().numpy(), rest, seed) for key, values in kept.items()}
    ids = adapters.identifier_ids(tokens)[torch.from_numpy(held)]
    engine = LocalEngine(model)

    def shown() -> float:
        return float(np.isin(group.lists(engine, tokens, old.prompt, data), held).mean())

    natural, low, high, found = shown(), 0.5, 8.0, 0.0
    for _ in range(6):
        scale = (low * high) ** 0.5
        rows = {key: torch.from_numpy(map_.rows(about.texts[held], scale)) for key, map_ in maps.items()}
        adapters.set_rows(model, ids, rows)
        found = shown()
        low, high = (scale, high) if found < natural else (low, scale)
    adapters.set_rows(model, ids, {key: values[held] for key, values in kept.items()})
    return {"scale": scale, "shown": found, "shown_trained": natural}


def extended_rows(
    old: Adapter, identifiers: Identifiers, texts: NDArray[np.float32], about: _OldTokens, scale: float, seed: int
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The rows of all identifier tokens: an adapter's own, and those of new tokens predicted from text.

    Args:
        old: The adapter.
        identifiers: Its identifiers, extended.
        texts: float32 [items, d], text vectors of the items of ``identifiers``; zero where there is no text.
        about: The tokens of the adapter.
        scale: See ``RowMap.rows``.
        seed: Of the folds.

    Returns:
        ``input`` and, where the head is not tied, ``output``: float [vocabulary, width]; and what to tell of it.
    """
    kept = load_file(old.path / "rows.safetensors")
    place = {token: number for number, token in enumerate(old.identifiers.vocabulary)}
    new = [number for number, token in enumerate(identifiers.vocabulary) if token not in place]
    stay = [number for number, token in enumerate(identifiers.vocabulary) if token in place]
    order = [place[identifiers.vocabulary[number]] for number in stay]
    wanted = identifiers.token_vectors(texts)[new]
    result, told = {}, {}
    for key, values in kept.items():
        trained = values.float().numpy()
        rows = np.empty((len(identifiers.vocabulary), trained.shape[1]), dtype=np.float32)
        rows[stay] = trained[order]
        if new:
            fitted = about.map(trained, about.trained, seed)
            rows[new], told[key] = fitted.rows(wanted, scale), fitted.told
        result[key] = torch.from_numpy(rows).to(values.dtype)
    return result, {"new_tokens": len(new), "without_text": int((np.abs(wanted).sum(axis=1) == 0).sum()), **told}


def _model(old: Adapter, recipe: Recipe, base: bases.Base, tokens: Tokenization, rows: dict[str, torch.Tensor]) -> Any:
    """The model to be trained on, with all rows in it and, where there is LoRA, the trained LoRA on it."""
    model = base.model(getattr(torch, recipe.dtype), quantised=recipe.tuning == "qlora")
    ids = adapters.identifier_ids(tokens)
    adapters.resize(model, len(tokens.tokenizer))
    adapters.set_rows(model, ids, rows)
    if recipe.tuning == "full":
        return model
    lora = PeftModel.from_pretrained(model, old.path, is_trainable=True, local_files_only=True)
    train_rows(model, ids)
    model.is_loaded_in_4bit = False  # TRL would round to bfloat16 what is trained.
    return lora


# What was gained and what was forgotten


@dataclass(frozen=True, eq=False)
class _Group:
    """Cases that are measured: item indices are those of both data sets, for new items come last."""

    cases: Cases
    new_items: NDArray[np.bool_]  # Whether the target is a new item.

    def lists(self, engine: LocalEngine, tokens: Tokenization, prompt: Prompt, data: Dataset) -> NDArray[np.int32]:
        """int32 [cases, K] of a model; items that it does not know are left out of the histories that it reads."""
        trie, known = Trie.build(tokens.tokens), len(tokens.items)
        found = np.full((len(self.cases), K), -1, dtype=np.int32)
        for start in range(0, len(self.cases), _CHUNK):
            part = slice(start, start + _CHUNK)
            histories = [history[history < known] for history in self.cases.histories[part]]
            who = [None if data.user_rows is None else data.user_rows[user] for user in self.cases.users[part]]
            prompts = [tokens.sequence(prompt, history, user) for history, user in zip(histories, who, strict=True)]
            blocked = [np.unique(history) for history in histories] if data.manifest["exclude_seen"] else None
            items = engine.beam_search(prompts, trie, min(BEAMS, trie.n_items), blocked=blocked).items[:, :K]
            found[part, : items.shape[1]] = items
        return found


def _groups(old: Split, new: Split, items: int, count: int, seed: int) -> tuple[dict[str, _Group], int]:
    """The cases of the next period and of the old one, and how many old ones serve validation now."""
    lengths = np.zeros(len(new.truth.sequences), dtype=np.int64)
    lengths[: len(old.truth.sequences)] = [len(sequence) for sequence in old.truth.sequences]
    later = new.truth.test_at[new.test.users] >= lengths[new.test.users]
    free = new.truth.valid_at[old.test.users] != old.truth.test_at[old.test.users]
    parts = {"next period": (new.test, later), "old test cases": (old.test, free)}
    made = {name: _drawn(cases, np.flatnonzero(keep), count, seed, items) for name, (cases, keep) in parts.items()}
    return made, int((~free).sum())


def _drawn(cases: Cases, chosen: NDArray[np.int64], count: int, seed: int, items: int) -> _Group:
    """``count`` of the cases ``chosen`` (0: all); items from ``items`` on are new."""
    if 0 < count < len(chosen):
        chosen = np.sort(np.random.default_rng([seed, 6]).choice(chosen, count, replace=False))
    part = Cases(cases.users[chosen], [cases.histories[case] for case in chosen], cases.targets[chosen])
    return _Group(part, part.targets >= items)


def compare(targets: NDArray[np.int32], lists: Mapping[str, NDArray[np.int32]]) -> dict[str, Any]:
    """Recall and NDCG of each model on the same cases, and what the last one has more than each of the others.

    Returns:
        ``cases``; ``models``: name -> metric -> mean, low, high; ``changes``: name of another model -> metric -> the
        same of the difference per case, the last model's less the other's.
    """
    places = {name: metrics.ranks(found, targets) for name, found in lists.items()}
    values = {
        name: {f"{metric}@{K}": metrics.METRICS[metric](place, K) for metric in ("recall", "ndcg")}
        for name, place in places.items()
    }
    last = list(values)[-1]
    return {
        "cases": len(targets),
        "models": {name: {key: _interval(value) for key, value in row.items()} for name, row in values.items()},
        "changes": {
            name: {key: _interval(values[last][key] - value) for key, value in row.items()}
            for name, row in values.items() if name != last
        },
    }  # fmt: skip


def _interval(values: NDArray[np.float64]) -> dict[str, float]:
    low, high = metrics.bootstrap(values)
    return {"mean": float(values.mean()), "low": low, "high": high}


def table(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """A report as columns and rows of text."""

    def cell(value: Mapping[str, float], form: str) -> str:
        return f"{value['mean']:{form}} [{value['low']:{form}}, {value['high']:{form}}]"

    rows = []
    for period, found in report["periods"].items():
        if not found["cases"]:
            rows.append([period, "no case", "", ""])
            continue
        title = f"{period} ({found['cases']:,})"
        parts = [(name, row, ".4f") for name, row in found["models"].items()]
        parts += [(f"change from {name}", row, "+.4f") for name, row in found["changes"].items()]
        for name, row, form in parts:
            rows.append([title, name, *(cell(value, form) for value in row.values())])
            title = ""
    return ["cases", "model", f"recall@{K}", f"ndcg@{K}"], rows


# The update


def _recipe(old: Adapter, where: str, assignments: Sequence[str]) -> Recipe:
    """The adapter's recipe with fewer epochs, and changes."""
    table = dict(old.manifest["recipe"])
    epochs = max(2, math.ceil(training_options(table["training"])["num_train_epochs"] / 3))
    table["training"] = {**{k: v for k, v in table["training"].items() if k != "max_steps"}, "num_train_epochs": epochs}
    table["walks"] = {**table["walks"], "alone": 0.0}
    before = from_table(Recipe, table, where)
    changed = from_table(Recipe, override(as_table(before), assignments), "update")
    for key in _FIXED:
        if getattr(before, key) != getattr(changed, key):
            raise ConfigError(
                f"update: {key} is {getattr(changed, key)!r}, and the adapter was trained with "
                f"{getattr(before, key)!r}, which an update goes on from. Leave it out, or train anew: genrec train."
            )
    if changed.walks.alone:
        raise ConfigError(f"update: walks.alone is {changed.walks.alone}. An update has no opening; leave it out.")
    if [task.prompt for task in before.tasks] != [task.prompt for task in changed.tasks]:
        raise ConfigError("update: tasks names other prompts than the adapter was trained with. Change weights alone.")
    if changed.ties == "shuffled":
        raise ConfigError(
            'update: the adapter was trained with ties = "shuffled", which would be drawn again with more events, and '
            'what was held out could come into training. Train it with ties = "file".'
        )
    return changed


def _old_data(old: Adapter, root: Path, recipe: Recipe) -> tuple[Dataset, Split]:
    """The data set of an adapter, and its split, both the very ones that it was trained on."""
    told = old.manifest["data"]
    data = Dataset.load(root / told["path"])
    if data.hash != told["hash"]:
        raise DataError(
            f"{root / told['path']} was changed since {old.path} was trained: trained on {told['hash']}, found "
            f"{data.hash}. Restore it; new interactions are given to `genrec update`."
        )
    if list(old.identifiers.item_ids) != data.item_ids:
        raise IdentifierError(
            f"{old.path} has identifiers for {len(old.identifiers.item_ids)} items, and they are not the "
            f"{len(data.item_ids)} items of {told['path']}, in that order. Train it again."
        )
    split = data.split(recipe.split, ties=recipe.ties, seed=recipe.split_seed)
    if split.train_hash != old.manifest["fitted_on"]:
        raise LeakError(
            f"{old.path} was trained on other interactions ({old.manifest['fitted_on']}) than the training part of "
            f"its split ({split.train_hash}). Train it again."
        )
    return data, split


def _fresh(old: Split, new: Split, replay: float) -> Fresh:
    known, held = np.zeros(len(new.train), dtype=np.int64), np.full(len(new.train), -1, dtype=np.int64)
    known[: len(old.train)], held[: len(old.train)] = old.truth.train_ends, old.truth.test_at
    back = np.flatnonzero(new.truth.train_ends < known)
    if len(back):
        raise LeakError(
            f"user {new.truth.user_ids[back[0]]!r}: the adapter was trained on {known[back[0]]} events, of which the "
            f"split of both logs holds some out ({new.truth.train_ends[back[0]]} are for training): the new log "
            "reaches back before the old validation period. Train anew on all of it: genrec data import, genrec train."
        )
    made = Fresh(known, held, replay)
    if not any(made.new(user, len(history)) for user, history in enumerate(new.train)):
        raise DataError(
            "no new interactions for training: the split of both logs holds all of them out. Wait for more, or see "
            "docs/update.md."
        )
    return made


def update(
    adapter: str | Path,
    interactions: readers.PathLike | Sequence[readers.PathLike],
    items: readers.PathLike | None = None,
    users: readers.PathLike | None = None,
    *,
    name: str | None = None,
    data_out: str | None = None,
    assignments: Sequence[str] = (),
    replay: float = 0.5,
    cases: int = 1000,
    overwrite: bool = False,
    resume: bool = False,
    **options: Any,
) -> Path:
    """Train an adapter on with what came later, and write ``adapters/NAME`` and the data set of both logs.

    The report is in ``genrec.json`` of the new adapter, under "update". The old adapter and its data set stay.

    Args:
        adapter: The folder of an adapter, LoRA or whole.
        interactions, items, users: Files as ``genrec data import`` reads them; see ``combine``.
        name: Of the new adapter; the old one's with "-updated" where it is not given.
        data_out: The data set to write, relative to the workspace; the old one's with "-updated".
        assignments: ``key=value`` changes to the adapter's recipe; a third of its epochs, 2 at
            least, unless one says another number.
        replay: Rows of old events per row of new ones.
        cases: Cases of each group that are measured, at most (0: all).
        overwrite: Replace what is there.
        resume: Go on where an update was interrupted.
        options: Further arguments of ``combine``: format, columns, on_bad_row, ...

    Returns:
        The new adapter's folder.

    Raises:
        ConfigError, DataError, AdapterError, LeakError: See their messages. Nothing is written.
        StorageError: An adapter or another data set is there, or the disk refused.
    """
    if not 0 <= replay < np.inf or cases < 0:
        raise ConfigError(f"update: replay is {replay} and cases is {cases}. Both are at least 0.")
    old = Adapter.load(adapter)
    root = workspace_of(old.path)
    name = name or f"{old.path.name}-updated"
    if not old.manifest["recipe"]:
        raise ConfigError(f"{old.path} has no recipe to go on with. Train it again.")
    recipe = _recipe(old, str(old.path), assignments)
    out = root / "adapters" / name
    data_out = data_out or f"{recipe.data}-updated"
    for given, kept in ((out, old.path), (root / data_out, root / recipe.data)):
        if given.resolve() == kept.resolve():
            raise ConfigError(f"update: {kept} is what is updated, and stays as it is. Choose another name.")
    if out.exists() and not overwrite:
        raise StorageError(f"{out} exists already. Pass --overwrite to replace it, or --name to keep both.")
    before, old_split = _old_data(old, root, recipe)
    data, counts = combine(before, interactions, items, users, name=Path(data_out).name, **options)
    told = [
        f"{counts['interactions']:,} new interactions, {counts['users']:,} new users, {counts['items']:,} new items",
        f"left out: {counts['repeated']:,} interactions that are in the old log, {counts['late']:,} older than the "
        "last old one of their user",
    ]
    progress.say("; ".join(told))
    recipe = replace(recipe, data=data_out)
    split = data.split(recipe.split, ties=recipe.ties, seed=recipe.split_seed)
    fresh = _fresh(old_split, split, replay)
    groups, validating = _groups(old_split, split, before.items.height, cases, recipe.seed)

    if old.tuning == "full":
        base = bases.find(str(old.path.absolute().relative_to(root)), root)
        recipe = replace(recipe, base=base.name)
    else:
        base = replace(old.base, name=old.manifest["base"]["name"])
    words = features.text(data.items)
    texts = features.unit(features.text_vectors(words, TEXTS, recipe.seed))
    identifiers = _extended(old, data, split, recipe, texts)
    about = _OldTokens.of(old.identifiers, texts[: before.items.height], old_split.train)
    before_tokens = old.tokenization()
    tokenizer = bases.Base(old.path.name, old.path).tokenizer()
    add_identifier_tokens(tokenizer, identifiers)
    tokens = Tokenization(
        tokenizer, identifiers, data.items, max_length=recipe.max_length, frames=before_tokens.frames
    )  # fmt: skip
    if training.is_main():
        _write(data, root / data_out, overwrite)

    lists: dict[str, dict[str, NDArray[np.int32]]] = {group: {} for group in groups}
    device = "cuda" if torch.cuda.is_available() and not recipe.training.get("use_cpu") else "cpu"

    def measure(label: str, model: Any, tokens: Tokenization) -> None:
        engine = LocalEngine(model.get_base_model() if isinstance(model, PeftModel) else model)
        with progress.bar(f"measuring the {label} adapter", len(groups)) as advance:
            for group, found in groups.items():
                lists[group][label] = found.lists(engine, tokens, old.prompt, data)
                advance(1)

    model = old.model(before_tokens).to(device)
    if training.is_main():
        measure("old", model, before_tokens)
    # Of codes and titles, the tokens that are new are few, and no item is named by them alone.
    scale = {"scale": 1.0}
    if old.identifiers.scheme == "atomic" and counts["items"] and len(about.trained) >= 4 * 5:
        drawn = _drawn(old_split.valid, np.arange(len(old_split.valid)), 300, recipe.seed, before.items.height)
        scale = _scale(old, model, before_tokens, about, drawn, data, counts["items"], recipe.seed)
    rows, regression = extended_rows(old, identifiers, texts, about, scale["scale"], recipe.seed)
    model = _model(old, recipe, base, tokens, rows)
    if training.is_main():
        measure("extended", model.to(device), tokens)

    def report(trained: Any) -> dict[str, Any]:
        measure("updated", trained, tokens)
        periods: dict[str, Any] = {}
        for group, found in groups.items():
            parts = {group: np.ones(len(found.cases), dtype=bool)}
            if group == "next period":
                parts[f"{group}, new items"] = found.new_items
            for part, mask in parts.items():
                chosen = {label: ranked[mask] for label, ranked in lists[group].items()}
                periods[part] = compare(found.cases.targets[mask], chosen) if mask.any() else {"cases": 0}
        return {
            "adapter": old.path.name,
            "hash": old.hash,
            "new": counts,
            "rows": {**regression, **scale},
            "replay": replay,
            "rule": RULE,
            "old_test_cases_that_validate_now": validating,
            "notes": [*told, RULE],
            "periods": periods,
        }

    by_name = {Path(task.prompt).stem: task.prompt for task in recipe.tasks}
    missing = [name for name in by_name if name not in old.prompts]
    if missing:
        raise ConfigError(f"{old.path} has no prompt {missing[0]!r}, which its recipe names. Train it again.")
    prepared = training.Prepared(
        base=base, prompts=[old.prompts[name] for name in by_name], tokenization=tokens, model=model, fresh=fresh,
        told={"adapter": old.hash, "replay": replay}, report=report,
    )  # fmt: skip
    return training.train(
        recipe, data, name=name, workspace=root, overwrite=overwrite, resume=resume, prepared=prepared
    )  # fmt: skip


def _write(data: Dataset, path: Path, overwrite: bool) -> None:
    """Write the data set, unless it is there already, of an update that did not come to its end."""
    if path.exists() and not overwrite:
        try:
            same = Dataset.load(path).hash == data.hash
        except DataError:
            same = False
        if not same:
            raise StorageError(f"{path} exists already and is another data set. Pass --overwrite, or --data-out.")
        return
    data.save(path, overwrite=overwrite)
