"""Videos without torchvision, which the video processors of transformers need.

A video is a list of RGB pictures. The processor of this file is the stock one of LLaVA-OneVision but for that.
"""

from collections.abc import Sequence
from typing import Any

from einops import rearrange
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, BatchFeature, LlavaOnevisionProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from laco.errors import LacoError
from laco.families.counts import counting
from laco.families.llava_onevision import LacoLlavaOnevisionConfig

_SHARED = ("size", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")


class LlavaOnevisionFramesProcessor(LlavaOnevisionProcessor):
    """LLaVA-OneVision's processor that treats the frames of videos as its image processor does an overview.

    Saved, it records its own name: `AutoProcessor` finds it after `import laco`.
    """

    # transformers reads off this signature which parts a processor has and which settings it saves.
    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_image_tokens: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        video_token: str = "<video>",
        vision_aspect_ratio: str = "anyres_max_9",
        **kwargs: Any,
    ):
        super().__init__(
            image_processor,
            tokenizer,
            num_image_tokens=num_image_tokens,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            video_token=video_token,
            vision_aspect_ratio=vision_aspect_ratio,
            **kwargs,
        )

    def video_processor(self, videos: Sequence[Sequence[Image.Image]], **_: Any) -> BatchFeature:
        """`pixel_values_videos` (B, F, 3, height, width) of B videos of F frames each, of the encoder's size.

        Raises:
            LacoError: the videos have different numbers of frames, or none.
        """
        counts = sorted({len(frames) for frames in videos})
        if len(counts) > 1 or 0 in counts:
            raise LacoError(f"videos of a batch have the same number of frames, at least one; got {counts}")
        resized = SiglipImageProcessorPil(**{name: getattr(self.image_processor, name) for name in _SHARED})
        frames = [frame for frames in videos for frame in frames]
        size = (resized.size["width"], resized.size["height"])
        fits = all(frame.size == size for frame in frames)  # resizing them takes longer than all the rest
        pixels: Tensor = resized(images=frames, do_resize=not fits, return_tensors="pt")["pixel_values"]
        return BatchFeature({"pixel_values_videos": rearrange(pixels, "(b f) c h w -> b f c h w", b=len(videos))})


AutoProcessor.register(LacoLlavaOnevisionConfig, LlavaOnevisionFramesProcessor)
counting(LlavaOnevisionFramesProcessor)
