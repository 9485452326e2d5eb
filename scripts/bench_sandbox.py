"""Cost per call of the sandbox, and what the attacks on it achieve.

`calls_per_second` is the rate of trivial programs in batches of 128 with one worker per processor, `p50_ms` and `p99_ms` the
latency of single calls, `attacks` how many were tried (each on calls and on assertions), earned a reward or took their loot
home, hung, and left something behind. The machine's other load counts: compare figures of one run only.

    scripts/bench_sandbox --json bench_sandbox.json
    scripts/bench_sandbox --allow-unisolated     without bubblewrap, and only the attacks that this must stop
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

from bench_common import parser, timed, write_json
from sandbox_attacks import World, in_scope

from dllm_rl import sandbox
from dllm_rl.sandbox import Call, Limits, Program, SandboxConfig, configure, run_programs

BATCH = 128
ATTACK_SECONDS = 1.0
HUNG_SECONDS = 10.0  # over both programs of an attack, which have a worker each


def trivial(number: int) -> Program:
    return Program("", tuple(Call(f"x*{number}+1", x * number + 1, {"x": x}) for x in range(5)))


def rate(calls: int) -> float:
    """Programs per second, the second time, when workers are there."""
    programs = [trivial(number) for number in range(calls)]
    batches = [programs[start:start + BATCH] for start in range(0, calls, BATCH)]
    run_programs(batches[0])
    return calls / timed(lambda: [run_programs(batch) for batch in batches])


def latencies(singles: int) -> list[float]:
    """Milliseconds of calls that each bring one program, sorted."""
    return sorted(1000 * timed(lambda: run_programs([trivial(1)])) for _ in range(singles))


def attack(world: World, names: list[str]) -> dict[str, int]:
    found = {"tried": len(names), "accepted": 0, "hung": 0, "left_over": 0}
    for name in names:
        started = time.perf_counter()
        outcomes = run_programs(world.programs(name), Limits(seconds=ATTACK_SECONDS, workers=2))
        seconds = time.perf_counter() - started
        harm = world.harm()
        accepted = any(outcome.status == "ok" or world.secret in outcome.error for outcome in outcomes)
        for key, happened in (("accepted", accepted), ("hung", seconds > HUNG_SECONDS), ("left_over", bool(harm))):
            found[key] += happened
            if happened:
                print(f"{key}: {name} {[outcome.status for outcome in outcomes]} {seconds:.1f} s {harm}")
    return found


def main() -> None:
    options_of = parser(__doc__, {"calls": 512, "singles": 200, "attacks": 0})
    options_of.add_argument("--allow-unisolated", action="store_true", help="if bubblewrap does not work")
    options = options_of.parse_args()
    configure(SandboxConfig(allow_unisolated=options.allow_unisolated))
    per_second, singles = rate(options.calls), latencies(options.singles)
    figures = {"calls_per_second": per_second, "p50_ms": statistics.median(singles),
               "p99_ms": singles[min(len(singles) - 1, int(0.99 * len(singles)))]}
    isolated = sandbox._launch(options.allow_unisolated).isolated
    names = in_scope(isolated)[: options.attacks or None]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        with World(Path(folder) / "world") as world:
            figures["attacks"] = attack(world, names)
    print(f"isolated: {isolated}; {per_second:.0f} calls/s; p50 {figures['p50_ms']:.1f} ms, p99 {figures['p99_ms']:.1f} ms")
    print(f"attacks: {figures['attacks']}")
    write_json(options.json, figures)


if __name__ == "__main__":
    main()
