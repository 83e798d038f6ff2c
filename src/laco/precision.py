"""What is chosen must not depend on how exact the products around it are."""

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Products of float32 tensors are float32 in here, also where `torch.autocast` would make them bfloat16.

    Scores of tokens that differ little are equal in bfloat16, so that training would keep other tokens than inference.
    """
    try:
        enabled = torch.is_autocast_enabled(device.type)
    except RuntimeError:  # no such thing on devices of this kind
        enabled = False
    return torch.autocast(device.type, enabled=False) if enabled else nullcontext()
