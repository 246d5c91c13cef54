from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_additions import table, write

import genrec
from genrec import adapter as adapters
from genrec import curriculum, files, training, update
from genrec.adapter import Adapter
from genrec.curriculum import HISTORY, Fresh
from genrec.dataset import Dataset
from genrec.engines.dummy import DummyEngine
from genrec.engines.local import LocalEngine
from genrec.errors import AdapterError, ConfigError, DataError, LeakError, StorageError
from genrec.export import validation_set
from genrec.prompts import Prompt
from genrec.recommender import Recommender
from genrec.windows import later_windows

START = 2_000_000  # Later than all of the old log.


# What is trained


@settings(max_examples=100)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=40), st.integers(0, 30), st.data())
def test_later_windows_make_every_new_event_a_target_once_with_as_much_before_it_as_fits(
    lengths: list[int], budget: int, data: st.DataObject
) -> None:
    begin = data.draw(st.integers(0, len(lengths)))
    found = later_windows(np.array(lengths), budget, begin, len(lengths))
    targets = [event for start, stop, context in found for event in range(start + context, stop)]
    assert targets == list(range(begin, len(lengths)))
    for start, stop, context in found:
        read = sum(lengths[start : stop - 1])
        assert read <= budget or (context == 0 and stop == start + 1)
        assert start == 0 or read + lengths[start - 1] > budget


def test_fresh_runs_leave_the_held_event_out() -> None:
    made = Fresh(np.array([3, 3, 0, 5]), np.array([4, 9, -1, 3]), 0.5)
    assert made.new(0, 7) == [(3, 4), (5, 7)]
    assert made.new(1, 7) == [(3, 7)]
    assert made.new(2, 2) == [(0, 2)]
    assert made.new(3, 5) == []


# The update


def test_cases_are_measured_with_the_context_of_their_targets(workspace: Path) -> None:
    data = Dataset.load(workspace / "data" / "tiny")
    split, rec = data.split(), Recommender.load(workspace / "adapters" / "lora", engine="dummy")
    text = "{% block user %}{{ context.timestamp }}{% endblock %}{% block item %}{{ item.identifier }}{% endblock %}"
    prompt = Prompt.parse(text, "told")
    asked: list[list[int]] = []

    class Listening(DummyEngine):
        def beam_search(self, prompts: Any, *arguments: Any, **options: Any) -> Any:
            asked.extend(ids.tolist() for ids in prompts)
            return super().beam_search(prompts, *arguments, **options)

    mask = np.arange(len(split.test)) % 3 != 1
    group = update._drawn(split.test, split.test_events, mask, 9, 0, 20)
    engine: Any = Listening(len(rec.tokenization.tokenizer))
    group.lists(engine, rec.tokenization, prompt, data)
    logs = {user: log for (user,), log in data.interactions.group_by("user_id")}
    assert len(group.cases) == len(asked) == 9
    for user, history, ids in zip(group.cases.users, group.cases.histories, asked, strict=True):
        assert mask[split.test.users.tolist().index(user)]
        context = {"timestamp": logs[data.user_ids[user]]["timestamp"][-1]}
        assert ids == rec.tokenization.sequence(prompt, history, None, context).tolist()
    assert len({ids[2] for ids in asked}) == 1 < len({tuple(ids) for ids in asked})


def later(path: Path, *, users: int = 40, items: int = 24, seed: int = 1) -> tuple[Path, Path]:
    """What came after the log of the tiny workspace: the same rule, four more items, two more users."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(users + 2):
        if user % 4 == 3:
            continue  # Some users do nothing.
        item = int(rng.integers(items))
        for time in range(int(rng.integers(1, 7))):
            rows.append((f"u{user}", f"i{item}", START + 60 * time))
            item = (item + 1) % (items + 4) if rng.random() < 0.8 else int(rng.integers(items + 4))
    log = table(rows, "user_id", "item_id", "timestamp").unique(maintain_order=True)
    new = range(items, items + 4)
    catalogue = pl.DataFrame(
        {
            "item_id": [f"i{item}" for item in new],
            "title": [f"Film {item} of series {item // 4}" for item in new],
            "brand": [f"studio {item // 8}" for item in new],
        }
    )
    return write(path / "log.csv", log), write(path / "items.csv", catalogue)


@pytest.fixture(scope="module")
def updated(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tiny workspace in which both adapters were updated. Never change it."""
    root = tmp_path_factory.mktemp("updated") / "workspace"
    shutil.copytree(workspace, root)
    log, items = later(root)
    for name in ("lora", "pretrained"):
        update.update(root / "adapters" / name, log, items, data_out=f"data/{name}-later")
    return root


@pytest.mark.parametrize("name", ["lora", "pretrained"])
def test_an_update_keeps_every_identifier_and_the_old_adapter(updated: Path, workspace: Path, name: str) -> None:
    old, new = Adapter.load(updated / "adapters" / name), Adapter.load(updated / "adapters" / f"{name}-updated")
    assert old.hash == Adapter.load(workspace / "adapters" / name).hash
    before, after = old.tokenization(), new.tokenization()
    assert new.identifiers.item_ids == [*old.identifiers.item_ids, "i24", "i25", "i26", "i27"]
    assert new.identifiers.tokens[:24] == old.identifiers.tokens
    assert np.array_equal(after.tokens[:24], before.tokens)
    assert after.tokens[24:, 0].tolist() == list(range(len(before.tokenizer), len(before.tokenizer) + 4))
    assert {prompt.hash for prompt in new.prompts.values()} == {prompt.hash for prompt in old.prompts.values()}
    assert new.tuning == old.tuning
    told = new.manifest["base"]
    assert told["name"] == ("adapters/pretrained" if name == "pretrained" else old.manifest["base"]["name"])
    found = Recommender.load(new.path).recommend([["i24", "i25"]], k=28, exclude_seen=False)[0]
    assert {item.item_id for item in found} == set(new.identifiers.item_ids)
    assert {item.title for item in found if item.item_id == "i26"} == {"Film 26 of series 6"}


def test_an_updated_adapter_is_evaluated_on_the_split_of_both_logs(updated: Path) -> None:
    adapters = {"old": "adapters/lora", "new": "adapters/lora-updated"}
    spec = genrec.config.Spec("data/lora-later", {"new": adapters["new"]}, k=(5, 10))
    report = genrec.evaluate(spec, workspace=updated)
    manifest = Adapter.load(updated / adapters["new"]).manifest
    assert manifest["data"] == {
        "path": "data/lora-later",
        "hash": report.protocol["data_hash"],
        "manifest": Dataset.load(updated / "data/lora-later").manifest,
    }
    data = Dataset.load(updated / "data/lora-later")
    lengths = {user: len(history) for user, history in zip(data.user_ids, data.histories, strict=True)}
    told = manifest["update"]["periods"]["next period"]
    places = genrec.metrics.ranks(report.lists["new"], data.split().test.targets)
    old = Dataset.load(updated / "data/tiny")
    grown = {user: len(history) for user, history in zip(old.user_ids, old.histories, strict=True)}
    chosen = [lengths[data.user_ids[user]] > grown.get(data.user_ids[user], 0) for user in data.split().test.users]
    # The report's figures of the next period are those of an evaluation on the users who have new events.
    assert told["cases"] == sum(chosen)
    assert told["models"]["updated"]["recall@10"]["mean"] == pytest.approx(
        genrec.metrics.recall(places, 10)[chosen].mean()
    )
    with pytest.raises(LeakError, match="was trained on other interactions"):
        genrec.evaluate(genrec.config.Spec("data/lora-later", {"old": adapters["old"]}, k=(5,)), workspace=updated)


def test_the_report_says_what_was_gained_and_forgotten(updated: Path) -> None:
    told = Adapter.load(updated / "adapters/lora-updated").manifest["update"]
    assert told["new"] | {"interactions": 0} == {"interactions": 0, "users": 2, "items": 4, "repeated": 0, "late": 0}
    assert told["rows"]["new_tokens"] == 4
    assert set(told["periods"]) == {"next period", "next period, new items", "old test cases"}
    for found in told["periods"].values():
        assert list(found["models"]) == ["old", "extended", "updated"]
        for name, change in found["changes"].items():
            for metric, value in change.items():
                difference = found["models"]["updated"][metric]["mean"] - found["models"][name][metric]["mean"]
                assert value["mean"] == pytest.approx(difference)
                assert value["low"] <= value["mean"] <= value["high"]
    cold = told["periods"]["next period, new items"]
    assert cold["models"]["old"]["recall@10"]["mean"] == 0  # It cannot name them.
    columns, rows = update.table(told)
    assert columns == ["cases", "model", "recall@10", "ndcg@10"]
    assert [row[1] for row in rows[:5]] == ["old", "extended", "updated", "change from old", "change from extended"]


def test_no_event_that_is_measured_was_a_target(updated: Path, workspace: Path) -> None:
    # Every target of every row of the plan, held against the events that the report measures.
    old, data = Dataset.load(updated / "data/tiny"), Dataset.load(updated / "data/lora-later")
    before, split = old.split(), data.split()
    fresh = update._fresh(before, split, 0.5)
    recipe = genrec.toml.from_table(
        genrec.config.Recipe, Adapter.load(updated / "adapters/lora-updated").manifest["recipe"], "x"
    )
    adapter = Adapter.load(updated / "adapters/lora-updated")
    tokens = adapter.tokenization()
    # Questions about histories and events too, so many that every event is drawn that can be.
    asked = tuple(genrec.config.Task(f"prompts/{name}.jinja", weight=20.0) for name in ("titles_to_item", "click"))
    recipe = dataclasses.replace(recipe, tasks=(*recipe.tasks, *asked))
    prompts = [Prompt.load(updated / task.prompt) for task in recipe.tasks]
    events = split.train_events.with_columns(rating=pl.lit(5.0))
    made = curriculum.plan(
        recipe, prompts, tokens, split.train, None, epochs=2, batch_size=8, events=events, fresh=fresh
    )  # fmt: skip
    targets: dict[int, list[tuple[int, int]]] = {0: [], 1: []}
    questions: dict[str, set[tuple[int, int]]] = {"titles_to_item": set(), "click": set()}
    for epoch, number, kind, user, start, stop, context in made.table.tolist():
        if prompts[number].name in questions:
            assert (kind, start, context) == (HISTORY, 0, stop - 1)
            questions[prompts[number].name].add((user, stop - 1))
        elif kind == HISTORY:
            targets[epoch] += [(user, event) for event in range(start + context, stop)]
    new = {
        (user, event)
        for user, history in enumerate(split.train)
        for event in range(before.truth.train_ends[user] if user < len(before.train) else 0, len(history))
        if not (user < len(before.train) and event == before.truth.test_at[user])
    }
    assert new
    known = {(user, event) for user, end in enumerate(before.truth.train_ends) for event in range(end)}
    for epoch, found in targets.items():
        assert len(set(found)) == len(found), epoch
        assert {target for target in found if target not in known} == new
        assert set(found) & known  # Some are repeated.
    assert any(0 <= held < len(history) for held, history in zip(fresh.held, split.train, strict=True))
    for found in questions.values():
        assert found - known == new
        assert found & known
    rows = [row for row in made.table.tolist() if row[2] == HISTORY and row[0] == 0 and row[1] == 0]
    again = sum(row[5] <= fresh.known[row[3]] for row in rows)
    assert again == round(0.5 * (len(rows) - again))


def test_an_update_of_an_update_goes_on(updated: Path, tmp_path: Path) -> None:
    root = tmp_path / "workspace"
    shutil.copytree(updated, root)
    rows = [("u1", "i27", 3 * START), ("u2", "i28", 3 * START), *((f"u{n}", "i3", 3 * START + 9) for n in (1, 2, 4))]
    log = write(tmp_path / "more.csv", table(rows, "user_id", "item_id", "timestamp"))
    items = write(tmp_path / "more-items.csv", pl.DataFrame({"item_id": ["i28"], "title": ["Film 28 of series 7"]}))
    out = update.update(root / "adapters/lora-updated", log, items, name="third", assignments=["training.max_steps=2"])
    third, second = Adapter.load(out), Adapter.load(root / "adapters/lora-updated")
    assert third.identifiers.tokens[:28] == second.identifiers.tokens
    assert third.manifest["data"]["path"] == "data/lora-later-updated"
    assert [entry["interactions"] for entry in third.manifest["data"]["manifest"]["updates"]][1:] == [5]


def test_only_new_rows_are_predicted_and_lora_goes_on_from_the_trained_one(updated: Path, tmp_path: Path) -> None:
    # With a learning rate of 0 nothing but the new rows differs: what is kept is the extended adapter.
    root = tmp_path / "workspace"
    shutil.copytree(updated, root)
    log, items = root / "log.csv", root / "items.csv"
    out = update.update(
        root / "adapters/lora", log, items, name="still", data_out="data/lora-later",
        assignments=["training.learning_rate=0", "training.num_train_epochs=1"],
    )  # fmt: skip
    old, still = (load_file(path / "adapter_model.safetensors") for path in (root / "adapters/lora", out))
    assert old.keys() == still.keys()
    assert all(torch.equal(old[key], still[key]) for key in old)
    rows = [load_file(path / "rows.safetensors")["input"] for path in (root / "adapters/lora", out)]
    assert torch.equal(rows[0], rows[1][:24])
    told = Adapter.load(out).manifest["update"]
    for found in told["periods"].values():
        assert found["models"]["updated"] == found["models"]["extended"]


def test_training_on_learns_what_changed(updated: Path, tmp_path: Path) -> None:
    # From now on everybody takes the new items in turn, which neither text nor the old log can tell. Three each, so
    # that what is left for the last one has to be chosen.
    root = tmp_path / "workspace"
    shutil.copytree(updated, root)
    turn = ("i25", "i24", "i27", "i26")
    rows = [(f"u{user}", turn[(user + time) % 4], START + 60 * time) for user in range(40) for time in range(3)]
    log = write(tmp_path / "log.csv", table(rows, "user_id", "item_id", "timestamp"))
    changes = ["training.num_train_epochs=8", "training.learning_rate=1e-2"]
    out = update.update(root / "adapters/pretrained", log, root / "items.csv", name="new", assignments=changes)
    manifest = Adapter.load(out).manifest
    assert manifest["kept"]["step"] > 0
    found = manifest["update"]["periods"]["next period, new items"]
    assert found["cases"] == 40
    change = found["changes"]["extended"]["ndcg@10"]
    assert found["models"]["updated"]["ndcg@10"]["mean"] > 0.5
    assert change["low"] > 0


@pytest.mark.parametrize(
    "scheme", ["semantic", *(pytest.param(name, marks=pytest.mark.slow) for name in ("title", "random"))]
)
def test_other_schemes_are_updated_too(updated: Path, tmp_path: Path, scheme: str) -> None:
    root = tmp_path / "workspace"
    shutil.copytree(updated, root)
    recipe = genrec.config.Recipe(
        "adapters/random", "data/tiny", (genrec.config.Task("prompts/next_item.jinja"),), tuning="full", max_length=64,
        identifiers=genrec.config.IdentifierRecipe(scheme, levels=2, codes=6), training={"max_steps": 2},
    )  # fmt: skip
    made = genrec.training.train(recipe, name="coded", workspace=root)
    out = update.update(made, root / "log.csv", root / "items.csv", assignments=["training.max_steps=2"])
    old, new = Adapter.load(made), Adapter.load(out)
    assert new.identifiers.tokens[:24] == old.identifiers.tokens
    assert len(set(new.identifiers.tokens)) == 28
    genrec.evaluate(genrec.config.Spec("data/tiny-updated", {"new": "adapters/coded-updated"}, k=(5,)), workspace=root)


# Refusals


def test_refusals(updated: Path, tmp_path: Path) -> None:
    root = tmp_path / "workspace"
    shutil.copytree(updated, root)
    lora, log, items = root / "adapters/lora", root / "log.csv", root / "items.csv"

    def refused(kind: type[Exception], match: str, *assignments: str, **options: Any) -> None:
        given = {"name": "new", "data_out": "data/new", **options}
        late = given.pop("late", False)
        with pytest.MonkeyPatch.context() as patched:
            if not late:  # Found out before any model is loaded.
                patched.delattr(Adapter, "model")
            with pytest.raises(kind, match=match):
                update.update(lora, given.pop("log", log), items, assignments=assignments, **given)
        assert not (root / "adapters/new").exists()
        assert not (root / "data/new").exists()

    refused(ConfigError, "update: lora is .*'r': 8.* trained with .*'r': 4", "lora.r=8")
    refused(ConfigError, "update: tuning is 'qlora', and the adapter was trained with 'lora'", "tuning=qlora")
    refused(ConfigError, "unknown key 'trainin'", "trainin.x=1")
    refused(ConfigError, r"unknown key training\.learning_rat\.", "training.learning_rat=1")
    refused(ConfigError, r"training\.optim is 'adam'", "training.optim=adam")
    refused(ConfigError, "max_length is 1000, and base adapters/pretrained reads 128", "max_length=1000", late=True)
    refused(ConfigError, "replay is -1", replay=-1)
    refused(ConfigError, r"walks\.variants is 0\.5\. It would tell events that are held back", "walks.variants=0.5")
    refused(ConfigError, "is what is updated, and stays as it is", name="lora")
    refused(ConfigError, "is what is updated, and stays as it is", data_out="data/tiny", overwrite=True)
    refused(StorageError, "lora-updated exists already", name="lora-updated")
    refused(DataError, "has no column 'customer'", columns={"user_id": "customer"})
    none = write(tmp_path / "none.csv", table([("u1", "i1", 5)], "user_id", "item_id", "timestamp"))
    refused(DataError, "no new interactions: of 1 read, 0 are in the old log and 1 are older", log=none)
    one = write(tmp_path / "one.csv", table([("new", "i1", START)], "user_id", "item_id", "timestamp"))
    changed = root / "data/tiny"
    shutil.move(changed, tmp_path / "tiny")
    Dataset.load(tmp_path / "tiny").k_core(5, 0).save(changed)
    told = Adapter.load(lora).manifest["data"]["hash"]
    refused(DataError, rf"was changed since .* trained on {told}, found {Dataset.load(changed).hash}")
    shutil.rmtree(changed)
    shutil.move(tmp_path / "tiny", changed)
    manifest = json.loads((lora / "genrec.json").read_text())
    (lora / "genrec.json").write_text(json.dumps({**manifest, "fitted_on": "0" * 16}))
    refused(LeakError, "was trained on other interactions")
    lost = json.loads(json.dumps(manifest))
    lost["recipe"]["tasks"][1]["prompt"] = "prompts/lost.jinja"
    (lora / "genrec.json").write_text(json.dumps(lost))
    refused(ConfigError, "lora has no prompt 'lost', which its recipe names")
    (lora / "genrec.json").write_text(json.dumps(manifest))
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("WORLD_SIZE", "2")
        refused(ConfigError, "a launcher started 2 processes")
    another = root / "data/other"
    shutil.copytree(root / "data/tiny", another)
    with pytest.raises(StorageError, match=r"data/other exists already and is another data set"):
        update.update(lora, log, items, name="new", data_out="data/other")
    update.update(lora, one, name="one", data_out="data/one", assignments=["training.max_steps=1"])
    found = Adapter.load(root / "adapters/one").manifest["update"]["periods"]
    assert found["next period"] == {"cases": 0}  # A user with one event is no case.
    assert found["old test cases"]["cases"] == len(Dataset.load(changed).split().test)
    shutil.rmtree(root / "adapters/pretrained")
    refused(AdapterError, "its base")


def test_what_reaches_back_before_the_old_validation_is_refused() -> None:
    old = Dataset.from_frames(
        table([(f"u{n % 3}", f"i{n}", n) for n in range(30)], "user_id", "item_id", "timestamp")
    )  # fmt: skip
    early = Dataset.from_frames(
        table([(f"v{n % 9}", f"i{n % 30}", -n) for n in range(60)], "user_id", "item_id", "timestamp"), old.items
    )  # fmt: skip
    both, _ = old.append(early)
    with pytest.raises(LeakError, match="reaches back before the old validation period"):
        update._fresh(old.split("temporal"), both.split("temporal"), 0.5)


# Whatever stops an update, no adapter lacks its data set


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_update_that_fails_leaves_the_adapter_that_is_there_and_its_data_set(
    updated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "workspace"
    shutil.copytree(updated, root)
    more = table([("u1", "i1", 2 * START), ("u2", "i2", 2 * START)], "user_id", "item_id", "timestamp")
    log = write(tmp_path / "more.csv", more)
    there = {name: content(root / name) for name in ("adapters/lora-updated", "data/lora-later")}

    def run(name: str, *assignments: str, **options: Any) -> Path:
        return update.update(
            root / "adapters/lora", log, name=name, data_out=f"data/{name.replace('updated', 'later')}",
            assignments=["training.max_steps=2", *assignments], **options,
        )  # fmt: skip

    def left(name: str) -> None:
        assert all(content(root / path) == found for path, found in there.items())
        if name == "new":
            assert not (root / "adapters/new").exists()
            assert not (root / "data/new").exists()

    def full(*arguments: Any, **options: Any) -> None:
        raise StorageError("no space left")

    for name in ("new", "lora-updated"):
        with pytest.raises(ConfigError, match="learning_rat"):
            run(name, "training.learning_rat=1", overwrite=True)
        left(name)
        with pytest.raises(ConfigError, match=r"\[training\] was refused"):  # Found as training begins.
            run(name, "training.lr_scheduler_kwargs={x = 1}", overwrite=True)
        left(name)
        for what in (Dataset, adapters):
            with monkeypatch.context() as patched:
                patched.setattr(what, "save", full)
                with pytest.raises(StorageError, match="no space left"):
                    run(name, overwrite=True)
            left(name)


@pytest.mark.parametrize("there", [True, False])
def test_an_update_that_is_killed_between_its_two_folders_is_mended_by_resume(
    updated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    root = tmp_path / "workspace"
    shutil.copytree(updated, root)
    out, data_out = root / "adapters/lora-updated", root / "data/lora-later"
    before = Dataset.load(data_out).hash
    if not there:
        shutil.rmtree(out)
        shutil.rmtree(data_out)
    rename = files._take_name

    def killed(temporary: Path, path: Path, **options: Any) -> None:
        if path == out:
            raise KeyboardInterrupt
        rename(temporary, path, **options)

    def run(**options: bool) -> Path:
        more = table([("u1", "i1", 2 * START), ("u2", "i2", 2 * START)], "user_id", "item_id", "timestamp")
        return update.update(
            root / "adapters/lora", write(tmp_path / "more.csv", more), name="lora-updated",
            data_out="data/lora-later", assignments=["training.max_steps=2"], overwrite=there, **options,
        )  # fmt: skip

    with monkeypatch.context() as patched:
        patched.setattr(files, "_take_name", killed)
        with pytest.raises(KeyboardInterrupt):
            run()
    after = Dataset.load(data_out).hash
    assert after != before
    spec = genrec.config.Spec("data/lora-later", {"new": "adapters/lora-updated"}, k=(5,))
    if there:  # The one moment at which an adapter lacks its data set, and the next command says so.
        assert Adapter.load(out).manifest["data"]["hash"] == before
        with pytest.raises(LeakError, match="was trained on other interactions"):
            genrec.evaluate(spec, workspace=root)
    else:
        assert not out.exists()
    run(resume=True)
    assert Adapter.load(out).manifest["data"]["hash"] == after
    genrec.evaluate(spec, workspace=root)


# Users who were trained on to their last event


@settings(max_examples=100)
@given(st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=1, max_size=8))
def test_with_leave_one_out_no_case_that_decides_or_is_measured_was_a_target(added: list[list[int]]) -> None:
    # A log that comes in three parts; what was a target by then, event by event.
    assume(all(map(any, zip(*added, strict=True))))
    lengths = np.cumsum(added, axis=1)
    order = np.argsort([row.index(next(filter(None, row), 0)) if any(row) else 3 for row in added], kind="stable")
    lengths, names = lengths[order], [f"u{number}" for number in range(len(added))]
    splits = []
    for part in range(3):
        users = int((lengths[:, part] > 0).sum())
        log = [(names[user], "i", event) for user in range(users) for event in range(lengths[user, part])]
        splits.append(Dataset.from_frames(table(log, "user_id", "item_id", "timestamp")).split())
    targets = {(user, event) for user, end in enumerate(splits[0].truth.train_ends) for event in range(end)}
    left_out: list[str] = []
    for old, new in itertools.pairwise(splits):
        left_out = update._not_validated(old.without_validation(left_out), new, set(left_out))
        cases = new.without_validation(left_out).valid
        decisive = {(int(user), int(new.truth.valid_at[user])) for user in cases.users}
        told = {(int(user), int(new.truth.valid_at[user])) for user in new.valid.users}
        assert decisive == told - targets
        assert not targets & {(int(user), int(new.truth.test_at[user])) for user in new.test.users}
        try:
            fresh = update._fresh(old, new, 0.5)
        except DataError as error:
            if "no new interactions for training" not in str(error):
                raise
            continue
        assert (fresh.known <= new.truth.train_ends).all()
        runs = [(user, run) for user, history in enumerate(new.train) for run in fresh.new(user, len(history))]
        targets |= {(user, event) for user, run in runs for event in range(*run)}


def test_a_user_of_two_old_events_and_a_new_one_is_trained_and_tested_but_decides_nothing(
    workspace: Path, tmp_path: Path
) -> None:
    root = tmp_path / "workspace"
    shutil.copytree(workspace, root)
    old = Dataset.load(root / "data/tiny")
    columns = ("user_id", "item_id", "timestamp")
    log = pl.concat(
        [old.interactions.select(columns), table([("two", "i1", 5), ("two", "i2", 6)], *columns)],
        how="vertical_relaxed",
    )
    Dataset.from_frames(log, old.items, old.users, name="two").save(root / "data/two")
    recipe = genrec.config.Recipe(
        "adapters/random", "data/two", (genrec.config.Task("prompts/next_item.jinja"),), tuning="full", max_length=64,
        training={"max_steps": 2},
    )  # fmt: skip
    made = genrec.training.train(recipe, name="two", workspace=root)
    days = [[("two", "i3", START), ("u1", "i3", START)], [("u2", "i3", 2 * START), ("u3", "i3", 2 * START)]]
    for number, rows in enumerate(days):
        day = write(tmp_path / "day.csv", table(rows, *columns))
        made = update.update(made, day, assignments=["training.max_steps=2"])
        adapter = Adapter.load(made)
        data = Dataset.load(root / adapter.manifest["data"]["path"])
        assert adapter.not_validated == ["two"]
        assert any("1 users" in note for note in adapter.manifest["update"]["notes"])
        cases = len(data.split().valid)
        assert adapter.manifest["protocol"]["valid_cases"] == cases - 1
        # An export measures the very cases that training kept its weights by.
        tokens = adapter.tokenization()
        validation = validation_set(adapter, tokens)
        assert len(validation.prompts) == cases - 1
        measured = validation.evaluate(LocalEngine(adapter.model(tokens)))
        assert measured["ndcg@10"] == pytest.approx(adapter.manifest["kept"]["ndcg@10"])
        assert adapter.manifest["update"]["periods"]["next period"]["cases"] == 2  # With the new event of "two".
        assert number or data.user_ids[data.split().test.users[-1]] == "two"
    last = write(tmp_path / "day.csv", table([("two", "i4", 3 * START)], *columns))
    assert Adapter.load(update.update(made, last, assignments=["training.max_steps=1"])).not_validated == []


def test_the_command_prints_the_report_and_goes_on_where_it_was_stopped(
    updated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from genrec import cli

    root = tmp_path / "workspace"
    shutil.copytree(updated, root)
    monkeypatch.chdir(root)
    command = [
        "update", "adapters/pretrained", "--interactions", "log.csv", "--items", "items.csv", "--name", "again",
        "--data-out", "data/again", "training.num_train_epochs=2",
    ]  # fmt: skip

    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(training, "_save", stop)
        assert CliRunner().invoke(cli.app, command).exit_code == 130
    assert not (root / "adapters/again").exists()
    with pytest.raises(StorageError, match="interrupted run"):
        CliRunner().invoke(cli.app, command, catch_exceptions=False)
    done = CliRunner().invoke(cli.app, [*command, "--resume", "--json"], catch_exceptions=False)
    told = json.loads(done.stdout)
    assert (told["adapter"], told["data"]) == ("adapters/again", "data/again")
    whole = Adapter.load("adapters/pretrained-updated")  # The same update, in one go.
    assert told["kept"]["ndcg@10"] == whole.manifest["kept"]["ndcg@10"]
    assert told["update"]["periods"] == whole.manifest["update"]["periods"]
    with pytest.raises(StorageError, match="again exists already"):
        CliRunner().invoke(cli.app, command, catch_exceptions=False)
    shown = CliRunner().invoke(cli.app, [*command, "--overwrite"], catch_exceptions=False).stdout
    for part in ("next period", "change from extended", "4 new items", "kept step", "data/again"):
        assert part in shown


@pytest.mark.parametrize("kind", ["temporal", "qlora"])
def test_temporal_splits_and_bases_in_4_bits_are_updated_too(workspace: Path, tmp_path: Path, kind: str) -> None:
    root = tmp_path / "workspace"
    shutil.copytree(workspace, root)
    log, items = later(root)
    changes: dict[str, Any] = {"base": "adapters/random", "tuning": "full", "split": "temporal"}
    if kind == "qlora":
        pytest.importorskip("bitsandbytes")
        changes = {"base": "adapters/pretrained", "tuning": "qlora", "lora": {"r": 4}}
    recipe = genrec.config.Recipe(
        data="data/tiny", tasks=(genrec.config.Task("prompts/next_item.jinja"),), max_length=64,
        training={"max_steps": 2}, **changes,
    )  # fmt: skip
    made = genrec.training.train(recipe, name=kind, workspace=root)
    new = Adapter.load(update.update(made, log, items, assignments=["training.max_steps=2"]))
    assert new.tuning == recipe.tuning
    assert all(found["cases"] for found in new.manifest["update"]["periods"].values())
    spec = genrec.config.Spec("data/tiny-updated", {"new": f"adapters/{kind}-updated"}, split=recipe.split, k=(5,))
    genrec.evaluate(spec, workspace=root)
