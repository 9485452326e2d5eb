"""Fine-tunes a tiny diffusion language model on faulty demonstrations of three tasks and mends it with BGPO.

Started by `scripts/quickstart`. Every step is one of the `dllm-rl` commands that it prints; two run at a time, one thread
each. Results go to outputs/quickstart/.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dllm_rl.tracking import table

ROOT = Path("outputs/quickstart")
COMMAND = Path(sys.executable).with_name("dllm-rl")
# Longest first, so that two workers end at about the same time.
UNISOLATED = ("sandbox.allow_unisolated=true",)  # expressions of a tiny model; bubblewrap is used where it is there
TASKS = ("sudoku", "program_synthesis", "word_problems")


def commands(task: str) -> list[list[str]]:
    """Arguments of `dllm-rl` for one task: fine-tuning, then BGPO from its result."""
    sft, train = ROOT / f"{task}-sft", ROOT / f"{task}-bgpo"
    return [
        ["sft", f"task={task}", f"run_dir={sft}", "resume=overwrite"],
        ["train", "algorithm=bgpo", f"task={task}", f"model.path={sft}", "likelihood.num_samples=4",
         f"run_dir={train}", "resume=overwrite", *(UNISOLATED if task == "program_synthesis" else ())],
    ]


def run_task(task: str) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "0"}
    for arguments in commands(task):
        print(f"[{clock():>4.0f} s] {COMMAND.name} {' '.join(arguments)}", flush=True)
        log = ROOT / f"{task}-{arguments[0]}.log"
        with log.open("w") as stream:
            done = subprocess.run([COMMAND, *arguments], stdout=stream, stderr=subprocess.STDOUT, env=environment)
        if done.returncode:
            raise SystemExit(f"{COMMAND.name} {arguments[0]} failed, see {log}:\n{log.read_text()[-2000:]}")
    return result(ROOT / f"{task}-bgpo")


def result(run: Path) -> dict[str, Any]:
    """First and last evaluation of a training run, with intervals."""
    rows = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    moments, modes = {"before": rows[0], "after": rows[-1]}, ("greedy", "sampled")
    values = {when: {mode: row[f"{mode}/reward"] for mode in modes} for when, row in moments.items()}
    intervals = {when: {mode: row["intervals"][f"{mode}/reward"] for mode in modes} for when, row in moments.items()}
    return {**values, "intervals": intervals, "n": rows[0]["n"]}


def clock() -> float:
    """Seconds since `scripts/quickstart` was started, installation included."""
    return time.time() - float(os.environ.get("QUICKSTART_BEGAN", time.time()))


def show(tasks: dict[str, Any]) -> None:
    def cell(task: dict[str, Any], when: str, mode: str) -> str:
        low, high = task["intervals"][when][mode]
        return f"{task[when][mode]:.2f} [{low:.2f},{high:.2f}]".replace("0.", ".")

    table(
        ("task", "greedy before", "greedy after", "sampled before", "sampled after"),
        [(name, *(cell(task, when, mode) for mode in ("greedy", "sampled") for when in ("before", "after")))
         for name, task in tasks.items()],
        title=f"accuracy on {min(task['n'] for task in tasks.values())} held-out prompts, with 95 % intervals",
    )


def main() -> None:
    ROOT.mkdir(parents=True, exist_ok=True)
    print("Fine-tuning on demonstrations with a systematic mistake, then BGPO on the reward. Logs: " + str(ROOT))
    with ThreadPoolExecutor(max_workers=2) as pool:
        tasks = dict(zip(TASKS, pool.map(run_task, TASKS), strict=True))
    seconds = clock()
    (ROOT / "results.json").write_text(json.dumps({"seconds": seconds, "tasks": tasks}, indent=1))
    show(tasks)
    run = ROOT / "sudoku-bgpo"
    print(f"""{seconds:.0f} seconds in all.
figures       {ROOT / 'results.json'}
reward curves {' '.join(str(ROOT / f'{task}-bgpo/plots/reward.png') for task in TASKS)}
every run     config.yaml, metrics.jsonl, rollouts.jsonl, checkpoints/ in {ROOT}/TASK-bgpo

next, in this folder:
  source .venv/bin/activate
  dllm-rl generate task=sudoku model.path={run} count=1 watch=true
  dllm-rl train task=sudoku model.path={ROOT / 'sudoku-sft'} likelihood.num_samples=16
  dllm-rl train -m task=sudoku model.path={ROOT / 'sudoku-sft'} likelihood.num_samples=1,4 seed=0,1
  dllm-rl evaluate task=sudoku model.path={run} task.data=PUZZLES.csv
  dllm-rl train --help""")


if __name__ == "__main__":
    main()
