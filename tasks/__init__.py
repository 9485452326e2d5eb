"""Task packs, installed as `dllm_rl.tasks`."""
