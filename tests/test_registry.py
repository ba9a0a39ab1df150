"""Contracts are complete, documented and public; the choice of a backend is visible and can be forced."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves

import memory3_kernels
from memory3_kernels import _backends, _load, explain, use_backend
from memory3_kernels._registry import OPS, Cost, register

DOCS = Path(__file__).parent.parent / "docs" / "ops"
ALL = [pytest.param(op, id=name) for name, op in OPS.items()]
NATIVE = os.environ.get("M3_NATIVE", "1") != "0"


def sample(op, dtype=None):
    case = next(iter(op.cases()))
    return case.make(dtype or op.dtypes[0], torch.Generator().manual_seed(0))


@pytest.mark.parametrize("op", ALL)
def test_contract_is_complete(op):
    cases, bad = list(op.cases()), list(op.bad_cases())
    assert len(cases) >= 3 and len(bad) >= 1
    for group in (cases, bad):
        names = [case.id for case in group]
        assert len(set(names)) == len(names), "case ids must differ"
    assert set(op.tolerance) == set(op.dtypes)
    assert all(0 <= t < 0.05 for t in op.tolerance.values())
    assert (op.backward is None) == (op.setup_context is None)
    if op.backward is not None:
        assert any(case.grad for case in cases), "no case tests the gradient"
    assert any(case.bench for case in cases), "no case is benchmarked"
    schema = op.overload._schema
    # Counters handed over by keyword (a profile) are written to as well, but nothing is computed from them.
    arguments = [a for a in schema.arguments if not a.kwarg_only]
    written = [i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]
    assert tuple(written) == op.mutates


@pytest.mark.parametrize("op", ALL)
def test_cases_are_deterministic(op):
    for (a, ka), (b, kb) in [(sample(op), sample(op))]:
        assert ka == kb
        for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True):
            assert torch.equal(x.nan_to_num(), y.nan_to_num()) if isinstance(x, torch.Tensor) else x == y


@pytest.mark.parametrize("op", ALL)
def test_cost_counts_at_least_the_outputs(op):
    for case in op.cases():
        if case.slow:
            continue
        args, kwargs = case.make(op.dtypes[0], torch.Generator().manual_seed(0))
        if not args[0].numel():
            continue  # nothing to do: what is written then are zeros of no interest
        cost = op.cost(*args, **kwargs)
        assert isinstance(cost, Cost) and isinstance(cost.bytes, int) and isinstance(cost.flops, int)
        outputs = op.reference(*args, **kwargs)
        outputs = () if outputs is None else outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        assert cost.bytes >= sum(o.nbytes for o in outputs) and cost.flops >= 0


@pytest.mark.parametrize("op", ALL)
def test_public_function_is_exported_and_documented(op):
    assert op.name in memory3_kernels.__all__
    function = getattr(memory3_kernels, op.name)
    text = inspect.getdoc(function)
    for part in ("Args:", "Raises:", f"docs/ops/{op.name}.md"):
        assert part in text, f"{op.name}: docstring without {part!r}"
    if op.name.endswith("_backward"):
        return  # its arguments are those of the op it belongs to
    documented = text.split("Args:")[1].split("Raises:")[0]
    for name in inspect.signature(function).parameters:
        assert name in documented, f"{op.name}: argument {name} is not in the docstring"
    assert inspect.signature(function).return_annotation is not inspect.Signature.empty


@pytest.mark.parametrize("op", ALL)
def test_page(op):
    text = (DOCS / f"{op.name}.md").read_text()
    for part in (f"# {op.name}", "## Layouts", "## Cost", "## Parallel"):
        assert part in text, f"docs/ops/{op.name}.md lacks {part!r}"


def test_all_is_sorted_and_real():
    assert sorted(memory3_kernels.__all__, key=str.lower) == memory3_kernels.__all__
    for name in memory3_kernels.__all__:
        assert getattr(memory3_kernels, name) is not None


def test_a_second_registration_is_refused():
    op = OPS["gather_memory"]
    with pytest.raises(ValueError, match="'gather_memory' is registered twice"):
        register(replace(op))


@pytest.mark.parametrize("op", ALL)
def test_the_forward_twin_has_the_op_s_kernels(op):
    """Calls that nothing but a kernel has a say in go to memory3_forward: the same arguments, by position, and kernels,
    no autograd.
    """
    twin = getattr(torch.ops.memory3_forward, op.name).default
    whole, ours = op.overload._schema, twin._schema
    assert [(a.name, str(a.type)) for a in ours.arguments] == [(a.name, str(a.type)) for a in whole.arguments]
    assert [str(r.type) for r in ours.returns] == [str(r.type) for r in whole.returns]
    assert not any(a.kwarg_only or a.has_default_value() for a in ours.arguments)
    kernels = torch._C._dispatch_dump(f"memory3_forward::{op.name}")
    assert "CPU: " in kernels or not NATIVE
    assert "[ fallthrough boxed ]" in kernels


def test_a_wrong_name_and_a_missing_argument_are_named():
    """By position a wrong name would be dropped, and a missing argument be somebody's default."""
    op = OPS["select_tokens"]
    args, kwargs = sample(op)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="expected at most 7 argument"):
            op(*args, **kwargs, nonsense=1)
        name = next(iter(kwargs))
        with pytest.raises(RuntimeError, match=name):
            op(*args, **{k: v for k, v in kwargs.items() if k != name})


def test_a_call_of_a_fake_tensor_traces():
    args, kwargs = sample(OPS["gather_memory"])
    mode = torch._subclasses.FakeTensorMode()
    fakes = [mode.from_tensor(a) for a in args]
    for context in (mode, torch.no_grad()):
        with context:
            out = memory3_kernels.gather_memory(*fakes, **kwargs)
        assert isinstance(out, torch._subclasses.FakeTensor)
        assert out.shape == OPS["gather_memory"].reference(*args, **kwargs).shape


def test_explain():
    text = explain("memory3::gather_memory")
    assert text.startswith("memory3::gather_memory\n")
    if NATIVE:
        assert "native     chosen" in text and "reference  available" in text
    else:
        assert "the native library is not loaded: M3_NATIVE=0" in text and "reference  chosen" in text
    double = sample(OPS["gather_memory"], torch.float64)[0]
    text = explain("gather_memory", *double)
    assert "reference  chosen" in text and ("float64" in text or not NATIVE)
    with use_backend("gather_memory:reference"):
        assert explain("gather_memory").startswith("memory3::gather_memory (forced: reference)")


@pytest.mark.parametrize("op", ALL)
def test_forced_reference_is_the_reference(op, monkeypatch):
    calls = []
    monkeypatch.setitem(op.__dict__, "reference", lambda *a, **k: calls.append(op.name))
    args, kwargs = sample(op)
    with torch.no_grad(), use_backend("reference"):
        op(*args, **kwargs)
    assert calls == [op.name]


def test_forced_backend_that_cannot_serve_says_why():
    op = OPS["gather_memory"]
    args, kwargs = sample(op, torch.float64)
    wanted = "float32, bfloat16 and float16, an argument is float64" if NATIVE else "M3_NATIVE=0"
    message = f"gather_memory: the forced backend 'native' cannot serve this call: .*{wanted}"
    with use_backend("gather_memory:native"), pytest.raises(RuntimeError, match=message):
        op(*args, **kwargs)


def test_float64_goes_to_the_reference():
    args, kwargs = sample(OPS["gather_memory"], torch.float64)
    out = memory3_kernels.gather_memory(*args, **kwargs)
    assert out.dtype is torch.float64 and torch.equal(out, OPS["gather_memory"].reference(*args, **kwargs))


def test_a_block_ends_and_nests():
    with use_backend("reference"):
        with use_backend("gather_memory:native"):
            assert _backends.forced("gather_memory") == "native" and _backends.forced("select_tokens") == "reference"
        assert _backends.forced("gather_memory") == "reference"
    assert _backends.forced("gather_memory") is None or "M3_BACKEND" in os.environ


def test_unknown_backend():
    expected = "expected one of native, cuda, triton, reference, got 'gpu'"
    with pytest.raises(ValueError, match=expected), use_backend("gpu"):
        pass


def test_environment_forces_a_backend():
    code = (
        "from memory3_kernels import explain; print(explain('gather_memory').splitlines()[0], explain('select_tokens'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"M3_BACKEND": "gather_memory:reference"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("memory3::gather_memory (forced: reference) memory3::select_tokens\n")


def test_a_missing_library_has_a_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(_load, "CPU_LIBRARY", tmp_path / "libm3_cpu.so")
    monkeypatch.setattr(_load, "_reason", None)
    monkeypatch.setattr(_load, "_core", None)
    monkeypatch.setenv("M3_NATIVE", "1")
    _load.load()
    assert "has no native libraries: build them with" in _load.native_reason()
    (tmp_path / "libm3_cpu.so").write_text("not a library")
    monkeypatch.setattr(_load, "TORCH_LIBRARY", tmp_path / "libm3_cpu.so")
    _load.load()
    assert _load.native_reason().startswith("OSError: ")
    assert _load.simd_level() is None and _load.available_simd_levels() == []
    with pytest.raises(RuntimeError, match="there is no native library"):
        _load.set_simd_level("none")


def test_a_wrong_M3_BACKEND_is_said_at_the_first_call_not_at_import():
    code = "import torch, memory3_kernels as m; print('imported'); z = torch.zeros; m.merge_attention_states(z(1,1,8), z(1,1), z(1,1,8), z(1,1))"  # noqa: E501
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"M3_BACKEND": "fastest"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "imported\n" and done.returncode == 1
    assert "M3_BACKEND: backend: expected one of native, cuda, triton, reference, got 'fastest'" in done.stderr
