"""The model that is trained: loaded, identifier rows started, LoRA put on its blocks."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from genrec import adapter as adapters
from genrec import base as bases
from genrec.config import Recipe
from genrec.errors import ConfigError
from genrec.options import LORA_DEFAULTS, LORA_ELSEWHERE, check_keys
from genrec.rows import train_rows


def load(recipe: Recipe, base: bases.Base) -> PreTrainedModel:
    """The model of ``base`` as the recipe trains it, on the CPU.

    Raises:
        ConfigError: The recipe asks for 4 bits, and bitsandbytes is not installed.
        AdapterError: The base cannot be loaded.
    """
    if recipe.tuning == "qlora" and not bases.can_quantise():
        raise ConfigError(f'recipe: tuning is "qlora": {bases.NO_QUANTISER}')
    return base.model(getattr(torch, recipe.dtype), quantised=recipe.tuning == "qlora")


def start_rows(model: PreTrainedModel, ids: torch.Tensor, vectors: np.ndarray | None, seed: int) -> None:
    """Set the embedding rows of new tokens, in the scale of the rows that are there.

    With ``vectors`` (float32 [tokens, d]) a row is a random rotation of them, which keeps every cosine, where the model
    is at least d wide, and else their random projection to orthogonal directions, in which near vectors stay near; plus
    a tenth of noise, which tells equal vectors apart. A token with a zero vector, or without any, starts random.
    """
    rng = np.random.default_rng([seed, 2])
    weight = model.get_input_embeddings().weight
    old = weight[: int(ids.min())] if int(ids.min()) > 0 else weight
    scale = float(old.detach().float().std())
    noise = rng.standard_normal((len(ids), weight.shape[1]))
    values = noise
    if vectors is not None:
        drawn = rng.standard_normal((max(vectors.shape[1], weight.shape[1]), min(vectors.shape[1], weight.shape[1])))
        turn = np.linalg.qr(drawn)[0]  # Orthonormal columns.
        projected = vectors @ (turn if len(turn) == vectors.shape[1] else turn.T)
        norm = np.sqrt(np.mean(projected**2, axis=1, keepdims=True))
        known = norm[:, 0] > 0
        values = np.where(known[:, None], projected / np.where(norm > 0, norm, 1) + 0.1 * noise, noise)
    rows = torch.tensor(scale * values, dtype=torch.float32)
    adapters.set_rows(model, ids, {"input": rows, "output": rows})


def with_lora(model: PreTrainedModel, recipe: Recipe, ids: torch.Tensor) -> PeftModel:
    """LoRA on the blocks, and of the embedding (and an untied head) the identifier rows alone."""
    check_keys(recipe.lora, {item.name for item in fields(LoraConfig)} - set(LORA_ELSEWHERE), LORA_ELSEWHERE, "lora")
    try:
        result = get_peft_model(model, LoraConfig(**{**LORA_DEFAULTS, **recipe.lora}))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"recipe: [lora] was refused: {error}") from error
    return with_rows(result, ids)


def with_rows(lora: PeftModel, ids: torch.Tensor) -> PeftModel:
    """``lora``, with the rows ``ids`` of its embedding (and an untied head) trained too, ready for TRL."""
    model = lora.get_base_model()
    train_rows(model, ids)
    # TRL reads it and would round to bfloat16 what is trained; PEFT has read it.
    model.is_loaded_in_4bit = False
    return lora
