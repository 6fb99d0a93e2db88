"""The C++ kernels for processors: built once with the machine's compiler, found again on disk, called through ctypes.

Why not an extension that pip builds: the best code is the one for this very processor (`-march=native`), and without
torch's headers all of it compiles in seconds. Threads are those of torch's own OpenMP, whose symbols torch has loaded
for everybody: two OpenMP runtimes in one process would compete for the cores (docs/decisions/031).

Where there is no compiler, `unavailable()` says so and torch computes. The choice between Triton and torch on GPUs is
made here too.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from multimodal_gen.cores import usable_cores
from multimodal_gen.environment import cache_folder, compiler_of_choice

SOURCES = Path(__file__).with_name("cpu")
# Not -ffast-math: sums are vectors already, and NaN must stay NaN.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-fvisibility=hidden")
KINDS = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float, "d": ctypes.c_double}
SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}
# What any of the sources needs of OpenMP.
PROBE = """
#include <omp.h>
extern "C" int probe() {
    int total = 0;
#pragma omp parallel reduction(+ : total)
    total += omp_get_num_threads();
    return total;
}
"""
BUILD_SECONDS = 120  # a compiler that takes longer hangs

CFunction = Callable[..., None]


class Listener(Protocol):
    """Who records calls (`replay.Recording`)."""

    def over(self, name: str, kinds: str, compute: CFunction, entry: int | None) -> CFunction:
        """What is called in place of `compute`; `entry`: the address of its variant for slots, where it has one."""

    def hold(self, thing: object) -> None:
        """What a recorded argument points to."""

    def check(self, look: Callable[[], None]) -> None:
        """`look` is to be called after every replay."""


class Unavailable(Exception):
    """The library cannot be had here; says why."""


class _Choice:
    """Whether native kernels are used at all; changed by `choose` and `torch_only`."""

    native = True


class _Here(threading.local):
    """Of this thread: who records its calls; changed by `listen`."""

    listener: Listener | None = None


_here = _Here()


def choose(kernels: str) -> None:
    """`auto`: native kernels where they can be had. `torch`: none (the setting `--kernels`)."""
    assert kernels in ("auto", "torch"), kernels
    _Choice.native = kernels == "auto"


@contextmanager
def torch_only() -> Iterator[None]:
    """Compute by torch inside."""
    before, _Choice.native = _Choice.native, False
    try:
        yield
    finally:
        _Choice.native = before


def listen(listener: Listener | None) -> None:
    """From now on calls of this thread are recorded; None: no more."""
    assert listener is None or _here.listener is None, "one recording at a time"
    _here.listener = listener


def hold(thing: object) -> None:
    """`thing` is pointed to by what an argument points to: a recording keeps it."""
    if _here.listener is not None:
        _here.listener.hold(thing)


def check(look: Callable[[], None]) -> None:
    """`look` now, and after every replay of what is being recorded; it raises where something went wrong."""
    look()
    if _here.listener is not None:
        _here.listener.check(look)


def switched_off() -> bool:
    """Whether torch computes whatever there is (`--kernels torch`)."""
    return not _Choice.native


def by_triton(x: Tensor) -> bool:
    """Whether the Triton kernel computes on tensors like x."""
    return x.is_cuda and _Choice.native and has_triton() and not torch.compiler.is_compiling()


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


class Function:
    """A function of the library by name, for each dtype that it has a variant of: NAME_f32, NAME_bf16.

    `kinds`: its arguments in order; p a pointer, i an int64, f a float, d a double.
    """

    def __init__(
        self, name: str, kinds: str, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    ) -> None:
        self._name, self._kinds = name, kinds
        self._types: list[Any] = [KINDS[kind] for kind in kinds]
        self._dtypes = dtypes
        self._bound: dict[torch.dtype, CFunction] | None = None  # filled at the first call

    def of(self, x: Tensor) -> CFunction | None:
        """The variant for tensors like x, or None: then torch computes."""
        if not (x.is_cpu and _Choice.native) or torch.compiler.is_compiling():
            return None
        if self._bound is None:
            self._bound = self._bind()
        compute = self._bound.get(x.dtype)
        if compute is None or _here.listener is None:
            return compute
        return _here.listener.over(self._name, self._kinds, compute, self._entry(x.dtype))

    def _entry(self, dtype: torch.dtype) -> int | None:
        """Of REPLAYED in C++."""
        found = library()
        name = f"{self._name}_{SUFFIXES[dtype]}_slots"
        if found is None or not hasattr(found, name):
            return None
        return ctypes.cast(found[name], ctypes.c_void_p).value

    def _bind(self) -> dict[torch.dtype, CFunction]:
        found = library()
        if found is None:
            return {}
        bound: dict[torch.dtype, CFunction] = {}
        for dtype in self._dtypes:
            function = found[f"{self._name}_{SUFFIXES[dtype]}"]
            function.argtypes, function.restype = self._types, None
            bound[dtype] = function
        return bound


def library() -> ctypes.CDLL | None:
    """The loaded library, built if need be; None where it cannot be had."""
    found = _load()
    return found if isinstance(found, ctypes.CDLL) else None


def unavailable() -> str:
    """Why there is no library, or an empty string."""
    found = _load()
    return "" if isinstance(found, ctypes.CDLL) else str(found)


@functools.cache
def _load() -> ctypes.CDLL | Unavailable:
    try:
        target = build()
        try:
            return ctypes.CDLL(str(target))
        except OSError:  # a file that a full disk or a power cut left: once more
            target.unlink(missing_ok=True)
            return ctypes.CDLL(str(build()))
    except Unavailable as why:
        return why
    except (OSError, subprocess.SubprocessError, ValueError) as error:  # whatever a compiler does, torch computes
        return Unavailable(f"the kernels cannot be compiled or loaded: {error}")


# --- building ---------------------------------------------------------------------------------------------------------


def build() -> Path:
    """The shared library, compiled if this processor has none of these sources yet. Raises: Unavailable."""
    compiler = _compiler()
    folder = _folder()
    target = folder / f"kernels-{_fingerprint(compiler)}.so"
    if target.exists():
        return target
    with (folder / "lock").open("w") as lock:  # of several ranks one compiles
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=folder) as work:
                made = _compile(compiler, Path(work))
                with made.open("rb") as file:
                    os.fsync(file.fileno())
                os.replace(made, target)
    return target


def _compile(compiler: str, work: Path) -> Path:
    """As many units as there are cores, then linked. Raises: Unavailable, subprocess.TimeoutExpired."""
    openmp, objects, commands = _openmp(compiler, work), [], []
    for number, unit in enumerate(_units(usable_cores())):
        made = work / f"unit{number}.cpp"
        made.write_text("".join(f'#include "{source.name}"\n' for source in unit))
        objects.append(str(made.with_suffix(".o")))
        commands.append([compiler, *FLAGS, *openmp, "-I", str(SOURCES), "-c", str(made), "-o", objects[-1]])
    _run(commands)
    library = work / "kernels.so"
    # Not linked with an OpenMP runtime: torch's is loaded, and its symbols are everybody's.
    _run([[compiler, "-shared", *objects, "-o", str(library)]])
    return library


def _units(count: int) -> list[list[Path]]:
    """Sources that are compiled together, about as much in each: half of the time of one alone goes to its headers."""
    units: list[list[Path]] = [[] for _ in range(count)]
    for source in sorted(SOURCES.glob("*.cpp"), key=lambda source: (-source.stat().st_size, source.name)):
        min(units, key=lambda unit: sum(other.stat().st_size for other in unit)).append(source)
    return [sorted(unit) for unit in units if unit]


def _run(commands: list[list[str]]) -> None:
    """Side by side, as many as there are cores. Raises: Unavailable, subprocess.TimeoutExpired."""
    with ThreadPoolExecutor(usable_cores()) as pool:
        done = [pool.submit(_ask, command) for command in commands]
        for command, each in zip(commands, done, strict=True):
            if each.result().returncode:
                pool.shutdown(cancel_futures=True)
                raise Unavailable(f"{command[0]} failed: {' '.join(each.result().stderr.split())[:500]}")


def _openmp(compiler: str, work: Path) -> tuple[str, ...]:
    """The flag for code that runs in torch's threads. Raises: Unavailable where there is none for several cores."""
    probe, made = work / "probe.cpp", work / "probe.so"
    probe.write_text(PROBE)
    done = _ask([compiler, "-fopenmp", "-fPIC", "-c", str(probe), "-o", str(work / "probe.o")])
    if done.returncode == 0 and _ask([compiler, "-shared", str(work / "probe.o"), "-o", str(made)]).returncode == 0:
        try:
            ctypes.CDLL(str(made), mode=os.RTLD_NOW)
        except OSError as error:  # calls of another runtime than torch's
            words = str(error)
        else:
            return ("-fopenmp",)
    else:
        words = done.stderr
    if usable_cores() > 1:
        raise Unavailable(f"{compiler} compiles nothing for torch's threads: {' '.join(words.split())[:300]}")
    return ()


def _ask(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a compiler to its end. Raises: subprocess.TimeoutExpired, OSError."""
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=BUILD_SECONDS
    )


def _compiler() -> str:
    if platform.system() not in ("Linux", "Darwin"):
        raise Unavailable(f"compiled kernels are for Linux and macOS, not for {platform.system()}")
    chosen = compiler_of_choice()
    found = shutil.which(chosen) if chosen else next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    if found is None:
        raise Unavailable(f"there is no C++ compiler {chosen or '(g++, clang++ or c++)'} on PATH")
    return found


def _fingerprint(compiler: str) -> str:
    """Of all that decides about the machine code."""
    told = _ask([compiler, "--version"]).stdout
    digest = hashlib.sha256("\0".join((told, *FLAGS, _processor())).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:24]


def _processor() -> str:
    """Model and instruction sets: a home folder may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU part")
    return platform.machine() + "".join(sorted({line for line in lines if line.startswith(wanted)}))


def _own_folder() -> Path:
    return cache_folder() / "kernels"


def _folder() -> Path:
    """A folder that nobody else can write: what lies in it is executed. Raises: Unavailable."""
    shared = Path(tempfile.gettempdir()) / f"mmgen-kernels-{os.getuid()}"
    for place in (_own_folder, lambda: shared):
        try:
            folder = place()
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = folder.lstat() if folder == shared else folder.stat()  # in a shared folder a link may be anybody's
        except (OSError, RuntimeError):  # RuntimeError: nobody knows our home
            continue
        own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
        if own and os.access(folder, os.W_OK):
            return folder
    raise Unavailable(f"no folder of ours can be written: neither in the user's cache folder nor in {shared.parent}")
