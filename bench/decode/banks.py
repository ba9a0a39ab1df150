"""The same references in several formats: every bank has the same texts and embeddings, so all find the same."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np

from memory3 import Bank
from memory3.bank.codec import Codec, train_codec
from memory3.model.load import MemoryModel

from ..evict import evict
from ..rivals.full_kv import full_kv_model

CODEC = "OPQ8_64,Residual2x8,PQ8x8"
SAMPLE = 384  # references that a codec is trained on
BATCH = 500


def codec_spec(head_dim: int) -> str:
    """The paper's family of codecs at 10 bytes per vector, with the parts that fit a head dimension."""
    return CODEC.replace("64", str(head_dim)) if head_dim % 8 == 0 else CODEC


def sibling(
    folder: Path, model: MemoryModel, source: Bank, references: int, codec: Callable[[], Codec] | None = None
) -> Bank:
    """A bank in another format with the first `references` of `source`, open for writing.

    Only texts and embeddings are copied. A memory is written when it is first retrieved, and is then there for good:
    the untimed runs before a measurement write them all.
    """
    identity = model.identity(embedder=source.identity.embedder)
    if (folder / "data.mdb").is_file():
        return Bank.open(folder, write=True)
    bank = Bank.create(folder, identity, codec=codec and codec())
    wanted = islice(source.ids(), references)
    while part := list(islice(wanted, BATCH)):
        found = [source.reference(i) for i in part]
        vectors = np.stack([source.embedding(i) for i in part])
        bank.add_cold([r.text for r in found], [r.token_ids for r in found], vectors)
    bank.build_index()
    return bank


def train(model: MemoryModel, source: Bank, spec: str, progress: Callable[[int, int], None] | None = None) -> Codec:
    """A codec for this model's memories, from the first references of a bank (ids are hashes: a random draw)."""
    ids = list(islice(source.ids(), SAMPLE))
    return train_codec(spec, model.write_ids([source.token_ids(i) for i in ids], progress=progress))


def write_seconds(model: MemoryModel, banks) -> dict[str, float]:
    """Seconds of encoding one reference, by arm; the median of three batches of eight. Storing it is not counted."""
    ids = list(islice(banks.dense.ids(), 8))
    references = [banks.dense.token_ids(i) for i in ids]

    def seconds(call) -> float:
        times = []
        for _ in range(4):  # the first one is a warm-up
            begin = time.perf_counter()
            call()
            times.append((time.perf_counter() - begin) / len(references))
        return sorted(times[1:])[1]

    memories = model.write_ids(references)
    dense = seconds(lambda: model.write_ids(references))
    coding = seconds(lambda: [banks.coded.codec.encode(m.kv) for m in memories])
    full = full_kv_model(model)
    return {"memory": dense, "memory-vq": dense + coding, "full-kv": seconds(lambda: full.write_ids(references))}


def device_rate(path: Path, most: int = 256 << 20) -> float:
    """GB/s of reading a file's first bytes in order, pages evicted before: the ceiling for records on the device."""
    evict(path)
    with open(path, "rb", buffering=0) as file:
        begin, read = time.perf_counter(), 0
        while read < most and (part := file.read(4 << 20)):
            read += len(part)
        return read / (time.perf_counter() - begin) / 1e9
