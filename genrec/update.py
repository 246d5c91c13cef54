"""Updates: an adapter goes on with interactions and items that came later, and says what it gained and what it forgot.

Old items keep their identifiers. A new item's row is predicted from its text, by a ridge regression from the texts of
the old items to their trained rows, so that it can be recommended before any training. Training then goes on from the
trained weights: new events are the targets, and a share of old ones is repeated.

No event that is measured has been a target: neither the test targets of the old split nor the validation and test
targets of the split of both logs together.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from peft import PeftModel
from safetensors.torch import load_file

from genrec import adapter as adapters
from genrec import base as bases
from genrec import features, metrics, progress, readers, training, tuning
from genrec.adapter import Adapter
from genrec.additions import combine
from genrec.config import IdentifierRecipe, Recipe, workspace_of
from genrec.curriculum import Fresh
from genrec.dataset import Dataset
from genrec.decoding import Trie
from genrec.engines.local import LocalEngine
from genrec.errors import ConfigError, DataError, IdentifierError, LeakError, StorageError
from genrec.identifiers import Identifiers
from genrec.options import training_options
from genrec.prompts import Prompt
from genrec.regression import TrainedTokens, extended_rows, matched_scale
from genrec.significance import interval
from genrec.splits import Cases, Split, contexts
from genrec.tokenization import Tokenization, add_identifier_tokens, text_tokens
from genrec.toml import as_table, from_table, override

K, BEAMS, _CHUNK = 10, 50, 256  # Cases are asked in chunks, so that the progress bar moves.
TEXTS = 256  # Dimensions of the text vectors that rows are predicted from.
_FIXED = ("base", "data", "tuning", "split", "ties", "split_seed", "identifiers", "lora")
RULE = (
    "Targets of training were the events of the new training part that the old adapter was not trained on, without "
    "the old test targets, and a share of those that it was trained on. Validation and test targets of the split of "
    "both logs together were none, nor was any old test target. An old test case whose target serves validation now "
    "is left out."
)


# Identifiers, and the model with the rows of new ones


def _extended(
    old: Adapter, data: Dataset, split: Split, recipe: Recipe, texts: NDArray[np.float32]
) -> tuple[Identifiers, Tokenization]:
    """The identifiers of all items, and their tokenization."""
    new, made = data.item_ids[len(old.identifiers.item_ids) :], old.identifiers
    tokenizer = bases.Base(old.path.name, old.path).tokenizer()
    titles = None
    if made.scheme == "title":
        titles = text_tokens(tokenizer, data.items["title"].to_list()[len(made.item_ids) :])
    codes = (recipe.identifiers or IdentifierRecipe()).codes
    made = made.extend(
        new, vectors=texts, titles=titles, codes=codes, seed=recipe.seed, fitted_on=split.train_hash
    )  # fmt: skip
    add_identifier_tokens(tokenizer, made)
    frames = old.tokenization().frames
    return made, Tokenization(tokenizer, made, data.items, max_length=recipe.max_length, frames=frames)


def _model(old: Adapter, recipe: Recipe, base: bases.Base, tokens: Tokenization, rows: dict[str, torch.Tensor]) -> Any:
    """The model to be trained on, with all rows in it and, where there is LoRA, the trained LoRA on it."""
    model, ids = tuning.load(recipe, base), adapters.identifier_ids(tokens)
    adapters.resize(model, len(tokens.tokenizer))
    adapters.set_rows(model, ids, rows)
    if recipe.tuning == "full":
        return model
    lora = PeftModel.from_pretrained(model, old.path, is_trainable=True, local_files_only=True)
    return tuning.with_rows(lora, ids)


def _extend(
    old: Adapter, recipe: Recipe, base: bases.Base, data: _Data, compared: _Comparison
) -> tuple[Tokenization, Any, dict[str, Any]]:
    """An adapter with the new items, not trained on yet: its tokenization, its model, and what to tell of its rows.

    The adapter as it was and as it is now are both measured.
    """
    texts = features.unit(features.text_vectors(features.text(data.both.items), TEXTS, recipe.seed))
    identifiers, tokens = _extended(old, data.both, data.split, recipe, texts)
    before, device = old.tokenization(), compared.device
    model = old.model(before).to(device)
    training.check_length(recipe, model, base.name)
    compared.measure("old", model, before)
    kept = load_file(old.path / "rows.safetensors")
    known = TrainedTokens.of(old.identifiers, kept, texts[: data.before.items.height], data.old_split.train)
    scale = {"scale": 1.0}
    # Of codes and titles, the tokens that are new are few, and no item is named by them alone.
    if old.identifiers.scheme == "atomic" and data.counts["items"] and known.enough:
        engine, held = LocalEngine(model), data.old_split
        shown = _drawn(held.valid, held.valid_events, slice(None), 300, recipe.seed, data.before.items.height)
        scale = matched_scale(
            known, model, adapters.identifier_ids(before),
            lambda: shown.lists(engine, before, old.prompt, data.before), data.counts["items"], recipe.seed,
        )  # fmt: skip
    rows, told = extended_rows(known, identifiers, texts, scale["scale"], recipe.seed)
    model = _model(old, recipe, base, tokens, rows)
    compared.measure("extended", model.to(device), tokens)
    return tokens, model, {**told, **scale}


# What was gained and what was forgotten


@dataclass(frozen=True, eq=False)
class _Group:
    """Cases that are measured: item indices are those of both data sets, for new items come last."""

    cases: Cases
    contexts: pl.DataFrame  # Of the targets, as ``splits.contexts`` gives them.
    new_items: NDArray[np.bool_]  # Whether the target is a new item.

    def lists(self, engine: LocalEngine, tokens: Tokenization, prompt: Prompt, data: Dataset) -> NDArray[np.int32]:
        """int32 [cases, K] of a model; items that it does not know are left out of the histories that it reads."""
        trie, known = Trie.build(tokens.tokens), len(tokens.items)
        found = np.full((len(self.cases), K), -1, dtype=np.int32)
        for start in range(0, len(self.cases), _CHUNK):
            part = slice(start, start + _CHUNK)
            histories = [history[history < known] for history in self.cases.histories[part]]
            who = [None if data.user_rows is None else data.user_rows[user] for user in self.cases.users[part]]
            prompts = tokens.sequences(prompt, histories, who, self.contexts[part].to_dicts())
            blocked = [np.unique(history) for history in histories] if data.manifest["exclude_seen"] else None
            items = engine.beam_search(prompts, trie, min(BEAMS, trie.n_items), blocked=blocked).items[:, :K]
            found[part, : items.shape[1]] = items
        return found


def _groups(old: Split, new: Split, items: int, count: int, seed: int) -> tuple[dict[str, _Group], int]:
    """The cases of the next period and of the old one, and how many old ones serve validation now."""
    added = len(new.truth.sequences) - len(old.truth.sequences)
    lengths = np.pad([len(sequence) for sequence in old.truth.sequences], (0, added))
    later = new.truth.test_at[new.test.users] >= lengths[new.test.users]
    free = new.truth.valid_at[old.test.users] != old.truth.test_at[old.test.users]
    parts = {"next period": (new, later), "old test cases": (old, free)}
    return {
        name: _drawn(one.test, one.test_events, mask, count, seed, items) for name, (one, mask) in parts.items()
    }, int((~free).sum())


def _drawn(cases: Cases, events: pl.DataFrame, mask: Any, count: int, seed: int, items: int) -> _Group:
    """``count`` of the cases of ``mask`` (0: all), whose targets are ``events``; items from ``items`` on are new."""
    among = np.arange(len(cases))[mask]
    chosen = among[cases.take(among).draw(count, [seed, 6])]
    return _Group(part := cases.take(chosen), contexts(events[chosen]), part.targets >= items)


@dataclass(frozen=True, eq=False)
class _Comparison:
    """Models on the same cases, and their lists: group -> model -> int32 [cases, K]."""

    groups: dict[str, _Group]
    data: Dataset
    prompt: Prompt
    device: str
    lists: dict[str, dict[str, NDArray[np.int32]]]

    def measure(self, label: str, model: Any, tokens: Tokenization) -> None:
        engine = LocalEngine(model.get_base_model() if isinstance(model, PeftModel) else model)
        with progress.bar(f"measuring the {label} adapter", len(self.groups)) as advance:
            for name, group in self.groups.items():
                self.lists.setdefault(name, {})[label] = group.lists(engine, tokens, self.prompt, self.data)
                advance(1)

    def periods(self) -> dict[str, Any]:
        """``compare`` of every group, and of the cases of the next period whose target is new."""
        result: dict[str, Any] = {}
        for name, group in self.groups.items():
            parts = {name: np.ones(len(group.cases), dtype=bool)}
            if name == "next period":
                parts[f"{name}, new items"] = group.new_items
            for part, mask in parts.items():
                chosen = {label: ranked[mask] for label, ranked in self.lists[name].items()}
                result[part] = compare(group.cases.targets[mask], chosen) if mask.any() else {"cases": 0}
        return result


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
        "models": {name: {key: interval(value) for key, value in row.items()} for name, row in values.items()},
        "changes": {
            name: {key: interval(values[last][key] - value) for key, value in row.items()}
            for name, row in values.items() if name != last
        },
    }  # fmt: skip


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
    table["walks"] = {**table["walks"], "alone": 0.0, "variants": 0.0, "newcomers": 0.0}
    before = from_table(Recipe, table, where)
    changed = from_table(Recipe, override(as_table(before), assignments), "update")
    training_options(changed.training)
    for key in _FIXED:
        if getattr(before, key) != getattr(changed, key):
            raise ConfigError(
                f"update: {key} is {getattr(changed, key)!r}, and the adapter was trained with "
                f"{getattr(before, key)!r}, which an update goes on from. Leave it out, or train anew: genrec train."
            )
    if changed.walks.alone:
        raise ConfigError(f"update: walks.alone is {changed.walks.alone}. An update has no opening; leave it out.")
    for key in ("variants", "newcomers"):
        if value := getattr(changed.walks, key):
            raise ConfigError(f"update: walks.{key} is {value}. It would tell events that are held back; leave it out.")
    if [task.prompt for task in before.tasks] != [task.prompt for task in changed.tasks]:
        raise ConfigError("update: tasks names other prompts than the adapter was trained with. Change weights alone.")
    if changed.ties == "shuffled":
        raise ConfigError(
            'update: the adapter was trained with ties = "shuffled", which would be drawn again with more events, and '
            'what was held out could come into training. Train it with ties = "file".'
        )
    missing = [name for name in _names(changed) if name not in old.prompts]
    if missing:
        raise ConfigError(f"{old.path} has no prompt {missing[0]!r}, which its recipe names. Train it again.")
    return changed


def _names(recipe: Recipe) -> list[str]:
    """Of the prompts, in the order of the tasks."""
    return [Path(task.prompt).stem for task in recipe.tasks]


@dataclass(frozen=True, eq=False)
class _Data:
    """What an update goes on from and with.

    Attributes:
        before, old_split: What the adapter was trained on.
        both, split: Both logs.
        fresh: What is trained of ``split``.
        counts: As ``combine`` gives them.
        not_validated: Ids of the users whose validation case ``split`` lacks, since its target was trained on.
    """

    before: Dataset
    old_split: Split
    both: Dataset
    split: Split
    fresh: Fresh
    counts: dict[str, int]
    not_validated: list[str]

    @property
    def told(self) -> list[str]:
        """What came in, in words."""
        new = self.counts
        told = [
            f"{new['interactions']:,} new interactions, {new['users']:,} new users, {new['items']:,} new items",
            f"left out: {new['repeated']:,} interactions that are in the old log, {new['late']:,} older than the last "
            "old one of their user",
        ]
        if self.not_validated:
            told.append(f"no validation case: {len(self.not_validated):,} users whose target of it was trained on")
        return told


def _old_data(old: Adapter, recipe: Recipe) -> tuple[Dataset, Split]:
    """The data set of an adapter, and its split, both the very ones that it was trained on."""
    told = old.manifest["data"]
    data = Dataset.load(old.data_folder)
    if data.hash != told["hash"]:
        raise DataError(
            f"{old.data_folder} was changed since {old.path} was trained: trained on {told['hash']}, found "
            f"{data.hash}. Restore it; new interactions are given to `genrec update`."
        )
    if list(old.identifiers.item_ids) != data.item_ids:
        raise IdentifierError(
            f"{old.path} has identifiers for {len(old.identifiers.item_ids)} items, and they are not the "
            f"{len(data.item_ids)} items of {told['path']}, in that order. Train it again."
        )
    split = data.split(recipe.split, ties=recipe.ties, seed=recipe.split_seed)
    split.check_fitted(str(old.path), old.manifest["fitted_on"], "Train it again.")
    return data, split.without_validation(old.not_validated)


def _fresh(old: Split, new: Split, replay: float) -> Fresh:
    known, held = np.zeros(len(new.train), dtype=np.int64), np.full(len(new.train), -1, dtype=np.int64)
    known[: len(old.train)], held[: len(old.train)] = old.truth.train_ends, old.truth.test_at
    if new.protocol["split"] == "leave_one_out":
        known = np.minimum(known, new.truth.train_ends)  # See _not_validated.
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


def _not_validated(old: Split, new: Split, before: Collection[str]) -> list[str]:
    """Ids of the users whose validation target was trained on.

    With leave-one-out, users of fewer than 3 events train only: of 2 old events and a new one, the second was a target
    and is for validation now. Test targets never were any. ``before`` are those users of the old adapter itself.
    """
    already = np.array([user in before for user in old.truth.user_ids], dtype=bool)
    trained = np.where(already, old.truth.valid_at + 1, old.truth.train_ends)
    at = new.truth.valid_at[: len(trained)]
    return [old.truth.user_ids[user] for user in np.flatnonzero((at >= 0) & (at < trained))]


def _data(old: Adapter, recipe: Recipe, replay: float, *files: Any, **options: Any) -> _Data:
    """Read and check everything; ``files`` and ``options`` go to ``combine``."""
    before, old_split = _old_data(old, recipe)
    both, counts = combine(before, *files, **options)
    split = both.split(recipe.split, ties=recipe.ties, seed=recipe.split_seed)
    fresh = _fresh(old_split, split, replay)
    left_out = _not_validated(old_split, split, set(old.not_validated))
    validated = split.without_validation(left_out)
    if len(split.valid) and not len(validated.valid):
        raise DataError(
            f"no validation case is left to tell which weights to keep: the targets of all {len(split.valid)} were "
            "trained on, as the second of two events. Wait for more interactions, or train anew: genrec train."
        )
    return _Data(before, old_split, both, validated, fresh, counts, left_out)


def _is_written(data: Dataset, path: Path, overwrite: bool) -> bool:
    """Whether ``path`` is the data set already; refuses another one unless it is to be replaced."""
    try:
        same = path.exists() and Dataset.load(path).hash == data.hash
    except DataError:
        same = False
    if path.exists() and not same and not overwrite:
        raise StorageError(f"{path} exists already and is another data set. Pass --overwrite, or --data-out.")
    return same and not overwrite


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

    The report is in ``genrec.json`` of the new adapter, under "update". The old adapter and its data set stay. Both
    folders are written at the end, the data set just before the adapter takes its name; where a process is killed
    between the two, ``resume`` (with ``overwrite``, where an adapter is to be replaced) writes the adapter.

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
        ConfigError, DataError, AdapterError, LeakError: See their messages. Neither folder is written.
        StorageError: An adapter, an interrupted run or another data set is there, or the disk refused.
    """
    if not 0 <= replay < np.inf or cases < 0:
        raise ConfigError(f"update: replay is {replay} and cases is {cases}. Both are at least 0.")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        raise ConfigError(
            f"update: a launcher started {processes} processes (WORLD_SIZE), and an update runs in one. Run it "
            "without `accelerate launch` or `torchrun`."
        )
    old = Adapter.load(adapter)
    root = workspace_of(old.path)
    name = name or f"{old.path.absolute().name}-updated"
    recipe = _recipe(old, str(old.path), assignments)
    target = root / (data_out or f"{recipe.data}-updated")
    for given, kept in ((root / "adapters" / name, old.path), (target, root / recipe.data)):
        if given.resolve() == kept.resolve():
            raise ConfigError(f"update: {kept} is what is updated, and stays as it is. Choose another name.")
    training.beginning(name, root, overwrite=overwrite, resume=resume)
    data = _data(old, recipe, replay, interactions, items, users, name=target.name, **options)
    written = _is_written(data.both, target, overwrite)
    progress.say("; ".join(data.told))
    if old.tuning == "full":
        base = bases.find(str(old.path.absolute().relative_to(root)), root)
    else:
        base = replace(old.base, name=old.manifest["base"]["name"])
    recipe = replace(recipe, data=data_out or f"{recipe.data}-updated", base=base.name)
    groups, validating = _groups(data.old_split, data.split, data.before.items.height, cases, recipe.seed)
    device = "cuda" if torch.cuda.is_available() and not recipe.training.get("use_cpu") else "cpu"
    compared = _Comparison(groups, data.both, old.prompt, device, {})
    tokens, model, rows = _extend(old, recipe, base, data, compared)

    def report(trained: Any) -> dict[str, Any]:
        compared.measure("updated", trained, tokens)
        return {
            "adapter": old.path.name,
            "hash": old.hash,
            "new": data.counts,
            "rows": rows,
            "replay": replay,
            "rule": RULE,
            "old_test_cases_that_validate_now": validating,
            "not_validated": data.not_validated,
            "notes": [*data.told, RULE],
            "periods": compared.periods(),
        }

    prepared = training.Prepared(
        base=base, prompts=[old.prompts[name] for name in _names(recipe)], tokenization=tokens, model=model,
        split=data.split, fresh=data.fresh, told={"adapter": old.hash, "replay": replay}, report=report,
        write=lambda: None if written else data.both.save(target, overwrite=overwrite),
    )  # fmt: skip
    return training.train(
        recipe, data.both, name=name, workspace=root, overwrite=overwrite, resume=resume, prepared=prepared
    )  # fmt: skip
