"""Engines run a model. They take and return token ids and floats, and know nothing of text, items' names or files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from genrec.decoding import Beams, Bools, Ints, Trie
from genrec.errors import DecodingError


class Engine(Protocol):
    """What every engine offers. All of them give the same numbers for the same model.

    ``prompts`` and ``completions`` are sequences of token ids (int arrays [length], length >= 1).
    """

    def beam_search(
        self,
        prompts: Sequence[Ints],
        trie: Trie,
        num_beams: int,
        allowed: Bools | None = None,
        blocked: Sequence[Ints | None] | None = None,
        only: Sequence[Ints | None] | None = None,
    ) -> Beams:
        """The best items of each prompt; the restrictions are those of ``decoding.BeamSearch``.

        Raises:
            DecodingError: ``num_beams`` outside 1 .. 65,536, an empty prompt, one longer than the model's context, a
                token outside the vocabulary, or logits that are not finite.
        """
        ...

    def score(self, prompts: Sequence[Ints], completions: Sequence[Ints]) -> NDArray[np.float64]:
        """float64 [n]: the sum of log-probabilities of each completion after its prompt.

        Raises:
            DecodingError: As above, and for an empty completion.
        """
        ...


def token_arrays(
    what: str, sequences: Sequence[Ints], vocab_size: int, room: int | None = None
) -> list[NDArray[np.int64]]:
    """Check sequences of token ids and give them as int64 arrays.

    Args:
        what: What errors call one of them: "prompt", "completion".
        sequences: Token ids, one sequence each.
        vocab_size: Ids must be below it.
        room: The longest that one may be, if there is a limit.
    """
    arrays = []
    for number, sequence in enumerate(sequences):
        array: NDArray[Any] = np.asarray(sequence)
        if array.ndim != 1 or not array.size:
            raise DecodingError(f"{what} {number} is empty; it needs at least one token")
        if not np.issubdtype(array.dtype, np.integer) or array.min() < 0 or array.max() >= vocab_size:
            found = f"{array.min()} .. {array.max()}"
            raise DecodingError(f"{what} {number} has tokens {found}; the vocabulary is 0 .. {vocab_size - 1}")
        if room is not None and len(array) > room:
            raise DecodingError(
                f"{what} {number} has {len(array)} tokens; the model's context leaves room for {max(room, 0)}: "
                "cut the history to fewer items"
            )
        arrays.append(array.astype(np.int64))
    return arrays


def pair_arrays(
    prompts: Sequence[Ints], completions: Sequence[Ints], vocab_size: int
) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]:
    """Check prompts and as many completions, what ``score`` is asked, and give both as ``token_arrays`` does."""
    if len(prompts) != len(completions):
        raise DecodingError(f"{len(prompts)} prompts and {len(completions)} completions")
    return token_arrays("prompt", prompts, vocab_size), token_arrays("completion", completions, vocab_size)


def check_trie(trie: Trie, vocab_size: int) -> None:
    """Refuse a trie made for another vocabulary."""
    if (token := int(trie.token.max())) >= vocab_size:
        raise DecodingError(
            f"the trie holds token {token} and the model's vocabulary ends at {vocab_size - 1}: "
            "the identifiers belong to another tokenizer"
        )
