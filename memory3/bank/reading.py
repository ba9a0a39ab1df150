"""One checked copy from the bank into arena slots. Values are only touched inside one read transaction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..memory import Memory
from ..profiling import span
from .ahead import announce, map_pages
from .errors import ColdRecord, UnknownRecord
from .format import (
    HEAD_BYTES,
    Head,
    Record,
    Reference,
    read_bias,
    read_head,
    unpack_record,
    unpack_reference,
)

if TYPE_CHECKING:
    from .store import Bank


def get_memories(bank: Bank, ids: Sequence[bytes]) -> list[Memory]:
    """See Bank.get."""
    found: list[tuple[Record, Reference]] = []
    cold = []
    with bank.read() as txn:
        for i in ids:
            raw = txn.get(i, db=bank.env.db("references"))
            if raw is None:
                raise UnknownRecord(i, bank.path)
            value = txn.get(i, db=bank.env.db("records")) or bank.unsaved.get(i)
            if value is None:
                cold.append(i)
            else:
                found.append((unpack_record(i, value, bank.layout), unpack_reference(i, raw)))
    if cold:
        raise ColdRecord(cold)
    memories = []
    for record, reference in found:
        kv = record.kv
        if bank.codec is not None:
            kv = bank.codec.decode(kv, bank.layout)
            kv[..., record.n_valid :, :] = 0
        memories.append(Memory(kv, record.pos, record.n_valid, reference.token_ids, reference.text, record.bias))
    return memories


def copy_records(
    bank: Bank, ids: Sequence[bytes], kv: Tensor, length: Tensor, slots: Sequence[int] | Tensor, bias: Tensor | None
) -> int:
    """See Bank.read_into."""
    layout = bank.layout
    _check_arena("kv", kv, layout.kv_shape, None if bank.codec else layout.dtype)
    rows = _check_slots(ids, kv, length, slots, bias, layout.pos_shape)
    if bank.codec is None and kv.device.type == "cpu" and _slot_contiguous(kv):
        target = _byte_rows(kv)

        def place(n: int, row: int, value: Any, head: Head) -> None:
            np.copyto(target[row], np.frombuffer(value, np.uint8, head.kv_bytes, HEAD_BYTES))

        return _each(bank, ids, rows, length, bias, place)
    # A coded bank, another device or an odd stride: collect first, then move all of it at once.
    shape, dtype = (layout.codes_shape, torch.uint8) if bank.codec else (layout.kv_shape, layout.dtype)
    staged = torch.empty((len(ids), *shape), dtype=dtype)
    flat = _byte_rows(staged)

    def stage(n: int, row: int, value: Any, head: Head) -> None:
        np.copyto(flat[n], np.frombuffer(value, np.uint8, head.kv_bytes, HEAD_BYTES))

    moved = _each(bank, ids, rows, length, bias, stage)
    if ids:
        with span("dequantise"):
            moving = bank.codec.decode(staged, layout) if bank.codec else staged
        kv[torch.tensor(rows, device=kv.device)] = moving.to(kv.device, kv.dtype)
    return moved


def copy_codes(
    bank: Bank, ids: Sequence[bytes], codes: Tensor, length: Tensor, slots: Sequence[int] | Tensor, bias: Tensor | None
) -> int:
    """See Bank.read_codes_into."""
    if bank.codec is None:
        raise ValueError(f"codes: the bank {bank.path} is dense; use read_into, or write a bank with a codec")
    layout = bank.layout
    _check_arena("codes", codes, layout.codes_shape, torch.uint8)
    rows = _check_slots(ids, codes, length, slots, bias, layout.pos_shape)
    direct = codes.device.type == "cpu" and _slot_contiguous(codes)
    staged = codes if direct else torch.empty((len(ids), *layout.codes_shape), dtype=torch.uint8)
    target = _byte_rows(staged)

    def place(n: int, row: int, value: Any, head: Head) -> None:
        np.copyto(target[row if direct else n], np.frombuffer(value, np.uint8, head.kv_bytes, HEAD_BYTES))

    moved = _each(bank, ids, rows, length, bias, place)
    if ids and not direct:
        codes[torch.tensor(rows, device=codes.device)] = staged.to(codes.device)
    return moved


def _each(
    bank: Bank, ids: Sequence[bytes], rows: list[int], length: Tensor, bias: Tensor | None,
    place: Callable[[int, int, Any, Head], None],
) -> int:  # fmt: skip
    """Verify and place every record; returns the bytes read."""
    layout = bank.layout
    lengths = torch.empty(len(ids), dtype=torch.int32)
    biases: list[tuple[int, Tensor]] = []
    moved, cold = 0, []
    with bank.read() as txn:
        records = bank.env.db("records")
        announce(bank.env.data_path, "records", ids)
        for n, record_id in enumerate(ids):
            value = txn.get(record_id, db=records) or bank.unsaved.get(record_id)
            if value is None:
                if txn.get(record_id, db=bank.env.db("references")) is None:
                    raise UnknownRecord(record_id, bank.path)
                cold.append(record_id)
                continue
            map_pages(value)
            head = read_head(record_id, value, layout)
            place(n, rows[n], value, head)
            lengths[n] = head.n_valid
            moved += len(value)
            found = read_bias(value, head, layout)
            if found is not None:
                biases.append((n, found))
    if cold:
        raise ColdRecord(cold)
    if biases and bias is None:
        raise ValueError(
            f"bias: record {ids[biases[0][0]].hex()} has a score bias; pass bias=fp32 [S, Lm, Hm, K] (Bank.has_bias)"
        )
    index = torch.tensor(rows, dtype=torch.int64)
    if len(ids):
        length[index.to(length.device)] = lengths.to(length.device)
    if bias is not None and len(ids):
        bias[index.to(bias.device)] = 0
        for n, values in biases:
            bias[rows[n]] = values.to(bias.device)
    return moved


def _check_arena(name: str, arena: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None) -> None:
    if arena.dim() != len(shape) + 1 or tuple(arena.shape[1:]) != shape:
        raise ValueError(f"{name} must be [S, {', '.join(map(str, shape))}] for this bank, got {list(arena.shape)}")
    if dtype is not None and arena.dtype != dtype:
        raise ValueError(f"{name} must be {dtype} as the bank's records are, got {arena.dtype}")
    if not arena.dtype.is_floating_point and dtype is None:
        raise ValueError(f"{name} must have a floating point dtype, got {arena.dtype}")


def _check_slots(
    ids: Sequence[bytes], arena: Tensor, length: Tensor, slots: Any, bias: Tensor | None, pos_shape: tuple[int, ...]
) -> list[int]:
    rows = [int(s) for s in (slots.tolist() if isinstance(slots, Tensor) else slots)]
    if len(rows) != len(ids):
        raise ValueError(f"slots must have one entry per id ({len(ids)}), got {len(rows)}")
    count = arena.shape[0]
    for i, row in enumerate(rows):
        if not 0 <= row < count:
            raise ValueError(f"slots[{i}] must be in 0..{count - 1}, got {row}")
    if tuple(length.shape) != (count,) or length.dtype != torch.int32:
        raise ValueError(f"length must be int32 [{count}], got {length.dtype} {list(length.shape)}")
    if bias is not None and (tuple(bias.shape) != (count, *pos_shape) or bias.dtype != torch.float32):
        raise ValueError(f"bias must be fp32 {[count, *pos_shape]}, got {bias.dtype} {list(bias.shape)}")
    return rows


def _slot_contiguous(arena: Tensor) -> bool:
    return arena.shape[0] == 0 or arena[0].is_contiguous()


def _byte_rows(arena: Tensor) -> np.ndarray:
    """uint8 [S, bytes of a slot], sharing memory with a CPU tensor whose slots are contiguous, any slot stride."""
    raw = arena.detach().view(torch.uint8) if arena.dtype != torch.uint8 else arena.detach()
    size = raw[0].numel() if raw.shape[0] else 0
    return torch.as_strided(raw, (raw.shape[0], size), (raw.stride(0), 1)).numpy()
