"""memory_attention_backward: gradients of memory_attention, with probabilities recomputed from lse.

With g = d loss / d out, u = d loss / d lse and p_ij = exp(s_ij - lse_i) (Dao, arXiv 2307.08691, section 3.1.2, plus u):
    dv_j = sum_i p_ij g_i,   ds_ij = p_ij (g_i . v_j - g_i . out_i + u_i),
    dq_i = scale sum_j ds_ij k_j,   dk_j = scale sum_i ds_ij q_i,   dbias_j = sum_i ds_ij.
Sums over query heads of a group and, for a slot that serves several chunks, over chunks ascending.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._registry import Cost, Op, register
from . import _attention_args as args_
from . import _attention_bad_cases as refused
from . import _attention_cases as samples
from . import _attention_math as math_
from . import memory_attention as forward_

SCHEMA = (
    "(Tensor grad_out, Tensor grad_lse, Tensor out, Tensor lse, "
    + forward_.SCHEMA[1:].partition(", *, ")[0].replace("=None", "")
    + ", *, bool memory_grad, float scale, int max_q, int max_k, int max_chunk)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def check_shapes(grad_out, grad_lse, out, lse, q, *rest) -> None:
    forward_.check_shapes(q, *rest)
    for name, tensor in (("grad_out", grad_out), ("out", out)):
        args_.expect_shape(name, tensor, *q.shape)
        args_.expect_dtype(name, tensor, q.dtype)
    for name, tensor in (("grad_lse", grad_lse), ("lse", lse)):
        args_.expect_shape(name, tensor, *q.shape[:2])
        args_.expect_dtype(name, tensor, args_.wide_dtype(q.dtype))


def result_like(q, k, v, mem_k, mem_v, mem_bias, memory_grad) -> tuple[Tensor, ...]:
    """Contiguous zeros in the shape of each gradient; of no elements where there is none."""
    given = (q, k, v, *((mem_k, mem_v, mem_bias) if memory_grad else (None, None, None)))
    wide = args_.wide_dtype(q.dtype)
    last = q.new_zeros(0, dtype=wide) if given[5] is None else q.new_zeros(mem_bias.shape, dtype=wide)
    return (*(q.new_zeros(0) if t is None else q.new_zeros(t.shape) for t in given[:5]), last)


def fake(
    grad_out, grad_lse, out, lse, q, k, v, cu_q, cu_k, cu_chunk, mem_k, mem_v, mem_slot, mem_len, mem_bias, head_map, *,
    memory_grad, scale, max_q, max_k, max_chunk,
):  # fmt: skip
    check_shapes(grad_out, grad_lse, out, lse, q, k, v, cu_q, cu_k, cu_chunk, mem_k, mem_v, mem_slot, mem_len,
                 mem_bias, head_map)  # fmt: skip
    return result_like(q, k, v, mem_k, mem_v, mem_bias, memory_grad)


def score_gradient(scores: Tensor, lse: Tensor, dp: Tensor, correction: Tensor) -> tuple[Tensor, Tensor]:
    """(p, ds); both 0 where a row saw nothing, whatever its incoming gradient holds."""
    p = torch.exp(scores - lse.where(lse > -torch.inf, 0).unsqueeze(-1))
    return p, torch.where(p > 0, p * (dp + correction.unsqueeze(-1)), 0)


def reference(
    grad_out, grad_lse, out, lse, q, k, v, cu_q, cu_k, cu_chunk, mem_k, mem_v, mem_slot, mem_len, mem_bias, head_map, *,
    memory_grad, scale, max_q, max_k, max_chunk,
):  # fmt: skip
    check_shapes(grad_out, grad_lse, out, lse, q, k, v, cu_q, cu_k, cu_chunk, mem_k, mem_v, mem_slot, mem_len,
                 mem_bias, head_map)  # fmt: skip
    cu_q, cu_k, cu_chunk = forward_.check_values(
        q, k, cu_q, cu_k, cu_chunk, mem_k, mem_slot, mem_len, head_map, max_q, max_k, max_chunk
    )
    grads = result_like(q, k, v, mem_k, mem_v, mem_bias, memory_grad)
    wide = args_.wide_dtype(q.dtype)
    kv_heads = forward_.kv_heads_of(k, mem_k, head_map)
    records = math_.gather_records(mem_k, mem_v, mem_slot, mem_len, mem_bias, head_map, kv_heads, wide)
    chunks = math_.Chunks(cu_chunk, kv_heads, q.device)
    x, g = q.to(wide), grad_out.to(wide)
    correction = grad_lse - (g * out.to(wide)).sum(-1)  # [Tq, Hq]

    group = q.shape[1] // kv_heads
    dp = chunks.join(chunks.split(g) @ records.v.mT, group)
    p, ds = score_gradient(math_.memory_scores(x, records, chunks, scale), lse, dp, correction)
    blocks = chunks.split(ds)
    dq = scale * chunks.join(blocks @ records.k, group)
    if memory_grad:
        add_to_slots(grads[3], scale * (blocks.mT @ chunks.split(x)), records, mem_slot, head_map)
        add_to_slots(grads[4], chunks.split(p).mT @ chunks.split(g), records, mem_slot, head_map)
        if mem_bias is not None:
            add_to_slots(grads[5], blocks.sum(2), records, mem_slot, head_map)
    for b in range(0 if k is None else len(cu_q) - 1):
        a, e, keys = cu_q[b], cu_q[b + 1], slice(cu_k[b], cu_k[b + 1])
        if a == e:
            continue
        kb, vb = k[keys].to(wide), v[keys].to(wide)
        gb, xb = math_.by_head(g[a:e], kv_heads), math_.by_head(x[a:e], kv_heads)
        dp = math_.by_row(gb @ vb.permute(1, 2, 0), e - a)
        p, ds = score_gradient(math_.context_scores(x[a:e], kb, scale), lse[a:e], dp, correction[a:e])
        p, ds = math_.by_head(p, kv_heads), math_.by_head(ds, kv_heads)
        dq[a:e] += scale * math_.by_row(ds @ kb.transpose(0, 1), e - a)
        grads[1][keys] = (scale * (ds.mT @ xb)).transpose(0, 1).to(k.dtype)
        grads[2][keys] = (p.mT @ gb).transpose(0, 1).to(v.dtype)
    grads[0].copy_(dq)
    return grads


def add_to_slots(
    grad: Tensor, parts: Tensor, records: math_.Records, mem_slot: Tensor, head_map: Tensor | None
) -> None:
    """Adds [C, H, N(, D)] to the slots they were gathered from, chunk by chunk."""
    refs = mem_slot.shape[1]
    if grad.numel() == 0 or parts.numel() == 0:
        return
    total = grad.to(parts.dtype)
    parts = parts.reshape(*parts.shape[:2], refs, records.tokens, *parts.shape[3:]).transpose(1, 2)  # [C, R, H, K, ..]
    heads = range(parts.shape[2]) if head_map is None else head_map.tolist()
    for c, row in enumerate(mem_slot.tolist()):
        for r, slot in enumerate(row):
            for h, head in enumerate(heads):
                if slot >= 0 and head >= 0:
                    total[slot, head] += parts[c, r, h]
    grad.copy_(total)


def cost(grad_out, grad_lse, out, lse, q, k, *rest, memory_grad, **sizes) -> Cost:
    forward = forward_.cost(q, k, *rest, **sizes)
    return Cost(2 * forward.bytes, forward.flops * 5 // 2)


OP = register(
    Op(
        name="memory_attention_backward",
        schema=SCHEMA,
        reference=reference,
        fake=fake,
        cases=samples.backward_cases,
        bad_cases=refused.backward_bad_cases,
        cost=cost,
        tolerance={torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3},
    )
)


def memory_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cu_q: Tensor,
    cu_k: Tensor,
    cu_chunk: Tensor,
    mem_k: Tensor,
    mem_v: Tensor,
    mem_slot: Tensor,
    mem_len: Tensor,
    mem_bias: Tensor | None = None,
    head_map: Tensor | None = None,
    *,
    memory_grad: bool = True,
    scale: float,
    max_q: int,
    max_k: int,
    max_chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of memory_attention, which registers this op as its own; docs/ops/memory_attention_backward.md.

    Args:
        grad_out, out: [Tq, Hq, D], q's dtype: the gradient of out, and memory_attention's out.
        grad_lse, lse: [Tq, Hq] float32: the gradient of lse, and memory_attention's lse.
        q ... head_map, scale, max_q, max_k, max_chunk: as memory_attention got them.
        memory_grad: False leaves out the gradients of mem_k, mem_v and mem_bias.

    Returns:
        Gradients of q, k, v, mem_k, mem_v (their shape and dtype) and mem_bias (float32), contiguous; tensors of no
        elements in place of absent ones. A slot that several chunks read sums over them in ascending order.

    Raises:
        RuntimeError: as memory_attention; an input requires a gradient.
    """
    return OP(grad_out, grad_lse, out, lse, q, k, v, cu_q, cu_k, cu_chunk, mem_k, mem_v, mem_slot, mem_len, mem_bias,
              head_map, memory_grad, scale, max_q, max_k, max_chunk)  # fmt: skip
