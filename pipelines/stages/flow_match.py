"""Euler steps along a flow-matching trajectory (Lipman et al., 2022; schedule as diffusers' FlowMatchEuler)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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

    def advance(self, x: Tensor, velocity: Tensor, step: int) -> tuple[Tensor, FlowMatchState]:
        """Latents after `step`, float32, and the state then, from latents before it and the velocity dx/dσ there."""
        return x + (self.sigmas[step + 1] - self.sigmas[step]) * velocity, self

    def clean(self, x: Tensor, velocity: Tensor, step: int) -> Tensor:
        """Where the straight line through this point ends: the estimate of the clean latents."""
        return x - self.sigmas[step] * velocity


class FlowMatchEuler:
    """Makes per-row schedules from `scheduler_config.json`; the arithmetic of the schedule is diffusers'."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Raises: CorruptModel for options that this implementation does not cover."""
        from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

        self.config = config
        self._make = FlowMatchEulerDiscreteScheduler.from_config
        self.scheduler = self._make(config)
        for option in ("stochastic_sampling", "invert_sigmas"):
            if self.scheduler.config[option]:
                raise CorruptModel(f"scheduler_config.json sets {option}, which is not supported.")

    def start(self, steps: int, shift: float | None) -> FlowMatchState:
        """The scheduler's own schedule; `shift` replaces the checkpoint's. Raises: CorruptModel for dynamic shifting.

        As in the reference, the training sigmas, which are shifted already, are shifted again.
        """
        scheduler = self._make(self.config, **({} if shift is None else {"shift": shift}))
        if scheduler.config.use_dynamic_shifting:
            raise CorruptModel("scheduler_config.json sets use_dynamic_shifting, which this family does not use.")
        scheduler.set_timesteps(steps)
        return FlowMatchState(sigmas=scheduler.sigmas.clone(), timesteps=scheduler.timesteps.clone())

    def start_linear(self, steps: int, tokens: int) -> FlowMatchState:
        """Equal steps before shifting, for `tokens` image tokens (they matter where shifting is dynamic)."""
        config = self.scheduler.config
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        mu = config.base_shift + slope * (tokens - config.base_image_seq_len)
        sigmas = torch.linspace(1.0, 1 / steps, steps).tolist()
        self.scheduler.set_timesteps(sigmas=sigmas, mu=mu)
        return FlowMatchState(sigmas=self.scheduler.sigmas.clone(), timesteps=self.scheduler.timesteps.clone())
