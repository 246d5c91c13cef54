"""The output layer of a checkpoint by itself, for engines whose model runs elsewhere and gives hidden states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from genrec.errors import AdapterError

# Scales of logits that some architectures have and that are not applied here.
_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier", "logits_soft_cap")


class Head:
    """Logits are ``states @ weight.T``, with a bias and a final soft-cap where the model has one.

    Args:
        folder: The checkpoint.
        config: Its configuration, of the text part.
        dtype, device: Of the weights that are read.

    Raises:
        AdapterError: The layer is of another kind, or is not in the checkpoint.
    """

    def __init__(self, folder: Path, config: Any, dtype: torch.dtype, device: torch.device) -> None:
        for key in _SCALES:
            if getattr(config, key, None) not in (None, 1, 1.0):
                raise AdapterError(
                    f"{folder}: {key} is {getattr(config, key)}, and the engine vllm knows heads without it alone. "
                    'Use engine = "local".'
                )
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(config)
        layer = network.get_output_embeddings()
        named = list(network.named_parameters(remove_duplicate=False))
        read = [
            _tensor(folder, [name for name, value in named if value is wanted])
            for wanted in (layer.weight, getattr(layer, "bias", None))
            if wanted is not None
        ]
        self.weight = read[0].to(device, dtype)
        self.bias = read[1].to(device, dtype) if len(read) > 1 else None
        self.soft_cap: float | None = getattr(config, "final_logit_softcapping", None)
        self.vocab_size = len(self.weight)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """[m, vocabulary] of hidden states [m, d], in the dtype and on the device of the weights."""
        logits = torch.nn.functional.linear(states.to(self.weight), self.weight, self.bias)
        return logits if self.soft_cap is None else torch.tanh(logits / self.soft_cap) * self.soft_cap


def _tensor(folder: Path, names: list[str]) -> torch.Tensor:
    """The tensor that has one of ``names`` in a checkpoint."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in names:
                if name in file.keys():  # noqa: SIM118
                    found: torch.Tensor = file.get_tensor(name)
                    return found
    raise AdapterError(f"{folder}: no .safetensors file holds {' or '.join(names)}, the output layer. Save it again.")
