"""What may happen to parameters, gradients and state between two steps, and around one: see test_safety.py, which runs this.

A case steps an optimizer of one path, and compares it with the reference path on plain copies; or it sees an error, and that
nothing has changed. As a script, this runs the cases whose names come as arguments, `name:path`, and says of each that it
begins and how it ended: a line of JSON each.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from compilers import compiled_by, uncompiled
from tolerances import assert_same_parameter, assert_same_state
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from adafactor_compiled import Adafactor
from adafactor_compiled._compile import options, passes

PATHS: dict[str, dict[str, Any]] = {
    "reference": {"foreach": False},
    "multi-tensor": {"compile": False},
    "compiled": {"compile": True},
}
SHAPES = [(6, 8), (9, 7), (6, 8), (6,), (5,), (6,), (13,), ()]
NAMES = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "bfloat16", torch.float16: "half"}
CASES: dict[str, dict[str, Callable[[str], None]]] = {}  # by the process that they share, and by name

Change = Callable[[list[Tensor], Adafactor], None]


# What cases are made of ---------------------------------------------------------------------------------------------------


def made(
    path: str, dtype: torch.dtype = torch.float32, before: int = 0, device: str = "cpu", **options: Any
) -> tuple[torch.nn.ParameterList, Adafactor]:
    """A model, and an optimizer that has stepped it `before` times."""
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.ParameterList([torch.randn(shape, generator=generator).to(device, dtype) for shape in SHAPES])
    optimizer = Adafactor(model.parameters(), weight_decay=0.1, **PATHS[path], **options)
    for t in range(before):
        give_gradients(optimizer, t)
        optimizer.step()
    return model, optimizer


def give_gradients(optimizer: Adafactor, seed: int) -> None:
    generator = torch.Generator().manual_seed(100 + seed)
    for p in params_of(optimizer):
        grad = torch.randn(p.shape, generator=generator).to("meta" if p.is_meta else "cpu", p.dtype)
        p.grad = Wrapped(grad) if isinstance(p, Wrapped) else grad


def params_of(optimizer: Adafactor) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def plain(x: Tensor) -> Tensor:
    """A contiguous copy, without whatever makes a tensor special."""
    x = x.inner if isinstance(x, Wrapped) else x
    return x.detach().resolve_neg().clone(memory_format=torch.contiguous_format)


def reference_of(optimizer: Adafactor) -> Adafactor:
    """The reference path, before the same step, with plain tensors everywhere."""
    groups = []
    for group in optimizer.param_groups:
        params = [plain(p).requires_grad_() for p in group["params"]]
        groups.append({**group, "params": params, "foreach": False, "compile": None})
    reference = Adafactor(groups)
    for ours, theirs in zip(params_of(optimizer), params_of(reference), strict=True):
        theirs.grad = None if ours.grad is None else plain(ours.grad)
        state = reference.state[theirs]
        if any(isinstance(x, Tensor) and x.is_meta for x in optimizer.state[ours].values()):
            continue  # it begins anew
        for key, value in optimizer.state[ours].items():
            if key == "step":
                state[key] = int(value)
            elif key in state:
                state[key] = plain(torch.as_tensor(value)).to(state[key].dtype)
            else:
                state[key] = value
    return reference


def assert_same(optimizer: Adafactor, reference: Adafactor, path: str) -> None:
    for i, (ours, theirs) in enumerate(zip(params_of(optimizer), params_of(reference), strict=True)):
        state = {key: plain(x) if isinstance(x, Tensor) else x for key, x in optimizer.state[ours].items()}
        assert_same_parameter(plain(ours), theirs, path, where=f"parameter {i}")
        assert_same_state(state, reference.state[theirs], theirs.dtype, f"parameter {i}")


def check_steps(optimizer: Adafactor, path: str, around: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
    """Two steps that give what the reference gives; `around` is entered for the first of them."""
    for t, context in enumerate([around, nullcontext]):
        give_gradients(optimizer, 50 + t)
        reference = reference_of(optimizer)
        reference.step()
        with context():
            optimizer.step()
        assert_same(optimizer, reference, path)


def check_error(optimizer: Adafactor, message: str, around: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
    """A step that raises, and changes nothing."""
    with unchanged(optimizer), around(), pytest.raises(RuntimeError, match=message):
        optimizer.step()


@contextmanager
def unchanged(optimizer: Adafactor) -> Iterator[None]:
    params = params_of(optimizer)
    values = [plain(p) for p in params]
    states = [dict(optimizer.state[p]) for p in params]
    copies = [{key: plain(x) if isinstance(x, Tensor) else x for key, x in state.items()} for state in states]
    yield
    for p, value, state, copied in zip(params, values, states, copies, strict=True):
        assert torch.equal(plain(p), value)
        now = optimizer.state[p]
        assert list(now) == list(state)
        for key, x in now.items():
            assert x is state[key] or not isinstance(x, Tensor), key
            assert type(x) is type(state[key]), key
            assert torch.equal(plain(x), copied[key]) if isinstance(x, Tensor) else x == copied[key], key


def case(process: str, name: str) -> Callable[[Callable[[str], None]], Callable[[str], None]]:
    def register(run: Callable[[str], None]) -> Callable[[str], None]:
        assert not any(name in cases for cases in CASES.values())
        CASES.setdefault(process, {})[name] = run
        return run

    return register


# Parameters of another dtype ----------------------------------------------------------------------------------------------


def change_dtype(path: str, first: torch.dtype, then: torch.dtype, before: int) -> None:
    model, optimizer = made(path, first, before)
    getattr(model, NAMES[then])()
    check_steps(optimizer, path)
    wide = torch.float64 if then is torch.float64 else torch.float32
    for state in optimizer.state.values():
        assert {x.dtype for x in state.values() if isinstance(x, Tensor)} == {wide}


for first in NAMES:
    for then in NAMES:
        for before in (0, 2):
            if first is not then:
                of_dtypes = functools.partial(change_dtype, first=first, then=then, before=before)
                case("dtypes", f"{NAMES[first]} then {NAMES[then]}, {before} steps before")(of_dtypes)


# State that was replaced --------------------------------------------------------------------------------------------------


def replace(path: str, of: Callable[[Tensor], Any], keys: tuple[str, ...], before: int, message: str | None) -> None:
    _, optimizer = made(path, before=before, beta1=0.9)
    for state in optimizer.state.values():
        for key in keys:
            if key in state:
                state[key] = of(state[key])
    if message is None:
        check_steps(optimizer, path)
    else:
        give_gradients(optimizer, 50)
        check_error(optimizer, message)


def strided(x: Tensor) -> Tensor:
    """Every second element of memory that is full of other numbers."""
    return x.new_full((*x.shape, 2), 1e6)[..., 0].copy_(x)


def wider(x: Tensor) -> Tensor:
    """The first elements of longer rows."""
    return x.new_full((*x.shape[:-1], x.shape[-1] + 3), 1e6)[..., : x.shape[-1]].copy_(x) if x.ndim else x


SECOND_MOMENTS = ("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq")
ALL = (*SECOND_MOMENTS, "exp_avg", "RMS")
REPLACED: dict[str, tuple[Callable[[Tensor], Any], tuple[str, ...], str | None]] = {
    # name: what becomes of a tensor of the state, which ones, the error
    "state in float64": (Tensor.double, ALL, None),
    "state in bfloat16": (Tensor.bfloat16, ALL, None),
    "state in float16": (Tensor.half, ALL, None),
    "state in int64": (Tensor.long, ALL, None),
    "state strided": (strided, ALL, None),
    "state as parts of rows": (wider, ALL, None),
    "state transposed": (lambda x: x.mT.contiguous().mT if x.ndim == 2 else x, ("exp_avg",), None),
    "state expanded": (lambda x: x.new_tensor(0.5).expand(x.shape), ALL, None),
    "state without memory": (lambda x: x.to("meta"), ALL, None),
    "RMS an int": (lambda x: 0, ("RMS",), None),
    "RMS a float": (lambda x: 0.5, ("RMS",), None),
    "RMS of one element": (lambda x: x.reshape(1), ("RMS",), "`RMS` of parameter 0"),
    "RMS of two elements": (lambda x: x.new_zeros(2), ("RMS",), "`RMS` of parameter 0"),
    "rows too few": (lambda x: x[:-1], ("exp_avg_sq_row",), "`exp_avg_sq_row` of parameter 0"),
    "columns too many": (lambda x: torch.cat([x, x]), ("exp_avg_sq_col",), "`exp_avg_sq_col` of parameter 0"),
    "rows as a column": (lambda x: x.unsqueeze(-1), ("exp_avg_sq_row",), "`exp_avg_sq_row` of parameter 0"),
    "a number for columns": (lambda x: 0.5, ("exp_avg_sq_col",), "`exp_avg_sq_col` of parameter 0"),
    "second moment too short": (lambda x: x[:-1] if x.ndim else x, ("exp_avg_sq",), "`exp_avg_sq` of parameter 3"),
    "second moment of one element": (lambda x: x.new_zeros(1), ("exp_avg_sq",), "`exp_avg_sq` of parameter 3"),
    "momentum of another shape": (lambda x: x.new_zeros(2, 3), ("exp_avg",), "`exp_avg` of parameter 0"),
    "momentum of the transpose's shape": (lambda x: x.mT if x.ndim > 1 else x, ("exp_avg",), "`exp_avg` of parameter 0"),
}
for name, (of, keys, message) in REPLACED.items():
    for before in (0, 2):
        case("state", f"{name}, {before} steps before")(
            functools.partial(replace, of=of, keys=keys, before=before, message=message)
        )


@case("state", "state cleared")
def clear(path: str) -> None:
    _, optimizer = made(path, before=1, beta1=0.9)
    for state in optimizer.state.values():
        state.clear()
    check_steps(optimizer, path)


def edit(path: str, of: Callable[[Adafactor], None], **options: Any) -> None:
    _, optimizer = made(path, before=2, beta1=0.9, **options)
    of(optimizer)
    check_steps(optimizer, path)
    of(optimizer)
    check_steps(optimizer, path)


def edit_each(of: Callable[[dict[str, Any]], Any]) -> Callable[[Adafactor], None]:
    def edit_all(optimizer: Adafactor) -> None:
        for state in optimizer.state.values():
            of(state)

    return edit_all


EDITS: dict[str, Callable[[Adafactor], None]] = {
    "all state cleared": lambda optimizer: optimizer.state.clear(),
    "all state replaced": lambda optimizer: setattr(optimizer, "state", copy.deepcopy(optimizer.state)),
    "step set back": edit_each(lambda state: state.update(step=0)),
    "step a float": edit_each(lambda state: state.update(step=5.0)),
    "step a tensor": edit_each(lambda state: state.update(step=torch.tensor(5))),
    "moments filled in place": edit_each(lambda state: [x.fill_(0.5) for key, x in state.items() if key != "step"]),
    "a key of the user's": edit_each(lambda state: state.update(seen=1)),
    "a key taken out": edit_each(lambda state: state.pop("exp_avg")),
}
for name, of_optimizer in EDITS.items():
    for capturable in (False, True):
        case("state", f"{name}{', capturable' * capturable}")(functools.partial(edit, of=of_optimizer, capturable=capturable))


def materialize(path: str, how: Callable[[torch.nn.ParameterList], None], before: int, **options: Any) -> None:
    """An optimizer made on the meta device goes on as one that is made now."""
    model, optimizer = made(path, before=before, beta1=0.9, device="meta", **options)
    optimizer.zero_grad()
    optimizer.state_dict()
    with pytest.warns(UserWarning, match="begins anew") if before and not options else nullcontext():
        how(model)
        assert not any(p.is_meta for p in params_of(optimizer))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in params_of(optimizer):
                p.copy_(torch.randn(p.shape, generator=generator))
        check_steps(optimizer, path)
    assert {int(state["step"]) for state in optimizer.state.values()} == {2}


def swap_by_module(model: torch.nn.ParameterList) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to_empty(device="cpu")
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def swap_each(model: torch.nn.ParameterList) -> None:
    for p in model:
        torch.utils.swap_tensors(p, torch.nn.Parameter(torch.empty(p.shape)))


for name, how in {"to_empty": swap_by_module, "swap_tensors": swap_each}.items():
    for before in (0, 2):
        for options_ in ({}, {"capturable": True}, {"capturable": True, "lr": 1e-2, "relative_step": False}):
            case("state", f"{name} of meta parameters, {before} steps before{''.join(f', {key}' for key in options_)}")(
                functools.partial(materialize, how=how, before=before, **options_)
            )


@case("state", "other parameters, of other shapes, in the same objects")
def reshape(path: str) -> None:
    model, optimizer = made(path, before=1, beta1=0.9)
    model[0].grad = None
    model[0].data = torch.ones(6, 9)
    model[0].grad = torch.ones(6, 9)
    for p in params_of(optimizer)[1:]:
        p.grad = torch.ones_like(p)
    check_error(optimizer, r"`exp_avg_sq_col` of parameter 0 \(shape \(6, 9\)\)")


# Devices and modes --------------------------------------------------------------------------------------------------------


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


def step_in(path: str, around: Callable[[], AbstractContextManager[Any]], before: int, **options: Any) -> None:
    _, optimizer = made(path, before=before, **options)
    check_steps(optimizer, path, around)


for device in ("meta", "cuda"):
    for before in (0, 2):
        of_default = functools.partial(step_in, around=functools.partial(default_device, device), before=before)
        case("modes", f"default device {device}, {before} steps before")(of_default)
        of_context = functools.partial(step_in, around=functools.partial(torch.device, device), before=before)
        case("modes", f"with torch.device {device}, {before} steps before")(of_context)


FACTORIES = {
    *(
        torch.empty,
        torch.empty_strided,
        torch.zeros,
        torch.ones,
        torch.full,
        torch.tensor,
        torch.as_tensor,
        torch.scalar_tensor,
    ),
    *(torch.arange, torch.linspace, torch.logspace, torch.eye, torch.rand, torch.randn, torch.randint, torch.randperm),
    *(torch.sparse_coo_tensor, torch.tril_indices, torch.triu_indices, torch.hann_window, torch.asarray, torch.from_file),
}


class DevicesNamed(TorchFunctionMode):
    """Sees that what makes a tensor is told where: it would be made on the default device."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function not in FACTORIES or (kwargs or {}).get("device") is not None, f"{function.__name__} without a device"
        return function(*args, **(kwargs or {}))


NAMED: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"beta1": 0.9},
    "a tensor as lr": {"lr": torch.tensor(1e-2), "relative_step": False},
    "capturable": {"capturable": True},
    "nonfinite": {"nonfinite": "skip"},
    "rounding": {"stochastic_rounding": True},
    "rounding, capturable": {"stochastic_rounding": True, "capturable": True},
}


def name_devices(path: str, options: dict[str, Any]) -> None:
    """The passes uncompiled: inside them devices are named as well."""
    with compiled_by(uncompiled), pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "environment", lambda: 0)
        _, optimizer = made(path, torch.bfloat16, **options)
        for t in range(2):
            give_gradients(optimizer, t)
            with DevicesNamed():
                optimizer.step()


for name, of_group in NAMED.items():
    case("modes", f"devices are named, {name}")(functools.partial(name_devices, options=of_group))


@case("modes", "fake tensor mode around a step of real parameters")
def step_in_fake_mode(path: str) -> None:
    _, optimizer = made(path, before=1)
    give_gradients(optimizer, 50)
    with unchanged(optimizer), FakeTensorMode(), pytest.raises(Exception, match=r"[Ff]ake"):
        optimizer.step()
    check_steps(optimizer, path)


@case("modes", "fake tensor mode around a first step of real parameters")
def first_step_in_fake_mode(path: str) -> None:
    _, optimizer = made(path)
    give_gradients(optimizer, 50)
    with unchanged(optimizer), FakeTensorMode(), pytest.raises(Exception, match=r"[Ff]ake"):
        optimizer.step()
    check_steps(optimizer, path)


@case("modes", "fake parameters")
def step_fake_parameters(path: str) -> None:
    with FakeTensorMode():
        params = [torch.empty(shape).requires_grad_() for shape in SHAPES]
        optimizer = Adafactor(params, **PATHS[path])
        for _ in range(2):
            for p in params:
                p.grad = torch.empty_like(p)
            optimizer.step()
    assert [state["step"] for state in optimizer.state.values()] == [2] * len(SHAPES)


@case("modes", "meta parameters")
def step_meta_parameters(path: str) -> None:
    params = [torch.empty(shape, device="meta").requires_grad_() for shape in SHAPES]
    optimizer = Adafactor(params, **PATHS[path], beta1=0.9)
    for _ in range(2):
        for p in params:
            p.grad = torch.empty_like(p)
        optimizer.step()
    for p, shape in zip(params, SHAPES, strict=True):
        assert p.is_meta
        assert p.shape == shape
        state = optimizer.state[p]
        assert state["step"] == 2
        assert all(state[key].is_meta for key in state if key != "step")
        assert state["exp_avg"].shape == shape


class Wrapped(Tensor):
    """A tensor that has its numbers in another one."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        layout = {"strides": inner.stride(), "dtype": inner.dtype, "device": inner.device}
        return Tensor._make_wrapper_subclass(cls, inner.shape, **layout)  # type: ignore[attr-defined, no-any-return]

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __repr__(self, **_: Any) -> str:
        return f"Wrapped({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def unwrap(x: Any) -> Any:
            return x.inner if isinstance(x, Wrapped) else x

        result = function(*tree_map(unwrap, args), **tree_map(unwrap, kwargs or {}))
        if function._schema.is_mutable:
            return args[0] if isinstance(result, Tensor) else result
        return tree_map(lambda x: Wrapped(x) if isinstance(x, Tensor) else x, result)


@case("modes", "wrapper subclasses")
def step_wrapped(path: str) -> None:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(Wrapped(torch.randn(shape, generator=generator))) for shape in SHAPES]
    optimizer = Adafactor(params, **PATHS[path], beta1=0.9)
    assert all(isinstance(p, Wrapped) for p in params)
    check_steps(optimizer, path)


@case("modes", "wrapper subclasses among others")
def step_some_wrapped(path: str) -> None:
    _, optimizer = made(path, before=1)
    params = [torch.nn.Parameter(Wrapped(torch.ones(shape))) for shape in SHAPES[:4]]
    optimizer.add_param_group({"params": params})
    check_steps(optimizer, path)


# Gradients ----------------------------------------------------------------------------------------------------------------


def negative(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    grad = torch.randn(shape, generator=generator, dtype=torch.complex64).conj().imag
    assert grad.is_neg()
    return grad


def contiguous_negative(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """With the strides of its parameter, so that nothing but the bit tells it from another gradient."""
    grad = torch._neg_view(torch.randn(shape, generator=generator))
    assert grad.is_neg()
    return grad


def overlapping(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(sum(shape) + 1, generator=generator).as_strided(shape, (1,) * len(shape))


def odd(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """At an address that no vector instruction likes."""
    numel = torch.Size(shape).numel()
    return torch.randn(numel + 1, generator=generator)[1:].view(shape)


GRADIENTS: dict[str, Callable[[tuple[int, ...], torch.Generator], Tensor]] = {
    "negative bit": negative,
    "negative bit alone": contiguous_negative,
    "expanded from a number": lambda shape, generator: torch.randn((), generator=generator).expand(shape),
    "expanded rows": lambda shape, generator: torch.randn(shape[-1:], generator=generator).expand(shape),
    "expanded columns": lambda shape, generator: torch.randn((*shape[:-1], 1)[len(shape) == 0 :], generator=generator).expand(
        shape
    ),
    "overlapping": overlapping,
    "odd addresses": odd,
}


def step_gradients(path: str, of: Callable[[tuple[int, ...], torch.Generator], Tensor], before: int) -> None:
    _, optimizer = made(path, before=before)
    generator = torch.Generator().manual_seed(1)
    for p in params_of(optimizer):
        p.grad = of(tuple(p.shape), generator)
    reference = reference_of(optimizer)
    kept = [(p.grad, plain(p.grad)) for p in params_of(optimizer) if p.grad is not None]
    reference.step()
    optimizer.step()
    assert_same(optimizer, reference, path)
    assert all(torch.equal(plain(grad), copied) for grad, copied in kept)
    check_steps(optimizer, path)


for name, of_shape in GRADIENTS.items():
    for before in (0, 2):
        case("gradients", f"{name}, {before} steps before")(functools.partial(step_gradients, of=of_shape, before=before))


@case("gradients", "one gradient of several parameters")
def share_gradient(path: str) -> None:
    model, optimizer = made(path, before=1)
    model[0].grad = model[2].grad = torch.arange(48.0).view(6, 8)
    model[3].grad = model[5].grad = torch.arange(6.0)
    reference = reference_of(optimizer)
    reference.step()
    optimizer.step()
    assert_same(optimizer, reference, path)
    check_steps(optimizer, path)


@case("gradients", "other dtypes, shapes and layouts")
def refuse_gradients(path: str) -> None:
    model, optimizer = made(path, before=1)
    refused = torch.ones(6, 8).to_sparse()
    give_gradients(optimizer, 50)
    model[2].grad = refused
    check_error(optimizer, "sparse")


# Threads ------------------------------------------------------------------------------------------------------------------


def step_in_threads(path: str, count: int) -> None:
    """Threads whose optimizers begin at once; the first such case of a process compiles in all of them."""
    gate, failures = threading.Barrier(count), []

    def run() -> None:
        try:
            _, optimizer = made(path)
            gate.wait()
            for _ in range(3):
                check_steps(optimizer, path)
        except BaseException:
            failures.append(traceback.format_exc())

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, "\n".join(failures)


case("two threads", "2 threads")(functools.partial(step_in_threads, count=2))
case("threads", "6 threads")(functools.partial(step_in_threads, count=6))


@case("threads", "another number of threads in each step")
def change_threads(path: str) -> None:
    _, optimizer = made(path)
    threads = torch.get_num_threads()
    try:
        for t, count in enumerate([1, 2, 1]):
            torch.set_num_threads(count)
            give_gradients(optimizer, t)
            reference = reference_of(optimizer)
            reference.step()
            optimizer.step()
            assert_same(optimizer, reference, path)
    finally:
        torch.set_num_threads(threads)


# Forks --------------------------------------------------------------------------------------------------------------------


def in_a_child(run: Callable[[], None], seconds: float = 120) -> None:
    """Run a function in a forked child, which must end by itself."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            run()
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            assert os.waitstatus_to_exitcode(status) == 0, "the forked child failed, see its traceback"
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError(f"the forked child did not end within {seconds} s")


@case("fork", "a fork after a step")
def fork(path: str) -> None:
    _, optimizer = made(path, before=2)
    _, another = made(path)
    for group in (*optimizer.param_groups, *another.param_groups):
        group["compile"] = None if path == "compiled" else group["compile"]

    def run() -> None:
        for own in (optimizer, another):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                check_steps(own, path)
                check_steps(own, path)
            said = [str(x.message) for x in caught if "Adafactor" in str(x.message)]
            assert len(said) == (path == "compiled"), said
            assert all("forked" in x and '"spawn"' in x for x in said), said

    in_a_child(run)
    check_steps(optimizer, path)  # compiled, since a warning would be an error here


@case("fork", "a fork with compile=True")
def fork_insisting(path: str) -> None:
    _, optimizer = made(path, before=2)
    give_gradients(optimizer, 50)

    def run() -> None:
        if path == "compiled":
            check_error(optimizer, "`compile=True` needs torch.compile to work but this process was forked")
            optimizer.param_groups[0]["compile"] = False
        check_steps(optimizer, path)

    in_a_child(run)
    check_steps(optimizer, path)


# The script ---------------------------------------------------------------------------------------------------------------


def main(jobs: list[str]) -> None:
    for function, k in options.MEMBERS.items():  # calls of less code: half of a compilation is spent on it
        options.MEMBERS[function] = min(k, 2)
    warnings.filterwarnings("error", "Adafactor steps without")
    runs = {name: run for cases in CASES.values() for name, run in cases.items()}
    for job in jobs:
        name, path = job.split(":")
        print(json.dumps({"begins": job}), flush=True)
        try:
            runs[name](path)
        except Exception:
            print(json.dumps({"ended": traceback.format_exc()}), flush=True)
        else:
            print(json.dumps({"ended": ""}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
