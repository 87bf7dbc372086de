"""Training loops that are compiled as a whole: one graph, no recompile, and the reference path's results."""

import copy
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import ISOLATED, Loop, Mixed, Transformer, compiled_loops, no_recompile, training_step, with_own_code
from tolerances import assert_same_parameter, assert_same_state
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from adafactor_compiled import Adafactor, AdafactorSchedule


@pytest.fixture(autouse=True)
def _compiled_loops():
    with compiled_loops():
        yield


def seeded(model_class, **options):
    torch.manual_seed(3)
    return model_class(**options)


def manual(lr=1e-2, **options):
    return {"lr": lr, "relative_step": False, **options}


def decaying(t):
    return 0.99**t


def with_lambda(optimizer):
    return LambdaLR(optimizer, decaying)


def with_cosine(optimizer):
    return CosineAnnealingLR(optimizer, 50)


# name: (options, schedule, options of the training step)
FEATURES = {
    "lr set by hand": (manual(), None, {}),
    "LambdaLR": (manual(), with_lambda, {}),
    "CosineAnnealingLR": (manual(beta1=0.9), with_cosine, {}),
    "relative_step": ({"weight_decay": 0.01}, None, {}),
    "warmup_init": ({"warmup_init": True}, None, {}),
    "two micro-batches": (manual(clip_threshold=None), None, {"micro_batches": 2}),
}
# The numbers that vary are made by the same code on every path; a traced step, which takes longest, has each kind of them once.
CASES = [
    *((feature, {"compile": True}) for feature in ("CosineAnnealingLR", "relative_step", "two micro-batches")),
    *((feature, {"fused": True}) for feature in FEATURES),
    *((feature, {"foreach": False}) for feature in ("LambdaLR", "warmup_init")),
]


@pytest.mark.parametrize(("feature", "path"), CASES, ids=str)
def test_one_graph_for_200_steps(feature, path):
    """The invariant: a capturable step reads all that changes from tensors, so its graph holds for good.

    When this fails: `error_on_recompile` names the guard. Likely causes are a Python number that a step or a schedule replaces
    in `param_groups` or in the state, and an attribute of the optimizer that a step assigns.
    """
    options, schedule, step_options = FEATURES[feature]
    tensor_lr = {"lr": torch.tensor(options["lr"])} if "lr" in options else {}
    loop = Loop(seeded(Transformer), {**options, **tensor_lr, **path}, schedule, **step_options)
    set_lr = (lambda t: 1e-2 / (t + 1)) if feature == "lr set by hand" else None
    loop.run(1, set_lr=set_lr)
    with no_recompile():
        loop.run(49, set_lr=set_lr)
        loop.run(151, compare=False, set_lr=set_lr)
    assert loop.compiles == 1


# name: (options, schedule, compilations until stable): the table of the README
COSTS = {
    "capturable, relative_step": ({}, None, 1),
    "capturable, lr a number": (manual(), None, 1),
    "capturable, lr a number, LambdaLR": (manual(), with_lambda, 1),
    "capturable, AdafactorSchedule": ({}, AdafactorSchedule, 1),
    "relative_step": ({"capturable": False}, None, 2),
    "lr a number": (manual(capturable=False), None, 2),
    "lr a number, LambdaLR": (manual(capturable=False), with_lambda, 2),
    "lr a tensor, LambdaLR": (manual(torch.tensor(1e-2), capturable=False), with_lambda, 2),
}


@pytest.mark.parametrize("name", COSTS)
def test_what_recompiles(name):
    options, schedule, compiles = COSTS[name]
    options = {key: x.clone() if isinstance(x, torch.Tensor) else x for key, x in options.items()}
    loop = Loop(seeded(Mixed), options, schedule)
    loop.run(12)
    assert loop.compiles == compiles


def test_what_recompiles_under_the_default_backend():
    """It takes the value of a number for granted wherever the graph does not compute with it by operations on tensors."""
    loop = Loop(seeded(Mixed), manual(capturable=False), with_lambda, backend="inductor")
    loop.run(6)
    assert loop.compiles == 2


@st.composite
def loops(draw):
    relative_step = draw(st.booleans())
    options = {
        "relative_step": relative_step,
        "lr": None if relative_step else draw(st.sampled_from([1e-3, 1e-2])),
        "warmup_init": relative_step and draw(st.booleans()),
        "scale_parameter": draw(st.booleans()),
        "clip_threshold": draw(st.sampled_from([None, 0.5, 1.0])),
        "beta1": draw(st.sampled_from([None, 0.9])),
        "weight_decay": draw(st.sampled_from([0.0, 0.1])),
        "maximize": draw(st.booleans()),
        "capturable": draw(st.booleans()),
        **draw(st.sampled_from([{"compile": True}, {"compile": False}, {"foreach": False}])),
    }
    step_options = {
        "micro_batches": draw(st.sampled_from([1, 2])),
        "max_norm": draw(st.sampled_from([None, 0.1])),
        "set_to_none": draw(st.booleans()),
    }
    schedule = None if relative_step else draw(st.sampled_from([None, with_lambda, with_cosine]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    return options, schedule, step_options, dtype


@settings(max_examples=6)
@given(loops())
def test_trajectory_equals_the_reference(drawn):
    options, schedule, step_options, dtype = drawn
    torch._dynamo.reset()
    Loop(seeded(Mixed).to(dtype), options, schedule, **step_options).run(50)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [(torch.float32, manual(beta1=0.9, weight_decay=0.01)), (torch.float64, {"compile": True, "warmup_init": True})],
    ids=str,
)
def test_trajectory_under_inductor(dtype, options):
    loop = Loop(seeded(Mixed).to(dtype), options, with_lambda if "lr" in options else None, backend="inductor")
    loop.run(1)
    with no_recompile():
        loop.run(49)
    assert loop.compiles == 1


def test_accumulation_over_two_compiled_calls():
    """A micro-batch that only adds to the gradients and one that also steps: a graph for each."""
    model = seeded(Transformer)
    reference_model = copy.deepcopy(model)
    optimizer = Adafactor(model.parameters(), capturable=True)
    reference = Adafactor(reference_model.parameters(), foreach=False)
    counter = CompileCounterWithBackend("eager")

    def accumulate(text):
        loss = model.loss(text)
        loss.backward()
        return loss.detach()

    accumulate, step = (
        torch.compile(f, fullgraph=True, backend=counter) for f in (accumulate, training_step(model, optimizer))
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        first, second = (model.batch(generator) for _ in range(2))
        accumulate(first)
        step(second)
        for text in (first, second):
            reference_model.loss(text).backward()
        reference.step()
        reference.zero_grad()
    assert counter.frame_count == 2
    for p, q in zip(model.parameters(), reference_model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def gradients_for(params, generator):
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)


def pair_of(options, shapes=((4, 6), (4, 6), (3,), ())):
    generator = torch.Generator().manual_seed(1)
    params = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    references = [param.detach().clone().requires_grad_() for param in params]
    return params, Adafactor(params, **options), references, Adafactor(references, foreach=False)


def assert_same(params, optimizer, references, reference):
    for p, q in zip(params, references, strict=True):
        assert_same_parameter(p, q, "compiled optimizer.step")
        assert_same_state(optimizer.state[p], reference.state[q], p.dtype)


@pytest.mark.parametrize("capturable", [True, False])
def test_compiled_step_alone(capturable):
    params, optimizer, references, reference = pair_of({"capturable": capturable})
    counter = CompileCounterWithBackend("eager")
    step = torch.compile(optimizer.step, fullgraph=True, backend=counter)
    generator = torch.Generator().manual_seed(2)
    for _ in range(10):
        gradients_for(params, generator)
        for p, q in zip(params, references, strict=True):
            q.grad = p.grad.clone()
        step()
        reference.step()
        assert_same(params, optimizer, references, reference)
    assert counter.frame_count == (1 if capturable else 2)
    assert isinstance(optimizer.state_dict()["state"][0]["step"], int)


def test_eager_steps_after_compiled_ones():
    params, optimizer, references, reference = pair_of({"compile": False})
    step = torch.compile(optimizer.step, backend="eager")
    generator = torch.Generator().manual_seed(2)
    for t in range(8):
        gradients_for(params, generator)
        for p, q in zip(params, references, strict=True):
            q.grad = p.grad.clone()
        (step if t % 4 < 2 else optimizer.step)()
        reference.step()
        assert_same(params, optimizer, references, reference)


def test_compiled_autograd():
    model, reference_model = (seeded(Transformer) for _ in range(2))
    optimizer = Adafactor(model.parameters(), capturable=True)
    reference = Adafactor(reference_model.parameters(), foreach=False)
    step, eager_step = training_step(model, optimizer), training_step(reference_model, reference)
    generator = torch.Generator().manual_seed(0)
    with torch._dynamo.config.patch(trace_autograd_ops=False, compiled_autograd=True):
        compiled_step = torch.compile(step, backend="eager")
        for _ in range(5):
            text = model.batch(generator)
            compiled_step(text)
            eager_step(text)
    for p, q in zip(model.parameters(), reference_model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"compile": False}, {"compile": True}], ids=str)
def test_compiled_model_and_eager_optimizer(options):
    model, reference_model = (seeded(Mixed) for _ in range(2))
    compiled_model = torch.compile(model, backend="eager")
    optimizer = Adafactor(compiled_model.parameters(), **options)
    reference = Adafactor(reference_model.parameters(), foreach=False)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        batch = model.batch(generator)
        for run, optim in ((compiled_model, optimizer), (reference_model, reference)):
            run(batch).square().mean().backward()
            optim.step()
            optim.zero_grad()
    for p, q in zip(model.parameters(), reference_model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def adversaries(**options):
    """A generator and a discriminator, each with an optimizer: (parameters of both, a step of each)."""
    torch.manual_seed(0)
    generator, discriminator = nn.Linear(3, 5), nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 1))
    of_generator = Adafactor(generator.parameters(), **manual(1e-3), **options)
    of_discriminator = Adafactor(discriminator.parameters(), **options)

    def discriminate(noise, real):
        with torch.no_grad():
            fake = generator(noise)
        loss = nn.functional.softplus(discriminator(fake) - discriminator(real)).mean()
        loss.backward()
        of_discriminator.step()
        of_discriminator.zero_grad()
        return loss.detach()

    def generate(noise):
        loss = nn.functional.softplus(-discriminator(generator(noise))).mean()
        loss.backward()
        of_generator.step()
        of_generator.zero_grad()
        of_discriminator.zero_grad()
        return loss.detach()

    return [*generator.parameters(), *discriminator.parameters()], discriminate, generate


def test_two_optimizers():
    params, *steps = adversaries(capturable=True)
    reference_params, *reference_steps = adversaries(foreach=False)
    counter = CompileCounterWithBackend("eager")
    steps = [torch.compile(step, fullgraph=True, backend=counter) for step in steps]
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        noise, real = torch.randn(4, 3, generator=generator), torch.randn(4, 5, generator=generator)
        for discriminate, generate in (steps, reference_steps):
            discriminate(noise, real)
            generate(noise)
    assert counter.frame_count == 2
    for p, q in zip(params, reference_params, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("outer", [True, False], ids=["compiled loops", "compile=True"])
def test_twelve_optimizers(outer, caplog):
    """More than Dynamo's limit of 8 graphs for one function; what is compiled for one model leaves the others alone."""
    generator = torch.Generator().manual_seed(0)
    with no_recompile() if outer else caplog.at_level(logging.WARNING, "torch._dynamo"):
        for width in range(2, 14):
            params, optimizer, references, reference = pair_of(
                {"capturable": True} if outer else {"compile": True}, [(width, width + 3), (width,)]
            )
            step = optimizer.step
            if outer:
                step = torch.compile(with_own_code(lambda of=optimizer: of.step()), fullgraph=True, backend="eager", **ISOLATED)
            for _ in range(2):
                gradients_for(params, generator)
                for p, q in zip(params, references, strict=True):
                    q.grad = p.grad.clone()
                step()
                reference.step()
                assert_same(params, optimizer, references, reference)
    assert "recompile_limit" not in caplog.text


def test_load_state_dict_in_a_compiled_run():
    loop = Loop(seeded(Mixed), manual(beta1=0.9))
    loop.run(3, compare=False)
    saved = copy.deepcopy((loop.model.state_dict(), loop.optimizer.state_dict(), loop.generator.get_state()))
    with no_recompile():
        loop.run(4, compare=False)
        expected = copy.deepcopy(loop.model.state_dict())
        loop.model.load_state_dict(saved[0])
        loop.optimizer.load_state_dict(saved[1])
        loop.generator.set_state(saved[2])
        loop.run(4, compare=False)
    torch.testing.assert_close(loop.model.state_dict(), expected, rtol=0, atol=0)


def test_freeze_and_unfreeze():
    loop = Loop(seeded(Mixed), {})
    loop.run(3)
    for frozen in (True, False):
        for model in (loop.model, loop.reference_model):
            model.hidden[0].requires_grad_(not frozen)
        before = copy.deepcopy(loop.optimizer.state[loop.model.hidden[0].weight])
        loop.run(3)
        after = loop.optimizer.state[loop.model.hidden[0].weight]
        assert all(torch.equal(before[key], after[key]) for key in before) == frozen
    assert loop.compiles == 2  # one for each set of parameters that learn; the first serves again
