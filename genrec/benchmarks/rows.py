"""Rows in other shapes than the trainer's: one for each target, batches by a budget of tokens, and packs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from genrec.curriculum import HISTORY, Plan, Rows
from genrec.tokenization import IGNORE, kept_from


def per_target(made: Plan, setup: Any) -> np.ndarray:
    """int32 [items, 7]: for every item that a sequence row of ``made`` trains, in that order, a row of its own, as in
    ``Plan``: the longest history that fits before it, and the loss on that item alone."""
    prompt, tokenization, users = setup.prompts[0], setup.tokenization, setup.data.user_rows
    result = []
    lengths: dict[int, tuple[NDArray[np.int64], int]] = {}
    for epoch, task, kind, index, start, stop, skip in made.table.tolist():
        if kind != HISTORY or setup.prompts[task].kind != "sequence":
            continue
        if index not in lengths:
            head = tokenization.head_ids(prompt, users[index] if users else None)
            fragments = tokenization.fragment_lengths(prompt, setup.split.train[index])
            lengths[index] = fragments, tokenization.history_budget(head)
        length, budget = lengths[index]
        for event in range(start + skip, stop):
            first = kept_from(length[:event], budget)
            result.append((epoch, task, HISTORY, index, first, event + 1, event - first))
    return np.array(result, dtype=np.int32).reshape(-1, 7)


def by_budget(lengths: NDArray[np.int64], budget: int, count: int, seed: int = 0) -> list[NDArray[np.int64]]:
    """``count`` random batches of row numbers (all, if there are fewer): rows of about one length, as many as fit
    ``budget`` tokens with the padding, one at least."""
    order = np.argsort(np.random.default_rng(seed).random(len(lengths)) * 1e-3 + lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and (stop + 1 - start) * lengths[order[stop]] <= budget:
            stop += 1
        batches.append(order[start:stop])
        start = stop
    drawn = np.random.default_rng(seed).permutation(len(batches))[:count]
    return [batches[number] for number in drawn]


def padding(lengths: NDArray[np.int64], batch: int) -> float:
    """The share of padding among the tokens of batches of ``batch`` rows, taken in this order."""
    parts = [lengths[start : start + batch] for start in range(0, len(lengths), batch)]
    return 1 - float(lengths.sum()) / sum(len(part) * int(part.max()) for part in parts)


def packed(lengths: NDArray[np.int64], room: int) -> list[list[int]]:
    """Row numbers of packs of at most ``room`` tokens: the longest row first, each into the first pack with room."""
    packs: list[list[int]] = []
    free: list[int] = []
    for number in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[number])
        at = next((at for at, left in enumerate(free) if left >= length), len(packs))
        if at == len(packs):
            packs.append([])
            free.append(room)
        packs[at].append(number)
        free[at] -= length
    return packs


def pack(rows: Rows, packs: Sequence[Sequence[int]], pad: int) -> dict[str, torch.Tensor]:
    """A batch of packs: positions begin anew in every row of a pack, and rows do not see each other."""
    made = [[rows.row(number) for number in numbers] for numbers in packs]
    longest = max(sum(len(row.ids) for row in pack) for pack in made)
    shape = (len(made), longest)
    ids, labels = torch.full(shape, pad), torch.full(shape, IGNORE)
    positions, of = torch.zeros(shape, dtype=torch.long), torch.full(shape, -1)
    for place, pack_ in enumerate(made):
        start = 0
        for number, row in enumerate(pack_):
            span = slice(start, start + len(row.ids))
            ids[place, span], labels[place, span] = torch.from_numpy(row.ids), torch.from_numpy(row.labels)
            positions[place, span], of[place, span] = torch.arange(len(row.ids)), number
            start += len(row.ids)
    mask = (of[:, :, None] == of[:, None, :]) & torch.ones(longest, longest, dtype=torch.bool).tril()
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "attention_mask": mask[:, None]}
