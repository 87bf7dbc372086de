"""What only a GPU can show. Run with `pytest -m cuda` on a machine with CUDA."""

import copy
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from loops import Loop, Mixed, Transformer, compiled_loops, training_step
from parameters import take_over
from tolerances import assert_same_parameter, assert_same_state
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from adafactor_compiled import Adafactor

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PATHS = [{"foreach": False}, {"compile": False}, {"compile": True}, {"fused": True}]
SHAPES = [(64, 33), (64, 33), (64, 33), (128, 128), (4, 1500), (4, 3, 3, 3), (4, 3, 1, 1), (65,), (65,), (5000,), ()]


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


def addresses(optimizer):
    """Where everything lies that a CUDA graph of a step reads or writes, but the gradients."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    states = [x for param in params for x in optimizer.state[param].values()]
    rates = [group["lr"] for group in optimizer.param_groups]
    return [x.data_ptr() for x in (*params, *states, *rates) if isinstance(x, torch.Tensor)]


def captured(optimizer):
    """A step as a CUDA graph, and how many steps it took to get there: what is captured is not run."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph, 3


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
        take_over(reference, optimizer)


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("lr", [None, 1e-2])
def test_capture_and_replay(path, lr):
    """Replays of one captured step equal eager steps, with a learning rate that changes in between."""
    params, others = problem(), problem()
    options = {"lr": lr, "relative_step": lr is None, "capturable": True}
    optimizer, eager = Adafactor(params, **options, **path), Adafactor(others, **options, compile=False)
    set_gradients(params, 0)
    set_gradients(others, 0)
    graph, steps = captured(optimizer)
    for _ in range(steps):
        eager.step()
    for t in range(1, 6):
        set_gradients(params, t, in_place=True)
        set_gradients(others, t)
        if lr is not None:
            for x in (optimizer, eager):
                x.param_groups[0]["lr"].fill_(lr / t)
        graph.replay()
        eager.step()
        assert_same(params, optimizer, others, eager)


CAPTURED = [
    (torch.float32, {"beta1": 0.9, "weight_decay": 0.01}),
    (torch.float32, {"nonfinite": "skip"}),
    (torch.bfloat16, {"stochastic_rounding": True}),
    (torch.bfloat16, {"lr": 1e-2, "relative_step": False, "beta1": 0.9, "stochastic_rounding": True, "maximize": True}),
]


@pytest.mark.parametrize(("dtype", "options"), CAPTURED, ids=str)
@pytest.mark.parametrize("path", PATHS, ids=str)
def test_a_replay_finds_all_that_was_captured(path, dtype, options):
    """Addresses stay what they are from construction on, a replay allocates nothing, and what the capture freed may go."""
    params, others = problem(dtype), problem(dtype)
    optimizer = Adafactor(params, **options, **path, capturable=True)
    eager = Adafactor(others, **options, **path, capturable=True)
    before = addresses(optimizer)
    set_gradients(params, 0)
    set_gradients(others, 0)
    graph, steps = captured(optimizer)
    for _ in range(steps):
        eager.step()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    # Whatever was free is NaN now, on the device, and in the pinned memory of the host.
    spoilt = [torch.full((1 << 20,), torch.nan, device="cuda") for _ in range(64)]
    spoilt += [torch.full((1 << n,), torch.nan).pin_memory() for n in range(4, 16)]
    for t in range(1, 5):
        set_gradients(params, t, in_place=True)
        set_gradients(others, t)
        if "nonfinite" in options and t == 2:
            for of in (params, others):
                of[0].grad[0, 0] = torch.inf
        allocated = torch.cuda.memory_allocated()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() == allocated
        eager.step()
        for p, q in zip(params, others, strict=True):
            assert_same_parameter(p.cpu(), q.cpu(), "cuda graph", where=f"step {t}")
            assert_same_state(on_cpu(optimizer.state[p]), on_cpu(eager.state[q]), p.dtype, f"step {t}")
    del spoilt
    optimizer.step()
    assert addresses(optimizer) == before


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_gradients_that_lie_elsewhere_when_a_step_is_captured(path):
    """Where they lie is then sent to the device by the graph itself, from memory of the host that must stay what it is."""
    params, others = problem(), problem()
    optimizer, eager = Adafactor(params, **path, capturable=True), Adafactor(others, **path, capturable=True)
    for t in range(2):
        set_gradients(params, t)
        set_gradients(others, t)
        optimizer.step()
        eager.step()
    set_gradients(params, 2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    spoilt = [torch.full((1 << n,), torch.nan).pin_memory() for n in range(4, 16) for _ in range(4)]
    for t in range(2, 5):
        set_gradients(params, t, in_place=True)
        set_gradients(others, t)
        graph.replay()
        eager.step()
        assert_same(params, optimizer, others, eager)
    del spoilt


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_addresses_that_are_no_multiples_of_16(dtype):
    """Views of flat buffers lie anywhere: 128 bits at a time would be an error of the device."""
    flat, of_cpu = torch.randn(64 * 48 + 5, device="cuda", dtype=dtype), torch.randn(64 * 48 + 5, dtype=dtype)
    of_cpu.copy_(flat)
    params, others = ([x[1:3073].view(64, 48).requires_grad_(), x[3073:].requires_grad_()] for x in (flat, of_cpu))
    optimizer, reference = Adafactor(params, fused=True), Adafactor(others, foreach=False)
    for t in range(2):
        generator = torch.Generator().manual_seed(t)
        for p, q in zip(params, others, strict=True):
            q.grad = torch.randn(q.shape, generator=generator).to(dtype)
            p.grad = torch.empty(p.numel() + 1, device="cuda", dtype=dtype)[1:].view(p.shape).copy_(q.grad)
        optimizer.step()
        reference.step()
        assert_same(params, optimizer, others, reference)
        take_over(reference, optimizer)


def test_load_state_dict_says_that_a_graph_must_be_captured_again():
    """The loaded state lies elsewhere: the old graph would go on with the old one."""
    params, others = problem(), problem()
    optimizer = Adafactor(params, beta1=0.9, compile=False, capturable=True)
    eager = Adafactor(others, beta1=0.9, compile=False, capturable=True)
    set_gradients(params, 0)
    set_gradients(others, 0)
    saved = copy.deepcopy(optimizer.state_dict())
    graph, _ = captured(optimizer)
    graph.replay()
    with torch.no_grad():
        for p, q in zip(params, others, strict=True):
            p.copy_(q)
    with pytest.warns(UserWarning, match="captured again"):
        optimizer.load_state_dict(saved)
    graph, steps = captured(optimizer)
    for t in range(3):
        graph.replay()
        if t == 0:
            for _ in range(steps):
                eager.step()
        eager.step()
        assert_same(params, optimizer, others, eager)


def test_load_state_dict_says_nothing_where_nothing_was_captured(recwarn):
    optimizer = Adafactor(problem(), compile=False, capturable=True)
    optimizer.load_state_dict(optimizer.state_dict())
    assert not [warning for warning in recwarn if "captured again" in str(warning.message)]


LR_ON_CPU = {"capturable": True, "lr": torch.tensor(0.1), "relative_step": False}


@pytest.mark.parametrize("options", [{"capturable": False}, LR_ON_CPU])
def test_capture_of_what_cannot_be_captured(options):
    params = problem()
    optimizer = Adafactor(params, **options, compile=False)
    set_gradients(params, 0)
    with pytest.raises(RuntimeError, match="to capture a step in a CUDA graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


@contextmanager
def waiting_is_an_error():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("dtype", "options"), [(torch.float32, {}), (torch.bfloat16, {"stochastic_rounding": True})], ids=str)
@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("capturable", [False, True])
def test_a_step_never_waits_for_the_device(path, capturable, dtype, options):
    params = [*problem(dtype), torch.zeros(16, 65_536, device="cuda", dtype=dtype).requires_grad_()]  # the last one is swapped
    optimizer = Adafactor(params, **path, **options, capturable=capturable)
    for t in range(4):
        set_gradients(params, t)
        torch.cuda.synchronize()
        if t < 2:
            optimizer.step()
            continue
        with waiting_is_an_error():
            optimizer.step()


def test_overflow_is_decided_on_the_device():
    params = problem(torch.float16)
    optimizer = Adafactor(params, compile=False, capturable=True)
    set_gradients(params, 0)
    optimizer.step()
    params[0].grad[0, 0] = torch.inf
    before = copy.deepcopy([param.detach() for param in params])
    optimizer.grad_scale, optimizer.found_inf = torch.ones((), device="cuda"), torch.ones((), device="cuda")
    with waiting_is_an_error():
        optimizer.step()
    assert all(torch.equal(param, old) for param, old in zip(params, before, strict=True))
    assert all(state["step"] == 1 for state in optimizer.state.values())


@pytest.mark.parametrize("model", [Mixed, Transformer])
def test_compiled_loop(model):
    torch.manual_seed(0)
    with compiled_loops():
        loop = Loop(model().cuda(), {}, backend="inductor", compare_state=False)  # gradients are rounded otherwise there
        before = addresses(loop.optimizer)
        loop.run(20)
        assert loop.compiles == 1
        assert addresses(loop.optimizer) == before


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
        torch._dynamo.utils.counters.clear()
        before = addresses(optimizer)
        step = torch.compile(training_step(model, optimizer), fullgraph=True, mode="reduce-overhead")
        for _ in range(10):
            text = model.batch(generator)
            torch.testing.assert_close(step(text).clone(), eager_step(text), rtol=1e-3, atol=1e-4)
        assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
        assert addresses(optimizer) == before


@pytest.mark.parametrize("lr", [None, 1e-2])
def test_reduce_overhead_of_the_step_alone(lr):
    """`torch.compile(optimizer.step)` under CUDA graphs: gradients and the learning rate change between steps."""
    params, others = problem(), problem()
    options = {"lr": lr, "relative_step": lr is None, "beta1": 0.9, "capturable": True}
    optimizer, eager = Adafactor(params, **options), Adafactor(others, **options, compile=False)
    before = addresses(optimizer)
    with compiled_loops():
        step = torch.compile(optimizer.step, fullgraph=True, mode="reduce-overhead")
        for t in range(6):
            set_gradients(params, t, in_place=t > 0)
            set_gradients(others, t)
            if lr is not None:
                for x in (optimizer, eager):
                    x.param_groups[0]["lr"].fill_(lr / (t + 1))
            step()
            eager.step()
            assert_same(params, optimizer, others, eager)
    assert addresses(optimizer) == before


@pytest.fixture
def one_rank(tmp_path):
    """A mesh of this process alone, over NCCL."""
    if not dist.is_nccl_available():
        pytest.skip("this torch has no NCCL")
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cuda", (1,))
    dist.destroy_process_group()


class Bag(nn.Module):
    def __init__(self, params):
        super().__init__()
        for i, param in enumerate(params):
            self.register_parameter(f"p{i}", nn.Parameter(param.detach().clone()))


def sharded_problem(mesh, dtype=torch.float32):
    """The problem under `fully_shard`, which takes no 0-dim parameter, and the same unsharded."""
    whole = [param for param in problem(dtype) if param.ndim]
    model = Bag(whole)
    fully_shard(model, mesh=mesh)
    params = list(model.parameters())
    assert all(isinstance(param, DTensor) for param in params)
    return params, whole


def set_sharded_gradients(params, whole, t):
    set_gradients(whole, t)
    for param, other in zip(params, whole, strict=True):
        param.grad = distribute_tensor(other.grad.clone(), param.device_mesh, param.placements, src_data_rank=None)


def whole_of(x):
    x = x.full_tensor() if isinstance(x, DTensor) else x
    return x.cpu() if isinstance(x, torch.Tensor) else x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", PATHS, ids=str)
def test_fully_shard_over_nccl(one_rank, path, dtype):
    """One rank holds all pieces: the sharded step equals the unsharded one, and sends no more than one all_reduce."""
    params, whole = sharded_problem(one_rank, dtype)
    options = {"beta1": 0.9, "weight_decay": 0.01}
    optimizer, reference = Adafactor(params, **options, **path), Adafactor(whole, **options, foreach=False)
    for t in range(4):
        set_sharded_gradients(params, whole, t)
        with CommDebugMode() as sent:
            optimizer.step()
        if t:  # the first also asks whether the ranks agree
            assert dict(sent.get_comm_counts()) in ({}, {torch.ops.c10d.allreduce_: 1})
        reference.step()
        for p, q in zip(params, whole, strict=True):
            assert_same_parameter(whole_of(p), q.cpu(), "cuda, sharded", where=f"step {t}")
            state = {key: whole_of(x) for key, x in optimizer.state[p].items()}
            assert_same_state(state, on_cpu(reference.state[q]), q.dtype, f"step {t}")
            with torch.no_grad():  # both go on from the same bits
                q.copy_(p.full_tensor())
                for key, x in reference.state[q].items():
                    if isinstance(x, torch.Tensor):
                        x.copy_(state[key])


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_a_sharded_step_never_waits_for_the_device(one_rank, path):
    params, whole = sharded_problem(one_rank)
    optimizer = Adafactor(params, **path)
    for t in range(4):
        set_sharded_gradients(params, whole, t)
        torch.cuda.synchronize()
        if t < 2:
            optimizer.step()
            continue
        with waiting_is_an_error():
            optimizer.step()
