"""compact_accepted from its definition: read all rows, then write them."""

from __future__ import annotations

from torch import Tensor


def compact_accepted(
    caches: list[Tensor], accepted: Tensor, num_accepted: Tensor, *, tail: int, slack: Tensor | None = None
) -> list[Tensor]:
    """The caches afterwards."""
    results = []
    for cache in caches:
        result, end = cache.clone(), cache.shape[2]
        for b in range(cache.shape[0]):
            begin = end - tail - (0 if slack is None else int(slack[b]))
            for i in range(int(num_accepted[b]) + 1):
                result[b, :, begin + i] = cache[b, :, end - tail + int(accepted[b, i])]
        results.append(result)
    return results
