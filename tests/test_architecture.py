"""Who may import whom, who may use what, and how long a file may be."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "l32jax"
FILES = sorted(ROOT.rglob("*.py"))

# Each floor imports only from those below it, and from itself. Floors beside each other are
# strangers.
FLOORS = [
    {"errors", "config", "config_text", "objective_config", "run_config", "rounds_config"},
    {"cluster"},
    {"presets", "recipes", "post_training"},
    {"sharding"},
    {"kernels"},
    {"model"},
    {"checkpoint", "data"},
    {"compress", "generate", "train"},
    {"align"},
    {"api"},
    {"conversion", "evaluate", "plan"},
    {"quickstart", "rounds"},
    {"cli"},
    {"__main__"},
]
NARROW = {  # fewer than their floor would allow
    "errors": set(),
    "config": {"errors"},
    "cluster": {"errors"},
    "config_text": {"errors"},
    "objective_config": {"errors", "config"},
    "run_config": {"errors", "config", "objective_config"},
    "rounds_config": {"errors", "config", "objective_config", "run_config"},
    "recipes": {"config", "objective_config", "run_config"},
    "post_training": {"config", "objective_config", "run_config", "recipes"},
    "data": {
        "errors",
        "config",
        "config_text",
        "objective_config",
        "run_config",
        "sharding",
        "kernels",
    },
    "checkpoint": {"errors", "config", "config_text", "sharding", "model"},
}
NNX = {
    "Module", "Param", "List", "Rngs", "merge", "state", "graphdef", "eval_shape", "to_pure_dict",
    "GraphDef",
}  # fmt: skip
ONLY_IN = {"flax": "model/", "orbax": "checkpoint/store.py", "grain": "data/"}
MAX_LINES, MAX_KERNEL_LINES = 300, 450


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def part_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module that is imported anywhere, in functions too, by its full name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide which floor is meant"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_parts(tree: ast.AST) -> set[str]:
    names = (name.split(".") for name in imported(tree))
    return {name[1] for name in names if name[0] == "l32jax" and len(name) > 1}


def floor(part: str) -> int:
    (index,) = (index for index, parts in enumerate(FLOORS) if part in parts)
    return index


def may_import(part: str) -> set[str]:
    below = set().union(*FLOORS[: floor(part)])
    return NARROW.get(part, below) | {part}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_down(path):
    part = part_of(path)
    if part == "__init__":
        return
    wrong = own_parts(ast.parse(path.read_text())) - may_import(part)
    assert not wrong, f"{part} must not import {sorted(wrong)}"


ENGINE_MAY_IMPORT = {"engine", "failures", "fields"}  # of `checkpoint`: it knows no format


@pytest.mark.parametrize("path", sorted((ROOT / "checkpoint/engine").glob("*.py")), ids=name_of)
def test_the_engine_of_checkpoints_knows_no_format(path):
    names = (name.split(".") for name in imported(ast.parse(path.read_text())))
    used = {name[2] for name in names if name[:2] == ["l32jax", "checkpoint"] and len(name) > 2}
    assert used <= ENGINE_MAY_IMPORT


def test_every_part_has_a_floor():
    parts = {part_of(path) for path in FILES} - {"__init__"}
    assert parts <= set().union(*FLOORS)


@pytest.mark.parametrize("library", ONLY_IN)
def test_libraries_stay_in_their_room(library):
    users = {
        name_of(path)
        for path in FILES
        if any(name.split(".")[0] == library for name in imported(ast.parse(path.read_text())))
    }
    assert users
    assert {user for user in users if not user.startswith(ONLY_IN[library])} == set()


@pytest.mark.parametrize("path", sorted((ROOT / "model").glob("*.py")), ids=name_of)
def test_of_flax_only_the_chosen_names_are_used(path):
    tree = ast.parse(path.read_text())
    flax = {name for name in imported(tree) if name.split(".")[0] == "flax"}
    assert flax <= {"flax", "flax.nnx"}
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "nnx"
    }
    assert used <= NNX


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_are_short(path):
    limit = MAX_KERNEL_LINES if part_of(path) == "kernels" else MAX_LINES
    assert len(path.read_text().splitlines()) <= limit
