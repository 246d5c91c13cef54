from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from conftest import Run, rows

import genrec
from genrec.adapter import Adapter
from genrec.batch import output


def test_batch(run: Run, inside: Path) -> None:
    command = ("batch", "adapters/lora", "--users", "data/tiny", "--out", "out", "-k", 4, "--shard-size", 30)
    first = run(*command, "--engine", "dummy")
    assert (first.code, first.err) == (0, "")
    assert first.out == "160 rows for 40 users in 2 shards (0 were there)\nout/*.parquet\n"
    assert pl.read_parquet("out/*.parquet").height == 160
    again = run(*command, "--engine", "dummy", "--json")
    assert again.json == {
        "out": "out",
        "users": 40,
        "rows": 160,
        "shards": 2,
        "shards_reused": 2,
        "users_with_fewer": 0,
        "bad_rows": 0,
        "carried": 0,
        "unknown_items": 0,
        "retired_items": 0,
        "digest": output.digest(Path("out")),
        "churn": None,
        "problems": [],
    }


def test_batch_says_when_users_got_fewer(run: Run, inside: Path) -> None:
    done = run("batch", "adapters/lora", "--users", "data/tiny", "--out", "out", "-k", 24, "--engine", "dummy")
    assert "40 users got fewer than 24 items" in done.out


def test_job_file_flags_and_keys(run: Run, inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (inside / "jobs").mkdir()
    (inside / "jobs" / "nightly.toml").write_text(
        'adapter = "adapters/lora"\nusers = "data/tiny"\nout = "out"\nk = 4\nengine = "dummy"\nshard_size = 30\n'
    )
    monkeypatch.chdir(inside / "eval")  # Paths in the file are those of its workspace.
    done = run("batch", "--job", "../jobs/nightly.toml")
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines() == ["160 rows for 40 users in 2 shards (0 were there)", "../out/*.parquet"]
    other = run("batch", "--job", "../jobs/nightly.toml", "-k", 2, "--out", "here", "shard_size=20", "titles=false")
    assert other.out.splitlines() == ["80 rows for 40 users in 2 shards (0 were there)", "here/*.parquet"]
    assert pl.read_parquet("here/*.parquet").columns == ["user_id", "rank", "item_id", "score", "source"]
    assert "unknown key 'shards'" in run("batch", "--job", "../jobs/nightly.toml", "shards=3").err
    missing = run("batch", "../adapters/lora", "--out", "there")
    assert (missing.code, missing.err) == (3, "error: job: the key 'users' is missing.\n")


def test_batch_tells_what_was_bad_carried_and_retired(run: Run, inside: Path) -> None:
    rows = [{"user_id": f"u{row}", "history": ["i1"] if row else ["nix"]} for row in range(4)]
    pl.DataFrame(rows).write_parquet("users.parquet")
    pl.DataFrame({"item_id": ["new", *(f"i{item}" for item in range(1, 24))]}).write_parquet("items.parquet")
    command = ("batch", "adapters/lora", "--users", "users.parquet", "--items", "items.parquet", "--engine", "dummy")
    options = ("-k", 3, "max_bad_share=0.5")
    assert run(*command, "--out", "1", *options).code == 0
    done = run(*command, "--out", "2", "--previous", "1", *options)
    assert done.out.splitlines() == [
        "9 rows for 3 users in 1 shard (0 were there)",
        "3 users were carried over from 1, 0 computed",
        "items.parquet: 1 items of the adapter are not in it and retired; 1 of its items are unknown to the adapter",
        "1 bad rows: 2/errors/*.parquet",
        "2/*.parquet",
    ]
    stopped = run(*command, "--out", "3", "-k", 3)
    assert stopped.code == 4
    assert "1 of 4 rows of users.parquet are bad" in stopped.err
    assert "Row 0 (from 0) column history: 'nix'" in stopped.err


def test_gate_prints_the_comparison_and_exits_with_its_code(run: Run, inside: Path) -> None:
    command = ("batch", "adapters/lora", "--users", "data/tiny", "--engine", "dummy", "-k", 3)
    run(*command, "--out", "1")
    same = run(*command, "--out", "2", "--compare", "1", "thresholds.max_churn=0.1")
    assert (same.code, same.err) == (0, "")
    assert rows(same.out[same.out.index("beside 1") :])[3][:2] == ["churn", "0"]
    other = run(*command, "--out", "3", "--where", "brand <> 'studio 1'", "--compare", "1", "thresholds.max_churn=0.1")
    assert (other.code, other.err.splitlines()[0]) == (10, "error: 3 is whole, and not to be published as it is:")
    assert "- churn is" in other.err
    assert "beside 1" in other.out
    as_json = run(
        *command, "--out", "3", "--where", "brand <> 'studio 1'", "--compare", "1", "thresholds.max_churn=0.1", "--json"
    )
    assert as_json.code == 10
    assert as_json.json["churn"]["users_both"] == 40
    assert len(as_json.json["problems"]) == 1


def test_dry_run_of_a_job(run: Run, inside: Path) -> None:
    command = (
        "batch",
        "adapters/lora",
        "--users",
        "data/tiny",
        "--out",
        "out",
        "--engine",
        "dummy",
        "price_per_hour=2",
    )
    done = run(*command, "--dry-run")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("genrec batch, 40 of 40 rows timed")
    found = run(*command, "--dry-run", "--json").json
    assert (found["rows"], found["sample"], found["bad_rows"]) == (40, 40, 0)
    assert found["cost_per_million"] == pytest.approx(2 * found["hours_per_million"])
    assert not Path("out").exists()


def test_verify_and_publish(run: Run, inside: Path) -> None:
    for number in (1, 2):
        run(
            "batch",
            "adapters/lora",
            "--users",
            "data/tiny",
            "--out",
            f"recs/{number}",
            "--engine",
            "dummy",
            "-k",
            number,
        )
    found = run("verify", "recs/1", "--json").json
    assert (found["users"], found["rows"], found["digest"]) == (40, 40, output.digest(Path("recs/1")))
    assert run("verify", "recs/1").out.startswith("recs/1: whole")
    assert run("publish", "recs/1", "--link", "recs/current").out == "recs/current -> 1\n"
    assert run("publish", "recs/2", "--link", "recs/current").out == "recs/current -> 2\n"
    assert run("publish", "--back", "--link", "recs/current").out == "recs/current -> 1\n"
    for arguments in (("recs/1", "--back"), ()):
        assert run("publish", *arguments, "--link", "recs/current").code == 3
    part = Path("recs/2/part-00000.parquet")
    part.write_bytes(part.read_bytes()[:-1])
    assert run("verify", "recs/2").code == 9
    assert run("publish", "recs/2", "--link", "recs/current").code == 9
    assert Path("recs/current").readlink() == Path("1")


def test_eval(run: Run, inside: Path) -> None:
    done = run("--quiet", "eval", "eval/tiny.toml", "users=12")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("tiny: leave_one_out, 12 cases")
    assert done.out.rstrip().endswith("eval/results/tiny.md")
    table = json.loads((inside / "eval" / "results" / "tiny.json").read_text())
    found = rows(done.out)
    assert [row[0] for row in found] == ["popularity", "item_knn", "transitions_text", "base", "lora"]
    lines = [line for line in done.out.splitlines() if "Holm-corrected p" in line]
    assert len(lines) == 2 * 2 * 3
    for line, test in zip(lines, table["tests"], strict=True):
        assert {test["a"], test["b"]} < set(re.split("[ :,]+", line))
        assert f"{test['metric']} {abs(test['difference']):+.4f} [" in line
    for row in found:
        means = [table["rows"][row[0]][f"{name}@10"]["mean"] for name in ("recall", "ndcg", "coverage")]
        assert [float(cell.split()[0]) for cell in row[1:]] == pytest.approx(means, abs=1e-4)
    again = run("eval", "eval/tiny.toml", "users=12", "--json").json
    assert again["rows"] == table["rows"]
    assert again["protocol"]["cases"] == 12
    asked = ("adapters={lora='adapters/lora'}", "baselines=[]", 'questions=[{prompt="click", answers=["yes", "no"]}]')
    told = run("eval", "eval/tiny.toml", "users=12", *asked).out
    assert "click (95% intervals)" in told
    assert "lora: not trained with the prompt 'click'; it has next_item" in told
    assert list(run("eval", "eval/tiny.toml", "users=12", *asked, "--json").json["questions"]) == ["click"]


def test_engine_vllm(run: Run, inside: Path, vllm: list[Any]) -> None:
    local = run("recommend", "adapters/lora", "--user", "u3", "-k", 3, "--json").json
    asked = ("--user", "u3", "--engine", "vllm", "--json")
    assert run("recommend", "adapters/lora", "vllm.max_num_seqs=7", "-k", 3, *asked).json == local
    assert vllm[0].options.max_num_seqs == 7
    vllm[0].close()
    command = ("batch", "adapters/lora", "--users", "data/tiny", "--out", "out", "-k", 4, "--engine", "vllm")
    assert run(*command, "vllm.gpu_memory_utilization=0.5", "--dtype", "bfloat16").code == 0
    assert (vllm[1].dtype, vllm[1].options.gpu_memory_utilization) == ("bfloat16", 0.5)
    assert json.loads(Path("out/job.json").read_text())["engine"] == "vllm"
    assert run(*command, "--dry-run").code == 0
    done = run("eval", "eval/tiny.toml", "--engine", "vllm", "users=5", "baselines=[]", "--json").json
    assert done["spec"]["engine"] == "vllm"
    assert len(vllm) == 5
    assert all(engine.closed for engine in vllm)
    refused = run(*command, "--device", "cuda")
    assert (refused.code, refused.out) == (3, "")
    assert "Leave device out" in refused.err


@pytest.mark.parametrize(
    "command",
    [
        ("recommend", "adapters/lora", "--user", "u3"),
        ("why", "adapters/lora", "--user", "u3", "--item", "i3"),
        ("batch", "adapters/lora", "--users", "data/tiny", "--out", "out"),
        ("eval", "eval/tiny.toml"),
    ],
    ids=lambda command: command[0],
)
def test_keys_of_vllm_without_vllm_are_refused(run: Run, inside: Path, command: tuple[str, ...]) -> None:
    done = run(*command, "vllm.max_num_seqs=3")
    assert done.code == 3
    assert "vllm.max_num_seqs=3 says how vLLM runs, and the engine is 'local'. Pass --engine vllm" in done.err


def test_what_recommend_refuses_of_vllm_is_refused_before_anything_is_read(run: Run, inside: Path) -> None:
    for told, message in (
        (("vllm.foo=1",), "unknown key 'foo'"),
        (("num_beams=3",), "recommend: unknown key 'num_beams'. Write vllm.key=value."),
        (("--device", "cuda"), "Leave device out"),
    ):
        done = run("recommend", "no/such/adapter", "--user", "u3", "--engine", "vllm", *told)
        assert done.code == 3
        assert message in " ".join(done.err.split())


def test_eval_beside_a_list_and_compared(run: Run, inside: Path) -> None:
    data = genrec.Dataset.load("data/tiny")
    lines = [f"{user},{rank},i{rank}" for user in data.user_ids for rank in range(1, 11)]
    Path("today.csv").write_text("\n".join(["user_id,rank,item_id", *lines]) + "\n")
    given = ("eval", "eval/tiny.toml", "adapters={lora='adapters/lora'}", "--against", "today.csv", "--tune-baselines")
    done = run(*given)
    assert done.code == 0
    assert [row[0] for row in rows(done.out)] == ["popularity", "item_knn", "transitions_text", "today", "lora"]
    assert "lora beats today: recall@10 +" in done.out
    results = inside / "eval" / "results"
    assert {"tiny.json", "tiny.md", "tiny.html", "tiny.tuned.json"} <= {path.name for path in results.iterdir()}
    shutil.copy("eval/tiny.toml", "eval/other.toml")
    assert run("eval", "eval/other.toml", "adapters={base='adapters/pretrained'}", "baselines=['popularity']").code == 0
    compared = run("eval", "--compare", "tiny", "eval/other.toml")
    assert compared.code == 0
    assert "B: popularity" not in compared.out.partition("recall@10 +")[2]  # It is the same on both sides.
    assert "A: lora" in compared.out
    assert "A: today" in compared.out
    assert compared.out.rstrip().endswith("eval/results/tiny-against-other.md")
    (results / "tiny-against-other.html").unlink()
    table = run("eval", "--compare", "tiny", "other", "--json").json
    assert (results / "tiny-against-other.html").exists()
    assert [(test["a"], test["b"]) for test in table["tests"][:2]] == [("A: today", "B: base"), ("A: lora", "B: base")]
    assert run("eval", "eval/tiny.toml", "--compare", "tiny", "other").code == 2
    assert run("eval", "--name", "both", "--compare", "tiny", "other").code == 2
    assert run("eval", "--dtype", "bfloat16", "--compare", "tiny", "other").code == 2
    assert run("eval").code == 2
    assert run("eval", "--compare", "tiny", "none").code == 3


def test_train(run: Run, inside: Path) -> None:
    done = run("train", "adapters/lora.toml", "lora.r=2", "training.max_steps=2", "--overwrite")
    assert done.code == 0
    out = "adapters/lora"
    assert done.out.splitlines()[0] == out
    assert re.search(r"^kept step [012]: validation NDCG@10 0\.\d{4}, recall@10 \d\.\d{4}$", done.out, re.MULTILINE)
    assert Adapter.load(out).manifest["recipe"]["lora"] == {"r": 2}
    shutil.copy("adapters/lora.toml", "adapters/other.toml")
    again = run("--quiet", "train", "adapters/other.toml", "training.max_steps=1", "--json")
    assert again.err == ""
    assert again.json["adapter"] == "adapters/other"
    assert again.json["kept"] == Adapter.load("adapters/other").manifest["kept"]
