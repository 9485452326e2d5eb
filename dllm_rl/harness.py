"""lm-eval's command line with this library's model in it.

    python -m dllm_rl.harness --model dllm_rl --model_args path=RUN,num_samples=32 --tasks arc_easy --batch_size 64

lm-eval knows the models of its own registry and reads no entry points (0.4.13), so that ours is registered here; everything
after that is lm-eval's. The arguments of the model are those of `dllm_rl.lm_eval_model.MaskedDiffusionLM`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec

from dllm_rl.errors import UserError


def main() -> None:
    """Runs lm-eval. Mistakes of the user end the process with one line on stderr and exit code 2."""
    try:
        if find_spec("lm_eval") is None:
            raise UserError("lm-eval is not installed: pip install 'dllm-rl[eval]'")
        import_module("dllm_rl.lm_eval_model")
        import_module("lm_eval.__main__").cli_evaluate()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
