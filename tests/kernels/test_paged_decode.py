"""The Triton kernel for one token over pages, without a GPU: interpreted. (Compiled: test_compiled.py.)"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kernels.paged_decode_cases import CASES, ON_A_GPU, interpret

pytest.importorskip("triton")
pytestmark = [pytest.mark.kernels]

TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}
ROOT = Path(__file__).parents[2]


def run(arguments: tuple[str, ...], tmp_path: Path, **environment: str) -> dict[str, Any]:
    own = {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    own |= environment
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.paged_decode_cases", *arguments],
        **{"capture_output": True, "text": True, "cwd": ROOT, "timeout": 240, "env": {**os.environ, **own}},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    return run((), tmp_path_factory.mktemp("interpreter"), TRITON_INTERPRET="1")


@pytest.mark.parametrize("case", CASES)
def test_the_interpreted_kernel_computes_its_reference(case: str, interpreted: dict[str, float]) -> None:
    assert interpreted[case] < TOLERANCE[CASES[case].get("dtype", "float32")]


def test_the_backend_computes_what_the_reference_of_backends_does(interpreted: dict[str, float]) -> None:
    assert interpreted["backend"] < 1e-5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", ON_A_GPU)
def test_the_kernel_on_a_gpu_computes_its_reference(case: str) -> None:
    case_of = ON_A_GPU[case]
    assert interpret(case_of, "cuda") < TOLERANCE[case_of.get("dtype", "float32")]


def test_a_few_sequences_are_split_and_many_are_not() -> None:
    from multimodal_gen.kernels.paged_decode import MAX_SPLITS, splits_for

    assert splits_for(256, 8, 4096, 132) == 1
    assert splits_for(1, 8, 200, 132) == 1
    assert splits_for(1, 8, 4096, 132) == 16
    assert splits_for(1, 1, 1 << 20, 132) == MAX_SPLITS
