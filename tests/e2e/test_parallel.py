"""Several ranks from Python and from the command line: started for the call, gone after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from multimodal_gen import DiffGenerator
from multimodal_gen.errors import InvalidValue, WorkerCrashed
from multimodal_gen.messages import Progress
from tests.support.checkpoints import PROMPT, make_z_image
from tests.support.mmgen import mmgen
from tests.support.server import wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

QUICK: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": 2, "seed": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_z_image(tmp_path_factory.mktemp("model") / "z")


@pytest.fixture(scope="module")
def alone(folder: Path) -> np.ndarray:
    with DiffGenerator.from_pretrained(str(folder), dtype="float32", threads=1) as generator:
        return generator.generate(PROMPT, output_type="np", **QUICK).images[0].astype(int)


def ranks() -> list[psutil.Process]:
    """Workers of this process that run."""
    children = psutil.Process().children()
    return [child for child in children if any("engine.worker" in part for part in child.cmdline())]


def test_a_generator_of_two_ranks(folder: Path, alone: np.ndarray) -> None:
    load: dict[str, Any] = {"dtype": "float32", "threads": 1, "num_gpus": 2, "tp_size": 2}
    with DiffGenerator.from_pretrained(str(folder), **load) as generator:
        assert len(ranks()) == 2
        assert (generator.info.device, generator.info.dtype) == ("cpu", "float32")
        seen = list[Progress]()
        result = generator.generate(PROMPT, output_type="np", on_step=seen.append, **QUICK)
        assert np.abs(result.images[0] - alone).max() <= 1
        assert [event.step for event in seen] == [1, 2]
        many = generator.generate([PROMPT, "a blue chair"], output_type="np", **QUICK)
        assert np.abs(many[0].images[0] - alone).max() <= 1
        _interrupted(generator)
        _killed(generator)
        assert np.abs(generator.generate(PROMPT, output_type="np", **QUICK).images[0] - alone).max() <= 1
    assert ranks() == []
    with pytest.raises(InvalidValue, match="closed"):
        generator.generate(PROMPT)


def _interrupted(generator: DiffGenerator) -> None:
    def interrupt(_event: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generator.generate(PROMPT, on_step=interrupt, **{**QUICK, "num_inference_steps": 900})
    seen = list[Progress]()
    after = generator.generate(PROMPT, output_type="np", on_step=seen.append, **QUICK)
    assert {event.request_id for event in seen} == {after.request.id}


def _killed(generator: DiffGenerator) -> None:
    def kill(_event: Progress) -> None:
        for rank in ranks()[1:]:
            rank.kill()

    with pytest.raises(WorkerCrashed):
        generator.generate(PROMPT, on_step=kill, **{**QUICK, "num_inference_steps": 900})
    wait_for(lambda: len(ranks()) == 2, 30, "the restart")


def test_the_command_takes_the_same_flags(folder: Path, alone: np.ndarray, tmp_path: Path) -> None:
    flags = ("--num-gpus", "2", "--tp-size", "2", "--dtype", "float32", "--threads", "1")
    size = ("--size", "64x64", "--steps", "2", "--seed", "1", "--output", "cat.png")
    done = mmgen("generate", PROMPT, "--model-path", str(folder), *flags, *size, folder=tmp_path)
    assert done.code == 0, done.err
    with Image.open(tmp_path / "cat.png") as image:
        assert np.abs(np.asarray(image).astype(int) - alone).max() <= 1
    refused = mmgen("generate", PROMPT, "--model-path", str(folder), "--tp-size", "3", folder=tmp_path)
    assert (refused.code, "4 attention heads" in refused.error) == (2, True)
