"""The profiles' shared core, and the main job in a small form, run as a user runs it."""

import io
import json
import math
import os
import runpy
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from compilers import compiled_by, uncompiled

from adafactor_compiled import Adafactor

ROOT = Path(__file__).resolve().parents[1]
PROFILES = ROOT / "profiles"
NO_PROFILE = "train_fsdp.py"  # a script of the README, which measures nothing; tests/sharded runs it
SCRIPTS = sorted({path.name for path in PROFILES.glob("[!_]*.py")} - {NO_PROFILE})


@pytest.fixture
def shared(monkeypatch):
    monkeypatch.syspath_prepend(str(PROFILES))
    import _shared

    return _shared


def run(*arguments, threads=1):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done


class TestCompare:
    def test_contenders_are_called_in_turn(self, shared):
        calls = []
        timings = shared.compare({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, warm_up=2, calls=2)
        assert "".join(calls) == "aabb" + "bbaa" + "aabb" + "bbaa"  # the warm-up, and rounds in orders that are always the same
        assert list(timings) == ["a", "b"]
        for timing in timings.values():
            assert 0 < timing.low <= timing.median <= timing.high

    def test_slow_contenders_take_part_in_some_rounds(self, shared):
        calls = []
        steps = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
        shared.compare(steps, rounds=4, warm_up=0, every={"b": 3})
        assert "".join(calls) == "ba" + "a" + "a" + "ba"

    def test_a_clock_may_be_another_and_the_seconds_few(self, shared):
        times = iter(range(100))
        timing = shared.compare({"a": lambda: None}, rounds=9, warm_up=0, clock=lambda step: next(times), seconds=0)["a"]
        assert (timing.low, timing.median, timing.high) == (0.5, 1, 1.5)  # of three rounds

    def test_collection_is_on_again_after_an_error(self, shared):
        import gc

        def fail():
            raise OSError("broken")

        with pytest.raises(OSError, match="broken"):
            shared.compare({"a": fail}, warm_up=0)
        assert gc.isenabled()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"rounds": 0}, "`rounds` should be at least 1 but is: 0"),
            ({"warm_up": -1}, "`warm_up` should be at least 0 but is: -1"),
            ({"calls": 0}, "`calls` should be at least 1 but is: 0"),
        ],
    )
    def test_bad_options(self, shared, options, message):
        with pytest.raises(ValueError, match=message):
            shared.compare({"a": lambda: None}, **options)

    def test_timing_is_median_and_quartiles(self, shared):
        assert shared.timing_of([5.0, 1.0, 2.0, 4.0, 3.0]) == shared.Timing(3.0, 2.0, 4.0)
        assert shared.timing_of([7.0]) == shared.Timing(7.0, 7.0, 7.0)


def test_result_is_plain_json_with_the_machine(shared, tmp_path):
    payload = {
        "timings": {"ours": shared.Timing(2.0, 1.0, 3.0)},
        "dtype": torch.bfloat16,
        "shapes": [torch.Size([2, 3]), (4,)],
        "lost": float("nan"),
        "text": "a [ b ]  c",
    }
    path = shared.write_result("some", payload, tmp_path / "new" / "directory")
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["machine"]["torch"] == torch.__version__
    assert result["machine"]["threads"] == torch.get_num_threads()
    assert result["timings"] == {"ours": {"median": 2.0, "low": 1.0, "high": 3.0}}
    assert result["shapes"] == [[2, 3], [4]]
    assert (result["dtype"], result["lost"], result["text"]) == ("torch.bfloat16", None, "a [ b ]  c")


def test_table_is_markdown(shared):
    assert shared.markdown_table(["", "ms"], [["ours", "1.5"], ["x", "10.25"]]).splitlines() == [
        "|      |    ms |",
        "|------|------:|",
        "| ours |   1.5 |",
        "| x    | 10.25 |",
    ]
    with pytest.raises(ValueError, match="a row should have 2 cells but has 1"):
        shared.markdown_table(["", "ms"], [["ours"]])


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_one_line_of_a_terminal(shared, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("COLUMNS", "60")
    for text in ("training 5/10 loss 2.31", "x" * 100, ""):
        shared.show_progress(text)
    assert sys.stderr.getvalue().split("\r\x1b[K")[1:] == ["training 5/10 loss 2.31", "x" * 59, ""]
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    shared.show_progress("nothing in a log")
    assert sys.stderr.getvalue() == ""


def test_a_fresh_process_has_its_variables_and_our_threads(shared, monkeypatch):
    monkeypatch.setenv("OF_PROFILES", "ours")
    assert shared.in_fresh_process(os.getenv, "OF_PROFILES", OF_PROFILES="its own") == "its own"
    assert os.environ["OF_PROFILES"] == "ours"
    assert shared.in_fresh_process(torch.get_num_threads) == torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        shared.in_fresh_process(divmod, 1, 0)


@pytest.mark.parametrize("path", sorted(PROFILES.glob("results/*.json")), ids=lambda path: path.stem)
def test_records_can_be_shown_and_drawn(shared, path):
    """All records that are kept, of whatever commit, without measuring anything."""
    profile, result = runpy.run_path(str(PROFILES / f"{path.stem}.py")), json.loads(path.read_text(encoding="utf-8"))
    assert "\n|--" in profile["table"](result)
    shared.figures().close(profile["draw"](result))


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_profile_has_help(shared, name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(PROFILES / name), run_name="__main__")
    assert end.value.code == 0
    assert "--results" in capsys.readouterr().out


def test_main_job_is_deterministic(tmp_path):
    results, directories = [], [tmp_path / "first", tmp_path / "second"]
    with ThreadPoolExecutor() as pool:
        runs = list(pool.map(lambda directory: run(PROFILES / "train.py", "--quick", "--results", directory), directories))
    for directory, printed in zip(directories, runs, strict=True):
        assert "compiling Adafactor" not in printed.stderr  # no progress bar where there is no terminal
        assert "| Adafactor, fused" in printed.stdout
        assert (directory / "train.png").stat().st_size > 10_000
        result = json.loads((directory / "train.json").read_text(encoding="utf-8"))
        assert f"{result['graphs_compiled']} graphs were compiled" in printed.stdout
        assert result["graphs_compiled"] > 0
        results.append(result["runs"])
    first, second = results
    assert len(first) == 5
    for name, one in first.items():
        assert one["losses"] == second[name]["losses"], name
        assert one["held_out_loss"] == second[name]["held_out_loss"]
        assert one["losses"][-1] < one["losses"][0] - 1  # it learns
        assert one["state_bytes"] == second[name]["state_bytes"] > 0
    reference = first["Adafactor, reference path"]
    for name in ("Adafactor, fused", "Adafactor, compiled"):
        assert first[name]["losses"] == pytest.approx(reference["losses"], rel=1e-4)
        assert first[name]["state_bytes"] == reference["state_bytes"] < 0.02 * first["fused AdamW"]["state_bytes"]


def test_first_steps_are_phases_of_one_case(shared, monkeypatch):
    import compile_time

    caches = []

    def first_step_in(folder, network, optimizer):
        caches.append((network, folder))
        return {"seconds": 2.0, "graphs": 4, "found_in_cache": len(caches) - 1}

    monkeypatch.setattr(compile_time, "first_step_in", first_step_in)
    case = compile_time.measure_case(compile_time.Case("widths24", "compiled", "gpt2"))
    networks, directories = zip(*caches, strict=True)
    assert networks == ("widths24", "widths24", "gpt2", "widths24")  # cold, warm, another network, unseen
    assert directories[0] == directories[1] != directories[2] == directories[3]
    table = compile_time.table({"cases": [case]})
    assert "2.00" in table
    assert "3 of 4" in table


def test_first_steps_of_both_paths_and_of_adamw(shared):
    import compile_time

    cases = compile_time.cases_of(SimpleNamespace(networks=None, quick=False))
    assert {case.optimizer for case in cases if case.network == "gpt2"} == compile_time.NAMES.keys()


def test_first_step_of_a_fresh_process(shared, tmp_path):
    import compile_time

    first = compile_time.first_step_in(str(tmp_path), "train", "fused")
    assert first["seconds"] == pytest.approx(first["construction_s"] + first["first_step_s"])
    assert first["graphs"] == first["found_in_cache"] == 0
    assert any(tmp_path.iterdir())  # the kernels


EAGER = ["4 x 4x3 float32 multi_tensor"]
COMPILED = ["1 x 2x3 float32 compiled", "1 x 4x3 float32 compiled", "1 x 4x3 float32 compiled", "1 x 5 float32 compiled"]
CALLS = {"fused": ["4 x 4x3 float32 fused"], "compiled": COMPILED, "eager": EAGER}
PATHS = {"fused": {"fused": True}, "compiled": {"compile": True}, "eager": {"compile": False}}


@pytest.mark.parametrize(("chosen", "names"), [(PATHS[path], CALLS[path]) for path in PATHS], ids=PATHS)
def test_a_profiler_sees_the_calls_of_a_step(chosen, names):
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in ((4, 3), (2, 3), (4, 3), (5,))]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = Adafactor(params, **chosen)
    with (
        compiled_by(uncompiled),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler,
    ):
        optimizer.step()
    named = sorted(event.name for event in profiler.events() if event.name.startswith("Adafactor: "))
    assert named == [f"Adafactor: {name}" for name in names]


@pytest.mark.parametrize(("path", "function"), [("fused", "fused"), ("compiled", "compiled")])
def test_trace_sums_what_calls_of_one_name_cost(shared, tmp_path, path, function):
    import profile_trace

    with compiled_by(uncompiled):
        row = profile_trace.measure_row("widths24", profile_trace.ROWS["widths24"], path, 1, tmp_path)
    calls = row["calls"]
    assert sum(of_name["members"] for of_name in calls.values()) == 48
    assert all(of_name["ms"] > 0 for of_name in calls.values())
    shapes = profile_trace.ROWS["widths24"].shapes()
    moved = sum(5 * math.prod(shape) + (2 * sum(shape) if len(shape) == 2 else 0) for shape in shapes)  # see profile_trace.py
    assert sum(of_name["bytes"] for of_name in calls.values()) == 4 * moved
    assert (tmp_path / "widths24.trace.json.gz").exists()

    reached = dict.fromkeys(("copy_memory", "read_memory"), 10.0)
    shared.write_result("trace", {"path": path, "gigabytes_per_second": reached, "rows": {"widths24": row}}, tmp_path)
    result = shared.read_result("trace", tmp_path)
    assert f"float32 {function}" in profile_trace.table(result)
    assert shared.save_figure(profile_trace.draw(result), "trace", tmp_path).stat().st_size > 10_000


@pytest.mark.parametrize(
    "command",
    [
        ["step_time.py", "--contenders", "fused", "multi-tensor", "adamw-fused", "transformers"],
        ["memory.py", "--contenders", "fused", "multi-tensor", "adamw-fused"],
        ["scaling.py", "--rounds", "1", "--contenders", "multi-tensor", "adamw-fused"],
    ],
    ids=lambda command: command[0],
)
def test_quick_run_writes_a_result_and_a_picture_that_can_be_redrawn(command, tmp_path):
    name = command[0].removesuffix(".py")
    run(PROFILES / command[0], *command[1:], "--quick", "--results", tmp_path)
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    assert json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))["profile"] == name
    (tmp_path / f"{name}.png").unlink()
    printed = run(PROFILES / command[0], "--redraw", "--results", tmp_path)
    assert "Adafactor, multi-tensor" in printed.stdout
    assert (tmp_path / f"{name}.png").exists()


class TestVariations:
    def test_quick_run_says_what_changes_nothing(self, tmp_path):
        arguments = ["--tasks", "characters", "--results", tmp_path]
        printed = run(PROFILES / "variations.py", *arguments, "--quick").stdout
        result = json.loads((tmp_path / "variations.json").read_text(encoding="utf-8"))
        contenders = result["tasks"]["characters"]["contenders"]
        base = contenders["Adafactor, T5 setting"]
        assert len(base["rates"]) == len(base["rates"][0]["held_out_losses"]) == len(result["seeds"]) == 3
        assert contenders["beta2_cap=0.99"]["rates"] == base["rates"]  # so few steps do not reach it
        assert [line.count("the same") for line in printed.splitlines() if line.startswith("| beta2_cap")] == [1, 1]
        momentum, half = (contenders[name]["state_bytes"] for name in ("beta1=0.9", "beta1=0.9, momentum in bfloat16"))
        assert momentum - half == result["tasks"]["characters"]["parameters"] * 2
        assert (tmp_path / "variations.png").stat().st_size > 10_000
        (tmp_path / "variations.png").unlink()
        redrawn = run(PROFILES / "variations.py", "--redraw", "--results", tmp_path).stdout
        assert redrawn.splitlines() == printed.splitlines()[1:]
        assert (tmp_path / "variations.png").exists()

    def test_digits_are_learned(self, shared):
        pytest.importorskip("sklearn")
        import variations

        job = variations.Job("digits", variations.BASE, 1e-2, 0, 60, None)
        loss, accuracy, state_bytes = variations.train(job)
        assert (loss, accuracy, state_bytes) == variations.train(job)
        assert accuracy > 0.5
        largest = variations.train(job._replace(name='factor_dims="largest"', steps=1))
        assert largest[2] < state_bytes

    @pytest.mark.parametrize(
        ("losses", "word"),
        [
            ([1.0, 1.25, 1.5], "the same"),
            ([1.0, 1.0, 1.5], "no difference"),
            ([1.5, 1.75, 2.0], "no difference"),  # the means are as far apart as the seeds
            ([1.75, 2.0, 2.25], "worse"),
            ([0.5, 0.5, 0.5], "better"),
            ([0.5, 0.5, None], "worse"),  # None is how the JSON has what is not finite
            ([None, None, None], "worse"),
        ],
    )
    def test_difference_is_beyond_the_spread(self, shared, losses, word):
        import variations

        base, other = ({"best": 0, "rates": [{"lr": 1e-3, "held_out_losses": of}]} for of in ([1.0, 1.25, 1.5], losses))
        assert variations.verdict(other, base).partition(",")[0] == word

    def test_rate_at_the_edge_is_told(self, shared):
        import variations

        rates = [{"lr": lr} for lr in (1e-3, 3e-3, 1e-2)]
        told = [variations.rate_text({"best": best, "rates": rates}) for best in range(3)]
        assert told == ["0.001, least tried", "0.003", "0.01, largest tried"]

    def test_rates_rise_and_fall(self, shared):
        import variations

        shares = [variations.share_of_rate(100, step) for step in range(100)]
        assert shares[0] == pytest.approx(0.2)
        assert max(shares) == shares[4] == shares[5] == 1
        assert shares[-1] == pytest.approx(1 / 95)


class TestGpu:
    """What gpu.py can do on a CPU: everything but the device's own numbers."""

    def test_quick_run_goes_through_the_parts(self, tmp_path):
        parts = ["steps", "first_steps", "training"]
        options = ["--quick", "--device", "cpu", "--rounds", "1", "--minutes", "5", "--results", tmp_path]
        printed = run(PROFILES / "gpu.py", *options, "--parts", *parts).stdout
        result = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
        assert result["profile"] == "gpu"
        assert set(result["parts"]) == set(parts)
        assert "Errors" not in printed
        steps = result["parts"]["steps"]
        assert steps.keys() == result["parts"]["first_steps"].keys() == {"tiny", "tiny-sharded"}
        assert all(of["few"].keys() == {"fused", "adamw-fused"} for of in steps.values())
        assert steps["tiny"]["all"].keys() > {"fused", "adamw-fused", "adamw-foreach", "multi-tensor", "torch-foreach"}
        assert steps["tiny"]["first"]["fused"]["first_step_s"] > 0
        assert "no optimizer" in result["parts"]["training"]["timings"]["compiled"]
        assert (tmp_path / "gpu.png").stat().st_size > 10_000
        (tmp_path / "gpu.png").unlink()
        assert "| tiny " in run(PROFILES / "gpu.py", "--redraw", "--results", tmp_path).stdout
        assert (tmp_path / "gpu.png").exists()

    def test_every_path_is_tried_and_errors_are_results(self, shared, monkeypatch):
        from _card import checks, report

        record, emitted = {}, []
        monkeypatch.setitem(checks.PATHS, "broken", {"nonsense": True})
        with compiled_by(uncompiled):
            checks.sanity(record, lambda: emitted.append(len(record)), device="cpu")
        assert emitted == list(range(1, 1 + len(checks.PATHS)))  # after each
        parts = {"sanity": dict(record), "syncs": {"skipped": "no device"}}
        assert "nonsense" in record.pop("broken")["error"]
        assert all(of_path["ok"] and 0 < of_path["error"] < 1e-5 for of_path in record.values())
        parts["sanity"]["compiled"] = {"error": None, "ok": False}  # as the JSON has what is not finite
        shown = report.table({"card": {"driver": None, "cuda": None}, "machine": {"torch": "2"}, "parts": parts})
        assert f"{len(record) - 1} of {len(record) + 1}; not compiled; not broken" in shown
        assert "compiled -, " in shown
        assert "- sanity, broken: TypeError" in shown
        assert "no device" in shown

    def test_what_fails_or_takes_too_long_leaves_the_others_alone(self, shared, tmp_path):
        from _card import checks, steps
        from _card.jobs import Job, run_at_once

        jobs = [
            Job(checks.syncs, 60, {"device": "cpu"}),
            Job(steps.first_steps, 60, {"device": "cpu", "network": "nonsense"}),
            Job(checks.sanity, 0.1, {"device": "cpu"}),
        ]
        ended = {str(job): record for job, record, over in run_at_once(jobs, tmp_path, time.monotonic() + 120) if over}
        assert ended["syncs"]["skipped"]
        assert "error" not in ended["syncs"]
        assert "nonsense" in ended["first_steps nonsense"]["error"]
        assert ended["sanity"]["error"].startswith("cut off after")
        late = [record for _, record, _ in run_at_once(jobs[:1], tmp_path / "late", 0.0)]
        assert [record["error"] for record in late] == ["no time was left"]

    def test_tests_are_counted_as_they_end(self, shared):
        from _card.checks import Counter

        record = {}
        counter = Counter(record, lambda: None)
        for name, when, outcome in [
            ("a", "setup", "skipped"),
            ("b", "setup", "passed"),
            ("b", "call", "passed"),
            ("c", "call", "failed"),
        ]:
            report = SimpleNamespace(
                nodeid=name, when=when, outcome=outcome, longreprtext="x" * 5000, passed=outcome == "passed"
            )
            counter.pytest_runtest_logreport(report)
        assert (record["passed"], record["failed"], record["skipped"]) == (1, 1, 1)
        assert record["failures"].keys() == {"c"}
        assert len(record["failures"]["c"]) == 1500

    def test_stages_put_what_matters_most_first(self, shared):
        import gpu

        options = SimpleNamespace(
            device="cuda", quick=False, rounds=15, networks=gpu.DEFAULT, parts=list(gpu.SECONDS), minutes=6.0
        )
        names = [[str(job) for job in stage] for stage in gpu.stages_of(options)]
        assert names[:2] == [["sanity"], ["tests", *(f"first_steps {network}" for network in gpu.DEFAULT), "training"]]
        assert names[2:] == [*([f"steps {network}"] for network in gpu.DEFAULT), ["syncs"], ["training"]]  # timed alone
