"""gpu-check and its parts on a machine without a GPU: arithmetic, order of events, reports; never a time."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import replace

import pytest
import torch

from bench import __main__ as command
from bench.gpu import ceilings, check, clock, devices, measure, peers, roofline, shapes, steps
from bench.timing import Summary
from memory3_kernels import triton
from memory3_kernels._backends import has_cuda_kernel
from memory3_kernels._registry import OPS, Cost
from memory3_kernels.testing.compare import as_tuple

TINY = shapes.Shape("tiny", 10, 2, 80, context=128, batch=2, span=32)
A100 = devices.DEVICES["A100 80GB SXM"]


def test_blocks_an_sm_holds():
    assert A100.resident(128, 168, 0) == 3  # registers: 65536 / (4 warps x 168 x 32)
    assert A100.resident(128, 32, 50 * 1024) == 3  # shared: 164 KiB / 51 KiB
    assert A100.resident(1024, 32, 0) == 2 and A100.resident(32, 16, 0) == 32  # threads; blocks
    assert devices.DEVICES["RTX 4090"].resident(512, 32, 0) == 3


def test_devices_are_known_by_the_names_cuda_gives_them():
    assert devices.like("NVIDIA H100 80GB HBM3") is devices.DEVICES["H100 SXM"]
    assert devices.like("NVIDIA A100-SXM4-80GB") is A100
    assert devices.like("NVIDIA GeForce RTX 4090") is devices.DEVICES["RTX 4090"]
    assert devices.like("NVIDIA H100 PCIe") is devices.like("NVIDIA GeForce RTX 3090") is None


def test_predictions_follow_from_the_data_sheet():
    memory, compute, predicted = roofline.predict(Cost(2039 * 10**6, 312 * 10**6), A100, launches=2)
    assert memory == pytest.approx(1000) and compute == pytest.approx(1)
    assert predicted == pytest.approx(1000 / 0.9 + 4)
    _, _, bound = roofline.predict(Cost(2039, 312 * 10**9), A100)
    assert bound == pytest.approx(2000 + 2.5)
    assert roofline.predict(Cost(2039 * 10**6, 0), A100, moved=2 * 2039 * 10**6)[2] == pytest.approx(2000 / 0.9 + 2.5)


def test_compulsory_bytes_of_decoding_at_the_papers_shape():
    """Counted by hand: keys and values of context and memory, q and out, lse and mass."""
    tokens = 32 * (256 + 5 * 8)
    by_hand = tokens * 8 * 80 * 2 * 2 + 2 * 32 * 40 * 80 * 2 + 4 * 32 * 40 * 6
    assert roofline.cost_of("memory_decode", shapes.SHAPES["paper"]).bytes == by_hand


def test_the_table_has_every_op_shape_and_device(capsys):
    assert command.main(["roofline"]) == 0
    shown = capsys.readouterr().out
    for op in shapes.CALLS:
        assert shown.count(f"| `{op}`, ") == len(shapes.SHAPES)
    assert all(name in shown for name in devices.DEVICES)


def test_the_documented_tables_are_what_the_code_computes():
    """docs/gpu.md; after a change: `python -m bench roofline`."""
    text = (check.environment.ROOT / "docs" / "gpu.md").read_text()
    assert roofline.markdown(roofline.table()) in text
    for d in devices.DEVICES.values():
        assert f"| {d.name} | {d.arch / 10:.1f} | {d.gb_s:,.0f} | {d.tflops:,.0f} | {d.sms} |" in text


def test_every_op_with_a_gpu_kernel_has_a_call():
    assert {name for name in OPS if has_cuda_kernel(name) or triton.has_kernel(name)} <= set(shapes.CALLS)


@pytest.mark.parametrize("name", shapes.CALLS)
@pytest.mark.parametrize("shape", shapes.SHAPES.values(), ids=lambda s: s.name)
def test_calls_are_legal(name, shape):
    """The op's own shape checks, and a run of the small form that the gate uses."""
    op = OPS[name]
    op.fake(*shapes.make(name, shape)[0], **shapes.make(name, shape)[1])
    args, kwargs = shapes.make(name, replace(measure.small(shape), context=128), torch.bfloat16, "cpu")
    outputs = as_tuple(op(*args, **kwargs)) + tuple(args[i] for i in op.mutates)
    assert all(o.float().isfinite().all() for o in outputs if o is not None)


@pytest.mark.parametrize("name", peers.PEERS)
def test_peers_compute_the_same(name):
    """Those that run on a CPU; the others say what is missing."""
    op, ran = OPS[name], []
    for make in peers.PEERS[name]:
        said = measure.peer_gate(op, make, TINY, torch.float32, "cpu")
        assert said is None or "is not installed" in said, said
        ran += [make] if said is None else []
    assert ran


def test_flash_attn_and_flashinfer_get_their_arguments(monkeypatch):
    """Stand-ins that compute what their documentation says of these arguments."""

    def kvcache(q, k_cache, v_cache, *, cache_seqlens, softmax_scale, causal):
        assert causal and (cache_seqlens == k_cache.shape[1]).all()
        sides = (x.transpose(1, 2) for x in (q, k_cache, v_cache))
        out = torch.nn.functional.scaled_dot_product_attention(*sides, scale=softmax_scale, enable_gqa=True)
        return out.transpose(1, 2)

    class Wrapper:
        def __init__(self, workspace, layout, *, use_tensor_cores):
            assert layout == "NHD"

        def plan(self, indptr, indices, last, q_heads, kv_heads, dim, page, *, q_data_type, kv_data_type, sm_scale):
            assert q_data_type == kv_data_type
            self.planned = indptr.tolist(), indices.tolist(), last.tolist(), page, sm_scale

        def run(self, q, pages):
            indptr, indices, last, page, scale = self.planned
            outs = []
            for b in range(len(indptr) - 1):
                mine = indices[indptr[b] : indptr[b + 1]]
                count = (len(mine) - 1) * page + last[b]
                k, v = (x[mine].flatten(0, 1)[:count].unsqueeze(0) for x in pages)
                outs.append(kvcache(q[b : b + 1].unsqueeze(1), k, v, cache_seqlens=torch.tensor([count]),
                                    softmax_scale=scale, causal=True)[0])  # fmt: skip
            return torch.cat(outs)

    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_with_kvcache=kvcache))
    monkeypatch.setitem(sys.modules, "flashinfer", types.SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=Wrapper))
    for make in (peers.flash_attn_kvcache, peers.flashinfer_paged, peers.flashinfer_tensor_cores):
        assert measure.peer_gate(OPS["memory_decode"], make, replace(TINY, dim=64), torch.float32, "cpu") is None
    said = measure.peer_gate(OPS["memory_decode"], peers.flashinfer_paged, TINY, torch.float32, "cpu")
    assert "expected a head dimension" in said


class FakeCuda:
    """Events that count what happened before them; graphs that replay what they saw."""

    def __init__(self, capturable=True):
        self.log, self.capturable, self.capturing = [], capturable, None

    def Event(self, enable_timing):
        cuda = self

        class Event:
            def record(self):
                cuda.log.append("event")
                self.at = sum(what == "call" for what in cuda.log)

            def elapsed_time(self, end):
                return (end.at - self.at) / 1e3  # a call takes a microsecond

        return Event()

    def Stream(self):
        return "side"

    def stream(self, stream):
        return self._context(None)

    def CUDAGraph(self):
        return types.SimpleNamespace(replay=None)

    def graph(self, graph, stream):
        if not self.capturable:
            raise RuntimeError("operation not permitted when stream is capturing")
        return self._context(graph)

    def _context(self, graph):
        import contextlib

        @contextlib.contextmanager
        def block():
            before = len(self.log)
            yield
            if graph is not None:
                seen = self.log[before:]
                del self.log[before:]
                graph.replay = lambda: self.log.extend(seen)

        return block()

    def synchronize(self):
        self.log.append("wait")


@pytest.mark.parametrize("capturable", [True, False])
def test_clock(capturable, monkeypatch):
    """Cold: a flush before the event, one call between the events. Nothing waits inside a series."""
    cuda = FakeCuda(capturable)
    made = clock.Clock(64, cuda, "cpu")
    monkeypatch.setattr(made, "flush", lambda: cuda.log.append("flush"))
    times = made.measure(lambda: cuda.log.append("call"), rounds=3)
    assert times.captured is capturable
    assert times.cold == Summary(1.0, 1.0, 1.0, 3) and times.hot == Summary(1.0, 1.0, 1.0, 3)
    text = " ".join(cuda.log)
    assert text.count("flush event call event") == 4 and "event wait event" not in text
    assert "flush event call event flush event call event flush event call event flush event call event wait" in text


class StubClock:
    def __init__(self, cache_bytes=0):
        pass

    def measure(self, call, rounds, capture=True):
        call()
        return clock.Times(Summary.of([12.0] * rounds), Summary.of([10.0] * rounds), True)


def on_cpu(monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
    for name in ("paper", "llama-3-8b"):
        monkeypatch.delitem(shapes.SHAPES, name)
    real = measure.measure
    monkeypatch.setattr(measure, "measure", lambda *a, **k: real(*a, **(k | {"device": "cpu"})))
    monkeypatch.setattr(measure, "BATCHES", (1, 2))
    monkeypatch.setattr(measure, "CONTEXTS", (64,))


def test_rows_and_report(monkeypatch, tmp_path, capsys):
    """Whatever cannot run has its reason in its row, and the command fails for it where it is one of our kernels."""
    on_cpu(monkeypatch)
    monkeypatch.setattr(check, "missing", lambda: None)
    gpu = {"name": "NVIDIA A100-SXM4-80GB", "capability": "8.0", "memory_bytes": 80 << 30, "sms": 108,
           "l2_bytes": 40 << 20, "cuda_of_torch": "13.0", "archs": "80", "cuda_kernels": "in use"}  # fmt: skip
    monkeypatch.setattr(check, "about", lambda: gpu)
    monkeypatch.setattr(check, "Clock", StubClock)
    best = ceilings.measure(StubClock(), 2, "cpu", 1 << 10, 8)
    monkeypatch.setattr(ceilings, "measure", lambda *_: best)
    monkeypatch.setattr(steps, "tests", lambda: steps.Step("tests", "passed", "9 passed"))
    out = tmp_path / "report"
    line = ["gpu-check", "--op", "memory_decode", "--skip", "sanitizers", "--rounds", "2", "--out", str(out)]
    assert command.main(line) == 1
    report = json.loads(out.with_suffix(".json").read_text())
    by = {row["backend"]: row for row in report["rows"]}
    assert "an argument is on cpu" in by["cuda"]["reason"] and by["reference"]["cold_us"] == 12.0
    assert by["sdpa_concatenated"]["kind"] == "peer" and by["sdpa_concatenated"]["hot_us"] == 10.0
    cost = roofline.cost_of("memory_decode", TINY)
    assert by["reference"]["bandwidth_share"] == pytest.approx(cost.bytes / 12.0 / 1e3 / best.read_gb_s)
    assert {row["refs"] for row in report["decode"]} == {0, 5}
    text = out.with_suffix(".md").read_text()
    assert text in capsys.readouterr().out and "| tests | passed |" in text and "| `memory_decode`, tiny |" in text
    report["rows"] = [by["reference"] | {"backend": "cuda"}]
    report["decode"] = []
    assert check.verdict(report) == 0
    report["steps"][0]["verdict"] = "failed"
    assert check.verdict(report) == 1


def test_without_a_gpu_it_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    assert command.main(["gpu-check"]) == 2
    said = capsys.readouterr()
    assert "Nothing was checked" in said.err and "gpu-proof" in said.out
    assert not list(tmp_path.iterdir())


def test_steps_read_what_their_processes_say(monkeypatch, tmp_path):
    monkeypatch.setattr(
        steps, "_pytest", lambda *_: ["sh", "-c", "echo FAILED a::b; echo '1 failed, 2 passed'; exit 1"]
    )
    assert steps.tests().verdict == "failed" and "a::b" in steps.tests().detail
    monkeypatch.setattr(steps, "_pytest", lambda *_: ["sh", "-c", "echo '2 passed in 1s'"])
    assert steps.tests().verdict == "passed"
    monkeypatch.setattr(steps, "_pytest", lambda *_: ["sleep", "9"])
    assert steps.tests(timeout=0.1).verdict == "failed"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(steps.shutil, "which", lambda name: None)
    assert steps.sanitizer("memcheck").verdict == "skipped"
    program = tmp_path / "compute-sanitizer"
    monkeypatch.setattr(steps.shutil, "which", lambda name: str(program))
    for code, verdict in ((0, "passed"), (steps.FOUND, "failed")):
        program.write_text(f"#!/bin/sh\necho '========= ERROR SUMMARY: {code} errors'\nexit {code}\n")
        program.chmod(0o755)
        step = steps.sanitizer("racecheck")
        assert (step.verdict, f"{code} errors" in step.detail) == (verdict, True)
