"""Op contracts: each file in `ops/` declares one `Op`; this module turns it into a registered torch operator.

The schema is defined here, in Python, so the op exists, traces and runs on any machine; compiled code only adds
kernels for device keys. Tests and benchmarks iterate over `OPS`: nothing about an op is written twice.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch

from . import _backends, _load, triton

NAMESPACE = "memory3"
FORWARD_NAMESPACE = "memory3_forward"
_library = torch.library.Library(NAMESPACE, "DEF")
_forward_library = torch.library.Library(FORWARD_NAMESPACE, "DEF")
# Twins for a forced backend, memory3_cuda::<op> and memory3_triton::<op>; memory3_fallback::<op>: what the CUDA kernels
# hand on.
_twins = {name: torch.library.Library(f"memory3_{name}", "DEF") for name in ("cuda", "triton")}
_fallback_library = torch.library.Library("memory3_fallback", "DEF")
OPS: dict[str, Op] = {}

_forced = _backends._forced
_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_any_requires_grad = torch._C._any_requires_grad
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transform = torch._C._functorch.maybe_current_level

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """One sample call. `make(dtype, generator)` returns (args, kwargs), CPU tensors, deterministic in the generator."""

    id: str
    make: Callable[[torch.dtype, torch.Generator], tuple[tuple, dict]]
    grad: tuple[int, ...] = ()  # positions of the arguments that get gradients in the gradient tests
    slow: bool = False
    bench: bool = False  # part of the benchmark suites
    slack: float = 1.0  # factor on the op's tolerance


@dataclass(frozen=True)
class BadCase:
    """A call every backend must refuse with RuntimeError matching `match`; `fake` too, unless it hangs on values."""

    id: str
    make: Callable[[], tuple[tuple, dict]]
    match: str
    fake: bool = True


@dataclass(frozen=True)
class Cost:
    """Work of one call, counted by hand: compulsory bytes moved and floating-point operations."""

    bytes: int
    flops: int


class Missing:
    """Stands for an argument that a call must give: the dispatcher refuses it, naming the argument."""


@dataclass(frozen=True)
class Op:
    """The whole contract of an operator.

    Attributes:
        name: `memory3::<name>`.
        schema: the dispatcher schema, without the name.
        reference: plain PyTorch, differentiable where the op is, also float64; the truth for every other backend.
        fake: shapes and dtypes of the outputs; holds the shape and dtype checks (torch._check).
        cases, bad_cases: sample calls for the generic tests and benchmarks.
        cost: `cost(*args, **kwargs) -> Cost`.
        tolerance: relative error allowed per dtype of the first tensor argument (norm of the difference over norm).
        dtypes: element types the cases are run with.
        setup_context, backward: as torch.library.register_autograd takes them; None: asking for a gradient raises.
        compare: `compare(actual, expected, args, kwargs, tolerance)` where outputs are not comparable one by one.
        mutates: positions of arguments the op writes to.
    """

    name: str
    schema: str
    reference: Callable
    fake: Callable
    cases: Callable[[], Iterable[Case]]
    bad_cases: Callable[[], Iterable[BadCase]]
    cost: Callable[..., Cost]
    tolerance: Mapping[torch.dtype, float]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    setup_context: Callable | None = None
    backward: Callable | None = None
    compare: Callable | None = None
    mutates: tuple[int, ...] = ()
    # Of all arguments of the schema, the first `plain` of them not by keyword alone; `defaults`: for those left out.
    names: tuple[str, ...] = field(init=False, repr=False)
    plain: int = field(init=False, repr=False)
    defaults: tuple = field(init=False, repr=False)
    # From here on by register(). `forward`: the same kernels in `memory3_forward`, without autograd's, by position:
    # names take the dispatcher long.
    overload: Callable = field(init=False, repr=False)
    forward: Callable = field(init=False, repr=False)
    # The CPU kernel past the dispatcher, where the call is plain enough; NotImplemented where it is not.
    direct: Callable = field(init=False, repr=False)

    def __post_init__(self) -> None:
        arguments = torch._C.parse_schema(f"{NAMESPACE}::{self.name}{self.schema}").arguments
        put = partial(object.__setattr__, self)
        put("names", tuple(sys.intern(a.name) for a in arguments))  # as the names in calls are
        put("plain", sum(not a.kwarg_only for a in arguments))
        put("defaults", tuple(a.default_value if a.has_default_value() else Missing for a in arguments))

    def __call__(self, *args, **kwargs):
        """Calls the op: straight, through the dispatcher, or a forced backend (`_backends.use_backend`).

        Arguments that the schema has by keyword alone may be given by position, too, as the public functions do.
        """
        if not (_is_compiling() or _forced):
            result = self.direct(*args, **kwargs)
            return self._dispatch(*args, **kwargs) if result is NotImplemented else result
        return self._call_with_everything(*args, **kwargs)

    def _dispatch(self, *args, **kwargs):
        # Where autograd, a mode or a transform has no say, the twin without the kernels of autograd and version
        # counting is called: these are Python functions, which take longer than an empty call.
        if (_is_grad_enabled() and _any_requires_grad(*args)) or _dispatch_modes() or _transform() is not None:
            return self._call_with_everything(*args, **kwargs)
        try:
            for i in self.mutates:
                if not args[i].is_inference():
                    torch._C._increment_version((args[i],))
            left = self.names[len(args) :]
            if set(kwargs).issubset(left):
                return self.forward(*args, *map(kwargs.get, left, self.defaults[len(args) :]))
        except RuntimeError:
            if not _any_float64(args):
                raise
            args, kwargs = self._by_name(args, kwargs)
            return self.reference(*args, **kwargs)
        args, kwargs = self._by_name(args, kwargs)
        return self.overload(*args, **kwargs)  # which says what is wrong

    def _by_name(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The same arguments, by name what the schema has by keyword alone."""
        if len(args) > len(self.names):  # whoever gets them says so
            return args, kwargs
        surplus = dict(zip(self.names[self.plain :], args[self.plain :], strict=False))
        return args[: self.plain], dict(**surplus, **kwargs)  # refuses what is given twice

    def _call_with_everything(self, *args, **kwargs):
        args, kwargs = self._by_name(args, kwargs)
        backend = _backends.forced(self.name)
        if backend is None and not _any_float64(args):
            return self.overload(*args, **kwargs)
        if backend is not None:
            _backends.choose(self, args)  # raises where the forced backend cannot serve
        if backend == "native":
            return self.overload(*args, **kwargs)
        if self.backward is None:
            refuse_gradient(self.name, args)
        if backend in _twins:
            for i in self.mutates:
                torch.autograd.graph.increment_version(args[i])
            return getattr(getattr(torch.ops, f"memory3_{backend}"), self.name).default(*args, **kwargs)
        return self.reference(*args, **kwargs)


def _any_float64(args: Iterable) -> bool:
    return any(isinstance(a, torch.Tensor) and a.dtype is torch.float64 for a in args)


def refuse_gradient(name: str, args: Iterable) -> None:
    """Raises RuntimeError if a tensor among `args` asks for a gradient that the op does not have."""
    if torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args):
        raise RuntimeError(
            f"memory3::{name} has no gradient, but an argument requires one: detach it, or call under torch.no_grad()"
        )


def _forbid_gradient(op: Op) -> None:
    """An Autograd kernel that refuses, instead of a result silently cut off from the graph."""

    def forward_only(keyset, *args, **kwargs):
        refuse_gradient(op.name, args)
        with torch._C._AutoDispatchBelowAutograd():
            return op.overload.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)

    _library.impl(op.name, forward_only, "Autograd", with_keyset=True)


def _count_versions(op: Op) -> None:
    """Counts a version of every argument the op writes to: autograd then notices a saved tensor that has changed."""

    def written(keyset, *args, **kwargs):
        for i in op.mutates:
            torch.autograd.graph.increment_version(args[i])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return op.overload.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args, **kwargs)

    _library.impl(op.name, written, "ADInplaceOrView", with_keyset=True)


def register(op: Op) -> Op:
    """Defines `memory3::<name>` with its fake, its reference as fallback kernel and its gradient; returns the op."""
    if op.name in OPS:
        raise ValueError(f"op {op.name!r} is registered twice")
    _library.define(op.name + op.schema)
    qualified = f"{NAMESPACE}::{op.name}"
    object.__setattr__(op, "overload", getattr(getattr(torch.ops, NAMESPACE), op.name).default)
    _library.impl(op.name, op.reference, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, op.fake, lib=_library)
    if op.backward is not None:
        torch.library.register_autograd(qualified, op.backward, setup_context=op.setup_context, lib=_library)
    else:
        _forbid_gradient(op)
    if op.mutates:
        _count_versions(op)
    _register_forward(op)
    _register_twins(op)
    OPS[op.name] = op
    return op


def _register_forward(op: Op) -> None:
    put = partial(object.__setattr__, op)
    _forward_library.define(op.name + re.sub(r"=None|\*, ", "", op.schema))
    _forward_library.impl(op.name, _by_position(op, op.reference), "CompositeExplicitAutograd")
    _forward_library.impl(op.name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"{FORWARD_NAMESPACE}::{op.name}", _by_position(op, op.fake), lib=_forward_library)
    put("forward", getattr(getattr(torch.ops, FORWARD_NAMESPACE), op.name).default._op)  # without OpOverload's frame
    put("direct", _load.direct(op.name, op.names, op.mutates))


def _by_position(op: Op, function: Callable) -> Callable:
    """`function`, some of whose arguments have to be named, for a schema in which none is."""
    plain, named = op.plain, op.names[op.plain :]
    return lambda *args: function(*args[:plain], **dict(zip(named, args[plain:], strict=True)))


def _register_twins(op: Op) -> None:
    """The ops that call one backend and no other, and what serves CUDA tensors where the CUDA kernels do not.

    Opaque to compilers, like every kernel here. The CUDA kernels register themselves (csrc/torch/cuda); Triton is
    imported at the first call.
    """

    def launch(*args, **kwargs):
        return triton.implementation(op.name)(*args, **kwargs)

    for name, library in _twins.items():
        library.define(op.name + op.schema)
        torch.library.register_fake(f"memory3_{name}::{op.name}", op.fake, lib=library)
        if op.backward is not None:
            torch.library.register_autograd(
                f"memory3_{name}::{op.name}", op.backward, setup_context=op.setup_context, lib=library
            )
    runs = triton.has_kernel(op.name) and triton.missing() is None
    if triton.has_kernel(op.name):
        for key in ("CUDA", "CPU"):
            _twins["triton"].impl(op.name, launch, key)
    _fallback_library.define(op.name + op.schema)
    _fallback_library.impl(op.name, launch if runs else op.reference, "CompositeExplicitAutograd")
    if runs:
        for namespace, library, kernel in (
            (NAMESPACE, _library, launch), (FORWARD_NAMESPACE, _forward_library, _by_position(op, launch)),
        ):  # fmt: skip
            if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{op.name}", "CUDA"):
                library.impl(op.name, kernel, "CUDA")
