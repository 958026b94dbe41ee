"""prune_gather against torch eager, torch.compile and onnxruntime."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.harness import Case, PeerMissing, compiled

OPS = ["prune_gather", "prune_gather.attention", "prune_gather.varlen", "prune_gather.tensors"]


def eager_prune(tokens: Tensor, scores: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """What pruning methods ship: topk, sort, gather."""
    indices = scores.topk(keep, dim=-1).indices.sort(dim=-1).values
    return tokens.gather(1, indices[..., None].expand(-1, -1, tokens.shape[2])), indices


def onnx_prune(tokens: Tensor, scores: Tensor, keep: int) -> Callable[[], Callable[[], object]]:
    """TopK then GatherND in onnxruntime, kept in score order (sorting would only slow it down)."""

    def build():
        try:
            import onnx
            import onnxruntime
        except ImportError as error:
            raise PeerMissing(f"not installed: {error.name}") from error
        if tokens.dtype != torch.float32:
            raise PeerMissing("no bfloat16 GatherND on its CPU provider")
        helper, kind = onnx.helper, onnx.TensorProto.FLOAT
        # GatherND with batch_dims=1 wants one index tuple an element.
        nodes = [
            helper.make_node("TopK", ["scores", "keep"], ["values", "order"], axis=1, largest=1, sorted=0),
            helper.make_node("Unsqueeze", ["order", "last"], ["tuples"]),
            helper.make_node("GatherND", ["tokens", "tuples"], ["kept"], batch_dims=1),
        ]
        graph = helper.make_graph(
            nodes,
            "prune",
            [
                helper.make_tensor_value_info("tokens", kind, list(tokens.shape)),
                helper.make_tensor_value_info("scores", kind, list(scores.shape)),
            ],
            [
                helper.make_tensor_value_info("kept", kind, None),
                helper.make_tensor_value_info("order", onnx.TensorProto.INT64, None),
            ],
            [
                helper.make_tensor("keep", onnx.TensorProto.INT64, [1], [keep]),
                helper.make_tensor("last", onnx.TensorProto.INT64, [1], [2]),
            ],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        feed = {"tokens": tokens.numpy(), "scores": scores.numpy()}
        return lambda: session.run(None, feed)

    return build


def check_kept(ours: object, peer: object) -> None:
    """Same tokens; onnxruntime returns them unsorted."""
    kept, indices = ours[0], ours[1]
    peer_kept, peer_indices = (torch.as_tensor(p) for p in (peer[0], peer[1]))
    order = peer_indices.argsort(dim=-1)
    if not torch.equal(peer_indices.gather(-1, order), indices.cpu() if not peer_indices.is_cuda else indices):
        raise AssertionError("the peer keeps other tokens")
    sorted_kept = peer_kept.gather(1, order[..., None].expand_as(peer_kept))
    if not torch.equal(sorted_kept.to(kept.device), kept):
        raise AssertionError("the peer gathers other rows")


def prune_case(shape: tuple[int, int, int], dtype: torch.dtype, keep: int, device: torch.device, target: dict) -> Case:
    random = torch.Generator(device).manual_seed(0)
    tokens = torch.randn(shape, generator=random, device=device).to(dtype)
    scores = torch.randn(shape[:2], generator=random, device=device).softmax(-1)
    peers = {
        "eager": lambda: lambda: eager_prune(tokens, scores, keep),
        "inductor": compiled(eager_prune, tokens, scores, keep),
    }
    if device.type == "cpu":
        peers["onnxruntime"] = onnx_prune(tokens, scores, keep)
    gathered = shape[0] * keep * shape[2] * tokens.element_size()
    return Case(
        "prune_gather",
        f"{list(shape)} {str(dtype).removeprefix('torch.')} keep {keep}",
        lambda: torch.ops.vtk.prune_gather.default(tokens, scores, keep),
        peers,
        check_kept,
        bytes=2 * gathered + scores.nbytes,
        target=target,
    )


def copy_case(shape: tuple[int, int, int], dtype: torch.dtype, keep: int, device: torch.device) -> Case:
    """The large case against its own ceiling: a plain copy of as many bytes into memory that is already mapped."""
    case = prune_case(shape, dtype, keep, device, {})
    source = torch.zeros(shape[0], keep, shape[2], dtype=dtype, device=device)
    target = torch.ones_like(source)
    case.peers = {"copy": lambda: lambda: target.copy_(source), "eager": case.peers["eager"]}
    case.check = lambda ours, peer: check_kept(ours, peer) if isinstance(peer, tuple) else None
    case.target = {"copy": 0.8, "eager": 1.0}
    case.name += ", against a copy"
    return case


def tensors_case(device: torch.device) -> Case:
    """Between two decoder layers: hidden states, cos, sin and position ids of a 2048-token prompt."""
    random = torch.Generator(device).manual_seed(0)
    states = torch.randn(1, 2048, 4096, generator=random, device=device).bfloat16()
    cos, sin = (torch.randn(1, 2048, 128, generator=random, device=device).bfloat16() for _ in range(2))
    positions = torch.arange(2048, device=device)[None]
    scores = torch.randn(1, 2048, generator=random, device=device)
    tensors, keep = [states, cos, sin, positions], 512

    def eager(states, cos, sin, positions, scores):
        index = scores.topk(keep).indices.sort().values
        rows = [t.gather(1, index[..., None].expand(-1, -1, t.shape[2])) for t in (states, cos, sin)]
        return [*rows, positions.gather(1, index)], index

    def check(ours, peer):
        assert all(torch.equal(a, b) for a, b in zip(ours[0], peer[0], strict=True)) and torch.equal(ours[1], peer[1])

    args = (*tensors, scores)
    return Case(
        "prune_gather.tensors",
        "[1, 2048, 4096] bf16 states, cos, sin, positions, keep 512",
        lambda: torch.ops.vtk.prune_gather.tensors(tensors, scores, keep),
        {"eager": lambda: lambda: eager(*args), "inductor": compiled(eager, *args)},
        check,
        bytes=2 * keep * (4096 + 256) * 2 + 2 * keep * 8 + scores.nbytes,
        target={"eager": 1.0},
    )


def varlen_case(device: torch.device) -> Case:
    """Five image crops of 576 tokens with budgets of their own, against a loop over the crops."""
    random = torch.Generator(device).manual_seed(0)
    tokens = torch.randn(5 * 576, 1024, generator=random, device=device)
    scores = torch.randn(5 * 576, generator=random, device=device)
    bounds = torch.arange(6, dtype=torch.int32, device=device) * 576
    budgets = [192, 64, 96, 32, 128]
    keep = torch.tensor(budgets, dtype=torch.int32, device=device)

    def loop():
        indices = [
            scores[i * 576 : (i + 1) * 576].topk(k).indices.sort().values + i * 576 for i, k in enumerate(budgets)
        ]
        index = torch.cat(indices)
        return tokens[index], index

    def check(ours, peer):
        assert torch.equal(ours[0], peer[0]) and torch.equal(ours[1], peer[1])

    return Case(
        "prune_gather.varlen",
        "5 x [576, 1024] float32 keep 32-192",
        lambda: torch.ops.vtk.prune_gather.varlen(tokens, scores, bounds, keep, total_keep=sum(budgets)),
        {"eager loop": lambda: loop},
        check,
        bytes=2 * sum(budgets) * 1024 * 4 + scores.nbytes,
        target={"eager loop": 3.0},
    )


def attention_case(device: torch.device) -> Case:
    """FasterVLM's step on CLIP-L: [CLS] attention over 16 heads, then the kept rows of the features."""
    random = torch.Generator(device).manual_seed(0)
    tokens = torch.randn(4, 576, 1024, generator=random, device=device)
    query, key = (torch.randn(4, 16, n, 64, generator=random, device=device) for n in (1, 576))

    def eager(tokens, query, key):
        scores = (query @ key.transpose(-1, -2) * 64**-0.5).softmax(-1).mean((1, 2))
        return *eager_prune(tokens, scores, 64), scores

    def check(ours, peer):
        assert torch.allclose(ours[2], peer[2], atol=1e-6)
        if torch.equal(ours[1], peer[1]):  # scores one rounding apart may swap two tokens at the threshold
            assert torch.equal(ours[0], peer[0])

    args = (tokens, query, key)
    return Case(
        "prune_gather.attention",
        "[4, 576, 1024] float32, 16 heads, 1 query, keep 64",
        lambda: torch.ops.vtk.prune_gather.attention(*args, 64),
        {"eager": lambda: lambda: eager(*args), "inductor": compiled(eager, *args)},
        check,
        bytes=key.nbytes + 2 * 4 * 64 * 1024 * 4,
        flops=2 * 4 * 16 * 576 * 64,
        target={"eager": 2.0},
    )


def cases(device: torch.device) -> Iterator[Case]:
    goal = {"eager": 5.0, "inductor": 2.0}
    yield prune_case((4, 2304, 1024), torch.float32, 256, device, {"eager": 10.0, "inductor": 2.0, "onnxruntime": 1.0})
    yield prune_case((1, 576, 4096), torch.bfloat16, 64, device, goal)
    yield prune_case((1, 576, 4096), torch.bfloat16, 192, device, goal)
    yield tensors_case(device)
    yield varlen_case(device)
    yield attention_case(device)
    yield copy_case((16, 2880, 4096), torch.bfloat16, 288, device)
    yield copy_case((16, 2880, 4096), torch.float32, 288, device)
