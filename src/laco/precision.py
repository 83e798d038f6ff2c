"""What is chosen must not depend on how exact the products around it are."""

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Products of float32 tensors are float32 in here, also where `torch.autocast` would make them bfloat16.

    Scores of tokens that differ little are equal in bfloat16, so that training would keep other tokens than inference.
    """
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()
