from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from genrec.dropout import dropout
from genrec.errors import ConfigError

SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2
}  # fmt: skip


def tiny(lora: bool) -> Any:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, initializer_range=0.2))
    return get_peft_model(model, LoraConfig(target_modules="all-linear")) if lora else model


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_dropout_acts_in_training_only_and_is_gone_afterwards(lora: bool) -> None:
    model, ids = tiny(lora), torch.arange(36).reshape(3, 12)
    hooks = [module._forward_hooks.copy() for module in model.modules()]
    attention = model.get_base_model() if lora else model
    rates = [layer.self_attn.attention_dropout for layer in attention.model.layers]

    def logits(mode: bool) -> torch.Tensor:
        with torch.no_grad():
            return model.train(mode)(input_ids=ids).logits

    calm = logits(False)
    with dropout(model, 0.5):
        torch.testing.assert_close(logits(False), calm, rtol=0, atol=0)
        torch.manual_seed(0)
        noisy = logits(True)
        assert (noisy - calm).abs().max() > 0.1
        assert (logits(True) - noisy).abs().max() > 0.1
        assert {layer.self_attn.attention_dropout for layer in attention.model.layers} == {0.5}
    with pytest.raises(KeyboardInterrupt), dropout(model, 0.5):
        raise KeyboardInterrupt
    torch.testing.assert_close(logits(True), calm, rtol=0, atol=0)
    assert [module._forward_hooks for module in model.modules()] == hooks
    assert [layer.self_attn.attention_dropout for layer in attention.model.layers] == rates
    with dropout(model, 0.0):
        torch.testing.assert_close(logits(True), calm, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)), "self_attn or attn in every layer; .* has 0 in 2 layers"),
        (
            lambda: OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=32, word_embed_proj_dim=16)),
            "block mlp in every layer; OPTForCausalLM has 0 in 2 layers. Set dropout = 0",
        ),
    ],
    ids=["neox", "opt"],
)
def test_blocks_of_other_names_are_refused_and_not_dropped_in_part(model: Any, message: str) -> None:
    made = model()
    with pytest.raises(ConfigError, match=message), dropout(made, 0.2):
        pytest.fail("trained with a part of the dropout")
    assert not any(module._forward_hooks for module in made.modules())
    with dropout(made, 0.0):
        pass


def test_blocks_named_attn_have_it_too() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2))
    with dropout(model, 0.2):
        assert sum(bool(module._forward_hooks) for module in model.modules()) == 5
