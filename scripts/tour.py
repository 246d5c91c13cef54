"""docs/tour.ipynb from the cells below, run from top to bottom: `make tour`. What the cells make goes away again."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

CELLS = [
    (
        "markdown",
        """# A tour of genrec

From a data frame to recommendations, the reason for one of them, and a changed prompt. Everything runs here, on a CPU,
in a minute or two, and leaves one folder, `tour-workspace`. `make tour` wrote this page.""",
    ),
    (
        "markdown",
        """## A log and a catalogue

A made-up shop: most customers go on to the next kind of thing in the same style. Any Polars, pandas or Arrow table
will do.""",
    ),
    (
        "code",
        """import random

import polars as pl

import genrec

random.seed(7)
kinds = ["tea", "pot", "cup", "honey", "coffee", "biscuit"]
styles = ["Green", "Black", "White", "Smoked", "Jasmine", "Mint", "Rose", "Lemon", "Ginger", "Plain"]
items = pl.DataFrame(
    [
        {"sku": f"{kind}-{n}", "title": f"{style} {kind}", "brand": f"Brand {n % 3}", "in_stock": (n + k) % 7 > 0}
        for k, kind in enumerate(kinds)
        for n, style in enumerate(styles, 1)
    ]
)
log = []
for customer in range(150):
    kind, style = random.randrange(6), random.randrange(10)
    for hour in range(random.randint(4, 8)):
        log.append({"customer": f"c{customer}", "sku": f"{kinds[kind]}-{style + 1}", "timestamp": 3600 * hour})
        kind, style = (kind + 1) % 6, style if random.random() < 0.8 else random.randrange(10)
columns = {"user_id": "customer", "item_id": "sku"}  # ours: yours
data = genrec.Dataset.from_frames(pl.DataFrame(log), items, columns=columns, name="shop")
data.interactions.head(3)""",
    ),
    (
        "markdown",
        """## A base, a recipe, an adapter

A workspace holds prompts, recipes and what is made of them. The base is a small language model with random weights; a
recipe says how to train it on the log and the catalogue. With a model from a hub, the recipe names that instead.""",
    ),
    (
        "code",
        """from pathlib import Path

from genrec import base, progress, quickstart

progress.quiet = True  # Bars would fill this page.
workspace = Path("tour-workspace")
quickstart.init(workspace)
data.save(workspace / "data/shop", overwrite=True)
random_base = workspace / "adapters/random"
if not random_base.exists():
    base.create(data.items["title"].to_list(), random_base, vocabulary=300, width=64, context=128)
(workspace / "adapters/shop.toml").write_text('''
base = "adapters/random"
data = "data/shop"
tuning = "full"
max_length = 64
dropout = 0.2
features = 16
[[tasks]]
prompt = "prompts/next_item.jinja"
[training]
num_train_epochs = 25
learning_rate = 3e-3
''')
genrec.train(workspace / "adapters/shop.toml", overwrite=True)
rec = genrec.Recommender.load(workspace / "adapters/shop")""",
    ),
    (
        "markdown",
        """## Recommend

One history gives one list; the score is the log-probability of the item's identifier. Restrictions hold while the model
decodes, so that a list is short only where fewer items are left, and then it says so.""",
    ),
    ("code", """rec.recommend(["tea-2", "pot-2"], k=4)"""),
    ("code", """rec.recommend(["tea-2", "pot-2"], k=4, where="brand = 'Brand 2' and in_stock", blocked=["cup-2"])"""),
    ("code", """rec.recommend_frame(data.history_frame().head(2), k=2)"""),
    (
        "markdown",
        """## Why this, and why not that?

`why` takes the arguments of `recommend`, and an item. It tells the place of the item in the list, or what kept it out;
its exact rank; and how its score changes where an event of the history is left out.""",
    ),
    (
        "code",
        """why = rec.why(["honey-9", "tea-2", "pot-2"], "cup-2")
why""",
    ),
    ("code", """pl.DataFrame([{"event": event.title, "change": event.change} for event in why.events])"""),
    (
        "code",
        """print(rec.why(["tea-2", "pot-2"], "tea-2"))
print(rec.why(["tea-2", "pot-2"], "coffee-7", k=4))""",
    ),
    (
        "markdown",
        """## Change the prompt

What the model reads is a file in `prompts/`. An adapter is used with the prompt that it was trained with; another one
is refused, with the difference, unless you say that you know.""",
    ),
    (
        "code",
        """prompt = workspace / "prompts/shop_next.jinja"
prompt.write_text(
    "{% block user %}A customer of the tea shop takes next:{% endblock %}\\n"
    "{% block item %}{{ item.identifier }}{% endblock %}\\n"
)
try:
    rec.with_prompt(prompt)
except genrec.GenrecError as error:
    print(error)""",
    ),
    (
        "code",
        """other = rec.with_prompt(prompt, untrained=True)
print(other.prompt(["tea-2", "pot-2"]))
other.recommend(["tea-2", "pot-2"], k=4)""",
    ),
    (
        "markdown",
        """The words alone move scores that were never trained with them. Trained again with the new prompt, the adapter
knows it.""",
    ),
    (
        "code",
        """told = 'tasks=[{prompt="prompts/shop_next.jinja"}]'
changed = genrec.train(workspace / "adapters/shop.toml", assignments=[told], name="shop-next", overwrite=True)
genrec.Recommender.load(changed).recommend(["tea-2", "pot-2"], k=4)""",
    ),
]


def notebook() -> nbformat.NotebookNode:
    """The notebook, not run."""
    made = nbformat.v4.new_notebook()
    for number, (kind, text) in enumerate(CELLS):
        cell = nbformat.v4.new_code_cell if kind == "code" else nbformat.v4.new_markdown_cell
        made.cells.append(cell(text, id=f"cell-{number}"))
    made.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return made


def run(made: nbformat.NotebookNode) -> None:
    """Run it, in a folder that goes away. Raises ``nbclient.exceptions.CellExecutionError``."""
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(made, timeout=900, record_timing=False, resources={"metadata": {"path": folder}})
        client.execute()
    made.metadata.pop("language_info", None)
    for cell in made.cells:  # What libraries say on standard error is of the machine, and not of the tour.
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]


if __name__ == "__main__":
    tour = notebook()
    run(tour)
    nbformat.write(tour, Path(sys.argv[1]))
