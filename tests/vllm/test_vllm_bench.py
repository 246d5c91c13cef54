from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from genrec.benchmarks import vllm as benchmark
from genrec.cli import app


def test_the_benchmark_compares_all_sides_in_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "_REST", 0.0)
    options = ["--quick", "--users", "4", "--beams", "20", "--repeats", "1", "--json", "--out", str(tmp_path)]
    command = ["bench", "decode", "--engine", "vllm", "--model", "random-small", "vllm.max_model_len=64", *options]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0
    report = json.loads(done.stdout)
    assert json.loads((tmp_path / "decode-vllm.json").read_text()) == report
    rows = report["rows"]
    assert {row["part"] for row in rows} == {"atomic", "semantic"}
    # Times mean nothing here; what both engines answer does.
    same = [row for row in rows if row["what"].startswith("vllm and local")]
    assert len(same) == 4
    assert all(row["met"] for row in same)
    assert not any("refused" in row["what"] for row in rows)
    # Under the grammar vLLM writes real items, 20 of 60 for each user: some are those of a search that is exact by the
    # model's own scores, whatever the prompts. Without it next to nothing that it writes is an item.
    found = {row["what"]: row["value"] for row in rows if row["part"] == "semantic" and row["unit"] == "%"}
    assert found["LLM.beam_search with a grammar: of local's items"] > found["LLM.beam_search: of local's items"]
    rates = {row["what"] for row in rows if row["unit"] == "users/s"}
    assert rates == {"vllm", "local", "LLM.beam_search", "LLM.beam_search with a grammar"}
    assert report["conditions"]["versions"]["vllm"].startswith("0.")
