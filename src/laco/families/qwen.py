"""What Qwen2-VL, Qwen2.5-VL and Qwen3-VL share around their encoders.

Model and processor count placeholder tokens, and M-RoPE places them, by the merge size alone (see `encoders.qwen`).
The encoder's own merger is the projector; it stays, and mergers stand before it. Where single tokens leave, the
processor gets a class of its own, which writes as many placeholders as there will be.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from laco.families.base import Family
from laco.families.counts import count
from laco.families.encoders.qwen import PackedLayer, PackedVisionConfig, QwenEncoder
from laco.families.reduction import ReducedConfig, ReducedForConditionalGeneration, ReducedModel
from laco.families.reduction.pictures import Pictures, View
from laco.families.reduction.short_m_rope import TakesShortMRope
from laco.families.steps import Step
from laco.grid import Grid


class QwenConfig(ReducedConfig):
    """Mixin of a configuration with a compressed encoder. Class data: `vision_class`, of the encoder's."""

    vision_class: ClassVar[type[PackedVisionConfig]]

    def __post_init__(self, **kwargs: Any) -> None:
        # The stock class makes its own encoder of a dictionary, whatever `model_type` that has.
        stock: Any = self
        if isinstance(stock.vision_config, dict):
            stock.vision_config = self.vision_class(**stock.vision_config)
        super().__post_init__(**kwargs)


class PackedPictures(Pictures):
    """Pictures of any size, packed into one sequence, of which the encoder's merger joins every few."""

    by_token = False

    def encoder(self, body: Any) -> Any:
        return body.visual

    def grids(self, body: Any, inputs: Mapping[str, Any], video: bool) -> list[Grid]:
        """What the language model reads of each picture or video."""
        merge = body.visual.spatial_merge_size
        grids = inputs["video_grid_thw" if video else "image_grid_thw"].tolist()
        return [Grid(frames, height // merge, width // merge) for frames, height, width in grids]

    def views(self, body: Any, lengths: Sequence[int], inputs: Mapping[str, Any], video: bool) -> list[list[View]]:
        return [[View(torch.arange(grid.tokens), grid)] for grid in self.grids(body, inputs, video)]

    def frames_of(self, body: Any, tokens: int, grids: Mapping[str, Any]) -> int:
        videos = self.grids(body, grids, video=True) if "video_grid_thw" in grids else []
        return next((grid.frames for grid in videos if grid.tokens == tokens), 1)

    def tiles(self, body: Any, pictures: int, inputs: Mapping[str, Any], video: bool) -> list[int]:
        return [1]  # there are no prefix tokens

    def gathered(self, body: Any, x_TNC: Tensor, inputs: Mapping[str, Any], video: bool) -> list[Tensor]:
        grids = self.grids(body, inputs, video)
        joined = x_TNC.shape[1] // sum(grid.tokens for grid in grids)
        means_NC = x_TNC[0].unflatten(0, (-1, joined)).mean(dim=1)
        if (order := self.window_order(body, inputs, video)) is not None:
            means_NC = means_NC[order.to(means_NC.device).argsort()]
        return list(means_NC.split([grid.tokens for grid in grids]))

    def window_order(self, body: Any, inputs: Mapping[str, Any], video: bool) -> Tensor | None:
        """The order in which the encoder has the windows, where that is not theirs."""
        return None

    def attending(self, layer: Any, kwargs: Mapping[str, Any]) -> list[int] | None:
        bounds = kwargs["cu_seqlens"]
        return (layer.bounds(bounds) if isinstance(layer, PackedLayer) else bounds).diff().tolist()

    def merged(self, part: Any, x_TNC: Tensor) -> Tensor:
        return x_TNC  # whole blocks are joined when they are gathered


class QwenModel(TakesShortMRope, ReducedModel):
    """Mixin of a model with a compressed encoder."""

    pictures = PackedPictures()

    def __init__(self, config: Any):
        # Not the stock constructor, which would build the stock encoder first.
        PreTrainedModel.__init__(self, config)
        self.visual = AutoModel.from_config(config.vision_config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.rope_deltas = None
        self.post_init()
        self.extend_language_model()


class QwenForConditionalGeneration(ReducedForConditionalGeneration):
    """Mixin of such a model with its language-model head. Class data: `model_class`."""

    model_class: ClassVar[type[QwenModel]]

    def __init__(self, config: Any):
        PreTrainedModel.__init__(self, config)
        self.model = self.model_class(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()


class QwenVL(Family):
    """A family of this kind."""

    holds = "pictures of any size, several pictures, batches, videos"
    encoder_at = "model.visual"
    packs = False  # M-RoPE
    projector_at = "model.visual.merger"

    def wears_our_classes(self, steps: Sequence[Step]) -> bool:
        return bool(steps)

    def merge_size(self, config: Any) -> int:
        kind = self.encoder_kind(config)
        assert isinstance(kind, QwenEncoder)
        return kind.merge_size(self.vision_config(config))

    def visual_tokens(self, config: Any, grid: Grid) -> int:
        return grid.tokens // self.merge_size(config) ** 2

    def projections(self, config: Any) -> list[tuple[int, int]]:
        width, text_width = self.widths(config)
        wide = width * self.merge_size(config) ** 2
        taps = len(getattr(self.vision_config(config), "deepstack_visual_indexes", ()))
        return [(wide, wide), (wide, text_width)] * (1 + taps)

    def processor_numbers(self, config: PreTrainedConfig) -> dict[str, Any]:
        return {f"image_processor.{name}": number for name, number in patch_numbers(config).items()}

    def picture_numbers(self, processor: Any, config: Any) -> dict[str, tuple[Any, Any]]:
        # Pictures may have any size. Videos are cut up by a part of their own, if the processor takes them.
        videos = getattr(processor, "video_processor", None)
        if videos is None:
            return {}
        numbers = {
            f"video_processor.{name}": (getattr(videos, name, None), number)
            for name, number in patch_numbers(config).items()
        }
        return numbers | {"video_token_id": (processor.video_token_id, config.video_token_id)}

    def set_processor(self, processor: Any, config: Any) -> None:
        super().set_processor(processor, config)
        if (videos := getattr(processor, "video_processor", None)) is not None:
            videos.merge_size = config.vision_config.spatial_merge_size
        count(processor, self.counts(config))


def patch_numbers(config: Any) -> dict[str, int]:
    """By what pictures and videos are cut into patches, and these into blocks."""
    vision = config.vision_config
    return {
        "merge_size": vision.spatial_merge_size,
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
    }
