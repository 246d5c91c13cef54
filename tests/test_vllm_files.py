"""What the engine vllm loads, as it lies on the disk; test_export.py tests the check of LoRAs and the exports."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from genrec.errors import AdapterError, StorageError
from genrec.export import _load
from genrec.recommender import Recommender
from genrec.vllm_files import write_for_engine


def written(rec: Recommender, folder: Path, dtype: str = "float32") -> tuple[Path, Path | None]:
    return write_for_engine(rec.adapter, rec.tokenization, folder, dtype=dtype)


@pytest.mark.parametrize("name", ["lora", "pretrained"])
def test_what_is_written_scores_as_the_adapter_does_and_is_found_again(
    workspace: Path, tmp_path: Path, name: str
) -> None:
    rec = Recommender.load(workspace / "adapters" / name)
    model, lora = written(rec, tmp_path)
    assert (lora is None) is (name == "pretrained")
    prompts, answers = [np.array([5, 6, 7])] * 24, [rec.tokenization.identifier(item) for item in range(24)]
    found, expected = _load(model, lora).score(prompts, answers), rec.engine.score(prompts, answers)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert written(rec, tmp_path) == (model, lora)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == stamps


def test_adapters_with_the_same_rows_share_their_base(inside: Path, tmp_path: Path) -> None:
    shutil.copytree(inside / "adapters" / "lora", inside / "adapters" / "again")
    one, two = (Recommender.load(inside / "adapters" / name, engine="dummy") for name in ("lora", "again"))
    first, second = written(one, tmp_path / "out"), written(two, tmp_path / "out")
    assert first[0] == second[0]
    half, _ = written(one, tmp_path / "out", "bfloat16")
    assert half != first[0]


def test_folders_beside_the_weights_are_checked_too(inside: Path, tmp_path: Path) -> None:
    rec = Recommender.load(inside / "adapters" / "lora", engine="dummy")
    rec.tokenization.tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    model, _ = written(rec, tmp_path)
    extra = next(model.glob("*/*.jinja"))
    assert written(rec, tmp_path)[0] == model
    extra.write_text("changed")
    with pytest.raises(AdapterError, match=r"tools\.jinja was changed.* Remove the folder; it is written anew"):
        written(rec, tmp_path)


def test_changed_file_is_refused(workspace: Path, tmp_path: Path) -> None:
    rec = Recommender.load(workspace / "adapters" / "lora", engine="dummy")
    model, _ = written(rec, tmp_path)
    weights = model / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(AdapterError, match=model.name):
        written(rec, tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="a file in the place of a folder, as POSIX tells it")
def test_folder_that_cannot_be_made_is_one_message(workspace: Path, tmp_path: Path) -> None:
    (tmp_path / "exports").write_text("")
    rec = Recommender.load(workspace / "adapters" / "lora", engine="dummy")
    with pytest.raises(StorageError, match=r"cannot make the folder .*exports/vllm: Not a directory"):
        written(rec, tmp_path / "exports" / "vllm")
