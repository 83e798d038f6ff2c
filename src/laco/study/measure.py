"""What answering costs with every method: times in one interleaved run, when nothing else runs, and peak memory.

Times are kept in a file of their own and taken again for another model, another way of timing, or on another machine.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any
from weakref import finalize

import torch
from pydantic import BaseModel, ValidationError
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from laco.ask import synchronize
from laco.checkpoint import from_pretrained
from laco.cost import Ratio, encoder_call, interleave, machine, median_interval, prefill_call
from laco.data import load_samples
from laco.errors import LacoError
from laco.evaluate.generation import encode
from laco.files import write_file
from laco.methods import DecoderMethod, Method, Reducer, Selector, from_dict
from laco.methods.base import MergerModule
from laco.study.recipe import Timing

BLOCK = 8  # methods that are held in memory and timed in turn, beside the uncompressed model
STEPS: dict[type[Method], tuple[str, ...]] = {
    Selector: ("__call__",),
    DecoderMethod: ("__call__",),
    Reducer: ("before_layer", "before_mlp", "after_layers"),
}


class Cost(BaseModel):
    """What a question costs up to the first new token.

    Args:
        encoder_ms, prefill_ms: vision encoder with projector; language model. Per question, medians.
        scoring_ms: the part of both that is spent in the method's own steps: choosing, merging, its layers. What it
            costs to gather what the method looks at is in the other two only.
        speedup: of encoder and prefill over the uncompressed model, from ratios within rounds.
        memory_mb: most megabytes (10^6) of tensors made on the way that were alive at once, of the whole batch; the
            model's weights, and what kernels use inside, are not in it.
    """

    encoder_ms: float
    prefill_ms: float
    scoring_ms: float
    speedup: Ratio
    memory_mb: float

    @property
    def answer_ms(self) -> float:
        return self.encoder_ms + self.prefill_ms


class Costs(BaseModel):
    """All that was measured: by `key_of` a method, its cost, or why it could not be timed, which no file keeps."""

    model: str
    data: str
    timing: Timing
    machine: dict[str, Any]
    found: dict[str, Cost | str]


def key_of(method: Mapping[str, Any] | None) -> str:
    """Settings of a method as a key: all of them, also those that were left out."""
    return "none" if method is None else json.dumps(from_dict(dict(method)).to_dict(), sort_keys=True)


def measure_costs(
    methods: Sequence[Mapping[str, Any] | None],
    model: str,
    timing: Timing,
    file: Path,
    *,
    data: str = "world",
    again: bool = False,
    progress: bool = True,
) -> Costs:
    """Times the uncompressed model and all methods in it that are not in `file` yet.

    Args:
        methods: settings; None, the model as it is, is always there.
        model: a directory or a name on the hub.
        file: where costs are kept, a block of methods at a time.
        data: where pictures and questions come from.
        again: forgets what is in the file.
        progress: shows bars on stderr.
    """
    costs = Costs(model=model, data=data, timing=timing, machine=machine(), found={})
    if not again and (known := read_costs(file, model, timing, data)) and same_machine(known.machine, costs.machine):
        costs = known
    left = {key: method for method in methods if method and (key := key_of(method)) not in costs.found}
    keys = list(left)
    blocks = [keys[start : start + BLOCK] for start in range(0, len(keys), BLOCK)]
    if not blocks and "none" not in costs.found:
        blocks = [[]]
    for block in track(blocks, "timing", console=Console(stderr=True), disable=not progress):
        calls: dict[str, Call] = {}
        for key in ("none", *block):
            try:
                calls[key] = Call(model, left.get(key), timing.batch, data)
                calls[key].run()
            except Exception as error:  # a method that fails here is a row without times, not the end of the study
                if key == "none":
                    raise
                calls.pop(key, None)
                costs.found[key] = str(error) if isinstance(error, LacoError) else repr(error)
        found = measure_block(calls, timing.rounds)
        costs.found |= {key: cost for key, cost in found.items() if key != "none" or "none" not in costs.found}
        write_file(file, measured(costs).model_dump_json(indent=1))
    return costs


def measured(costs: Costs) -> Costs:
    """Without what could not be timed: the next run tries again."""
    return costs.model_copy(update={"found": {key: c for key, c in costs.found.items() if isinstance(c, Cost)}})


def read_costs(file: Path, model: str, timing: Timing, data: str = "world") -> Costs | None:
    """What a file has of a model, timed this way on this data; None if it has nothing of it."""
    try:
        costs = Costs.model_validate_json(file.read_text())
    except (OSError, ValidationError):
        return None
    return measured(costs) if (costs.model, costs.timing, costs.data) == (model, timing, data) else None


def same_machine(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether times of both may stand side by side: all that `machine` notes is equal but for the version of laco."""
    return {**one, "laco": None} == {**other, "laco": None}


class Call:
    """A model with a method in it, and a batch of questions."""

    def __init__(self, model: str, method: Mapping[str, Any] | None, batch: int, data: str):
        self.method = from_dict(dict(method)) if method else None
        torch.manual_seed(0)
        self.model, processor = from_pretrained(model, self.method)
        self.model.eval()
        self.batch = batch
        samples = load_samples(data, limit=7 * batch, seed=0)
        first = list({sample.picture_key: sample for sample in samples}.values())
        asked = (first * batch)[:batch]
        pictures, videos = [sample.pictures() for sample in asked], [sample.video for sample in asked]
        inputs = encode(processor, [asked[0].question] * batch, pictures, videos)
        self.encoder, self.prefill = encoder_call(self.model, inputs), prefill_call(self.model, inputs)

    def run(self) -> None:
        self.encoder()
        self.prefill()


def measure_block(calls: Mapping[str, Call], rounds: int) -> dict[str, Cost]:
    """Costs of some models, timed in turn; the first is the uncompressed one."""
    stages: dict[str, Callable[[], Any]] = {}
    for key, call in calls.items():
        stages |= {f"encoder {key}": call.encoder, f"prefill {key}": call.prefill}
    times = interleave(stages, rounds=rounds, progress=False).milliseconds
    totals = {
        key: [a + b for a, b in zip(times[f"encoder {key}"], times[f"prefill {key}"], strict=True)] for key in calls
    }
    base = next(iter(totals.values()))
    return {
        key: Cost(
            encoder_ms=median(times[f"encoder {key}"]) / call.batch,
            prefill_ms=median(times[f"prefill {key}"]) / call.batch,
            scoring_ms=median(scoring_ms(call.model, call.method, call.run) for _ in range(rounds)) / call.batch,
            speedup=median_interval([a / b for a, b in zip(base, totals[key], strict=True)]),
            memory_mb=peak_bytes(call.run) / 1e6,
        )
        for key, call in calls.items()
    }


class Stopwatch:
    """Sums up milliseconds in between `start` and `stop`; of nested intervals the outermost counts."""

    def __init__(self) -> None:
        self.milliseconds, self.depth, self.since = 0.0, 0, 0.0

    def start(self, *_: Any) -> None:
        if self.depth == 0:
            synchronize()
            self.since = perf_counter()
        self.depth += 1

    def stop(self, *_: Any) -> None:
        self.depth -= 1
        if self.depth == 0:
            synchronize()
            self.milliseconds += 1000 * (perf_counter() - self.since)


def scoring_ms(model: nn.Module, method: Method | None, run: Callable[[], Any]) -> float:
    """Milliseconds of a run that are spent in a method's own steps and modules."""
    watch = Stopwatch()
    with ExitStack() as stack:
        if method is not None:
            names = next((names for kind, names in STEPS.items() if isinstance(method, kind)), ())
            stack.enter_context(watched(type(method), names, watch))
        for part in model.modules():
            if isinstance(part, MergerModule):
                stack.callback(part.register_forward_pre_hook(watch.start).remove)
                stack.callback(part.register_forward_hook(watch.stop).remove)
        run()
    return watch.milliseconds


@contextmanager
def watched(kind: type, names: Sequence[str], watch: Stopwatch) -> Iterator[None]:
    """Lets a stopwatch run in these functions of a class."""

    def timed(step: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(step)
        def run(*args: Any, **kwargs: Any) -> Any:
            watch.start()
            try:
                return step(*args, **kwargs)
            finally:
                watch.stop()

        return run

    own = {name: vars(kind).get(name) for name in names}
    for name in names:
        setattr(kind, name, timed(getattr(kind, name)))
    try:
        yield
    finally:
        for name, step in own.items():
            if step is None:
                delattr(kind, name)
            else:
                setattr(kind, name, step)


def peak_bytes(run: Callable[[], Any]) -> int:
    """Most bytes of tensors made in a run that were alive at once."""
    with LiveBytes() as live:
        run()
    return live.peak


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make, until nothing refers to them any more; the same on every device."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: set[int] = set()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and (storage := x.untyped_storage())._cdata not in self.alive | given:
                self.note(storage)
        return out

    def note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.alive.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        finalize(storage, self.free, key, size)

    def free(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size
