"""What it costs to choose: every method that scores visual tokens, on random signals, on the CPU.

576 tokens are a LLaVA-1.5 picture, 2880 five such crops (LLaVA-NeXT), here in one sequence; encoder and language model
are 1024 wide. Signals are ready before the clock starts: keys, the rows of attention that a method reads, and what it
remembers of earlier layers have their own price in a model. What is timed, by place:

- `external`: the plan by which 160 tokens stay;
- `language_model`: the same at a single point, with words before and behind the visual tokens;
- `encoder`: what one layer does to the tokens, before it and before its MLP, with a CLS token; settings are the
  method's own, as they are wherever the count depends on the picture.

An encoder takes a batch as a whole, elsewhere pictures are chosen one after the other; to methods for videos crops are
frames. Random tokens are like no others: methods that merge only what is alike (dyntok, scissor) compare all of them
and merge none. Mergers of fixed windows score nothing and are not here. Everything of one size runs in one interleaved
run. Below the methods stand the choices that several share, on a matrix that is ready, and what a matrix of all
products costs.

    python benchmarks/scoring_cost.py

Takes 7 minutes on two quiet cores. Writes benchmarks/scoring_cost.csv: medians in milliseconds for a whole
batch, with 95 % intervals, which fewer than 7 rounds do not get; what cannot run at a size says why under `note`.
Command, number of rounds and machine stand in the comment above. `--only NAME...` measures some; a trial is
`--width 64 --tokens 64 --batches 1 --keep 8 --rounds 1 --output trial.csv`. Goal: farthest points, determinants,
coverage and independent set at 2880 tokens under 60 ms on two cores.
"""

import argparse
import csv
import io
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import normalize

from laco.cost import interleave, machine, median_interval
from laco.errors import LacoError
from laco.evaluate.report import command
from laco.files import write_file
from laco.grid import Grid
from laco.methods import (
    DecoderMethod,
    DecoderSignals,
    GlimpsePrune,
    Method,
    Reducer,
    Selector,
    Signals,
    SparseVLM,
    registry,
)
from laco.methods.decoder import Step, attention_logits
from laco.methods.greedy import coverage, determinantal, farthest_points, independent_set
from laco.methods.reducer import LayerSignals

RESULT = Path(__file__).with_suffix(".csv")
CROP, HEADS, WORDS, LAYERS = 576, 16, 32, 32
ENOUGH_ROUNDS = 7  # for intervals of 95 %, to which fewer than 6 cannot come
METHODS: dict[str, tuple[type[Method], dict[str, Any]]] = {
    name: (cls, {}) for name, cls in registry().items() if issubclass(cls, Selector | Reducer | DecoderMethod)
} | {"sparsevlm_plus": (SparseVLM, {"version": "plus"})}
CHOICES: dict[str, Callable[["Inputs", int], Any]] = {
    "(farthest points)": lambda given, keep: farthest_points(given.distance_NN, keep),
    "(determinants)": lambda given, keep: determinantal(given.cosines_NN, keep),
    "(coverage)": lambda given, keep: coverage(given.cosines_NN, keep, given.weight_N),
    "(independent set)": lambda given, keep: independent_set(given.weight_N, given.cosines_NN, 0.9, keep),
    "(matrix of all products)": lambda given, _: given.unit_ND @ given.unit_ND.T,
}


class Inputs:
    """What methods and choices get at one size; made when it is first wanted, and the same for all."""

    def __init__(self, tokens: int, batch: int, width: int) -> None:
        self.tokens, self.batch, self.width = tokens, batch, width
        self.heads = HEADS if width % HEADS == 0 else 1
        crops, rest = divmod(tokens, CROP)
        self.grid = Grid(1, 1, tokens) if rest else Grid(crops, 24, 24)

    def heads_of(self, *rows: int) -> Tensor:
        """(*rows, H, d)"""
        return torch.randn(*rows, self.heads, self.width // self.heads)

    @cached_property
    def pictures(self) -> list[Signals]:
        return [
            Signals(
                grid=self.grid,
                tokens=torch.randn(self.tokens, self.width),
                features=torch.randn(1 + self.tokens, self.width),
                keys=self.heads_of(1 + self.tokens),
                queries=self.heads_of(1 + self.tokens),
                cls_attention=torch.randn(self.heads, self.tokens).softmax(dim=1),
                text=torch.randn(WORDS, self.width),
                text_attention=torch.randn(self.heads, WORDS, self.tokens).softmax(dim=2),
            )
            for _ in range(self.batch)
        ]

    @cached_property
    def prompts(self) -> list[DecoderSignals]:
        """Without attention and memory, which depend on the method."""
        length = WORDS + self.tokens + WORDS
        angles = torch.rand(length, self.width // self.heads // 2).repeat(1, 2)
        return [
            DecoderSignals(
                visual=torch.arange(WORDS, WORDS + self.tokens),
                length=length,
                embeddings=torch.randn(length, self.width),
                hidden=torch.randn(length, self.width),
                keys=self.heads_of(length).transpose(0, 1).contiguous(),
                rotary=(angles.cos(), angles.sin()),
                maps=tuple(torch.randn(self.tokens, self.width) for _ in GlimpsePrune.maps),
                grids=(self.grid,),
            )
            for _ in range(self.batch)
        ]

    @cached_property
    def states(self) -> tuple[Tensor, Tensor]:
        """Tokens (B, 1 + N, C) that enter the first and the second layer of an encoder."""
        earlier, now = torch.randn(2, self.batch, 1 + self.tokens, self.width)
        return earlier, now

    @cached_property
    def layer(self) -> LayerSignals:
        keys = self.heads_of(self.batch, 1 + self.tokens).transpose(1, 2).contiguous()
        return LayerSignals(keys=keys, cls_attention=torch.randn(keys.shape[:3]).softmax(dim=2))

    @cached_property
    def unit_ND(self) -> Tensor:
        return normalize(torch.randn(self.tokens, self.width), dim=-1)

    @cached_property
    def cosines_NN(self) -> Tensor:
        return self.unit_ND @ self.unit_ND.T

    @cached_property
    def distance_NN(self) -> Tensor:
        return 1 - self.cosines_NN

    @cached_property
    def weight_N(self) -> Tensor:
        return torch.rand(self.tokens)


def built(method: Any, *sizes: int, **named: int) -> Any:
    """What the method has trained, which here is not, as it runs after training; None if nothing."""
    module = method.build(*sizes, **named)
    return module.eval() if isinstance(module, nn.Module) else None


def of_selector(method: Selector, given: Inputs) -> Callable[[], Any]:
    module, pictures = built(method, given.width), given.pictures
    return lambda: [method(signals, module) for signals in pictures]


def of_decoder_method(method: DecoderMethod, given: Inputs) -> Callable[[], Any]:
    module = built(method, layers=1, channels=given.width, heads=given.heads, encoder_channels=given.width)
    prompts = [attended(method, signals, given) for signals in given.prompts]
    return lambda: [method(signals, 0, module) for signals in prompts]


def attended(method: DecoderMethod, signals: DecoderSignals, given: Inputs) -> DecoderSignals:
    """With the memory that a method has at its first point, and the rows of attention that it asks for."""
    assert signals.hidden is not None
    assert signals.keys is not None
    memory = method.start(signals)
    if method.observed(LAYERS):
        step = Step(torch.randn_like(signals.hidden), torch.randn_like(signals.hidden))
        memory = method.observe(memory, step, step)
    signals = replace(signals, memory=memory)
    rows_M = method.queries(signals)
    logits_HML = attention_logits(given.heads_of(len(rows_M)).transpose(0, 1), signals.keys, rows_M)
    return replace(signals, logits=logits_HML, attention=logits_HML.softmax(dim=-1))


def of_reducer(method: Reducer, given: Inputs) -> Callable[[], Any]:
    module, signals, (earlier_BNC, now_BNC) = built(method, given.width), given.layer, given.states
    _, before = method.before_layer(earlier_BNC, method.start(earlier_BNC, LAYERS, prefix=1), 0, module)

    def run() -> Any:
        x_BNC, state = method.before_layer(now_BNC, before, 1, module)
        return method.before_mlp(x_BNC, state, 1, signals)

    return run


def prepared(name: str, given: Inputs, keep: int) -> Callable[[], Any]:
    """The call that is timed, everything it needs being there."""
    if name in CHOICES:
        return lambda: [CHOICES[name](given, keep) for _ in range(given.batch)]
    cls, settings = METHODS[name]
    if issubclass(cls, Reducer):
        return of_reducer(cls(layer=1, **settings), given)
    budget = {"keep": keep} if cls.static_count else {}
    if issubclass(cls, Selector):
        if cls.video_only and given.grid.frames == 1:
            raise LacoError(f"{name} leaves a still picture as it is")
        return of_selector(cls(**budget, **settings), given)
    assert issubclass(cls, DecoderMethod)
    return of_decoder_method(cls(depth=0.5, **budget, **settings), given)


def measure(names: list[str], tokens: int, batch: int, given: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each method at one size."""
    torch.manual_seed(0)
    inputs, calls, notes = Inputs(tokens, batch, given.width), {}, {}
    with torch.inference_mode():
        for name in names:
            try:
                call = prepared(name, inputs, given.keep)
                call()  # warms up, too
            except Exception as error:  # whatever it is, the others shall be measured
                notes[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            else:
                calls[name] = call
        times = interleave(calls, rounds=given.rounds, warmup=0).milliseconds if calls else {}
    rows = []
    for name in names:
        row = {"method": name, "place": "", "tokens": tokens, "batch": batch, "ms": "", "low": "", "high": ""}
        if name in METHODS:
            row["place"] = ", ".join(METHODS[name][0].places)
        if name in times:
            found = median_interval(times[name])
            row["ms"] = f"{found.value:.3f}"
            if given.rounds >= ENOUGH_ROUNDS:
                row |= {"low": f"{found.low:.3f}", "high": f"{found.high:.3f}"}
        rows.append(row | {"note": notes.get(name, "")})
    return rows


def as_csv(rows: list[dict[str, Any]], given: argparse.Namespace) -> str:
    text = io.StringIO()
    settings = {"keep": given.keep, "width": given.width, "rounds": given.rounds}
    text.write(f"# {command()}\n# {json.dumps(settings | machine())}\n")
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_table(rows: list[dict[str, Any]]) -> Table:
    """A row for each method, a column for each size."""
    sizes = list(dict.fromkeys((row["tokens"], row["batch"]) for row in rows))
    table = Table("method", *(f"{tokens} x {batch}, ms" for tokens, batch in sizes), box=None, header_style="dim")
    for name in dict.fromkeys(row["method"] for row in rows):
        found = {(row["tokens"], row["batch"]): row["ms"] for row in rows if row["method"] == name}
        table.add_row(name, *(f"{float(found[size]):.1f}" if found[size] else "cannot run" for size in sizes))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*METHODS, *CHOICES]
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", default=names)
    parser.add_argument("--tokens", type=int, nargs="+", default=[CROP, 5 * CROP])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--keep", type=int, default=160)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=ENOUGH_ROUNDS)
    parser.add_argument("--threads", type=int, default=None, help="all cores when left out")
    parser.add_argument("--output", type=Path, default=RESULT)
    given = parser.parse_args()
    if given.keep > min(given.tokens):
        parser.error(f"--keep {given.keep} is more than {min(given.tokens)} tokens")
    if given.threads:
        torch.set_num_threads(given.threads)
    rows = []
    for tokens in given.tokens:
        for batch in given.batches:
            rows += measure(given.only, tokens, batch, given)
    out = Console()
    out.print(as_table(rows))
    write_file(given.output, as_csv(rows, given))
    out.print(f"wrote {given.output}")


if __name__ == "__main__":
    main()
