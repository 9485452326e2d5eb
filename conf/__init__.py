"""Hydra configuration, installed as `dllm_rl.conf`."""
