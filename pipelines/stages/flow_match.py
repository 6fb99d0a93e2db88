"""Euler steps along a flow-matching trajectory (Lipman et al., 2022; schedule as diffusers' FlowMatchEuler)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
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


# Of diffusers' scheduler, where a configuration does not say.
DEFAULTS = {
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": False,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "time_shift_type": "exponential",
}
REFUSED = ("stochastic_sampling", "invert_sigmas")
# Schedules of other kinds, which diffusers computes: importing it takes longer than everything else of a start.
OTHER_KINDS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "shift_terminal")


class FlowMatchEuler:
    """Makes per-row schedules from `scheduler_config.json`, the same bits as diffusers'."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Raises: CorruptModel for options that this implementation does not cover."""
        for option in REFUSED:
            if config.get(option):
                raise CorruptModel(f"scheduler_config.json sets {option}, which is not supported.")
        self.config = {**DEFAULTS, **config}
        if self.config["time_shift_type"] not in ("exponential", "linear"):
            raise CorruptModel(
                f"scheduler_config.json: time_shift_type is exponential or linear, not {config['time_shift_type']!r}."
            )
        self._foreign = any(config.get(option) for option in OTHER_KINDS)

    def start(self, steps: int, shift: float | None) -> FlowMatchState:
        """The scheduler's own schedule; `shift` replaces the checkpoint's. Raises: CorruptModel for dynamic shifting.

        As in the reference, the training sigmas, which are shifted already, are shifted again.
        """
        if self.config["use_dynamic_shifting"]:
            raise CorruptModel("scheduler_config.json sets use_dynamic_shifting, which this family does not use.")
        shift = self.config["shift"] if shift is None else shift
        if self._foreign:
            return _of_diffusers({**self.config, "shift": shift}, num_inference_steps=steps)
        count = self.config["num_train_timesteps"]
        ends = torch.tensor((count, 1), dtype=torch.float32) / count  # of the training sigmas
        first, last = _shifted(ends, shift).tolist()
        sigmas = np.linspace(first * count, last * count, steps) / count
        return self._state(_shifted(sigmas, shift))

    def start_linear(self, steps: int, tokens: int) -> FlowMatchState:
        """Equal steps before shifting, for `tokens` image tokens (they matter where shifting is dynamic)."""
        config = self.config
        slope = (config["max_shift"] - config["base_shift"]) / (
            config["max_image_seq_len"] - config["base_image_seq_len"]
        )
        mu = config["base_shift"] + slope * (tokens - config["base_image_seq_len"])
        sigmas = torch.linspace(1.0, 1 / steps, steps).tolist()
        if self._foreign:
            return _of_diffusers(config, sigmas=sigmas, mu=mu)
        plain = np.array(sigmas, dtype=np.float32)
        if not config["use_dynamic_shifting"]:
            return self._state(_shifted(plain, config["shift"]))
        strength = math.exp(mu) if config["time_shift_type"] == "exponential" else mu
        return self._state(strength / (strength + (1 / plain - 1)))

    def _state(self, sigmas: np.ndarray) -> FlowMatchState:
        held = torch.from_numpy(sigmas).to(torch.float32)
        return FlowMatchState(torch.cat((held, torch.zeros(1))), held * self.config["num_train_timesteps"])


Values = TypeVar("Values", Tensor, np.ndarray)


def _shifted(sigmas: Values, shift: float) -> Values:
    """More steps at high noise (Esser et al., 2024)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def _of_diffusers(config: Mapping[str, Any], **schedule: Any) -> FlowMatchState:
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    scheduler.set_timesteps(**schedule)
    return FlowMatchState(sigmas=scheduler.sigmas.clone(), timesteps=scheduler.timesteps.clone())
