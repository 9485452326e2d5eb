"""How completions are corrupted, scored and sampled. A library of its own: torch and einops only."""
