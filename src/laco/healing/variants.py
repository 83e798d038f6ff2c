"""What a healing study is about: its rows, what they share, and what comes of one process."""

import json
from typing import Any

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    field_validator,
    model_validator,
)
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from laco.data import Sample, load_samples
from laco.evaluate import Report
from laco.families.reduction.lesson import Taught
from laco.methods import AveragePool, LaCo, LDPv2, Method, PixelShuffle, RandomKeep, TokenPacker, from_dict
from laco.surgery import compress


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Variant(_Settings):
    """One row of a study.

    Args:
        name: label, unique in the study.
        method: settings of a method (`Method.to_dict`); None leaves the model uncompressed.
        heal: False evaluates as it is, without training.
        down_sample: 1 or more; pictures are shown at 1/down_sample of the resolution, enlarged again, in healing and
            evaluation.
    """

    name: str
    method: dict[str, Any] | None = None
    heal: bool = True
    down_sample: float = Field(default=1, ge=1)

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

    def of(self, variant: Variant) -> "Protocol":
        """What of it a variant depends on: how others are healed says nothing of one that is judged as it is."""
        if variant.heal:
            return self
        return Protocol(model=self.model, data=self.data, samples=self.samples, eval_seed=self.eval_seed)

    def teaches(self, variant: Variant) -> bool:
        """Whether healing also teaches a variant's method by a loss of its own, about one question a picture."""
        method = from_dict(variant.method) if variant.method and variant.heal else None
        has_boxes = self.train_data == "world"
        return isinstance(method, Taught) and method.trained and (has_boxes or method.learns_from != "boxes")

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


def label(job: Job) -> str:
    return f"{job.variant.name}, seed {job.seed}" if job.variant.random else job.variant.name


def slug(text: str) -> str:
    """A label as the name of a folder."""
    return "".join(char if char.isalnum() else "-" for char in text).lower()


def outline(source: str, method: dict[str, Any] | None = None) -> PreTrainedModel:
    """A model without the numbers in it, on the meta device, compressed if a method is given."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(source))
    if method:
        compress(model, None, from_dict(method))
    return model
