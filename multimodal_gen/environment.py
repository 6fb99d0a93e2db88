"""What worker processes get of this machine: their environment variables and their share of the cores."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from multimodal_gen.config import EngineConfig, engine_part
from multimodal_gen.cores import usable_cores
from multimodal_gen.settings import ENV_PREFIX

# An idle OpenMP thread spins before it sleeps, by default for milliseconds: with one other busy process on the machine
# it keeps the core from whoever has work, and a step takes up to twenty times as long. Sleeping at once doubles a small
# step on virtual machines, where waking is slow. This many spins bridge the gaps inside a forward.
OPENMP_DEFAULTS = {"GOMP_SPINCOUNT": "20000"}
OPENMP_CHOICES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def openmp_defaults() -> dict[str, str]:
    """OpenMP variables to set, unless the user has chosen how threads wait."""
    return {} if any(name in os.environ for name in OPENMP_CHOICES) else OPENMP_DEFAULTS


def calm_openmp() -> None:
    """Set the OpenMP defaults of this process; no effect once torch is imported."""
    os.environ.update(openmp_defaults())


def worker_environment() -> dict[str, str]:
    """The environment of a worker process: ours without our own variables, which may hold the API key."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}
    return {**ours, **openmp_defaults()}


def worker_threads(config: EngineConfig, workers: int) -> EngineConfig:
    """The engine's share of the settings with the cores of this machine shared out among so many workers."""
    part = engine_part(config)
    if config.threads is not None or workers == 1 or os.environ.get("OMP_NUM_THREADS"):
        return part
    return msgspec.structs.replace(part, threads=max(1, usable_cores() // workers))


def default_threads() -> int | None:
    """Threads of a process that has the machine for itself; None where the user has told OpenMP."""
    return None if os.environ.get("OMP_NUM_THREADS") else usable_cores()


def cache_folder() -> Path:
    """Where files are kept that can be made again (XDG base directories)."""
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(chosen) if os.path.isabs(chosen) else Path.home() / ".cache") / "multimodal_gen"


def compiler_of_choice() -> str:
    """The user's C++ compiler, as build tools take it from CXX; empty for any."""
    return os.environ.get("CXX", "")
