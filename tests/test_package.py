"""The wheel holds everything, and works from any directory."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel, built from a copy so that no build folder is left in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        if (REPOSITORY / name).is_file():
            target = folder / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((REPOSITORY / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", folder]
    subprocess.run([*pip, folder / "source"], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_configuration_tasks_and_licence(installed: Path) -> None:
    top = {path.name for path in installed.iterdir()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"dllm_rl"}, "no package called conf or tasks"
    for source, target in (("conf", "dllm_rl/conf"), ("tasks", "dllm_rl/tasks"), ("dllm_rl", "dllm_rl")):
        for path in (REPOSITORY / source).rglob("*"):
            if path.suffix in (".py", ".yaml"):
                assert (installed / target / path.relative_to(REPOSITORY / source)).is_file(), f"{path} is not in the wheel"
    assert list(installed.glob("*.dist-info/licenses/LICENSE"))


def test_the_wheel_works_from_any_directory(installed: Path, tmp_path: Path) -> None:
    def python(*arguments: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(installed)}
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout

    where = python("-c", "import dllm_rl.conf as c, dllm_rl.tasks as t; print(c.__file__, t.__file__)")
    assert where.count(str(installed)) == 2
    assert yaml.safe_load(python("-m", "dllm_rl.cli", "train", "--cfg", "job"))["likelihood"]["num_samples"] == 16
    assert not list(tmp_path.iterdir())


def test_constraints_pin_every_dependency() -> None:
    """Every core dependency of pyproject.toml has a known-good version."""
    pins = {line.split("==")[0] for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if "==" in line}
    block = (REPOSITORY / "pyproject.toml").read_text().split("dependencies = [")[1].split("]")[0]
    names = {line.strip().strip('",').split(">=")[0].split("[")[0] for line in block.splitlines() if line.strip()}
    assert names and names <= pins
