"""The healing study: the same short training for every variant of a model, and what each then knows.

A variant is a method at a place, or a baseline. Each is healed (first compressor and projector, then everything) and
evaluated in a single-thread process of its own, as many side by side as there are cores: on a CPU that is much faster
than one process after the other with all cores. What is finished is kept on disk, so a study can be stopped, continued
and extended; a variant that fails is reported and stops nothing.
"""

from laco.healing.run import finished_study, run_study
from laco.healing.summary import Study, Summary, average_interval
from laco.healing.variants import (
    HALVED,
    HALVED_HEALED,
    NONE,
    Job,
    Outcome,
    Protocol,
    Variant,
    comparison,
    label,
    outline,
    variant,
)

__all__ = [
    "HALVED",
    "HALVED_HEALED",
    "NONE",
    "Job",
    "Outcome",
    "Protocol",
    "Study",
    "Summary",
    "Variant",
    "average_interval",
    "comparison",
    "finished_study",
    "label",
    "outline",
    "run_study",
    "variant",
]
