import psutil
import torch


def free_bytes(device: torch.device) -> int:
    return psutil.virtual_memory().available
