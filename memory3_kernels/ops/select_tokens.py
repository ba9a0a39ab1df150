"""select_tokens: which tokens of a reference its memory keeps, per KV head (docs/ops/select_tokens.md).

With s_ij = scale * q_i . k_j over the reference's own rows start..length-1, G the query heads of a KV head:
    received   w_j = sum_{h in G} sum_i softmax_j(s_ij)             no mask; Memory3, arXiv 2407.01178, section 3.2
    exp        w_j = log sum_{h in G} sum_i exp(s_ij)               its un-normalised form: the same ranking as sum exp
    causal     w_j = sum_{h in G} sum_{i >= j} softmax_{j' <= i}(s_ij')   j' runs from row 0, so over a prefix too
The K rows with the largest w_j are kept, ties to the lower row, in ascending order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._registry import BadCase, Case, Cost, Op, register
from ._checks import check_range, expect_dtype, expect_floating, expect_head_dim, expect_shape, expect_unit_stride

SCHEMA = "(Tensor q, Tensor k, Tensor length, *, int tokens, int start, float scale, str rule) -> Tensor"
RULES = ("received", "exp", "causal")
MAX_TOKENS = 512
# References scored at a time by the PyTorch reference: at most this many scores are held.
_BLOCK = 1 << 24


def _check(q: Tensor, k: Tensor, length: Tensor, tokens: int, start: int, rule: str) -> None:
    expect_shape("q", q, -1, -1, -1, -1)
    expect_floating("q", q)
    expect_head_dim("q", q.shape[3])
    expect_shape("k", k, q.shape[0], q.shape[1], -1, q.shape[3])
    expect_dtype("k", k, q.dtype)
    torch._check(
        k.shape[2] > 0 and q.shape[2] > 0 and q.shape[2] % k.shape[2] == 0,
        lambda: f"q: expected a number of heads that is a multiple of the {k.shape[2]} of k, got {q.shape[2]}",
    )
    for name, tensor in (("q", q), ("k", k)):
        expect_unit_stride(name, tensor)
    expect_shape("length", length, q.shape[0])
    expect_dtype("length", length, torch.int32)
    torch._check(0 < tokens <= MAX_TOKENS, lambda: f"tokens: expected 1..{MAX_TOKENS}, got {tokens}")
    torch._check(start >= 0, lambda: f"start: expected a row number, 0 or more, got {start}")
    torch._check(rule in RULES, lambda: f"rule: expected one of {', '.join(RULES)}, got {rule}")


def fake(q: Tensor, k: Tensor, length: Tensor, *, tokens: int, start: int, scale: float, rule: str) -> Tensor:
    _check(q, k, length, tokens, start, rule)
    return length.new_empty((k.shape[0], k.shape[2], tokens))


def weights(q: Tensor, k: Tensor, length: Tensor, *, start: int, scale: float, rule: str) -> Tensor:
    """w_j as [N, Hkv, T], fp32 (fp64 for fp64 inputs); -inf at rows that are not candidates."""
    wide = torch.float64 if q.dtype is torch.float64 else torch.float32
    n, rows, heads, dim = k.shape
    row = torch.arange(rows, device=q.device)
    within = row < length[:, None]  # [N, T]
    own = within & (row >= start)
    # Rows past the length may hold anything, NaN included.
    query = torch.where(own[:, :, None, None], q.to(wide), 0).reshape(n, rows, heads, q.shape[2] // heads, dim)
    key = torch.where(within[:, :, None, None], k.to(wide), 0)
    score = scale * torch.einsum("nihgd,njhd->nhgij", query, key)
    if rule == "causal":
        visible = within[:, None, :] & (row[:, None] >= row)
    else:
        visible = own[:, None, :].expand(n, rows, rows)
    visible = (visible & own[:, :, None])[:, None, None]  # [N, 1, 1, T, T]: query i takes part and sees key j
    score = score.masked_fill(~visible, -torch.inf)
    if rule == "exp":
        weight = torch.logsumexp(score.permute(0, 1, 4, 2, 3).flatten(3), -1)
    else:
        share = torch.softmax(score, -1)  # of a row that sees nothing: NaN
        weight = torch.where(visible, share, 0).sum((2, 3))
    lowest = torch.finfo(wide).min
    weight = weight.nan_to_num(nan=lowest, neginf=lowest)
    return weight.masked_fill(~own[:, None], -torch.inf)


def reference(q: Tensor, k: Tensor, length: Tensor, *, tokens: int, start: int, scale: float, rule: str) -> Tensor:
    _check(q, k, length, tokens, start, rule)
    n, rows, heads, _ = k.shape
    check_range("length", length, 0, rows)
    index = length.new_full((n, heads, tokens), -1)
    kept = min(tokens, rows)
    block = max(1, _BLOCK // max(1, q.shape[2] * rows * rows))
    for at in range(0, n, block) if kept else ():
        part = slice(at, at + block)
        weight = weights(q[part], k[part], length[part], start=start, scale=scale, rule=rule)
        order = torch.sort(weight, dim=-1, descending=True, stable=True).indices[..., :kept]
        count = (length[part] - start).clamp(0, kept)[:, None, None]
        chosen = torch.arange(kept, device=q.device) < count
        ascending = torch.where(chosen, order, rows).sort(-1).values
        index[part, :, :kept] = torch.where(chosen, ascending, -1).to(torch.int32)
    return index


def compare(actual, expected, args, kwargs, tolerance: float) -> None:
    """Rankings with near-ties differ between backends, so the weights of the chosen rows are compared, not the rows.

    Raises:
        AssertionError: a row that is not a candidate, is out of order, is missing, has a weight clearly below the
            reference's K-th, or was preferred to a lower row of exactly the same weight.
    """
    (index,), (wanted,) = actual, expected
    if index.shape != wanted.shape or index.dtype != torch.int32:
        raise AssertionError(f"index: got {index.dtype} {list(index.shape)}, expected int32 {list(wanted.shape)}")
    q, k, length = (a.double() if a.is_floating_point() else a for a in args[:3])
    options = {name: kwargs[name] for name in ("start", "scale", "rule")}
    weight = weights(q, k, length, **options)
    for n in range(index.shape[0]):
        candidates = max(0, int(length[n]) - options["start"])
        count = min(index.shape[2], candidates)
        for h in range(index.shape[1]):
            rows, want, w = index[n, h].tolist(), wanted[n, h].tolist(), weight[n, h]
            place = f"index[{n}, {h}]"
            if rows[count:] != [-1] * (len(rows) - count):
                raise AssertionError(f"{place}: expected {count} rows and then -1, got {rows}")
            chosen = rows[:count]
            if sorted(set(chosen)) != chosen or any(not options["start"] <= r < int(length[n]) for r in chosen):
                raise AssertionError(f"{place}: expected ascending rows of {options['start']}..{length[n]}, got {rows}")
            if not count:
                continue
            floor = w[want[:count]].min().item()
            # exp weights are logarithms: their error is absolute, that of attention sums relative.
            slack = tolerance * (max(1.0, abs(floor)) if options["rule"] == "exp" else abs(floor))
            for r in chosen:
                if w[r] < floor - slack:
                    raise AssertionError(f"{place}: row {r} has weight {w[r]:.7g}, the {count}th best is {floor:.7g}")
                for lower in range(options["start"], r):
                    if lower not in chosen and w[lower] == w[r] and torch.equal(k[n, lower], k[n, r]):
                        raise AssertionError(f"{place}: row {r} was chosen before row {lower}, of equal weight")


def _sample(n, rows, q_heads, kv_heads, dim, tokens, rule, start=0, lengths=None, twins=False, flat=False):
    def make(dtype: torch.dtype, generator: torch.Generator):
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        q = torch.randn(n, rows, q_heads, dim, generator=generator, dtype=wide).to(dtype)
        k = torch.randn(n, rows, kv_heads, dim, generator=generator, dtype=wide).to(dtype)
        # Every key twice: of equal weights the lower row must win. An odd number of rows is kept, which parts a pair.
        if twins:
            k[:, rows // 2 :] = k[:, : rows - rows // 2]
        if flat:  # all weights equal
            q.zero_()
        length = torch.tensor([rows] * n if lengths is None else lengths, dtype=torch.int32)
        for i, used in enumerate(length.tolist()):  # rows past the length are never read
            q[i, used:], k[i, used:] = torch.nan, torch.nan
        return (q, k, length), {"tokens": tokens, "start": start, "scale": dim**-0.5, "rule": rule}

    return make


def cases():
    for rule in RULES:
        yield Case(f"{rule}-N2_T40_H6-2_D64_K8", _sample(2, 40, 6, 2, 64, 8, rule))
        yield Case(
            f"{rule}-lengths-start_T37_D24_K5",
            _sample(7, 37, 3, 3, 24, 5, rule, start=3, lengths=[37, 0, 2, 3, 4, 8, 20]),
        )
    yield Case("received-twins_T32", _sample(2, 32, 4, 2, 16, 7, "received", twins=True))
    yield Case("received-twins-across-tiles_T130", _sample(2, 130, 6, 2, 64, 15, "received", twins=True))
    yield Case("received-twins-whole-tiles_T128", _sample(2, 128, 6, 2, 64, 15, "received", twins=True))
    yield Case(
        "received-woven-lengths_T192_H5-1_D72",
        _sample(8, 192, 5, 1, 72, 12, "received", start=3, lengths=[192, 191, 180, 131, 128, 67, 60, 4]),
    )
    yield Case("exp-flat_T19", _sample(1, 19, 2, 1, 8, 4, "exp", flat=True))
    yield Case("received-start-past-everything", _sample(2, 6, 2, 1, 8, 3, "received", start=6))
    yield Case("received-N0", _sample(0, 8, 2, 1, 8, 3, "received"))
    yield Case("received-T0", _sample(2, 0, 2, 1, 8, 3, "received"))
    yield Case("causal-keeps-all_T80_K128", _sample(2, 80, 3, 1, 16, 128, "causal", start=3))
    yield Case("causal-group5_T70_D80", _sample(1, 70, 5, 1, 80, 8, "causal", start=2))
    bench = _sample(32, 128, 9, 3, 64, 8, "received")
    yield Case("received-smollm2_N32_T128_H9-3_D64_K8", bench, slow=True, bench=True)
    yield Case("received-paper_N8_T128_H40-8_D80_K8", _sample(8, 128, 40, 8, 80, 8, "received"), slow=True, bench=True)
    yield Case("causal-smollm2_N8_T136_H9-3_D64_K8", _sample(8, 136, 9, 3, 64, 8, "causal", 6), slow=True, bench=True)


def bad_cases():
    def broken(position: int | None = None, value: Tensor | None = None, **options):
        def make():
            args = [torch.zeros(2, 4, 6, 8), torch.zeros(2, 4, 2, 8), torch.tensor([4, 4], dtype=torch.int32)]
            if position is not None:
                args[position] = value
            return tuple(args), {"tokens": 2, "start": 0, "scale": 1.0, "rule": "received"} | options

        return make

    yield BadCase("heads", broken(1, torch.zeros(2, 4, 4, 8)), "q: expected .* multiple of the 4 of k, got 6")
    yield BadCase("k-shape", broken(1, torch.zeros(2, 5, 2, 8)), r"k: expected shape \[2, 4, \*, 8\], got")
    yield BadCase("k-dtype", broken(1, torch.zeros(2, 4, 2, 8).half()), "k: expected .*[fF]loat")
    yield BadCase("dim", broken(0, torch.zeros(2, 4, 6, 12)), "q: expected a head dimension .* multiple of 8, got 12")
    yield BadCase("length-dtype", broken(2, torch.tensor([4, 4])), "length: expected .*[iI]nt")
    yield BadCase(
        "length-range", broken(2, torch.tensor([4, 5], dtype=torch.int32)), r"length\[1\]: expected 0..4, got 5", False
    )
    yield BadCase("tokens", broken(tokens=0), "tokens: expected 1..512, got 0")
    yield BadCase("start", broken(start=-1), "start: expected a row number, 0 or more, got -1")
    yield BadCase("rule", broken(rule="best"), "rule: expected one of received, exp, causal, got best")
    yield BadCase("stride", broken(0, torch.zeros(2, 4, 8, 6).mT), "q: expected a last stride of 1, got 6")


def cost(q: Tensor, k: Tensor, length: Tensor, *, tokens: int, start: int, scale: float, rule: str) -> Cost:
    n, rows, q_heads, dim = q.shape
    pairs = n * q_heads * rows * rows // (2 if rule == "causal" else 1)
    # received and causal pass over the scores twice: for the softmax's denominator and for the column sums
    return Cost(q.nbytes + k.nbytes + length.nbytes + 4 * n * k.shape[2] * tokens, pairs * (2 * dim + 4))


OP = register(
    Op(
        name="select_tokens",
        schema=SCHEMA,
        reference=reference,
        fake=fake,
        cases=cases,
        bad_cases=bad_cases,
        cost=cost,
        tolerance={torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5},
        compare=compare,
    )
)


def select_tokens(
    q: Tensor, k: Tensor, length: Tensor, *, tokens: int, start: int = 0, scale: float, rule: str = "received"
) -> Tensor:
    """Picks the rows a memory keeps (Memory3, arXiv 2407.01178, section 3.2; docs/ops/select_tokens.md).

    Args:
        q: [N, T, Hq, D], the queries of N references; float32, bfloat16 or float16 (float64 on the reference), last
            stride 1, D a multiple of 8. Not rotated for the rules "received" and "exp", rotated for "causal".
        k: [N, T, Hkv, D], their keys, rotated or not as q; same dtype. Hkv divides Hq; the query heads of one KV head
            are summed.
        length: [N] int32, 0..T: how many rows of each reference are real. Later rows are never read.
        tokens: K, how many rows to keep, 1..512.
        start: first row that may be kept; rows before it are a prefix: neither ranked nor queries. "causal" lets
            queries see them, the other rules leave them out altogether.
        scale: factor on q.k, normally D ** -0.5.
        rule: "received", the paper's: attention a row receives, softmax over keys without a mask, summed over queries;
            "exp": the sum of exp(scale q.k), ranked by its logarithm; "causal": attention received under the causal
            mask.

    Returns:
        [N, Hkv, K] int32: row numbers in ascending order, -1 at the end where fewer than K rows can be chosen. Rows of
        equal weight: the lower one is taken. Scores and sums are float32, so backends may differ in near-ties.

    Raises:
        RuntimeError: shapes, dtypes or strides do not match, a length lies outside 0..T, an unknown rule, or q or k
            requires a gradient (a choice has none: detach them).
    """
    return OP(q, k, length, tokens, start, scale, rule)
