"""Tiny random models with their processors, made from configurations and an in-memory tokenizer: no hub."""

from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoProcessor,
    BatchFeature,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2Config,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from laco.families import Family, family_of

SPECIALS = ("<pad>", "<eos>", "<image>", "<video>")


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte and the special tokens, after them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    pad, eos, image, video = SPECIALS
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=pad,
        eos_token=eos,
        extra_special_tokens={"image_token": image, "video_token": video},
        padding_side="left",
    )


def vision_config(vision: str, image_size: int, patch_size: int, layers: int, width: int = 16) -> PreTrainedConfig:
    sizes = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "image_size": image_size,
        "patch_size": patch_size,
    }
    if vision == "clip":
        return CLIPVisionConfig(projection_dim=width, **sizes)
    return SiglipVisionConfig(vision_use_head=False, **sizes)


def text_config(words: PreTrainedTokenizerFast, width: int = 24) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        tie_word_embeddings=True,
    )


def awake(model: PreTrainedModel) -> PreTrainedModel:
    """Scales up tiny random weights, which else give every picture the same logits; in eval mode."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def llava(
    vision: str = "siglip",
    image_size: int = 48,
    patch_size: int = 8,
    layers: int = 4,
    vision_feature_layer: int | list[int] = -1,
    seed: int = 0,
    **config: Any,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """LLaVA with a 6 x 6 grid by default; like LLaVA 1.5 it drops the CLS token of CLIP."""
    torch.manual_seed(seed)
    words = tokenizer()
    strategy = "default" if vision == "clip" else "full"
    configuration = LlavaConfig(
        vision_config=vision_config(vision, image_size, patch_size, layers),
        text_config=text_config(words),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy=strategy,
        **config,
    )
    size = {"height": image_size, "width": image_size}
    pictures = (
        CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size=size)
        if vision == "clip"
        else SiglipImageProcessorPil(size=size)
    )
    processor = LlavaProcessor(
        image_processor=pictures,
        tokenizer=words,
        patch_size=patch_size,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(vision == "clip"),
    )
    return awake(LlavaForConditionalGeneration(configuration)), processor


class LlavaOnevisionImageOnlyProcessor(LlavaOnevisionProcessor):
    """LLaVA-OneVision's processor without video: its video processor would need torchvision.

    transformers reads off the signature of `__init__` which parts a processor has and which settings it saves.
    """

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


AutoProcessor.register(LlavaOnevisionConfig, LlavaOnevisionImageOnlyProcessor, exist_ok=True)


def llava_onevision(
    vision: str = "siglip",
    image_size: int = 48,
    patch_size: int = 8,
    layers: int = 4,
    vision_feature_layer: int | list[int] = -1,
    seed: int = 0,
    **config: Any,
) -> tuple[LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor]:
    """LLaVA-OneVision with tiles of 6 x 6 tokens by default, up to 3 x 3 of them."""
    torch.manual_seed(seed)
    words = tokenizer()
    strategy = "default" if vision == "clip" else "full"
    pinpoints = [[image_size * h, image_size * w] for h in (1, 2, 3) for w in (1, 2, 3)]
    aspect = config.pop("vision_aspect_ratio", "anyres_max_4")
    configuration = LlavaOnevisionConfig(
        vision_config=vision_config(vision, image_size, patch_size, layers),
        text_config=text_config(words),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        video_token_index=words.convert_tokens_to_ids("<video>"),
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy=strategy,
        image_grid_pinpoints=pinpoints,
        vision_aspect_ratio=aspect,
        **config,
    )
    size = {"height": image_size, "width": image_size}
    processor = LlavaOnevisionImageOnlyProcessor(
        image_processor=LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=pinpoints),
        tokenizer=words,
        num_image_tokens=(image_size // patch_size) ** 2 + int(vision == "clip"),
        vision_feature_select_strategy=strategy,
        vision_aspect_ratio=aspect,
    )
    return awake(LlavaOnevisionForConditionalGeneration(configuration)), processor


def picture(seed: int = 0, height: int = 60, width: int = 60) -> Image.Image:
    """Random blocks, so that neighbouring patches differ and rescaling leaves them different."""
    noise = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(noise.numpy()).resize((width, height), Image.Resampling.BICUBIC)


FAMILIES = {"llava": llava, "llava_onevision": llava_onevision}
ENCODERS = ("siglip", "clip")


def scramble(model: PreTrainedModel, scale: float = 0.3) -> Family:
    """Gives the compressors random weights, as training would: what starts at zero would hide mistakes."""
    family = family_of(model)
    with torch.no_grad():
        for compressor in family.compressors(model).values():
            for parameter in compressor.parameters():
                parameter.normal_(std=scale)
    return family


def inputs(processor: ProcessorMixin, *prompts: tuple[str, list[Image.Image]]) -> BatchFeature:
    """A left-padded batch of prompts, each a text with `<image>` for every one of its pictures."""
    texts = [text for text, _ in prompts]
    pictures: Any = [pictures for _, pictures in prompts if pictures]
    if isinstance(processor, LlavaProcessor):
        pictures = [picture for some in pictures for picture in some]
    return processor(text=texts, images=pictures or None, padding=True, return_tensors="pt")
