from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import genrec
from genrec import checkpoints, evaluation, files, quickstart, readers, training
from genrec.adapter import Adapter
from genrec.errors import AdapterError, ConfigError
from genrec.quickstart import NAME, Result

STAGES = ["data", "base", f"{NAME}-base", NAME, "evaluation", "batch"]
USERS = [str(number) for number in (*range(1, 38), 42, 100, 543)]
GENRES = ("unknown", "Comedy", "Drama")

TASK = '[[tasks]]\nprompt = "prompts/{}.jinja"\nweight = 0.5\n'
RECIPES = {  # As the shipped ones, but small.
    f"{NAME}-base": f'base = "adapters/small-random"\ndata = "data/{NAME}"\ntuning = "full"\nmax_length = 64\n'
    + TASK.format("next_item")
    + "[walks]\nshare = 0.3\n[training]\nnum_train_epochs = 1\nlearning_rate = 1e-3\n",
    NAME: f'base = "adapters/{NAME}-base"\ndata = "data/{NAME}"\ntuning = "lora"\nmax_length = 64\n'
    + "".join(map(TASK.format, ("next_item", "title_to_item", "item_to_title")))
    + "[lora]\nr = 16\n[training]\nnum_train_epochs = 1\nlearning_rate = 5e-4\n",
}


def grouplens(folder: Path) -> Path:
    """Forty users and twenty-four films in the files of MovieLens-100K."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    lines = []
    for user in USERS:
        first = int(rng.integers(24))
        for step in range(int(rng.integers(4, 9))):
            lines.append(f"{user}\t{(first + step) % 24 + 1}\t{rng.integers(1, 6)}\t{880_000_000 + 60 * step}")
    (folder / "u.data").write_text("\n".join(lines) + "\n")
    (folder / "u.genre").write_text("".join(f"{genre}|{number}\n" for number, genre in enumerate(GENRES)))
    films = [
        f"{film}|Film {film} (19{70 + film})|01-Jan-19{70 + film}||http://films|0|{film % 2}|{1 - film % 2}"
        for film in range(1, 25)
    ]
    (folder / "u.item").write_text("\n".join(films) + "\n", encoding="latin-1")
    (folder / "u.user").write_text("".join(f"{user}|{20 + int(user) % 50}|F|artist|12345\n" for user in USERS))
    return folder


@pytest.fixture(scope="module")
def first(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Result, str]:
    """A workspace in which the quickstart ran on a tiny stand-in, with small recipes; its result and what it said."""
    root = tmp_path_factory.mktemp("quickstart") / "workspace"
    quickstart.init(root)
    for name, text in RECIPES.items():
        (root / "adapters" / f"{name}.toml").write_text(text)
    raw = grouplens(root.parent / "raw")
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "fetch", lambda name, cache: raw if name == NAME else pytest.fail(name))
        patch.setattr(quickstart.progress, "say", said.append)
        result = quickstart.run(root)
    return root, result, "\n".join(said)


@pytest.fixture
def again(first: tuple[Path, Result, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that workspace, in which nothing is fetched any more."""
    monkeypatch.setattr(readers, "fetch", lambda *_: pytest.fail("fetched again"))
    shutil.copytree(first[0], tmp_path / "workspace")
    return tmp_path / "workspace"


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


# The first run


def test_every_stage_runs_and_says_so(first: tuple[Path, Result, str]) -> None:
    _, result, said = first
    assert list(result.seconds) == STAGES
    assert result.reused == []
    assert re.findall(r"^\[(\d/\d)\] ", said, re.MULTILINE) == [f"{number}/6" for number in range(1, 7)]
    assert "reused" not in said


def test_data_set_is_the_imported_one(first: tuple[Path, Result, str]) -> None:
    data = genrec.Dataset.load(first[0] / "data" / NAME)
    assert sorted(data.user_ids) == sorted(USERS)
    assert data.items.row(0, named=True) == {
        "item_id": "1",
        "title": "Film 1 (1971)",
        "categories": ["Comedy"],
        "year": 1971,
    }
    assert data.users is not None
    assert data.users["age"][0] == 21


def test_report_has_the_base_alone_and_the_base_with_lora(first: tuple[Path, Result, str]) -> None:
    root, result, _ = first
    assert list(result.report["rows"]) == ["popularity", "item_knn", "transitions_text", "base alone", "base + LoRA"]
    assert result.report["protocol"]["cases"] == len(USERS)
    assert {told["tuning"] for told in result.report["protocol"]["adapters"].values()} == {"full", "lora"}
    assert result.report == json.loads((root / "eval" / "results" / f"{NAME}.json").read_text())


def test_everybody_gets_a_list(first: tuple[Path, Result, str]) -> None:
    root, result, _ = first
    assert result.batch is not None
    assert (result.batch.users, result.batch.shards_reused) == (len(USERS), 0)
    found = pl.read_parquet(root / "recommendations" / NAME / "*.parquet")
    assert set(found["user_id"]) == set(USERS)
    assert set(found.group_by("user_id").len()["len"]) == {10}


def test_examples_are_the_shown_users_lists_by_title(first: tuple[Path, Result, str]) -> None:
    root, result, _ = first
    found = pl.read_parquet(root / "recommendations" / NAME / "*.parquet")
    data = genrec.Dataset.load(root / "data" / NAME)
    assert [example["user_id"] for example in result.examples] == ["1", "42", "543"]
    for example in result.examples:
        mine = found.filter(pl.col("user_id") == example["user_id"]).sort("rank")
        assert example["recommended"] == mine["title"].to_list()[:5]
        log = data.interactions.filter(pl.col("user_id") == example["user_id"])
        titles = log.join(data.items, on="item_id", maintain_order="left")["title"].to_list()
        assert (example["events"], example["history"]) == (len(titles), titles[-5:])


def test_learning_curves_are_pictures(first: tuple[Path, Result, str]) -> None:
    _, result, _ = first
    assert len(result.curves) == 2
    for path in result.curves:
        assert path.read_bytes().startswith(b"\x89PNG")


# The second run


def test_second_run_reuses_every_stage_and_says_so(
    again: Path, first: tuple[Path, Result, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training, "train", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(evaluation, "evaluate", lambda *_, **__: pytest.fail("evaluated again"))
    result = quickstart.run(again)
    assert result.reused == STAGES
    assert result.report == first[1].report
    assert result.examples == first[1].examples
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("done already, reused") == len(STAGES)


def test_changed_recipe_trains_only_what_depends_on_it(again: Path, first: tuple[Path, Result, str]) -> None:
    edit(again / "adapters" / f"{NAME}.toml", "r = 16", "r = 2")
    edit(again / "adapters" / f"{NAME}.toml", "learning_rate = 5e-4", "learning_rate = 5e-2")
    result = quickstart.run(again)
    assert result.reused == ["data", "base", f"{NAME}-base"]
    before, after = first[1].report, result.report
    assert after["rows"]["base alone"] == before["rows"]["base alone"]
    assert after["protocol"]["adapters"]["base + LoRA"] != before["protocol"]["adapters"]["base + LoRA"]
    assert Adapter.load(again / "adapters" / NAME).manifest["recipe"]["lora"]["r"] == 2
    assert result.batch is not None
    assert result.batch.shards_reused == 0
    assert quickstart.run(again).reused == STAGES


def test_report_of_another_adapter_is_made_again(again: Path) -> None:
    """The user trains by hand, as the command line allows; the report that is there tells of what was before."""
    edit(again / "adapters" / f"{NAME}.toml", 'tuning = "lora"', 'tuning = "lora"\nseed = 5')
    training.train(again / "adapters" / f"{NAME}.toml", overwrite=True)
    assert quickstart.run(again).reused == ["data", "base", f"{NAME}-base", NAME]


def test_stopped_between_training_and_evaluation(again: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(again / "adapters" / f"{NAME}.toml", "r = 16", "r = 4")

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "evaluate", stop)
        with pytest.raises(KeyboardInterrupt):
            quickstart.run(again)
    assert quickstart.run(again).reused == ["data", "base", f"{NAME}-base", NAME]


def test_stopped_in_training_goes_on_unless_the_recipe_changed(
    again: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, run = again / "adapters" / f"{NAME}.toml", again / "runs" / NAME
    edit(recipe, "r = 16", "r = 4")
    save = checkpoints.save

    def stop(*arguments: Any) -> None:
        save(*arguments)
        raise KeyboardInterrupt

    def interrupt() -> str:
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, "save", stop)
            with pytest.raises(KeyboardInterrupt):
                quickstart.run(again)
        newest = checkpoints.newest(run)
        assert newest is not None
        capsys.readouterr()
        return newest.name

    name = interrupt()
    monkeypatch.setattr(evaluation, "evaluate", lambda *_: pytest.fail("trained, and that is enough"))
    with pytest.raises(pytest.fail.Exception):
        quickstart.run(again)
    assert f"going on from {run / name}" in capsys.readouterr().err
    edit(recipe, "r = 4", "r = 8")
    name = interrupt()
    edit(recipe, "r = 8", "r = 2")
    with pytest.raises(pytest.fail.Exception):
        quickstart.run(again)
    assert f"the interrupted run in {run} is thrown away at {name}" in capsys.readouterr().err
    assert checkpoints.newest(run) is None


def test_changed_spec_evaluates_again(again: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (again / "eval" / f"{NAME}.toml").write_text(
        re.sub(r"^k = .*$", "k = [10]", (again / "eval" / f"{NAME}.toml").read_text(), flags=re.MULTILINE)
    )
    monkeypatch.setattr(training, "train", lambda *_, **__: pytest.fail("trained again"))
    result = quickstart.run(again)
    assert [stage for stage in STAGES if stage not in result.reused] == ["evaluation"]
    assert {column.split("@")[1] for column in result.report["rows"]["base alone"]} == {"10"}


def test_missing_lists_are_made_again(again: Path) -> None:
    out = again / "recommendations" / NAME
    before = (out / "part-00000.parquet").read_bytes()
    (out / "part-00000.parquet").unlink()
    assert quickstart.run(again).reused == STAGES[:-1]
    assert (out / "part-00000.parquet").read_bytes() == before


@pytest.mark.parametrize(("key", "value"), [("k", 5), ("shard_size", 7), ("engine", "dummy")])
def test_lists_of_a_job_of_the_users_own_are_not_removed(again: Path, key: str, value: Any) -> None:
    note = again / "recommendations" / NAME / "job.json"
    note.write_text(json.dumps(json.loads(note.read_text()) | {key: value}))
    with pytest.raises(ConfigError, match=f"holds another job: {key} was"):
        quickstart.run(again)
    assert (note.parent / "part-00000.parquet").exists()


@pytest.mark.parametrize(
    ("file", "old", "new", "base", "lora"),
    [
        ("prompts/title_to_item.jinja", "{% block user %}", "{% block user %}So: ", True, False),
        ("prompts/next_item.jinja", "{% block user %}", "{% block user %}So: ", False, False),
        (f"adapters/{NAME}-base.toml", "max_length = 64", "max_length = 63", False, True),
        (f"adapters/{NAME}.toml", "max_length = 64", "max_length = 63", True, False),
        (f"adapters/{NAME}.toml", "[lora]", "# The low ranks.\n[lora]", True, True),
        (f"adapters/{NAME}/rows.safetensors", None, None, True, False),
        (f"adapters/{NAME}-base/model.safetensors", None, None, False, False),
        ("adapters/small-random/model.safetensors", None, None, False, True),
        (f"data/{NAME}/interactions.parquet", None, None, False, False),
    ],
)
def test_what_is_current(again: Path, file: str, old: str | None, new: str, base: bool, lora: bool) -> None:
    """An adapter is made again when its recipe, a prompt, its data, its own files, or the base below it changed."""
    recipes = [again / "adapters" / f"{name}.toml" for name in (f"{NAME}-base", NAME)]
    assert all(map(quickstart.is_current, recipes))
    if old is not None:
        edit(again / file, old, new)
    elif file.endswith(".parquet"):
        pl.read_parquet(again / file).filter(pl.col("user_id") != "100").write_parquet(again / file)
    else:
        content = bytearray((again / file).read_bytes())
        content[-1] ^= 1
        (again / file).write_bytes(content)
    assert list(map(quickstart.is_current, recipes)) == [base, lora]


def test_recipe_on_another_base_makes_no_base_in_its_place(again: Path) -> None:
    edit(again / "adapters" / f"{NAME}-base.toml", '"adapters/small-random"', '"smollm9"')
    with pytest.raises(AdapterError, match="base smollm9"):
        quickstart.run(again)
    assert not (again / "smollm9").exists()


# A workspace


def test_init_copies_the_shipped_files(tmp_path: Path) -> None:
    written = quickstart.init(tmp_path / "shop")
    names = {str(path.relative_to(tmp_path / "shop")) for path in written}
    assert {f"prompts/{name}.jinja" for name in ("next_item", "title_to_item", "item_to_title")} <= names
    assert {f"adapters/{NAME}.toml", f"adapters/{NAME}-base.toml", f"eval/{NAME}.toml"} <= names
    assert {"prompts/shop/next_item.jinja", "prompts/shop_zh/next_item.jinja"} <= names
    for path in written:
        assert path.read_bytes() == (files.shipped() / path.relative_to(tmp_path / "shop")).read_bytes()
    assert {path for path in (tmp_path / "shop").rglob("*") if path.is_file()} == set(written)


def test_init_leaves_what_is_there(tmp_path: Path) -> None:
    mine = tmp_path / "prompts" / "next_item.jinja"
    mine.parent.mkdir()
    mine.write_text("mine")
    written = quickstart.init(tmp_path)
    assert mine.read_text() == "mine"
    assert mine not in written
    assert quickstart.init(tmp_path) == []


def test_template_of_a_wheel_lies_in_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "genrec"
    (package / "_workspace" / "prompts" / "kind").mkdir(parents=True)
    names = ("prompts/kind/shipped.jinja", "prompts/shipped.jinja")
    for name in names:
        (package / "_workspace" / name).write_text("text")
    monkeypatch.setattr(files, "__file__", str(package / "files.py"))
    assert quickstart.init(tmp_path / "shop") == [tmp_path / "shop" / name for name in names]
