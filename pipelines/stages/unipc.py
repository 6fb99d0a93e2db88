"""UniPC, a predictor-corrector multistep solver (Zhao et al., 2023), on a flow-matching trajectory.

The schedule is diffusers' (UniPCMultistepScheduler); the update is ours, one row at a time, without hidden state: what
a step gathers is in the row's own `UniPCState`. Coefficients are computed in float64 from the float32 schedule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from multimodal_gen.errors import CorruptModel
from multimodal_gen.pipelines.contract import Sampler

SCHEDULER_CLASS = "UniPCMultistepScheduler"


@dataclass
class UniPCState(Sampler):
    """One row's schedule and the predictions so far; `advance` returns the next state and alters nothing."""

    sigmas: Tensor  # float32 [steps + 1] on the CPU, from 1 (noise) to 0 (clean)
    timesteps: Tensor  # int64 [steps] on the CPU
    order: int
    lower_order_final: bool
    uncorrected: tuple[int, ...]  # steps whose result is not corrected by the next prediction
    clean: tuple[Tensor, ...] = ()  # the last `order` estimates of the clean latents, newest last
    corrected: Tensor | None = None  # latents that the last step began with, after its correction

    def advance(self, x: Tensor, velocity: Tensor, step: int) -> tuple[Tensor, UniPCState]:
        """Latents after `step` from those before it and the velocity dx/dσ there."""
        estimate = x - self.sigmas[step] * velocity
        if step > 0 and step - 1 not in self.uncorrected and self.corrected is not None:
            x = self._correct(estimate, step)
        state = replace(self, clean=(*self.clean, estimate)[-self.order :], corrected=x)
        return state._predict(x, step), state

    def tensors(self) -> dict[str, Tensor]:
        """The predictions so far."""
        kept = {f"clean.{index}": tensor for index, tensor in enumerate(self.clean)}
        return kept if self.corrected is None else {**kept, "corrected": self.corrected}

    def restore(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Become what `tensors` were taken from."""
        self.clean = tuple(tensors[f"clean.{index}"] for index in range(len(tensors) - 1)) if step else ()
        self.corrected = tensors["corrected"] if step else None

    def _order(self, step: int) -> int:
        """Of the predictor at `step`, and of the corrector after it."""
        last = len(self.timesteps) - step if self.lower_order_final else self.order
        return min(self.order, last, step + 1)

    def _predict(self, x: Tensor, step: int) -> Tensor:
        """UniP: from σ_step to σ_step+1."""
        order = self._order(step)
        move = _Move.between(self.sigmas, step, step + 1, order)
        newest = self.clean[-1]
        result = move.linear(x, newest)
        if order > 1:
            weights = (
                torch.full((1,), 0.5) if order == 2 else torch.linalg.solve(move.matrix[:-1, :-1], move.right[:-1])
            )
            for i in range(1, order):
                difference = (self.clean[-1 - i] - newest) / float(move.ratios[i - 1])
                result = result - float(move.pull * weights[i - 1]) * difference
        return result

    def _correct(self, estimate: Tensor, step: int) -> Tensor:
        """UniC: the step that led here once more, now that the estimate at its end is known."""
        order = self._order(step - 1)
        move = _Move.between(self.sigmas, step - 1, step, order)
        newest = self.clean[-1]
        assert self.corrected is not None, "there was a step before"
        result = move.linear(self.corrected, newest)
        weights = torch.full((1,), 0.5) if order == 1 else torch.linalg.solve(move.matrix, move.right)
        for i in range(1, order):
            difference = (self.clean[-1 - i] - newest) / float(move.ratios[i - 1])
            result = result - float(move.pull * weights[i - 1]) * difference
        return result - float(move.pull * weights[-1]) * (estimate - newest)


@dataclass(frozen=True)
class _Move:
    """Coefficients of one step, float64."""

    shrink: Tensor  # σ_t / σ_s
    pull: Tensor  # α_t · (e^-h - 1), which is α_t · B(h) too
    ratios: Tensor  # (λ_i - λ_s) / h of the older estimates, then 1
    matrix: Tensor  # R
    right: Tensor  # b

    @classmethod
    def between(cls, sigmas: Tensor, start: int, end: int, order: int) -> _Move:
        """From step `start` to `end` with the `order` - 1 steps before `start`."""
        sigma = sigmas.double()
        log_snr = torch.log(1 - sigma) - torch.log(sigma)  # λ
        h = log_snr[start] - log_snr[end]  # negative of the paper's: data prediction
        phi = torch.expm1(h)
        older = [(log_snr[start - i] - log_snr[start]) / -h for i in range(1, order)]
        ratios = torch.stack([*older, torch.ones((), dtype=torch.float64)])
        rows, right, factorial, term = [], [], 1, phi / h - 1
        for k in range(1, order + 1):
            rows.append(ratios ** (k - 1))
            right.append(term * factorial / phi)
            factorial *= k + 1
            term = term / h - 1 / factorial
        alpha = 1 - sigma[end]
        return cls(
            shrink=sigma[end] / sigma[start],
            pull=alpha * phi,
            ratios=ratios,
            matrix=torch.stack(rows),
            right=torch.stack(right),
        )

    def linear(self, x: Tensor, estimate: Tensor) -> Tensor:
        """The first-order part of the step."""
        return float(self.shrink) * x - float(self.pull) * estimate


SUPPORTED = {
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "predict_x0": True,
    "solver_type": "bh2",
    "solver_p": None,
    "thresholding": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_dynamic_shifting": False,
}


class UniPC:
    """Makes per-row schedules from `scheduler_config.json`."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Raises: CorruptModel for options that this implementation does not cover."""
        from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

        self._make = UniPCMultistepScheduler.from_config
        self.config = config
        found = self._make(config).config
        for name, wanted in SUPPORTED.items():
            if found[name] != wanted:
                raise CorruptModel(f"scheduler_config.json: {name} = {found[name]!r} is not supported, {wanted!r} is.")

    def start(self, steps: int, shift: float | None) -> UniPCState:
        """The schedule of a row; `shift` replaces the checkpoint's."""
        change = {} if shift is None else {"flow_shift": shift}
        scheduler = self._make(self.config, **change)
        scheduler.set_timesteps(steps)
        config = scheduler.config
        return UniPCState(
            sigmas=scheduler.sigmas.clone(),
            timesteps=scheduler.timesteps.clone(),
            order=config.solver_order,
            lower_order_final=config.lower_order_final,
            uncorrected=tuple(config.disable_corrector),
        )
