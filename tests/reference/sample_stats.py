"""sample_stats from its definition, in float64; a draw as the interval of uniform numbers that give each token."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.reference.philox import philox


def sample_stats(logits: Tensor, token: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The greedy token, or the one given, and what is said of it."""
    x = logits.double()
    p = x.softmax(-1)
    token = x.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).argmax(-1) if token is None else token
    logprob = x.log_softmax(-1).gather(1, token.unsqueeze(1)).squeeze(1)
    entropy = -torch.where(p > 0, p * x.log_softmax(-1), torch.where(p == 0, 0.0, p)).sum(-1)
    best = torch.nn.functional.pad(p, (0, 1)).topk(2).values
    return token, logprob, entropy, torch.where(p.isnan().any(-1), torch.nan, best[:, 0] - best[:, 1])


def interval(logits: Tensor, temperature: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    """The cumulative probabilities before and after the token."""
    p = (logits.double() / temperature.double().unsqueeze(1)).softmax(-1)
    through = p.cumsum(-1).gather(1, token.unsqueeze(1)).squeeze(1)
    return through - p.gather(1, token.unsqueeze(1)).squeeze(1), through


def uniform(seed: int, position: int) -> float:
    """The draw of one row: the first two words of its stream, as a multiple of 2^-53."""
    high, low = philox((0, 0, position % 2**32, 16), (seed % 2**32, (seed >> 32) % 2**32))[:2]
    return ((high << 32 | low) >> 11) * 2.0**-53
