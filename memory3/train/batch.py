"""What one forward pass of training takes: packed sequences, the rows that are predicted, the references they read."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor


class Piece(NamedTuple):
    """Rows of a sequence up to `end` (exclusive) that read the same references, given by record id."""

    end: int
    reads: tuple[Hashable, ...]


class Sample(NamedTuple):
    """One sequence.

    ids     all tokens, openings included; positions follow from whether it is read in memory mode
    first   ids[first:] are predicted, each from the token before it; 1 or more
    pieces  in memory mode, ascending and ending at len(ids); empty: a sequence without memory at position 0
    held    instead of predicting ids[first:], keep to the distributions of the base weights (no pieces)
    """

    ids: tuple[int, ...]
    first: int
    pieces: tuple[Piece, ...] = ()
    held: bool = False


@dataclass(frozen=True)
class Batch:
    """Operands of the model.

    tokens   int64 [T]; cu int32 [B + 1]
    rows     int64 [N], rows whose next token is predicted; targets int64 [N], those tokens
    cu_chunk int32 [C + 1] and slots int32 [C, R] (-1 none), or None for sequences without memory
    reads    record ids, number i in slot i: each once, however many chunks read it
    in_memory  bool [B], sequences in memory mode, or None where none is
    base_rows  int64 [M], rows of held sequences, and `base`, those sequences alone; None without
    """

    tokens: Tensor
    cu: Tensor
    rows: Tensor
    targets: Tensor
    cu_chunk: Tensor | None
    slots: Tensor | None
    reads: tuple[Hashable, ...]
    in_memory: Tensor | None = None
    base_rows: Tensor | None = None
    base: Batch | None = None

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(**{name: x.to(device) if isinstance(x, Tensor | Batch) else x for name, x in moved.items()})


def make_batch(samples: Sequence[Sample], mixed: bool = False) -> Batch:
    """Pack samples that are all with memory or all without; mixed: or some of each.

    Raises ValueError naming a sample with nothing to predict, or with pieces that do not cover it.
    """
    with_memory = any(s.pieces for s in samples) if mixed else bool(samples and samples[0].pieces)
    tokens: list[int] = []
    cu, rows, held, cu_chunk, sets = [0], [], [], [0], []
    for i, sample in enumerate(samples):
        length = len(sample.ids)
        if not 1 <= sample.first < length:
            raise ValueError(f"samples[{i}].first: expected 1..{length - 1} (tokens {length}), got {sample.first}")
        wanted = bool(sample.pieces) if mixed else with_memory
        if bool(sample.pieces) != wanted or (wanted and sample.pieces[-1].end != length):
            raise ValueError(
                f"samples[{i}].pieces: expected {'pieces up to ' + str(length) if wanted else 'none'} as the "
                f"first sample of the batch, got {[p.end for p in sample.pieces]}"
            )
        start = len(tokens)
        tokens.extend(sample.ids)
        cu.append(len(tokens))
        (held if sample.held else rows).extend(range(start + sample.first - 1, start + length - 1))
        for piece in sample.pieces or ((Piece(length, ()),) if with_memory else ()):
            cu_chunk.append(start + piece.end)
            sets.append(piece.reads)
    flat = torch.tensor(tokens, dtype=torch.int64)
    at = torch.tensor(rows, dtype=torch.int64)
    batch = Batch(flat, torch.tensor(cu, dtype=torch.int32), at, flat[at + 1] if len(at) else at, None, None, ())
    if held:
        alone = make_batch([s._replace(held=False) for s in samples if s.held])
        batch = replace(batch, base_rows=torch.tensor(held, dtype=torch.int64), base=alone)
    if not with_memory:
        return batch
    number = {record: n for n, record in enumerate(dict.fromkeys(r for reads in sets for r in reads))}
    width = max(map(len, sets))
    slots = [[*(number[r] for r in reads), *[-1] * (width - len(reads))] for reads in sets]
    return replace(
        batch,
        cu_chunk=torch.tensor(cu_chunk, dtype=torch.int32),
        slots=torch.tensor(slots, dtype=torch.int32).view(len(sets), width),
        reads=tuple(number),
        in_memory=torch.tensor([bool(s.pieces) for s in samples]),
    )
