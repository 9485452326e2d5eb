"""Objectives: pure functions of log-probabilities and advantages. A library of its own: torch and einops only."""
