"""One process of a healing study: heal, save, evaluate."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from laco.checkpoint import from_pretrained
from laco.data import Sample
from laco.evaluate import evaluate
from laco.files import write_file
from laco.healing.variants import NONE, Job, Outcome, outline
from laco.methods import from_dict
from laco.pictures import down_sampled
from laco.train import run as train
from laco.train.recipe import Recipe, parse_recipe
from laco.train.run import work_directory
from laco.train.trainer import grouped

TRAIN_SEED = 1000  # healing pictures: other seeds of the world than those of pretraining


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
    if protocol.teaches(job.variant):
        stage |= {"method_loss": 1.0, "questions": 1}
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


def with_less_detail(samples: Sequence[Sample], factor: float) -> list[Sample]:
    """The samples with pictures at 1/factor of the resolution; those that share a picture go on sharing it."""
    if factor == 1:
        return list(samples)
    pictures = {s.picture_key: tuple(down_sampled(picture, factor) for picture in s.pictures()) for s in samples}
    return [replace(sample, images=pictures[sample.picture_key]) for sample in samples]
