from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import genrec
from genrec import cli, errors, progress, quickstart
from genrec.adapter import Adapter
from genrec.batch import Summary, output
from genrec.identifiers import Identifiers
from genrec.recommender import Recommender


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
    """Run the console script in this process."""

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
def inside(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the workspace, as the current folder."""
    shutil.copytree(workspace, tmp_path / "workspace")
    monkeypatch.chdir(tmp_path / "workspace")
    return tmp_path / "workspace"


def rows(table: str) -> list[list[str]]:
    """The cells of a printed table without its header."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in table.splitlines() if line.startswith("│")]


# The command itself


def test_console_script_in_a_process_of_its_own(workspace: Path) -> None:
    script = Path(sys.executable).parent / "genrec"
    command = [script, "data", "inspect", "data/tiny", "--json"]
    done = subprocess.run(command, cwd=workspace, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["users"] == 40


def test_module_runs_as_a_script() -> None:
    command = [sys.executable, "-m", "genrec.cli", "prompts", "list", "no-such-folder"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (5, "")
    assert done.stderr.startswith("error: no folder of prompts at no-such-folder.")


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['genrec', '--help']\nfrom genrec.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "quickstart" in done.stdout
    assert not {"torch", "transformers", "trl", "polars", "pandas", "numpy"} & set(done.stderr.split())


def test_help_names_every_exit_code(run: Run) -> None:
    text = " ".join(run("--help").out.split())
    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert {found.exit_code for found in classes} == {1, 3, 4, 5, 6, 7, 8, 9, 10}
    for code in (0, 2, *(found.exit_code for found in classes)):
        assert re.search(rf"\b{code} [a-z]", text.split("Exit codes:")[1])


def test_every_command_explains_itself(run: Run) -> None:
    from typer.main import get_command

    def walk(command: Any, path: tuple[str, ...]) -> None:
        done = run(*path, "--help")
        assert done.code == 0
        assert command.help
        assert command.help.splitlines()[0][:40] in " ".join(done.out.split())
        for parameter in command.params:
            if parameter.name not in ("install_completion", "show_completion"):
                assert getattr(parameter, "help", "") or parameter.name == "help", f"{path} {parameter.name}"
        for name, part in getattr(command, "commands", {}).items():
            walk(part, (*path, name))

    walk(get_command(cli.app), ())


def test_version(run: Run) -> None:
    assert run("--version") == Done(0, f"{genrec.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recommend"], "Missing argument"),
        (["recommend", "x", "--nonsense"], "No such option: --nonsense"),
        (["nonsense"], "No such command 'nonsense'"),
        (["recommend", "x", "-k", "many"], "Invalid value for '-k'"),
        (["recommend", "x", "--history", "", "--engine", "gpu"], "'gpu' is not one of"),
        (["data", "import", "log.csv"], "Missing option '--out'"),
    ],
)
def test_wrong_usage(run: Run, arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert (done.code, done.out) == (2, "")
    assert message in done.err


@pytest.mark.parametrize("name", [name for name, found in vars(errors).items() if isinstance(found, type)])
def test_every_error_has_its_exit_code_and_one_message(run: Run, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    error = getattr(errors, name)

    def fail(_: Any) -> None:
        raise error("what is wrong, and what to do.")

    monkeypatch.setattr(quickstart, "init", fail)
    assert run("init", "x") == Done(error.exit_code, "", "error: what is wrong, and what to do.\n")


@pytest.mark.parametrize(
    ("code", "arguments", "message"),
    [
        (3, ["recommend", "adapters/lora"], "recommend takes one of --user and --history"),
        (3, ["recommend", "adapters/lora", "--user", "u1", "--history", "i1"], "one of --user and --history"),
        (3, ["recommend", "adapters/lora", "--history", "i1", "-k", "0"], "k is 0"),
        (3, ["train", "adapters/lora.toml", "lerning_rate=1"], "unknown key 'lerning_rate'"),
        (3, ["train", "adapters/lora.toml", "--overwrite", "training.lerning_rate=1"], "Did you mean 'learning_rate'?"),
        (3, ["train", "adapters/lara.toml"], "adapters/lara.toml: no such file. Did you mean 'adapters/lora.toml'?"),
        (3, ["eval", "eval/tiny.toml", "baselines=['popular']"], "Did you mean 'popularity'?"),
        (3, ["data", "fetch", "movielens"], "'movielens' cannot be fetched"),
        (3, ["data", "import", "--out", "data/new"], "no interactions file was named"),
        (3, ["ids", "build", "data/tiny", "--out", "x.parquet", "--scheme", "atom"], "Did you mean 'atomic'?"),
        (3, ["base", "create", "data/tiny", "--out", "adapters/b", "--width", "7"], "width 7"),
        (3, ["prompts", "render", "prompts/title_to_item.jinja", "adapters/lora"], "asks about an item"),
        (4, ["recommend", "adapters/lora", "--user", "U1"], "user 'U1' is not in"),
        (4, ["recommend", "adapters/lora", "--history", "i1,I2"], "Did you mean 'i2'?"),
        (4, ["batch", "adapters/lora", "--users", "data/nix.csv", "--out", "out"], "data/nix.csv"),
        (4, ["eval", "eval/tiny.toml", "split=temporal"], "was trained on other interactions"),
        (4, ["data", "inspect", "data/nix"], "data/nix holds no data set"),
        (5, ["prompts", "show", "prompts/nix.jinja"], "cannot read the prompt prompts/nix.jinja"),
        (6, ["ids", "inspect", "nix.parquet"], "there are no identifiers at nix.parquet"),
        (7, ["recommend", "adapters/nix", "--history", "i1"], "adapters/nix: no adapter here"),
        (9, ["train", "adapters/lora.toml"], "adapters/lora exists already"),
        (9, ["batch", "adapters/lora", "--users", "data/tiny", "--out", "prompts"], "holds no batch job"),
    ],
)
def test_bad_input(run: Run, inside: Path, code: int, arguments: list[str], message: str) -> None:
    before = {path: path.stat().st_mtime_ns for path in inside.rglob("*")}
    if "data/nix.csv" in arguments:
        (inside / "data" / "nix.csv").write_text("user_id,history\n")
        before = {path: path.stat().st_mtime_ns for path in inside.rglob("*")}
    done = run(*arguments)
    assert (done.code, done.out) == (code, "")
    assert done.err.startswith("error: ")
    assert message in done.err
    assert {path: path.stat().st_mtime_ns for path in inside.rglob("*")} == before


# recommend


def test_recommend_as_json(run: Run, workspace: Path) -> None:
    rec = Recommender.load(workspace / "adapters" / "lora")
    history, _ = rec.user_history("u7")
    expected = rec.recommend([history], k=3)[0]
    by_user = run("recommend", workspace / "adapters" / "lora", "--user", "u7", "-k", 3, "--json")
    by_history = run("recommend", workspace / "adapters" / "lora", "--history", ", ".join(history), "-k", 3, "--json")
    assert (by_user.code, by_user.err) == (0, "")
    assert by_user == by_history
    assert [(item["rank"], item["item_id"], item["title"]) for item in by_user.json] == [
        (item.rank, item.item_id, item.title) for item in expected
    ]
    assert [item["score"] for item in by_user.json] == pytest.approx([item.score for item in expected], abs=1e-5)


def test_recommend_as_a_table_that_no_pipe_cuts(run: Run, inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    items = inside / "adapters" / "lora" / "items.parquet"
    long = pl.col("title") + " and " + "more and " * 40 + "the end [bold]"
    pl.read_parquet(items).with_columns(title=long).write_parquet(items)
    done = run("recommend", "adapters/lora", "--history", "", "-k", 4)
    assert done.out.startswith("after 0 items")
    found = rows(done.out)
    assert [row[0] for row in found] == ["1", "2", "3", "4"]
    assert all(row[2].startswith("Film ") and row[2].endswith("the end [bold]") for row in found)
    assert all(re.fullmatch(r"-\d+\.\d{3}", row[3]) for row in found)


def test_recommend_from_another_data_set(run: Run, workspace: Path, tmp_path: Path) -> None:
    genrec.Dataset.from_frames(pl.DataFrame({"user_id": ["new"], "item_id": ["i3"]})).save(tmp_path / "other")
    adapter = workspace / "adapters" / "lora"
    done = run("recommend", adapter, "--user", "new", "--data", tmp_path / "other", "--json")
    assert done == run("recommend", adapter, "--history", "i3", "--json")
    assert len(done.json) == 10


# batch, eval, train


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
        "9 rows for 3 users in 1 shards (0 were there)",
        "3 users were carried over from 1, 0 computed",
        "items.parquet: 1 items of the adapter are not in it and retired; 1 of its items are unknown to the adapter",
        "1 bad rows: 2/errors/*.parquet",
        "2/*.parquet",
    ]
    stopped = run(*command, "--out", "3", "-k", 3)
    assert stopped.code == 4
    assert "1 of 4 rows of users.parquet are bad" in stopped.err
    assert "Row 1 column history: 'nix'" in stopped.err


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
    done = run("eval", "eval/tiny.toml", "users=12")
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
    assert "A: popularity does as well as B: popularity: recall@10 +0.0000" in compared.out
    assert "A: lora" in compared.out
    assert compared.out.rstrip().endswith("eval/results/tiny-against-other.md")
    (results / "tiny-against-other.html").unlink()
    table = run("eval", "--compare", "tiny", "other", "--json").json
    assert (results / "tiny-against-other.html").exists()
    assert [(test["a"], test["b"]) for test in table["tests"][:2]] == [("lora", "base"), ("popularity", "popularity")]
    assert run("eval", "eval/tiny.toml", "--compare", "tiny", "other").code == 2
    assert run("eval", "--name", "both", "--compare", "tiny", "other").code == 2
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


# data


LOG = """customer,sku,when,kind
c1,a,2026-03-01,view
c1,b,2026-03-02,purchase
c2,a,2026-03-01,purchase
c2,b,2026-03-02,return
c2,c,2026-03-03,purchase
"""
CATALOGUE = "sku,name,brand\na,Tea 茶,Leaf\nb,Pot,\nc,Cup,Clay\nd,Tray,Clay\n"
MAPPED = ("--column", "user_id=customer", "--column", "item_id=sku", "--column", "timestamp=when", "--column",
          "event=kind", "--item-column", "item_id=sku", "--item-column", "title=name")  # fmt: skip


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("log.csv").write_text(LOG)
    Path("items.csv").write_text(CATALOGUE)
    return tmp_path


def test_data_import_with_mappings_and_events(run: Run, shop: Path) -> None:
    events = ("--event", "purchase", "--event", "view=0.5")
    done = run("data", "import", "log.csv", "items.csv", "--out", "data/shop", *MAPPED, *events, "--json")
    assert (done.code, done.err) == (0, "")
    assert (done.json["users"], done.json["items"], done.json["interactions"]) == (2, 4, 4)
    data = genrec.Dataset.load("data/shop")
    assert data.manifest["name"] == "shop"
    assert data.manifest["positives"]["events"] == {"purchase": 1.0, "view": 0.5}
    assert data.interactions.select("user_id", "item_id", "weight").rows() == [
        ("c1", "a", 0.5), ("c1", "b", 1.0), ("c2", "a", 1.0), ("c2", "c", 1.0)
    ]  # fmt: skip
    assert data.items["title"].to_list() == ["Tea 茶", "Pot", "Cup", "Tray"]
    assert run("data", "inspect", "data/shop", "--json").json == done.json


def test_data_import_of_files_with_other_names(run: Run, shop: Path) -> None:
    Path("log.csv").rename("clicks.csv")
    Path("items.csv").rename("catalogue.csv")
    done = run(
        "data", "import", "--interactions", "clicks.csv", "--items", "catalogue.csv", "--out", "data/shop", *MAPPED
    )
    assert (done.code, done.err) == (0, "")
    assert genrec.Dataset.load("data/shop").items.height == 4


def test_data_import_stops_at_a_bad_row_or_skips_it(run: Run, shop: Path) -> None:
    Path("log.csv").write_text(LOG + "c3,zzz,2026-03-04,view\n,a,2026-03-04,view\nc3,a,soon,view\n")
    command = ("data", "import", "log.csv", "items.csv", "--out", "data/shop", *MAPPED)
    done = run(*command)
    assert (done.code, done.out) == (4, "")
    assert "log.csv:7 item_id 'zzz' is not in the items" in done.err
    assert "log.csv:9 timestamp 'soon'" in done.err
    assert "--on-bad-row skip" in done.err
    assert not Path("data/shop").exists()
    skipped = run(*command, "--on-bad-row", "skip")
    assert skipped.code == 0
    assert ["bad rows", "3"] in rows(skipped.out)
    saved = pl.read_csv("data/shop/bad_rows.csv")
    assert saved["line"].to_list() == [7, 8, 9]
    assert run("data", "inspect", "data/shop").out == skipped.out


def test_data_import_options(run: Run, shop: Path) -> None:
    Path("log.csv").write_text("user_id,item_id,rating\nu,a,5\nu,b,4\nu,c,1\nv,a,5\nv,b,4\nw,a,5\n")
    command = ("data", "import", "log.csv", "--out", "data/x", "--min-rating", "3", "--keep-seen", "--name", "mine")
    assert run(*command).code == 0
    data = genrec.Dataset.load("data/x")
    assert (data.manifest["name"], data.manifest["exclude_seen"], data.interactions.height) == ("mine", False, 5)
    assert run(*command).code == 9
    assert run(*command, "--overwrite", "--core", "2").code == 0
    assert genrec.Dataset.load("data/x").interactions.height == 4


def test_data_import_of_amazon_reviews_and_export_for_recbole(run: Run, shop: Path) -> None:
    review = '{"user_id": "u", "parent_asin": "P%d", "rating": 5.0, "timestamp": 1588687728%d00}\n'
    Path("Shop.jsonl").write_text("".join(review % (n, n) for n in (1, 2)))
    item = '{"parent_asin": "P%d", "title": "%s"}\n'
    Path("meta_Shop.jsonl").write_text(item % (1, "One") + item % (3, "Three"))
    command = ("data", "import", "Shop.jsonl", "meta_Shop.jsonl", "--out", "data/shop")
    assert run(*command).code == 0
    data = genrec.Dataset.load("data/shop")
    assert data.items.select("item_id", "title").rows() == [("P1", "One"), ("P2", "")]
    done = run("data", "export", "data/shop", "--to", "recbole", "recbole/shop")
    assert (done.code, done.out.split()) == (0, ["recbole/shop/shop.inter", "recbole/shop/shop.item"])
    assert run("data", "import", "recbole/shop", "--out", "data/again").code == 0
    assert genrec.Dataset.load("data/again").hash == data.hash
    assert run("data", "export", "data/shop", "--to", "recbole", "recbole/shop").code == 9
    told = run("data", "export", "data/shop", "--to", "recbole", "recbole/shop", "--overwrite", "--json")
    assert (len(told.json["files"]), told.json["lost"]) == (2, [])
    assert run(*command, "--overwrite", "--all-items").code == 0
    assert genrec.Dataset.load("data/shop").item_ids == ["P1", "P3", "P2"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--column", "user_id"], "--column 'user_id': write ours=theirs, such as user_id=customer"),
        (["--item-column", "=x"], "--item-column '=x': write ours=theirs"),
        (["--event", "view=much"], "--event 'view=much': the weight after = is no number"),
    ],
)
def test_data_import_with_a_malformed_option(run: Run, shop: Path, given: list[str], message: str) -> None:
    done = run("data", "import", "log.csv", "--out", "data/x", *given)
    assert (done.code, done.out) == (3, "")
    assert message in done.err


def test_data_inspect_as_a_table(run: Run, workspace: Path) -> None:
    done = run("data", "inspect", workspace / "data" / "tiny")
    found = dict(rows(done.out))
    assert found["interactions"] == "289"
    assert found["history length"].startswith("min: 4, p25: 6, median: 7")
    assert found["positives"] == "min_rating: none, events: none"
    assert found["item columns"] == "item_id, title, brand"


def test_data_fetch_prints_the_folder(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from genrec import readers

    monkeypatch.setattr(readers, "fetch", lambda name, cache: cache / name)
    done = run("data", "fetch", "movielens-100k", "--cache", tmp_path)
    assert done == Done(0, f"{tmp_path / 'movielens-100k'}\n", "")


# ids and base


def test_ids_build_and_inspect(run: Run, inside: Path) -> None:
    build = ("ids", "build", "data/tiny", "--scheme", "semantic", "--levels", 2, "--codes", 8, "--out")
    assert run(*build, "ids.parquet") == Done(0, "ids.parquet\n", "")
    identifiers = Identifiers.load(Path("ids.parquet"))
    assert len(set(identifiers.tokens)) == 24
    found = run("ids", "inspect", "ids.parquet", "--item", "i3", "--json").json
    assert (found["scheme"], found["items"], found["items_by_length"]) == ("semantic", 24, {"2": 24})
    assert found["i3"] == "".join(identifiers.tokens[3])
    shown = dict(rows(run("ids", "inspect", "ids.parquet", "--item", "i3").out))
    assert shown["items by length"] == "2: 24"
    assert shown["i3"] == found["i3"]
    assert run(*build, "again.parquet").code == 0
    assert Path("again.parquet").read_bytes() == Path("ids.parquet").read_bytes()
    other = run(*build, "other.parquet", "--split", "temporal")
    assert other.code == 0
    assert Identifiers.load(Path("other.parquet")).fitted_on != identifiers.fitted_on


def test_ids_inspect_of_an_adapter(run: Run, workspace: Path) -> None:
    found = run("ids", "inspect", workspace / "adapters" / "lora", "--json").json
    assert (found["scheme"], found["tokens_in_vocabulary"]) == ("atomic", 24)


def test_base_create(run: Run, inside: Path) -> None:
    command = ("base", "create", "data/tiny", "--out", "adapters/b", "--width", 8, "--layers", 1, "--vocabulary", 280)
    assert run(*command) == Done(0, "adapters/b\n", "")
    config = json.loads(Path("adapters/b/config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"], config["max_position_embeddings"]) == (8, 1, 1024)
    assert run(*command).code == 9
    assert run(*command, "--context", 64, "--overwrite").code == 0
    assert json.loads(Path("adapters/b/config.json").read_text())["max_position_embeddings"] == 64


# prompts


BROKEN = "{% block user %}{{ item.titel }}{% endblock %}\n{% block assistant %}{{ nothing( }}{% endblock %}\n"


def test_prompts_list(run: Run, inside: Path) -> None:
    Path("prompts/broken.jinja").write_text(BROKEN)
    done = run("prompts", "list")
    assert (done.code, done.err) == (0, "")
    found = {row[0]: row[1:] for row in rows(done.out)}
    assert found["prompts/next_item.jinja"] == ["sequence", "", ""]
    assert found["prompts/title_to_item.jinja"] == ["question", "item.title", ""]
    assert found["prompts/broken.jinja"][2].startswith("prompts/broken.jinja:2:")
    listed = {row["path"]: row for row in run("prompts", "list", "--json").json}
    assert listed["prompts/title_to_item.jinja"] == {
        "path": "prompts/title_to_item.jinja",
        "kind": "question",
        "reads": ["item.title"],
        "problem": None,
    }
    assert listed["prompts/broken.jinja"]["problem"] == found["prompts/broken.jinja"][2]


def test_prompts_show(run: Run, workspace: Path) -> None:
    path = workspace / "prompts" / "next_item.jinja"
    assert run("prompts", "show", path) == Done(0, path.read_text(), "")


def test_prompts_check(run: Run, inside: Path) -> None:
    good = run("prompts", "check", "prompts/next_item.jinja", "prompts/title_to_item.jinja", "--data", "data/tiny")
    assert good == Done(0, "prompts/next_item.jinja: good\nprompts/title_to_item.jinja: good\n", "")
    Path("prompts/broken.jinja").write_text(BROKEN)
    Path("prompts/titel.jinja").write_text(BROKEN.replace("nothing(", "item.identifier"))
    paths = ("prompts/next_item.jinja", "prompts/broken.jinja", "prompts/titel.jinja")
    done = run("prompts", "check", *paths, "--data", "data/tiny")
    assert (done.code, done.err) == (5, "")
    lines = done.out.splitlines()
    assert lines[0] == "prompts/next_item.jinja: good"
    assert lines[1].startswith("prompts/broken.jinja:2:")
    assert lines[2].startswith("prompts/titel.jinja:1:")
    assert lines[2].endswith("Did you mean 'title'?")
    told = run("prompts", "check", *paths, "--data", "data/tiny", "--json")
    assert told.code == 5
    assert [len(problems) for problems in told.json.values()] == [0, 1, 1]
    assert told.json["prompts/titel.jinja"][0]["line"] == 1


def test_prompts_render(run: Run, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    adapter = workspace / "adapters" / "lora"
    sequence = run("prompts", "render", workspace / "prompts" / "next_item.jinja", adapter, "--history", "i1, i2")
    rec = Recommender.load(adapter, engine="dummy")
    head = len(rec.tokenization.head_ids(rec.adapter.prompt))
    assert sequence == Done(
        0,
        f"read: {rec.prompt(['i1', 'i2'])}\n"
        f"tokens: {head} head, 2 history, 0 answer, {62 - head} of 64 free; 0 oldest events were cut\n",
        "",
    )
    question = run("prompts", "render", workspace / "prompts" / "title_to_item.jinja", adapter, "--item", "i3")
    read, trained, _ = question.out.splitlines()
    assert read.startswith("read: <|begin|><|user|>")
    assert "Film 3 of series 0" in read
    assert trained == "trained: <|item_3|>"
    told = run("prompts", "render", workspace / "prompts" / "next_item.jinja", adapter, "--user", "u1", "--json").json
    assert told["kind"] == "sequence"
    assert told["tokens"]["history"] == len(rec.user_history("u1")[0])
    assert told["read"][0] == {"kind": "frame", "text": "<|begin|><|user|>", "ids": [1, 3]}


# init, doctor, quickstart


def test_init(run: Run, tmp_path: Path) -> None:
    done = run("init", tmp_path / "shop")
    written = [Path(line) for line in done.out.splitlines()]
    assert done.code == 0
    assert len(written) >= 6
    assert all(path.is_file() for path in written)
    hint = f"Next: cd {tmp_path}/shop, then `genrec quickstart`, or `genrec data import`."
    assert done.err == f"{len(written)} files written. {hint}\n"
    assert run("init", tmp_path / "shop").out == ""
    assert run("--quiet", "init", tmp_path / "other").err == ""


def test_doctor(run: Run, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    done = run("doctor")
    assert (done.code, done.err) == (0, "")
    found = {row[1]: row for row in rows(done.out)}
    assert found["genrec"] == ["ok", "genrec", genrec.__version__, ""]
    assert found["workspace"][0] == "ok"
    told = run("doctor", "--json").json
    assert [finding["name"] for finding in told] == list(found)
    assert told[0] == {"name": "genrec", "ok": True, "found": genrec.__version__, "needed": True, "advice": ""}


def test_doctor_fails_where_something_needed_is_missing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name == "trl":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    done = run("doctor")
    assert done.code == 1
    assert ["MISSING", "trl", "missing", "Install genrec with its dependencies: pip install genrec"] in rows(done.out)
    assert run("doctor", "--json").code == 1


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> quickstart.Result:
    """A result of the quickstart, which is not run."""
    value = {"mean": 0.1234, "low": 0.11, "high": 0.136}
    columns = [f"{metric}@{k}" for metric in ("recall", "ndcg", "mrr") for k in (5, 10)]
    names = ("popularity", "base alone", "base + LoRA")
    result = quickstart.Result(
        seconds={"data": 1.25, "batch": 2.0},
        reused=["data"],
        report={
            "protocol": {"cases": 943, "catalogue": 1682},
            "rows": {name: dict.fromkeys(columns, value) | {"coverage@10": {"mean": 0.5}} for name in names},
        },
        examples=[
            {
                "user_id": "42",
                "events": 183,
                "history": ["Fargo [1996]", "Heat"],
                "recommended": ["Jaws", "Ran", "Alien"],
            }
        ],
        curves=[Path("adapters/movielens-100k/learning_curve.png")],
        batch=Summary("recommendations/movielens-100k", 943, 9430, 1, 0, 0),
    )
    monkeypatch.setattr(quickstart, "run", lambda workspace: result)
    return result


def test_quickstart_shows_table_examples_times_and_next_commands(run: Run, shown: quickstart.Result) -> None:
    done = run("quickstart")
    assert (done.code, done.err) == (0, "")
    found = {row[0]: row[1:] for row in rows(done.out)}
    assert found["base + LoRA"] == [".1234 [.1100, .1360]"] * 2 + [".5000"]
    assert "user 42, after 183 films" in done.out
    assert [found["Fargo [1996]"], found["Heat"], found[""]] == [["Jaws"], ["Ran"], ["Alien"]]
    assert found["data"] == ["1.2", "reused"]
    assert found["all"] == ["3.2", ""]
    assert "lists of all 943 users: recommendations/movielens-100k/*.parquet\n" in done.out
    assert "report: eval/results/movielens-100k.md\n" in done.out
    assert "learning curve: adapters/movielens-100k/learning_curve.png\n" in done.out
    assert "genrec recommend adapters/movielens-100k --user 42" in done.out


def test_quickstart_as_json(run: Run, shown: quickstart.Result) -> None:
    told = run("quickstart", "--json").json
    assert told["reused"] == ["data"]
    assert told["report"]["rows"] == shown.report["rows"]
    assert told["curves"] == ["adapters/movielens-100k/learning_curve.png"]


def test_report_fits_eighty_columns(run: Run, shown: quickstart.Result) -> None:
    shown.report["rows"]["transitions_text"] = shown.report["rows"]["popularity"]
    table = run("quickstart").out.split("\n\n")[0]
    assert "transitions_text" in table
    assert max(len(line) for line in table.splitlines() if line.startswith("│")) <= 80
