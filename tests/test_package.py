"""What is imported and shipped is what pyproject.toml says, and no file tells of our machines."""

import ast
import functools
import importlib.metadata
import pathlib
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable, Iterator, Mapping

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NOT_FOR_USERS = {"dev", "oracles"}
HEAVY = {"flax", "grain", "jax", "jaxlib", "optax", "orbax.checkpoint", "tensorstore"}

# Bracketed letters keep these lines from matching themselves.
PRIVATE_PLACES = re.compile(
    r"pypi[.]org|python[h]osted|registry[.]npmjs|deb[.]debian"
    r"|(?<![\w.])[/](work|tmp|opt[/](pypi|wheels)|root[/][.]pyenv)\b"
    r"|\bshared[/]([A-Z]+[.]md|example|fixtures|hooks|tools)"
)


def repository_files(*under: str) -> list[pathlib.Path]:
    """Files that git tracks, or would if they were added."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *under]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    paths = [ROOT / name for name in sorted(set(listed.split("\0")) - {""})]
    return [path for path in paths if path.is_file()]


def requirement_names(requirements: list[str]) -> set[str]:
    """Normalised distribution names: "jax[tpu]>=0.10" is "jax"."""
    names = (re.match(r"[\w.-]+", requirement) for requirement in requirements)
    return {normalised(name.group()) for name in names if name}


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def top_level_modules(nodes: Iterable[ast.AST]) -> set[str]:
    """Outermost names of the foreign modules that these import statements import."""
    modules = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            modules |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules.add(node.module.partition(".")[0])
    return modules - sys.stdlib_module_names - {"l32jax"}


def outside_functions(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the file is imported."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
            yield from outside_functions(node)


@functools.cache  # reads every installed file list: seconds
def module_providers() -> Mapping[str, list[str]]:
    return importlib.metadata.packages_distributions()


def undeclared(modules: set[str], declared: set[str]) -> set[str]:
    """Modules that no declared distribution provides."""
    providers = module_providers()
    return {
        module
        for module in modules
        if not declared & {normalised(name) for name in providers.get(module, [module])}
    }


def test_no_file_names_a_registry_or_a_path_of_our_machines():
    told = []
    for path in repository_files():
        content = path.read_bytes()
        if b"\0" in content[:8192]:
            continue
        for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), 1):
            if found := PRIVATE_PLACES.search(line):
                told.append(f"{path.relative_to(ROOT)}:{number}: {found.group()}")
    assert not told, "\n".join(told)


@pytest.mark.parametrize("path", ["in !work/main", "!tmp", "'!tmp/x'", "file:!!!opt!pypi/simple"])
def test_the_pattern_finds_private_places(path):
    assert PRIVATE_PLACES.search(path.replace("!", "/"))


@pytest.mark.parametrize(
    "path", ["a/work/b", "data/workers", "shared/replicated", "gs://bucket.a/tmp"]
)
def test_the_pattern_passes_over_other_paths(path):
    assert not PRIVATE_PLACES.search(path)


def test_module_level_imports_are_dependencies_and_lazy_ones_at_least_an_extra():
    required = requirement_names(PROJECT["dependencies"])
    extras = PROJECT["optional-dependencies"]
    optional = set().union(
        *(requirement_names(extras[name]) for name in extras.keys() - NOT_FOR_USERS)
    )
    missing = {}
    for path in repository_files("l32jax/*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        eager = undeclared(top_level_modules(outside_functions(tree)), required)
        anywhere = undeclared(top_level_modules(ast.walk(tree)), required | optional)
        if eager | anywhere:
            missing[str(path.relative_to(ROOT))] = sorted(eager | anywhere)
    assert not missing


def test_every_requirement_is_pinned():
    """But for those that have an environment of their own (tests/environments)."""
    lines = (ROOT / "requirements" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = requirement_names([line for line in lines if not line.startswith("#")])
    extras = PROJECT["optional-dependencies"]
    shared = [extras[name] for name in extras if name not in ("beam", "ray")]
    wanted = requirement_names(sum(shared, start=PROJECT["dependencies"]))
    assert wanted - {"l32jax"} <= pinned


@pytest.mark.parametrize(
    "command",
    [
        ["-c", "import l32jax"],
        ["-m", "l32jax", "--help"],
        [str(pathlib.Path(sys.executable).with_name("l32jax")), "--help"],
    ],
    ids=["import", "module", "script"],
)
def test_it_starts_without_importing_jax(command):
    traced = [sys.executable, "-X", "importtime", *command]
    done = subprocess.run(traced, cwd=ROOT, capture_output=True, text=True, timeout=120)
    told = done.stderr.splitlines()
    trace = [line for line in told if line.startswith("import time:")]
    assert done.returncode == 0, "\n".join(line for line in told if line not in trace)
    assert not HEAVY & {line.rpartition("|")[2].strip() for line in trace}


def test_the_wheel_holds_the_package_and_nothing_else(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel"]
    subprocess.run([*build, "--directory", tmp_path], cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    shipped = {name for name in names if ".dist-info/" not in name}
    assert shipped == {path.relative_to(ROOT).as_posix() for path in repository_files("l32jax")}
