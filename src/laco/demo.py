"""`laco demo`: the whole story on the bundled model, in minutes on a CPU.

What the model can do; compressors put in without training; the same short healing for LaCo and its rivals; measured
time beside what FLOPs predict; one page that shows all of it.
"""

import base64
import time
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from transformers import PreTrainedModel, ProcessorMixin

from laco.checkpoint import from_pretrained
from laco.cost import encoder_call, interleave, machine, prefill_call, stage_flops, training_call
from laco.cost.timing import Timings
from laco.data import Sample, load_samples
from laco.errors import LacoError
from laco.evaluate import FamilyScore, answer, evaluate
from laco.evaluate.generation import check_answers, encode, evaluating
from laco.evaluate.report import command, versions
from laco.evaluate.scores import same
from laco.families import family_of
from laco.files import write_file
from laco.grid import pool_map, split_prefix
from laco.healing import HALVED, NONE, Protocol, Study, Variant, average_interval, run_study, variant
from laco.methods import AveragePool, LaCo, LDPv2, Merger, PixelShuffle, RandomKeep, TokenPacker, from_dict
from laco.report import Example, Insertion, Results, Row, Shown, StageTimes, write_report
from laco.train.collate import IGNORE, Collator, Item
from laco.world import FAMILIES, World

MODEL = Path(__file__).parents[2] / "models" / "laco-tiny"
INSERTED: tuple[type[Merger], ...] = (LaCo, AveragePool, PixelShuffle, LDPv2, TokenPacker, RandomKeep)
HEALED = (
    *(variant(method(depth=1 / 4)) for method in (LaCo, PixelShuffle, LDPv2, TokenPacker, AveragePool, RandomKeep)),
    *(variant(method(depth=1.0)) for method in (LaCo, PixelShuffle)),
)
COMPARED = ("none", "LaCo@1/4", "PixelShuffle@1/4", "LaCo@external")  # shown side by side on example pictures


@dataclass(frozen=True)
class Size:
    """How much work a demo is. The full size takes at most 10 minutes on two quiet cores."""

    pictures: int = 8
    insertion_samples: int = 210
    samples: int = 700
    adapt_steps: int = 60
    heal_steps: int = 120
    batch_size: int = 32
    rounds: int = 12
    timing_batch: int = 16


FULL = Size()
QUICK = Size(2, 14, 28, 1, 1, 2, 2, 2)


def run(
    output: str | Path = "out/demo",
    quick: bool = False,
    *,
    model: str | Path | None = None,
    seed: int = 0,
    variants: Sequence[Variant] = HEALED,
    workers: int | None = None,
    progress: bool = True,
) -> Results:
    """Runs the demo, prints what it finds and writes a report.

    Args:
        output: directory for the report and for the healed models; a demo that was stopped there is continued.
        quick: the same story with hardly any training, to see that everything runs.
        model: a directory; None = the bundled models/laco-tiny.
        seed: of initialisation, healing pictures and test pictures.
        variants: what is healed; the model as it is and with down-sampled pictures stand beside.
        workers: processes at a time; None = one a core.
        progress: shows bars on stderr.

    Raises:
        LacoError: there is no model.
    """
    start, size, output, out = time.perf_counter(), QUICK if quick else FULL, Path(output), Console()
    source = Path(model or MODEL)
    if not source.is_dir():
        raise LacoError(f"there is no model at {source}; run the demo in the repository, or name one with --model")

    out.rule("1/5  What the model can do", align="left")
    base, processor = from_pretrained(source)
    check_answers(processor)
    about = describe(base, source)
    out.print(f"{about['name']}: {about['parameters']:,} parameters, {about['visual_tokens']} visual tokens a picture")
    shown = show_answers(base, processor, size.pictures, seed, output / "pictures", out)

    out.rule("2/5  The mechanism: compressors put in after 1/4 of the layers, nothing trained", align="left")
    insertions = insert_all(source, size.insertion_samples, seed, progress)
    out.print(insertion_table(insertions))

    out.rule("3/5  Healing", align="left")
    protocol = Protocol(
        model=str(source.resolve()),
        adapt_steps=size.adapt_steps,
        heal_steps=size.heal_steps,
        batch_size=size.batch_size,
        samples=size.samples,
        eval_seed=seed,
    )
    rows = [NONE, HALVED, *variants]
    study = run_study(rows, protocol, output / "healing", seeds=(seed,), workers=workers, progress=progress)
    out.print(accuracy_table(make_rows(study, {})))

    out.rule("4/5  Time, measured in one interleaved run, beside what FLOPs predict", align="left")
    survived = [row for row in variants if any(outcome.job.variant == row for outcome in study.outcomes)]
    times = time_all(source, survived, size, seed, progress)
    results = Results(
        command=command(),
        model=about,
        protocol=protocol.model_dump() | {"steps": protocol.steps, "seeds": [seed]},
        timing={"rounds": size.rounds, "batch": size.timing_batch},
        shown=shown,
        insertions=insertions,
        rows=make_rows(study, times),
        examples=make_examples(study),
        failures=study.failures,
        versions=versions(),
        machine=machine(),
        minutes=(time.perf_counter() - start) / 60,
    )
    out.print(time_table(results.rows))
    for name, text in results.failures.items():
        out.print(f"failed: {name}: {text}", style="red", markup=False)

    out.rule("5/5  Report", align="left")
    for path in write_report(results, output):
        out.print(f"wrote {path}", highlight=False, soft_wrap=True)
    return results


def describe(model: Any, source: Path) -> dict[str, Any]:
    """What the report says about the model."""
    vision = model.config.vision_config
    return {
        "name": source.name,
        "architecture": type(model).__name__,
        "parameters": model.num_parameters(),
        "layers": vision.num_hidden_layers,
        "width": vision.hidden_size,
        "image_size": vision.image_size,
        "visual_tokens": family_of(model).grid(model.config).tokens,
    }


def show_answers(
    model: PreTrainedModel, processor: ProcessorMixin, pictures: int, seed: int, folder: Path, out: Console
) -> list[Example]:
    """Asks about a few held-out pictures, prints the answers, and keeps the pictures as files."""
    world, table = (
        World(seed + 1, "test"),
        Table("picture", "question", "answer", "truth", box=None, header_style="dim"),
    )
    samples = [
        Sample(f"{number}", (picture,), asked.question, asked.answer, asked.family)
        for number in range(pictures)
        for picture in [world[number].picture]
        for asked in islice(world[number].questions, 5)
    ]
    texts = answer(model, processor, samples, progress=False).texts
    examples: dict[str, Example] = {}
    for sample, text in zip(samples, texts, strict=True):
        file = folder / f"{sample.id}.png"
        if sample.id not in examples:
            write_file(file, png(sample.pictures()[0].resize((384, 384), Image.Resampling.NEAREST)))
            examples[sample.id] = Example(png=as_text(sample.pictures()[0]), answers={NONE.name: []})
        said = shown_answer(sample, text)
        first = not examples[sample.id].answers[NONE.name]
        examples[sample.id].answers[NONE.name].append(said)
        mark = "[green]✓[/]" if said.right else "[red]✗[/]"
        table.add_row(file.name if first else "", said.question, f"{mark} {escape(said.answer)}", said.truth)
    out.print(table)
    out.print(f"the pictures are in {folder}", highlight=False, soft_wrap=True)
    return list(examples.values())


def shown_answer(sample: Sample, text: str) -> Shown:
    return Shown(question=sample.question, truth=sample.answer, answer=text, right=same(text, sample.answer))


def png(picture: Image.Image) -> bytes:
    file = BytesIO()
    picture.save(file, format="png")
    return file.getvalue()


def as_text(picture: Image.Image) -> str:
    """A picture as base64, for the page."""
    return base64.b64encode(png(picture)).decode()


def insert_all(source: Path, samples: int, seed: int, progress: bool) -> list[Insertion]:
    """Every compressor after a quarter of the layers, untrained: cosine to the pooled features, and accuracy."""
    questions = load_samples("world", limit=samples, seed=seed)
    base, processor = from_pretrained(source)
    pictures = list({sample.picture_key: sample.pictures()[0] for sample in questions}.values())[:32]
    pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    wanted = encoder_map(base, pixels)
    found = []
    methods: list[Merger | None] = [None, *(method(depth=1 / 4) for method in INSERTED)]
    for method in track(methods, "inserting", console=Console(stderr=True), disable=not progress):
        torch.manual_seed(seed)
        model, processor = from_pretrained(source, method)
        report = evaluate(model, processor, questions, seed=seed, progress=False)
        cosine = None
        if method is not None:
            pooled = pool_map(wanted, method.factor)
            cosine = F.cosine_similarity(encoder_map(model, pixels), pooled, dim=-1).mean().item()
        low, high = average_interval(list(report.families.values()))
        name = variant(method).name if method else NONE.name
        found.append(
            Insertion(
                name=name,
                cosine=cosine,
                average=report.average,
                low=low,
                high=high,
                families=in_order(report.families),
            )
        )
    return found


def encoder_map(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """What the language model reads of the encoder, before the projector, as a map (B, H, W, C)."""
    family = family_of(model)
    layer, prefix = max(family.read_layers(model.config)), family.prefix(model.config)
    with evaluating(model):
        hidden = family.encoder(model)(pixels, output_hidden_states=True).hidden_states[layer]
    _, patches_BNC = split_prefix(hidden, prefix)
    return patches_BNC.unflatten(1, family.grid(model.config)[1:])


def time_all(source: Path, variants: Sequence[Variant], size: Size, seed: int, progress: bool) -> dict[str, Any]:
    """{stage: {variant: StageTimes}} of encoder, prefill and training step."""
    samples = load_samples("world", limit=7 * size.timing_batch, seed=seed)
    pictures = list({sample.picture_key: sample.pictures()[0] for sample in samples}.values())
    pictures = (pictures * size.timing_batch)[: size.timing_batch]
    question = "how many shapes are there?"
    asked = [(sample.question, sample.answer) for sample in samples[:8]]
    calls: dict[str, dict[str, Any]] = {"encoder": {}, "prefill": {}, "training": {}}
    flops: dict[str, dict[str, float]] = {stage: {} for stage in calls}
    for row in [NONE, *variants]:
        model, processor = from_pretrained(source, from_dict(row.method) if row.method else None)
        model.eval()
        inputs = encode(processor, [question] * len(pictures), [[picture] for picture in pictures])
        batch = Collator(processor)([Item([picture], asked) for picture in pictures])
        calls["encoder"][row.name] = encoder_call(model, inputs)
        calls["prefill"][row.name] = prefill_call(model, inputs)
        calls["training"][row.name] = training_call(model, batch)

        visual = family_of(model).grid(model.config).tokens
        once = stage_flops(model, text_tokens=inputs["input_ids"].shape[1] - visual)
        labels = int((batch["labels"] != IGNORE).sum()) // len(pictures)
        step = stage_flops(model, text_tokens=batch["input_ids"].shape[1] - visual, logits=labels)
        flops["encoder"][row.name] = once.encoder + once.projector
        flops["prefill"][row.name] = once.language_model
        flops["training"][row.name] = step.training_step
    return {
        stage: stage_times(interleave(calls[stage], rounds=size.rounds, progress=progress), flops[stage], len(pictures))
        for stage in calls
    }


def stage_times(timings: Timings, flops: dict[str, float], pictures: int) -> dict[str, StageTimes]:
    """Times of one stage for a picture, with the speed-ups that FLOPs predict."""
    return {
        name: StageTimes(
            milliseconds=timings.median(name) / pictures,
            speedup=timings.speedup(name),
            predicted=flops[NONE.name] / flops[name],
        )
        for name in flops
    }


def make_rows(study: Study, times: dict[str, dict[str, StageTimes]]) -> list[Row]:
    """Accuracy and time of every variant; one without a compressor takes the uncompressed model's time."""
    rows = []
    for summary in study.summaries():
        timed_as = summary.name if summary.method else NONE.name
        external = summary.method and summary.method["depth"] == 1
        values = summary.model_dump(exclude={"method", "seconds", "families"})
        rows.append(
            Row(
                **values,
                place="none" if not summary.method else "external" if external else "inside",
                families=in_order(summary.families),
                times={stage: found[timed_as] for stage, found in times.items()},
            )
        )
    return rows


def make_examples(study: Study, most: int = 4) -> list[Example]:
    """The first test pictures on which LaCo inside the encoder has both right and wrong answers."""
    names = [name for name in COMPARED if any(o.job.variant.name == name for o in study.outcomes)]
    if "LaCo@1/4" not in names:
        return []
    samples = load_samples("world", limit=study.protocol.samples, seed=study.protocol.eval_seed)
    groups: dict[Any, list[int]] = {}
    for index, sample in enumerate(samples):
        groups.setdefault(sample.picture_key, []).append(index)
    said = {
        name: [shown_answer(s, text) for s, text in zip(samples, study.outcome(name).answers, strict=True)]
        for name in names
    }
    mixed = [g for g in groups.values() if len({said["LaCo@1/4"][i].right for i in g}) == 2]
    return [
        Example(
            png=as_text(samples[group[0]].pictures()[0]),
            answers={name: [said[name][i] for i in group[:6]] for name in names},
        )
        for group in mixed[:most]
    ]


def in_order(families: dict[str, FamilyScore]) -> dict[str, FamilyScore]:
    """Families as the world lists them: reading first."""
    return {name: families[name] for name in FAMILIES if name in families}


def plain_table(*heads: str) -> Table:
    """A table that fits 80 columns: names whole, numbers to the right."""
    table = Table(box=None, header_style="dim", padding=(0, 1, 0, 0), pad_edge=False)
    for head in heads:
        table.add_column(head, no_wrap=True, justify="left" if head == heads[0] else "right")
    return table


def accuracy_cells(row: Insertion | Row) -> list[str]:
    """Mean with half of its 95 % interval, then every family."""
    mean = f"[bold]{row.average:.1f}[/] [dim]±{(row.high - row.low) / 2:.1f}[/]"
    return [mean, *(f"{score.accuracy:.0f}" for score in row.families.values())]


def insertion_table(insertions: Sequence[Insertion]) -> Table:
    table = plain_table("inserted", "cosine", "accuracy", *insertions[0].families)
    for row in insertions:
        table.add_row(
            row.name.partition("@")[0], "" if row.cosine is None else f"{row.cosine:.2f}", *accuracy_cells(row)
        )
    return table


def accuracy_table(rows: Sequence[Row]) -> Table:
    table = plain_table("healed", "accuracy", *rows[0].families)
    for row in rows:
        table.add_row(row.name if row.healed else f"{row.name} [dim]*[/]", *accuracy_cells(row))
    table.caption = "* as it is, not trained"
    table.caption_justify = "left"
    return table


def time_table(rows: Sequence[Row]) -> Table:
    table = plain_table("variant", "tokens", *rows[0].times)
    table.caption = "milliseconds a picture, speed-up (speed-up by FLOPs)"
    table.caption_justify = "left"
    for row in rows:
        if row.place != "none" or row.name == NONE.name:
            cells = [
                f"{t.milliseconds:.2f} [bold]{t.speedup.value:.2f}[/] [dim]({t.predicted:.2f})[/]"
                for t in row.times.values()
            ]
            table.add_row(row.name, f"{row.visual_tokens:.0f}", *cells)
    return table
