"""An H100 that is not there: what torch, Inductor and Triton ask of a GPU before they generate code for it.

For a process of its own that starts in `environment(...)` and calls `install()` before anything is compiled. Tensors are fake
(FakeTensorMode) and nothing is ever launched; it needs a CUDA build of torch 2.13 or later, whose wheels bring Triton and its
assembler.
"""

from __future__ import annotations

import os
import subprocess
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

STUB = """
// c10 asks for the current device even for fake tensors. That is all of the CUDA runtime that it needs.
int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaSetDevice(int device) { return 0; }
int cudaGetLastError(void) { return 0; }
int cudaPeekAtLastError(void) { return 0; }
"""

BANDWIDTH, SHORTEST = 2.5e12, 2e-6  # bytes a second that it moves, and seconds that no kernel goes below: for estimates

PROPERTIES = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 * 2**30,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 * 2**20,
    is_integrated=0,
    gcnArchName="",
)


def milliseconds(moved: int, launches: int) -> float:
    """Of the device, at best, for so many bytes."""
    return 1e3 * max(moved / BANDWIDTH, launches * SHORTEST)


def check_build() -> None:
    """Raise RuntimeError where this torch cannot generate code for a GPU."""
    if torch.version.cuda is None or torch.__version__ < "2.13":  # before, fake tensors ask the driver for a device
        raise RuntimeError(
            f"the kernels of a GPU need a CUDA build of torch 2.13 or later but this is torch {torch.__version__}; no GPU is "
            "needed: on Linux, `pip install torch` in an environment of its own brings such a build"
        )


def environment(directory: Path) -> dict[str, str]:
    """The environment of a process that calls `install`; its stub of the CUDA runtime and its caches lie in `directory`."""
    source, stub = directory / "cudart.c", directory / "cudart.so"
    source.write_text(STUB)
    subprocess.run([os.environ.get("CC", "cc"), "-shared", "-fPIC", "-o", str(stub), str(source)], check=True)
    return {
        **os.environ,
        "LD_PRELOAD": str(stub),
        "TMPDIR": str(directory),
        "TORCHINDUCTOR_CACHE_DIR": str(directory / "inductor"),
        "TRITON_CACHE_DIR": str(directory / "triton"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }


def install() -> None:
    """Answer for the GPU, for the rest of this process."""
    from torch._dynamo.device_interface import CudaInterface

    answers: dict[str, Any] = {
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "get_device_properties": lambda device=None: PROPERTIES,
        "is_bf16_supported": lambda including_emulation=True: True,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
        setattr(CudaInterface, name, staticmethod(answer))  # it has its own references
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_capability = lambda device=None: (PROPERTIES.major, PROPERTIES.minor)
    torch.cuda.get_device_name = lambda device=None: PROPERTIES.name
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()
    torch.cuda.set_rng_state = lambda new_state, device="cuda": None
    torch.cuda._lazy_init = lambda: None
    torch.Tensor.pin_memory = lambda self, device=None: self  # fake tensors have no pages
    torch.accelerator.is_available = lambda: False  # or Dynamo asks for its current stream
    _install_driver()
    _leave_out_examples()


def _install_driver() -> None:
    """Triton's: Inductor's keys and Triton's code depend on the target."""
    from torch._inductor.runtime import triton_helpers
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    target = GPUTarget("cuda", 10 * PROPERTIES.major + PROPERTIES.minor, PROPERTIES.warp_size)
    driver.set_active(
        types.SimpleNamespace(
            get_current_target=lambda: target,
            get_current_device=lambda: 0,
            get_current_stream=lambda device=None: 0,
            get_device_capability=lambda device=None: (PROPERTIES.major, PROPERTIES.minor),
            is_active=lambda: True,
        )
    )
    triton_helpers.set_driver_to_gpu = lambda: None  # it would put the one for a real GPU back


def _leave_out_examples() -> None:
    """Inductor computes a little on the device itself: examples for patterns that are not ours, and constants."""
    from torch._inductor.fx_passes import fuse_attention, misc_patterns, pad_mm
    from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder

    for module, name in ((fuse_attention, "_sfdp_init"), (misc_patterns, "_misc_patterns_init"), (pad_mm, "_pad_mm_init")):
        setattr(module, name, lambda device=None: None)
    deduce = UniformValueConstantFolder._deduce_value

    def deduce_on_cpu(self: Any, node: Any) -> Any:
        with _OnCpu():
            return deduce(self, node)

    UniformValueConstantFolder._deduce_value = deduce_on_cpu


class _OnCpu(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        on_cpu = {**(kwargs or {})}
        if "device" in on_cpu:
            on_cpu["device"] = torch.device("cpu")
        if func is torch.ops.prims.device_put.default:
            args = (args[0], torch.device("cpu"))
        return func(*args, **on_cpu)
