"""The zoo's methods that merge after the encoder, in plain loops over float64, written from their papers' formulas.

A method gets one image's tokens [n, C] and returns rows (a list of vectors) and owner (the row of each token, -1 for a
dropped one); or one video's [F, n, C], and returns rows image after image, counts (an image), owner (a list an image).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.reference.cluster_dpc_knn import density_peaks, nearest_center, squared_distances
from tests.reference.cluster_kmedoids import medoids_of
from tests.reference.recipes import cls_scores, cosine, top
from tests.reference.temporal_segments import cut_row


def mean(vectors: list[Tensor]) -> Tensor:
    return sum(vectors[1:], vectors[0]) / len(vectors)


def halve(rows: list[Tensor], r: int) -> tuple[list[Tensor], list[int]]:
    """One pass of bipartite merging, and the new row of each old one."""
    even, odd = range(0, len(rows), 2), range(1, len(rows), 2)
    best = {i: max(odd, key=lambda j: (cosine(rows[i], rows[j]), -j)) for i in even}
    ranked = sorted(even, key=lambda i: (-cosine(rows[i], rows[best[i]]), i))
    sources, stay = ranked[:r], ranked[r:]
    place = {token: row for row, token in enumerate([*stay, *odd])}
    merged = [rows[i] for i in stay] + [mean([rows[j], *(rows[i] for i in sources if best[i] == j)]) for j in odd]
    return merged, [place[best[i] if i in sources else i] for i in range(len(rows))]


def aim(tokens: Tensor, keep: int) -> tuple[list[Tensor], list[int]]:
    rows, owner = list(tokens), list(range(len(tokens)))
    while len(rows) > keep:
        rows, moved = halve(rows, min(len(rows) - keep, len(rows) // 2) if len(rows) // 2 > keep else len(rows) - keep)
        owner = [moved[row] for row in owner]
    return rows, owner


def vflowopt(
    tokens: Tensor, attention: Tensor, has_cls: bool, width: int, keep: int, threshold: float, cell: float
) -> tuple[list[Tensor], list[int]]:
    """``attention`` [H, S, S] of one image."""
    a = attention.mean(0)
    first = int(has_cls)
    n = len(tokens)
    received = [float(a[:, first + j].mean()) for j in range(n)]
    anchors = [i for i in range(n) if received[i] > threshold * sum(received) / n] or list(range(n))
    importance = [sum(float(a[first + i, first + j]) for i in anchors) / len(anchors) for j in range(n)]
    stay = top(importance, max(0, keep - int(n / cell**2)))
    cells: dict[tuple[int, int], list[int]] = {}
    for j in range(n):
        if j not in stay:
            cells.setdefault((math.floor(j // width / cell), math.floor(j % width / cell)), []).append(j)
    groups = {j: [j] for j in stay}
    for members in cells.values():
        groups[top(importance, 1, among=set(members))[0]] = members
    rows, owner = [], [-1] * n
    for leader in sorted(groups):
        weight = sum(importance[j] for j in groups[leader])
        for j in groups[leader]:
            owner[j] = len(rows)
        rows.append(sum(importance[j] * tokens[j] for j in groups[leader]) / weight)
    return rows, owner


def sit(tokens: Tensor, weights: dict[str, Tensor]) -> tuple[list[Tensor], list[int]]:
    """``weights``: of the module, by its parameters' names."""
    votes = []
    for x in tokens:
        centred = x - x.mean()
        x = centred / math.sqrt(float((centred**2).mean()) + 1e-5) * weights["norm.weight"] + weights["norm.bias"]
        x = weights["down.weight"] @ x + weights["down.bias"]
        x = 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
        votes.append((weights["vote.weight"] @ x + weights["vote.bias"]) * weights["scale"])
    slots = len(votes[0])
    share = [
        [math.exp(float(vote[s])) / sum(math.exp(float(v[s])) for v in votes) for s in range(slots)] for vote in votes
    ]
    rows = [sum(w[s] * x for w, x in zip(share, tokens, strict=True)) for s in range(slots)]
    return rows, [max(range(slots), key=lambda s: (w[s], -s)) for w in share]


def outliers(values: list[float], k: int) -> int:
    """Values with a local outlier factor above 1.5."""
    n = len(values)
    if n < 2:
        return 0
    near = []
    for i in range(n):
        near.append(sorted((j for j in range(n) if j != i), key=lambda j: (abs(values[i] - values[j]), j))[:k])
    reach = [abs(values[i] - values[near[i][-1]]) for i in range(n)]
    density = []
    for i in range(n):
        distances = [max(reach[j], abs(values[i] - values[j])) for j in near[i]]
        density.append(1 / (sum(distances) / len(distances) + 1e-10))
    factor = [sum(density[j] for j in near[i]) / len(near[i]) / density[i] for i in range(n)]
    return sum(f > 1.5 for f in factor)


def recoverable_compression(
    tokens: Tensor, attention: list[float], text: list[float], keys: Tensor, keep: int
) -> tuple[list[Tensor], list[int]]:
    n = len(tokens)
    seen = top(attention, min(keep, max(1, int(n * (outliers(attention, 20) / n)))))
    text_left = [min(text) if j in seen else text[j] for j in range(n)]
    wanted = int((n - len(seen)) * (outliers(text_left, 20) / n))
    read = top(text_left, min(wanted, keep - len(seen)), among=set(range(n)) - set(seen))
    main = sorted(seen + read)
    rest = [j for j in range(n) if j not in main]
    rows, owner = [tokens[j] for j in main], [-1] * n
    for row, j in enumerate(main):
        owner[j] = row
    share = outliers([attention[j] for j in rest], 10) / max(1, len(rest))
    centers = top(attention, max(0, min(int(len(main) * share), keep - len(main) - 1)), among=set(rest))
    if not centers:
        return rows, owner
    for c in centers:
        owner[c] = len(rows)
        closeness = {j: cosine(keys[c], keys[j]) + 50 * text[j] for j in rest if j != c}
        near = sorted(closeness, key=lambda j: (-closeness[j], j))[:32]
        rows.append(tokens[c] + sum(attention[j] * tokens[j] for j in near))
    others = [j for j in rest if j not in centers]
    for j in others:
        owner[j] = len(rows)
    rows.append(sum(attention[j] * tokens[j] for j in others))
    return rows, owner


def stc_pruner(frames: Tensor, keep: int, score: str) -> list[list[int]]:
    """The kept tokens of each frame."""
    kept = []
    for f, tokens in enumerate(frames):
        history = mean([mean(list(frame)) for frame in frames[: f + 1]])
        if score == "dual_anchor":
            anchors = [history, mean(list(tokens))]
            likeness = [sum(cosine(x, anchor) for anchor in anchors) for x in tokens]
        else:
            variance = [float(((tokens[:, c] - tokens[:, c].mean()) ** 2).mean()) for c in range(tokens.shape[1])]
            steady = sorted(sorted(range(len(variance)), key=lambda c: (variance[c], c))[: len(variance) // 2])
            unit = [x[steady] / x[steady].norm() for x in tokens]
            anchors = [mean(unit), history[steady] / history[steady].norm()]
            likeness = [
                sum(math.exp(-float(((x - m) ** 2).sum()) / (2 * a)) for m in anchors for a in (0.125, 0.25, 0.5, 1, 2))
                for x in unit
            ]
        kept.append(sorted(top([-value for value in likeness], keep)))
    return kept


def nearest(metric: Tensor, token: int, centers: list[int]) -> int:
    """The number of the most similar center."""
    return max(range(len(centers)), key=lambda c: (cosine(metric[token], metric[centers[c]]), -c))


def visiondrop(
    tokens: Tensor, attention: Tensor, keys: Tensor, keep: int, share: float
) -> tuple[list[Tensor], list[int]]:
    """``attention`` [H, S, S], ``keys`` [H, n, D] of one image."""
    n, contextual = len(tokens), round(keep * share)
    dominant = sorted(top(cls_scores(attention), keep - contextual))
    others = [j for j in range(n) if j not in dominant]
    step = max(1, len(others) // max(1, contextual))
    targets = others[::step][:contextual]
    metric = keys.mean(0)
    rows, owner = [tokens[j] for j in dominant], [-1] * n
    for row, j in enumerate(dominant):
        owner[j] = row
    if not targets:
        return rows, owner
    choice = {j: targets.index(j) if j in targets else nearest(metric, j, targets) for j in others}
    for c, target in enumerate(targets):
        members = [tokens[j] for j in others if choice[j] == c and j != target]
        rows.append(tokens[target] + mean(members) if members else tokens[target])
    for j in others:
        owner[j] = len(dominant) + choice[j]
    return rows, owner


def bvllm(frames: Tensor, keep: int, threshold: float) -> tuple[list[Tensor], list[int], list[list[int]]]:
    count, n, _ = frames.shape
    describe = [mean(list(frame)) for frame in frames]
    joins: list[int | None] = [None]
    for i in range(1, count):
        best = max(range(i), key=lambda j: (cosine(describe[i], describe[j]), -j))
        joins.append(best if (cosine(describe[i], describe[best]) + 1) / 2 > threshold else None)
    kept = [i for i in range(count) if joins[i] is None]
    each = min(n, int(max(1, keep * count / len(kept))))
    rows: list[Tensor] = []
    counts, owner = [0] * count, [[-1] * n for _ in range(count)]
    for i in kept:
        members = [j for j in range(count) if j == i or joins[j] == i]
        its_rows, its_owner = aim(mean([frames[j] for j in members]), each)
        for j in members:
            owner[j] = [row + len(rows) for row in its_owner]
        rows += its_rows
        counts[i] = len(its_rows)
    return rows, counts, owner


def centerclip(
    frames: Tensor, keep: int, length: int, rows_are: str = "medoid", sigma: float | None = None
) -> tuple[list[Tensor], list[int], list[list[int]]]:
    """``sigma``: of spectral clustering."""
    count, n, _ = frames.shape
    rows: list[Tensor] = []
    counts, owner = [0] * count, [[-1] * n for _ in range(count)]
    for start in range(0, count, length):
        x = frames[start : start + length].flatten(0, 1)
        clusters = keep * (len(x) // n)
        embedded = x if sigma is None else spectral(x, clusters, sigma)
        medoids = medoids_of(embedded, clusters, 80, 1e-6)
        cluster = nearest_center(squared_distances(embedded), medoids)
        for j in range(len(x)):
            if rows_are == "mean" or j in medoids:
                owner[start + j // n][j % n] = len(rows) + cluster[j]
        for c, medoid in enumerate(medoids):
            counts[start + medoid // n] += 1
            members = [x[j] for j in range(len(x)) if cluster[j] == c]
            rows.append(mean(members) if rows_are == "mean" else x[medoid])
    return rows, counts, owner


def spectral(x: Tensor, clusters: int, sigma: float) -> Tensor:
    affinity = torch.exp(-squared_distances(x) / (2 * sigma**2))
    degree = affinity.sum(1).sqrt()
    laplacian = torch.eye(len(x), dtype=x.dtype) - affinity / degree[:, None] / degree
    last = torch.linalg.svd(laplacian).U[:, -clusters:]
    return torch.stack([row / (row.norm() + 1e-6) for row in last])


def clusters_of(tokens: Tensor, count: int, beta: float | None) -> tuple[list[Tensor], list[int]]:
    """HoliTom's cluster centres of [n, C]."""
    if count == 0:
        return [], [-1] * len(tokens)
    centers = density_peaks(tokens, count, 7)
    owner = nearest_center(squared_distances(tokens), centers)
    rows = []
    for c, center in enumerate(centers):
        others = [tokens[j] for j in range(len(tokens)) if owner[j] == c and j != center]
        if not others:
            rows.append(tokens[center])
        elif beta is None:
            rows.append(mean([tokens[center], *others]))
        else:
            rows.append(beta * tokens[center] + (1 - beta) * mean(others))
    return rows, owner


def holitom(
    frames: Tensor, received: list[list[float]], keep: int, tau: float, beta: float | None, contextual: float
) -> tuple[list[Tensor], list[int], list[list[int]]]:
    count, n, _ = frames.shape
    pairs = [[cosine(frames[f, p], frames[f + 1, p]) > tau for p in range(n)] for f in range(count - 1)]
    segments, gain = cut_row(torch.tensor(pairs).view(count - 1, n), 1024)
    share = min(keep / n / ((count * n - gain) / (count * n)), 1)
    rows: list[Tensor] = []
    counts, owner = [0] * count, [[-1] * n for _ in range(count)]
    for number in range(segments[-1] + 1):
        mine = [f for f in range(count) if segments[f] == number]
        static = [p for p in range(n) if len(mine) > 1 and all(pairs[f][p] for f in mine[:-1])]
        moving = [p for p in range(n) if p not in static]
        if static:
            average = torch.stack([mean([frames[f, p] for f in mine]) for p in static])
            its_rows, its_owner = clusters_of(average, round(len(static) * share), beta)
            for p, row in zip(static, its_owner, strict=True):
                for f in mine:
                    owner[f][p] = row if row < 0 else row + len(rows)
            rows += its_rows
            counts[mine[0]] += len(its_rows)
        total = math.ceil(len(moving) * share)
        dominant = round(total * (1 - contextual))
        for f in mine:
            best = sorted(top(received[f], dominant, among=set(moving)))
            for row, p in enumerate(best):
                owner[f][p] = len(rows) + row
            rows += [frames[f, p] for p in best]
            rest = [p for p in moving if p not in best]
            its_rows, its_owner = clusters_of(frames[f, rest], total - dominant, beta)
            for p, row in zip(rest, its_owner, strict=True):
                owner[f][p] = row if row < 0 else row + len(rows)
            rows += its_rows
            counts[f] += total
    return rows, counts, owner


def fold_dropped(hidden: Tensor, kept: list[int]) -> Tensor:
    """HoliTom's inner merge of [N, C]."""
    rows = [hidden[j] for j in kept]
    for j in range(len(hidden)):
        if j not in kept:
            c = nearest(hidden, j, kept)
            rows[c] = (rows[c] + hidden[j]) / 2
    return torch.stack(rows)


def merge_evicted(
    keys: Tensor, values: Tensor, kept: list[list[int]], mode: str, selective: bool
) -> tuple[Tensor, Tensor]:
    """LOOK-M's merge of [H, S, D]; ``kept`` of each head."""
    heads, length, _ = keys.shape
    choice = [{j: nearest(keys[h], j, kept[h]) for j in range(length) if j not in kept[h]} for h in range(heads)]
    weight = [{j: cosine(keys[h, j], keys[h, kept[h][c]]) for j, c in choice[h].items()} for h in range(heads)]
    if mode == "weighted" and selective:
        average = {}
        for j in range(length):
            over = [weight[h][j] for h in range(heads) if j in weight[h]]
            if over:
                average[j] = sum(over) / len(over)
        dropped = {j for j, s in average.items() if s < sum(average.values()) / len(average)}
        choice = [{j: c for j, c in choice[h].items() if j not in dropped} for h in range(heads)]
    merged = []
    for x in (keys, values):
        rows = []
        for h in range(heads):
            for c, center in enumerate(kept[h]):
                terms = [x[h, center]]
                for j in choice[h]:
                    if choice[h][j] == c:
                        term = x[h, j]
                        if mode == "pivotal":
                            term = (term + x[h, center]) / 2
                        elif mode == "weighted":
                            term = weight[h][j] * term
                        terms.append(term)
                rows.append(mean(terms))
        merged.append(torch.stack(rows).view(heads, -1, x.shape[-1]))
    return merged[0], merged[1]
