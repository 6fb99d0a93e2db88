"""Timesteps of Z-Image and Wan (256 numbers each)."""

from __future__ import annotations

import torch

from multimodal_gen.kernels.gpu.timestep_embedding import timestep_embedding
from tests.kernels.ahead import Cases

CASES: Cases = {"256": lambda empty: timestep_embedding(empty(4, dtype=torch.float32), 256)}
