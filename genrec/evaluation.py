"""Evaluation: full-catalogue ranking at item level of adapters and baselines on one split, and the report of it.

Every list is scored by the same metrics on the same cases, and the report states the protocol: data hash, split,
order within equal timestamps, what is a positive, whether seen items are left out, beams, versions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from genrec import files, metrics, progress
from genrec.adapter import versions
from genrec.baselines import BASELINES
from genrec.baselines import recommend as recommend_baseline
from genrec.config import Spec, as_table, load_spec, suggestion, workspace_of
from genrec.dataset import Dataset
from genrec.errors import ConfigError, DataError, LeakError
from genrec.recommender import Recommender
from genrec.splits import Split

_CHUNK = 256  # Users per call of an engine, so that the progress bar moves.


@dataclass(frozen=True)
class Report:
    """What an evaluation found.

    Attributes:
        name: Of the spec.
        spec: The spec as tables.
        protocol: What was measured, and how.
        rows: Name of a recommender -> ``{"recall@10": {"mean": ..., "low": ..., "high": ...}, ...}`` with 95% bootstrap
            intervals over users, and ``coverage@k`` with a mean alone.
        lists: Name of a recommender -> int32 [cases, max(k)] item indices, padded with -1.
    """

    name: str
    spec: dict[str, Any]
    protocol: dict[str, Any]
    rows: dict[str, dict[str, dict[str, float]]]
    lists: dict[str, np.ndarray]

    def markdown(self) -> str:
        """The table and the protocol as Markdown."""
        columns = list(next(iter(self.rows.values())))
        lines = [f"# {self.name}", "", "| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for name, row in self.rows.items():
            lines.append(f"| {name} | " + " | ".join(cell(row[column]) for column in columns) + " |")
        lines += ["", "Means over test cases, with 95% bootstrap intervals over users.", ""]
        lines += [f"- {key}: {json.dumps(value, ensure_ascii=False)}" for key, value in self.protocol.items()]
        return "\n".join(lines) + "\n"

    def save(self, folder: Path) -> Path:
        """Write ``NAME.json`` and ``NAME.md`` into ``folder``; returns the Markdown file."""
        table = {"name": self.name, "spec": self.spec, "protocol": self.protocol, "rows": self.rows}
        files.write_text(folder / f"{self.name}.json", json.dumps(table, indent=1, ensure_ascii=False) + "\n")
        files.write_text(folder / f"{self.name}.md", self.markdown())
        return folder / f"{self.name}.md"


def cell(value: dict[str, float]) -> str:
    """One metric as text: ``.1234 [.1100, .1360]``, or the mean alone where there is no interval."""

    def short(number: float) -> str:
        return f"{number:.4f}".removeprefix("0")

    return short(value["mean"]) + (f" [{short(value['low'])}, {short(value['high'])}]" if "low" in value else "")


def measure(
    recommended: np.ndarray, targets: np.ndarray, ks: Sequence[int], n_items: int
) -> dict[str, dict[str, float]]:
    """Every metric at every cut-off of ranked lists int32 [cases, n], padded with -1: mean and 95% interval."""
    place = metrics.ranks(recommended, targets)
    row: dict[str, dict[str, float]] = {}
    for name, metric in metrics.METRICS.items():
        for k in ks:
            values = metric(place, k)
            low, high = metrics.bootstrap(values)
            row[f"{name}@{k}"] = {"mean": float(values.mean()), "low": float(low), "high": float(high)}
    for k in ks:
        row[f"coverage@{k}"] = {"mean": float(metrics.coverage(recommended, k, n_items))}
    return row


def _adapter_lists(
    recommender: Recommender, data: Dataset, split: Split, cases: np.ndarray, spec: Spec, exclude_seen: bool, name: str
) -> np.ndarray:
    """The lists of an adapter for the chosen test cases: int32 [cases, max(k)]."""
    manifest = recommender.adapter.manifest
    if manifest["fitted_on"] != split.train_hash:
        raise LeakError(
            f"adapter {name!r} was trained on other interactions ({manifest['fitted_on'][:16]}) than the training part "
            f"of this split ({split.train_hash[:16]}), so it may have seen what is to be predicted. Use the split of "
            f"its recipe ({json.dumps(manifest['protocol'])}), or train it on this one."
        )
    given = [] if data.users is None else data.users.columns
    for problem in recommender.adapter.prompt.check(user_columns=given):
        raise DataError(f"adapter {name!r}, prompt {recommender.adapter.prompt.name}: {problem}")
    if recommender.item_ids != data.item_ids:
        raise DataError(f"adapter {name!r} knows another catalogue than {spec.data}. Train it on this data set.")
    lists = []
    with progress.bar(f"evaluating {name}", len(cases)) as advance:
        for start in range(0, len(cases), _CHUNK):
            chunk = cases[start : start + _CHUNK]
            users = None if data.user_rows is None else [data.user_rows[split.test.users[case]] for case in chunk]
            found = recommender.search(
                [split.test.histories[case] for case in chunk],
                max(spec.k), num_beams=spec.num_beams, exclude_seen=exclude_seen, users=users,
            )  # fmt: skip
            padded = np.full((len(chunk), max(spec.k)), -1, dtype=np.int32)
            padded[:, : found.items.shape[1]] = found.items
            lists.append(padded)
            advance(len(chunk))
    return np.concatenate(lists)


def evaluate(
    spec: str | Path | Spec,
    data: Dataset | None = None,
    *,
    name: str | None = None,
    workspace: str | Path | None = None,
    assignments: Sequence[str] = (),
    load: Callable[[Path], Recommender] = Recommender.load,
) -> Report:
    """Evaluate as a spec says.

    Args:
        spec: A spec file, or a ``Spec``.
        data: The data set; read from the spec's ``data`` folder where it is not given.
        name: Of the report; the spec file's name where it is not given.
        workspace: What relative paths are relative to; the folder above the spec's where it is not given.
        assignments: ``key=value`` changes to a spec file.
        load: How an adapter folder becomes a recommender.

    Raises:
        ConfigError, DataError, AdapterError: See their messages.
        LeakError: An adapter was trained on something else than the training part of this split.
    """
    if isinstance(spec, Spec):
        name, root = name or "evaluation", Path(workspace or Path.cwd())
    else:
        path = Path(spec)
        spec = load_spec(path, assignments)
        name, root = name or path.stem, Path(workspace or workspace_of(path))
    for baseline in spec.baselines:
        if baseline not in BASELINES:
            raise ConfigError(f"spec: unknown baseline {baseline!r}. {suggestion(baseline, BASELINES)}")
    clash = set(spec.baselines) & set(spec.adapters)
    if clash:
        raise ConfigError(f"spec: an adapter and a baseline are both called {sorted(clash)[0]!r}. Rename the adapter.")
    data = data or Dataset.load(root / spec.data)
    split = data.split(spec.split, ties=spec.ties, seed=spec.split_seed)
    split.check()
    if not len(split.test):
        raise DataError(f"{spec.data}: the split {spec.split} leaves no test case (users need 3 interactions or more).")
    cases = split.test.draw(spec.users, [spec.seed, 4])
    exclude_seen = bool(data.manifest["exclude_seen"]) if spec.exclude_seen is None else spec.exclude_seen
    targets = split.test.targets[cases]
    histories = [split.test.histories[case] for case in cases]

    lists: dict[str, np.ndarray] = {}
    told: dict[str, Any] = {}
    parameters: dict[str, Any] = {}
    for baseline in spec.baselines:
        fitted = BASELINES[baseline]().fit(split.train, data.items)
        parameters[baseline] = fitted.parameters
        lists[baseline] = recommend_baseline(fitted, histories, max(spec.k), exclude_seen=exclude_seen)
    for label, folder in spec.adapters.items():
        recommender = load(root / folder)
        lists[label] = _adapter_lists(recommender, data, split, cases, spec, exclude_seen, label)
        manifest = recommender.adapter.manifest
        told[label] = {
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
        "targets_seen_before": sum(int(target in history) for target, history in zip(targets, histories, strict=True)),
        "catalogue": len(data.items),
        "ranking": "full catalogue, item level",
        "exclude_seen": exclude_seen,
        "num_beams": spec.num_beams,
        "equal_scores": "the item that stands first in the catalogue wins",
        "filled_timestamps": data.manifest.get("filled_timestamps", 0),
        "scoring": "sum of log-probabilities of the identifier's tokens over the whole vocabulary",
        "baselines": parameters,
        "adapters": told,
        "versions": versions(),
    }
    rows = {label: measure(found, targets, spec.k, len(data.items)) for label, found in lists.items()}
    return Report(name, as_table(spec), protocol, rows, lists)
