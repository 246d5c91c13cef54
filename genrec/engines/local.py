"""The engine that runs a transformers model in this process, on CPU or CUDA.

Each prompt is prefilled once, and what all prompts of a call begin with is prefilled once for all of them. The beams of
a prompt are then decoded as a tree: a step feeds them as query positions of *one* sequence, with explicit position ids
and an additive 4-D mask that lets a beam see the prompt and its own ancestors. The cache is never reordered.

What transformers (5.19) does with such masks: a 4-D tensor is handed as it is to every layer, sliding ones included, so
a model with several kinds of layers gets a dict with one mask per kind; eager attention *adds* the mask, so it is
floating point; ``DynamicCache(config=...)`` evicts by slot in sliding layers, so the cache is made without a config
and windows are laid by position id.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache, PreTrainedModel

from genrec.decoding import Beams, BeamSearch, Bools, Ints, Level, Searches, Trie, check_request, not_finite
from genrec.engines import check_trie, pair_arrays, token_arrays
from genrec.engines.batches import OutOfMemory, is_out_of_memory, memory_at_hand, micro_batches, run
from genrec.engines.selection import context, index, logprobs, normaliser, select
from genrec.errors import DecodingError

Rows = list[NDArray[np.int64]]  # token ids, one array a sequence

# Layer types whose state is not a list of keys and values that a mask could hide.
_RECURRENT = {"linear_attention", "conv", "mamba", "recurrent", "hybrid", "hybrid_sliding"}
# Positions of a micro-batch unless given. Some thousand keep the arithmetic of a CPU busy and its caches warm.
_CPU_TOKENS, _CUDA_TOKENS = 2048, 131_072
# The share of the memory at hand that a micro-batch is planned for; the plan is rough.
_MEMORY_SHARE = 0.5
# Levels of the trie go ahead with the live beams while all together are at most so many times as many as there can be.
_AHEAD = 3
# A common prefix is prefilled on its own from so many saved tokens on: less does not pay for one more forward.
_SAVED_TOKENS = 256
# Keys of a configuration that tell of attention windows other than ``sliding_window``, which is laid by position id.
_OTHER_WINDOWS = ("window_size", "attention_window", "attention_types", "attention_chunk_size", "keep_window_size")
# The check when an engine is made: lengths of its prompts, the window that sliding layers have meanwhile, and the
# parent in the first step of each beam of the second.
_CHECKED, _CHECKED_WINDOW, _CHECKED_PARENTS = (14, 11, 5), 6, np.array([2, 0, 0, 1])


class LocalEngine:
    """Beam search and scoring with a causal language model.

    The model is used where it is and as it is: during a call it is in evaluation mode and in ``torch.inference_mode``,
    afterwards every module is back in the mode it had, so a model can be evaluated in the middle of its own training.
    Log-probabilities are computed in float32 (float64 if the model is).

    When it is made, the engine compares tree decoding with plain uncached forwards on three random prompts, with the
    sliding windows of the model shortened to less than them meanwhile. If they differ it warns, and decodes by plain
    forwards.

    Args:
        model: A transformers causal LM; a PEFT model works too.
        max_batch_tokens: The most positions (prompts with padding and beams) of one micro-batch; unset: as many as
            suit the device. The memory at hand bounds a micro-batch besides. None of this changes a result.

    Raises:
        DecodingError: The model is recurrent, has linear attention, or is an encoder-decoder.
    """

    def __init__(self, model: PreTrainedModel, *, max_batch_tokens: int | None = None) -> None:
        if max_batch_tokens is None:
            max_batch_tokens = _CUDA_TOKENS if model.device.type == "cuda" else _CPU_TOKENS
        if max_batch_tokens < 1:
            raise DecodingError(f"max_batch_tokens must be at least 1, not {max_batch_tokens}")
        config = model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or [])
        base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT
        name = type(base).__name__
        if getattr(base, "_is_stateful", False) or kinds & _RECURRENT:
            raise DecodingError(f"{name} is recurrent or has linear attention; use a model with softmax attention only")
        if getattr(config, "is_encoder_decoder", False):
            raise DecodingError(f"{name} is an encoder-decoder; use a causal language model")
        self.model = model
        self.max_batch_tokens = max_batch_tokens
        self.vocab_size: int = config.vocab_size
        self.context = context(config)
        self._keeps_logits = "logits_to_keep" in inspect.signature(base.forward).parameters
        window = getattr(config, "sliding_window", None)
        if not kinds:
            kinds = {"full_attention" if window is None else "sliding_attention"}
        self._windows: dict[str, int | None] = {kind: window if kind == "sliding_attention" else None for kind in kinds}
        known = kinds <= {"full_attention", "sliding_attention"}
        known = known and not any(getattr(config, key, None) for key in _OTHER_WINDOWS)
        self.tree = True  # for the check
        self.tree = known and self._tree_is_exact()
        if not self.tree:
            what = f"{name} ({config._attn_implementation} attention) cannot decode beams as a tree"
            warnings.warn(f"{what}: each beam is run through the whole model (slower, same results)", stacklevel=2)

    def beam_search(
        self,
        prompts: Sequence[Ints],
        trie: Trie,
        num_beams: int,
        allowed: Bools | None = None,
        blocked: Sequence[Ints | None] | None = None,
        only: Sequence[Ints | None] | None = None,
    ) -> Beams:
        """See ``Engine.beam_search``."""
        check_request(len(prompts), num_beams, blocked, only)
        check_trie(trie, self.vocab_size)
        room = None if self.context is None else self.context - trie.max_length
        arrays = token_arrays("prompt", prompts, self.vocab_size, room)
        searches = Searches(len(arrays), trie, num_beams, allowed, blocked, only)
        width = searches.beams.items.shape[1]
        with self._inference():
            prefix = self._prefill_common(arrays)
            lengths = np.array([len(array) for array in arrays], dtype=np.int64)
            slots = lengths + width * (trie.max_length - 1)
            sizes = self._bytes(lengths, width if trie.max_length > 1 else 1, slots)

            def work(batch: Ints) -> None:
                search = searches.of(batch)
                self._search(search, [arrays[i] for i in batch], prefix)
                searches.keep(batch, search)

            run(micro_batches(slots, self.max_batch_tokens, sizes, self._memory()), slots, work)
        return searches.beams

    def score(self, prompts: Sequence[Ints], completions: Sequence[Ints]) -> NDArray[np.float64]:
        """See ``Engine.score``."""
        heads, tails = pair_arrays(prompts, completions, self.vocab_size)
        rows = [np.concatenate([head, tail]) for head, tail in zip(heads, tails, strict=True)]
        token_arrays("prompt with completion", rows, self.vocab_size, self.context)
        total = np.zeros(len(rows), dtype=np.float64)
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        sizes = self._bytes(lengths, max(map(len, tails), default=1), lengths)

        def work(batch: Ints) -> None:
            keep = max(len(tails[i]) for i in batch)
            inputs = [rows[i][:-1] for i in batch]
            logits = self._prefill(inputs, keep)[0] if self.tree else self._plain(inputs, keep)
            # The logits end with those of the last completion token: one row of `keep` positions per sequence.
            counts = np.array([len(tails[i]) for i in batch])
            owner = np.repeat(np.arange(len(batch)), counts)
            place = np.concatenate([np.arange(keep - count, keep) for count in counts])
            tokens = np.concatenate([tails[i] for i in batch])
            flat = logits.flatten(0, 1)
            picked = logprobs(flat, normaliser(flat), owner * keep + place, tokens)
            if not (finite := np.isfinite(picked)).all():
                raise not_finite(batch[owner[np.argmin(finite)]])
            total[batch] = np.bincount(owner, weights=picked, minlength=len(batch))

        with self._inference():
            run(
                micro_batches(lengths, self.max_batch_tokens, sizes, self._memory(), equal=not self.tree), lengths, work
            )
        return total

    def _memory(self) -> int:
        return int(memory_at_hand(self.model.device) * _MEMORY_SHARE)

    def _bytes(self, lengths: NDArray[np.int64], width: int, slots: NDArray[np.int64]) -> NDArray[np.int64]:
        """Roughly the memory that a search of each prompt takes: cache, one layer's work, masks, logits.

        Args:
            lengths: Tokens of each prompt.
            width: Positions whose logits are wanted at a time.
            slots: Positions of the cache at the end.
        """
        config = self.model.config.get_text_config()
        number = self.model.dtype.itemsize
        heads, hidden = config.num_attention_heads, config.hidden_size
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head = getattr(config, "head_dim", None) or hidden // heads
        inner = getattr(config, "intermediate_size", None) or 4 * hidden
        fed = np.maximum(lengths, width)
        cache = 2 * config.num_hidden_layers * kv_heads * head * slots
        layer = (6 * hidden + 3 * inner) * fed + 2 * heads * head * slots
        masks = 2 * len(self._windows) * fed * slots
        return number * (cache + layer + masks + _AHEAD * width * self.vocab_size)

    def _search(self, search: BeamSearch, prompts: Rows, prefix: DynamicCache | None) -> None:
        """Run the search of one micro-batch to its end."""
        tree = _Tree(self, prompts, prefix) if self.tree else None
        logits = tree.logits if tree else self._plain(prompts)[:, 0]
        if search.trie.max_length == 1 and not search.done:
            select(search, logits)
            return
        whole = normaliser(logits)
        beams = [prompts[i] for i in search.owner]
        rows: Ints = search.owner  # the row of the logits of each live beam
        place: Ints = search.owner  # and its row in the level that was fed with it
        levels: list[tuple[Level, Ints]] = []  # what was fed and not searched yet, with the rows of its logits
        while not search.done:
            parents, tokens = search.candidates()
            search.advance(logprobs(logits, whole, rows[parents], tokens))
            if search.done:
                break
            if not tree:
                beams = [np.append(beams[p], t) for p, t in zip(search.parent, search.token, strict=True)]
                logits, rows = self._plain(beams)[:, 0], np.arange(len(beams))
                whole = normaliser(logits)
                continue
            if not levels:
                ahead = search.ahead(_AHEAD)
                ahead[0] = ahead[0]._replace(parent=place[search.parent])
                logits, fed = tree.step(ahead)
                whole = normaliser(logits)
                levels = list(zip(ahead, fed, strict=True))
            level, fed_rows = levels.pop(0)
            place = level.find(search.owner, search.node)
            rows = fed_rows[place]

    def _index(self, array: Ints) -> torch.Tensor:
        """An index tensor on the model's device."""
        return index(array, self.model.device)

    def _forward(
        self, inputs: torch.Tensor, keep: int, cache: DynamicCache | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """Logits [n, keep, vocabulary] of the last ``keep`` positions of ``inputs`` [n, length]."""
        if self._keeps_logits:
            kwargs["logits_to_keep"] = keep
        output = self.model(
            input_ids=inputs, past_key_values=cache, use_cache=cache is not None, return_dict=True, **kwargs
        )
        return output.logits[:, -keep:]

    def _plain(self, rows: Rows, keep: int = 1) -> torch.Tensor:
        """Logits [n, keep, vocabulary] by forwards of whole rows, without cache, mask, padding or position ids."""
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        logits: list[torch.Tensor] = [torch.empty(0)] * len(rows)

        def work(batch: Ints) -> None:
            inputs = torch.from_numpy(np.stack([rows[i] for i in batch])).to(self.model.device)
            for i, row in zip(batch, self._forward(inputs, keep), strict=True):
                logits[i] = row

        sizes = self._bytes(lengths, keep, lengths)
        run(micro_batches(lengths, self.max_batch_tokens, sizes, self._memory(), equal=True), lengths, work)
        return torch.stack(logits) if rows else torch.empty(0, keep, self.vocab_size)

    def _prefill_common(self, prompts: Rows) -> DynamicCache | None:
        """The cache [1, length] of what all prompts begin with, if that saves enough; one token of each stays out."""
        if not self.tree or len(prompts) < 2:
            return None
        shortest = min(map(len, prompts)) - 1
        same = np.all([prompt[:shortest] == prompts[0][:shortest] for prompt in prompts[1:]], axis=0)
        length = shortest if same.all() else int(np.argmin(same))
        if length * (len(prompts) - 1) < _SAVED_TOKENS:
            return None
        cache = DynamicCache()
        try:
            self._prefill([prompts[0][:length]], 1, cache)
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                return None  # Each prompt brings its own then, and one that does not fit is named.
            raise
        return cache

    def _prefill(self, rows: Rows, keep: int, cache: DynamicCache | None = None) -> tuple[torch.Tensor, ...]:
        """One forward of left-padded rows, after what ``cache`` holds already.

        Returns:
            Logits [n, keep, vocabulary]; the position id [n, slots] of each slot of the cache; which slots are real.
        """
        start = 0 if cache is None else cache.get_seq_length()
        longest = max(map(len, rows)) - start
        inputs = np.zeros((len(rows), longest), dtype=np.int64)
        for i, row in enumerate(rows):
            inputs[i, longest - (len(row) - start) :] = row[start:]
        device = self.model.device
        padding = longest + start - torch.tensor([len(row) for row in rows], device=device)[:, None]
        slots = torch.arange(start + longest, device=device)[None]
        real = (slots < start) | (slots >= start + padding)
        positions = torch.where(slots < start, slots, slots - padding).clamp(min=0)
        mask = None  # the plain causal one
        if start or not real.all():
            causal = slots[:, start:, None] >= slots[:, None, :]
            mask = self._mask(causal & real[:, None, :], positions[:, start:], positions)
        ids = torch.from_numpy(inputs).to(device)
        logits = self._forward(ids, keep, cache, attention_mask=mask, position_ids=positions[:, start:])
        return logits, positions, real

    def _mask(self, visible: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> Any:
        """The additive mask [n, 1, queries, keys] of what is ``visible`` (bool [n, queries, keys]), or a dict with one
        for each kind of layer. Sliding windows are laid by the position ids ``queries`` and ``keys`` [n, length].
        """
        # Eager attention takes its softmax in float32, where float64's minimum would be -inf and padding become NaN.
        hidden = max(torch.finfo(self.model.dtype).min, torch.finfo(torch.float32).min)
        masks = {}
        for kind, window in self._windows.items():
            seen = visible if window is None else visible & (queries[:, :, None] - keys[:, None, :] < window)
            mask = torch.zeros(seen.shape, dtype=self.model.dtype, device=seen.device)
            masks[kind] = mask.masked_fill_(~seen, hidden)[:, None]
        return masks if len(masks) > 1 else next(iter(masks.values()))

    @contextmanager
    def _inference(self) -> Iterator[None]:
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            with torch.inference_mode():
                yield
        finally:
            for module in training:
                module.training = True

    def _tree_is_exact(self) -> bool:
        """Whether a tree of two steps has the log-probabilities of plain forwards, over the whole vocabulary."""
        config, rng = self.model.config.get_text_config(), np.random.default_rng(0)
        room = (self.context or 2**30) - 6
        if room < 1:
            return False
        prompts = [rng.integers(self.vocab_size, size=min(size, room)) for size in _CHECKED]
        n, width = len(prompts), len(_CHECKED_PARENTS)
        first, second = rng.integers(self.vocab_size, size=(n, 3)), rng.integers(self.vocab_size, size=(n, width))
        parents = (np.arange(n)[:, None] * 3 + _CHECKED_PARENTS).ravel()
        owners = np.arange(n).repeat(3), np.arange(n).repeat(width)
        tails = np.stack([first.ravel()[parents], second.ravel()], axis=1)
        rows = [np.concatenate([prompts[i], tail]) for i, tail in zip(owners[1], tails, strict=True)]
        windows, window = self._windows, getattr(config, "sliding_window", None) or 0
        try:
            if any(windows.values()):
                config.sliding_window = min(window, _CHECKED_WINDOW)
                self._windows = {kind: one and config.sliding_window for kind, one in windows.items()}
            with self._inference():
                plain = self._distributions(self._plain(rows, 3))
                try:
                    tree = _Tree(self, prompts, None)
                    found = [tree.logits[self._index(owners[1])]]
                    levels = [
                        Level(owner, token.ravel(), token.ravel(), parent)
                        for owner, token, parent in ((owners[0], first, owners[0]), (owners[1], second, parents))
                    ]
                    logits, (one,) = tree.step(levels[:1])
                    found.append(logits[self._index(one[parents])])
                    logits, (two,) = tree.step(levels[1:])
                    found.append(logits[self._index(two)])
                    error = self._distributions(torch.stack(found, dim=1)) - plain
                except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as refused:
                    if is_out_of_memory(refused):
                        raise OutOfMemory("out of memory while the engine is made; use a smaller dtype") from refused
                    return False
                if not plain.isfinite().all():
                    return True  # A search will say for which prompt.
                if error.abs().max() <= 1e-4:
                    return True
                # Half precision: rounding is told by plain forwards of longer rows, whose last tokens change nothing.
                again = self._distributions(self._plain([np.append(row, row[:4]) for row in rows], 7)[:, :3])
        finally:
            if any(windows.values()):
                config.sliding_window, self._windows = window, windows
        rounding = 3 * _worst(again - plain) + 4 * torch.finfo(self.model.dtype).eps * float(plain.std(dim=-1).max())
        return _worst(error) <= rounding

    def _distributions(self, logits: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)


class _Tree:
    """The cache of one micro-batch of prompts, and the beams grown in it."""

    def __init__(self, engine: LocalEngine, prompts: Rows, prefix: DynamicCache | None) -> None:
        self.engine, n = engine, len(prompts)
        layers = [] if prefix is None else prefix.layers
        shared = [(layer.keys.expand(n, -1, -1, -1), layer.values.expand(n, -1, -1, -1)) for layer in layers]
        self.cache = DynamicCache(shared)
        logits, self.positions, self.real = engine._prefill(prompts, 1, self.cache)
        self.logits = logits[:, 0]
        self.lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.positions.device)
        self.path: NDArray[np.int64] | None = (
            None  # [nodes of the last level, steps]: the slots of each and its ancestors
        )

    def step(self, levels: Sequence[Level]) -> tuple[torch.Tensor, list[NDArray[np.int64]]]:
        """Feed levels of nodes: the live beams, and what goes ahead with them. Parents of the first level are rows of
        the last level fed before. Gives logits [rows, vocabulary] and the row of each node, by level."""
        index, device = self.engine._index, self.positions.device
        n, used = self.positions.shape
        columns, paths, base = [], [], np.zeros(n, dtype=np.int64)
        for level in levels:
            column = base[level.owner] + np.arange(len(level.owner)) - np.searchsorted(level.owner, level.owner)
            base += np.bincount(level.owner, minlength=n)  # the place of a node among those of its prompt
            slot = (used + column)[:, None]
            self.path = slot if self.path is None else np.concatenate([self.path[level.parent], slot], axis=1)
            columns.append(column)
            paths.append(self.path)
        width = int(base.max())
        owner, column = np.concatenate([level.owner for level in levels]), np.concatenate(columns)
        depths = np.array([path.shape[1] for path in paths]).repeat([len(path) for path in paths])

        cells = index(owner), index(column)
        inputs = torch.zeros((n, width), dtype=torch.long, device=device)
        inputs[cells] = index(np.concatenate([level.token for level in levels]))
        queries = self.lengths[:, None].expand(n, width).contiguous()
        queries[cells] += index(depths - 1)
        self.positions = torch.cat([self.positions, queries], dim=1)
        self.real = torch.cat([self.real, torch.zeros((n, width), dtype=torch.bool, device=device)], dim=1)
        visible = self.real[:, None, :].repeat(1, width, 1)  # prompts only: slots of beams are never `real`
        slots = np.concatenate([path.ravel() for path in paths])
        visible[index(owner.repeat(depths)), index(column.repeat(depths)), index(slots)] = True
        mask = self.engine._mask(visible, queries, self.positions)
        logits = self.engine._forward(inputs, width, self.cache, attention_mask=mask, position_ids=queries)
        rows = [level.owner.astype(np.int64) * width + one for level, one in zip(levels, columns, strict=True)]
        return logits.flatten(0, 1), rows


def _worst(difference: torch.Tensor) -> float:
    """The largest root of the mean square of the distributions in ``difference`` [..., vocabulary]."""
    return float(difference.square().mean(dim=-1).sqrt().max())
