"""No attack earns a reward, and each leaves the machine as it was. The attacks are in scripts/sandbox_attacks.txt."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest

from dllm_rl import sandbox
from dllm_rl.errors import UserError
from dllm_rl.sandbox import Assertion, Call, Limits, Program, SandboxConfig, configure, run_programs
from dllm_rl.sandboxing import isolation
from tests.sandbox_ways import ATTACKS, WAYS, World, choose_way, in_scope

ADD = (Call("add(2, 3)", 5), Assertion("assert add(4, 5) == 9"))
HONEST = Program("import time\ntime.sleep(0.01)\ndef add(a, b): return a + b", ADD)
MISTAKEN = Program("def add(a, b): return a - b", ADD)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with World(tmp_path / "world") as world:
        yield world


def test_the_catalogue() -> None:
    assert len(ATTACKS) >= 100 and len(in_scope(isolated=False)) >= 80
    assert len({attack.source for attack in ATTACKS.values()}) == len(ATTACKS)
    assert set(in_scope(isolated=True)) == set(ATTACKS)


@pytest.mark.parametrize(("way", "name"), [(way, name) for way in WAYS for name in in_scope(way == "isolated")])
def test_attack_fails_and_leaves_the_machine_as_it_was(world: World, way: str, name: str) -> None:
    with choose_way(way):
        outcomes = run_programs(world.programs(name), Limits(seconds=0.7, workers=2))
        assert [outcome.status for outcome in outcomes if outcome.status not in ("failed", "timeout")] == []
        assert world.secret not in "".join(outcome.error for outcome in outcomes)
        assert world.harm() == []


def test_the_world_sees_harm(world: World) -> None:
    """What the attacks are measured by: without isolation, some of them succeed."""
    with choose_way("unisolated"):
        for name in ("home folder", *(["environment of others"] if os.geteuid() else [])):  # root without rights may not
            assert "ok" in {outcome.status for outcome in run_programs(world.programs(name), Limits(seconds=20))}, name
    assert world.harm() == []
    (world.marker / "x").touch()
    assert world.harm() == [f"file {world.marker / 'x'}"]
    (world.marker / "x").unlink()
    world.canary.write_text("dead")
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    extra = os.dup(0)
    assert [text.split()[0] for text in world.harm()] == ["the", "process", "descriptors"]
    os.close(extra)


# What an isolated program can see


def values(*pairs: tuple[str, object]) -> list[str]:
    """The expressions that have another value than expected in an isolated program, with that value."""
    with choose_way("isolated"):
        program = Program("import os\ndef tried(f, *a):\n    try: return f(*a)\n"
                          "    except OSError as e: return e.errno", [Call(*pair) for pair in pairs])
        outcomes = run_programs([Program(program.source, [test]) for test in program.tests], Limits(seconds=20))
    return [outcome.error for outcome in outcomes if outcome.status != "ok"]


def test_an_isolated_program_sees_next_to_nothing() -> None:
    home = [part for part in Path(isolation.interpreter()).parts[:2] if part != "/"]
    top = {"bin", "lib", "lib32", "lib64", "sbin", "usr", "etc", "dev", "proc", "sandbox", "tmp", "scratch", "nix", "gnu"}
    assert values(
        (f"set(os.listdir('/')) - {top | set(home)!r}", set()),
        ("sorted(os.listdir('/dev'))", sorted(isolation._DEVICES)),
        ("os.listdir('/etc')", ["ld.so.cache"] if Path("/etc/ld.so.cache").exists() else []),
        ("sorted(os.listdir('/sandbox/dllm_rl'))", ["__init__.py", "sandboxing"]),
        ("dict(os.environ)", {}), ("os.getpid()", 1), ("os.getppid()", 0),
        (f"{{os.getuid(), os.getgid()}} & {{0, {os.getuid()}, {os.getgid()}}}", set()),
        ("[n for n in os.listdir('/proc') if n.isdigit() and int(n) > 999]", []),
        ("open('/proc/net/dev').read().count(':')", 1),
        ("open('/proc/self/status').read().split('CapEff:')[1].split()[0]", "0" * 16),
        ("open('/proc/self/status').read().split('CapPrm:')[1].split()[0]", "0" * 16),
        ("open('/proc/self/status').read().split('NoNewPrivs:')[1].split()[0]", "1"),
    ) == []


def test_an_isolated_program_can_write_to_its_own_folder_only() -> None:
    places = ("/", "/usr", "/dev", "/proc", "/sandbox", "/sandbox/dllm_rl/sandboxing", "/etc", "/proc/sys/kernel")
    assert values(
        *((f"tried(open, '{place}/x', 'w')  in (1, 2, 13, 30)", True) for place in places),
        ("tried(open, os.__file__, 'r+') in (13, 30)", True),
        ("os.statvfs('.').f_blocks * os.statvfs('.').f_frsize", isolation.DISK_MB << 20),
        ("os.ST_NOSUID | os.ST_NODEV | os.ST_NOEXEC | os.statvfs('.').f_flag == os.statvfs('.').f_flag", True),
        ("open('x', 'w').write('x')", 1),
    ) == []


def test_installed_packages_and_the_project_are_not_there() -> None:
    names = ("dllm_rl.sandbox", "torch", "numpy", "pip", "pytest")
    source = f"import sys, glob\nfor prefix in {sorted({sys.base_prefix, '/usr', '/usr/local'})!r}:\n" \
             "    sys.path += glob.glob(prefix + '/lib*/python3*/*-packages')\n"
    with choose_way("isolated"):
        outcomes = run_programs([Program(source + f"import {name}", [Call("1", 1)]) for name in names], Limits(seconds=20))
    assert all("ModuleNotFoundError" in outcome.error for outcome in outcomes)


# Without bubblewrap


@pytest.fixture
def fresh() -> Iterator[None]:
    sandbox._launch.cache_clear()
    yield
    sandbox._launch.cache_clear()
    configure(SandboxConfig(allow_unisolated=True))


@pytest.mark.usefixtures("fresh")
def test_programs_without_isolation_need_consent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "executable", lambda: None)
    configure(SandboxConfig())
    with pytest.raises(UserError) as error:
        run_programs([HONEST])
    assert str(error.value) == ("sandbox: bubblewrap (bwrap) is not installed; install it (apt install bubblewrap) or "
                                "accept programs that run without isolation with sandbox.allow_unisolated=true")
    configure(SandboxConfig(allow_unisolated=True))
    with pytest.warns(UserWarning, match="without isolation, because bubblewrap .bwrap. is not installed") as caught:
        assert [run_programs([HONEST])[0].status for _ in range(2)] == ["ok"] * 2
    assert len(caught) == 1


@pytest.mark.usefixtures("fresh")
def test_bubblewrap_that_does_not_work_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    broken.chmod(broken.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setattr(isolation, "executable", lambda: str(broken))
    configure(SandboxConfig())
    with pytest.raises(UserError, match=r"not work here \(the worker ended with code 1 bwrap: No permissions to create"):
        run_programs([HONEST])
    configure(SandboxConfig(allow_unisolated=True))
    with pytest.warns(UserWarning, match="No permissions to create new namespace"):
        assert run_programs([HONEST])[0].status == "ok"


# Under load


def soak(world: World, calls: int, workers: int) -> list[str]:
    """What went wrong in so many calls by so many threads, half of them attacks."""
    rng, kinds = Random(0), ["honest", "mistaken", *in_scope(isolated=True)]
    rng.shuffle(kinds)
    drawn = [kinds[n // 2 % len(kinds)] if n % 2 else rng.choice(("honest", "mistaken")) for n in range(calls)]
    rng.shuffle(drawn)

    def call(kind: str) -> str:
        if kind in ATTACKS:
            outcome = run_programs([rng.choice(world.programs(kind))], Limits(seconds=1, workers=1))[0]
            return "" if outcome.status in ("failed", "timeout") else f"{kind}: {outcome}"
        outcome = run_programs([HONEST if kind == "honest" else MISTAKEN], Limits(seconds=60, workers=1))[0]
        return "" if outcome.status == {"honest": "ok", "mistaken": "failed"}[kind] else f"{kind}: {outcome}"

    with ThreadPoolExecutor(workers) as threads:
        wrong = [text for text in threads.map(call, drawn) if text]
    return [*wrong, *world.harm()]


@pytest.mark.parametrize("calls", [150, pytest.param(1000, marks=pytest.mark.heavy)])
def test_many_calls_with_attacks_among_them(world: World, calls: int) -> None:
    with choose_way("isolated"):
        assert soak(world, calls, workers=8) == []


def test_the_benchmark_writes_its_figures(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "scripts" / "bench_sandbox.py"
    with choose_way("isolated"):
        sizes = ["--calls", "8", "--singles", "3", "--attacks", "2"]
        command = [sys.executable, str(script), *sizes, "--json", str(tmp_path / "f.json")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["calls_per_second"] > 0 and 0 < figures["p50_ms"] <= figures["p99_ms"]
    assert figures["attacks"] == {"tried": 2, "accepted": 0, "hung": 0, "left_over": 0}
