"""The identifiers to train with: made from a data set, read from a file, or brought along by a base."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.torch import load_file

from genrec import adapter as adapters
from genrec import base as bases
from genrec import features
from genrec.config import IdentifierRecipe, Recipe, SplitKind, Ties
from genrec.dataset import Dataset
from genrec.errors import ConfigError
from genrec.identifiers import FROM_VECTORS, Identifiers
from genrec.splits import Split
from genrec.tokenization import text_tokens
from genrec.toml import as_table

_AGAIN = "Make it again with the same data, split, ties and split_seed."


def _titles(data: Dataset, base: bases.Base) -> list[list[str]]:
    return text_tokens(base.tokenizer(), data.items["title"].to_list())


def build_identifiers(
    data: Dataset | str | Path,
    scheme: str,
    *,
    base: str | None = None,
    levels: int = 3,
    codes: int = 256,
    split: SplitKind = "leave_one_out",
    ties: Ties = "file",
    split_seed: int = 0,
    dimensions: int = 64,
    rows_of: str | Path | None = None,
    seed: int = 0,
) -> Identifiers:
    """Identifiers for a data set, from features of its catalogue and the training part of its split alone.

    The codes of "semantic" are made from text vectors and collaborative ones, or, with ``rows_of``, from text vectors
    and what a trained adapter has learnt of each item: the row of its token.

    Args:
        data: A data set, or its folder.
        scheme: A key of ``identifiers.SCHEMES``.
        base: The base whose tokens spell the titles; read by the scheme "title" alone.
        levels, codes: See ``Identifiers.build``.
        split, ties, split_seed: What part of the interactions is for training, as the recipe says that will use them.
        dimensions: Of the text vectors, and as many again of the collaborative ones (``features`` of a recipe).
        rows_of: The folder of an adapter with one token per item, trained on the same part; read by "semantic" alone.
        seed: Of features and clusters, and of the drawing of "random".

    Raises:
        ConfigError: An unknown scheme, no base for "title", more items than ``codes ** levels``, or an adapter of other
            items or with longer identifiers.
        LeakError: The adapter was trained on other interactions.
        AdapterError: There is no such adapter, or it was changed.
    """
    data = data if isinstance(data, Dataset) else Dataset.load(data)
    part = data.split(split, ties=ties, seed=split_seed)
    vectors = None
    if rows_of is None:
        if scheme in FROM_VECTORS:
            vectors = features.item_vectors(data.items, part.train, dimensions=dimensions, seed=seed).vectors
    elif scheme != "semantic":
        raise ConfigError(f"the scheme is {scheme!r}, and rows of an adapter make semantic identifiers alone.")
    else:
        text = features.text_vectors(features.text(data.items), dimensions, seed)
        parts = [_learnt(Path(rows_of), data, part), text]
        vectors = np.concatenate([features.unit(one) for one in parts], axis=1)
    titles = _titles(data, bases.find(base)) if scheme == "title" and base is not None else None
    return Identifiers.build(
        scheme, data.item_ids, vectors,
        titles=titles, levels=levels, codes=codes, seed=seed, fitted_on=part.train_hash,
    )  # fmt: skip


def _learnt(folder: Path, data: Dataset, part: Split) -> np.ndarray:
    """float32 [n_items, width]: the rows that an adapter has trained for the tokens of the items."""
    product = adapters.Adapter.load(folder)
    own = product.identifiers
    if list(own.item_ids) != data.item_ids:
        raise ConfigError(f"{folder} knows other items than the data set. Train it on this one.")
    if any(len(tokens) != 1 for tokens in own.tokens):
        raise ConfigError(
            f'{folder} has identifiers of several tokens ({own.scheme}). Name one with the scheme "atomic".'
        )
    part.check_fitted(f"adapter {folder}", product.manifest["fitted_on"], _AGAIN)
    place = {token: row for row, token in enumerate(own.vocabulary)}
    rows = load_file(folder / "rows.safetensors")["input"].float().numpy()
    return rows[[place[tokens[0]] for tokens in own.tokens]]


def identify(
    recipe: Recipe, base: bases.Base, workspace: Path, data: Dataset, split: Split, vectors: np.ndarray
) -> tuple[Identifiers, bool]:
    """The identifiers to train with: those that the base brings, or those that the recipe asks for; and whether they
    are inherited, rows and all.

    Raises:
        AdapterError: The base is a product of training of which a file is missing or changed.
        ConfigError: The recipe asks for other identifiers than the base has, or they are of other items.
        LeakError: Base or identifiers were fitted on other interactions than this split's training part.
    """
    wanted = recipe.identifiers or IdentifierRecipe()
    inherited = any((base.folder / name).exists() for name in ("genrec.json", "identifiers.parquet"))
    if inherited:
        product = adapters.Adapter.load(base.folder)
        found, source, fitted_on = product.identifiers, f"base {base.name}", product.manifest["fitted_on"]
        made_by = product.manifest["recipe"].get("identifiers") or as_table(IdentifierRecipe())
        if recipe.identifiers is not None and (wanted.scheme != found.scheme or as_table(wanted) != made_by):
            raise ConfigError(
                f"recipe: [identifiers] asks for {wanted.file or wanted.scheme!r} (levels {wanted.levels}, codes "
                f"{wanted.codes}), and base {base.name} brings its own ({found.scheme!r}). "
                "Remove [identifiers] to inherit them."
            )
    elif wanted.file:
        found, source = Identifiers.load(workspace / wanted.file), f"identifiers {wanted.file}"
        fitted_on = found.fitted_on
    else:
        titles = _titles(data, base) if wanted.scheme == "title" else None
        made = Identifiers.build(
            wanted.scheme, data.item_ids, vectors,
            titles=titles, levels=wanted.levels, codes=wanted.codes, seed=recipe.seed, fitted_on=split.train_hash,
        )  # fmt: skip
        return made, False
    if list(found.item_ids) != data.item_ids:
        raise ConfigError(
            f"{source} has identifiers for {len(found.item_ids)} items, and they are not the {len(data.item_ids)} "
            f"items of {recipe.data}, in that order. Make them from this data set."
        )
    if fitted_on:  # What was made from no interactions fits any.
        split.check_fitted(source, fitted_on, _AGAIN)
    return found, inherited
