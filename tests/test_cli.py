from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from conftest import Done, Run, rows

import genrec
from genrec import cli, errors, quickstart
from genrec.batch import Summary
from genrec.identifiers import Identifiers
from genrec.recommender import Recommender

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
    assert {found.exit_code for found in classes} == {1, 3, 4, 5, 6, 7, 8, 9, 10, 11}
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
        (4, ["why", "adapters/lora", "--user", "U1", "--item", "i1"], 'Or pass a history: --history "id,id"'),
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
    done = run("--quiet", *arguments)
    assert (done.code, done.out) == (code, "")
    assert done.err.startswith("error: ")
    assert message in done.err
    assert {path: path.stat().st_mtime_ns for path in inside.rglob("*")} == before


# recommend


def test_recommend_as_json(run: Run, workspace: Path) -> None:
    rec = Recommender.load(workspace / "adapters" / "lora")
    history, _ = rec.user_history("u7")
    expected = rec.recommend([history], k=3)[0]
    command = ("--quiet", "recommend", workspace / "adapters" / "lora", "-k", 3, "--json")
    by_user = run(*command, "--user", "u7")
    by_history = run(*command, "--history", ", ".join(history))
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


def test_recommend_restricted_and_with_another_prompt(run: Run, inside: Path) -> None:
    only = run("recommend", "adapters/lora", "--history", "i3", "--where", "brand = 'studio 1'", "--json")
    assert {item["item_id"] for item in only.json} == {f"i{item}" for item in range(8, 16)}
    assert "8 items instead of 10: the restrictions leave only 8 items" in only.err
    restricted = ("recommend", "adapters/lora", "--history", "i3", "--json", "--num-beams", "12")
    listed = run(*restricted, "--allowed", "i3, i4,i5", "--blocked", "i4")
    assert [item["item_id"] for item in listed.json] == ["i5"]
    assert {item["item_id"] for item in run(*restricted, "--allowed", "i3,i4", "--keep-seen").json} == {"i3", "i4"}
    Path("prompts/now.jinja").write_text(
        "{% block user %}{% if context.hour < 12 %}Early{% endif %}{% endblock %}"
        "{% block item %}{{ item.identifier }}{% endblock %}"
    )
    other = ("recommend", "adapters/lora", "--history", "i3", "--prompt", "prompts/now.jinja", "--context", "hour=9")
    refused = run(*other)
    assert refused.code == 7
    assert "context.hour" in refused.err  # Of the difference.
    for word in ('{"hour": 9}', "hour"):
        refused = run(*other[:-1], word, "--untrained")
        assert refused.code == 3
        assert "is no assignment. Write key=value, such as page=section." in refused.err
    refused = run(*other[:-1], "huor=9", "--untrained")
    assert refused.code == 3
    assert "--context huor: the prompt now does not read `context.huor`. Did you mean 'hour'?" in refused.err
    now = Path(other[other.index("--prompt") + 1])
    now.write_text(now.read_text().replace("{% if", "{{ user.tier | default('') }}{% if"))
    refused = run(*other[:-1], "tier=gold", "--untrained")
    assert "It reads `user.tier`, a column of the users table: name somebody with --user." in refused.err
    for command in (("recommend",), ("why", "--item", "i4")):
        refused = run(*command, "adapters/lora", "--history", "i3", "--context", "hour=9")
        assert refused.code == 3
        assert "It reads nothing of `context`: leave --context out." in refused.err
    done = run(*other, "--untrained", "--json")
    assert len(done.json) == 10
    assert "not as trained: adapters/lora was trained with another prompt than prompts/now.jinja" in done.err


def test_recommend_from_another_data_set(run: Run, workspace: Path, tmp_path: Path) -> None:
    genrec.Dataset.from_frames(pl.DataFrame({"user_id": ["new"], "item_id": ["i3"]})).save(tmp_path / "other")
    adapter = workspace / "adapters" / "lora"
    done = run("recommend", adapter, "--user", "new", "--data", tmp_path / "other", "--json")
    assert done == run("recommend", adapter, "--history", "i3", "--json")
    assert len(done.json) == 10


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
