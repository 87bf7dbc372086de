"""What only a GPU can show. Run with `pytest -m cuda` on a machine with CUDA."""

import copy

import pytest
import torch
from loops import Loop, Mixed, Transformer, compiled_loops, training_step
from tolerances import assert_same_parameter, assert_same_state

from adafactor_compiled import Adafactor

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PATHS = [{"foreach": False}, {"compile": False}, {"compile": True}]
SHAPES = [(64, 33), (64, 33), (64, 33), (128, 128), (4, 3, 3, 3), (65,), (65,), ()]


def problem(dtype=torch.float32, device="cuda"):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in SHAPES]


def set_gradients(params, t, in_place=False):
    generator = torch.Generator().manual_seed(t)
    for param in params:
        grad = torch.randn(param.shape, generator=generator).to(param.device, param.dtype)
        if in_place:
            param.grad.copy_(grad)
        else:
            param.grad = grad


def on_cpu(state):
    return {key: x.cpu() if isinstance(x, torch.Tensor) else x for key, x in state.items()}


def assert_same(params, optimizer, others, other):
    for p, q in zip(params, others, strict=True):
        assert_same_parameter(p.cpu(), q.cpu(), "cuda")
        assert_same_state(on_cpu(optimizer.state[p]), on_cpu(other.state[q]), p.dtype)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("path", PATHS, ids=str)
def test_parity_with_the_cpu(path, dtype, capturable):
    params, others = problem(dtype), problem(dtype, "cpu")
    options = {"beta1": 0.9, "weight_decay": 0.01}
    optimizer = Adafactor(params, **options, **path, capturable=capturable)
    reference = Adafactor(others, **options, foreach=False)
    for t in range(5):
        set_gradients(params, t)
        set_gradients(others, t)
        optimizer.step()
        reference.step()
        assert_same(params, optimizer, others, reference)
        with torch.no_grad():
            for p, q in zip(params, others, strict=True):
                q.copy_(p)
                for key, value in reference.state[q].items():
                    if isinstance(value, torch.Tensor):
                        value.copy_(optimizer.state[p][key])


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("lr", [None, 1e-2])
def test_capture_and_replay(path, lr):
    """Replays of one captured step equal eager steps, with a learning rate that changes in between."""
    params, others = problem(), problem()
    options = {"lr": lr, "relative_step": lr is None, "capturable": True}
    optimizer, eager = Adafactor(params, **options, **path), Adafactor(others, **options, compile=False)
    set_gradients(params, 0)
    set_gradients(others, 0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    for _ in range(3):
        eager.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for t in range(1, 6):
        set_gradients(params, t, in_place=True)
        set_gradients(others, t)
        if lr is not None:
            for x in (optimizer, eager):
                x.param_groups[0]["lr"].fill_(lr / t)
        graph.replay()
        eager.step()
        assert_same(params, optimizer, others, eager)


LR_ON_CPU = {"capturable": True, "lr": torch.tensor(0.1), "relative_step": False}


@pytest.mark.parametrize("options", [{"capturable": False}, LR_ON_CPU])
def test_capture_of_what_cannot_be_captured(options):
    params = problem()
    optimizer = Adafactor(params, **options, compile=False)
    set_gradients(params, 0)
    with pytest.raises(RuntimeError, match="to capture a step in a CUDA graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("capturable", [False, True])
def test_a_step_never_waits_for_the_device(path, capturable):
    params = problem()
    optimizer = Adafactor(params, **path, capturable=capturable)
    for t in range(4):
        set_gradients(params, t)
        torch.cuda.synchronize()
        if t < 2:
            optimizer.step()
            continue
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_overflow_is_decided_on_the_device():
    params = problem(torch.float16)
    optimizer = Adafactor(params, compile=False, capturable=True)
    set_gradients(params, 0)
    optimizer.step()
    params[0].grad[0, 0] = torch.inf
    before = copy.deepcopy([param.detach() for param in params])
    optimizer.grad_scale, optimizer.found_inf = torch.ones((), device="cuda"), torch.ones((), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(param, old) for param, old in zip(params, before, strict=True))
    assert all(state["step"] == 1 for state in optimizer.state.values())


@pytest.mark.parametrize("model", [Mixed, Transformer])
def test_compiled_loop(model):
    torch.manual_seed(0)
    with compiled_loops():
        loop = Loop(model().cuda(), {}, backend="inductor")
        loop.run(20)
        assert loop.compiles == 1


def test_reduce_overhead():
    """A whole training step under torch.compile's CUDA graphs, beside the same step in eager mode."""
    torch.manual_seed(0)
    model = Transformer().cuda()
    reference_model = copy.deepcopy(model)
    optimizer = Adafactor(model.parameters(), lr=1e-3, relative_step=False, capturable=True)
    reference = Adafactor(reference_model.parameters(), lr=1e-3, relative_step=False, foreach=False)
    eager_step = training_step(reference_model, reference)
    generator = torch.Generator().manual_seed(0)
    with compiled_loops():
        torch._inductor.utils.counters.clear()
        step = torch.compile(training_step(model, optimizer), fullgraph=True, mode="reduce-overhead")
        for _ in range(10):
            text = model.batch(generator)
            torch.testing.assert_close(step(text).clone(), eager_step(text), rtol=1e-3, atol=1e-4)
        assert not torch._inductor.utils.counters["inductor"]["cudagraph_skips"]
