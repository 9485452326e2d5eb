"""Masked-diffusion language models trained with reinforcement learning."""

__version__ = "0.1.0"
