"""Imports point down only (docs/architecture.md), and the mathematics needs nothing but torch and einops."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "dllm_rl"
LAYERS = (
    ("errors", "types", "task", "leaks", "statistics", "rows", "sandbox", "sandboxing", "memory",
     "run_folder"),
    ("diffusion", "models"),
    ("objectives", "advantages", "gae", "scoring", "accumulate", "diagnostics"),
    ("optimization", "checkpoint", "tracking", "experience", "offline", "evaluation", "evaluation_report", "supervised",
     "critic", "kl_reward", "drift", "training", "assess", "update", "trainer", "lm_eval_model"),
    ("config", "commands", "cli", "harness"),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
TASK_LAYER = 0  # task packs build on the foundation and are imported by the configuration


def imports(path: Path) -> set[str]:
    """Every module that a file imports, at the top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
    return found


def parts_used(path: Path) -> set[str]:
    """The parts of dllm_rl that a file imports: `diffusion` for dllm_rl.diffusion.noise."""
    return {name.split(".")[1] for name in imports(path) if name.startswith("dllm_rl.")}


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def test_every_module_has_a_layer() -> None:
    assert {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES} == set(LEVEL)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for used in parts_used(path):
        level = TASK_LAYER if used == "tasks" else LEVEL[used]
        assert level <= LEVEL[own], f"{own} (layer {LEVEL[own]}) imports {used} (layer {level})"
        assert used != "tasks" or own == "config", f"{own} imports a task pack; only the configuration may"


@pytest.mark.parametrize("path", sorted((PACKAGE.parent / "tasks").rglob("*.py")), ids=lambda path: path.name)
def test_task_packs_build_on_the_foundation(path: Path) -> None:
    assert all(used == "tasks" or LEVEL[used] == 0 for used in parts_used(path))


@pytest.mark.parametrize("folder", ["diffusion", "objectives"])
def test_the_mathematics_is_a_library_of_its_own(folder: str) -> None:
    allowed = {*sys.stdlib_module_names, "torch", "einops", "dllm_rl"}
    for path in sorted((PACKAGE / folder).glob("*.py")):
        foreign = {name.split(".")[0] for name in imports(path)} - allowed
        assert not foreign, f"{path.name} imports {foreign}"


def test_the_loop_can_be_read_in_one_sitting() -> None:
    assert len((PACKAGE / "trainer.py").read_text().splitlines()) <= 120
