"""The model that is trained: how it is loaded, where identifier rows start, what moves. How it learns is in
test_training.py."""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, Phi3Config, Qwen3Config

from genrec import adapter, base, config, tuning
from genrec.config import Recipe, Tuning
from genrec.errors import ConfigError
from genrec.rows import is_rows
from genrec.trainer import Trainer

VOCABULARY, NEW = 40, torch.tensor([36, 37, 38, 39])
RECIPE = Recipe("b", "d", (config.Task("p"),), lora={"r": 4})
FAMILIES = {
    "llama": (LlamaConfig, {}),
    "qwen3": (Qwen3Config, {"head_dim": 8}),
    "phi3": (Phi3Config, {}),
    "gemma3": (Gemma3TextConfig, {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4}),
}


def tiny(tied: bool) -> Any:
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=tied, initializer_range=0.2, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(shape)


def test_near_vectors_start_near_and_in_the_scale_of_the_old_rows() -> None:
    model, rng = tiny(True), np.random.default_rng(0)
    model.resize_token_embeddings(140, mean_resizing=False)
    ids = torch.arange(40, 140)
    before = model.get_input_embeddings().weight[:40].detach().clone()
    vectors = rng.standard_normal((100, 12)).astype(np.float32)
    vectors[1] = vectors[0] + 0.01 * vectors[1]
    vectors[2] = vectors[0]
    vectors[3] = 0
    tuning.start_rows(model, ids, vectors, seed=1)
    rows = model.get_input_embeddings().weight[40:].detach().clone()
    near, far = torch.dist(rows[0], rows[1]), torch.cdist(rows[:1], rows[3:]).min()
    assert near < far / 2
    assert 0 < torch.dist(rows[0], rows[2]) < far / 2
    assert rows[3].abs().max() > 0
    torch.testing.assert_close(rows.std(), before.std(), rtol=0.15, atol=0)
    assert torch.equal(model.get_input_embeddings().weight[:40], before)
    tuning.start_rows(model, ids, vectors, seed=1)
    assert torch.equal(model.get_input_embeddings().weight[40:], rows)
    tuning.start_rows(model, ids, vectors, seed=2)
    assert not torch.equal(model.get_input_embeddings().weight[40:], rows)


@pytest.mark.parametrize("vectors", [None, np.zeros((4, 3), dtype=np.float32)], ids=["none", "zero"])
def test_rows_without_features_start_random_and_distinct(vectors: np.ndarray | None) -> None:
    model = tiny(False)
    tuning.start_rows(model, NEW, vectors, seed=0)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        rows = layer.weight[NEW].detach()
        assert torch.isfinite(rows).all()
        assert torch.pdist(rows).min() > 0.1
    torch.testing.assert_close(*(adapter.rows(model, NEW)[key] for key in ("input", "output")))


# What is trained


@pytest.fixture(scope="module", params=[(family, tied) for family in FAMILIES for tied in (True, False)], ids=str)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved base of 36 tokens."""
    family, tied = request.param
    kind, more = FAMILIES[family]
    torch.manual_seed(0)
    shape = kind(
        vocab_size=36, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tied, initializer_range=0.2, max_position_embeddings=64,
        pad_token_id=None, bos_token_id=1, eos_token_id=2, **more,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("base")
    AutoModelForCausalLM.from_config(shape).save_pretrained(path)
    return path


def loaded(folder: Path, how: Tuning) -> Any:
    """The model of a base as training begins with it: resized, its new rows started."""
    model = tuning.load(replace(RECIPE, tuning=how, lora={}), base.Base("b", folder))
    adapter.resize(model, VOCABULARY)
    tuning.start_rows(model, NEW, None, seed=0)
    return model


def prepared(folder: Path, how: Tuning) -> Any:
    torch.manual_seed(0)
    model = loaded(folder, how)
    return model if how == "full" else tuning.with_lora(model, replace(RECIPE, tuning=how), NEW)


def loss(model: Any) -> torch.Tensor:
    ids = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(1)).reshape(4, 10)
    logits = model(input_ids=ids).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def steps(model: Any) -> None:
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.03)
    for _ in range(3):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    optimizer.zero_grad()


def plain(model: PeftModel, folder: Path, how: Tuning) -> Any:
    """The same function by PEFT and transformers alone: LoRA on the base, and all rows in plain matrices."""
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    inner = loaded(folder, how)
    adapter.set_rows(inner, torch.arange(VOCABULARY), adapter.rows(model, torch.arange(VOCABULARY)))
    result = get_peft_model(inner, model.peft_config["default"])
    set_peft_model_state_dict(result, get_peft_model_state_dict(model, save_embedding_layers=False))
    for layer in (inner.get_input_embeddings(), inner.get_output_embeddings()):
        layer.requires_grad_(True)
    return result


@pytest.mark.parametrize("how", ["lora", "qlora", "full"])
def test_steps_move_what_is_trained_and_nothing_else(folder: Path, how: Tuning) -> None:
    before = adapter.rows(loaded(folder, how), torch.arange(VOCABULARY))
    model = prepared(folder, how)
    frozen = {name: value.detach().clone() for name, value in model.named_parameters() if not value.requires_grad}
    begin = loss(model).item()
    steps(model)
    assert loss(model) < begin
    after = adapter.rows(model, torch.arange(VOCABULARY))
    assert after.keys() == before.keys()
    for key, value in after.items():
        assert (value[NEW] != before[key][NEW]).any(dim=1).all()
        assert torch.equal(value[:36], before[key][:36]) == (how != "full")
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in frozen.items())
    assert bool(frozen) == (how != "full")
    if how != "full":
        trained = {name for name, value in now.items() if value.requires_grad}
        assert all(".lora_" in name or is_rows(name) for name in trained)
        assert all(now[name].dtype == torch.float32 for name in trained)
        assert sum(is_rows(name) for name in trained) == len(after)


@pytest.mark.parametrize("how", ["lora", "qlora"])
def test_loss_and_gradients_are_those_of_a_plain_model(folder: Path, how: Tuning) -> None:
    model = prepared(folder, how)
    steps(model)
    other = plain(model, folder, how)
    found, expected = loss(model), loss(other)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    found.backward()
    expected.backward()
    inner, reference = model.get_base_model(), other.get_base_model()
    layers = [(inner.get_input_embeddings(), reference.get_input_embeddings())]
    if not inner.config.tie_word_embeddings:
        layers.append((inner.get_output_embeddings(), reference.get_output_embeddings()))
    for layer, whole in layers:
        assert whole.weight.grad[NEW].abs().max() > 1e-4
        torch.testing.assert_close(layer.rows.grad, whole.weight.grad[NEW], rtol=0, atol=1e-5)
    others = dict(other.named_parameters())
    for name, value in model.named_parameters():
        if ".lora_" in name:
            torch.testing.assert_close(value.grad, others[name].grad, rtol=0, atol=1e-5)


def test_a_validation_in_the_midst_changes_no_step(folder: Path) -> None:
    """bitsandbytes packs weights for evaluation on some CPUs, and what they then give has no gradient."""
    gradients = []
    for look in (False, True):
        model = prepared(folder, "qlora")
        if look:
            with torch.no_grad():
                before = loss(model.eval())
            torch.testing.assert_close(before, loss(model.train()), rtol=0, atol=1e-6)
        loss(model).backward()
        gradients.append([value.grad for value in model.parameters() if value.requires_grad])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["ours", "trl"])
def test_the_trainer_leaves_what_qlora_trains_in_float32(folder: Path, tmp_path: Path, kind: str) -> None:
    """TRL rounds it to bfloat16 where a model calls itself quantised. TRL's own loss is the plain one, too."""
    import datasets
    from trl import SFTConfig, SFTTrainer

    model = prepared(folder, "qlora")
    steps(model)
    before = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    arguments = SFTConfig(
        output_dir=str(tmp_path), report_to="none", dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False, max_length=None, bf16=False, gradient_checkpointing=False,
        average_tokens_across_devices=False, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = {"ours": Trainer, "trl": SFTTrainer}[kind](
            model=model, args=arguments, processing_class=base.train_tokenizer(["a"], 262),
            train_dataset=datasets.Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[1, 2]]}),
        )  # fmt: skip
    after = dict(model.named_parameters())
    assert all(after[name].dtype == value.dtype and torch.equal(after[name], value) for name, value in before.items())
    ids = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(1)).reshape(4, 10)
    inputs = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    found, expected = trainer.compute_loss(model, inputs), loss(plain(model, folder, "qlora"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    found.backward()
    assert all(after[name].grad is not None for name in before)


def test_four_bits_hold_the_blocks_and_nothing_else(folder: Path) -> None:
    model, whole = loaded(folder, "qlora"), loaded(folder, "lora")
    weights = dict(model.named_parameters())
    for name, value in whole.named_parameters():
        if "proj" in name:
            assert weights[name].dtype == torch.uint8
            assert weights[name].numel() == value.numel() / 2
        else:
            assert torch.equal(weights[name], value)
    assert 1e-4 < (loss(model) - loss(whole)).abs() < 0.5


def test_qlora_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else find_spec(name, *rest)
    )
    with pytest.raises(ConfigError, match=r'tuning is "qlora": .* pip install "genrec\[qlora\]"'):
        tuning.load(replace(RECIPE, tuning="qlora"), base.Base("b", tmp_path))


def test_lora_on_the_head_is_refused() -> None:
    recipe = replace(RECIPE, lora={"target_modules": ["q_proj", "lm_head"]})
    with pytest.raises(ConfigError, match=r"has a Linear where .* out of lora\.target_modules"):
        tuning.with_lora(tiny(False), recipe, NEW)
