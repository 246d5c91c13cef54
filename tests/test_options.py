"""What [training] may say. Refused keys and values of a whole recipe are in test_training.py."""

from __future__ import annotations

from dataclasses import fields

from trl import SFTConfig

from genrec import options


def test_every_key_that_a_recipe_may_set_is_one_of_trls_and_the_defaults_pass() -> None:
    assert set(options.TRAINING_KEYS) <= {item.name for item in fields(SFTConfig)}
    assert options.training_options({}) == options.TRAINING_DEFAULTS
    assert options.training_options(dict(options.TRAINING_DEFAULTS)) == options.TRAINING_DEFAULTS
