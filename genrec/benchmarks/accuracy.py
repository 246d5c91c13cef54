"""`genrec bench accuracy`: a recipe from a data set to its test figures, with a base made here; one seed after another.

Every change of the recipe is one more run with one more ``key=value``, which is how docs/benchmarks.md tells what buys
what. Validation chooses the weights; the test figures are those of the weights that were kept.
"""

from __future__ import annotations

import hashlib
import os
import resource
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from genrec import base as bases
from genrec import progress, training
from genrec.adapter import Adapter
from genrec.benchmarks import Report, Row, begin, conditions, figure, peak
from genrec.config import Spec, load_recipe, workspace_of
from genrec.dataset import Dataset
from genrec.errors import ConfigError
from genrec.evaluation import evaluate
from genrec.toml import as_table, override


def accuracy(
    data: Path,
    recipe: Path,
    assignments: Sequence[str] = (),
    *,
    seeds: Sequence[int] = (0,),
    base: str | None = None,
    width: int = 128,
    layers: int = 2,
    heads: int = 4,
    threads: int | None = None,
    beams: int = 50,
) -> Report:
    """Make a base, train, and evaluate on test, once per seed.

    What is made stays in ``adapters/bench`` of the recipe's workspace, under names that tell what made it, and is made
    again by the next run: a benchmark reuses nothing.

    Args:
        data: A data set folder.
        recipe: A recipe file; its base, data and seed are replaced.
        assignments: ``key=value`` changes to it.
        seeds: Of the base's weights and of training.
        base: A base by name or folder, in the place of a small one with random weights.
        width, layers, heads: Of the small base.
        threads: Of PyTorch; unset: as it is.
        beams: Of the evaluation.

    Returns:
        Per seed, and as a mean of them where there are several: validation NDCG@10, test recall@10 and NDCG@10, and
        the seconds from the data set to the test figures.

    Raises:
        ConfigError, DataError, AdapterError: No seed or thread, or what base, training and evaluation refuse.
    """
    begin("accuracy", threads=threads, seeds=len(seeds))
    for key in ("seed", "base", "data"):
        if key in override({}, assignments):
            raise ConfigError(f"bench accuracy: {key}= is set by the command itself: --seeds, --base, or the data set.")
    workspace, set_ = workspace_of(recipe), Dataset.load(data)
    told = load_recipe(recipe, assignments)
    made_of = (as_table(replace(told, seed=0)), set_.hash, base, width, layers, heads)
    label = hashlib.sha256(repr(made_of).encode()).hexdigest()[:8]
    inside = data.resolve().is_relative_to(workspace.resolve())
    where = os.path.relpath(data, workspace) if inside else str(data.absolute())  # As a recipe would have it.
    rows: list[Row] = []
    for seed in seeds:
        name = f"bench-{data.name}-{label}-{seed}"
        progress.say(f"{name}: {' '.join(assignments) or 'the recipe as it is'}")
        began = time.perf_counter()
        chosen = base
        if chosen is None:
            chosen = f"adapters/{name}-base"  # Of its own: another run at the same time may make the same one again.
            bases.create(
                set_.items["title"].to_list(), workspace / chosen,
                width=width, layers=layers, heads=heads, seed=seed, overwrite=True,
            )  # fmt: skip
        made = replace(told, base=chosen, data=where, seed=seed)
        folder = training.train(made, set_, name=name, workspace=workspace, overwrite=True)
        spec = Spec(
            data=where, adapters={"recipe": f"adapters/{name}"}, baselines=(), split=made.split, ties=made.ties,
            split_seed=made.split_seed, k=(10,), num_beams=beams,
        )  # fmt: skip
        found = evaluate(spec, set_, name=name, workspace=workspace).rows["recipe"]
        seconds = time.perf_counter() - began
        kept = Adapter.load(folder).manifest["kept"]
        setting = f"seed {seed}"
        rows += [
            figure("accuracy", setting, "validation NDCG@10", kept["ndcg@10"], "NDCG@10"),
            figure("accuracy", setting, "test recall@10", found["recall@10"]["mean"], "recall@10"),
            figure("accuracy", setting, "test NDCG@10", found["ndcg@10"]["mean"], "NDCG@10"),
            figure("accuracy", setting, "step that was kept", kept["step"], ""),
            figure("accuracy", setting, "from the data set to the test figures", seconds, "s"),
        ]
    if len(seeds) > 1:
        for what, unit in {row.what: row.unit for row in rows if row.unit}.items():
            mean = statistics.fmean(row.value for row in rows if row.what == what)
            rows.append(figure("accuracy", f"mean of {len(seeds)} seeds", what, mean, unit))
    memory = peak(resource.getrusage(resource.RUSAGE_SELF))
    rows.append(figure("accuracy", "whole process", "peak memory", memory, "MiB"))
    given = {"data": data.name, "data_hash": set_.hash, "recipe": recipe.name, "changes": " ".join(assignments)}
    return Report(conditions(**given, base=base or f"{width}x{layers}x{heads}", seeds=list(seeds)), rows)
