"""The sentences of a report, made from its numbers: who wins, by how much, how sure, where it loses, the protocol."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from genrec.report.numbers import (
    Rows,
    Value,
    cell,
    first_places,
    found_metric,
    headline,
    joined,
    metric_name,
    p_text,
    percent,
    ranked,
    short,
    significant,
)

Tests = Sequence[Mapping[str, Any]]


def verdict(tests: Tests, label: str, metrics: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Whom ``label`` beats, whom it cannot be told from, and to whom it loses, by its tests of ``metrics``.

    It loses where it is significantly worse by any of them, and beats where it is significantly better by all.
    """
    mine = [test for test in tests if test["a"] == label and test["metric"] in metrics]
    beaten: list[str] = []
    open_: list[str] = []
    lost: list[str] = []
    for other in dict.fromkeys(test["b"] for test in mine):
        signs = [sign(test) for test in mine if test["b"] == other]
        (lost if -1 in signs else open_ if 0 in signs else beaten).append(other)
    return beaten, open_, lost


def sign(test: Mapping[str, Any]) -> int:
    """1 where a is significantly better than b, -1 where it is significantly worse, 0 where nothing can be told."""
    if not significant(test):
        return 0
    return 1 if test["difference"] > 0 else -1


def verdict_sentence(tests: Tests, label: str, metrics: Sequence[str]) -> str:
    """The verdict as one sentence, losses first and with the metrics in which they are."""
    beaten, open_, lost = verdict(tests, label, metrics)
    by = joined([metric_name(metric) for metric in metrics])
    if not beaten + open_ + lost:
        return f"{label} was tested against nothing in this report."
    if not open_ + lost:
        others = f"each of the {len(beaten)} others" if len(beaten) > 1 else beaten[0]
        return f"{label} wins: it is significantly better than {others} in {by}."
    parts = []
    if lost:
        where = {
            other: joined([metric_name(test["metric"]) for test in tests if test["metric"] in metrics
                           and (test["a"], test["b"]) == (label, other) and sign(test) < 0])
            for other in lost
        }  # fmt: skip
        parts.append("is significantly worse than " + joined([f"{other} (in {where[other]})" for other in lost]))
    if open_:
        parts.append(f"cannot be told apart from {joined(open_)} with certainty")
    if beaten:
        parts.append(f"is significantly better than {joined(beaten)}")
    head = f"{label} does not win: it " if lost else f"{label} is not a sure winner: it "
    return head + joined(parts) + "."


def sureness(test: Mapping[str, Any]) -> str:
    """How sure a difference is, as the end of a sentence, and who is better where it is not the first."""
    told = f"(Holm-corrected {p_text(test['p_holm'])})"
    if not sign(test):
        return f"cannot be told from chance {told}"
    return f"is significant {told}" + (f": {test['b']} is better" if sign(test) < 0 else "")


def recall_sentence(first: tuple[str, Value], second: tuple[str, Value], k: int, users: str,
                    test: Mapping[str, Any] | None, note: str = "") -> str:  # fmt: skip
    """Two shares of hits and their difference.

    Args:
        first, second: Name and recall@k.
        k: The cut-off.
        users: What the shares are of.
        test: The paired test of first minus second, where there is one.
        note: What to say of the second.
    """
    shares = [value["mean"] for _, value in (first, second)]
    text = (
        f"{first[0]} finds the next item {first_places(k)} for {percent(shares[0])} of {users}, "
        f"{second[0]}{note} for {percent(shares[1])}; "
    )
    points = f"{100 * abs(shares[0] - shares[1]):.1f} points"
    if test is None:
        return text + f"they differ by {points}, and no paired test was made."
    between = f"95% interval {100 * test['low']:+.1f} to {100 * test['high']:+.1f}"
    return text + f"the difference of {points} ({between}) {sureness(test)}."


def ndcg_sentence(first: tuple[str, Value], second: tuple[str, Value], k: int, test: Mapping[str, Any] | None) -> str:
    """Two values of NDCG@k and their difference; the arguments are as in ``recall_sentence``."""
    text = (
        f"By NDCG@{k}, which counts a hit the more the higher it stands, {first[0]} has {short(first[1]['mean'])} "
        f"and {second[0]} {short(second[1]['mean'])}"
    )
    if test is None:
        return text + "."
    return text + f"; the difference of {short(test['difference'], signed=True)} {sureness(test)}."


def summary(rows: Rows, kinds: Mapping[str, str], tests: Tests, cases: int) -> list[str]:
    """Who wins, by how much, how sure: the first sentence is the one to remember."""
    k = headline(rows)
    recall, ndcg = f"recall@{k}", f"ndcg@{k}"
    users = f"{cases:,} users"
    adapters = [label for label in ranked(rows, ndcg) if kinds[label] == "adapter"]
    others = [label for label in ranked(rows, ndcg) if kinds[label] != "adapter"]
    if len(rows) == 1 or not adapters:
        best = ranked(rows, recall)[0]
        value = rows[best].get(recall)
        found = "was measured" if value is None else (
            f"finds the next item {first_places(k)} for {percent(value['mean'])} of {users}"
            + (f" (95% interval {percent(value['low'])} to {percent(value['high'])})" if "low" in value else "")
        )  # fmt: skip
        if len(rows) == 1:
            return [f"{best} {found}.", "There is nothing to compare it with in this report, so nobody wins."]
        return [
            f"{best} has the highest {metric_name(recall)} of {len(rows)} recommenders: it {found}.",
            "This report holds no adapter, so no paired test was made; where two intervals overlap, do not conclude "
            "that one is better.",
        ]
    best = adapters[0]
    metrics = [metric for metric in (recall, ndcg) if any(test["metric"] == metric for test in tests)]
    metrics = metrics or list(dict.fromkeys(test["metric"] for test in tests))
    if others:
        out = [verdict_sentence(tests, best, metrics)]
    else:
        out = [
            f"{best} has the highest {metric_name(ndcg)} of {len(adapters)} adapters; no baseline is in this report, "
            "so it does not say whether they are good."
        ]
        others, tests = adapters[1:], []
    note = ", the best of the others by this measure," if len(others) > 1 else ""
    for metric in (recall, ndcg):
        known = [label for label in ranked(rows, metric) if label in others and metric in rows[label]]
        if not known or metric not in rows[best]:
            continue
        first, second = (best, rows[best][metric]), (known[0], rows[known[0]][metric])
        test = next((x for x in tests if (x["metric"], x["a"], x["b"]) == (metric, best, known[0])), None)
        out.append(
            recall_sentence(first, second, k, users, test, note)
            if metric == recall
            else ndcg_sentence(first, second, k, test)
        )
    if len(adapters) > 1 and tests:
        out += [verdict_sentence(tests, label, metrics) for label in adapters[1:]]
        out.append(
            f"{best} is named first because it has the highest {metric_name(ndcg)} of {len(adapters)} adapters on the "
            "test cases; they are not tested against each other here (`genrec eval --compare NAME NAME` does). Choose "
            "between adapters by validation: the best of several on test is flattered by chance."
        )
    return out


def cautions(protocol: Mapping[str, Any], segments: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What one must know before one compares: an adapter that learnt nothing, users without any history, lists that
    are short, missing, or name what users had."""
    out = [
        f"{label} kept the weights that its training began with (step 0): it holds nothing that training learnt."
        for label, told in (protocol.get("adapters") or {}).items()
        if (told.get("kept") or {}).get("step") == 0
    ]
    without = segments.get("history length", {}).get("0")
    if without and without["share"] >= 0.1:
        out.append(
            f"{without['cases']:,} of the users ({percent(without['share'])}) have no history. What is found for them "
            "says nothing of how histories are read: see By history length for the others."
        )
    for label, told in (protocol.get("against") or {}).items():
        if missing := told.get("users_without_list"):
            out.append(f"{missing:,} users have no list of {label}; each counts as missed.")
        if short := told.get("short_lists"):
            out.append(f"{short['users']:,} lists of {label} have fewer than {short['k']} places; the rest misses.")
        seen, places = told.get("places_in_history") or 0, told.get("places") or 0
        if seen and places and protocol.get("exclude_seen"):
            out.append(
                f"{seen:,} of the {places:,} places of {label} ({percent(seen / places)}) name items that the user had "
                "before, which the lists made here leave out. With other items in their place it could stand higher."
            )
    return out


def losses(segments: Mapping[str, Mapping[str, Any]], kinds: Mapping[str, str], k: int) -> tuple[list[str], list[str]]:
    """The segments in which an adapter's interval of recall@k lies below another recommender's, as sentences, and the
    names of the further ones in which its mean is below while the intervals overlap."""
    sure, open_ = [], []
    for title, parts in segments.items():
        for part, found in parts.items():
            rows = found["rows"]
            names = {label: metric for label in rows if (metric := found_metric(rows[label], "recall", k)) is not None}
            values = {label: rows[label][metric] for label, metric in names.items()}
            others = sorted((label for label in values if kinds[label] != "adapter"), key=lambda o: -values[o]["mean"])
            for label in values if others and found["cases"] else ():
                if kinds[label] != "adapter":
                    continue
                mine = values[label]
                above = [o for o in others if mine.get("high", mine["mean"]) < values[o].get("low", values[o]["mean"])]
                where = f"{title}: {part}"
                if above:
                    more = f" (and below {joined(above[1:])})" if above[1:] else ""
                    sure.append(
                        f"{where} ({found['cases']:,} users, {found['share']:.1%}): {label} {cell(mine)} is below "
                        f"{above[0]} {cell(values[above[0]])} in {metric_name(names[label])}{more}."
                    )
                elif values[others[0]]["mean"] > mine["mean"]:
                    open_.append(f"{where} ({label} below {others[0]})")
    return sure, open_


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _day(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _options(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_json(value)}" for name, value in options.items()) or "none"


def _positives(positives: Mapping[str, Any] | None) -> str:
    if not positives or (positives.get("min_rating") is None and not positives.get("events")):
        return "every interaction of the log counts as one the user wanted"
    parts = []
    if positives.get("min_rating") is not None:
        parts.append(f"ratings of at least {positives['min_rating']:g}")
    if positives.get("events"):
        parts.append(f"events of the kinds {_json(positives['events'])}")
    return " and ".join(parts)


def _baseline(label: str, told: Any) -> str:
    # `settings` lists what tuning tried.
    if not isinstance(told, Mapping) or "tuned" not in told:
        return f"Baseline {label}: {_json(told)}."
    tried = len(told.get("settings") or ())
    how = (
        f"tuned on validation ({tried} settings tried, all in the JSON file)" if told["tuned"]
        else "default settings, not tuned" if told.get("options") else "nothing to tune"
    )  # fmt: skip
    return f"Baseline {label}: {how}; options: {_options(told.get('options') or {})}."


def _against(label: str, told: Mapping[str, Any]) -> str:
    facts = [f"{told['rows']:,} rows"] if "rows" in told else []
    if "users_without_list" in told:
        facts.append(f"{told['users_without_list']:,} users of the test cases have no list, which counts as a miss")
    if "unknown_items" in told:
        facts.append(f"{told['unknown_items']:,} places name items that the catalogue does not have")
    rest = {
        name: value
        for name, value in told.items()
        if name not in ("file", "sha256", "rows", "users_without_list", "unknown_items")
    }
    facts += [f"{name.replace('_', ' ')}: {_json(value)}" for name, value in rest.items()]
    stamp = f" (SHA-256 {told['sha256']})" if "sha256" in told else ""
    return f"List brought by the user, {label}: {told.get('file', 'no file named')}{stamp}; {'; '.join(facts)}."


def protocol(protocol: Mapping[str, Any], spec: Mapping[str, Any]) -> list[str]:
    """The protocol in sentences. What has no sentence of its own is given as it is, so that nothing is left out."""
    p = dict(protocol)
    out = [f"Data: {p.pop('data', spec.get('data', 'not named'))}, hash {p.pop('data_hash', 'not known')}."]
    out.append(f"What is a positive: {_positives(p.pop('positives', None))}.")
    kind = p.pop("split", None)
    if kind == "leave_one_out":
        out.append(
            "Split: leave one out. The last event of each user with three or more is the test case, the one before it "
            "is for validation, and all earlier ones are for training."
        )
    elif kind == "temporal":
        text = "Split: global and temporal."
        if "valid_time" in p and "test_time" in p:
            text += (
                f" Training ends at {_day(p.pop('valid_time'))}, test begins at {_day(p.pop('test_time'))}; "
                f"{percent(p.pop('valid_fraction', 0.0))} of the events are in the validation period and "
                f"{percent(p.pop('test_fraction', 0.0))} in the test period."
            )
        out.append(text + " The test case of a user is the first event of the test period.")
    else:
        out.append(f"Split: {kind}.")
    ties, seed = p.pop("ties", None), p.pop("seed", None)
    out.append(
        f"Order within equal timestamps: shuffled with seed {seed}." if ties == "shuffled"
        else "Order within equal timestamps: as in the file." if ties == "file"
        else f"Order within equal timestamps: {ties}."
    )  # fmt: skip
    if p.get("order") is not None:
        order = p.pop("order")
        known = {"timestamp": "by timestamp", "order": "by the column order", "file": "as in the file"}
        out.append(f"Order of the events of a user: {known.get(order, order)}.")
    drawn, cases = p.pop("cases_drawn", "all"), p.pop("cases", None)
    count = "not known" if cases is None else f"{cases:,}"
    out.append(
        f"Test cases: {count}, one a user, "
        + ("all that the split has." if drawn == "all" else f"drawn with seed {drawn['seed']}.")
    )
    again = p.pop("targets_seen_before", None)
    seen = p.pop("exclude_seen", None)
    note = f" {again:,} targets are items that the user had before" if again else ""
    if seen:
        out.append("Seen items: items of the history are left out of every list that was made here."
                   + (note + ", so no list can hold them." if again else ""))  # fmt: skip
    elif seen is not None:
        out.append("Seen items: lists may hold items of the history." + (note + "." if again else ""))
    ranking, size = p.pop("ranking", "not stated"), p.pop("catalogue", None)
    out.append(f"Ranking: {ranking}" + (f", over {size:,} items." if size is not None else "."))
    if "equal_scores" in p:
        out.append(f"Equal scores: {p.pop('equal_scores')}.")
    beams = p.pop("num_beams", None)
    adapters, scoring = p.pop("adapters", {}) or {}, p.pop("scoring", None)
    if adapters:
        out.append(f"Adapters: {beams} beams" + (f"; the score of an item is the {scoring}." if scoring else "."))
    for label, told in adapters.items():
        out.append(f"Adapter {label}: {_options(told)}.")
    for label, told in (p.pop("baselines", {}) or {}).items():
        out.append(_baseline(label, told))
    for label, told in (p.pop("against", {}) or {}).items():
        out.append(_against(label, told))
    out.append(
        "Uncertainty: intervals are 95% bootstrap intervals over users. Differences are paired over the same users; "
        "p-values are corrected by Holm's method over all tests of a metric, and below .05 a difference is called "
        "significant."
    )
    seeds = {name: spec[name] for name in ("seed", "split_seed") if name in spec}
    if seeds:
        out.append(f"Seeds of the spec: {_options(seeds)}.")
    versions = p.pop("versions", None)
    if isinstance(versions, Mapping):
        out.append("Versions: " + ", ".join(f"{name} {value}" for name, value in versions.items()) + ".")
    out += [f"{name.replace('_', ' ').capitalize()}: {_json(value)}." for name, value in p.items() if value is not None]
    return out
