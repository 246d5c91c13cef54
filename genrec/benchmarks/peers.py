"""Peers of the local engine: what transformers itself offers under a constraint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LogitsProcessor

from genrec.decoding import Beams, Trie


def prefix_function(table: NDArray[np.integer[Any]], start: int) -> Callable[[int, torch.Tensor], list[int]]:
    """A dictionary from every prefix to its next tokens, as LC-Rec and MiniOneRec give it to `generate`."""
    legal: dict[tuple[int, ...], list[int]] = {}
    for depth in range(table.shape[1]):
        for row in np.unique(table[:, : depth + 1], axis=0).tolist():
            legal.setdefault(tuple(row[:-1]), []).append(row[-1])
    return lambda _, ids: legal[tuple(ids[start:].tolist())]


class TrieMask(LogitsProcessor):
    """The best that one can give `generate`: the same trie, and all rows of a step masked at once."""

    def __init__(self, trie: Trie, start: int) -> None:
        self.trie, self.start = trie, start
        children = np.diff(trie.first_child)
        parent = np.repeat(np.arange(len(children)), children)
        self.keys = (parent.astype(np.int64) << 32) + trie.token[1:]  # sorted, as the nodes are breadth first

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        node = np.zeros(len(ids), dtype=np.int64)
        for token in ids[:, self.start :].cpu().numpy().T:
            node = np.searchsorted(self.keys, (node << 32) + token) + 1
        rows, tokens, _ = self.trie.children(node)
        row, token = (torch.from_numpy(np.array(x, dtype=np.int64)).to(scores.device) for x in (rows, tokens))
        masked = torch.full_like(scores, -torch.inf)
        masked[row, token] = scores[row, token]
        return masked


def generated(
    model: Any, inputs: torch.Tensor, levels: int, beams: int, scores: bool = False, **constraint: Any
) -> Any:
    """What `model.generate` gives for beam search under a constraint; ``scores`` has it keep log-probabilities too."""
    return model.generate(
        inputs, attention_mask=torch.ones_like(inputs), num_beams=beams, num_return_sequences=beams,
        max_new_tokens=levels, do_sample=False, length_penalty=0.0, early_stopping=True, eos_token_id=None,
        pad_token_id=0, return_dict_in_generate=True, output_scores=scores, **constraint,
    )  # fmt: skip


def generate(model: Any, prompts: Sequence[NDArray[Any]], table: NDArray[Any], beams: int, **constraint: Any) -> Beams:
    """Beam search by `model.generate` under a constraint, for prompts of one length; as ``Engine.beam_search``."""
    inputs = torch.from_numpy(np.stack(prompts)).long().to(model.device)
    output = generated(model, inputs, table.shape[1], beams, True, **constraint)
    index = {tuple(row): item for item, row in enumerate(table.tolist())}
    rows = output.sequences[:, inputs.shape[1] :].tolist()
    items = np.array([index.get(tuple(row), -1) for row in rows], dtype=np.int32)
    scores = output.sequences_scores.float().cpu().numpy()
    n = len(prompts)
    return Beams(items.reshape(n, beams), scores.reshape(n, beams), [None] * n)


def disagreement(one: Beams, other: Beams, atol: float) -> tuple[int, float]:
    """Places with different items whose scores differ beyond ``atol``, and the largest difference of scores by place.

    Two items whose scores are equal up to rounding may stand either way round.
    """
    same = one.scores == other.scores  # among them what pads both
    apart = np.abs(np.subtract(one.scores, other.scores, where=~same, out=np.zeros(same.shape, dtype=np.float32)))
    return int(((one.items != other.items) & (apart > atol)).sum()), float(apart.max())
