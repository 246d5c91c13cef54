"""The engine ``vllm``: beam search and scoring with hidden states that vLLM computes in processes of its own.

vLLM is asked for no tokens. It runs as its *pooling* runner, which gives the last hidden state of each request; the
model's output layer is applied here, and from there on everything is as with logits of one's own: exact under any
restriction, in one pass, with ``select`` and ``BeamSearch`` as in every engine. A request brings as many numbers as the
model is wide and no object per candidate, and what the requests of a user have in common lies in vLLM's prefix cache. A
step of a beam search asks for one such state per live beam.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from genrec.config import VllmOptions
from genrec.decoding import Beams, BeamSearch, Bools, Ints, Searches, Trie, check_request, not_finite
from genrec.engines import check_trie, pair_arrays, token_arrays
from genrec.engines.batches import OutOfMemory, micro_batches, run
from genrec.engines.selection import logprobs, normaliser, select
from genrec.engines.vllm import CLOSED, MEMORY, REQUESTS, Server, max_lora_rank, version
from genrec.errors import AdapterError, ConfigError, EngineError

# A wave of users is as many as have so many beams as are handed over at a time, and as fit the prefix cache with the
# rest of what is in work.
_CACHE_SHARE = 0.5
_LOGITS = 2**26  # Logits held at a time.


class VllmEngine:
    """Beam search and scoring with a model that vLLM runs.

    Engines of one process that run one model with the same options share vLLM's processes, each with its own LoRA.
    These end when the last of the engines is closed, when this process ends in whatever way, or when they fail.
    Any number of threads may ask at once; they take turns.

    Args:
        model: The folder of a checkpoint of transformers. If its ``export.json`` holds log-probabilities of plain
            forwards (as what genrec writes for vLLM does), vLLM's are compared with them once it has started.
        lora: The folder of a pure LoRA for it, as PEFT writes it.
        dtype: Of the weights: float32 or bfloat16. Log-probabilities are computed in float32.
        options: How vLLM runs.

    Attributes:
        dtype, options: As given.
        server: What runs the model.
        vocab_size: The number of tokens.
        context: The longest sequence, in tokens.

    Raises:
        ConfigError: vLLM is not installed or of another version, or refuses an option.
        AdapterError: vLLM cannot run this model, or runs it to other numbers.
        EngineError: vLLM did not start.
    """

    def __init__(
        self,
        model: str | Path,
        lora: str | Path | None = None,
        *,
        dtype: str = "float32",
        options: VllmOptions | None = None,
    ) -> None:
        version()
        check_dtype(dtype)
        self.dtype, self.options = dtype, options or VllmOptions()
        self.server = Server.shared(Path(model).resolve(), _rank(lora), dtype, self.options)
        try:
            self._lora = self.server.lora(lora)
        except BaseException:
            self.server.leave()
            raise
        self.vocab_size: int = self.server.head.vocab_size
        self.context: int = self.server.context
        self._open = True

    def close(self) -> None:
        """Leave vLLM's processes; the last engine to do so ends them. A closed engine answers no more."""
        if self._open:
            self._open = False
            self.server.leave()

    def beam_search(
        self,
        prompts: Sequence[Ints],
        trie: Trie,
        num_beams: int,
        allowed: Bools | None = None,
        blocked: Sequence[Ints | None] | None = None,
        only: Sequence[Ints | None] | None = None,
    ) -> Beams:
        """See ``Engine.beam_search``.

        Raises:
            EngineError: vLLM died, ran out of memory, or gave no answer for ``options.timeout`` seconds.
        """
        check_request(len(prompts), num_beams, blocked, only)
        check_trie(trie, self.vocab_size)
        arrays = token_arrays("prompt", prompts, self.vocab_size, self.context - trie.max_length)
        searches = Searches(len(arrays), trie, num_beams, allowed, blocked, only)

        def choose(batch: Ints, logits: torch.Tensor) -> None:
            search = searches.of(batch)
            if not search.done:
                select(search, logits)
            searches.keep(batch, search)

        if trie.max_length == 1:
            self._logits([array.tolist() for array in arrays], np.arange(len(arrays)), choose)
            return searches.beams
        for batch in self._waves(arrays, searches.beams.items.shape[1], trie.max_length):
            search = searches.of(batch)
            self._search(search, [arrays[i].tolist() for i in batch])
            searches.keep(batch, search)
        return searches.beams

    def score(self, prompts: Sequence[Ints], completions: Sequence[Ints]) -> NDArray[np.float64]:
        """See ``Engine.score``.

        Raises:
            EngineError: As of ``beam_search``.
        """
        heads, tails = pair_arrays(prompts, completions, self.vocab_size)
        rows = [np.concatenate([head, tail]) for head, tail in zip(heads, tails, strict=True)]
        token_arrays("prompt with completion", rows, self.vocab_size, self.context)
        # What stands before each token of a completion; the same before several is asked for once.
        requests: dict[tuple[int, ...], int] = {}
        asked: list[int] = []
        first: list[int] = []
        for i, (row, head) in enumerate(zip(rows, heads, strict=True)):
            whole = row.tolist()
            for stop in range(len(head), len(row)):
                place = requests.setdefault(tuple(whole[:stop]), len(requests))
                if place == len(first):
                    first.append(i)
                asked.append(place)
        lengths = [len(tail) for tail in tails]
        owner, tokens = np.repeat(np.arange(len(rows)), lengths), np.concatenate([*tails, np.zeros(0, dtype=np.int64)])
        picked = self._picked([list(request) for request in requests], np.array(first), np.array(asked), tokens)
        if not (finite := np.isfinite(picked)).all():
            raise not_finite(int(owner[np.argmin(finite)]))
        return np.bincount(owner, weights=picked, minlength=len(rows)).astype(np.float64)

    def _search(self, search: BeamSearch, prompts: list[list[int]]) -> None:
        """Run the search of one wave of users to its end."""
        tails = np.zeros((len(search.owner), 0), dtype=np.int64)
        while not search.done:
            beams = zip(search.owner, tails.tolist(), strict=True)
            requests = [[*prompts[owner], *tail] for owner, tail in beams]
            rows, tokens = search.candidates()
            search.advance(self._picked(requests, search.numbers[search.owner], rows, tokens))
            tails = np.concatenate([tails[search.parent], search.token[:, None]], axis=1)

    def _picked(self, requests: list[list[int]], owners: Ints, rows: Ints, tokens: Ints) -> NDArray[np.float64]:
        """float64 [c]: the log-probability of each token after the request in its row."""
        picked = np.empty(len(rows))
        order = np.argsort(rows, kind="stable")
        bounds = np.searchsorted(rows[order], np.arange(len(requests) + 1))

        def pick(places: NDArray[np.int64], logits: torch.Tensor) -> None:
            counts = bounds[places + 1] - bounds[places]
            wanted = order[np.concatenate([np.arange(bounds[place], bounds[place + 1]) for place in places])]
            own = np.repeat(np.arange(len(places)), counts)
            picked[wanted] = logprobs(logits, normaliser(logits), own, tokens[wanted])

        self._logits(requests, owners, pick)
        return picked

    def _logits(
        self, requests: list[list[int]], owners: Ints, use: Callable[[NDArray[np.int64], torch.Tensor], None]
    ) -> None:
        """Call ``use`` with places among the requests [m] and their logits [m, vocabulary], in whatever order vLLM
        finishes them; once more with fewer of them where the memory on this side refuses as many."""
        if not self._open:
            raise EngineError(CLOSED)
        most = max(1, _LOGITS // self.vocab_size)  # Requests at a time; `run` halves what the memory refuses.
        with torch.inference_mode(), closing(self.server.states(requests, owners, self._lora)) as found:
            for places, states in found:
                ones = np.ones(len(places), dtype=np.int64)

                def work(part: Ints, places: NDArray[np.int64] = places, states: torch.Tensor = states) -> None:
                    use(places[part], self.server.head.logits(states[part]))

                try:
                    run(micro_batches(ones, most), ones, work)
                except OutOfMemory as error:
                    raise EngineError(f"no memory for the logits of one request. {MEMORY}") from error

    def _waves(self, prompts: Sequence[Ints], width: int, longest: int) -> Iterator[NDArray[np.int64]]:
        """Indices of users whose searches go on together: later steps find their prompts in the prefix cache."""
        room = self.server.cached * _CACHE_SHARE
        sizes = np.cumsum([len(prompt) + width * longest for prompt in prompts])
        start = 0
        while start < len(prompts):
            before = sizes[start - 1] if start else 0
            stop = int(np.searchsorted(sizes, before + room, side="right"))
            stop = max(start + 1, min(stop, start + max(1, REQUESTS // width), len(prompts)))
            yield np.arange(start, stop)
            start = stop


def check_dtype(dtype: str) -> None:
    """Refuse weights of another type than the engine takes."""
    if dtype not in ("float32", "bfloat16"):
        raise ConfigError(f"dtype is {dtype!r}, and the engine vllm takes float32 or bfloat16.")


def _rank(lora: str | Path | None) -> int:
    """The rank that vLLM is told for a LoRA; 0 without one."""
    if lora is None:
        return 0
    path = Path(lora) / "adapter_config.json"
    try:
        rank = int(json.loads(path.read_text(encoding="utf-8"))["r"])
        return max_lora_rank(rank)
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise AdapterError(
            f"{path} tells no rank that vLLM takes: {error!r}. Check it: genrec export --check"
        ) from error
