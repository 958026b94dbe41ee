"""Attention that reads pages packed, against float64 attention on what they unpack to."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.reference import packed_attention as reference
from tests.test_kv_pack import FLOATS, SCHEMES, draw
from vtkernels.kv import KVFormat, channel_order
from vtkernels.testing.compare import assert_close, assert_same_bits

QUICK = settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def inputs(random, format, *, batch=1, heads=4, key_heads=2, queries=1, pages=1, residual=5, head_dim=32, dtype):
    """Arguments of a call on the CPU: (query and pages), options."""
    tokens = pages * 128 + residual
    query = draw(random, batch, queries, heads, head_dim, dtype=dtype, spread=False).transpose(1, 2)
    k, v = (draw(random, batch, tokens, key_heads, head_dim, dtype=dtype).transpose(1, 2) for _ in range(2))
    order = channel_order(k) if format.k_scheme == "mix" else None
    packed = torch.ops.vtk.kv_pack(k[:, :, : pages * 128], v[:, :, : pages * 128], **format.options, k_order=order)
    options = format.options | {"k_order": order}
    if residual:
        options |= {"k_residual": k[:, :, pages * 128 :], "v_residual": v[:, :, pages * 128 :]}
    return (query, *packed), options


def run(backend, args, options):
    put = {name: backend.put(x) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    return backend.ops.packed_attention(*(backend.put(x) for x in args), **put)


def check(backend, args, options):
    out, lse = run(backend, args, options)
    exact, exact_lse = reference.packed_attention(*args, **options)
    query, dtype = args[0], args[0].dtype
    k, v = (
        reference.unpacked(args[1 + 2 * s], args[2 + 2 * s], options[f"{n}_scheme"], options[f"{n}_axis"], s == 0,
                           options.get("k_order"), query.shape[3], dtype, options["group"]).to(dtype)
        for s, n in enumerate("kv")
    )  # fmt: skip
    residual = 0
    if "k_residual" in options:
        k, v = torch.cat([k, options["k_residual"]], 2), torch.cat([v, options["v_residual"]], 2)
        residual = options["k_residual"].shape[2]
    native, native_lse = reference.attend(query, k, v, residual, options.get("causal", False), options.get("scale"))
    assert out.dtype == dtype and lse.dtype == torch.float32
    # Scale and zero are folded into factors: float32 sums of terms s c and z, a few times larger than the values.
    assert_close(out, exact, native, absolute=1e-5)
    assert_close(lse, exact_lse, native_lse, absolute=1e-5)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_on_every_axis(backend, random, scheme, axis, dtype):
    check(backend, *inputs(random, KVFormat(scheme, scheme, 32, axis, axis), dtype=dtype))


@pytest.mark.parametrize("head_dim", [8, 24, 64, 80])
def test_mix(backend, random, head_dim):
    format = KVFormat("mix", "ternary5", 128)
    check(backend, *inputs(random, format, batch=2, head_dim=head_dim, dtype=torch.float32))


def test_mix_along_channels(backend, random):
    check(backend, *inputs(random, KVFormat("mix", "int2", 32, "token", "token"), head_dim=64, dtype=torch.bfloat16))


@QUICK
@given(data=st.data())
def test_any_shape(backend, data):
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    key_heads, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    queries, residual = data.draw(st.integers(1, 6)), data.draw(st.sampled_from([0, 1, 7, 130]))
    args, options = inputs(
        random,
        KVFormat(data.draw(st.sampled_from(SCHEMES)), data.draw(st.sampled_from(SCHEMES)), 64),
        batch=data.draw(st.integers(1, 2)),
        heads=key_heads * group,
        key_heads=key_heads,
        queries=queries,
        pages=data.draw(st.integers(0, 2)),
        residual=residual,
        head_dim=8 * data.draw(st.integers(1, 4)),
        dtype=data.draw(st.sampled_from(FLOATS)),
    )
    options["causal"] = queries <= residual and data.draw(st.booleans())
    options["scale"] = data.draw(st.sampled_from([None, 0.3]))
    check(backend, args, options)


def test_many_pages(backend, random):
    """More than one part, merged in order."""
    check(backend, *inputs(random, KVFormat("int2", "ternary", 128), pages=17, head_dim=8, dtype=torch.float32))


def test_nothing_to_attend_to(backend, random):
    args, options = inputs(random, KVFormat("int4", "int4"), pages=0, residual=0, dtype=torch.float32)
    out, lse = run(backend, args, options)
    assert not out.any() and (lse == -math.inf).all()


def test_causal_among_the_residual(backend, random):
    args, options = inputs(random, KVFormat("int4", "int4"), pages=0, residual=3, queries=3, dtype=torch.float32)
    out, _ = run(backend, args, options | {"causal": True})
    first = options["v_residual"][:, :, 0].repeat_interleave(2, 1)
    torch.testing.assert_close(out[:, :, 0].cpu(), first)


def test_a_scale_that_is_nan_makes_rows_nan(backend, random):
    (query, k_codes, k_meta, v_codes, v_meta), options = inputs(
        random, KVFormat("int4", "int4"), batch=2, dtype=torch.float32
    )
    k_meta = k_meta.clone()
    k_meta[1, 1, 0, 3] = float("nan")
    out, lse = run(backend, (query, k_codes, k_meta, v_codes, v_meta), options)
    broken = torch.zeros(2, 4, 1, dtype=torch.bool)
    broken[1, 2:] = True
    assert torch.equal(lse.isnan().cpu(), broken) and torch.equal(out.isnan().all(-1).cpu(), broken)
    assert torch.isfinite(out[0]).all()


def test_bits_do_not_depend_on_threads_or_batch(random):
    args, options = inputs(random, KVFormat("int2", "sign"), batch=2, pages=17, head_dim=8, dtype=torch.float32)
    torch.set_num_threads(1)
    one = torch.ops.vtk.packed_attention(*args, **options)
    torch.set_num_threads(3)
    for a, b in zip(one, torch.ops.vtk.packed_attention(*args, **options), strict=True):
        assert_same_bits(a, b)
    alone = {n: x[1:] if isinstance(x, torch.Tensor) else x for n, x in options.items()}
    for a, b in zip(one, torch.ops.vtk.packed_attention(*(x[1:] for x in args), **alone), strict=True):
        assert_same_bits(a[1:], b)


Q, CODES, META = torch.zeros(2, 6, 1, 32), torch.zeros(2, 3, 1, 2048).byte(), torch.zeros(2, 3, 1, 128).half()
OK = {"k_scheme": "int4", "v_scheme": "int4"}
REST = torch.zeros(2, 3, 4, 32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda op: op(Q[0], CODES, META, CODES, META, **OK), r"query of shape \[B, H, Q, D\], got"),
        (lambda op: op(Q.double(), CODES, META, CODES, META, **OK), r"query of dtype float32, float16 or bfloat16"),
        (lambda op: op(Q[:1], CODES, META, CODES, META, **OK), r"k_codes of shape .* with B = 1 as in query"),
        (
            lambda op: op(Q[:, :4], CODES, META, CODES, META, **OK),
            r"k_codes with a head count that divides the 4 heads",
        ),
        (lambda op: op(Q, CODES, META[:, :2], CODES, META, **OK), r"k_meta.shape = "),
        (lambda op: op(Q, CODES, META, CODES, META, **OK, k_residual=REST), r"k_residual and v_residual together"),
        (
            lambda op: op(Q, CODES, META, CODES, META, **OK, k_residual=REST, v_residual=REST[:, :, :3]),
            r"v_residual.shape = \[B, Hk, R, D\] = \[2, 3, 4, 32\], got \[2, 3, 3, 32\]",
        ),
        (
            lambda op: op(Q, CODES, META, CODES, META, **OK, k_residual=REST.half(), v_residual=REST),
            r"k_residual of dtype float32, got float16",
        ),
        (lambda op: op(Q, CODES, META, CODES, META, **OK, causal=True), r"causal expected k_residual to hold the keys"),
        (lambda op: op(Q, CODES, META, CODES, META, **OK, scale=float("inf")), r"a finite scale, got inf"),
    ],
)
def test_errors(backend, call, message):
    if backend.name == "cuda":
        pytest.skip("the checks are compiled from the same source; CPU tensors reach them")
    with pytest.raises(RuntimeError, match="vtk(_simt)?::packed_attention.*" + message):
        call(backend.ops.packed_attention)
