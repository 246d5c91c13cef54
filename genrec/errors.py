"""The exceptions that genrec raises for what a user can cause, with the exit code of each on the command line, and the
sentences that their messages share.

A message says what is wrong, the value found, where it stands, and what to do next. Anything that is not a
``GenrecError`` is a defect of genrec.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable


class GenrecError(Exception):
    """Base of all errors that a user can cause. Exit code 1."""

    exit_code = 1


class ConfigError(GenrecError):
    """A recipe, spec, flag or argument is wrong: unknown key, value out of range, missing file. Exit code 3."""

    exit_code = 3


class DataError(GenrecError):
    """Interactions, items or users are wrong: bad rows, unknown columns, an empty log. Exit code 4."""

    exit_code = 4


class LeakError(DataError):
    """Something that was to be predicted has been seen by what predicts it. Exit code 4."""


class UnknownIdError(DataError):
    """A user or an item that the data or the adapter does not know. Exit code 4."""


class PromptError(GenrecError):
    """A prompt file breaks the contract of prompts, or does not fit its variables or the budget. Exit code 5."""

    exit_code = 5


class IdentifierError(GenrecError):
    """Identifiers that are not a prefix-free bijection, or do not belong to the items at hand. Exit code 6."""

    exit_code = 6


class AdapterError(GenrecError):
    """An adapter or its base is missing, incomplete, or was changed since training. Exit code 7."""

    exit_code = 7


class DecodingError(GenrecError):
    """A request that no engine can answer: beams out of range, a prompt that is empty or too long. Exit code 8."""

    exit_code = 8


class StorageError(GenrecError):
    """A file could not be written or read: disk full, no permission, a folder in the way. Exit code 9."""

    exit_code = 9


class GateError(GenrecError):
    """What was made is whole, and further from what was there before than the thresholds allow. Exit code 10."""

    exit_code = 10


class EngineError(GenrecError):
    """An engine that runs in processes of its own died, ran out of memory or stopped answering. Exit code 11."""

    exit_code = 11


def suggestion(name: str, known: Iterable[str]) -> str:
    """The sentence that names the closest of ``known`` to ``name``, or, where none is close, the first 20 of them.

    Capitals and underscores do not count in the comparison: ``userId`` is ``user_id``.
    """
    names = sorted(str(item) for item in known)
    folded = {other.casefold().replace("_", ""): other for other in names}
    close = difflib.get_close_matches(name.casefold().replace("_", ""), folded, n=1)
    if close:
        return f"Did you mean {folded[close[0]]!r}?"
    return f"Known: {', '.join(names[:20]) or 'none'}{', ...' if len(names) > 20 else '.'}"


def closest(unknown: object, known: Collection[str], otherwise: str) -> str:
    """The sentence that names the closest of known ids, or ``otherwise``; more than 50,000 are not looked through."""
    close = suggestion(str(unknown), known) if len(known) <= 50_000 else ""
    return close if close.startswith("Did") else otherwise
