"""What benchmarks are made of: models by name or with random weights, a prompt, and logs that are drawn."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from genrec import base, files
from genrec.dataset import Dataset


def shipped_prompt(name: str) -> str:
    """The text of a prompt that genrec ships."""
    return (files.shipped() / "prompts" / f"{name}.jinja").read_text(encoding="utf-8")


def load_model(name: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """A model by the name of a base, or with random weights: ``random-small``, as small as the quickstart's base,
    ``random-135m``, of the sizes of SmolLM2-135M, and ``random-0.6b``, of those of Qwen3-0.6B."""
    torch.manual_seed(0)
    made: Any
    if name == "random-0.6b":
        wide = {"vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28}
        more = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40_960}
        made = Qwen3ForCausalLM(Qwen3Config(**wide, **more, tie_word_embeddings=True))
    elif name == "random-135m":
        sizes = {"vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
        heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192}
        made = LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=True, rms_norm_eps=1e-5))
    elif name == "random-small":
        sizes = {"vocab_size": 1000, "hidden_size": 128, "intermediate_size": 512}
        layers = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4}
        made = LlamaForCausalLM(LlamaConfig(**sizes, **layers, tie_word_embeddings=True))
    else:
        return base.find(name).model(dtype).to(device).eval()
    return made.to(dtype).to(device).eval()


def generated_data(users: int = 3000, items: int = 1000, seed: int = 0) -> Dataset:
    """A log with something to learn: 40 groups of items that share words, and users who stay within a group or two."""
    rng = np.random.default_rng(seed)
    group = rng.integers(40, size=items)
    titles = [f"group{group[item]} kind{item % 7} item {item}" for item in range(items)]
    members = [np.flatnonzero(group == number) for number in range(40)]
    rows = []
    for user in range(users):
        likes = rng.integers(40, size=2)
        for time_ in range(int(rng.integers(5, 20))):
            chosen = members[likes[int(rng.random() < 0.3)]]
            if len(chosen):
                # The popularity within a group falls with the rank, and moves on with the time.
                rank = min(int(rng.exponential(3.0)) + time_ // 3, len(chosen) - 1)
                rows.append((f"u{user}", f"i{chosen[rank]}", 1_000_000 + 60 * time_))
    log = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    shown = pl.DataFrame({"item_id": [f"i{item}" for item in range(items)], "title": titles})
    return Dataset.from_frames(log.unique(maintain_order=True), shown, name="generated")


def random_log(users: int, items: int, least: int, most: int, seed: int = 0) -> Dataset:
    """Histories of random items, ``least`` to ``most`` events long: something to time, nothing to learn."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(least, most + 1, size=users)
    rows = [
        (f"u{user}", f"i{item}", 1_000_000 + 60 * time_)
        for user, length in enumerate(lengths)
        for time_, item in enumerate(rng.choice(items, size=min(length, items), replace=False))
    ]
    log = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    names = {"item_id": [f"i{item}" for item in range(items)], "title": [f"item {item}" for item in range(items)]}
    return Dataset.from_frames(log, pl.DataFrame(names), name="generated")
