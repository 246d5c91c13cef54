"""Identifier rows beside a frozen embedding and head: the same numbers as a plain model, for less."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Phi3Config, Qwen3Config

from genrec.engines.local import LocalEngine
from genrec.errors import ConfigError
from genrec.rows import RowHead, is_rows, train_rows

VOCABULARY, WIDTH = 40, 16
IDS = {
    "last": torch.arange(34, 40),
    "between": torch.arange(10, 16),
    "first": torch.arange(6),
    "scattered": torch.tensor([39, 3, 17, 5]),
}
FAMILIES = {
    "llama": (LlamaConfig, {}),
    "qwen3": (Qwen3Config, {"head_dim": 8}),
    "phi3": (Phi3Config, {}),
    "gemma3": (
        Gemma3TextConfig,
        {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4, "final_logit_softcapping": 3.0},
    ),
}
EACH = [(family, tied) for family in FAMILIES for tied in (True, False)]


def tiny(family: str, tied: bool) -> Any:
    """A model of two layers with random weights."""
    torch.manual_seed(0)
    kind, more = FAMILIES[family]
    shape = kind(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tied, initializer_range=0.2, max_position_embeddings=64,
        pad_token_id=None, bos_token_id=1, eos_token_id=2, **more,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(shape, attn_implementation="eager")


def loss(model: Any, lines: int = 4) -> torch.Tensor:
    """Cross entropy of a batch of lines of ten tokens; in four lines every token appears."""
    ids = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(1)).reshape(4, 10)[:lines]
    logits = model(input_ids=ids).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def matrices(model: Any) -> dict[str, Any]:
    tied = model.config.tie_word_embeddings
    return {"input": model.get_input_embeddings(), **({} if tied else {"output": model.get_output_embeddings()})}


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
@pytest.mark.parametrize(("family", "tied"), EACH)
def test_loss_and_gradients_are_those_of_a_plain_model(family: str, tied: bool, ids: torch.Tensor) -> None:
    plain = tiny(family, tied)
    model = copy.deepcopy(plain)
    train_rows(model, ids)
    found, expected = loss(model), loss(plain)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    found.backward()
    expected.backward()
    for (key, layer), other in zip(matrices(model).items(), matrices(plain).values(), strict=True):
        assert other.weight.grad[ids].abs().max() > 1e-3, key
        torch.testing.assert_close(layer.rows.grad, other.weight.grad[ids], rtol=1e-5, atol=1e-6)
        assert layer.base.weight.grad is None
    rows = {name for name, _ in model.named_parameters() if is_rows(name)}
    assert len(rows) == (1 if tied else 2)
    assert not any(is_rows(name) for name, _ in plain.named_parameters())


@pytest.mark.parametrize("ids", [IDS["last"], IDS["scattered"]], ids=["last", "scattered"])
@pytest.mark.parametrize(("family", "tied"), EACH)
def test_steps_move_the_rows_and_nothing_else(family: str, tied: bool, ids: torch.Tensor) -> None:
    plain = tiny(family, tied)
    model = copy.deepcopy(plain)
    train_rows(model, ids)
    trained = [value for name, value in model.named_parameters() if is_rows(name)]
    optimizer = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    old = [row for row in range(VOCABULARY) if row not in ids.tolist()]
    for layer, other in zip(matrices(model).values(), matrices(plain).values(), strict=True):
        assert torch.equal(layer.weight[old], other.weight[old])
        assert (layer.weight[ids] != other.weight[ids]).any(dim=1).all()
        assert torch.equal(layer.weight[ids], layer.rows)
        with torch.no_grad():
            other.weight.copy_(layer.weight)
    torch.testing.assert_close(loss(model), loss(plain), rtol=0, atol=1e-6)
    assert loss(model) < loss(tiny(family, tied))


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_no_matrix_is_copied_and_none_is_made_for_gradients(tied: bool, ids: torch.Tensor) -> None:
    class Record(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.made: list[str] = []

        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
            result = function(*arguments, **(options or {}))
            for one in result if isinstance(result, tuple | list) else [result]:
                if isinstance(one, torch.Tensor) and one.untyped_storage().data_ptr() not in frozen:
                    self.made += [str(function)] if sorted(one.shape) == [WIDTH, VOCABULARY] else []
            return result

    model = tiny("llama", tied)
    frozen = {value.untyped_storage().data_ptr() for value in model.parameters()}
    with Record() as plain:
        loss(model, 3).backward()
    assert plain.made  # The gradient of the embedding, for one.
    train_rows(model, ids)
    model.zero_grad()
    with Record() as record:
        loss(model, 3).backward()
    assert not record.made


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_rows_of_a_bfloat16_model_are_kept_in_float32(family: str, tied: bool) -> None:
    plain = tiny(family, tied).to(torch.bfloat16)
    model, ids = copy.deepcopy(plain), IDS["last"]
    train_rows(model, ids)
    inputs = torch.arange(VOCABULARY)[None]
    assert torch.equal(model.get_input_embeddings()(inputs), plain.get_input_embeddings()(inputs))
    logits = model(input_ids=inputs).logits
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits, plain(input_ids=inputs).logits, rtol=0, atol=1e-6)
    for layer in matrices(model).values():
        assert layer.rows.dtype == torch.float32
        assert layer.weight.dtype == torch.bfloat16
        before = layer.weight.clone()
        with torch.no_grad():
            layer.rows.mul_(1 + 2**-12)  # bfloat16 would round each of these steps away.
            assert torch.equal(layer.weight, before)
            for _ in range(64):
                layer.rows.mul_(1 + 2**-12)
        assert not torch.equal(layer.weight, before)


def test_the_row_of_the_padding_token_is_trained_too() -> None:
    model = tiny("llama", False)
    model.get_input_embeddings().padding_idx = 3
    train_rows(model, IDS["scattered"])
    loss(model).backward()
    assert (model.get_input_embeddings().rows.grad.abs().sum(dim=1) > 0).all()


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_a_head_keeps_its_bias(ids: torch.Tensor) -> None:
    torch.manual_seed(0)
    base = torch.nn.Linear(WIDTH, VOCABULARY)
    head = RowHead(base, ids, torch.nn.Parameter(base.weight[ids].detach() + 1))
    hidden = torch.randn(3, 2, WIDTH)
    assert head.bias is base.bias
    torch.testing.assert_close(head(hidden), torch.nn.functional.linear(hidden, head.weight, base.bias))
    torch.testing.assert_close(head(hidden) - base(hidden), torch.zeros(3, 2, VOCABULARY).index_add(
        -1, ids, hidden.sum(dim=-1, keepdim=True).expand(-1, -1, len(ids))))  # fmt: skip


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(tiny("llama", True), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
        train_rows(model.get_base_model(), IDS["last"])
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        loss(model).backward()
        gradients.append({name: value.grad for name, value in model.named_parameters() if value.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    assert any(is_rows(name) for name in gradients[0])
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_decoding_in_the_midst_of_training_is_that_of_a_plain_model(tied: bool) -> None:
    plain = tiny("llama", tied)
    model = copy.deepcopy(plain)
    train_rows(model, IDS["last"])
    prompts, answers = [[4, 5, 35], [6, 36]], [[37, 38], [39]]
    engine = LocalEngine(model)
    assert engine.tree
    found, expected = engine.score(prompts, answers), LocalEngine(plain).score(prompts, answers)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=0, atol=1e-5)
    loss(model).backward()
    assert model.get_input_embeddings().rows.grad.abs().max() > 0


def test_a_layer_that_was_replaced_is_refused() -> None:
    model = get_peft_model(tiny("llama", False), LoraConfig(target_modules=["lm_head", "q_proj"]))
    with pytest.raises(ConfigError, match=r"Take embedding and head out of lora\.target_modules"):
        train_rows(model.get_base_model(), IDS["last"])
