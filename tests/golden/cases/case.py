"""What a numeric case holds, and how its weights come into our modules."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """The arrays (inputs and weights) and hyper-parameters of one case."""

    arrays: dict[str, Tensor]
    hyper: dict[str, Any]
    variant: str

    def __getitem__(self, name: str) -> Tensor:
        return self.arrays[name]

    def width(self, name: str) -> int:
        """Output channels of a weight."""
        return self.arrays[name].shape[0]

    def map(self, name: str) -> Tensor:
        """(B, [prefix +] H W, C) tokens as a map (B, H, W, C), prefix tokens left out."""
        height, width = self.hyper["grid"]
        return self.arrays[name][:, -height * width :].unflatten(1, (height, width))


def load(module: nn.Module, case: Case, names: dict[str, str], eps: str | None = None) -> None:
    """Fills every parameter from the case's arrays.

    Args:
        module: what to fill, all of it.
        case: holds an array `{stem}_weight` or `{stem}_bias` for every parameter.
        names: the stem that stands for each submodule.
        eps: the hyper-parameter that holds the epsilon of the norms.
    """
    state = {}
    for key, _ in module.named_parameters():
        part, _, kind = key.rpartition(".")
        state[key] = case[f"{names[part]}_{kind}"]
    module.load_state_dict(state, strict=False)  # buffers of ours stay
    if eps:
        for part in module.modules():
            if isinstance(part, nn.LayerNorm | nn.RMSNorm):
                part.eps = case.hyper[eps]
