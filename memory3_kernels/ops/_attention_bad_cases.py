"""Calls the attention ops must refuse, with the words of the error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .._registry import BadCase
from ._attention_cases import BASE, attention_sample, backward_sample, coded_sample, decode_sample


def _broken(make: Callable, **changes) -> Callable:
    """The sample with arguments replaced: by position (`at3=...`) or by keyword."""

    def call():
        args, kwargs = make(torch.float32, torch.Generator().manual_seed(0))
        args = list(args)
        for name, change in changes.items():
            if name.startswith("at"):
                place = int(name[2:])
                args[place] = change(args[place]) if callable(change) else change
            else:
                kwargs[name] = change
        return tuple(args), kwargs

    return call


def _int(*values) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def attention_bad_cases(make: Callable | None = None, shift: int = 0):
    """`shift`: operands before q."""
    make = make or attention_sample(replace(BASE, bias="normal", head_map=(1, 0)))

    def bad(name: str, place: int, change, match: str, fake: bool = True) -> BadCase:
        return BadCase(name, _broken(make, **{f"at{place + shift}": change}), match, fake)

    def value(name: str, place: int, change, match: str) -> BadCase:
        return bad(name, place, change, match, False)

    def size(name: str, match: str) -> BadCase:
        return BadCase(f"{name}-small", _broken(make, **{name: 1}), match, fake=False)

    zeros = torch.zeros
    yield bad("q-rank", 0, lambda t: t[0], r"q: expected shape \[\*, \*, \*\]|k: expected shape")
    yield bad("q-dim", 0, zeros(8, 4, 12), "expected a head dimension that is a multiple of 8|expected shape")
    yield bad("q-heads", 0, zeros(8, 3, 16), "expected .* multiple of the 2 KV heads, got 3|expected shape")
    yield bad(
        "k-dtype",
        1,
        lambda t: t.to(torch.bfloat16),
        "k: expected .*[fF]loat.*, got .*[bB][fF]",
    )
    yield bad("v-none", 2, None, "v: expected k and v both given")
    yield bad("v-shape", 2, zeros(10, 2, 8), r"v: expected shape \[10, 2, 16\], got \[10, 2, 8\]")
    yield bad("k-stride", 1, zeros(16, 10, 2).permute(1, 2, 0), "k: expected a last stride of 1")
    yield bad("cu_q-dtype", 3, _int(0, 5, 8).long(), "cu_q: expected .*[iI]nt")
    yield bad("mem_v-shape", 7, zeros(4, 2, 3, 8), r"mem_v: expected shape \[4, 2, 3, 16\]")
    yield bad("mem_slot-shape", 8, zeros(9, 2, dtype=torch.int32), r"mem_slot: expected shape \[3, \*\], got \[9, 2\]")
    yield bad("mem_len-shape", 9, _int(1), r"mem_len: expected shape \[4\], got \[1\]")
    yield bad("mem_bias-dtype", 10, lambda t: t.half(), "mem_bias: expected .*[fF]loat")
    yield bad("head_map-shape", 11, _int(0), r"head_map: expected shape \[2\], got \[1\]")
    yield value("cu_q-start", 3, _int(1, 5, 8), r"cu_q\[0\]: expected 0, got 1")
    yield value("cu_q-falls", 3, _int(0, 9, 8), r"cu_q\[2\]: expected at least cu_q\[1\] = 9, got 8")
    yield value("cu_q-end", 3, _int(0, 5, 7), r"cu_q\[2\]: expected 8, the number of rows, got 7")
    yield value("cu_k-end", 4, _int(0, 7, 11), r"cu_k\[2\]: expected at most 10, the number of rows, got 11")
    yield value("cu_k-short", 4, _int(0, 3, 10), "cu_k: expected at least 5 keys in sequence 0, .* got 3")
    yield value("cu_chunk-boundary", 5, _int(0, 4, 6, 8), r"cu_chunk: expected a boundary at cu_q\[1\] = 5")
    yield value("cu_chunk-end", 5, _int(0, 4, 5, 9), r"cu_chunk\[3\]: expected 8, the number of rows, got 9")
    yield value(
        "mem_slot-high",
        8,
        _int(0, 1, 2, 3, 4, 1).reshape(3, 2),
        r"mem_slot\[2, 0\]: expected -1 or a slot below 4, got 4",
    )
    yield value(
        "mem_slot-low",
        8,
        _int(0, 1, 2, -2, 0, 1).reshape(3, 2),
        r"mem_slot\[1, 1\]: expected -1 or a slot below 4, got -2",
    )
    yield value("mem_len-high", 9, _int(0, 1, 4, 0), r"mem_len\[2\]: expected 0..3, got 4")
    yield value("mem_len-low", 9, _int(0, 1, -1, 0), r"mem_len\[2\]: expected 0..3, got -1")
    yield value("head_map-high", 11, _int(0, 2), r"head_map\[1\]: expected -1 or a record head below 2, got 2")
    yield size("max_q", "max_q: expected at least 5, the longest piece of cu_q, got 1")
    yield size("max_k", "max_k: expected at least 7, the longest piece of cu_k, got 1")
    yield size("max_chunk", "max_chunk: expected at least 4, the longest piece of cu_chunk, got 1")


def backward_bad_cases():
    make = backward_sample(replace(BASE, bias="normal", head_map=(1, 0)))
    yield BadCase("grad_out-shape", _broken(make, at0=torch.zeros(8, 4, 8)), r"grad_out: expected shape \[8, 4, 16\]")
    yield BadCase("grad_lse-dtype", _broken(make, at1=lambda t: t.half()), "grad_lse: expected .*[fF]loat")
    yield BadCase("lse-shape", _broken(make, at3=torch.zeros(8, 3)), r"lse: expected shape \[8, 4\], got \[8, 3\]")
    for bad in attention_bad_cases(make, shift=4):
        if bad.id in (
            "v-none",
            "mem_v-shape",
            "cu_q-falls",
            "cu_k-short",
            "mem_slot-high",
            "mem_len-high",
            "max_q-small",
        ):
            yield bad


def decode_bad_cases(make: Callable | None = None, page_make: Callable | None = None):
    spec = replace(BASE, sequences=((2, 7), (1, 4)), chunk=16, bias="normal", head_map=(1, 0))
    make = make or decode_sample(spec)
    page_make = page_make or decode_sample(replace(spec, page=16))

    def bad(name: str, place: int, change, match: str, fake: bool = True, make=make) -> BadCase:
        return BadCase(name, _broken(make, **{f"at{place}": change}), match, fake)

    zeros = torch.zeros
    yield bad("k_cache-rank", 1, zeros(2, 12, 2), r"k_cache: expected shape \[\*, \*, \*, 16\]")
    yield bad("k_cache-batch", 1, zeros(3, 12, 2, 16), "k_cache: expected 2 sequences|v_cache: expected shape")
    yield bad("v_cache-shape", 2, zeros(2, 12, 2, 8), r"v_cache: expected shape \[2, 12, 2, 16\], got \[2, 12, 2, 8\]")
    yield bad("kv_len-dtype", 3, zeros(2), "kv_len: expected .*[iI]nt")
    yield bad("mem_slot-shape", 8, zeros(3, 2, dtype=torch.int32), r"mem_slot: expected shape \[2, \*\], got \[3, 2\]")
    yield BadCase("max_q-large", _broken(make, max_q=17), "max_q: expected at most 16 new tokens per sequence, got 17")
    yield bad(
        "block_table-shape",
        4,
        zeros(3, 2, dtype=torch.int32),
        r"block_table: expected shape \[2, \*\], got \[3, 2\]",
        make=page_make,
    )
    yield bad(
        "page-size",
        1,
        lambda t: t[:, :12],
        "(v_cache: expected shape|expected pages of a power of two)",
        make=page_make,
    )
    yield bad("cu_q-end", 5, _int(0, 2, 4), r"cu_q\[2\]: expected 3, the number of rows, got 4", False)
    yield bad(
        "kv_len-high",
        3,
        _int(7, 13),
        r"kv_len\[1\]: expected 0, or 1 \(new tokens\) to 12 \(capacity of the cache\), got 13",
        fake=False,
    )
    yield bad("kv_len-low", 3, _int(1, 4), r"kv_len\[0\]: expected 0, or 2 \(new tokens\) to 12", False)
    yield bad(
        "page-high",
        4,
        _int(0, 0, 99, 0).reshape(2, 2),
        r"block_table\[1, 0\]: expected a page below 7, got 99",
        False,
        page_make,
    )
    yield bad(
        "mem_slot-high",
        8,
        _int(0, 1, 2, 4).reshape(2, 2),
        r"mem_slot\[1, 1\]: expected -1 or a slot below 4, got 4",
        fake=False,
    )
    yield bad("mem_len-high", 9, _int(4, 0, 0, 0), r"mem_len\[0\]: expected 0..3, got 4", False)
    yield bad(
        "head_map-low", 11, _int(0, -2), r"head_map\[1\]: expected -1 or a record head below 2, got -2", fake=False
    )
    yield BadCase(
        "max_q-small",
        _broken(make, max_q=1),
        "max_q: expected at least 2, the longest piece of cu_q, got 1",
        fake=False,
    )
    yield BadCase(
        "max_kv-small", _broken(make, max_kv=3), "max_kv: expected at least 7, the largest kv_len, got 3", fake=False
    )


def coded_bad_cases():
    spec = replace(BASE, sequences=((2, 7), (1, 4)), chunk=16, head_map=(1, 0))
    make = coded_sample(spec)

    def bad(name: str, place: int, change, match: str, fake: bool = True) -> BadCase:
        return BadCase(name, _broken(make, **{f"at{place}": change}), match, fake)

    zeros = torch.zeros
    yield bad("codes-dtype", 6, lambda t: t.int(), "mem_k_codes: expected .*(uint8|Byte)")
    yield bad("codes-bytes", 7, zeros(4, 2, 32, dtype=torch.uint8), r"mem_v_codes: expected shape \[4, 2, 16\], got")
    yield bad("k-table", 12, zeros(2, 17, 8), r"k_coarse: expected 2\^4 to 2\^14 entries, got 17")
    yield bad("v-table", 16, zeros(4, 32, 8), "v_fine: expected pieces that make up 16 .*, got 4 x 8")
    yield bad("rot", 14, zeros(8, 8), r"k_rot: expected shape \[16, 16\], got \[8, 8\]")
    yield bad("cache-dtype", 1, lambda t: t.half(), "k_cache: expected .*[fF]loat")
    yield bad(
        "mem_slot-high", 8, _int(0, 1, 2, 4).reshape(2, 2), r"mem_slot\[1, 1\]: expected -1 or a slot below 4", False
    )
    yield bad("mem_len-high", 9, _int(4, 0, 0, 0), r"mem_len\[0\]: expected 0..3, got 4", False)
    yield bad("kv_len-high", 3, _int(7, 13), r"kv_len\[1\]: expected 0, or 1 \(new tokens\) to 12", False)
    yield BadCase("tokens", _broken(make, tokens=6), r"mem_k_codes: expected shape \[\*, \*, 32\]|mem_k_codes: .*32")
    yield BadCase("tokens-zero", _broken(make, tokens=0), "tokens: expected at least 1, got 0")
