"""An engine without a model: pseudo-random logits, a function of the whole prefix. For tests and dry runs; no torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from genrec.decoding import Beams, BeamSearch, Bools, Ints, Trie, check_request
from genrec.engines import check_trie, pair_arrays, token_arrays


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele et al., 2014), elementwise."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class DummyEngine:
    """Logits uniform in [0, 4), a hash of the seed, all tokens before, and the token itself.

    Args:
        vocab_size: The number of tokens.
        seed: Another seed is another model.
    """

    def __init__(self, vocab_size: int, seed: int = 0) -> None:
        self.vocab_size = vocab_size
        self.seed = seed

    def _extend(self, states: NDArray[np.uint64], tokens: Ints) -> NDArray[np.uint64]:
        """The states of prefixes after one more token each."""
        return _mix(states ^ _mix(np.asarray(tokens).astype(np.uint64)))

    def _prefixes(self, prompts: list[NDArray[np.int64]]) -> NDArray[np.uint64]:
        states = np.full(len(prompts), self.seed, dtype=np.uint64)
        lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
        for column in range(lengths.max(initial=0)):
            live = np.flatnonzero(lengths > column)
            states[live] = self._extend(states[live], np.array([prompts[i][column] for i in live]))
        return states

    def logits(self, states: NDArray[np.uint64]) -> NDArray[np.float64]:
        """float64 [prefixes, vocabulary]."""
        tokens = _mix(np.arange(self.vocab_size, dtype=np.uint64))
        return (_mix(states[:, None] ^ tokens) >> np.uint64(11)).astype(np.float64) * (4.0 / 2**53)

    def _logprobs(self, states: NDArray[np.uint64], rows: Ints, tokens: Ints) -> NDArray[np.float64]:
        logits = self.logits(states)
        return logits[rows, tokens] - np.log(np.exp(logits).sum(axis=1))[rows]

    def beam_search(
        self,
        prompts: Sequence[Ints],
        trie: Trie,
        num_beams: int,
        allowed: Bools | None = None,
        blocked: Sequence[Ints | None] | None = None,
        only: Sequence[Ints | None] | None = None,
    ) -> Beams:
        check_request(len(prompts), num_beams, blocked, only)
        check_trie(trie, self.vocab_size)
        states = self._prefixes(token_arrays("prompt", prompts, self.vocab_size))
        search = BeamSearch(trie, len(states), num_beams, allowed, blocked, only)
        states = states[search.owner]
        while not search.done:
            rows, tokens = search.candidates()
            search.advance(self._logprobs(states, rows, tokens))
            states = self._extend(states[search.parent], search.token)
        return search.result()

    def score(self, prompts: Sequence[Ints], completions: Sequence[Ints]) -> NDArray[np.float64]:
        heads, tails = pair_arrays(prompts, completions, self.vocab_size)
        states = self._prefixes(heads)
        total = np.zeros(len(tails))
        for column in range(max(map(len, tails), default=0)):
            live = np.array([i for i, tail in enumerate(tails) if len(tail) > column])
            tokens = np.array([tails[i][column] for i in live])
            total[live] += self._logprobs(states[live], np.arange(len(live)), tokens)
            states[live] = self._extend(states[live], tokens)
        return total
