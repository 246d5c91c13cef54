"""Exports: what others load gives the numbers that training had, and what vLLM would load wrongly is refused."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Phi3Config, PreTrainedModel, Qwen3Config

from genrec import adapter as adapters
from genrec import base as bases
from genrec import export as exports
from genrec import files, training
from genrec.adapter import Adapter
from genrec.cli import main
from genrec.dataset import Dataset
from genrec.engines.local import LocalEngine
from genrec.engines.vllm import max_lora_rank
from genrec.errors import AdapterError, ConfigError, DataError, StorageError
from genrec.export import export
from genrec.recommender import Recommender
from genrec.vllm_files import check_vllm

SIZE: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 5,
}  # fmt: skip
BASES: dict[str, Callable[..., Any]] = {
    "llama": lambda **size: LlamaConfig(tie_word_embeddings=False, **size),
    "phi3": lambda **size: Phi3Config(tie_word_embeddings=False, **size),
    "qwen3": lambda **size: Qwen3Config(tie_word_embeddings=True, head_dim=8, **size),
}
SHORT = ["training.max_steps=2", "training.learning_rate=0.02", "validation.users=6"]
TRAINED = {  # Name -> changes to the recipe of the workspace's LoRA, which stands on a tied Llama.
    "llama-tied": [],
    "llama-untied": ["base=adapters/llama", "lora.r=3"],
    "phi3-untied": ["base=adapters/phi3"],
    "qwen3-tied": ["base=adapters/qwen3", "lora.use_rslora=true"],
    "bf16": ["dtype=bfloat16"],
    "full": ["base=adapters/llama", "tuning=full", "lora={}"],
    "pattern": ['lora.rank_pattern={"q_proj" = 2}'],
    "dora": ["lora.use_dora=true"],
}
LORA = ["llama-tied", "llama-untied", "phi3-untied", "qwen3-tied", "bf16"]


def asked(vocabulary: int) -> torch.Tensor:
    """Token ids over the whole vocabulary, identifiers included."""
    return torch.arange(vocabulary).repeat(2)[: 2 * (vocabulary // 2)].view(-1, vocabulary // 2)[:, :100]


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    training_mode = model.training
    with torch.inference_mode():
        found = model.eval()(input_ids=ids).logits.float()
    model.train(training_mode)
    return found


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.shape == other.shape
    return float((one - other).abs().max())


@pytest.fixture(scope="module")
def trained(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A workspace with adapters of several architectures, and the logits in the trainer's hands. Never change it."""
    root = tmp_path_factory.mktemp("export") / "workspace"
    shutil.copytree(workspace, root)
    for name, made in BASES.items():
        tokenizer = bases.Base(name, bases.create(["Film of series"], root / "adapters" / name, width=16)).tokenizer()
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(made(vocab_size=len(tokenizer), **SIZE))
        model.save_pretrained(root / "adapters" / name)
    found: dict[str, torch.Tensor] = {}
    save = adapters.save

    def recording(path: Path, *, model: Any, tokenization: Any, **rest: Any) -> None:
        # The weights that validation kept may be those of the first step, where LoRA does nothing yet.
        with torch.no_grad():
            for value in model.parameters():
                if value.requires_grad:
                    value += 0.05 * torch.randn_like(value)
        save(path, model=model, tokenization=tokenization, **rest)
        found[path.name] = logits(model, asked(len(tokenization.tokenizer)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapters, "save", recording)
        for name, changes in TRAINED.items():
            training.train(root / "adapters" / "lora.toml", name=name, assignments=[*SHORT, *changes])
    return root, found


@pytest.fixture(scope="module")
def good(trained: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export for vLLM of the first of them. Never change it."""
    out = tmp_path_factory.mktemp("good") / "served"
    export(trained[0] / "adapters" / "llama-tied", out, to="vllm")
    return out


def tree(folder: Path) -> dict[str, str]:
    entries = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): files.file_hash(path) for path in entries}


# What is written is what was trained


@pytest.mark.parametrize("name", LORA)
def test_base_and_lora_give_the_trainers_logits(
    trained: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, name: str
) -> None:
    root, expected = trained
    source = Adapter.load(root / "adapters" / name)
    done = export(source.path, tmp_path / "served", to="vllm")
    assert done.lora == tmp_path / "served" / "adapter"
    assert done.model.parent == tmp_path / "served"
    lora = load_file(done.lora / "adapter_model.safetensors")
    assert lora
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in lora)

    base = AutoModelForCausalLM.from_pretrained(done.model)
    ids = asked(len(AutoTokenizer.from_pretrained(done.model)))
    assert base.dtype == (torch.bfloat16 if name == "bf16" else torch.float32)
    assert base.get_input_embeddings().weight.shape[0] == expected[name].shape[-1]
    assert base.config.tie_word_embeddings == name.endswith(("-tied", "bf16"))
    unadapted = logits(base, ids)
    found = logits(PeftModel.from_pretrained(base, done.lora), ids)
    assert difference(found, expected[name]) == 0.0
    assert difference(unadapted, expected[name]) > 1e-3  # The LoRA does something.
    assert check_vllm(done.lora) == []
    assert check_vllm(done.lora, done.model) == []


@pytest.mark.parametrize("name", [*LORA, "full", "pattern", "dora"])
def test_a_merged_checkpoint_is_the_model_that_recommends(
    trained: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, name: str
) -> None:
    root, expected = trained
    source = Adapter.load(root / "adapters" / name)
    tokenization = source.tokenization()
    done = export(source.path, tmp_path / "merged", to="merged")
    assert (done.model, done.lora) == (tmp_path / "merged", None)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(done.model), AutoTokenizer.from_pretrained(done.model)
    ids = asked(len(tokenizer))
    found = logits(model, ids)
    assert difference(found, logits(source.model(tokenization, dtype=model.dtype), ids)) == 0.0
    # Merging rounds: in float32 that is all that parts it from the trainer's.
    assert difference(found, expected[name]) <= (0.0 if name == "full" else 0.05 if name == "bf16" else 1e-5)
    if name == "full":
        trained_weights, written = (load_file(path / "model.safetensors") for path in (source.path, done.model))
        assert all(torch.equal(written[key], value) for key, value in trained_weights.items())


def test_the_tokenizer_encodes_as_the_adapters(trained: tuple[Path, Any], tmp_path: Path, good: Path) -> None:
    source = Adapter.load(trained[0] / "adapters" / "llama-tied")
    tokenization = source.tokenization()
    merged = export(source.path, tmp_path / "merged", to="merged").model
    messages = [{"role": "user", "content": "Film 3 of séries <|end|>"}]
    for folder in (merged, next(good.glob("base-*"))):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        for item in range(len(source.identifiers.item_ids)):
            spelled = tokenization.tokenizer.decode(tokenization.identifier(item))
            assert tokenizer.encode(spelled, add_special_tokens=False) == list(tokenization.identifier(item))
        for text in ("Film 3 of series 0", "two  spaces, ünicode\nand lines"):
            assert tokenizer.encode(text) == tokenization.tokenizer.encode(text)
        for generation in (True, False):
            rendered = [
                one.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
                for one in (tokenizer, tokenization.tokenizer)
            ]
            assert rendered[0] == rendered[1]


def test_of_a_full_product_vllm_gets_the_model_alone(
    trained: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    done = export(trained[0] / "adapters" / "full", tmp_path / "served", to="vllm")
    assert done.lora is None
    assert list((tmp_path / "served").iterdir()) == [done.model]
    model = AutoModelForCausalLM.from_pretrained(done.model)
    assert difference(logits(model, asked(model.config.vocab_size)), trained[1]["full"]) == 0.0


@pytest.mark.parametrize("to", ["vllm", "merged"])
def test_what_lies_beside_the_weights(trained: tuple[Path, Any], tmp_path: Path, to: Any) -> None:
    source = Adapter.load(trained[0] / "adapters" / "llama-tied")
    done = export(source.path, tmp_path / "out", to=to)
    beside = {"identifiers.parquet", "items.parquet", "frames.json"}
    beside |= {f"prompts/{name}.jinja" for name in ("next_item", "title_to_item", "item_to_title")}
    model = {"config.json", "generation_config.json", "model.safetensors"}
    model |= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "export.json"}
    if to == "merged":
        assert set(tree(done.model)) == model | beside
    else:
        assert done.lora is not None
        assert set(tree(done.model)) == model
        lora = {"adapter_config.json", "adapter_model.safetensors", "export.json"}
        assert set(tree(done.lora)) == lora | beside
    side = tree(done.lora or done.model)
    assert {name: side[name] for name in beside} == {name: tree(source.path)[name] for name in beside}
    told = json.loads(((done.lora or done.model) / "export.json").read_text())
    assert told == done.table
    assert told["adapter"] == {"name": "llama-tied", "hash": source.hash, "tuning": "lora"}
    assert told["base"]["hash"] == source.base.hash
    assert told["identifiers"] == source.identifiers.hash
    assert told["dtype"] == "float32"
    for text in (path.read_text() for path in (tmp_path / "out").rglob("*.json")):
        assert str(trained[0]) not in text  # Nothing says where it was made.


def test_a_dtype_that_is_asked_for(trained: tuple[Path, Any], tmp_path: Path) -> None:
    path = trained[0] / "adapters" / "llama-tied"
    merged = load_file(export(path, tmp_path / "merged", to="merged", dtype="bfloat16").model / "model.safetensors")
    assert {value.dtype for value in merged.values()} == {torch.bfloat16}
    served = export(path, tmp_path / "served", to="vllm", dtype="bfloat16")
    base = load_file(served.model / "model.safetensors")
    assert {value.dtype for value in base.values()} == {torch.bfloat16}
    assert served.lora is not None
    name = "adapter_model.safetensors"  # LoRA matrices stay as trained; who loads them rounds them as it likes.
    assert files.file_hash(served.lora / name) == files.file_hash(path / name)
    assert served.table["dtype"] == "bfloat16"
    assert served.model.name != export(path, tmp_path / "served", to="vllm", name="exact").model.name


def test_peft_finds_the_base_from_the_adapters_own_folder(
    trained: tuple[Path, dict[str, torch.Tensor]], good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(good / "adapter")
    model = AutoPeftModelForCausalLM.from_pretrained(".")
    expected = trained[1]["llama-tied"]
    assert difference(logits(model, asked(expected.shape[-1])), expected) == 0.0


# Sharing, replacing, failing


def test_adapters_with_the_same_rows_share_one_base(trained: tuple[Path, Any], tmp_path: Path) -> None:
    root = tmp_path / "workspace"
    shutil.copytree(trained[0], root)
    one, other = root / "adapters" / "llama-tied", root / "adapters" / "other"
    shutil.copytree(one, other)
    weights = other / "adapter_model.safetensors"
    save_file({key: 2 * value for key, value in load_file(weights).items()}, weights)
    told = json.loads((other / "genrec.json").read_text())
    told["files"]["adapter_model.safetensors"] = files.file_hash(weights)
    (other / "genrec.json").write_text(json.dumps(told))

    first = export(one, tmp_path / "served", to="vllm")
    before = {path: path.stat().st_mtime_ns for path in first.model.iterdir()}
    second = export(other, tmp_path / "served", to="vllm", name="other")
    assert (first.reused, second.reused) == (False, True)
    assert second.model == first.model
    assert {path: path.stat().st_mtime_ns for path in first.model.iterdir()} == before
    assert sorted(path.name for path in (tmp_path / "served").iterdir()) == ["adapter", first.model.name, "other"]
    # Other rows, another base.
    third = export(root / "adapters" / "lora", tmp_path / "served", to="vllm", name="third")
    assert third.model != first.model
    assert not third.reused


def test_a_base_that_was_changed_is_not_used_again(trained: tuple[Path, Any], tmp_path: Path) -> None:
    path = trained[0] / "adapters" / "llama-tied"
    done = export(path, tmp_path, to="vllm")
    whole = tree(done.model)
    for change in (
        lambda: (done.model / "config.json").write_text("{}"),
        lambda: (done.model / "export.json").unlink(),
    ):
        change()
        with pytest.raises(AdapterError, match=f"{done.model.name} is not the extended base .*Remove the folder"):
            export(path, tmp_path, to="vllm", name="again")
        assert not (tmp_path / "again").exists()
        assert not export(path, tmp_path, to="vllm", overwrite=True).reused
        assert tree(done.model) == whole


@pytest.mark.parametrize("to", ["vllm", "merged"])
def test_nothing_is_replaced_unless_asked(trained: tuple[Path, Any], tmp_path: Path, to: Any) -> None:
    path, out = trained[0] / "adapters" / "llama-tied", tmp_path / "out"
    export(path, out, to=to)
    before = tree(out)
    with pytest.raises(StorageError, match="--overwrite"):
        export(path, out, to=to)
    assert tree(out) == before
    export(path, out, to=to, overwrite=True)
    assert tree(out) == before


@pytest.mark.parametrize("to", ["vllm", "merged"])
def test_a_failure_leaves_nothing(
    trained: tuple[Path, Any], tmp_path: Path, to: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full_disk)
    with pytest.raises(StorageError, match="No space left"):
        export(trained[0] / "adapters" / "llama-tied", tmp_path / "out", to=to)
    assert tree(tmp_path) == {}


def test_wrong_arguments(trained: tuple[Path, Any], tmp_path: Path) -> None:
    path = trained[0] / "adapters" / "llama-tied"
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"to": "vlm"}, "Did you mean 'vllm'"),
        ({"to": "vllm", "dtype": "int4"}, "dtype is 'int4'"),
        ({"to": "vllm", "name": "../up"}, "name is '../up'"),
        ({"to": "vllm", "name": "base-x"}, "name is 'base-x'"),
    ]
    for options, message in wrong:
        with pytest.raises(ConfigError, match=message):
            export(path, tmp_path / "out", **options)
    with pytest.raises(AdapterError, match="no adapter here"):
        export(tmp_path, tmp_path / "out", to="vllm")
    assert tree(tmp_path) == {}


# Measured again


@pytest.mark.parametrize("to", ["vllm", "merged"])
def test_the_metric_of_what_was_written(trained: tuple[Path, Any], tmp_path: Path, to: Any) -> None:
    source = Adapter.load(trained[0] / "adapters" / "lora")
    figures = export(source.path, tmp_path / "out", to=to, measured=True).table["ndcg@10"]
    assert figures["trained"] == source.manifest["kept"]["ndcg@10"] > 0
    assert figures["exported"] == pytest.approx(figures["trained"], abs=1e-6)
    assert figures["change"] == figures["exported"] - figures["trained"]


def test_a_change_of_the_weights_shows_in_the_metric(trained: tuple[Path, Any]) -> None:
    source = Adapter.load(trained[0] / "adapters" / "lora")
    tokenization = source.tokenization()
    model = source.model(tokenization)
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    validation = exports.validation_set(source, tokenization)
    figures = exports.measure(source, validation, LocalEngine(model))
    assert figures["change"] < -0.05


def test_only_a_quantised_training_is_measured_unless_asked(
    trained: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = trained[0] / "adapters" / "lora"
    assert export(path, tmp_path / "lora", to="merged").table["ndcg@10"] is None
    monkeypatch.setattr(Adapter, "tuning", "qlora")
    assert export(path, tmp_path / "qlora", to="vllm").table["ndcg@10"]["change"] == pytest.approx(0, abs=1e-6)
    assert export(path, tmp_path / "silent", to="vllm", measured=False).table["ndcg@10"] is None


def test_the_data_set_for_measuring(trained: tuple[Path, Any], tmp_path: Path) -> None:
    root = tmp_path / "elsewhere"
    shutil.copytree(trained[0] / "adapters", root / "adapters")
    path, out = root / "adapters" / "lora", tmp_path / "out"
    with pytest.raises(DataError, match=r"is not here.*--data FOLDER, or --no-measure"):
        export(path, out, to="merged", measured=True)
    data = Dataset.load(trained[0] / "data" / "tiny")
    Dataset.from_frames(data.interactions.head(100), data.items, data.users, name="less").save(tmp_path / "less")
    with pytest.raises(DataError, match=r"is not the data set .*--data FOLDER, or --no-measure"):
        export(path, out, to="merged", measured=True, data=tmp_path / "less")
    assert not out.exists()
    assert export(path, out, to="merged", measured=True, data=trained[0] / "data" / "tiny").table["ndcg@10"]


# The check for vLLM


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        found = load_file(path)
        change(found)
        save_file(found, path)

    return apply


def config(**values: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return apply


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


Q = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
EMBEDDING = "base_model.model.model.embed_tokens"
BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another method": (config(peft_type="LOHA"), "peft_type is 'LOHA'.*merge"),
    "rank too high": (config(r=1024), "r is 1024; vLLM takes ranks of 1 to 512.*lower"),
    "no rank": (config(r=None), "r is None"),
    "no alpha": (config(lora_alpha=None), "lora_alpha is None"),
    "DoRA": (config(use_dora=True), "use_dora is True: vLLM has no DoRA.*--to merged"),
    "DoRA tensor": (tensors(lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(16)})), "magnitude.* is DoRA"),
    "bias": (config(bias="lora_only"), "bias is 'lora_only'.*--to merged"),
    "lora_bias": (config(lora_bias=True), "lora_bias is True"),
    "bias tensor": (tensors(lambda t: t.update({f"{Q}.lora_B.bias": torch.ones(16)})), "lora_B.bias is a bias"),
    "whole modules": (config(modules_to_save=["lm_head"]), r"modules_to_save is \['lm_head'\].*--to merged"),
    "whole module's tensor": (
        tensors(lambda t: t.update({"base_model.model.lm_head.modules_to_save.weight": torch.ones(2, 2)})),
        "lm_head.modules_to_save.weight is a whole module",
    ),
    "token rows": (config(trainable_token_indices={"embed_tokens": [3]}), "trainable_token_indices.*--to vllm"),
    "token rows' tensor": (
        tensors(lambda t: t.update({f"{EMBEDDING}.token_adapter.trainable_tokens_delta": torch.ones(2, 16)})),
        "trainable_tokens_delta is rows of the vocabulary",
    ),
    "embedding": (tensors(lambda t: t.update({f"{EMBEDDING}.lora_embedding_A": torch.ones(4, 9)})), "on an embedding"),
    "head": (
        tensors(lambda t: t.update({f"base_model.model.lm_head.lora_{x}.weight": torch.ones(4, 4) for x in "AB"})),
        "lm_head.lora_A.weight is LoRA on the vocabulary",
    ),
    "base's embedding": (
        tensors(lambda t: t.update({f"{EMBEDDING}.base_layer.weight": torch.ones(9, 16)})),
        "base_layer.weight is a weight of the base, which vLLM passes over in silence",
    ),
    "ranks": (config(rank_pattern={"q_proj": 2}), "rank_pattern is .*the one r"),
    "alphas": (config(alpha_pattern={"q_proj": 2}), "alpha_pattern is .*the one lora_alpha"),
    "PiSSA": (config(init_lora_weights="pissa_niter_4"), "init_lora_weights is 'pissa_niter_4'.*unchanged base"),
    "OLoRA": (config(init_lora_weights="olora"), "init_lora_weights is 'olora'"),
    "LoftQ": (config(init_lora_weights="loftq", loftq_config={"loftq_bits": 4}), "loftq_config is .*changes the base"),
    "CorDA": (config(init_lora_weights="corda"), "init_lora_weights is 'corda'"),
    "EVA": (config(init_lora_weights="eva"), "init_lora_weights is 'eva'"),
    "Conv1D": (config(fan_in_fan_out=True), "fan_in_fan_out is True.*transposed"),
    "parameters": (config(target_parameters=["experts"]), "target_parameters is .*linear layers alone"),
    "repeated layers": (config(layer_replication=[[0, 2], [1, 2]]), "layer_replication is"),
    "a key of tomorrow": (config(use_marvel=True), "use_marvel is True: vLLM does not read it.*--to merged"),
    "a stranger": (tensors(lambda t: t.update({"weight": torch.ones(2)})), "weight is neither .*lora_A.*PEFT"),
    "half a pair": (tensors(lambda t: t.pop(B)), f"{A} stands without {B}"),
    "the other half": (tensors(lambda t: t.pop(A)), f"{B} stands without {A}"),
    "shape of A": (tensors(lambda t: t.update({A: t[A][:2].clone()})), rf"{A} has the shape \[2, 16\]; with r = 4"),
    "shape of B": (tensors(lambda t: t.update({B: t[B].T.contiguous()})), rf"{B} has the shape \[4, 16\].*\[out, r\]"),
    "not a number": (tensors(lambda t: t[A].fill_(float("nan"))), f"{A} holds values that are not finite.*rate"),
    "infinite": (tensors(lambda t: t[B][0].fill_(float("inf"))), f"{B} holds values that are not finite"),
    "empty": (tensors(lambda t: t.clear()), "holds no LoRA matrices"),
    "a pickle": (pickled, "adapter_model.safetensors is missing; adapter_model.bin is a pickle.*safetensors"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing. Save"),
    "torn weights": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"1"), "cannot be read.*again"),
    "no configuration": (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json cannot be read.*PEFT"),
    "torn configuration": (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json is not valid"),
    "rows beside it": (
        lambda f: save_file({"input": torch.ones(2, 2)}, f / "rows.safetensors"),
        "rows.safetensors holds identifier rows.*--to vllm",
    ),
    "another base": (
        tensors(lambda t: t.update({A: torch.ones(4, 8)})),
        rf"{A} has the shape \[4, 8\], and the layer in .* \[16, 16\]: another base",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_adapter_is_refused_with_its_reason(good: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(good, tmp_path / "served")
    folder = tmp_path / "served" / "adapter"
    change, message = BAD[name]
    change(folder)
    problems = check_vllm(folder)
    assert len(problems) in (1, 2)
    assert any(re.search(message, problem) for problem in problems), problems
    assert all(str(folder) in problem for problem in problems)


def test_a_base_without_the_identifiers_is_refused(trained: tuple[Path, Any], good: Path, tmp_path: Path) -> None:
    root = trained[0] / "adapters"
    (problem,) = check_vllm(good / "adapter", root / "random")  # Another tokenizer, without identifiers.
    assert "lacks 24 of the adapter's 24 identifier tokens" in problem
    assert "--to vllm" in problem
    shutil.copytree(root / "random", tmp_path / "short")
    for path in (root / "llama-tied" / "tokenizer").iterdir():  # The tokenizer knows them, the model does not.
        shutil.copy(path, tmp_path / "short")
    (problem,) = check_vllm(good / "adapter", tmp_path / "short")
    assert "its vocabulary has" in problem
    (problem,) = check_vllm(good / "adapter", tmp_path)
    assert "cannot be read as a base" in problem


LAST_LAYER = {"layers_to_transform": [1], "target_modules": ["qkv_proj", "o_proj"]}


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, LAST_LAYER, {"r": 512}, {"r": 3}])
def test_what_peft_writes_by_itself_is_good(trained: tuple[Path, Any], tmp_path: Path, options: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(trained[0] / "adapters" / "phi3")
    settings = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    get_peft_model(model, LoraConfig(**settings)).save_pretrained(tmp_path)
    assert check_vllm(tmp_path) == []
    assert check_vllm(tmp_path, trained[0] / "adapters" / "phi3") == []


@pytest.mark.parametrize(("name", "message"), [("pattern", "rank_pattern"), ("dora", "use_dora is True")])
def test_export_refuses_before_it_writes(trained: tuple[Path, Any], tmp_path: Path, name: str, message: str) -> None:
    path = trained[0] / "adapters" / name
    with pytest.raises(AdapterError, match=message) as refused:
        export(path, tmp_path / "served", to="vllm")
    assert "--to merged" in str(refused.value)
    assert tree(tmp_path) == {}
    assert any(message in problem for problem in check_vllm(path))


def test_ranks_that_vllm_takes() -> None:
    assert [max_lora_rank(rank) for rank in (1, 2, 8, 9, 16, 33, 257, 321, 512)] == [1, 8, 8, 16, 16, 64, 320, 512, 512]


# Trained in 4 bits


@pytest.mark.parametrize("to", ["vllm", "merged"])
def test_an_adapter_trained_in_4_bits_is_measured_on_the_plain_base(
    qlora: Path, tmp_path: Path, to: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Adapter.load(qlora)
    assert run("export", str(qlora), str(tmp_path / "out"), "--to", to, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    figures = told["ndcg@10"]
    assert told["adapter"]["tuning"] == "qlora"
    assert figures["trained"] == source.manifest["kept"]["ndcg@10"]
    tokenization = source.tokenization()
    plain = LocalEngine(source.model(tokenization, quantised=False))
    validation = exports.validation_set(source, tokenization)
    assert figures["exported"] == pytest.approx(validation.evaluate(plain)["ndcg@10"], abs=1e-6)
    model = AutoModelForCausalLM.from_pretrained(told["model"])
    assert not hasattr(model.config, "quantization_config")
    if told["lora"]:
        assert check_vllm(told["lora"]) == []
        model = PeftModel.from_pretrained(model, told["lora"]).get_base_model()
    ids = asked(len(tokenization.tokenizer))
    assert difference(logits(model, ids), logits(plain.model, ids)) < 1e-5


@pytest.fixture(scope="module")
def qlora(trained: tuple[Path, Any]) -> Path:
    pytest.importorskip("bitsandbytes")
    return training.train(trained[0] / "adapters" / "lora.toml", name="qlora", assignments=[*SHORT, "tuning=qlora"])


# The command, and the guide


def run(*arguments: str) -> int:
    """What the console script does; its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["genrec", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
    return int(stopped.value.code or 0)


def test_the_command_checks(good: Path, trained: tuple[Path, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("export", str(good / "adapter"), "--check") == 0
    assert capsys.readouterr().out == f"{good / 'adapter'}: good\n"
    bad = trained[0] / "adapters" / "dora"
    assert run("export", str(bad), "--check") == 7
    printed = capsys.readouterr().out.splitlines()
    assert printed == check_vllm(bad)
    assert run("export", str(bad), "--check", "--json") == 7
    assert json.loads(capsys.readouterr().out) == {"adapter": str(bad), "problems": printed}
    assert run("export", str(good / "adapter")) == 3
    assert "--to vllm|merged" in capsys.readouterr().err


def test_the_command_prints_what_it_measured(
    trained: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = trained[0] / "adapters" / "lora", tmp_path / "out"
    assert run("export", str(path), str(out), "--to", "merged", "--measure") == 0
    kept = f"{Adapter.load(path).manifest['kept']['ndcg@10']:.4f}"
    assert capsys.readouterr().out == (f"{out}\nvalidation NDCG@10: trained {kept}, exported {kept}, change +0.0000\n")


def test_the_guide(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command of genrec and the Python, from top to bottom; what would start vLLM is what was printed."""
    shutil.copytree(workspace, tmp_path / "workspace")
    monkeypatch.chdir(tmp_path / "workspace")
    shutil.copytree("adapters/lora", "adapters/shop")
    guide = (Path(__file__).parent.parent / "docs" / "export.md").read_text(encoding="utf-8")
    printed = ""
    for language, text in re.findall(r"^```(\w+)\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL):
        if language == "bash":
            for line in text.splitlines():
                assert run(*shlex.split(line)[1:]) == 0, line
                printed += capsys.readouterr().out
        elif language == "python":
            exec(compile(text, "<guide>", "exec"), {})
            found = capsys.readouterr().out.strip()
            shop = Recommender.load("adapters/shop")
            expected = [one.item_id for one in shop.recommend([shop.item_ids[:3]], 5)[0]]
            assert found == str(expected)
        else:
            assert language == "console"
            (base,) = Path("served").glob("base-*")
            line = text.strip().replace("base-HASH", base.name).replace("--max-lora-rank 16", "--max-lora-rank 8")
            assert line in printed or line.startswith("validation NDCG@10: trained ")
    assert Path("exports/shop/model.safetensors").is_file()
    assert sorted(path.name[:5] for path in Path("served").iterdir()) == ["adapt", "base-", "eveni"]
