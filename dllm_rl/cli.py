"""The `dllm-rl` command: hands over to one of the commands."""

from __future__ import annotations

import sys
from importlib import import_module

from dllm_rl import __version__

COMMANDS = {
    "sft": "supervised fine-tuning on a task's demonstrations",
    "train": "learn from rewards: reinforcement learning (BGPO and others), or from a file (RPO, DRO, KTO, ...)",
    "rollout": "write scored completions of a policy to a file, or score a file with a reward model",
    "evaluate": "greedy and sampled accuracy with 95 % intervals",
    "export": "write a model for others: published or transformers' format, adapters merged",
    "generate": "sample completions and watch the order of unmasking",
}
USAGE = f"""dllm_rl {__version__}: reinforcement learning for masked-diffusion language models

usage: dllm-rl COMMAND [GROUP=OPTION ...] [KEY=VALUE ...]
       dllm-rl COMMAND --help        groups, keys and defaults of a command
       dllm-rl COMMAND -m KEY=A,B    one run per value

commands:
""" + "\n".join(f"  {name:10}{what}" for name, what in COMMANDS.items())


def main() -> None:
    """Entry point of `dllm-rl`. Only the chosen command is imported, so `dllm-rl --help` is quick."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help", "help"):
        print(USAGE)
        return
    command = sys.argv.pop(1)
    if command == "--version":
        print(__version__)
        return
    if command not in COMMANDS:
        print(f"error: unknown command {command}: must be one of {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    import_module(f"dllm_rl.commands.{command}").main()


if __name__ == "__main__":
    main()
