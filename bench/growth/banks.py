"""A bank that grows to a million made-up references with vector-quantised records."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from memory3 import PRESETS, Bank, Identity
from memory3.arena import Arena
from memory3.bank.codec import Codec, Tables
from memory3.bank.format import Reference, pack_record
from memory3.bank.index import FLAT_UP_TO
from memory3.bank.writing import add_packed

from ..timing import quantile

SIZES = (1_000, 10_000, 100_000, 1_000_000)
EMBEDDING, CENTRES = 384, 2_000
KEPT = 8  # the paper's tokens per head
QUERIES, LOADS, REFS = 200, 200, 5
BATCH = 1_000


def bank(args, folder: Path, have: set, end: float) -> Iterator[dict[str, Any]]:
    """Points of one bank that grows; below FLAT_UP_TO it is searched exactly, above by graph and by inverted file."""
    preset = PRESETS["smollm2-135m"]
    memory = replace(preset.memory, tokens=KEPT)
    identity = made_up_identity(preset, memory)
    grown = folder / "bank"
    for size in sorted(args.sizes):
        if ("bank", "references", size) in have:
            continue
        if time.monotonic() > end:
            return
        yield {"curve": "references", "axis": "references", "x": size, "values": measure(grown, identity, size)}


def made_up_identity(preset, memory) -> Identity:
    shape = memory.record_shape(preset.model)
    return Identity(
        model_hash="made up", tokenizer_hash="made up", prefix_ids=memory.prefix_ids,
        context_bos_ids=memory.context_bos_ids, layers=memory.layers, head_map=None, tokens=memory.tokens,
        span=memory.span, head_dim=preset.model.head_dim, record_heads=shape[2], rope_base=preset.model.rope_base,
        rope_scaling=None, dtype="bfloat16", rule=memory.rule, codec="dense", embedder="made up",
    )  # fmt: skip


def made_up_codec(dim: int = 64) -> Codec:
    """Random tables without rotation, 10 bytes per vector: decoding costs the same whatever they hold."""
    make = torch.Generator().manual_seed(3)

    def tables() -> Tables:
        coarse = torch.randn((2, 256, dim // 2), generator=make)
        return Tables(coarse, torch.randn((8, 256, dim // 8), generator=make), None)

    return Codec("Residual2x8,PQ8x8", tables(), tables())


def embeddings(first: int, count: int) -> np.ndarray:
    """fp32 [count, EMBEDDING], length 1: a mixture of Gaussians; the same numbers always give the same rows."""
    centres = np.random.default_rng(1).standard_normal((CENTRES, EMBEDDING), dtype=np.float32)
    rng = np.random.default_rng((2, first))
    rows = centres[rng.integers(0, CENTRES, count)] + rng.standard_normal((count, EMBEDDING), dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def fill(store: Bank, size: int) -> tuple[int, float]:
    """(references added, seconds of packing and committing them) up to `size`; made-up data is made untimed."""
    rng, seconds, added = np.random.default_rng(5), 0.0, 0
    places = torch.arange(KEPT, dtype=torch.int32).expand(store.layout.pos_shape)
    for first in range(len(store), size, BATCH):
        count = min(BATCH, size - first)
        vectors = embeddings(first, count)
        codes = torch.from_numpy(rng.integers(0, 256, (count, *store.layout.codes_shape), dtype=np.uint8))
        tokens = [[first + i, *rng.integers(0, 1000, 127).tolist()] for i in range(count)]
        begin = time.perf_counter()
        references = [Reference(store.record_id(ids), "made up", ids, "", "") for ids in tokens]
        records = {
            r.id: pack_record(r.id, store.layout, code, places, KEPT, len(r.token_ids), None)
            for r, code in zip(references, codes, strict=True)
        }
        add_packed(store, references, dict(zip((r.id for r in references), vectors, strict=True)), records)
        seconds += time.perf_counter() - begin
        added += count
    return added, seconds


def measure(folder: Path, identity: Identity, size: int) -> dict[str, float]:
    """Grows the bank in `folder` to `size` references and times it."""
    there = (folder / "data.mdb").is_file()
    values: dict[str, float] = {}
    with Bank.open(folder, write=True) if there else Bank.create(folder, identity, codec=made_up_codec()) as store:
        added, seconds = fill(store, size)
        if added:
            values["written/s"] = added / seconds
    values["disk bytes/reference"] = (folder / "data.mdb").stat().st_size / size
    kinds = ("flat",) if size <= FLAT_UP_TO else ("hnsw", "ivf")
    queries = embeddings(10**9, QUERIES)
    exact = None
    for kind in kinds:
        (folder / "index.faiss").unlink(missing_ok=True)
        with Bank.open(folder, index=kind) as store:
            begin = time.perf_counter()
            store.build_index()
            values[f"{kind} build s"] = time.perf_counter() - begin
            found, times = [], []
            for query in queries:
                begin = time.perf_counter()
                ids, _ = store.search(query[None], REFS)
                times.append((time.perf_counter() - begin) * 1e3)
                found.append(ids[0])
            values |= quantiles(f"{kind} search ms", times)
            if kind == kinds[0]:
                values |= quantiles("load ms", load_times(store))
            if kind != "flat":
                exact = exact or nearest(store, queries)
                values[f"{kind} recall"] = recall(found, exact)
    return values


def load_times(store: Bank) -> list[float]:
    """Milliseconds of bringing five records, drawn at random, into slots: decoded, checksums verified."""
    ids = list(store.ids())
    rng = np.random.default_rng(9)
    arena = Arena(store.layout.kv_shape, REFS, store.layout.dtype)
    times = []
    for _ in range(LOADS):
        chosen = [ids[i] for i in rng.choice(len(ids), REFS, replace=False)]
        arena.clear()
        begin = time.perf_counter()
        slots = arena.load(chosen, store)
        times.append((time.perf_counter() - begin) * 1e3)
        arena.release(slots)
    return times


def nearest(store: Bank, queries: np.ndarray) -> list[list[bytes]]:
    """By brute force over what the bank holds, a part of it at a time."""
    best: list[list[tuple[float, bytes]]] = [[] for _ in queries]
    ids: list[bytes] = []
    rows: list[np.ndarray] = []

    def settle() -> None:
        scores = queries @ np.stack(rows).T
        top = np.argsort(-scores, axis=1)[:, :REFS]
        for q, line in enumerate(top):
            best[q] = sorted([*best[q], *((float(scores[q, i]), ids[i]) for i in line)], reverse=True)[:REFS]
        ids.clear()
        rows.clear()

    for record in store.ids():
        ids.append(record)
        rows.append(store.embedding(record))
        if len(ids) == 8192:
            settle()
    if ids:
        settle()
    return [[record for _, record in line] for line in best]


def recall(found: list[list[bytes]], exact: list[list[bytes]]) -> float:
    """Share of the true neighbours that were found."""
    hits = sum(len(set(f) & set(e)) for f, e in zip(found, exact, strict=True))
    return hits / sum(map(len, exact))


def quantiles(name: str, values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {f"{name} p50": quantile(ordered, 0.5), f"{name} p99": quantile(ordered, 0.99)}
