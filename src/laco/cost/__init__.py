"""What compression costs and saves: FLOPs from a configuration, and times measured side by side."""

from laco.cost.flops import StageFlops, encoder_layer_flops, merger_flops, stage_flops
from laco.cost.timing import (
    Ratio,
    Timings,
    encoder_call,
    interleave,
    machine,
    median_interval,
    prefill_call,
    training_call,
)

__all__ = [
    "Ratio",
    "StageFlops",
    "Timings",
    "encoder_call",
    "encoder_layer_flops",
    "interleave",
    "machine",
    "median_interval",
    "merger_flops",
    "prefill_call",
    "stage_flops",
    "training_call",
]
