from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

import genrec
from genrec import training
from genrec.errors import ConfigError
from genrec.identifiers import Identifiers

# ---- Title identifiers, end to end -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def titled(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace whose items are named by their titles (equal, empty, long and Chinese ones too): a full adapter
    trained from random weights, and a LoRA adapter on the base that had no identifiers."""
    root = tmp_path_factory.mktemp("titled")
    for name in ("prompts", "adapters/random"):
        shutil.copytree(workspace / name, root / name)
    data = genrec.Dataset.load(workspace / "data" / "tiny")
    titles = data.items["title"].to_list()
    titles[:8] = ["Film", "Film", "", "", "红楼梦 👩‍👧", "</s><|end|><|title_end|>", "Film 6 " * 11, "Film 6 " * 12]
    items = data.items.with_columns(title=pl.Series(titles))
    genrec.Dataset.from_frames(data.interactions, items, data.users, name="tiny").save(root / "data" / "tiny")
    common = (
        'base = "adapters/random"\ndata = "data/tiny"\nmax_length = 128\nfeatures = 8\n'
        '[identifiers]\nscheme = "title"\n[[tasks]]\nprompt = "prompts/next_item.jinja"\n'
        '[[tasks]]\nprompt = "prompts/title_to_item.jinja"\nweight = 0.5\n[walks]\nshare = 0.3\n'
        "[training]\nnum_train_epochs = 1\nlearning_rate = 1e-2\n"
    )
    (root / "adapters" / "full.toml").write_text('tuning = "full"\n' + common)
    (root / "adapters" / "lora.toml").write_text(common + "[lora]\nr = 4\n")
    (root / "eval").mkdir()
    (root / "eval" / "tiny.toml").write_text(
        'data = "data/tiny"\nk = [5, 10]\nnum_beams = 24\nbaselines = ["popularity"]\n'
        '[adapters]\nfull = "adapters/full"\nlora = "adapters/lora"\n'
    )
    for name in ("full", "lora"):
        training.train(root / "adapters" / f"{name}.toml")
    return root


@pytest.mark.parametrize("name", ["full", "lora"])
def test_an_adapter_with_title_identifiers_recommends_what_it_scores(titled: Path, name: str) -> None:
    rec = genrec.Recommender.load(titled / "adapters" / name)
    assert rec.adapter.identifiers.scheme == "title"
    assert rec.adapter.identifiers.vocabulary == ["<|title_end|>", "<|title_1|>"]
    assert set(rec.tokenization.lengths) >= {1, 2, 33, 34}
    history = rec.item_ids[3:7]
    for past in (history, []):
        found = rec.recommend([past], k=24, exclude_seen=False)[0]
        assert sorted(one.item_id for one in found) == sorted(rec.item_ids)
        scores = rec.score(past, [one.item_id for one in found])
        np.testing.assert_allclose([one.score for one in found], scores, atol=1e-4)
        assert (np.diff([one.score for one in found]) <= 1e-6).all()
    assert not {one.item_id for one in rec.recommend([history], k=24)[0]} & set(history)
    again = genrec.Recommender.load(titled / "adapters" / name)
    np.testing.assert_array_equal(again.score(history, rec.item_ids), rec.score(history, rec.item_ids))


def test_lora_moves_the_rows_of_the_new_tokens_alone(titled: Path) -> None:
    from genrec import adapter as adapters
    from genrec import base as bases

    adapter = adapters.Adapter.load(titled / "adapters" / "lora")
    tokenization = adapter.tokenization()
    trained = adapter.model(tokenization).get_input_embeddings().weight
    before = bases.find("adapters/random", titled).model().get_input_embeddings().weight
    new = adapters.identifier_ids(tokenization)
    assert new.tolist() == list(range(len(before), len(before) + 2))
    assert len(trained) == len(before) + 2
    torch.testing.assert_close(trained[: len(before)], before, rtol=0, atol=0)


def test_adapters_with_title_identifiers_are_evaluated_and_inherited(titled: Path) -> None:
    report = genrec.evaluate(titled / "eval" / "tiny.toml")
    assert {"full", "lora"} <= set(report.rows)
    (titled / "adapters" / "next.toml").write_text(
        'base = "adapters/full"\ndata = "data/tiny"\nmax_length = 128\nfeatures = 8\n'
        '[[tasks]]\nprompt = "prompts/next_item.jinja"\n[training]\nmax_steps = 1\n'
    )
    inherited = Identifiers.load(training.train(titled / "adapters" / "next.toml") / "identifiers.parquet")
    assert inherited == Identifiers.load(titled / "adapters" / "full" / "identifiers.parquet")


def test_title_identifiers_are_built_with_the_tokens_of_a_base(titled: Path) -> None:
    data = titled / "data" / "tiny"
    made = training.build_identifiers(data, "title", base=str(titled / "adapters" / "random"))
    trained = Identifiers.load(titled / "adapters" / "full" / "identifiers.parquet")
    assert (made.tokens, made.fitted_on) == (trained.tokens, "")
    with pytest.raises(ConfigError, match="spelled in the tokens of a base"):
        training.build_identifiers(data, "title")
