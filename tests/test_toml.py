"""What the machinery does with plain tables. What it refuses in a file is in test_config.py."""

from __future__ import annotations

from genrec import toml
from genrec.config import IdentifierRecipe, Recipe, Task


def test_overriding_leaves_the_given_table_as_it_was() -> None:
    table = {"training": {"learning_rate": 1.0}}
    assert toml.override(table, ["training.learning_rate=2.0", "walks.share=1"]) == {
        "training": {"learning_rate": 2.0},
        "walks": {"share": 1},
    }
    assert table == {"training": {"learning_rate": 1.0}}


def test_as_table_is_what_from_table_reads() -> None:
    table = toml.as_table(Recipe("b", "d", (Task("p"),), identifiers=IdentifierRecipe("semantic"), lora={"r": 2}))
    assert toml.as_table(toml.from_table(Recipe, table, "again")) == table
