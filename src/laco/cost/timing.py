"""Times that may be compared: several callables in one run, round by round, so that a busy moment hits all of them.

Ratios are taken within each round and then summarised; a ratio of two separate runs on a shared machine says little.
"""

import gc
import os
import platform
import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from itertools import accumulate
from math import comb
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import torch
from pydantic import BaseModel
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import PreTrainedModel

from laco.ask import timed
from laco.evaluate.generation import split_inputs
from laco.evaluate.report import versions
from laco.families.compat import encode_pictures, given_features
from laco.families.reduction.prompt import knowing
from laco.train.recipe import Stage
from laco.train.trainer import Learner


class Ratio(BaseModel):
    """How many times faster than the first callable: median over rounds with a 95 % interval."""

    value: float
    low: float
    high: float


class Timings(BaseModel):
    """`milliseconds` {name: one time a round} of an interleaved run, and the machine it ran on."""

    milliseconds: dict[str, list[float]]
    machine: dict[str, Any]

    def median(self, name: str) -> float:
        return median(self.milliseconds[name])

    def speedup(self, name: str, over: str | None = None) -> Ratio:
        """How many times faster `name` is than `over` (by default the first), from the ratios within each round."""
        first = self.milliseconds[over or next(iter(self.milliseconds))]
        return median_interval([a / b for a, b in zip(first, self.milliseconds[name], strict=True)])

    def summary(self) -> dict[str, dict[str, float]]:
        """{name: milliseconds, speedup, low, high}"""
        return {
            name: {
                "milliseconds": self.median(name),
                "speedup": (ratio := self.speedup(name)).value,
                "low": ratio.low,
                "high": ratio.high,
            }
            for name in self.milliseconds
        }


def median_interval(values: list[float]) -> Ratio:
    """The median with the interval between order statistics that holds it in 95 % of cases (sign test).

    No assumption on the distribution, so outliers of a busy machine do no harm. Fewer than 6 values cannot give 95 %;
    then it is the whole range.
    """
    ordered, n = sorted(values), len(values)
    tails = accumulate(comb(n, k) / 2**n for k in range(n))
    outside = sum(tail <= 0.025 for tail in tails)  # so many values may be cut off at each end
    cut = max(outside - 1, 0)
    return Ratio(value=median(ordered), low=ordered[cut], high=ordered[n - 1 - cut])


def interleave(
    calls: Mapping[str, Callable[[], Any]], *, rounds: int = 10, warmup: int = 2, progress: bool = True
) -> Timings:
    """Times callables round by round, each round in an order of chance (the same in every run).

    What ran just before leaves caches and memory as it likes, so nothing may always follow the same neighbour.

    Args:
        calls: by name; the first is the one to which the others are compared.
        rounds: measured calls of each.
        warmup: calls of each before that, not measured.
        progress: shows a bar on stderr.
    """
    names = list(calls)
    for _ in range(warmup):
        for call in calls.values():
            call()
    milliseconds: dict[str, list[float]] = {name: [] for name in names}
    chance = Random(0)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for _ in track(range(rounds), "timing", console=Console(stderr=True), disable=not progress):
            for name in chance.sample(names, len(names)):
                milliseconds[name].append(timed(calls[name])[1])
    finally:
        if collecting:
            gc.enable()
    return Timings(milliseconds=milliseconds, machine=machine())


def machine() -> dict[str, Any]:
    """What a time depends on: processor, cores, threads, versions."""
    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else None,
        **versions(),
    }


def processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return named[1] if named else platform.processor() or platform.machine()


def encoder_call(model: Any, inputs: Mapping[str, Tensor]) -> Callable[[], Any]:
    """Vision encoder and projector over pictures and videos of `inputs`, which is what the processor returned.

    The call gives {"image" or "video": features}.
    """
    seen, _ = split_inputs(model, inputs)  # type: ignore[arg-type]

    @torch.inference_mode()
    def call() -> Any:
        with knowing(model, inputs):  # some methods choose by the question
            return encode_pictures(model, seen)

    return call


def prefill_call(model: Any, inputs: Mapping[str, Tensor]) -> Callable[[], Any]:
    """The language model over the whole prompt up to the first new token; the pictures are encoded beforehand."""
    seen, others = split_inputs(model, inputs)  # type: ignore[arg-type]
    features = encoder_call(model, inputs)()

    @torch.inference_mode()
    def call() -> Any:
        with given_features(model, seen, others, features) as given:
            return model(**given, use_cache=True, logits_to_keep=1)

    return call


def training_call(model: PreTrainedModel, batch: Mapping[str, Any], lr: float = 1e-4) -> Callable[[], Any]:
    """One step of training, everything learning: forward, backward, AdamW. The model itself stays as it is.

    `batch` comes from `laco.train.collate.Collator`.
    """
    stage = Stage.model_validate({"name": "timing", "steps": 1, "lr": lr})
    learner = Learner(deepcopy(model).train().requires_grad_(True), stage)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=lr)

    def call() -> None:
        learner(**batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    return call
