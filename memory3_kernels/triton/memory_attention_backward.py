"""memory_attention_backward: the launches of `_gradients`: dq and what the others need of it, dk and dv of the context,
dk, dv and dbias of the records. Scores are computed twice, so that nobody has to add up what several programs found."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..ops.memory_attention import check_values
from . import _heuristics, _launch
from ._gradients import context_gradient_kernel, query_gradient_kernel, record_gradient_kernel
from ._launch import Launch
from ._prefill import arguments


def launches(grads, grad_out, grad_lse, out, lse, inputs, *, memory_grad, scale, max_k, max_chunk) -> list[Launch]:
    args, constants = arguments(*inputs)
    q, mem_slot = inputs[0], inputs[8]
    group, dim, size = constants["G"], q.shape[2], q.element_size()
    kv_heads, refs, tokens = args["kv_heads"], mem_slot.shape[1], constants["K"]
    delta = torch.empty_like(lse, memory_format=torch.contiguous_format)
    args |= {"grad_out": grad_out.contiguous(), "grad_lse": grad_lse.contiguous(), "out": out.contiguous()}
    args |= {"lse": lse.contiguous(), "delta": delta, "scale": scale, "SEARCH": 128}

    def launch(kernel, programs: int, tile: _heuristics.GradientTile, **more) -> Launch:
        """The kernel with what it takes of all there is; constants have names in capitals."""
        values = args | constants | more | {"M": tile.rows, "N": tile.tokens}
        chosen, fixed = (
            {n: values[n] for n in kernel.arg_names if n.isupper() == capital} for capital in (False, True)
        )
        return Launch(kernel, (programs,), chosen, fixed, tile.warps, tile.stages, fresh=("delta",))

    packed = group * max(max_chunk, 1)
    tile = _heuristics.query_gradient_tile(packed, dim, size)
    record = _heuristics.record_tile(refs, tokens, dim, size, most=tile.tokens)
    blocks = triton.cdiv(packed, tile.rows)
    programs = args["chunks"] * kv_heads * blocks
    shape = {"KP": record.padded, "LANES": record.lanes}
    result = [launch(query_gradient_kernel, programs, tile, dq=grads[0], blocks=blocks, **shape)]
    if constants["CONTEXT"]:
        tile = _heuristics.key_gradient_tile(max_k, dim, size)
        blocks = triton.cdiv(max_k, tile.tokens)
        programs = args["sequences"] * kv_heads * blocks
        result.append(launch(context_gradient_kernel, programs, tile, dk=grads[1], dv=grads[2], blocks=blocks))
    if memory_grad and tokens:
        tile = _heuristics.key_gradient_tile(tokens, dim, size)
        entries, blocks = args["chunks"] * refs, triton.cdiv(tokens, tile.tokens)
        results = {"dk": grads[3], "dv": grads[4], "db": grads[5] if constants["BIAS"] else delta}
        programs = entries * args["mem_heads"] * blocks
        result.append(launch(record_gradient_kernel, programs, tile, blocks=blocks, entries=entries, **results))
    return result


def call(
    grad_out: Tensor, grad_lse: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor | None, v: Tensor | None,
    cu_q: Tensor, cu_k: Tensor, cu_chunk: Tensor, mem_k: Tensor, mem_v: Tensor, mem_slot: Tensor, mem_len: Tensor,
    mem_bias: Tensor | None, head_map: Tensor | None, *, memory_grad: bool, scale: float, max_q: int, max_k: int,
    max_chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    inputs = (q, k, v, cu_q, cu_k, cu_chunk, mem_k, mem_v, mem_slot, mem_len, mem_bias, head_map)
    given = (grad_out, grad_lse, out, lse)
    sizes = {"scale": scale, "max_q": max_q, "max_k": max_k, "max_chunk": max_chunk}
    grads = _launch.outputs("memory_attention_backward", *given, *inputs, memory_grad=memory_grad, **sizes)
    if _launch.checks_values():
        check_values(q, k, cu_q, cu_k, cu_chunk, mem_k, mem_slot, mem_len, head_map, max_q, max_k, max_chunk)
    if q.shape[0] and cu_chunk.shape[0] > 1:
        options = {"memory_grad": memory_grad, "scale": scale, "max_k": max_k, "max_chunk": max_chunk}
        _launch.run(launches(grads, *given, inputs, **options))
    return grads
