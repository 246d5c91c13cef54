"""The guided first run: MovieLens-100K from download to recommendations, one stage after another.

It calls nothing that a user could not call, and what is done already is reused when nothing it was made from changed.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genrec import files, progress
from genrec.config import load_recipe, load_spec, workspace_of
from genrec.errors import ConfigError, GenrecError, StorageError, suggestion
from genrec.toml import as_table

if TYPE_CHECKING:
    from genrec import batch
    from genrec.dataset import Dataset

NAME = "movielens-100k"
_SHOWN_USERS = ("1", "42", "543")
_BATCH: dict[str, Any] = {"k": 10, "num_beams": 50, "shard_size": 4096}
# Comments are not read, so the file begins as the very prompt that is shipped.
_BEGINNING = """\
{{#-
  Begun from the shipped prompt {start}. Comments such as this one are for people; no model reads them.
  What is wrong with it, and what a model would read:

    genrec prompts check {path} --data data/NAME
    genrec prompts render {path} adapters/NAME --user U
-#}}
"""


@dataclass
class Result:
    """What the quickstart made: seconds per stage, which stages were reused, the report, and examples by title."""

    seconds: dict[str, float] = field(default_factory=dict)
    reused: list[str] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)
    curves: list[Path] = field(default_factory=list)
    batch: batch.Summary | None = None


def init(folder: str | Path) -> list[Path]:
    """Make a workspace: copy the shipped prompts, recipes and specs to ``folder``; what is there already stays.

    Returns:
        The files that were written.
    """
    written = []
    for pattern in ("prompts/**/*.jinja", "adapters/*.toml", "eval/*.toml"):
        for source in sorted(files.shipped().glob(pattern)):
            target = Path(folder) / source.relative_to(files.shipped())
            if not target.exists():
                with files.new_file(target) as temporary:
                    shutil.copyfile(source, temporary)
                written.append(target)
    return written


def new_prompt(path: str | Path, start: str = "next_item") -> Path:
    """Write a prompt file to begin with: a shipped prompt, under a comment that says what to do with it.

    Args:
        path: The file to write, which ends in ``.jinja``.
        start: A shipped prompt by its path below ``prompts/`` without ``.jinja``, such as "shop/next_item".

    Raises:
        ConfigError: No shipped prompt of that name, or another ending.
        StorageError: The file is there already.
    """
    path, folder = Path(path), files.shipped() / "prompts"
    shipped = {file.relative_to(folder).with_suffix("").as_posix(): file for file in folder.glob("**/*.jinja")}
    if start not in shipped:
        raise ConfigError(f"no prompt {start!r} is shipped. {suggestion(start, shipped)}")
    if path.suffix != ".jinja":
        raise ConfigError(f"a prompt file ends in .jinja, and this one is {path}. Write {path.with_suffix('.jinja')}.")
    if path.exists():
        raise StorageError(f"{path} is there already, and a prompt is not written over. Name another file.")
    text = _BEGINNING.format(start=start, path=path) + shipped[start].read_text(encoding="utf-8")
    with files.new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def is_current(recipe_path: Path) -> bool:
    """Whether the adapter of a recipe is there, whole, and made from this recipe, data, prompts and base."""
    from genrec import base
    from genrec.adapter import Adapter
    from genrec.dataset import Dataset
    from genrec.prompts import Prompt

    workspace = workspace_of(recipe_path)
    try:
        adapter = Adapter.load(recipe_path.with_suffix(""))
        recipe = load_recipe(recipe_path)
        data = Dataset.load(workspace / recipe.data)
        found_base = base.find(recipe.base, workspace).hash
        prompts = {prompt.name: prompt.hash for prompt in (Prompt.load(workspace / t.prompt) for t in recipe.tasks)}
    except GenrecError:
        return False
    told = adapter.manifest
    return (
        told["recipe"] == json.loads(json.dumps(as_table(recipe)))
        and told["data"]["hash"] == data.hash
        and told["base"]["hash"] == found_base
        and {name: prompt.hash for name, prompt in adapter.prompts.items()} == prompts
    )


def is_reported(report: dict[str, Any], spec_path: Path, data: Dataset) -> bool:
    """Whether a saved report is of this spec, this data and the adapters that are there."""
    from genrec.adapter import Adapter

    spec = load_spec(spec_path)
    if report.get("spec") != json.loads(json.dumps(as_table(spec))) or report["protocol"]["data_hash"] != data.hash:
        return False
    measured = {label: told["hash"] for label, told in report["protocol"]["adapters"].items()}
    workspace = workspace_of(spec_path)
    return measured == {label: Adapter.load(workspace / folder).hash for label, folder in spec.adapters.items()}


def _is_own(out: Path) -> bool:
    """Whether ``out`` holds the lists of an earlier quickstart: its job, but for the hashes."""
    try:
        job = json.loads((out / "job.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return all(job.get(key) == value for key, value in {"adapter": NAME, "engine": "local", **_BATCH}.items())


def _reopen(out: Path) -> None:
    """Let a finished job whose files are not whole go on."""
    from genrec.batch.output import verify

    try:
        verify(out)
    except StorageError:
        (out / "_SUCCESS").unlink()


def run(workspace: str | Path = ".") -> Result:
    """Fetch, import, make a base, pretrain, LoRA-tune, evaluate, recommend for everybody.

    Args:
        workspace: Where ``prompts/``, ``adapters/`` and ``eval/`` are; missing shipped files are copied there.

    Raises:
        GenrecError: A stage failed; the stages before it are done and are reused when it is run again.
    """
    # Imported here, so that `genrec init` waits for no model library.
    from genrec import base, batch, checkpoints, evaluation, readers, training
    from genrec.dataset import Dataset
    from genrec.recommender import Recommender

    root = Path(workspace)
    init(root)
    result = Result()

    @contextmanager
    def stage(name: str, title: str) -> Iterator[Callable[[], None]]:
        progress.say(f"[{len(result.seconds) + 1}/6] {title}")
        began = time.perf_counter()

        def reuse() -> None:
            result.reused.append(name)
            progress.say("      done already, reused")

        yield reuse
        result.seconds[name] = time.perf_counter() - began

    recipes = {name: root / "adapters" / f"{name}.toml" for name in (f"{NAME}-base", NAME)}
    folder = root / "data" / NAME
    with stage("data", "MovieLens-100K: fetch and import") as reuse:
        if (folder / "manifest.json").exists():
            data = Dataset.load(folder)
            reuse()
        else:
            raw = readers.fetch(NAME, root / "data" / "cache")
            data = readers.import_files([raw], format=NAME, name=NAME)
            data.save(folder)
    small = root / "adapters" / "small-random"
    with stage("base", "a small base with random weights, its tokenizer trained on the titles") as reuse:
        if small.exists():
            reuse()
        else:
            base.create(data.items["title"].to_list(), small)
    for name, title in (
        (f"{NAME}-base", "pretrain the base on walks, histories and titles"),
        (NAME, "LoRA-tune it on the prompts of prompts/"),
    ):
        with stage(name, title) as reuse:
            if is_current(recipes[name]):
                reuse()
            else:
                begun = checkpoints.newest(root / "runs" / name) is not None
                try:
                    training.train(recipes[name], data, overwrite=True, resume=begun)
                except ConfigError:
                    if not begun:
                        raise
                    training.train(recipes[name], data, overwrite=True)  # The interrupted run was another one.
        result.curves.append(recipes[name].with_suffix("") / "learning_curve.png")
    spec_path = root / "eval" / f"{NAME}.toml"
    saved = root / "eval" / "results" / f"{NAME}.json"
    with stage("evaluation", "leave-one-out evaluation beside the baselines") as reuse:
        told = json.loads(saved.read_text(encoding="utf-8")) if saved.exists() else {}
        if is_reported(told, spec_path, data):
            reuse()
        else:
            evaluation.evaluate(spec_path, data).save(saved.parent)
            told = json.loads(saved.read_text(encoding="utf-8"))
        result.report = told
    with stage("batch", "recommendations for all users, to Parquet") as reuse:
        recommender = Recommender.load(root / "adapters" / NAME)
        out = root / "recommendations" / NAME
        try:
            if (out / "_SUCCESS").exists() and _is_own(out):
                _reopen(out)
            result.batch = batch.run_batch(recommender, folder, out, **_BATCH)
        except ConfigError:
            if not _is_own(out):
                raise
            shutil.rmtree(out)  # Lists of an adapter that was trained again since, or of other data.
            result.batch = batch.run_batch(recommender, folder, out, **_BATCH)
        if result.batch.shards_reused == result.batch.shards:
            reuse()
    titles = data.items["title"].to_list()
    for user in _SHOWN_USERS:
        index = data.user_ids.index(user)
        history, row = data.histories[index], None if data.user_rows is None else data.user_rows[index]
        found = recommender.recommend([[data.item_ids[item] for item in history]], k=5, users=[row])[0]
        result.examples.append(
            {
                "user_id": user,
                "events": len(history),
                "history": [titles[item] for item in history[-5:]],
                "recommended": [item.title for item in found],
            }
        )
    return result
