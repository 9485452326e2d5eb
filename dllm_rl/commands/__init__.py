"""One module per command of `dllm-rl`."""
