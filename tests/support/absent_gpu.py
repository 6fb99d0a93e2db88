"""A GPU that is not there, as Triton's driver: kernels are specialised and compiled for it as they are when they are
launched, what they take of it is written down, and nothing runs.

Tensors may be on torch's meta device, so a launch at full size costs no memory. Specialising as a real launch does
matters: strides that are known to be multiples of 16 are the difference between 93 registers and spilling.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from typing import Any

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

# Compute capability → shared memory of one block, in bytes (CUDA C++ Programming Guide, technical specifications).
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
THREADS = 1024


@dataclass(frozen=True)
class Taken:
    """What one compiled kernel takes of a GPU; filled by `AbsentGpu` when the kernel is loaded."""

    kernel: str
    registers: int  # of a thread; 255 is the limit
    stack: int  # bytes of a thread in local memory: registers that were spilled, arrays that are indexed
    shared: int  # bytes of a block, known at compile time


class _Launcher:
    """Launches nothing."""

    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *arguments: Any) -> None:
        pass


@dataclass
class AbsentGpu:
    """What Triton asks of a driver; also its own `utils`."""

    capability: int
    taken: list[Taken] = field(default_factory=list)
    launcher_cls: type = _Launcher

    @property
    def utils(self) -> AbsentGpu:
        return self

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED[self.capability]}

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[object, object, int, int, int]:
        registers, stack = resources(cubin)
        self.taken.append(Taken(name, registers, stack, shared))
        return object(), object(), registers, stack, THREADS

    def unload_module(self, module: object) -> None:
        pass


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) of the one kernel in a cubin, from the tool that comes with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"REG:(\d+) STACK:(\d+)", said)
    assert len(found) == 1, f"one kernel was expected in the cubin:\n{said}"
    return int(found[0][0]), int(found[0][1])


def launch_on(capability: int) -> AbsentGpu:
    """Triton launches on such a GPU from now on; what was compiled before is forgotten, so that it is told again."""
    for module in [module for name, module in sys.modules.items() if name.startswith("multimodal_gen.kernels.")]:
        for found in vars(module).values():
            if isinstance(found, JITFunction):
                found.device_caches.clear()
    gpu = AbsentGpu(capability)
    driver.set_active(gpu)
    return gpu
