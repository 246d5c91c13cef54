"""Evaluation: full-catalogue ranking of adapters, baselines and lists brought from elsewhere, on one split.

Every list is scored by the same metrics on the same cases, and the report states the protocol: data hash, split,
order within equal timestamps, what is a positive, whether seen items are left out, beams, versions. Baselines are
fitted, and tuned, on what comes before the test cases: what does so is handed no test case.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from genrec import features, files, metrics, progress
from genrec.adapter import versions
from genrec.baselines import BASELINES, Baseline, tune
from genrec.baselines import recommend as recommend_baseline
from genrec.comparison import paired_tests
from genrec.config import Spec, load_spec, workspace_of
from genrec.dataset import Dataset
from genrec.errors import ConfigError, DataError, suggestion
from genrec.foreign_lists import read_lists
from genrec.loading import check_engine, vllm_version
from genrec.questions import ask
from genrec.recommender import Recommender
from genrec.report import Report
from genrec.report.numbers import preferred
from genrec.segments import segments
from genrec.significance import interval
from genrec.splits import Cases, Split, contexts, histories_hash
from genrec.toml import as_table

_CHUNK = 256  # Users per call of an engine, so that the progress bar moves.
_EXAMPLES, _SHOWN, _EVENTS = 10, 5, 8  # Example users, places of their lists and events of their histories.

Lists = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class _Setting:
    """What every recommender of one evaluation is asked by."""

    spec: Spec
    data: Dataset
    cases: Cases
    exclude_seen: bool
    cold: NDArray[np.int64]  # Positions of the cases whose target has no training interaction.
    cold_items: NDArray[np.bool_]


def measure(
    recommended: np.ndarray, targets: np.ndarray, ks: Sequence[int], background: metrics.Background
) -> dict[str, dict[str, float]]:
    """Every metric at every cut-off of ranked lists int32 [cases, n], padded with -1.

    Returns:
        ``NAME@k`` -> mean and 95% interval of the metrics of ranks, and the mean alone of the metrics of lists, over
        the cases that have a value. A metric that no case has a value of (the diversity of one item) is left out.
    """
    place = metrics.ranks(recommended, targets)
    row: dict[str, dict[str, float]] = {}
    for name, metric in metrics.METRICS.items():
        for k in ks:
            row[f"{name}@{k}"] = interval(metric(place, k))
    for name, list_metric in metrics.LIST_METRICS.items():
        for k in ks:
            values = np.atleast_1d(list_metric(recommended, k, background))
            if not np.isnan(values).all():
                row[f"{name}@{k}"] = {"mean": float(np.nanmean(values))}
    return row


def _lists(
    setting: _Setting, label: str, ask: Callable[[Cases, NDArray[np.bool_] | None], Lists]
) -> tuple[Lists, Lists]:
    """The lists of a recommender: int32 [cases, max(k)], and those of cold items alone for the cold cases.

    Args:
        setting: Whose cases.
        label: What the progress bar calls the recommender.
        ask: Cases, and the items that may be recommended (None: all) -> int32 [cases, at most max(k)].
    """

    def lists(cases: Cases, what: str, allowed: NDArray[np.bool_] | None) -> Lists:
        found = np.full((len(cases), max(setting.spec.k)), -1, dtype=np.int32)
        with progress.bar(what, len(cases)) as advance:
            for start in range(0, len(cases), _CHUNK):
                places = np.arange(start, min(start + _CHUNK, len(cases)))
                items = ask(cases.take(places), allowed)
                found[places, : items.shape[1]] = items
                advance(len(places))
        return found

    every = lists(setting.cases, f"evaluating {label}", None)
    if not len(setting.cold):
        return every, every[:0]
    cold = setting.cases.take(setting.cold)
    return every, lists(cold, f"evaluating {label} among cold items", setting.cold_items)


def _adapter_lists(recommender: Recommender, label: str, setting: _Setting, split: Split) -> tuple[Lists, Lists]:
    """``_lists`` of an adapter, which is refused where it does not belong to the split or the data set."""
    spec, data = setting.spec, setting.data
    manifest = recommender.adapter.manifest
    own = {key: value for key, value in manifest["protocol"].items() if split.protocol.get(key) != value}
    advice = f"Use the split of its recipe ({json.dumps(own)} differ), or train it on this one."
    split.check_fitted(f"adapter {label!r}", manifest["fitted_on"], advice)
    for problem in recommender.adapter.prompt.check(None, *data.readable[1:]):  # Of items the adapter's own are read.
        raise DataError(f"adapter {label!r}, prompt {recommender.adapter.prompt.name}: {problem}")
    if recommender.item_ids != data.item_ids:
        raise DataError(f"adapter {label!r} knows another catalogue than {spec.data}. Train it on this data set.")

    told = contexts(split.test_events) if recommender.adapter.prompt.reads["context"] else None
    places = {} if told is None else {user: place for place, user in enumerate(split.test.users.tolist())}

    def ask(cases: Cases, allowed: NDArray[np.bool_] | None) -> Lists:
        users = None if data.user_rows is None else [data.user_rows[user] for user in cases.users]
        who = None if told is None else told[[places[user] for user in cases.users.tolist()]].to_dicts()
        return recommender.search(
            cases.histories, max(spec.k), num_beams=spec.num_beams, exclude_seen=setting.exclude_seen,
            users=users, contexts=who, allowed=allowed,
        ).items  # fmt: skip

    return _lists(setting, label, ask)


def _baseline_lists(fitted: Baseline, label: str, setting: _Setting) -> tuple[Lists, Lists]:
    """``_lists`` of a fitted baseline."""
    width = max(setting.spec.k)

    def ask(cases: Cases, allowed: NDArray[np.bool_] | None) -> Lists:
        return recommend_baseline(fitted, cases.histories, width, setting.exclude_seen, _CHUNK, allowed)

    return _lists(setting, label, ask)


def _tuned_on(split: Split, data: Dataset, exclude_seen: bool) -> dict[str, Any]:
    """What a choice by validation depends on; a stored choice with other values is not used."""
    targets = [
        np.append(history, target) for history, target in zip(split.valid.histories, split.valid.targets, strict=True)
    ]
    return {
        "train_hash": split.train_hash,
        "valid_hash": histories_hash(targets, data.item_ids),
        "items_hash": files.text_hash(data.items.write_json()),
        "exclude_seen": exclude_seen,
    }


def _grid(name: str) -> str:
    """A hash of the settings that tuning tries."""
    return files.text_hash(repr(BASELINES[name].GRID))


def _fitted(
    names: Sequence[str],
    train: Sequence[np.ndarray],
    valid: Cases,
    items: pl.DataFrame,
    tuned_on: dict[str, Any],
    stored: Path,
    again: bool,
) -> dict[str, tuple[Baseline, dict[str, Any]]]:
    """Every baseline, fitted on the training part, and what the protocol says of it.

    Nothing of a test case is handed over. With ``again`` each is tuned on the validation cases, and ``stored`` written;
    else a choice in ``stored`` is used where it was made on the same training part and validation cases.
    """
    known: dict[str, Any] = {}
    if stored.exists():
        try:
            table = json.loads(stored.read_text(encoding="utf-8"))
            known = {
                label: {key: choice[key] for key in ("options", "settings", "cases", "grid")}
                for label, choice in table["baselines"].items()
                if table["tuned_on"] == tuned_on and label in BASELINES and choice["grid"] == _grid(label)
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if not again:
                raise ConfigError(
                    f"{stored} is no file of tuned baselines ({error!r}). Remove it, or tune again: --tune-baselines."
                ) from error
        if not known and not again:
            progress.say(
                f"{stored} was tuned on other data or by another split, so baselines run with their defaults. Tune "
                "again: --tune-baselines"
            )
    result: dict[str, tuple[Baseline, dict[str, Any]]] = {}
    for name in names:
        if again:
            choice = tune(name, train, items, valid.histories, valid.targets, exclude_seen=tuned_on["exclude_seen"])
            tried = {"settings": choice.settings, "cases": len(valid), "grid": _grid(name)}
            known[name], baseline = {"options": choice.options, **tried}, choice.baseline
            files.write_text(stored, json.dumps({"tuned_on": tuned_on, "baselines": known}, indent=1) + "\n")
            if len(choice.settings) > 1:
                best = max(setting["ndcg@10"] for setting in choice.settings)
                told_options = ", ".join(f"{key} {value}" for key, value in choice.options.items())
                progress.say(
                    f"{name}: the best of {len(choice.settings)} settings on validation (NDCG@10 {best:.4f}) is "
                    f"{told_options}; kept in {stored}"
                )
        else:
            options = known.get(name, {}).get("options", {})
            try:
                baseline = BASELINES[name](**options)
            except TypeError as error:
                raise ConfigError(
                    f"{stored}: {name} has no such options: {options}. Tune again: --tune-baselines."
                ) from error
            baseline.fit(train, items)
        told = {"options": dict(baseline.parameters), "tuned": False, "settings": []}
        if name in known and len(known[name]["settings"]) > 1:  # Popularity has nothing to choose.
            told |= {"tuned": True, "settings": known[name]["settings"]}
            told["tuned_on"] = f"NDCG@10 of {known[name]['cases']} validation cases"
        result[name] = (baseline, told)
    return result


def _shown_examples(lists: Mapping[str, Lists], cases: Cases, data: Dataset, seed: int) -> list[dict[str, Any]]:
    """Test users drawn by ``seed``, with titles: their last events, what came next, and the lists they would get."""
    titles = [title or item for title, item in zip(data.items["title"], data.item_ids, strict=True)]

    def entry(item: int, target: int) -> dict[str, Any]:
        if item < 0:
            title = "(empty)" if item == -1 else "(not in the catalogue)"
            return {"item_id": "", "title": title, "hit": False}
        return {"item_id": data.item_ids[item], "title": titles[item], "hit": item == target}

    return [
        {
            "user_id": data.user_ids[cases.users[case]],
            "history": [titles[item] for item in cases.histories[case][-_EVENTS:]],
            "events": len(cases.histories[case]),
            "target": titles[target],
            "lists": {
                label: [entry(int(item), target) for item in np.trim_zeros(found[case, :_SHOWN] + 1, "b") - 1]
                for label, found in lists.items()
            },
        }
        for case in cases.draw(_EXAMPLES, [seed, 5])
        for target in [int(cases.targets[case])]
    ]


def _accuracy(ranks: Mapping[str, NDArray[Any]], k: int, suffix: str = "") -> dict[str, dict[str, dict[str, float]]]:
    """Recall and NDCG at k of every recommender, from its ranks over some cases."""
    return {
        label: {f"{name}@{k}{suffix}": interval(metrics.METRICS[name](places, k)) for name in ("recall", "ndcg")}
        for label, places in ranks.items()
    }


def evaluate(
    spec: str | Path | Spec,
    data: Dataset | None = None,
    *,
    name: str | None = None,
    workspace: str | Path | None = None,
    assignments: Sequence[str] = (),
    device: str = "cpu",
    dtype: str = "float32",
    load: Callable[[Path], Recommender] | None = None,
    against: Sequence[str | Path] = (),
    tune_baselines: bool = False,
) -> Report:
    """Evaluate as a spec says.

    Args:
        spec: A spec file, or a ``Spec``.
        data: The data set; read from the spec's ``data`` folder where it is not given.
        name: Of the report; the spec file's name where it is not given.
        workspace: What relative paths are relative to; the folder above the spec's where it is not given.
        assignments: ``key=value`` changes to a spec file.
        device, dtype: Where the models of the adapters run, and the type of their weights: see ``Recommender.load``.
        load: How an adapter folder becomes a recommender; unset: ``Recommender.load`` with the spec's engine. Each is
            closed before the next one is loaded.
        against: Files of lists to score beside the spec's own, relative to the current folder.
        tune_baselines: Choose the options of each baseline on the validation cases, and keep the choice in
            ``NAME.tuned.json`` of the workspace's ``eval/results`` (of ``results`` beside a spec file); evaluations of
            the same training part use it from then on.

    Raises:
        ConfigError, DataError, AdapterError: See their messages.
        LeakError: An adapter was trained on something else than the training part of this split.
        EngineError: vLLM, where it is the engine, died or stopped answering.
    """
    if isinstance(spec, Spec):
        name, root = name or "evaluation", Path(workspace or Path.cwd())
        results = root / "eval" / "results"
    else:
        path = Path(spec)
        spec = load_spec(path, assignments)
        name, root = name or path.stem, Path(workspace or workspace_of(path))
        results = path.parent / "results"
    if load is None and spec.adapters:
        check_engine(spec.engine, device)  # Before baselines are fitted.
    loader = load or partial(Recommender.load, engine=spec.engine, device=device, dtype=dtype, vllm=spec.vllm)
    for baseline in spec.baselines:
        if baseline not in BASELINES:
            raise ConfigError(f"spec: unknown baseline {baseline!r}. {suggestion(baseline, BASELINES)}")
    brought = [(root / file, file) for file in spec.against] + [(Path(file), str(file)) for file in against]
    names = [file.name.removesuffix(".gz").rpartition(".")[0] or file.name for file, _ in brought]
    labels = [*spec.baselines, *names, *spec.adapters]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"spec: two recommenders are both called {label!r}. Rename the adapter or the file.")
    data = data or Dataset.load(root / spec.data)
    split = data.split(spec.split, ties=spec.ties, seed=spec.split_seed)
    split.check()
    if not len(split.test):
        raise DataError(f"{spec.data}: the split {spec.split} leaves no test case (users need 3 interactions or more).")
    if tune_baselines and not len(split.valid):
        raise DataError(f"{spec.data}: the split {spec.split} leaves no validation case to tune baselines on.")
    places = split.test.draw(spec.users, [spec.seed, 4])
    cases = split.test.take(places)
    exclude_seen = bool(data.manifest["exclude_seen"]) if spec.exclude_seen is None else spec.exclude_seen
    users = features.interaction_matrix(split.train, len(data.items))
    popularity = np.bincount(users.indices, minlength=len(data.items))
    background = metrics.Background(
        popularity, sum(len(history) > 0 for history in split.train), features.text(data.items), cases.histories
    )
    cold = np.flatnonzero(popularity[cases.targets] == 0)
    setting = _Setting(spec, data, cases, exclude_seen, cold, popularity == 0)

    # Files of lists first: what is wrong with one should be known before an hour of decoding.
    foreign = {
        label: read_lists(file, data, cases.users, cases.histories, max(spec.k), shown=shown)
        for label, (file, shown) in zip(names, brought, strict=True)
    }
    k = preferred(spec.k)
    for one in foreign.values():
        filled = (one.lists[:, :k] != -1).sum(axis=1)
        if short := int(((filled > 0) & (filled < k)).sum()):
            one.told["short_lists"] = {"users": short, "k": k}
    lists: dict[str, Lists] = {}
    among_cold: dict[str, Lists] = {}
    told: dict[str, dict[str, Any]] = {"baselines": {}, "adapters": {}}
    questions: dict[str, dict[str, dict[str, Any]]] = {question.prompt: {} for question in spec.questions}
    fitted = _fitted(
        spec.baselines, split.train, split.valid, data.items, _tuned_on(split, data, exclude_seen),
        results / f"{name}.tuned.json", tune_baselines,
    )  # fmt: skip
    for label, (made, options) in fitted.items():
        told["baselines"][label] = options
        lists[label], among_cold[label] = _baseline_lists(made, label, setting)
    lists |= {label: found.lists for label, found in foreign.items()}
    for label, folder in spec.adapters.items():
        with closing(loader(root / folder)) as recommender:  # Two engines may not fit into one memory.
            lists[label], among_cold[label] = _adapter_lists(recommender, label, setting, split)
            for question in spec.questions:
                questions[question.prompt][label] = ask(recommender, question, data, split, places)
        manifest = recommender.adapter.manifest
        told["adapters"][label] = {
            "folder": folder,
            "hash": recommender.adapter.hash,
            "tuning": manifest["tuning"],
            "identifiers": manifest["identifiers"]["scheme"],
            "prompt": recommender.adapter.prompt.name,
            "max_length": manifest["max_length"],
            "base": manifest["base"]["name"],
            "seed": manifest["recipe"]["seed"],
            "kept": manifest["kept"],
        }
    protocol = {
        "data": spec.data,
        "data_hash": data.hash,
        "positives": data.manifest.get("positives"),
        **split.protocol,
        "cases": len(cases),
        "cases_drawn": {"users": spec.users, "seed": spec.seed} if len(cases) < len(split.test) else "all",
        "targets_seen_before": sum(
            int(target in history) for target, history in zip(cases.targets, cases.histories, strict=True)
        ),
        "catalogue": len(data.items),
        "ranking": "full catalogue, item level",
        "exclude_seen": exclude_seen,
        "num_beams": spec.num_beams,
        "equal_scores": "the item that stands first in the catalogue wins",
        "filled_timestamps": data.manifest.get("filled_timestamps", 0),
        "scoring": "sum of log-probabilities of the identifier's tokens over the whole vocabulary",
        **told,
        "against": {label: found.told for label, found in foreign.items()},
        "versions": versions() | ({"vllm": vllm_version()} if spec.engine == "vllm" and spec.adapters else {}),
    }
    kinds = dict.fromkeys(spec.baselines, "baseline") | dict.fromkeys(foreign, "against")
    kinds |= dict.fromkeys(spec.adapters, "adapter")
    rows = {}
    with progress.bar("measuring", len(lists)) as advance:
        for label, found in lists.items():
            rows[label] = measure(found, cases.targets, spec.k, background)
            advance()
    ranks = {label: metrics.ranks(found, cases.targets) for label, found in lists.items()}
    parts = {
        title: {
            part: {
                "cases": int(mask.sum()),
                "share": float(mask.mean()),
                "rows": _accuracy({label: found[mask] for label, found in ranks.items()}, k),
            }
            for part, mask in masks.items()
        }
        for title, masks in segments(cases.histories, cases.targets, popularity, data.items).items()
    }
    others = [label for label in lists if label not in spec.adapters]
    pairs = [(adapter, other) for adapter in spec.adapters for other in others]
    return Report(
        name=name,
        spec=as_table(spec),
        protocol=protocol,
        kinds=kinds,
        rows=rows,
        segments=parts,
        cold=_cold(ranks, among_cold, setting, k),
        tests=paired_tests(ranks, ranks, pairs, k) if pairs else [],
        examples=_shown_examples(lists, cases, data, spec.seed),
        questions=questions,
        lists=lists,
        cases=pl.concat(
            pl.DataFrame(
                {
                    "user_id": [data.user_ids[user] for user in cases.users],
                    "target": [data.item_ids[target] for target in cases.targets],
                    "recommender": [label] * len(cases),
                    "rank": found,
                }
            )
            for label, found in ranks.items()
        ),
    )


def _cold(
    ranks: Mapping[str, NDArray[Any]], among_cold: Mapping[str, Lists], setting: _Setting, k: int
) -> dict[str, Any] | None:
    """Accuracy on the cases whose target has no training interaction, among all items and among such items alone."""
    if not len(setting.cold):
        return None
    rows = _accuracy({label: found[setting.cold] for label, found in ranks.items()}, k)
    targets = setting.cases.targets[setting.cold]
    alone = {label: metrics.ranks(found, targets) for label, found in among_cold.items()}
    for label, row in _accuracy(alone, k, " among cold").items():
        rows[label] |= row
    return {"cases": len(setting.cold), "items": int(setting.cold_items.sum()), "rows": rows}
