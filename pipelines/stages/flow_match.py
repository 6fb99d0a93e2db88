"""Euler steps along a flow-matching trajectory (Lipman et al., 2022; schedule as diffusers' FlowMatchEuler)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from multimodal_gen.errors import CorruptModel
from multimodal_gen.pipelines.contract import Sampler

SCHEDULER_CLASS = "FlowMatchEulerDiscreteScheduler"


@dataclass
class FlowMatchState(Sampler):
    """One row's schedule; filled by `FlowMatchEuler.start`, never changed afterwards."""

    sigmas: Tensor  # float32 [steps + 1] on the CPU, from 1 (noise) to 0 (clean)
    timesteps: Tensor  # float32 [steps] on the CPU

    def advance(self, x: Tensor, velocity: Tensor, step: int) -> Tensor:
        """Latents after `step`, float32, from latents before it and the velocity dx/dσ there."""
        return x + (self.sigmas[step + 1] - self.sigmas[step]) * velocity

    def clean(self, x: Tensor, velocity: Tensor, step: int) -> Tensor:
        """Where the straight line through this point ends: the estimate of the clean latents."""
        return x - self.sigmas[step] * velocity


class FlowMatchEuler:
    """Makes per-row schedules from `scheduler_config.json`; the arithmetic of the schedule is diffusers'."""

    def __init__(self, folder: Path) -> None:
        """`folder` is the scheduler/ folder. Raises: CorruptModel for another scheduler class."""
        from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

        self.config = json.loads((folder / "scheduler_config.json").read_text())
        if self.config.get("_class_name") != SCHEDULER_CLASS:
            raise CorruptModel(
                f"scheduler_config.json asks for {self.config.get('_class_name')}; this family is built for "
                f"{SCHEDULER_CLASS}."
            )
        self.scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.config)
        for option in ("stochastic_sampling", "invert_sigmas"):
            if self.scheduler.config[option]:
                raise CorruptModel(f"scheduler_config.json sets {option}, which is not supported.")

    def start(self, steps: int, tokens: int) -> FlowMatchState:
        """The schedule of a row with `tokens` image tokens (they matter where shifting is dynamic)."""
        config = self.scheduler.config
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        mu = config.base_shift + slope * (tokens - config.base_image_seq_len)
        sigmas = torch.linspace(1.0, 1 / steps, steps).tolist()
        self.scheduler.set_timesteps(sigmas=sigmas, mu=mu)
        return FlowMatchState(sigmas=self.scheduler.sigmas.clone(), timesteps=self.scheduler.timesteps.clone())
