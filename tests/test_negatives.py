"""Sampled softmax: with all tokens drawn it is the whole softmax; with a part it is right on average."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from test_rows import EACH, VOCABULARY, tiny  # type: ignore[import-not-found]

import genrec
from genrec.errors import ConfigError
from genrec.negatives import Negatives
from genrec.rows import train_rows

IDS = torch.arange(20, 36)
NONE = torch.empty(0, dtype=torch.long)


def rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids [4, 10], labels and mask [4, 9]: not every position carries loss."""
    ids = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(1)).reshape(4, 10)
    mask = torch.ones(4, 9, dtype=torch.bool)
    mask[1, 3:] = False
    return ids, ids[:, 1:], mask


def sampled(model: Any, negatives: Negatives) -> torch.Tensor:
    ids, labels, mask = rows()
    with negatives.on(model.get_output_embeddings(), labels, mask, torch.ones(4, dtype=torch.bool)) as weights:
        logits = model(input_ids=ids).logits[0]
    target = torch.zeros(len(weights), dtype=torch.long)
    return torch.nn.functional.cross_entropy(logits.float() + weights, target, reduction="none")


def whole(model: Any) -> torch.Tensor:
    ids, labels, mask = rows()
    logits = model(input_ids=ids).logits[:, :-1][mask].float()
    return torch.nn.functional.cross_entropy(logits, labels[mask], reduction="none")


def gradients(model: Any, losses: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    losses.sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("rows_alone", [False, True])
@pytest.mark.parametrize(("family", "tied"), EACH)
def test_with_all_tokens_drawn_loss_and_gradients_are_those_of_the_whole_softmax(
    family: str, tied: bool, rows_alone: bool
) -> None:
    model = tiny(family, tied)
    if rows_alone:
        train_rows(model, IDS)
    negatives = Negatives(IDS, VOCABULARY, 4 * VOCABULARY, NONE)
    ours, plain = sampled(model, negatives), whole(model)
    torch.testing.assert_close(ours, plain)
    found, expected = gradients(model, ours), gradients(model, plain)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4)


def test_the_models_own_head_is_left_as_it_was() -> None:
    model = tiny("llama", True)
    before = whole(model)
    with (
        pytest.raises(RuntimeError, match="stop"),
        Negatives(IDS, VOCABULARY, 8, NONE).on(
            model.get_output_embeddings(), *rows()[1:], torch.ones(4, dtype=torch.bool)
        ),
    ):
        raise RuntimeError("stop")
    torch.testing.assert_close(whole(model), before)


@pytest.mark.parametrize("followed", [False, True])
def test_the_estimated_normaliser_is_right_on_average(followed: bool) -> None:
    """Over every draw there is of 4 out of 5 identifier tokens and 2 out of 3 others; token 7 is of an unseen item."""
    negatives = Negatives(torch.tensor([1, 2, 4, 5, 7]), 8, 8, torch.tensor([7]))
    negatives.counts = [4, 2]
    logits = torch.randn(8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    draws = [
        torch.tensor([*inside, *others])
        for inside in itertools.combinations([1, 2, 4, 5, 7], 4)
        for others in itertools.combinations([0, 3, 6], 2)
    ]
    wanted = logits.exp().sum() - (logits[7].exp() if followed else 0)
    for target in range(7):
        found = []
        for drawn in draws:
            weights = negatives._weights(torch.tensor([target]), drawn, torch.tensor([followed]))[0].double()
            found.append((torch.cat([logits[[target]], logits[drawn]]) + weights).exp().sum())
        torch.testing.assert_close(torch.stack(found).mean(), wanted, atol=1e-6, rtol=1e-6)


def test_draws_are_distinct_of_both_parts_and_differ() -> None:
    negatives = Negatives(IDS, VOCABULARY, 12, NONE)
    torch.manual_seed(0)
    one, two = negatives.draw(torch.device("cpu")), negatives.draw(torch.device("cpu"))
    for drawn in (one, two):
        assert len(drawn) == len(set(drawn.tolist())) == 12
        assert torch.isin(drawn, IDS).sum() == 9
    assert one.tolist() != two.tolist()


def test_a_run_with_all_tokens_drawn_is_a_run_with_none(workspace: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    made = {}
    for label, count in (("whole", 0), ("drawn", 100_000)):
        recipe = genrec.config.load_recipe(workspace / "adapters" / "lora.toml", [f"negatives={count}", "dropout=0"])
        (tmp_path / label / "adapters").mkdir(parents=True)
        for there in [workspace / "prompts", workspace / "data", *(workspace / "adapters").iterdir()]:
            (tmp_path / label / there.relative_to(workspace)).symlink_to(there)
        made[label] = load_file(genrec.train(recipe, name="made", workspace=tmp_path / label) / "rows.safetensors")
    for name, value in made["whole"].items():
        torch.testing.assert_close(made["drawn"][name], value, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["negatives=-1"], "negatives is -1"),
        (["negatives=3"], "at least 8"),
        (["negatives=64", "training.label_smoothing_factor=0.1"], "spreads over the whole vocabulary"),
    ],
)
def test_wrong_numbers_are_refused(workspace: Path, changes: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        genrec.config.load_recipe(workspace / "adapters" / "lora.toml", changes)
