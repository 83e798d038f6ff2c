"""The healing study: the same short training for every variant of a model, and what each then knows.

A variant is a method at a place, or a baseline. Each is healed (first compressor and projector, then everything) and
evaluated in a single-thread process of its own, as many side by side as there are cores: on a CPU that is much faster
than one process after the other with all cores. What is finished is kept on disk, so a study can be stopped, continued
and extended; a variant that fails is reported and stops nothing.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from threading import Event
from typing import Any, NamedTuple

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel
from transformers.utils import logging

from laco.checkpoint import from_pretrained
from laco.data import Sample, load_samples
from laco.errors import LacoError
from laco.evaluate import FamilyScore, Report, evaluate
from laco.evaluate.scores import wilson
from laco.families.reduction.lesson import Taught
from laco.files import write_file
from laco.methods import AveragePool, LaCo, LDPv2, Method, PixelShuffle, RandomKeep, TokenPacker, from_dict
from laco.pictures import down_sampled
from laco.surgery import compress
from laco.train import run as train
from laco.train.recipe import Recipe, parse_recipe
from laco.train.run import work_directory
from laco.train.trainer import grouped

# Two-sided 95 % quantiles of Student's t by degrees of freedom; above, the normal distribution's is near enough.
STUDENT_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
TRAIN_SEED = 1000  # healing pictures: other seeds of the world than those of pretraining
MANY = 24  # from so many jobs on, bars of finished ones make room
REFUSED = 2  # exit code of a job whose method cannot stand or run in the model


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Variant(_Settings):
    """One row of a study.

    Args:
        name: label, unique in the study.
        method: settings of a method (`Method.to_dict`); None leaves the model uncompressed.
        heal: False evaluates as it is, without training.
        down_sample: pictures are shown at 1/down_sample of the resolution, enlarged again, in healing and evaluation.
    """

    name: str
    method: dict[str, Any] | None = None
    heal: bool = True
    down_sample: PositiveInt = 1

    @field_validator("method")
    @classmethod
    def _as_json_has_it(cls, method: dict[str, Any] | None) -> Any:
        return json.loads(json.dumps(method))  # lists for tuples, so that what was read back is equal

    @property
    def random(self) -> bool:
        """Whether another seed gives another result: of healing, or of the method itself."""
        return self.heal or "seed" in (self.method or {})


class Protocol(_Settings):
    """What all variants of a study share: the base model, how it is healed, how it is judged."""

    model: str
    adapt_steps: PositiveInt = 60
    heal_steps: PositiveInt = 140
    batch_size: PositiveInt = 32
    adapt_lr: float = 2e-3
    heal_lr: float = 5e-4
    questions: PositiveInt = 8
    distill: NonNegativeFloat = 0.0  # weight of the uncompressed model's logits; 0 = none
    train_data: str = "world"
    data: str = "world"
    samples: PositiveInt = 1000
    eval_seed: NonNegativeInt = 0

    @property
    def steps(self) -> int:
        return self.adapt_steps + self.heal_steps

    def judged_on(self) -> list[Sample]:
        """The questions that every variant is asked."""
        return load_samples(self.data, limit=self.samples, seed=self.eval_seed)


class Job(_Settings):
    """One process: a variant with a seed."""

    variant: Variant
    seed: NonNegativeInt
    protocol: Protocol

    @property
    def method(self) -> dict[str, Any] | None:
        """The variant's method; one that is random itself has another seed in every job."""
        settings = self.variant.method
        return settings | {"seed": settings["seed"] + self.seed} if settings and "seed" in settings else settings


class Outcome(BaseModel):
    """What came of a job. `answers` are in the order of the samples, `seconds` those of healing."""

    job: Job
    report: Report
    answers: list[str]
    seconds: float

    @model_validator(mode="before")
    @classmethod
    def _report_keeps_no_answers_in_json(cls, data: Any) -> Any:
        if isinstance(data.get("report"), dict):
            data = data | {"report": data["report"] | {"answers": data["answers"]}}
        return data


class Summary(BaseModel):
    """A variant over its seeds: mean accuracies in per cent with 95 % intervals.

    `low` and `high` bound the average over families: over seeds by Student's t where there are two or more (then they
    include the chance of initialisation and data order), else from the number of questions alone. `families` pool the
    questions of all seeds (Wilson's interval).
    """

    name: str
    method: dict[str, Any] | None
    healed: bool
    seeds: list[int]
    average: float
    low: float
    high: float
    families: dict[str, FamilyScore]
    loyalty: float | None
    visual_tokens: float
    seconds: float


class Study(BaseModel):
    """All outcomes, and by label why jobs failed; `refused` are the labels of those that cannot, by what laco says."""

    protocol: Protocol
    outcomes: list[Outcome]
    failures: dict[str, str]
    refused: list[str] = []

    def summaries(self) -> list[Summary]:
        names = dict.fromkeys(outcome.job.variant.name for outcome in self.outcomes)
        return [summarise([o for o in self.outcomes if o.job.variant.name == name]) for name in names]

    def outcome(self, name: str) -> Outcome:
        """The first outcome of a variant."""
        return next(outcome for outcome in self.outcomes if outcome.job.variant.name == name)


NONE = Variant(name="none", heal=False)
HALVED = Variant(name="down-sampled input", heal=False, down_sample=2)
HALVED_HEALED = Variant(name="down-sampled input, healed", down_sample=2)


def variant(method: Method, name: str | None = None) -> Variant:
    """A method at its place as a row of a study, called e.g. `LaCo@1/4`."""
    depth = method.default_depth if method.depth is None else method.depth
    place = {1.0: "external", 0.25: "1/4", 0.5: "1/2"}.get(depth, f"{depth:.3g}")
    return Variant(name=name or f"{type(method).__name__}@{place}", method=method.to_dict())


def comparison(depth: float = 1 / 4) -> list[Variant]:
    """The paper's comparison at one depth, external rivals, and the four baselines."""
    inside: list[type[Method]] = [LaCo, PixelShuffle, LDPv2, TokenPacker, AveragePool, RandomKeep]
    external: list[type[Method]] = [LaCo, PixelShuffle, AveragePool]
    return [
        NONE,
        HALVED,
        *(variant(method(depth=depth)) for method in inside),
        *(variant(method(depth=1.0)) for method in external),
    ]


def run_study(
    variants: Sequence[Variant],
    protocol: Protocol,
    output: str | Path,
    *,
    seeds: Sequence[int] = (0,),
    workers: int | None = None,
    progress: bool = True,
) -> Study:
    """Heals and evaluates every variant with every seed (those in which nothing is random, once).

    Args:
        variants: rows of the study; the model as it is (`NONE`) is always added, the others' loyalty needs its answers.
        protocol: what they share.
        output: directory with one folder a job; jobs that are finished there with the very same settings are skipped.
        seeds: of initialisation and data order.
        workers: processes at a time, of one thread each; None = one a core.
        progress: shows bars on stderr.

    Raises:
        LacoError: two variants have one name, or the model as it is cannot be evaluated.
    """
    rows = [NONE, *(row for row in variants if row != NONE)]
    folders = [slug(row.name) for row in rows]
    if twice := [row.name for row in rows if folders.count(slug(row.name)) > 1]:
        raise LacoError(f"two variants are called {twice[0]!r}; give them different names")
    jobs = [
        Job(variant=row, seed=seed, protocol=protocol) for row in rows for seed in (seeds if row.random else seeds[:1])
    ]
    outcomes: dict[int, Outcome] = {}
    failures: dict[str, str] = {}
    refused: list[str] = []
    stop = Event()
    with Bars(enabled=progress, jobs=len(jobs)) as bars, ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        start = partial(run_job, root=Path(output), bars=bars, stop=stop)
        # The model as it is comes first and alone: everything else is compared with its answers.
        base = start(jobs[0])
        if isinstance(base, Failure):
            raise LacoError(f"the uncompressed model cannot be evaluated: {base.reason}")
        outcomes[0] = base
        futures = {pool.submit(start, job): number for number, job in enumerate(jobs[1:], 1)}
        try:
            for future in as_completed(futures):
                number, result = futures[future], future.result()
                if isinstance(result, Outcome):
                    outcomes[number] = result
                else:
                    failures[label(jobs[number])] = result.reason
                    refused += [label(jobs[number])] if result.refused else []
        except BaseException:  # Ctrl-C: no further process starts, and those that run end
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    done = [outcomes[number] for number in sorted(outcomes)]
    return Study(protocol=protocol, outcomes=done, failures=failures, refused=refused)


def label(job: Job) -> str:
    return f"{job.variant.name}, seed {job.seed}" if job.variant.random else job.variant.name


def slug(text: str) -> str:
    """A label as the name of a folder."""
    return "".join(char if char.isalnum() else "-" for char in text).lower()


class Failure(NamedTuple):
    """Why there is no outcome; `refused` if a `LacoError` said so, else it is a defect."""

    reason: str
    refused: bool


class Bars(Progress):
    """A bar for each job: steps of healing, live; and one for all where there are many."""

    def __init__(self, enabled: bool, jobs: int):
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", style="bold"),
            console=Console(stderr=True),
            disable=not enabled,
        )
        self.whole = self.add_task("all", total=jobs, note="") if jobs >= MANY else None

    def close(self, bar: TaskID, note: str) -> None:
        """Ends the bar of a job."""
        self.update(bar, note=note, visible=self.whole is None)
        if self.whole is not None:
            self.advance(self.whole)


def run_job(job: Job, root: Path, bars: Bars, stop: Event) -> Outcome | Failure:
    """Runs a job in a process of its own and waits for it, or until `stop` is set."""
    directory = root / slug(label(job))
    bar = bars.add_task(label(job), total=job.protocol.steps if job.variant.heal else 1, note="")
    if (done := finished(directory, job)) is None:
        prepare(directory, job)
        command = [sys.executable, "-m", "laco.healing", str(directory), str(root / NONE.name)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        with (directory / "log.txt").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
            try:
                while process.poll() is None and not stop.is_set():
                    bars.update(bar, completed=steps_done(directory) if job.variant.heal else 0)
                    time.sleep(0.3)
            finally:
                process.kill()
                process.wait()
        done = finished(directory, job)
    if done is None:
        bars.close(bar, "[red]failed")
        lines = (directory / "log.txt").read_text().strip().splitlines() or ["no message"]
        if process.returncode == REFUSED:
            return Failure(lines[-1], refused=True)
        return Failure(f"{lines[-1]} (exit code {process.returncode}, {directory / 'log.txt'})", refused=False)
    bars.update(bar, completed=bars.tasks[bar].total)
    bars.close(bar, f"{done.report.average:.1f} %")
    return done


def finished(directory: Path, job: Job) -> Outcome | None:
    """The outcome of an earlier run of this very job."""
    try:
        outcome = Outcome.model_validate_json((directory / "outcome.json").read_text())
    except (OSError, ValidationError):
        return None
    return outcome if outcome.job == job else None


def prepare(directory: Path, job: Job) -> None:
    """A folder for the job; one of an interrupted run of the very same job is continued, any other replaced."""
    description = job.model_dump_json(indent=1)
    file = directory / "job.json"
    if directory.exists() and not (file.exists() and file.read_text() == description):
        shutil.rmtree(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_file(file, description)


def steps_done(directory: Path) -> int:
    """Steps of healing so far: lines of the training's logs say the step of each stage."""
    done = 0
    for log in directory.glob("model.run/*/log.jsonl"):
        lines = log.read_bytes().splitlines()
        done += max(
            (int(line.split(b'"step": ')[1].split(b",")[0]) for line in lines if b'"step": ' in line), default=0
        )
    return done


def do_job(directory: Path, reference: Path) -> None:
    """What the process of a job does: heal, save, evaluate."""
    logging.disable_progress_bar()
    job = Job.model_validate_json((directory / "job.json").read_text())
    protocol, start, source = job.protocol, time.perf_counter(), Path(job.protocol.model)
    if job.variant.heal:
        source = train(recipe_of(job, directory / "model"), progress=False)
    seconds = time.perf_counter() - start
    method = from_dict(job.method) if job.method and not job.variant.heal else None
    torch.manual_seed(job.seed)
    model, processor = from_pretrained(source, method)
    samples = with_less_detail(protocol.judged_on(), job.variant.down_sample)
    answers = (
        None if job.variant == NONE else Outcome.model_validate_json((reference / "outcome.json").read_text()).answers
    )
    report = evaluate(model, processor, samples, reference=answers, seed=protocol.eval_seed, progress=False)
    outcome = Outcome(job=job, report=report, answers=report.answers, seconds=seconds)
    write_file(directory / "outcome.json", outcome.model_dump_json(indent=1))
    shutil.rmtree(directory / "model.run", ignore_errors=True)


def recipe_of(job: Job, output: Path) -> Recipe:
    """The two stages of the paper as a recipe of `laco train`."""
    protocol = job.protocol
    stage: dict[str, Any] = {"batch_size": protocol.batch_size, "questions": protocol.questions}
    method = from_dict(job.method) if job.method else None
    has_boxes = protocol.train_data == "world"
    if isinstance(method, Taught) and method.trained and (has_boxes or method.learns_from != "boxes"):
        stage |= {"method_loss": 1.0, "questions": 1}  # its own loss is about one question
    new = trained_groups(job) & {"compressor", "projector"}
    recipe = {
        "output": str(output),
        "model": protocol.model,
        "compress": [job.method] if job.method else [],
        "data": {
            "source": protocol.train_data,
            "seed": TRAIN_SEED + job.seed,
            "split": "train" if protocol.train_data == "world" else None,
            "down_sample": job.variant.down_sample,
        },
        "stages": [
            {"name": "adapt", "steps": protocol.adapt_steps, "lr": dict.fromkeys(new, protocol.adapt_lr), **stage},
            {"name": "heal", "steps": protocol.heal_steps, "lr": protocol.heal_lr, **stage},
        ],
        "distill": {"weight": protocol.distill} if protocol.distill else None,
        "seed": job.seed,
        "log_steps": max(1, min(10, protocol.steps // 20)),
    }
    assert work_directory(parse_recipe(recipe)) == output.with_name("model.run")  # where `steps_done` looks
    return parse_recipe(recipe)


def trained_groups(job: Job) -> set[str]:
    """The groups of parameters that the variant has; a mean, for one, has no compressor to train."""
    return {group for group, _, _ in grouped(outline(job.protocol.model, job.method))}


def outline(source: str, method: dict[str, Any] | None = None) -> PreTrainedModel:
    """A model without the numbers in it, on the meta device, compressed if a method is given."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(source))
    if method:
        compress(model, None, from_dict(method))
    return model


def with_less_detail(samples: Sequence[Sample], factor: int) -> list[Sample]:
    """The samples with pictures at 1/factor of the resolution; those that share a picture go on sharing it."""
    if factor == 1:
        return list(samples)
    pictures = {s.picture_key: tuple(down_sampled(picture, factor) for picture in s.pictures()) for s in samples}
    return [replace(sample, images=pictures[sample.picture_key]) for sample in samples]


def summarise(outcomes: Sequence[Outcome]) -> Summary:
    """One variant over its seeds."""
    reports = [outcome.report for outcome in outcomes]
    averages = [report.average for report in reports]
    families = {name: pooled([report.families[name] for report in reports]) for name in reports[0].families}
    if len(set(averages)) > 1:
        low, high = seed_interval(averages)
    else:  # of runs that do not depend on the seed, one counts
        low, high = average_interval(list(reports[0].families.values()))
    loyalties = [report.loyalty for report in reports if report.loyalty is not None]
    return Summary(
        name=outcomes[0].job.variant.name,
        method=outcomes[0].job.variant.method,
        healed=outcomes[0].job.variant.heal,
        seeds=[outcome.job.seed for outcome in outcomes],
        average=fmean(averages),
        low=low,
        high=high,
        families=families,
        loyalty=fmean(loyalties) if loyalties else None,
        visual_tokens=reports[0].visual_tokens,
        seconds=fmean(outcome.seconds for outcome in outcomes),
    )


def pooled(scores: Sequence[FamilyScore]) -> FamilyScore:
    """One family's questions over all seeds, as if they were one large set."""
    n = sum(score.n for score in scores)
    hits = sum(round(score.accuracy * score.n / 100) for score in scores)
    low, high = wilson(hits, n)
    return FamilyScore(accuracy=100 * hits / n, low=low, high=high, n=n)


def seed_interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's 95 % interval of the mean over seeds, in per cent, cut to 0 .. 100."""
    half = STUDENT_T.get(len(values) - 1, 1.96) * stdev(values) / len(values) ** 0.5
    return max(fmean(values) - half, 0.0), min(fmean(values) + half, 100.0)


def average_interval(scores: Sequence[FamilyScore]) -> tuple[float, float]:
    """95 % interval of the mean over families from those of the families (MOVER, Zou and Donner 2008)."""
    mean = fmean(score.accuracy for score in scores)
    down = sum((score.accuracy - score.low) ** 2 for score in scores) ** 0.5 / len(scores)
    up = sum((score.high - score.accuracy) ** 2 for score in scores) ** 0.5 / len(scores)
    return mean - down, mean + up


if __name__ == "__main__":
    try:
        do_job(Path(sys.argv[1]), Path(sys.argv[2]))
    except LacoError as error:
        print(error, file=sys.stderr)
        sys.exit(REFUSED)
