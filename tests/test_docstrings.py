"""Examples in docstrings run, and the page that is made of docstrings is up to date."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest

import genrec
from genrec import progress

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "api.md"


def modules_with_examples() -> list[str]:
    files = (path for path in (ROOT / "genrec").rglob("*.py") if ">>> " in path.read_text("utf-8"))
    return sorted(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files)


@pytest.fixture(scope="module")
def shop(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workspace that examples stand in: an adapter ``adapters/shop`` that knows the items i0 to i23."""
    root = tmp_path_factory.mktemp("examples") / "workspace"
    shutil.copytree(workspace, root, ignore=shutil.ignore_patterns("runs"))
    (root / "adapters" / "lora").rename(root / "adapters" / "shop")
    return root


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_run(name: str, shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shop)
    monkeypatch.setattr(progress, "quiet", True)
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted
    assert not found.failed


def test_classes_of_the_api_have_examples() -> None:
    for one in (genrec.Dataset, genrec.Prompt, genrec.Recommender):
        assert ">>> " in (one.__doc__ or ""), one


def test_page_is_up_to_date() -> None:
    made = runpy.run_path(str(ROOT / "scripts" / "api_reference.py"))["page"]()
    assert PAGE.read_text("utf-8") == made, "run `make docs`"


def test_page_holds_the_whole_api() -> None:
    headings = set(re.findall(r"^#+ `(.*)`$", PAGE.read_text("utf-8"), re.MULTILINE))
    for name in set(genrec.__all__) - {"__version__"}:
        one: Any = getattr(genrec, name)
        assert name in headings
        methods = inspect.getmembers(one, inspect.isroutine) if inspect.isclass(one) else []
        for method, _ in methods:
            if not method.startswith("_") and method in vars(one):
                assert f"{name}.{method}" in headings, f"{name}.{method} has no docstring"
