"""Evaluation: full-catalogue ranking at item level of adapters and baselines on one split, the answers of adapters to
questions about the test events, and the report of it.

Every list is scored by the same metrics on the same cases, and the report states the protocol: data hash, split,
order within equal timestamps, what is a positive, whether seen items are left out, beams, versions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from genrec import files, metrics, progress
from genrec.adapter import versions
from genrec.baselines import BASELINES
from genrec.baselines import recommend as recommend_baseline
from genrec.config import Question, Spec, as_table, load_spec, suggestion, workspace_of
from genrec.dataset import Dataset
from genrec.errors import ConfigError, DataError, LeakError
from genrec.recommender import Recommender
from genrec.splits import Split
from genrec.tokenization import event_answers

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
        questions: Name of a prompt -> name of an adapter -> what ``ask`` found.
        lists: Name of a recommender -> int32 [cases, max(k)] item indices, padded with -1.
    """

    name: str
    spec: dict[str, Any]
    protocol: dict[str, Any]
    rows: dict[str, dict[str, dict[str, float]]]
    lists: dict[str, np.ndarray]
    questions: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)

    def markdown(self) -> str:
        """The table and the protocol as Markdown."""
        columns = list(next(iter(self.rows.values())))
        lines = [f"# {self.name}", "", "| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for name, row in self.rows.items():
            lines.append(f"| {name} | " + " | ".join(cell(row[column]) for column in columns) + " |")
        lines += ["", "Means over test cases, with 95% bootstrap intervals over users.", ""]
        for prompt, found in self.questions.items():
            columns, rows = question_table(found)
            lines += [f"## {prompt}", "", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
            lines += ["| " + " | ".join(row) + " |" for row in rows]
            lines += ["", *(f"- {label}: {note}" for label, row in found.items() for note in row["notes"]), ""]
        lines += [f"- {key}: {json.dumps(value, ensure_ascii=False)}" for key, value in self.protocol.items()]
        return "\n".join(lines) + "\n"

    def save(self, folder: Path) -> Path:
        """Write ``NAME.json`` and ``NAME.md`` into ``folder``; returns the Markdown file."""
        table = {"name": self.name, "spec": self.spec, "protocol": self.protocol, "rows": self.rows}
        table["questions"] = self.questions
        files.write_text(folder / f"{self.name}.json", json.dumps(table, indent=1, ensure_ascii=False) + "\n")
        files.write_text(folder / f"{self.name}.md", self.markdown())
        return folder / f"{self.name}.md"


def cell(value: dict[str, float]) -> str:
    """One metric as text: ``.1234 [.1100, .1360]``, or the mean alone where there is no interval."""

    def short(number: float) -> str:
        return f"{number:.4f}".removeprefix("0")

    return short(value["mean"]) + (f" [{short(value['low'])}, {short(value['high'])}]" if "low" in value else "")


def question_table(found: dict[str, dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """What adapters found of one question as columns and rows of text: metrics beside what always says the same."""
    names = list(dict.fromkeys(name for row in found.values() for name in row["metrics"]))
    rows = []
    for label, row in found.items():
        shares = ", ".join(f"{answer}: {share:.1%}" for answer, share in row["shares"].items())
        cells = [cell(row["metrics"][name]) if name in row["metrics"] else "" for name in names]
        rows.append([label, *cells, f"{row['cases']:,}", shares])
    return ["", *names, "cases", "answers"], rows


def measure(
    recommended: np.ndarray, targets: np.ndarray, ks: Sequence[int], n_items: int
) -> dict[str, dict[str, float]]:
    """Every metric at every cut-off of ranked lists int32 [cases, n], padded with -1: mean and 95% interval."""
    place = metrics.ranks(recommended, targets)
    row: dict[str, dict[str, float]] = {}
    for name, metric in metrics.METRICS.items():
        for k in ks:
            row[f"{name}@{k}"] = metrics.interval(metric(place, k))
    for k in ks:
        row[f"coverage@{k}"] = {"mean": float(metrics.coverage(recommended, k, n_items))}
    return row


def ask(recommender: Recommender, question: Question, data: Dataset, split: Split, cases: np.ndarray) -> dict[str, Any]:
    """Ask an adapter about the targets of test cases: how likely it thinks each answer, beside what really was.

    The probability of an answer is its share among ``question.answers``. The history is that of the test case, the item
    its target. A case whose event gives none of the answers is left out.

    Returns:
        ``metrics``: name -> mean and interval; the names that begin with "base rate" are of always answering with the
        share of each answer in training (one more of each counted), and "mean" with the mean of training. ``cases``:
        their number. ``shares``: of each answer among them. ``notes``: what could not be measured, and why.

    Raises:
        ConfigError: The prompt asks about no event.
        DataError: The interactions lack a column that its answer reads.
    """
    result: dict[str, Any] = {"metrics": {}, "cases": 0, "shares": {}, "notes": []}
    prompt = recommender.adapter.prompts.get(question.prompt)
    if prompt is None:
        has = ", ".join(recommender.adapter.prompts)
        result["notes"].append(f"not trained with the prompt {question.prompt!r}; it has {has}")
        return result
    if prompt.subject != "event":
        raise ConfigError(f"spec: questions: the prompt {prompt.name!r} asks about no event: its answer reads none.")
    given = [] if data.users is None else data.users.columns
    for problem in prompt.check(user_columns=given, event_columns=data.events.columns):
        raise DataError(f"{recommender.adapter.path}, prompt {prompt.name}: {problem}")
    answers, tokenization = question.answers, recommender.tokenization
    places = {answer: place for place, answer in enumerate(answers)}
    trained = event_answers(prompt, split.train_events)
    told = event_answers(prompt, split.test_events[cases])
    asked = [(case, places[answer]) for case, answer in zip(cases, told, strict=True) if answer in places]
    if not asked:
        others = ", ".join(sorted(set(told) - {""})[:5]) or "none: a column that it reads is empty"
        result["notes"].append(f"no test case has one of the answers {list(answers)}; found: {others}")
        return result
    truth = np.array([place for _, place in asked])
    completions = [tokenization.answer_ids(prompt, answer) for answer in answers]
    room = tokenization.answer_room(prompt, [*trained, *answers])
    scores = np.empty((len(asked), len(answers)))
    with progress.bar(f"asking {prompt.name}", len(asked)) as advance:
        for start in range(0, len(asked), _CHUNK):
            chunk = [case for case, _ in asked[start : start + _CHUNK]]
            prompts = [
                tokenization.question_ids(
                    prompt, int(split.test.targets[case]), history=split.test.histories[case],
                    user=None if data.user_rows is None else data.user_rows[split.test.users[case]], room=room,
                )
                for case in chunk
            ]  # fmt: skip
            found = recommender.engine.score([ids for ids in prompts for _ in completions], completions * len(prompts))
            scores[start : start + len(chunk)] = found.reshape(len(chunk), -1)
            advance(len(chunk))

    counts = np.array([trained.count(answer) for answer in answers]) + 1.0
    result["cases"] = len(truth)
    result["shares"] = {answer: float((truth == place).mean()) for place, answer in enumerate(answers)}
    row = result["metrics"]
    if len(answers) == 2:
        if len(set(truth.tolist())) == 2:
            margin = scores[:, 0] - scores[:, 1]
            low, high = metrics.auc_interval(margin, truth == 0)
            row["auc"] = {"mean": float(metrics.auc(margin, truth == 0)), "low": low, "high": high}
        else:
            least = data.manifest["positives"]["min_rating"]
            why = "" if least is None else f"; the data set keeps ratings of at least {least:g} alone"
            result["notes"].append(f"no AUC: the answer is {answers[truth[0]]!r} in all {len(truth)} cases{why}")
    row["log-loss"] = metrics.interval(metrics.log_loss(scores, truth))
    row["base rate log-loss"] = metrics.interval(
        metrics.log_loss(np.log(counts)[None].repeat(len(truth), axis=0), truth)
    )
    if len(answers) > 2:
        row["accuracy"] = metrics.interval(scores.argmax(axis=1) == truth)
        row["base rate accuracy"] = metrics.interval(counts.argmax() == truth)
        try:
            values = np.array([float(answer) for answer in answers])
        except ValueError:
            return result
        shares = np.exp(scores - np.logaddexp.reduce(scores, axis=1)[:, None])
        row["rmse"] = _root(metrics.interval((shares @ values - values[truth]) ** 2))
        row["mean rmse"] = _root(metrics.interval((counts @ values / counts.sum() - values[truth]) ** 2))
    return result


def _root(value: dict[str, float]) -> dict[str, float]:
    return {name: float(np.sqrt(number)) for name, number in value.items()}


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
    questions: dict[str, dict[str, dict[str, Any]]] = {question.prompt: {} for question in spec.questions}
    for baseline in spec.baselines:
        fitted = BASELINES[baseline]().fit(split.train, data.items)
        parameters[baseline] = fitted.parameters
        lists[baseline] = recommend_baseline(fitted, histories, max(spec.k), exclude_seen=exclude_seen)
    for label, folder in spec.adapters.items():
        recommender = load(root / folder)
        lists[label] = _adapter_lists(recommender, data, split, cases, spec, exclude_seen, label)
        for question in spec.questions:
            questions[question.prompt][label] = ask(recommender, question, data, split, cases)
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
    return Report(name, as_table(spec), protocol, rows, lists, questions)
