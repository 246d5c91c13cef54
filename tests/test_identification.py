"""What identifiers are fitted on. What a recipe inherits or is refused is in test_training.py."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Run, semantic_adapter
from test_training import changed, tiny_log
from transformers import AutoModelForCausalLM

import genrec
from genrec import features, training
from genrec.errors import ConfigError, LeakError
from genrec.identification import build_identifiers
from genrec.identifiers import Identifiers

__all__ = ["tiny_log"]  # A fixture.


def test_held_out_events_change_neither_identifiers_nor_features(tiny_log: genrec.Dataset) -> None:
    other = changed(tiny_log, "held out")
    assert other.hash != tiny_log.hash
    options: dict[str, Any] = {"levels": 2, "codes": 6}
    one, two = (build_identifiers(data, "semantic", **options) for data in (tiny_log, other))
    assert one.hash == two.hash
    assert one.fitted_on == two.fitted_on == tiny_log.split().train_hash
    for left, right in zip(tiny_log.split().test.targets, other.split().test.targets, strict=True):
        assert left != right
    vectors = [features.item_vectors(data.items, data.split().train).vectors for data in (tiny_log, other)]
    np.testing.assert_array_equal(*vectors)


def test_training_events_do_change_what_is_fitted_on_them(tiny_log: genrec.Dataset) -> None:
    """The guard above could not pass by reading nothing at all."""
    other = changed(tiny_log, "training")
    one, two = (build_identifiers(data, "semantic", levels=2, codes=6) for data in (tiny_log, other))
    assert one.fitted_on != two.fitted_on
    vectors = [features.item_vectors(data.items, data.split().train).vectors for data in (tiny_log, other)]
    assert not np.array_equal(*vectors)


def test_codes_are_made_from_the_rows_of_an_adapter_and_text(workspace: Path, tiny_log: genrec.Dataset) -> None:
    """The rows are found again in the model itself."""
    folder = workspace / "adapters" / "pretrained"
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    tokenizer = genrec.Recommender.load(folder).tokenization.tokenizer
    spelled = [token for (token,) in Identifiers.load(folder / "identifiers.parquet").tokens]
    rows = model.get_input_embeddings().weight.detach().numpy()[tokenizer.convert_tokens_to_ids(spelled)]
    text = features.text_vectors(features.text(tiny_log.items), 8, 3)
    vectors = np.concatenate([features.unit(rows), features.unit(text)], axis=1)
    expected = Identifiers.build("semantic", tiny_log.item_ids, vectors, levels=2, codes=6, seed=3)
    options: dict[str, Any] = {"levels": 2, "codes": 6, "dimensions": 8, "seed": 3}
    made = build_identifiers(tiny_log, "semantic", rows_of=folder, **options)
    assert made.tokens == expected.tokens
    assert made.fitted_on == tiny_log.split().train_hash
    assert made.tokens != build_identifiers(tiny_log, "semantic", **options).tokens


def test_rows_that_know_what_is_to_be_predicted_are_refused(
    workspace: Path, tmp_path: Path, tiny_log: genrec.Dataset
) -> None:
    folder, options = workspace / "adapters" / "pretrained", {"levels": 2, "codes": 6}
    with pytest.raises(LeakError, match=r"adapter .*pretrained was trained on other interactions"):
        build_identifiers(changed(tiny_log, "training"), "semantic", rows_of=folder, **options)
    with pytest.raises(LeakError, match="Make it again with the same data"):
        build_identifiers(tiny_log, "semantic", split="temporal", rows_of=folder, **options)
    fewer = genrec.Dataset.from_frames(tiny_log.interactions, tiny_log.items.reverse(), tiny_log.users)
    with pytest.raises(ConfigError, match="other items"):
        build_identifiers(fewer, "semantic", rows_of=folder, **options)
    with pytest.raises(ConfigError, match="the scheme is 'random'"):
        build_identifiers(tiny_log, "random", rows_of=folder, **options)
    several = semantic_adapter(
        workspace, tmp_path / "shop", (workspace / "prompts" / "next_item.jinja").read_text(), codes=6, max_length=64
    )
    with pytest.raises(ConfigError, match=r"several tokens \(semantic\)"):
        build_identifiers(tiny_log, "semantic", rows_of=several, **options)


def test_a_recipe_trains_with_the_identifiers_that_the_command_wrote(workspace: Path, tmp_path: Path, run: Run) -> None:
    root = tmp_path / "shop"
    shutil.copytree(workspace, root)
    out = root / "rows.parquet"
    done = run(
        "ids", "build", root / "data" / "tiny", "--scheme", "semantic", "--levels", 2, "--codes", 6,
        "--rows-of", root / "adapters" / "pretrained", "--out", out,
    )  # fmt: skip
    assert done.code == 0, done.err
    made = training.train(
        root / "adapters" / "pretrained.toml",
        assignments=["identifiers.file=rows.parquet", "training.max_steps=1"], name="semantic",
    )  # fmt: skip
    assert Identifiers.load(made / "identifiers.parquet").hash == Identifiers.load(out).hash
