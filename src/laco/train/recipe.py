"""What a training run is: a YAML file read into these models."""

from math import inf
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from laco.recipes import Strict, load, parse

Group = Literal["compressor", "projector", "encoder_before", "encoder_after", "language_model"]
GROUPS: tuple[str, ...] = get_args(Group)


class NewModel(Strict):
    """A model from scratch: SigLIP vision encoder, MLP projector, Qwen2 language model, byte-level tokenizer."""

    architecture: Literal["llava", "llava_onevision"] = Field("llava", description="the latter also takes videos")
    weights: str | None = Field(
        None,
        description="directory of a model of this kind to begin with, in either architecture: shapes and weights of"
        " encoder, projector and language model, and the embeddings of the tokens that both know",
    )
    patch_size: PositiveInt = 8
    vision: dict[str, Any] = Field(default_factory=dict, description="overrides of SiglipVisionConfig")
    text: dict[str, Any] = Field(default_factory=dict, description="overrides of Qwen2Config")
    vocabulary: PositiveInt = 512


class Data(Strict):
    """Where pictures and questions come from: the embedded `world`, its clips (`world-video`), or a JSONL, LLaVA JSON
    or directory of such.
    """

    source: str = "world"
    seed: NonNegativeInt = 0
    split: str | None = None
    down_sample: float = Field(default=1, ge=1, description="pictures lose detail by this factor, the baseline")


class Stage(Strict):
    """One stage of training: what learns, how fast, on what."""

    name: str
    steps: PositiveInt
    batch_size: PositiveInt = Field(32, description="pictures a step, over all processes")
    lr: float | dict[Group, float] = Field(description="one rate for all, or one a group; groups left out are frozen")
    schedule: Literal["cosine", "linear", "constant", "constant_with_warmup", "warmup_stable_decay"] = "cosine"
    warmup: float = Field(0.03, ge=0, le=1, description="fraction of the steps")
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    questions: int = Field(8, ge=0, description="asked side by side about one picture; 0 trains the encoder alone")
    dense: float = Field(0.0, ge=0, description="weight of the world's dense labels")
    method_loss: float = Field(
        0.0,
        ge=0,
        description="weight of the losses that methods have of their own; they look at the first question alone, so ask"
        " one at a time",
    )
    pages: float = Field(0.0, ge=0, le=1, description="fraction of pictures that are pages full of characters")
    pictures: float = Field(0.0, ge=0, le=1, description="fraction of clips in whose place is a picture of the world")
    stills: float = Field(
        0.0, ge=0, le=1, description="fraction of steps in which every clip is one picture, as a video of one frame"
    )

    @property
    def rates(self) -> dict[str, float]:
        return {str(k): v for k, v in self.lr.items()} if isinstance(self.lr, dict) else dict.fromkeys(GROUPS, self.lr)

    @field_validator("lr", mode="before")
    @classmethod
    def _names_groups(cls, lr: Any) -> Any:
        """Said here in one sentence; what does not fit a union would be said of each of its types."""
        for group, rate in lr.items() if isinstance(lr, dict) else [(None, lr)]:
            if group is not None and group not in GROUPS:
                raise ValueError(f"there is no group {group}; the groups are {', '.join(GROUPS)}")
            try:
                wrong = not 0 <= float(rate) < inf
            except (TypeError, ValueError):
                wrong = True
            if wrong:
                raise ValueError(f"a rate is a number, 0 or more; got {rate!r}{f' for {group}' if group else ''}")
        return lr

    @model_validator(mode="after")
    def _learns_something(self) -> "Stage":
        if not self.questions and not self.dense:
            raise ValueError("a stage without questions needs dense > 0, else there is nothing to learn from")
        return self


class Distill(Strict):
    """Learn from the uncompressed model's logits at the answers: weight * T^2 * KL(teacher || student).

    And, where asked for, from what its vision encoder puts out, at the tokens that the student still has.
    """

    teacher: str | None = Field(None, description="directory of the teacher; the recipe's model when left out")
    weight: float = Field(1.0, gt=0)
    temperature: float = Field(1.0, gt=0)
    features: float = Field(
        0.0,
        ge=0,
        description="weight of KL(teacher || student) over the channels of the encoder's tokens, for methods that leave"
        " tokens at their places; one that gathers dropped ones is compared with the one at whose place it stands",
    )


class Judge(Strict):
    """Evaluation at the end; the figures are written beside the model."""

    data: str = "world"
    seed: int = 0
    samples: PositiveInt = 2000


class Recipe(Strict):
    """A whole run. Exactly one of `model` (a directory to start from) and `new` (from scratch) is given."""

    output: str
    description: str = Field("", description="opens the model card")
    model: str | None = None
    new: NewModel | None = None
    compress: list[dict[str, Any]] = Field(default_factory=list, description="methods to insert, e.g. {method: laco}")
    data: Data = Field(default_factory=Data)
    stages: list[Stage] = Field(min_length=1)
    distill: Distill | None = None
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    gradient_checkpointing: bool = False
    processes: PositiveInt = Field(1, description="started through `accelerate launch` when more than one")
    log_steps: PositiveInt = 20
    save_steps: PositiveInt = 500
    evaluate: Judge | None = None

    @model_validator(mode="after")
    def _one_start(self) -> "Recipe":
        if (self.model is None) == (self.new is None):
            raise ValueError("give either model (a directory to start from) or new (a model from scratch)")
        if any(stage.dense or stage.pages for stage in self.stages) and self.data.source != "world":
            raise ValueError("dense labels and pages exist for data.source: world only")
        if any(stage.pictures or stage.stills for stage in self.stages) and self.data.source != "world-video":
            raise ValueError("pictures and stills are mixed into data.source: world-video only")
        if self.data.source == "world-video" and self.new is not None and self.new.architecture == "llava":
            raise ValueError("a new model for world-video needs architecture: llava_onevision")
        return self


def load_recipe(path: str | Path, **overrides: Any) -> Recipe:
    """Reads and checks a recipe; as `laco.recipes.load`."""
    return load(Recipe, path, **overrides)


def parse_recipe(raw: dict[str, Any], where: str = "the recipe") -> Recipe:
    return parse(Recipe, raw, where)
