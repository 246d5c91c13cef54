from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from genrec import Recommender, adapter, base, training
from genrec.adapter import Adapter
from genrec.engines.local import LocalEngine
from genrec.errors import AdapterError, GenrecError, IdentifierError
from genrec.tokenization import Tokenization

HISTORIES: list[list[str]] = [[], ["i3"], [f"i{item}" for item in range(20)], ["i7", "i7", "i9"]]
SCORE = """
import json, sys
from genrec import Recommender
for path in sys.argv[2:]:
    loaded = Recommender.load(path)
    scores = [loaded.score(history, loaded.item_ids).tolist() for history in json.loads(sys.argv[1])]
    lists = [[one.item_id for one in found] for found in loaded.recommend(json.loads(sys.argv[1]), 5)]
    print(json.dumps([scores, lists]))
"""


def scores(path: Path) -> np.ndarray:
    loaded = Recommender.load(path)
    return np.array([loaded.score(history, loaded.item_ids) for history in HISTORIES])


def untied_base(out: Path) -> None:
    """Random weights with an output embedding of its own."""
    tied = base.Base("random", base.create(["Film of series"], out, vocabulary=280, width=16, context=128))
    tokenizer = tied.tokenizer()
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, tie_word_embeddings=False, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(out)


@pytest.fixture(scope="module")
def trained(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """A workspace with an adapter of each kind, and the scores by the trainer's own models. Never change it."""
    root = tmp_path_factory.mktemp("adapters") / "workspace"
    shutil.copytree(workspace, root)
    untied_base(root / "adapters" / "untied")
    expected: dict[str, np.ndarray] = {}
    save = adapter.save

    def recording(path: Path, *, model: Any, tokenization: Tokenization, prompts: Any, **rest: Any) -> None:
        save(path, model=model, tokenization=tokenization, prompts=prompts, **rest)
        engine = LocalEngine(model.get_base_model() if isinstance(model, PeftModel) else model)
        prompt, ids = next(iter(prompts.values())), tokenization.identifiers.item_ids
        answers = [tokenization.identifier(item) for item in range(len(ids))]
        expected[path.name] = np.array(
            [
                engine.score(
                    [tokenization.sequence(prompt, np.array([ids.index(item) for item in history]))] * len(ids), answers
                )
                for history in HISTORIES
            ]
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapter, "save", recording)
        recipe = root / "adapters" / "lora.toml"
        slow = ["training.learning_rate=1e-3"]  # At the recipe's own the first weights would be the best, and be kept.
        training.train(recipe, name="tied-lora", assignments=slow)
        training.train(recipe, name="untied-lora", assignments=[*slow, "base=adapters/untied"])
        training.train(recipe, name="tied-qlora", assignments=[*slow, "tuning=qlora"])
        training.train(recipe, name="untied-qlora", assignments=[*slow, "tuning=qlora", "base=adapters/untied"])
        full = ["tuning=full", "lora={}", "training.num_train_epochs=2"]
        training.train(recipe, name="tied-full", assignments=full)
        training.train(recipe, name="untied-full", assignments=[*full, "base=adapters/untied"])
    return root, expected


NAMES = ["tied-lora", "untied-lora", "tied-qlora", "untied-qlora", "tied-full", "untied-full"]


@pytest.fixture
def copied(trained: tuple[Path, Any], tmp_path: Path) -> Path:
    """A copy of that workspace to tamper with."""
    shutil.copytree(trained[0], tmp_path / "workspace")
    return tmp_path / "workspace"


# Written and read again


def test_a_new_process_scores_as_the_trainer_did(trained: tuple[Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
    root, expected = trained
    paths = [str(root / "adapters" / name) for name in NAMES]
    command = [sys.executable, "-c", SCORE, json.dumps(HISTORIES), *paths]
    told = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout.splitlines()
    for name, line in zip(NAMES, told, strict=True):
        found, lists = json.loads(line)
        np.testing.assert_allclose(found, scores(root / "adapters" / name), rtol=0, atol=1e-6)
        np.testing.assert_allclose(found, expected[name], rtol=0, atol=1e-5)
        assert np.ptp(found) > 0.1
        loaded = Recommender.load(root / "adapters" / name)
        assert lists == [[one.item_id for one in list_] for list_ in loaded.recommend(HISTORIES, 5)]


def test_the_adapters_differ(trained: tuple[Path, dict[str, np.ndarray]]) -> None:
    root, expected = trained
    for one, name in enumerate(NAMES):
        for other in NAMES[one + 1 :]:
            assert np.abs(expected[name] - expected[other]).max() > 1e-4
    assert len({Adapter.load(root / "adapters" / name).hash for name in NAMES}) == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_holds_what_it_should_and_no_pickle(trained: tuple[Path, Any], name: str) -> None:
    folder = trained[0] / "adapters" / name
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    weights = {"adapter_config.json", "adapter_model.safetensors"}
    if name.endswith("full"):
        weights = {"config.json", "generation_config.json", "model.safetensors"}
    assert found == weights | {
        *("genrec.json", "rows.safetensors", "identifiers.parquet", "items.parquet", "frames.json"),
        *("learning_curve.json", "learning_curve.png"),
        *(f"prompts/{prompt}.jinja" for prompt in ("next_item", "title_to_item", "item_to_title")),
        *(f"tokenizer/{file}" for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")),
    }
    rows = load_file(folder / "rows.safetensors")
    assert set(rows) == ({"input", "output"} if name.startswith("untied") else {"input"})
    assert all(value.shape == (24, 16) for value in rows.values())
    if name.endswith("lora"):
        assert all(".lora_" in key for key in load_file(folder / "adapter_model.safetensors"))


def test_loading_unpickles_nothing(trained: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("something was unpickled")

    monkeypatch.setattr(torch, "load", refuse)
    for name in NAMES:
        assert np.isfinite(scores(trained[0] / "adapters" / name)).all()


def test_the_manifest_says_what_it_was_made_from(trained: tuple[Path, Any]) -> None:
    root, _ = trained
    told = Adapter.load(root / "adapters" / "tied-lora").manifest
    assert told["tuning"] == "lora"
    assert told["base"] == {
        "name": "adapters/pretrained",
        "folder": "../pretrained",
        "revision": None,
        "hash": base.find("adapters/pretrained", root).hash,
    }
    assert told["prompts"] == ["next_item", "title_to_item", "item_to_title"]
    assert told["recipe"]["lora"] == {"r": 4}
    assert told["versions"]["torch"] == torch.__version__
    assert told["kept"]["ndcg@10"] == max(
        point["ndcg@10"]
        for point in json.loads((root / "adapters/tied-lora/learning_curve.json").read_text())["validation"]
    )


@pytest.mark.parametrize("tied", ["tied", "untied"])
def test_qlora_is_loaded_in_the_four_bits_that_it_was_trained_beside(trained: tuple[Path, Any], tied: str) -> None:
    loaded = Adapter.load(trained[0] / "adapters" / f"{tied}-qlora")
    assert loaded.tuning == loaded.manifest["recipe"]["tuning"] == "qlora"
    tokenization = loaded.tokenization()
    ids = torch.from_numpy(tokenization.sequence(loaded.prompt, np.arange(5)))[None]
    models = [loaded.model(tokenization, quantised=quantised) for quantised in (None, True, False)]
    logits = [model(input_ids=ids).logits.detach() for model in models]
    assert torch.equal(logits[0], logits[1])
    assert 1e-4 < (logits[0] - logits[2]).abs().max() < 1  # Four bits are not the weights.
    kinds = [{type(module).__name__ for module in model.modules()} for model in models]
    assert [("Linear4bit" in kind) for kind in kinds] == [True, True, False]
    assert all(value.dtype == torch.float32 for value in models[2].parameters())
    rows = load_file(loaded.path / "rows.safetensors")
    for model in models:
        found = adapter.rows(model, adapter.identifier_ids(tokenization))
        assert found.keys() == rows.keys()
        assert all(torch.equal(found[key], value) for key, value in rows.items())


def test_four_bits_need_their_package_and_a_base(trained: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Adapter.load(trained[0] / "adapters" / "tied-full")
    with pytest.raises(AdapterError, match="tied-full is a whole model, which is not held in 4 bits"):
        whole.model(whole.tokenization(), quantised=True)
    loaded = Adapter.load(trained[0] / "adapters" / "tied-qlora")
    monkeypatch.setattr(base, "can_quantise", lambda: False)
    with pytest.raises(AdapterError, match=r'tied-qlora: weights in 4 bits need .* pip install "genrec\[qlora\]"'):
        loaded.model(loaded.tokenization())
    assert loaded.model(loaded.tokenization(), quantised=False).dtype == torch.float32


def test_a_whole_workspace_can_be_moved(copied: Path, trained: tuple[Path, Any]) -> None:
    moved = copied.parent / "elsewhere"
    copied.rename(moved)
    np.testing.assert_array_equal(
        scores(moved / "adapters" / "tied-lora"), scores(trained[0] / "adapters" / "tied-lora")
    )


def test_weights_can_be_loaded_in_another_precision(trained: tuple[Path, dict[str, np.ndarray]]) -> None:
    root, expected = trained
    loaded = Recommender.load(root / "adapters" / "tied-lora", dtype="bfloat16")
    found = np.array([loaded.score(history, loaded.item_ids) for history in HISTORIES])
    np.testing.assert_allclose(found, expected["tied-lora"], atol=0.5)
    assert np.abs(found - expected["tied-lora"]).max() > 0


# Tampering


def append(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b" ")


def edit(old: str, new: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new, 1), encoding="utf-8")

    return change


def nudge(path: Path) -> None:
    """Change one number of a file of weights."""
    weights = load_file(path)
    next(iter(weights.values())).view(-1)[0] += 1e-3
    save_file(weights, path, metadata={"format": "pt"})


def swap(path: Path) -> None:
    """Exchange the identifiers of two items."""
    table = pl.read_parquet(path)
    order = [1, 0, *range(2, len(table))]
    table.with_columns(table["tokens"].gather(order)).write_parquet(path, metadata={"scheme": "atomic"})


@pytest.mark.parametrize(
    ("name", "file", "change"),
    [
        ("tied-lora", "prompts/next_item.jinja", edit("Next:", "next:")),
        ("tied-lora", "prompts/item_to_title.jinja", append),
        ("tied-lora", "identifiers.parquet", swap),
        ("tied-lora", "tokenizer/tokenizer.json", edit("<|item_3|>", "<|item_x|>")),
        ("tied-lora", "tokenizer/chat_template.jinja", append),
        ("tied-lora", "rows.safetensors", nudge),
        ("untied-lora", "rows.safetensors", nudge),
        ("tied-lora", "frames.json", edit("[", "[1,")),
        ("tied-lora", "adapter_model.safetensors", nudge),
        ("tied-lora", "adapter_config.json", edit('"lora_alpha": 32', '"lora_alpha": 64')),
        ("tied-full", "model.safetensors", nudge),
        ("tied-full", "config.json", edit('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-03')),
    ],
)
def test_a_changed_file_is_refused_with_both_hashes(
    copied: Path, name: str, file: str, change: Callable[[Path], None]
) -> None:
    folder = copied / "adapters" / name
    trained_hash = json.loads((folder / "genrec.json").read_text())["files"][file]
    change(folder / file)
    found = adapter.files.file_hash(folder / file)
    with pytest.raises(AdapterError) as error:
        Adapter.load(folder)
    assert str(folder / file) in str(error.value)
    assert f"trained {trained_hash[:16]}, found {found[:16]}" in str(error.value)
    assert trained_hash != found


@pytest.mark.parametrize(("file", "change"), [("model.safetensors", nudge), ("config.json", append)])
def test_a_changed_base_is_refused_with_both_hashes(copied: Path, file: str, change: Callable[[Path], None]) -> None:
    before = base.find("adapters/pretrained", copied).hash
    change(copied / "adapters" / "pretrained" / file)
    after = base.find("adapters/pretrained", copied).hash
    with pytest.raises(AdapterError) as error:
        Recommender.load(copied / "adapters" / "tied-lora")
    assert f"trained on {before[:16]}, found {after[:16]}" in str(error.value)
    assert "adapters/pretrained" in str(error.value)


@pytest.mark.parametrize(
    "file", ["rows.safetensors", "adapter_model.safetensors", "tokenizer/tokenizer.json", "items.parquet"]
)
def test_a_missing_file_is_named(copied: Path, file: str) -> None:
    folder = copied / "adapters" / "tied-lora"
    (folder / file).unlink()
    with pytest.raises(AdapterError, match="is missing; the adapter is incomplete") as error:
        Adapter.load(folder)
    assert str(folder / file) in str(error.value)


def test_a_missing_base_is_named_and_a_full_adapter_needs_none(copied: Path) -> None:
    shutil.rmtree(copied / "adapters" / "pretrained")
    shutil.rmtree(copied / "adapters" / "untied")
    for name, gone in (("tied-lora", "pretrained"), ("untied-lora", "untied")):
        with pytest.raises(AdapterError, match=rf"its base adapters/{gone} \(hash .*\) is not at .*/adapters/{gone}\."):
            Adapter.load(copied / "adapters" / name)
    assert np.isfinite(scores(copied / "adapters" / "tied-full")).all()


def test_what_is_no_adapter_is_refused(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"no adapter here \(no genrec\.json\)\. Name a folder"):
        Adapter.load(tmp_path)
    with pytest.raises(AdapterError, match="no adapter here"):
        Adapter.load(tmp_path / "nowhere")
    shutil.rmtree(copied / "adapters" / "lora")
    with pytest.raises(AdapterError, match=r"Train it: genrec train .*adapters/lora\.toml"):
        Adapter.load(copied / "adapters" / "lora")
    (copied / "adapters" / "lora.v2.toml").write_text("")
    with pytest.raises(AdapterError, match=r"Train it: genrec train .*adapters/lora\.v2\.toml"):
        Adapter.load(copied / "adapters" / "lora.v2")
    with pytest.raises(AdapterError, match="no adapter here"):
        Adapter.load(".")
    with pytest.raises(AdapterError, match="no adapter here"):  # A base alone.
        Adapter.load(copied / "adapters" / "random")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format_version": 99, "versions": {"genrec": "7.1"}}', "format_version is 99, .* reads 1.*genrec 7.1"),
        ("{}", "format_version is None"),
        ("[]", "holds no table"),
        ('{"format_version": 1,\n oops', r"genrec\.json:2: not valid JSON"),
    ],
)
def test_a_foreign_manifest_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "genrec.json").write_text(text)
    with pytest.raises(AdapterError, match=message):
        Adapter.load(tmp_path)


# Items may change


def test_titles_may_change_without_training_again(copied: Path, trained: tuple[Path, Any]) -> None:
    folder = copied / "adapters" / "tied-lora"
    items = pl.read_parquet(folder / "items.parquet")
    items.with_columns(title=pl.lit("Renamed"), stock=1).write_parquet(folder / "items.parquet")
    np.testing.assert_array_equal(scores(folder), scores(trained[0] / "adapters" / "tied-lora"))
    assert {one.title for one in Recommender.load(folder).recommend([["i1"]], 3)[0]} == {"Renamed"}


@pytest.mark.parametrize("change", [pl.DataFrame.reverse, lambda items: items.head(20)], ids=["order", "fewer"])
def test_other_items_are_refused(copied: Path, change: Callable[[pl.DataFrame], pl.DataFrame]) -> None:
    file = copied / "adapters" / "tied-lora" / "items.parquet"
    change(pl.read_parquet(file)).write_parquet(file)
    with pytest.raises(IdentifierError, match="list different items, or the same in another order"):
        Recommender.load(file.parent)


def test_items_that_are_no_parquet_are_refused(copied: Path) -> None:
    file = copied / "adapters" / "tied-lora" / "items.parquet"
    file.write_bytes(b"item_id,title\n")
    with pytest.raises(GenrecError, match="cannot be read as Parquet"):
        Adapter.load(file.parent)


# Rows of the embedding


@pytest.mark.parametrize("tied", [True, False])
def test_rows_are_read_and_written_where_they_stand(tied: bool) -> None:
    config = LlamaConfig(
        vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        tie_word_embeddings=tied,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    before = model.get_input_embeddings().weight.detach().clone()
    adapter.resize(model, 20)
    adapter.resize(model, 15)
    assert model.get_input_embeddings().weight.shape == (20, 8)
    adapter.resize(model, 23)
    assert model.get_input_embeddings().weight.shape == (23, 8) == model.get_output_embeddings().weight.shape
    ids = torch.tensor([22, 3, 20])
    values = {"input": torch.ones(3, 8), **({} if tied else {"output": torch.full((3, 8), 2.0)})}
    adapter.set_rows(model, ids, values)
    found = adapter.rows(model, ids)
    assert found.keys() == values.keys()
    for key, value in values.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=0)
    others = [index for index in range(20) if index != 3]
    assert torch.equal(model.get_input_embeddings().weight[others], before[others])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda told: told["prompts"].append("../../../outside"), r"prompts/\.\./.*outside\.jinja is missing"),
        (lambda told: told["files"].update({"/etc/hostname": "0"}), "/etc/hostname is missing"),
        (lambda told: told["files"].update({"../pretrained/config.json": "0"}), "config.json is missing"),
        (lambda told: told.update(files={}), "is none of the files that the adapter was trained with"),
        (lambda told: told.pop("files"), r"genrec\.json: files is None; it takes a value of type dict"),
        (lambda told: told.pop("base"), "base.name is None"),
        (lambda told: told.update(prompts=[]), r"prompts is \[\]"),
        (lambda told: told.update(max_length="64"), "max_length is '64'; it takes a value of type int"),
        (lambda told: told["data"]["manifest"].pop("exclude_seen"), "exclude_seen is None"),
    ],
)
def test_a_manifest_leads_to_no_other_files_and_hides_none(
    copied: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    (copied.parent / "outside.jinja").write_text("{% block item %}{{ item.identifier }}{% endblock %}")
    file = copied / "adapters" / "tied-lora" / "genrec.json"
    told = json.loads(file.read_text())
    change(told)
    file.write_text(json.dumps(told))
    with pytest.raises(AdapterError, match=message):
        Adapter.load(file.parent)


def test_an_added_file_is_refused_unless_it_is_hidden(copied: Path) -> None:
    folder = copied / "adapters" / "tied-lora"
    (folder / ".DS_Store").write_text("")
    (folder / "learning_curve.png").unlink()
    Adapter.load(folder)
    (folder / "tokenizer" / "added_tokens.json").write_text("{}")
    with pytest.raises(AdapterError, match=r"added_tokens\.json is none of the files"):
        Adapter.load(folder)


@pytest.mark.parametrize("column", ["title", "item_id"])
def test_items_without_a_needed_column_are_refused(copied: Path, column: str) -> None:
    file = copied / "adapters" / "tied-lora" / "items.parquet"
    pl.read_parquet(file).drop(column).write_parquet(file)
    with pytest.raises(AdapterError, match=f"has no column '{column}'"):
        Adapter.load(file.parent)


def test_no_file_tells_where_the_base_lay(trained: tuple[Path, Any]) -> None:
    for name in NAMES:
        for file in (trained[0] / "adapters" / name).rglob("*.json"):
            assert str(trained[0]) not in file.read_text(encoding="utf-8"), file
    told = json.loads((trained[0] / "adapters" / "tied-lora" / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == "adapters/pretrained"


def test_what_was_trained_and_cannot_be_saved_is_refused(trained: tuple[Path, Any], tmp_path: Path) -> None:
    loaded = Adapter.load(trained[0] / "adapters" / "tied-lora")
    tokenization = loaded.tokenization()
    model = get_peft_model(loaded.model(tokenization), LoraConfig(r=2, target_modules="all-linear"))
    options: dict[str, Any] = {"base": loaded.base, "tokenization": tokenization, "prompts": {}, "extra": {}}
    next(value for name, value in model.named_parameters() if "norm" in name).requires_grad = True
    with pytest.raises(AdapterError, match=r"norm.* was trained, and an adapter holds LoRA matrices"):
        adapter.save(tmp_path / "out", model=model, tuning="lora", manifest={}, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda told: told.update(max_length=63),
        lambda told: told.update(prompts=told["prompts"][::-1]),
        lambda told: told["data"]["manifest"].update(exclude_seen=False),
    ],
    ids=["max_length", "prompts", "exclude_seen"],
)
def test_the_hash_covers_how_prompts_and_lists_are_made(
    trained: tuple[Path, Any], change: Callable[[dict[str, Any]], None]
) -> None:
    one, other = (Adapter.load(trained[0] / "adapters" / "tied-lora") for _ in range(2))
    assert one.hash == other.hash
    change(one.manifest)
    assert one.hash != other.hash


def test_hashes_of_adapters_tell_bases_apart(copied: Path, trained: tuple[Path, Any]) -> None:
    one, other = (Adapter.load(root / "adapters" / "tied-lora") for root in (copied, trained[0]))
    assert one.hash == other.hash
    assert one.prompt.name == "next_item"
    one.manifest["base"]["hash"] = "another"
    assert one.hash != other.hash


# Columns of users


def test_types_of_columns_that_prompts_read() -> None:
    from genrec.prompts import Prompt

    block = "{% block user %}TEXT{% endblock %}{% block item %}{{ item.identifier }}{% endblock %}"
    heads = ["{{ user.age }}{{ user.kind }}", "{{ user.tags | join }}{{ user.nix | default }}", "{{ user.born }}"]
    prompts = [Prompt.parse(block.replace("TEXT", head), "x") for head in heads]
    users = pl.DataFrame(
        {"user_id": ["a"], "age": [1], "kind": ["x"], "tags": [[1.5]], "born": ["2000-01-01"], "other": [1]},
        schema_overrides={"age": pl.Int8, "kind": pl.Categorical},
    ).with_columns(pl.col("born").str.to_date())
    assert adapter.user_columns(users, prompts) == {"age": "Int8", "kind": "String", "tags": "List(Float64)"}
    assert adapter.user_columns(None, prompts) == {}


@pytest.mark.parametrize("told", [7, None, ["age"], {"age": "Date"}, {"age": ["Int64"]}])
def test_types_of_columns_that_no_training_writes_are_refused(workspace: Path, tmp_path: Path, told: Any) -> None:
    path = tmp_path / "adapters" / "lora"
    shutil.copytree(workspace / "adapters", tmp_path / "adapters")
    manifest = json.loads((path / "genrec.json").read_text())
    (path / "genrec.json").write_text(json.dumps({**manifest, "user_columns": told}))
    with pytest.raises(AdapterError, match=r"genrec\.json: user_columns is .*; it takes "):
        Adapter.load(path)


def test_the_contract_of_every_prompt_is_told_and_compared(workspace: Path, tmp_path: Path) -> None:
    path = tmp_path / "adapters" / "lora"
    shutil.copytree(workspace / "adapters", tmp_path / "adapters")
    manifest = json.loads((path / "genrec.json").read_text())
    loaded = Adapter.load(path)
    assert manifest["contracts"] == {name: prompt.contract for name, prompt in loaded.prompts.items()}
    for told, message in (
        (
            {**manifest["contracts"], "next_item": "0" * 64},
            r"next_item\.jinja: this genrec makes other tokens.* 0000000000",
        ),
        ({}, r"next_item\.jinja: this genrec makes other tokens of it .*: contract None in"),
        ("0" * 64, r"genrec\.json: contracts is '0000"),
    ):
        (path / "genrec.json").write_text(json.dumps({**manifest, "contracts": told}))
        with pytest.raises(AdapterError, match=message):
            Adapter.load(path)
