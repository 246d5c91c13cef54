"""Two prompts beside each other: what changes in the text of real users, in tokens, and in what an adapter gets right.

The adapter was trained with one of them, or with neither: what it gets right with another prompt says how much it minds
the change, not how good the other would be after training.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, Literal

import numpy as np

from genrec import export, metrics, progress
from genrec.errors import ConfigError
from genrec.prompts import Prompt
from genrec.rendering import Rendered, Setting
from genrec.significance import interval
from genrec.tokenization import Span

COUNTS = ("read", "head", "history", "answer", "events cut")
Piece = tuple[Literal["same", "removed", "added"], str]


@dataclass(frozen=True)
class Pair:
    """One user's last choice, with the events before it, rendered through both prompts."""

    user_id: str
    a: Rendered
    b: Rendered

    def pieces(self, around: int | None = None) -> list[Piece]:
        """The text of both as runs of words that are the same, removed (only in a) or added (only in b).

        An arrow stands before the answer. ``around`` shortens what is the same to about so many characters beside
        every change, at whole words.
        """
        old, new = _words(self.a), _words(self.b)
        pieces: list[Piece] = []
        for operation, *bounds in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
            removed, added = old[bounds[0] : bounds[1]], new[bounds[2] : bounds[3]]
            if operation == "equal":
                if around is not None:
                    first, last = not (bounds[0] or bounds[2]), bounds[1:4:2] == [len(old), len(new)]
                    removed = _shortened(removed, around, after=not first, before=not last)
                pieces.append(("same", "".join(removed)))
            else:
                pieces += [("removed", "".join(removed))] if removed else []
                pieces += [("added", "".join(added))] if added else []
        return pieces


@dataclass(frozen=True)
class Difference:
    """What changes from prompt ``a`` to prompt ``b``.

    Attributes:
        a, b: Their files.
        same_contract: Whether the model sees the same: the files differ in comments and space that is dropped, at most.
        pairs: The users that were sampled.
        tokens: Of "read", "head", "history", "answer" and "events cut" the means over the users: ``a``, ``b`` and
            ``change``.
        ndcg: Validation NDCG@10 of the adapter with each, where it was measured: ``a``, ``b``, and ``change``, ``low``
            and ``high``, the mean of the paired differences and its 95% interval; ``cases``, their number.
        not_as_trained: Which of "a" and "b" the adapter was not trained with, of those that were measured.
        notes: What looks wrong in the prompts, and what could not be shown, and why.
    """

    a: str
    b: str
    same_contract: bool
    pairs: list[Pair]
    tokens: dict[str, dict[str, float]]
    ndcg: dict[str, float] | None = None
    not_as_trained: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def difference(
    a: str | Path,
    b: str | Path,
    adapter: str | Path | None = None,
    *,
    data: str | Path | None = None,
    base: str | None = None,
    max_length: int | None = None,
    users: int = 100,
    seed: int = 0,
    measured: bool | None = None,
    device: str = "cpu",
) -> Difference:
    """Compare two prompt files on users of a data set.

    Args:
        a, b: The prompt files.
        adapter, data, base, max_length: What they are rendered with: see ``rendering.Setting.of``.
        users: How many are sampled, at most. Each is rendered with the events before the last one, which is the answer.
        seed: Of the sample.
        measured: Whether validation NDCG@10 is measured with both; unset: where an adapter is given and both are
            sequence prompts. Nothing is written.
        device: Where the model then runs, as PyTorch names it.

    Raises:
        ConfigError: As ``Setting.of`` says, or NDCG@10 is asked of no adapter or of a question prompt.
        DataError: NDCG@10 is asked, and ``data`` is not what the adapter was trained on.
        PromptError: A prompt is none, or does not fit.
    """
    setting = Setting.of(adapter, data=data, base=base, max_length=max_length)
    prompts = [Prompt.load(path) for path in (a, b)]
    asks = [prompt.name for prompt in prompts if prompt.kind == "question"]
    if measured is None:
        measured = setting.adapter is not None and not asks
    elif measured and (setting.adapter is None or asks):
        why = f"{asks[0]} is a question" if asks else "no adapter was given"
        raise ConfigError(f"NDCG@10 is measured of an adapter with two sequence prompts, and {why}. Do not measure.")
    if users < 1:
        raise ConfigError(f"users is {users}. At least one is sampled.")

    both = zip((a, b), prompts, strict=True)
    notes = list(dict.fromkeys(f"{path}:{problem}" for path, one in both for problem in setting.problems(one)))
    ids = setting.dataset.user_ids
    chosen = np.sort(np.random.default_rng(seed).permutation(len(ids))[:users])
    pairs = []
    for user in (ids[place] for place in chosen.tolist()):
        old, new = (setting.case(prompt, user) for prompt in prompts)
        if old is not None and new is not None:
            pairs.append(Pair(user, old, new))
    if len(pairs) < len(chosen):
        notes.append(f"{len(chosen) - len(pairs)} of {len(chosen)} users are not asked: their last event has no answer")
    result: dict[str, Any] = {"notes": notes}
    if measured:
        result |= _measured(setting, prompts, data, device)
    return Difference(
        str(a), str(b), prompts[0].contract == prompts[1].contract, pairs, _tokens(pairs) if pairs else {}, **result
    )


def _tokens(pairs: Sequence[Pair]) -> dict[str, dict[str, float]]:
    counts = np.array([[_counts(pair.a), _counts(pair.b)] for pair in pairs], dtype=np.float64).mean(axis=0)
    return {
        name: {"a": float(old), "b": float(new), "change": float(new - old)}
        for name, old, new in zip(COUNTS, *counts, strict=True)
    }


def _counts(one: Rendered) -> list[int]:
    told = one.tokens
    return [told["head"] + told["history"], told["head"], told["history"], told["answer"], one.cut]


def _measured(setting: Setting, prompts: Sequence[Prompt], data: str | Path | None, device: str) -> dict[str, Any]:
    """NDCG@10 with both prompts on the same validation cases."""
    from genrec.engines.local import LocalEngine

    adapter = setting.adapter
    assert adapter is not None
    sets = export.validation_sets(adapter, setting.tokenization, prompts, data)
    model: Any = adapter.model(setting.tokenization)
    try:
        engine = LocalEngine(model.to(device))
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device is {device!r}, and PyTorch refused it: {error}") from error
    progress.say(f"validation: {len(sets[0].targets)} cases through each prompt")
    values = [metrics.METRICS["ndcg"](cases.ranks(engine), 10) for cases in sets]
    change = interval(values[1] - values[0])
    return {
        "ndcg": {
            "a": float(values[0].mean()), "b": float(values[1].mean()), "change": change["mean"],
            "low": change["low"], "high": change["high"], "cases": len(values[0]),
        },
        "not_as_trained": [
            name for name, prompt in zip("ab", prompts, strict=True) if prompt.contract != adapter.prompt.contract
        ],
    }  # fmt: skip


def _words(one: Rendered) -> list[str]:
    """The whole text in words, spaces and signs; an identifier, and what the chat template puts in, stand whole."""
    words: list[str] = []
    for span in [*one.read, *([Span("frame", " → ", []), *one.answer] if one.answer else [])]:
        words += [span.text] if span.kind in ("identifier", "frame") else re.findall(r"\w+|\s+|[^\w\s]", span.text)
    return words


def _shortened(words: list[str], around: int, *, after: bool, before: bool) -> list[str]:
    """What stands next to the changes ``after`` and ``before`` which the words come; where there are none, the ends."""
    ends = np.cumsum([len(word) for word in words])
    head = int(np.searchsorted(ends, around)) + 1 if after or not before else 0
    tail = int(np.searchsorted(ends[-1] - ends[::-1], around)) if before or not after else 0
    return words if head + tail + 1 >= len(words) else [*words[:head], " … ", *words[len(words) - tail :]]
