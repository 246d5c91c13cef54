"""What identifiers are fitted on. What a recipe inherits or is refused is in test_training.py."""

from __future__ import annotations

from typing import Any

import numpy as np
from test_training import changed, tiny_log

import genrec
from genrec import features
from genrec.identification import build_identifiers

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
