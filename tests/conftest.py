"""What holds for every test: no network, no model hub, one thread a process."""

from __future__ import annotations

import os

# Before anything imports torch or tokenizers; child processes inherit it.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"

import ipaddress
import json
import shutil
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import settings

import genrec
from genrec import cli, progress

# No test measures time: a busy machine makes any example slow.
settings.register_profile("genrec", deadline=None)
settings.load_profile("genrec")


def _check_local(host: str | bytes | None) -> None:
    name = host.decode() if isinstance(host, bytes) else host
    if name is None or name == "localhost":
        return
    try:
        local = ipaddress.ip_address(name).is_loopback
    except ValueError:
        local = False
    if not local:
        pytest.fail(f"A test tried to reach {name}. Tests run without a network.", pytrace=False)


@pytest.fixture(autouse=True)
def forbid_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a test that looks up or connects to another machine; the failure is no OSError that code could catch."""
    connect, getaddrinfo = socket.socket.connect, socket.getaddrinfo

    def guarded_connect(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple):  # A plain string is a socket file on this machine.
            _check_local(address[0])
        connect(self, address)

    def guarded_getaddrinfo(host: Any, *arguments: Any, **options: Any) -> Any:
        _check_local(host)
        return getaddrinfo(host, *arguments, **options)

    monkeypatch.setattr(socket.socket, "connect", guarded_connect)
    monkeypatch.setattr(socket, "getaddrinfo", guarded_getaddrinfo)


def tiny_data(users: int = 40, items: int = 24, seed: int = 0) -> genrec.Dataset:
    """A log in which the next item is often the next number, with titles that say so; ages of the users."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(users):
        item = int(rng.integers(items))
        for time in range(int(rng.integers(4, 12))):
            rows.append((f"u{user}", f"i{item}", 1_000_000 + 60 * time))
            item = (item + 1) % items if rng.random() < 0.8 else int(rng.integers(items))
    log = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row").unique(maintain_order=True)
    catalogue = pl.DataFrame(
        {
            "item_id": [f"i{item}" for item in range(items)],
            "title": [f"Film {item} of series {item // 4}" for item in range(items)],
            "brand": [f"studio {item // 8}" for item in range(items)],
        }
    )
    people = pl.DataFrame({"user_id": [f"u{user}" for user in range(users)], "age": rng.integers(18, 80, users)})
    return genrec.Dataset.from_frames(log, catalogue, people, name="tiny")


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a tiny data set, a random base, a pretrained base and a LoRA adapter on it. Never change it."""
    from genrec import base, quickstart, training

    root = tmp_path_factory.mktemp("workspace")
    quickstart.init(root)
    for shipped in root.glob("adapters/*.toml"):
        shipped.unlink()
    data = tiny_data()
    data.save(root / "data" / "tiny")
    base.create(data.items["title"].to_list(), root / "adapters" / "random", vocabulary=300, width=16, context=128)
    common = 'data = "data/tiny"\nmax_length = 64\nfeatures = 8\n[[tasks]]\nprompt = "prompts/next_item.jinja"\n'
    (root / "adapters" / "pretrained.toml").write_text(
        'base = "adapters/random"\ntuning = "full"\n' + common
        + "[walks]\nalone = 0.25\nshare = 0.5\n[training]\nnum_train_epochs = 4\nlearning_rate = 1e-2\n"
    )  # fmt: skip
    (root / "adapters" / "lora.toml").write_text(
        'base = "adapters/pretrained"\n' + common
        + '[[tasks]]\nprompt = "prompts/title_to_item.jinja"\nweight = 0.5\n'
        + '[[tasks]]\nprompt = "prompts/item_to_title.jinja"\nweight = 0.5\n'
        + "[lora]\nr = 4\n[training]\nnum_train_epochs = 1\nlearning_rate = 1e-2\n"
    )  # fmt: skip
    (root / "eval" / "tiny.toml").write_text(
        'data = "data/tiny"\nk = [5, 10]\nnum_beams = 24\n'
        '[adapters]\nbase = "adapters/pretrained"\nlora = "adapters/lora"\n'
    )
    for name in ("pretrained", "lora"):
        training.train(root / "adapters" / f"{name}.toml")
    return root


def semantic_adapter(workspace: Path, root: Path, prompt: str, *, codes: int, max_length: int) -> Path:
    """The folder of an adapter with semantic IDs of two levels and a prompt of its own, in a copy of the workspace."""
    from genrec import training

    shutil.copytree(workspace, root)
    (root / "prompts" / "aged.jinja").write_text(prompt)
    (root / "adapters" / "aged.toml").write_text(
        f'base = "adapters/random"\ndata = "data/tiny"\ntuning = "full"\nmax_length = {max_length}\nfeatures = 8\n'
        f'[[tasks]]\nprompt = "prompts/aged.jinja"\n[identifiers]\nscheme = "semantic"\nlevels = 2\ncodes = {codes}\n'
        "[training]\nnum_train_epochs = 1\nlearning_rate = 1e-2\n"
    )
    return training.train(root / "adapters" / "aged.toml")


# The command line


@dataclass(frozen=True)
class Done:
    """What a command left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Done]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the console script in this process: ``run("train", path)``."""

    def call(*arguments: object) -> Done:
        monkeypatch.setattr(progress, "quiet", False)
        monkeypatch.setattr(sys, "argv", ["genrec", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        output = capsys.readouterr()
        return Done(int(stopped.value.code or 0), output.out, output.err)

    return call


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The engine "vllm" played by the local one, on the files that vLLM would load; each that is made, in order."""
    from genrec.export import _load

    made: list[Any] = []

    class VllmEngine:
        def __init__(self, model: Path, lora: Path | None = None, *, dtype: str, options: Any) -> None:
            assert all(engine.closed for engine in made)
            self.model_folder, self.dtype, self.options, self.closed = model, dtype, options, False
            local = _load(model, lora)
            self.beam_search, self.score = local.beam_search, local.score
            made.append(self)

        def close(self) -> None:
            self.closed = True

    monkeypatch.setattr("genrec.engines.pooled.VllmEngine", VllmEngine)
    monkeypatch.setattr("genrec.engines.vllm.version", lambda: "0.32.0")
    return made


@pytest.fixture
def inside(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the workspace, as the current folder."""
    shutil.copytree(workspace, tmp_path / "workspace")
    monkeypatch.chdir(tmp_path / "workspace")
    return tmp_path / "workspace"


def rows(table: str) -> list[list[str]]:
    """The cells of a printed table without its header."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in table.splitlines() if line.startswith("│")]
