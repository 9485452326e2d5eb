"""The exact ELBO of a short completion: every non-empty mask once.

L tokens have 2^L - 1 masks, so that 4 tokens take 15 forward passes: fewer than 16 Monte Carlo draws, and no noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

import torch
from einops import rearrange

from dllm_rl.diffusion.corruption import Choice, Draw, Likelihood, positions


@dataclass
class Enumeration(Likelihood):
    """Draw j hides the tokens whose bits are set in j + 1. `num_samples` must be 2^L - 1.

    B = Σ over non-empty M of S(M) / (k C(L, k)), with k = |M| and S as in `estimators`.

    Example: L = 2, the draws hide token 0, token 1 and both, with weights 3/2, 3/2 and 3/2.
    """

    def choose(self, draw: Draw) -> Choice:
        """The mask with number j + 1."""
        size = draw.region.shape[1]
        assert draw.region.all() and self.num_samples == 2**size - 1
        hidden = (rearrange(draw.sample + 1, "b -> b 1") >> positions(draw.region)) & 1 == 1
        weights = [0.0, *(self.num_samples / (k * comb(size, k)) for k in range(1, size + 1))]
        return Choice(hidden, hidden, torch.tensor(weights, dtype=torch.float64, device=hidden.device)[hidden.sum(1)])
