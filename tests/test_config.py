from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from genrec import config
from genrec.config import (
    IdentifierRecipe,
    Job,
    Question,
    Recipe,
    Spec,
    Task,
    Thresholds,
    Validation,
    VllmOptions,
    WalkRecipe,
    load_recipe,
    load_spec,
)
from genrec.errors import ConfigError
from genrec.prompts import Prompt

ROOT = Path(__file__).parent.parent
RECIPES, SPECS = sorted((ROOT / "adapters").glob("*.toml")), sorted((ROOT / "eval").glob("*.toml"))
MINIMAL = 'base = "b"\ndata = "d"\n[[tasks]]\nprompt = "p.jinja"\n'
RECIPE = Recipe("b", "d", (Task("p.jinja"),))


def write(folder: Path, text: str) -> Path:
    path = folder / "adapters" / "shop.toml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_a_minimal_recipe_has_the_defaults(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, MINIMAL)) == RECIPE


def test_all_tables_are_built_into_their_dataclasses(tmp_path: Path) -> None:
    text = (
        'base = "b"\ndata = "d"\ntasks = [{prompt = "p.jinja", weight = 2}]\n'
        '[identifiers]\nscheme = "semantic"\nlevels = 2\n[walks]\nshare = 1\n[validation]\nusers = 5\n'
        '[training]\nlearning_rate = 1e-3\n[lora]\nr = 4\ntarget_modules = ["q_proj"]\n'
    )
    assert load_recipe(write(tmp_path, text)) == replace(
        RECIPE,
        tasks=(Task("p.jinja", 2.0),),
        identifiers=IdentifierRecipe("semantic", 2),
        walks=WalkRecipe(share=1.0),
        validation=Validation(users=5),
        training={"learning_rate": 1e-3},
        lora={"r": 4, "target_modules": ["q_proj"]},
    )


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("max_lenght = 9\n", "shop.toml: unknown key 'max_lenght'", "Did you mean 'max_length'?"),
        ("[walks]\nalnoe = 0.5\n", "shop.toml: walks: unknown key 'alnoe'", "Did you mean 'alone'?"),
        ("zzzzzzz = 1\n", "shop.toml: unknown key 'zzzzzzz'", "Known: base, batch_events, data, dropout"),
        ("max_length = 2.5\n", "shop.toml: max_length is 2.5", "type int"),
        ("max_length = true\n", "shop.toml: max_length is True", "type int"),
        ('dropout = "high"\n', "shop.toml: dropout is 'high'", "type float"),
        ("dropout = true\n", "shop.toml: dropout is True", "type float"),
        ("base = 5\n", "shop.toml: base is 5", "type str"),
        ('tuning = "lorra"\n', "shop.toml: tuning is 'lorra'", "Did you mean 'lora'?"),
        ('dtype = "float16"\n', "shop.toml: dtype is 'float16'", "'bfloat16'"),
        ('tasks = "next_item"\n', "shop.toml: tasks is 'next_item'", "a list"),
        ('tasks = ["next_item"]\n', "shop.toml: tasks[0] is 'next_item'", "a table"),
        ("tasks = [{weight = 1.0}]\n", "shop.toml: tasks[0]", "'prompt' is missing"),
        ("walks = 0.5\n", "shop.toml: walks is 0.5", "a table"),
        ("training = [1]\n", "shop.toml: training is [1]", "a table"),
    ],
)
def test_a_wrong_key_or_value_is_named_with_its_place(tmp_path: Path, text: str, where: str, what: str) -> None:
    key = text.split(" ")[0]
    rest = "" if key == "tasks" else 'tasks = [{prompt = "p"}]\n'
    given = ("" if key == "base" else 'base = "b"\n') + 'data = "d"\n' + rest + text
    with pytest.raises(ConfigError) as error:
        load_recipe(write(tmp_path, given))
    assert where in str(error.value)
    assert what in str(error.value)


def test_a_missing_key_a_missing_file_a_folder_and_no_toml_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"shop\.toml: the key 'data' is missing"):
        load_recipe(write(tmp_path, 'base = "b"\ntasks = []\n'))
    with pytest.raises(ConfigError, match=r"shp\.toml: no such file\. Did you mean '.*shop\.toml'\?"):
        load_recipe(tmp_path / "adapters" / "shp.toml")
    with pytest.raises(ConfigError, match=r"nowhere/shop\.toml: no such file\.$"):
        load_recipe(tmp_path / "nowhere" / "shop.toml")
    with pytest.raises(ConfigError, match=r"is a folder; a \.toml file is wanted"):
        load_recipe(tmp_path / "adapters")
    with pytest.raises(ConfigError, match=r"shop\.toml: not valid TOML: .*line 2"):
        load_recipe(write(tmp_path, 'base = "b"\ndata = = 1\n'))
    (tmp_path / "adapters" / "latin.toml").write_bytes('base = "caf\xe9"\n'.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.toml: not valid TOML"):
        load_recipe(tmp_path / "adapters" / "latin.toml")


# Overrides


def test_overrides_are_toml_or_bare_words_and_reach_into_tables(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "[training]\nlearning_rate = 1.0\n")
    changes = ["training.learning_rate=5e-4", "training.max_steps=3", "tuning=full", 'base="c"', "walks.share=1", "d=1"]
    made = load_recipe(path, changes[:-1])
    assert made.training == {"learning_rate": 5e-4, "max_steps": 3}
    assert (made.tuning, made.base, made.walks.share) == ("full", "c", 1.0)
    with pytest.raises(ConfigError, match=r"unknown key 'd'"):
        load_recipe(path, changes)
    assert load_recipe(path, ["base=a=b"]).base == "a=b"
    assert load_recipe(path, ["base=HuggingFaceTB/SmolLM2-135M"]).base == "HuggingFaceTB/SmolLM2-135M"


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("seed", "'seed' is no assignment. Write key=value"),
        ("=5", "'=5' is no assignment"),
        ("base.name=x", "'base' is no table, its value is 'b'"),
        ("training..x=1", "'training..x=1' is no assignment"),
        ("training.=1", "'training.=1' is no assignment"),
    ],
)
def test_a_bad_override_is_named(tmp_path: Path, assignment: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_recipe(write(tmp_path, MINIMAL), [assignment])
    assert message in str(error.value)


# What the dataclasses refuse


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ()}, "tasks is empty"),
        ({"tasks": (Task("p", -1.0), Task("q", 1.0))}, "tasks.weight is [-1.0, 1.0]"),
        ({"tasks": (Task("p", 0.0),)}, "tasks.weight is [0.0]"),
        ({"max_length": 1}, "max_length is 1"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"tuning": "full", "lora": {"r": 4}}, "Remove [lora]"),
        ({"walks": WalkRecipe(share=-1.0)}, "walks.share is -1.0"),
        ({"walks": WalkRecipe(alone=1.0)}, "1.0 (at least 0, below 1)"),
        ({"walks": WalkRecipe(length=1)}, "walks.length is 1"),
        ({"walks": WalkRecipe(neighbours=0)}, "0 (at least 1)"),
        ({"walks": WalkRecipe(newcomers=-1.0)}, "walks.newcomers is -1.0"),
        ({"walks": WalkRecipe(mean_rank=0.0)}, "walks.mean_rank is 0.0"),
        ({"validation": Validation(per_epoch=0.0)}, "validation.per_epoch is 0.0"),
        ({"validation": Validation(users=-1)}, "validation.users is -1"),
        ({"validation": Validation(patience=-1)}, "validation.patience -1"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_a_recipe_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        replace(RECIPE, **changes)
    assert str(error.value).startswith("recipe: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": ()}, "k is []"),
        ({"k": (5, 0)}, "k is [5, 0]"),
        ({"k": (5, 5)}, "k is [5, 5]. It lists cut-offs of at least 1, each once"),
        ({"num_beams": 49}, "num_beams is 49, below the largest k, 50"),
        ({"adapters": {}, "baselines": ()}, "neither adapters nor baselines nor lists"),
        ({"users": -1}, "users is -1"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_a_spec_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        Spec(**{"data": "d", **changes})
    assert str(error.value).startswith("spec: ")
    assert message in str(error.value)


def test_a_spec_takes_an_unset_and_a_set_truth_value(tmp_path: Path) -> None:
    path = write(tmp_path, 'data = "d"\nk = [1]\n[adapters]\nmine = "adapters/mine"\n')
    assert load_spec(path).exclude_seen is None
    assert load_spec(path, ["exclude_seen=false"]).exclude_seen is False
    assert load_spec(path).adapters == {"mine": "adapters/mine"}
    with pytest.raises(ConfigError, match=r"exclude_seen is 1\. It takes a value of type bool"):
        load_spec(path, ["exclude_seen=1"])
    with pytest.raises(ConfigError, match=r"k\[1\] is 'x'\. It takes a value of type int"):
        load_spec(path, ['k=[1, "x"]'])
    with pytest.raises(ConfigError, match=r"adapters\.mine is 3\. It takes a value of type str"):
        load_spec(path, ["adapters.mine=3"])


# The workspace


def test_the_workspace_is_the_folder_above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert config.workspace_of(tmp_path / "adapters" / "shop.toml") == tmp_path
    monkeypatch.chdir(tmp_path)
    assert config.workspace_of(Path("adapters/shop.toml")) == tmp_path
    assert config.workspace_of(Path("shop.toml")) == tmp_path.parent


def test_something_is_shipped() -> None:
    assert RECIPES
    assert SPECS


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_and_names_prompts_that_load(path: Path) -> None:
    prompts = [Prompt.load(config.workspace_of(path) / task.prompt) for task in load_recipe(path).tasks]
    assert any(prompt.kind == "sequence" for prompt in prompts)


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_every_shipped_spec_loads_and_names_adapters_with_recipes(path: Path) -> None:
    from genrec.baselines import BASELINES

    spec = load_spec(path)
    assert set(spec.baselines) <= set(BASELINES)
    for adapter in spec.adapters.values():
        recipe = load_recipe((config.workspace_of(path) / adapter).with_suffix(".toml"))
        assert recipe.data == spec.data


def test_the_reference_names_every_key() -> None:
    from genrec.baselines import BASELINES
    from genrec.identifiers import SCHEMES

    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`\[?\[?(\w+)\]?\]?`", text))
    tables = (Recipe, Spec, Task, IdentifierRecipe, WalkRecipe, Validation, Question)
    keys = {field.name for table in tables for field in fields(table)}
    assert keys <= named, keys - named
    assert set(BASELINES) <= named
    assert all(f"`{scheme}`" in text for scheme in SCHEMES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tuning": "lorra"}, "recipe: tuning is 'lorra'. Did you mean 'lora'?"),
        ({"rows": "feature"}, "recipe: rows is 'feature'. Did you mean 'features'?"),
        ({"split": "leave_two_out"}, "recipe: split is 'leave_two_out'"),
        ({"ties": "random"}, "recipe: ties is 'random'"),
        ({"dtype": "float16"}, "recipe: dtype is 'float16'"),
        ({"split_seed": -1}, "split_seed is -1"),
    ],
)
def test_a_recipe_made_in_python_is_checked_too(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        replace(RECIPE, **changes)
    assert message in str(error.value)


@pytest.mark.parametrize("changes", [{"split": "temporary"}, {"ties": "files"}, {"split_seed": -1}])
def test_a_spec_made_in_python_is_checked_too(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"spec: .*{next(iter(changes))} is "):
        Spec("d", **changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[questions]]\nprompt = "click"', "questions[0]: the key 'answers' is missing"),
        ('[[questions]]\nprompt = "click"\nanswers = ["yes"]', "the answers of 'click' are ['yes']. Name two or more"),
        ('[[questions]]\nprompt = "click"\nanswers = ["no", "no"]', "the answers of 'click' are ['no', 'no']"),
        ('[[questions]]\nprompt = "click"\nanswers = ["no", ""]', "an answer of 'click' is empty"),
        ('[[questions]]\nprompt = "click"\nanswer = ["no", "yes"]', "unknown key 'answer'. Did you mean 'answers'?"),
        (2 * '[[questions]]\nprompt = "c"\nanswers = ["no", "yes"]\n', "questions name a prompt twice: ['c', 'c']"),
    ],
)
def test_questions_of_a_spec_are_checked(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "spec.toml").write_text('data = "d"\n' + text)
    with pytest.raises(ConfigError) as error:
        load_spec(tmp_path / "spec.toml")
    assert message in str(error.value)


def test_questions_of_a_spec(tmp_path: Path) -> None:
    (tmp_path / "spec.toml").write_text('data = "d"\n[[questions]]\nprompt = "click"\nanswers = ["yes", "no"]\n')
    assert load_spec(tmp_path / "spec.toml").questions == (Question("click", ("yes", "no")),)


# Jobs


JOB = {"adapter": "adapters/shop", "users": "users.parquet", "out": "recs"}


def test_a_job_has_the_defaults_of_the_flags() -> None:
    job = config.load_job(None, JOB)
    assert (job.k, job.decoded, job.shard_size, job.max_events, job.max_bad_share) == (20, 20, 4096, 100_000, 0.05)
    assert (job.engine, job.runner, job.steps, job.thresholds) == ("local", "local", (), Thresholds())


def test_a_job_with_steps_decodes_more_than_it_keeps() -> None:
    steps = [{"step": "min_score", "score": -9.0}]
    assert config.load_job(None, {**JOB, "steps": steps, "k": 5}).decoded == 50
    assert config.load_job(None, {**JOB, "steps": steps, "k": 30}).decoded == 150
    assert config.load_job(None, {**JOB, "steps": steps, "candidates": 33}).decoded == 33


def test_a_job_file_is_below_flags_and_these_below_assignments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "jobs").mkdir()
    path = tmp_path / "jobs" / "nightly.toml"
    path.write_text(
        'adapter = "adapters/shop"\nusers = "users.parquet"\nout = "recs"\nk = 3\n'
        '[thresholds]\nmax_churn = 1\n[[steps]]\nstep = "max_per"\ncolumn = "brand"\ncount = 2\n'
    )
    monkeypatch.chdir(tmp_path)
    job = config.load_job(path, {"k": 4, "out": "here"}, ["k=5", "thresholds.min_coverage=9"])
    assert (job.k, job.out, job.adapter) == (5, "here", "adapters/shop")
    assert job.thresholds == Thresholds(max_churn=1.0, min_coverage=9)
    assert job.steps == ({"step": "max_per", "column": "brand", "count": 2},)
    monkeypatch.chdir(tmp_path / "jobs")
    assert config.load_job(path, {"out": "here"}).adapter == str(Path("..", "adapters", "shop"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0}, "job: k is 0. It is at least 1."),
        ({"max_events": 0}, "job: max_events is 0"),
        ({"k": 20, "candidates": 10}, "job: candidates is 10, below k, which is 20"),
        ({"num_beams": 10}, "job: num_beams is 10, below k, which is 20"),
        ({"steps": [{}], "num_beams": 99}, "job: num_beams is 99, below candidates, which is 100"),
        ({"max_bad_share": -0.1}, "job: max_bad_share is -0.1"),
        ({"price_per_hour": -1}, "job: price_per_hour is -1.0"),
        ({"workers": 3}, 'job: workers is 3, and runner "local" is one process. Set runner = "ray".'),
        ({"engine": "vllm", "device": "cuda"}, "device is 'cuda', and vLLM takes the GPUs that it finds"),
        ({"engine": "dumy"}, "engine is 'dumy'. Did you mean 'dummy'?"),
        ({"steps": {"step": "mmr"}}, "steps is {'step': 'mmr'}. It takes a list."),
        ({"thresholds": {"max_chrn": 1}}, "unknown key 'max_chrn'. Did you mean 'max_churn'?"),
        ({"thresholds": {"max_cold": 1.5}}, "thresholds: max_cold is 1.5. It is a share, from 0 to 1."),
        ({"thresholds": {"max_drift": -1}}, "thresholds: max_drift is -1.0. It is at least 0."),
    ],
)
def test_a_job_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        config.load_job(None, {**JOB, **changes})


def test_how_vllm_runs_is_a_table_of_jobs_and_specs(tmp_path: Path) -> None:
    given = ["vllm.tensor_parallel_size=2", "vllm.timeout=60", "vllm.enforce_eager=true"]
    wanted = VllmOptions(tensor_parallel_size=2, timeout=60.0, enforce_eager=True)
    assert config.load_job(None, {**JOB, "engine": "vllm"}, given).vllm == wanted
    path = write(tmp_path, 'data = "d"\nengine = "vllm"\n[vllm]\ntensor_parallel_size = 2\nenforce_eager = true\n')
    assert load_spec(path, ["vllm.timeout=60"]).vllm == wanted
    assert load_spec(path).engine == "vllm"
    assert Spec("d").engine == "local"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensor_parallel_size": 0}, "vllm: tensor_parallel_size is 0. It is at least 1."),
        ({"max_num_seqs": 0}, "vllm: max_num_seqs is 0"),
        ({"gpu_memory_utilization": 1.1}, "vllm: gpu_memory_utilization is 1.1. It is a share, above 0 and at most 1."),
        ({"gpu_memory_utilization": 0.0}, "vllm: gpu_memory_utilization is 0.0"),
        ({"timeout": 0.0}, "vllm: timeout is 0.0. It counts seconds and is above 0."),
    ],
)
def test_how_vllm_runs_is_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        VllmOptions(**changes)
    with pytest.raises(ConfigError, match=re.escape(message)):
        config.load_job(None, {**JOB, "vllm": changes})


def test_an_unknown_option_of_vllm_is_named_with_the_closest() -> None:
    with pytest.raises(ConfigError, match=r"vllm: unknown key 'max_seqs'\. Did you mean 'max_num_seqs'\?"):
        config.load_job(None, JOB, ["vllm.max_seqs=3"])


def test_the_page_of_vllm_names_every_option() -> None:
    text = (ROOT / "docs" / "vllm.md").read_text(encoding="utf-8")
    keys = {field.name for field in fields(VllmOptions)}
    assert keys <= set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))


def test_the_page_of_jobs_names_every_key() -> None:
    text = (Path(__file__).parent.parent / "docs" / "batch.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+)`", text))
    keys = {field.name for table in (Job, Thresholds) for field in fields(table)}
    assert keys <= named, keys - named
