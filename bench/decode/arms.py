"""The arms of a setting: what is run, what happens before each run, and which bank it reads."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from memory3 import Bank, Engine
from memory3.generation import Stats
from memory3.rag import with_references

from .. import environment
from ..evict import device_bytes
from ..rivals import again, full_kv
from .worst import UniqueEngine

# (arm, the letter, what it is)
ABOUT = {
    "none": "no retrieval",
    "memory": "explicit memory, dense records",
    "memory-vq": "explicit memory, vector-quantised records",
    "rag": "references in front of the prompt, retrieved once",
    "rag-append": "RAG again every 64 tokens, references appended, key-values kept",
    "rag-front": "RAG again every 64 tokens, references in front, all computed again",
    "full-kv": "independent full key-values from disk, retrieved once (TurboRAG-like)",
    "llama.cpp": "llama.cpp, no retrieval",
    "llama.cpp-rag": "llama.cpp, references in front of the prompt",
}
PROTOCOLS = {
    "warm": tuple(ABOUT),
    "worst": ("none", "memory", "memory-vq", "full-kv"),  # text is a few KB: the others have no worse case
}
LOADING = ("memory", "memory-vq", "full-kv")  # what reads records
CACHE_SLOTS = 256  # Engine's own default


@dataclass(frozen=True)
class Setting:
    """What all arms of a comparison share."""

    weights: str  # "dense" or "checkpoint"
    protocol: str  # "warm" or "worst"
    batch: int
    refs: int
    threads: int
    tokens: int  # in, and out

    @property
    def key(self) -> str:
        return (
            f"{self.weights} weights, {self.protocol}, batch {self.batch}, {self.refs} references, "
            f"{self.threads} threads, {self.tokens} tokens"
        )


@dataclass
class Arm:
    """`run(prompts, new tokens)` is timed; `before` is not."""

    name: str
    run: Callable[[Sequence[Sequence[int]], int], Stats]
    before: Callable[[], None] = lambda: None
    stored: Callable[[], int] = lambda: 0  # records in its bank
    forget: Callable[[], None] = lambda: None  # empties its slots
    process: Callable[[], int] | None = field(default=None)  # whose memory counts; None: this one


@dataclass(frozen=True)
class Banks:
    """One set of references in three formats; the model of each says how it reads them."""

    dense: Bank
    coded: Bank
    full: Bank


def build(setting: Setting, model, banks: Banks, embedder, names: Sequence[str], peer=None) -> dict[str, Arm]:
    """The named arms that this setting has. peer: a LlamaCpp, for its arms."""
    return {
        name: _arm(name, setting, model, banks, embedder, peer) for name in served(setting, names, peer is not None)
    }


def served(setting: Setting, names: Sequence[str], llama: bool) -> list[str]:
    """Those of the named arms that this setting has; llama: whether there is a llama.cpp."""
    llama = llama and llama_runs(setting)
    return [n for n in PROTOCOLS[setting.protocol] if n in names and (llama or not n.startswith("llama.cpp"))]


def llama_runs(setting: Setting) -> bool:
    """One sequence, and the weights of the file."""
    return setting.batch == 1 and setting.weights == "checkpoint"


def _arm(name: str, setting: Setting, model, banks: Banks, embedder, peer) -> Arm:
    if name == "none":
        return Arm(name, _generating(Engine(model, mode="none")))
    if name in LOADING:
        bank = {"memory": banks.dense, "memory-vq": banks.coded, "full-kv": banks.full}[name]
        reader = model
        if name == "full-kv":
            reader = full_kv.retrieving_once(full_kv.full_kv_model(model))
        kind = UniqueEngine if setting.protocol == "worst" else Engine
        engine = kind(reader, bank, embedder, refs=setting.refs, slots=slots(setting, name))
        before = engine.restart if setting.protocol == "worst" else lambda: None
        return Arm(name, _generating(engine), before, partial(_records, bank), lambda: engine.arena.clear())
    rag = Engine(model, banks.dense, embedder, mode="rag", refs=setting.refs)
    if name == "rag":
        return Arm(name, _generating(rag))
    if name in ("rag-append", "rag-front"):
        place = name.removeprefix("rag-")
        return Arm(name, lambda prompts, new: again.generate(rag, prompts, new, place)[1])
    engine = rag if name == "llama.cpp-rag" else Engine(model, mode="none")
    return Arm(name, lambda prompts, new: _llama(engine, peer, prompts, new), process=lambda: peer.pid)


def _records(bank: Bank) -> int:
    return bank.env.stat()["records"]["entries"]


def slots(setting: Setting, name: str) -> int:
    """Enough for every memory of a run, and no fewer than the engine's default."""
    retrievals = 1 if name == "full-kv" else 2 * setting.tokens // 64
    need = setting.refs * setting.batch * retrievals
    return need if name == "full-kv" else max(CACHE_SLOTS, need)


def _generating(engine: Engine) -> Callable[[Sequence, int], Stats]:
    return lambda prompts, new: engine.generate(prompts, max_new_tokens=new, ignore_eos=True)[0].stats


def _llama(engine: Engine, peer, prompts: Sequence[Sequence[int]], new: int) -> Stats:
    """llama.cpp on one prompt; retrieval, where the engine's mode asks for it, is done here and counts."""
    begin = time.perf_counter()
    stats = Stats(batch=1)
    (prompt,) = prompts
    ids = [*engine.opening(prompt), *prompt]
    if engine.mode == "rag":
        ((front,), _) = with_references(engine, prompts, stats)
        ids = [*front, *ids]
    found = time.perf_counter() - begin
    seen = peer.generate(ids, new)
    stats.prompt_tokens, stats.new_tokens = len(ids), len(seen["ids"])
    stats.times |= {"prefill": seen["prefill_s"], "decode": seen["decode_s"]}
    stats.ttft_s = found + seen["prefill_s"]
    stats.total_s = stats.ttft_s + seen["decode_s"]
    config = engine.model.config
    stats.kv_bytes = (len(ids) + new) * 2 * 2 * config.n_layers * config.n_kv_heads * config.head_dim  # 16-bit cache
    return stats


def timed(arm: Arm, prompts: Sequence[Sequence[int]], new: int) -> dict[str, Any]:
    """One run: its Stats, wall and processor seconds, the share of all processors that other processes took meanwhile,
    bytes that came from the device.

    A run that had to write memories first is made again, from empty slots: the memories are in the bank then.
    """
    stored = arm.stored()
    found = _timed(arm, prompts, new)
    if arm.stored() != stored:
        arm.forget()
        found = _timed(arm, prompts, new)
    return found


def _timed(arm: Arm, prompts: Sequence[Sequence[int]], new: int) -> dict[str, Any]:
    arm.before()
    gc.collect()
    pid = arm.process() if arm.process else None
    read = device_bytes()
    begin, cpu, busy = time.perf_counter(), environment.cpu_seconds(pid), environment.busy_seconds()
    stats = arm.run(prompts, new)
    wall = time.perf_counter() - begin
    cpu, busy = environment.cpu_seconds(pid) - cpu, environment.busy_seconds() - busy
    return {
        "wall_s": wall,
        "cpu_s": cpu,
        "others": max(0.0, busy - cpu) / wall / os.cpu_count(),
        "ttft_s": stats.ttft_s,
        "prompt_tokens": stats.prompt_tokens,
        "new_tokens": stats.new_tokens,
        "kv_bytes": stats.kv_bytes,
        "retrievals": stats.retrievals,
        "bytes_loaded": stats.bytes_loaded,
        "device_bytes": device_bytes() - read,
        "times": stats.times,
        "load": environment.load_average(),
    }


def peak_memory(arm: Arm, prompts: Sequence[Sequence[int]], new: int) -> dict[str, int]:
    """Peak resident bytes of the process that runs the arm (llama.cpp's own, for its arms), weights included."""
    arm.run(prompts, new)
    return {"peak_rss_bytes": high_water(arm.process() if arm.process else os.getpid())}


def high_water(pid: int) -> int:
    """VmHWM of a process, in bytes."""
    with open(f"/proc/{pid}/status", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    raise OSError(f"/proc/{pid}/status has no VmHWM")
