"""The trainer by itself, on a small model. What whole runs make of it is in test_training.py."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from trl import SFTTrainer

from genrec import adapter, base, config, tuning
from genrec.rows import is_rows
from genrec.tokenization import IGNORE
from genrec.trainer import Trainer, sft_config

VOCABULARY, NEW = 40, torch.tensor([36, 37, 38, 39])
TOKENIZER = base.train_tokenizer(["a"], 262)
RECIPE = config.Recipe("b", "d", (config.Task("p"),))


def tiny(tied: bool, lora: bool = False) -> Any:
    """A Llama of 40 tokens of which the last four are identifiers, as training sees it."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=tied, initializer_range=0.2, pad_token_id=0,
    )  # fmt: skip
    model: PreTrainedModel = LlamaForCausalLM(shape)
    if not lora:
        return model
    trained = tuning.with_lora(model, replace(RECIPE, lora={"r": 4}), NEW)
    with torch.no_grad():  # As after some steps: LoRA begins as zero.
        for value in trained.parameters():
            if value.requires_grad:
                value += 0.1 * torch.randn_like(value)
    return trained


def batch() -> dict[str, torch.Tensor]:
    """Three rows of unequal length, loss on some positions."""
    rng = np.random.default_rng(0)
    ids = torch.tensor(rng.integers(1, VOCABULARY, (3, 12)))
    mask = torch.ones_like(ids)
    mask[1, 8:] = mask[2, 5:] = 0
    labels = torch.where(torch.tensor(rng.random((3, 12)) < 0.4) & (mask == 1), ids, IGNORE)
    labels[:, 4] = ids[:, 4]
    return {"input_ids": ids * mask, "labels": labels, "attention_mask": mask}


def trainer(kind: type, model: Any, folder: Path) -> Any:
    import datasets

    arguments = sft_config(RECIPE, str(folder))
    table = datasets.Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[1, 2]]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kind(model=model, args=arguments, train_dataset=table, processing_class=TOKENIZER)


# The loss


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("count", [None, 29])
def test_the_loss_is_trls_and_the_plain_cross_entropy(
    tied: bool, lora: bool, count: int | None, tmp_path: Path
) -> None:
    models = [tiny(tied, lora) for _ in range(3)]
    inputs = batch()
    labels = inputs["labels"]
    logits = models[2](input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    plain = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum"
    ) / (count or (labels[:, 1:] != IGNORE).sum())
    found = [
        trainer(kind, model, tmp_path).compute_loss(model, dict(inputs), num_items_in_batch=count)
        for kind, model in ((Trainer, models[0]), (SFTTrainer, models[1]))
    ]
    for loss in found:
        torch.testing.assert_close(loss, plain, rtol=0, atol=1e-5)
        loss.backward()
    plain.backward()
    gradients = [{name: p.grad for name, p in model.named_parameters() if p.requires_grad} for model in models]
    for name, gradient in gradients[2].items():
        for other in gradients[:2]:
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-6)
    assert any(gradient.abs().max() > 0 for gradient in gradients[2].values())


def test_event_weights_multiply_the_loss_of_each_label(tmp_path: Path) -> None:
    def loss(weights: torch.Tensor | None) -> float:
        model, inputs = tiny(True), batch()
        given = inputs if weights is None else {**inputs, "weights": weights}
        found = trainer(Trainer, model, tmp_path).compute_loss(model, given, num_items_in_batch=7)
        return float(found.detach())

    ones = torch.ones(3, 12)
    first = ones.clone()
    first[1:] = 0
    assert loss(ones) == pytest.approx(loss(None), abs=1e-6)
    assert loss(3 * ones) == pytest.approx(3 * loss(None), abs=1e-5)
    assert loss(first) + loss(ones - first) == pytest.approx(loss(None), rel=1e-6)
    assert 0 < loss(first) < loss(None)


def test_micro_batches_of_a_model_that_takes_no_count_are_one_batch(tmp_path: Path) -> None:
    """As Gemma 3n and 4 say of themselves."""
    moved, rows = [], [{key: value[row : row + 1] for key, value in batch().items()} for row in range(3)]
    for own in (True, False):
        model = tiny(True)
        model.accepts_loss_kwargs = own
        made = trainer(Trainer, model, tmp_path)
        micro, count = made.get_batch_samples(iter(rows), 3, "cpu")
        made.current_gradient_accumulation_steps = 3
        made.create_optimizer()
        for inputs in micro:
            made.training_step(model, dict(inputs), count)
        moved.append({name: p.grad.clone() for name, p in model.named_parameters()})
    labels = batch()["labels"]
    model = tiny(True)
    logits = model(input_ids=batch()["input_ids"], attention_mask=batch()["attention_mask"]).logits
    torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE
    ).backward()
    for name, parameter in model.named_parameters():
        for found in moved:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("count", [None, torch.tensor(0)])
def test_a_batch_without_labels_has_no_loss(tmp_path: Path, count: torch.Tensor | None) -> None:
    model, inputs = tiny(True), batch()
    inputs["labels"] = torch.full_like(inputs["labels"], IGNORE)
    loss = trainer(Trainer, model, tmp_path).compute_loss(model, inputs, num_items_in_batch=count)
    loss.backward()
    assert loss == 0
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())


def test_the_models_own_head_is_left_as_it_was(tmp_path: Path) -> None:
    model = tiny(True)
    trainer(Trainer, model, tmp_path).compute_loss(model, batch())
    assert not model.get_output_embeddings()._forward_pre_hooks
    assert model(input_ids=batch()["input_ids"]).logits.shape == (3, 12, VOCABULARY)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_under_lora_nothing_but_lora_and_identifier_rows_is_trained(tied: bool) -> None:
    before = tiny(tied).state_dict()
    model = tiny(tied, lora=True)
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert trained
    assert all(".lora_" in name or is_rows(name) for name in trained)
    inner = model.get_base_model()
    old = torch.arange(int(NEW[0]))
    for key, value in adapter.rows(model, torch.arange(VOCABULARY)).items():
        name = {"input": "model.embed_tokens.weight", "output": "lm_head.weight"}[key]
        assert torch.equal(value[old], before[name][old])
        assert (value[NEW] != before[name][NEW]).any(dim=1).all()
    assert set(adapter.rows(model, NEW)) == ({"input"} if tied else {"input", "output"})
    assert inner.config.tie_word_embeddings is tied


def test_label_smoothing_acts(tmp_path: Path) -> None:
    import datasets

    given = {"label_smoothing_factor": 0.2}
    arguments = sft_config(replace(RECIPE, training=given), str(tmp_path))
    model, table = tiny(True), datasets.Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[1, 2]]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        smooth = Trainer(model=model, args=arguments, train_dataset=table, processing_class=TOKENIZER)
    found = smooth.compute_loss(model, batch(), num_items_in_batch=7)
    inputs = batch()
    labels = inputs.pop("labels")
    logits = model(**inputs).logits
    chosen = labels[:, 1:] != IGNORE
    logs = logits[:, :-1][chosen].log_softmax(-1)
    plain = -logs.gather(1, labels[:, 1:][chosen][:, None]).sum()
    torch.testing.assert_close(found, (0.8 * plain - 0.2 * logs.mean(-1).sum()) / 7, rtol=0, atol=1e-5)
