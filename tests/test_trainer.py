"""transformers' Trainer and accelerate, with a tiny randomly initialised T5 that learns from built-in text."""

from pydoc_data.topics import topics

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import Dataset
from transformers import T5Config, T5ForConditionalGeneration, Trainer, TrainingArguments
from transformers import optimization as reference

from adafactor_compiled import Adafactor, AdafactorSchedule

# The two settings that transformers' documentation recommends for T5 (the second with a rate that a tiny model learns at).
OWN_RATE = {"scale_parameter": True, "relative_step": True, "warmup_init": True, "lr": None}
MANUAL_RATE = {"scale_parameter": False, "relative_step": False, "warmup_init": False, "lr": 1e-3}
STEPS = 6


@pytest.fixture(autouse=True)
def one_thread():
    """A tiny model trains many times faster on one thread where a machine's cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Characters(Dataset):
    """Windows of text, a token for each character; the labels are the window reversed."""

    def __init__(self, count=64, length=12):
        text = "".join(topics[key] for key in sorted(topics)).encode("ascii", "replace")
        self.windows = [torch.tensor(list(text[i * length : (i + 1) * length])) for i in range(count)]

    def __len__(self):
        return len(self.windows)

    def __getitem__(self, index):
        return {"input_ids": self.windows[index], "labels": self.windows[index].flip(0)}


def tiny_t5(**options):
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 128} | options
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0))


def arguments(directory, **options):
    defaults = {"max_steps": STEPS, "logging_steps": 1, "per_device_train_batch_size": 4, "save_strategy": "no"}
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 0, "dataloader_pin_memory": False}
    return TrainingArguments(str(directory), **defaults | quiet | options)


def trainer_of(directory, make_optimizer, make_schedule, **options):
    model = tiny_t5()
    optimizer = make_optimizer(model.parameters())
    return Trainer(
        model, arguments(directory, **options), train_dataset=Characters(), optimizers=(optimizer, make_schedule(optimizer))
    )


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def ours(settings, **options):
    return lambda params: Adafactor(params, **settings, **{"compile": False, **options})


def theirs(settings):
    return lambda params: reference.Adafactor(params, **settings)


# With a manual rate transformers' AdafactorSchedule would hold the rate at 0 (it writes initial_lr to the group): theirs is
# then constant; ours leaves the rate alone.
@pytest.mark.parametrize(
    ("settings", "our_schedule", "their_schedule", "options"),
    [
        (OWN_RATE, AdafactorSchedule, reference.AdafactorSchedule, {}),
        (OWN_RATE, reference.AdafactorSchedule, reference.AdafactorSchedule, {}),
        (MANUAL_RATE, AdafactorSchedule, reference.get_constant_schedule, {}),
        (MANUAL_RATE, reference.get_constant_schedule, reference.get_constant_schedule, {}),
        (OWN_RATE, AdafactorSchedule, reference.AdafactorSchedule, {"gradient_accumulation_steps": 2}),
        (MANUAL_RATE, AdafactorSchedule, reference.get_constant_schedule, {"gradient_accumulation_steps": 2}),
        (OWN_RATE, AdafactorSchedule, reference.AdafactorSchedule, {"bf16": True}),
        (MANUAL_RATE, AdafactorSchedule, reference.get_constant_schedule, {"bf16": True}),
    ],
    ids=["own", "own-theirs", "manual", "manual-theirs", "own-accumulation", "manual-accumulation", "own-bf16", "manual-bf16"],
)
def test_the_loss_curve_is_that_of_transformers(tmp_path, settings, our_schedule, their_schedule, options):
    runs = []
    for make_optimizer, make_schedule in [(ours(settings), our_schedule), (theirs(settings), their_schedule)]:
        trainer = trainer_of(tmp_path, make_optimizer, make_schedule, **options)
        trainer.train()
        runs.append(losses_of(trainer))
    assert len(runs[0]) == STEPS
    # bf16 autocast rounds activations to 8 bits: a last-digit difference of a weight can move one by 2**-8.
    torch.testing.assert_close(*map(torch.tensor, runs), rtol=2e-3 if "bf16" in options else 1e-5, atol=0)


def test_training_learns(tmp_path):
    trainer = trainer_of(tmp_path, ours(MANUAL_RATE | {"lr": 1e-2}), AdafactorSchedule, max_steps=60)
    trainer.train()
    losses = losses_of(trainer)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_optimizer_cls_and_kwargs_with_a_scheduler_of_the_trainer(tmp_path):
    runs = []
    for optimizer_class, extra in [(Adafactor, {"compile": False}), (reference.Adafactor, {})]:
        trainer = Trainer(
            tiny_t5(),
            arguments(tmp_path, warmup_steps=2, learning_rate=1e-3),
            train_dataset=Characters(),
            optimizer_cls_and_kwargs=(optimizer_class, MANUAL_RATE | {"weight_decay": 0.1} | extra),
        )
        trainer.train()
        assert isinstance(trainer.optimizer.optimizer, optimizer_class)
        runs.append(losses_of(trainer))
        rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
        assert rates[0] == 0.0
        assert max(rates) == pytest.approx(1e-3)
    torch.testing.assert_close(*map(torch.tensor, runs), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        (OWN_RATE, {}),
        (MANUAL_RATE, {"beta1": 0.9, "weight_decay": 0.1}),
        (OWN_RATE, {"capturable": True}),
        (MANUAL_RATE, {"compile": True}),
    ],
    ids=["own rate", "momentum", "capturable", "compiled"],
)
def test_a_resumed_run_is_bit_equal_to_the_uninterrupted_one(tmp_path, settings, options):
    save = {"save_strategy": "steps", "save_steps": STEPS // 2}
    whole = trainer_of(tmp_path, ours(settings, **options), AdafactorSchedule, **save)
    whole.train()
    resumed = trainer_of(tmp_path, ours(settings, **options), AdafactorSchedule, **save)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS // 2}"))
    assert losses_of(resumed)[-3:] == losses_of(whole)[-3:]
    expected = whole.model.state_dict()
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        one, other = whole.optimizer.optimizer.state[p], resumed.optimizer.optimizer.state[q]
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[key])), key


def test_a_run_of_transformers_resumes_with_ours(tmp_path):
    save = {"save_strategy": "steps", "save_steps": STEPS // 2}
    whole = trainer_of(tmp_path, theirs(MANUAL_RATE), reference.AdafactorSchedule, **save)
    whole.train()
    resumed = trainer_of(tmp_path, ours(MANUAL_RATE), AdafactorSchedule, **save)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS // 2}"))
    torch.testing.assert_close(*(torch.tensor(losses_of(x)[-3:]) for x in (whole, resumed)), rtol=1e-5, atol=0)


def batches():
    data = Characters(count=8 * STEPS)
    for start in range(0, len(data), 8):
        items = [data[i] for i in range(start, start + 8)]
        yield {key: torch.stack([item[key] for item in items]) for key in items[0]}


def test_accelerate_prepare_steps_as_a_plain_loop_does():
    plain = tiny_t5()
    optimizer = Adafactor(plain.parameters(), compile=False)
    for batch in batches():
        plain(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    accelerator = Accelerator(cpu=True)
    model = tiny_t5()
    optimizer = Adafactor(model.parameters(), compile=False)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, AdafactorSchedule(optimizer))
    for batch in batches():
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        assert not optimizer.step_was_skipped
    for p, q in zip(plain.parameters(), accelerator.unwrap_model(model).parameters(), strict=True):
        assert torch.equal(p, q)


def test_grad_scaler_through_accelerate_skips_and_rescales():
    accelerator = Accelerator(cpu=True)
    # accelerate makes a scaler on a GPU alone; on the CPU it is handed torch's own.
    accelerator.scaler = scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    model = tiny_t5(dropout_rate=0.0)
    model, optimizer = accelerator.prepare(model, Adafactor(model.parameters(), compile=False))
    plain = tiny_t5(dropout_rate=0.0)
    plain_optimizer = Adafactor(plain.parameters(), compile=False)
    for index, batch in enumerate(batches()):
        scaler.scale(model(**batch).loss).backward()
        if index == 2:
            next(model.parameters()).grad[0, 0] = torch.inf
        else:
            plain(**batch).loss.backward()
            plain_optimizer.step()
            plain_optimizer.zero_grad()
        optimizer.step()
        assert optimizer.step_was_skipped == (index == 2)
        optimizer.zero_grad()
    assert scaler.get_scale() == 2.0**9
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
