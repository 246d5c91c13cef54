"""From logits to log-probabilities and selected items, on the device where the logits are. What all engines share that
have logits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from genrec.decoding import BeamSearch, Ints, not_finite

# Logits in one piece of the normaliser: what a CPU's cache holds, for its steps each go through all of them; or what a
# GPU should have to do at a time.
_CPU_PIECE, _CUDA_PIECE = 2**20, 2**26


def piece(device: torch.device) -> int:
    """How many logits a device does well to have in work at a time."""
    return _CUDA_PIECE if device.type == "cuda" else _CPU_PIECE


def index(array: Ints, device: torch.device) -> torch.Tensor:
    """An index tensor on a device; it travels as int32."""
    return torch.from_numpy(np.array(array, dtype=np.int32)).to(device).long()


def normaliser(logits: torch.Tensor) -> torch.Tensor:
    """[rows]: log-sum-exp over the whole vocabulary, in float32 at least, in pieces that bound the memory."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    pieces = logits.split(max(1, piece(logits.device) // logits.shape[-1]))
    return torch.cat([torch.logsumexp(one.to(dtype), dim=-1) for one in pieces])


def logprobs(logits: torch.Tensor, normalisers: torch.Tensor, rows: Ints, tokens: Ints) -> NDArray[np.float64]:
    """The log-probabilities of some (row, token) of logits [rows, vocabulary]; only these leave the device."""
    row = index(rows, logits.device)
    picked = logits[row, index(tokens, logits.device)].to(normalisers.dtype) - normalisers[row]
    return picked.double().cpu().numpy()


def select(search: BeamSearch, logits: torch.Tensor) -> None:
    """Finish a search whose identifiers are single tokens by one top-k over them, on the device.

    Only what it selects reaches ``search``. Where equal values straddle the cut, all of them do, so that ties are
    decided by item index as everywhere. The logits [prompts, vocabulary] are overwritten.
    """
    tokens, k = search.trie.token[1:], search.num_beams
    whole = normaliser(logits)
    run = tokens[-1] - tokens[0] + 1 == len(tokens)
    values = logits[:, tokens[0] : tokens[-1] + 1] if run else logits.index_select(1, index(tokens, logits.device))
    allowed, blocked, only = search.restrictions()
    if allowed is not None:
        values.masked_fill_(~torch.from_numpy(allowed).to(values.device), -torch.inf)
    values[index(blocked[0], values.device), index(blocked[1], values.device)] = -torch.inf
    if search.has_only.any():
        pairs = index(only[0], values.device), index(only[1], values.device)
        kept = values[pairs]
        values[index(np.flatnonzero(search.has_only), values.device)] = -torch.inf
        values[pairs] = kept
    best = values.topk(min(k + 1, len(tokens)), dim=1)
    cut = best.values[:, k - 1 : k]
    if ((best.values[:, k:] == cut) & ~cut.isneginf()).any():
        row, column = ((values >= cut) & ~values.isneginf()).nonzero(as_tuple=True)
    else:
        row, place = (~best.values[:, :k].isneginf()).nonzero(as_tuple=True)
        column = best.indices[row, place]
    picked = (values[row, column].to(whole.dtype) - whole[row]).double().cpu().numpy()
    prompt, node = row.cpu().numpy(), column.cpu().numpy() + 1
    # NaN and +inf show in the normaliser, which holds every logit; -inf of an item that is allowed, in the counts.
    short = np.bincount(prompt, minlength=search.n) < np.minimum(search.n_allowed, k)
    broken = short | ~torch.isfinite(whole).cpu().numpy()
    if broken.any():
        raise not_finite(search.numbers[np.argmax(broken)])
    search.advance(picked, np.searchsorted(search.owner, prompt), node)


def context(config: Any) -> int | None:
    """The longest sequence of a model, or None. LongRoPE changes the frequencies of *all* positions beyond its original
    length, so what is cached would be wrong there, and scores would depend on the neighbours in a batch."""
    rope = getattr(config, "rope_parameters", None) or {}
    limits = [getattr(config, "max_position_embeddings", None)]
    for parameters in [rope, *rope.values()]:
        if isinstance(parameters, dict) and parameters.get("rope_type") == "longrope":
            limits.append(parameters.get("original_max_position_embeddings"))
    return min((limit for limit in limits if limit is not None), default=None)
