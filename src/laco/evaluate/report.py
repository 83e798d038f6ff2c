"""`evaluate`: answers of a model to questions, scored by family, as a report that says how it was made."""

import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean as mean
from typing import Any

import torch
import transformers
from pydantic import BaseModel, Field
from transformers import PreTrainedModel, ProcessorMixin

from laco._version import __version__
from laco.checkpoint import from_pretrained
from laco.data import Sample, by_family, load_samples
from laco.errors import LacoError
from laco.evaluate.generation import answer
from laco.evaluate.scores import character_error_rate, same, wilson
from laco.families import FAMILIES
from laco.files import write_file

Reference = str | Path | Sequence[str] | tuple[PreTrainedModel, ProcessorMixin]


class FamilyScore(BaseModel):
    """Exact match in one family of questions, in per cent, with Wilson's 95 % interval."""

    accuracy: float
    low: float
    high: float
    n: int


class Report(BaseModel):
    """What `laco eval` measures. All rates are per cent.

    `average` is the mean over families, not over questions. `loyalty` is the share of answers that equal
    those of the uncompressed model, right or wrong: 100 for a model that is itself uncompressed, None where
    there is no uncompressed model to ask. `visual_tokens` is the mean number of visual tokens that the
    language model reads for a question. `case_sensitive` and `character_error_rate` are by family. `answers`,
    in the order of the samples, stay out of the JSON.
    """

    average: float
    families: dict[str, FamilyScore]
    loyalty: float | None
    visual_tokens: float
    versions: dict[str, str]
    seed: int
    command: str
    data: str
    split: str | None
    samples: int
    case_sensitive: dict[str, float]
    character_error_rate: dict[str, float]
    answers: list[str] = Field(exclude=True, repr=False)

    def save(self, path: str | Path) -> Path:
        """Writes the JSON file; one that is there already is replaced only when the new one is whole."""
        write_file(path, self.model_dump_json(indent=2) + "\n")
        return Path(path)


def evaluate(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    data: str | Path | Sequence[Sample] = "world",
    *,
    reference: Reference | None = None,
    split: str | None = None,
    seed: int = 0,
    samples: int | None = 1000,
    batch_size: int = 32,
    max_new_tokens: int = 32,
    progress: bool = True,
) -> Report:
    """Scores the greedy answers of a model by exact match (after stripping and lower-casing).

    Args:
        model, processor: any vision-language model of transformers, compressed or not.
        data: "world" (held-out pictures, fresh for every seed), a path for `laco.data.load_samples`, or
            samples, which are all asked.
        reference: the uncompressed model for `loyalty`: its directory, (model, processor), or its answers to
            the same samples (`Report.answers`). Without it an uncompressed model is its own reference, and
            for a compressed one the base is taken that its configuration names, if that is still there.
        split: of the data: only this split.
        seed: chooses the pictures of the world, or which questions of a file are asked under `samples`.
        samples: at most so many questions, spread evenly over the families; None asks all of a file.
        batch_size: questions at a time; changes speed and memory, not numbers.
        max_new_tokens: longest answer, in tokens.
        progress: shows a bar on stderr.

    Raises:
        LacoError: the data cannot be read or hold nothing; the reference's answers do not fit the samples.
    """
    if isinstance(data, str | Path):
        asked: Sequence[Sample] = load_samples(data, split=split, limit=samples, seed=seed)
        source = str(data)
    else:
        asked, source = data, "samples"
    if not asked:
        raise LacoError("there is nothing to evaluate: no samples")

    options: dict[str, Any] = {
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
        "progress": progress,
    }
    texts, visual_tokens = answer(model, processor, asked, **options)
    compressed = is_compressed(model)
    if reference is None and compressed:
        reference = base_directory(model)
    expected = None if compressed else texts
    if reference is not None:
        expected = reference_answers(reference, asked, **options)

    truths = [sample.answer for sample in asked]
    hits = [same(text, truth) for text, truth in zip(texts, truths, strict=True)]
    exact = [text.strip() == truth.strip() for text, truth in zip(texts, truths, strict=True)]
    families = by_family(asked)
    scores = {name: score([hits[i] for i in rows]) for name, rows in families.items()}
    return Report(
        average=mean(family.accuracy for family in scores.values()),
        families=scores,
        loyalty=None if expected is None else 100 * mean(map(same, texts, expected)),
        visual_tokens=mean(visual_tokens),
        versions=versions(),
        seed=seed,
        command=command(),
        data=source,
        split=split,
        samples=len(asked),
        case_sensitive={name: 100 * mean(exact[i] for i in rows) for name, rows in families.items()},
        character_error_rate={
            name: character_error_rate([texts[i] for i in rows], [truths[i] for i in rows])
            for name, rows in families.items()
        },
        answers=texts,
    )


def score(hits: Sequence[bool]) -> FamilyScore:
    """Accuracy and interval of one family."""
    low, high = wilson(sum(hits), len(hits))
    return FamilyScore(accuracy=100 * mean(hits), low=low, high=high, n=len(hits))


def reference_answers(reference: Reference, samples: Sequence[Sample], **options: Any) -> list[str]:
    """The uncompressed model's answers, asked for unless they are given."""
    match reference:
        case str() | Path():
            model, processor = from_pretrained(reference)
            return answer(model, processor, samples, **options).texts
        case (PreTrainedModel() as model, ProcessorMixin() as processor):
            return answer(model, processor, samples, **options).texts
    if len(reference) != len(samples):
        raise LacoError(f"the reference has {len(reference)} answers for {len(samples)} samples")
    return [str(text) for text in reference]


def is_compressed(model: PreTrainedModel) -> bool:
    """Whether a compressor of laco stands in the model; False for families that laco does not know."""
    return any(family.owns(model) and family.methods(model.config) for family in FAMILIES)


def base_directory(model: PreTrainedModel) -> str | None:
    """The uncompressed model's directory that `laco compress` noted in the configuration, if it exists."""
    base = getattr(model.config, "base_model_name_or_path", None)
    return base if base and Path(base).is_dir() else None


def versions() -> dict[str, str]:
    """What a number depends on beside the model."""
    return {
        "laco": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def command() -> str:
    """The command that runs, as one would type it."""
    program, *arguments = sys.argv or [""]
    name = Path(program).name
    return shlex.join(["python", "-m", "laco", *arguments] if name == "__main__.py" else [name, *arguments])
