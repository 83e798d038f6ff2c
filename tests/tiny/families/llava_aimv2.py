"""Tiny LLaVA with AIMv2, the encoder of the LaCo paper, and with DINOv2."""

from functools import partial
from typing import Any

import torch
from transformers import (
    Aimv2VisionConfig,
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
)

from tiny.case import Case
from tiny.parts import awake, text_config, tokenizer


def aimv2(image_size: int = 48, layers: int = 4, **config: Any) -> Aimv2VisionConfig:
    return Aimv2VisionConfig(**sizes(image_size, layers), intermediate_size=24, **config)


def dinov2(image_size: int = 48, layers: int = 4, **config: Any) -> Dinov2Config:
    return Dinov2Config(**sizes(image_size, layers), mlp_ratio=2, **config)


def dinov2_with_registers(image_size: int = 48, layers: int = 4, **config: Any) -> Dinov2WithRegistersConfig:
    return Dinov2WithRegistersConfig(
        **sizes(image_size, layers), mlp_ratio=2, **{"num_register_tokens": 3, "use_swiglu_ffn": True, **config}
    )


def sizes(image_size: int, layers: int) -> dict[str, int]:
    return {
        "hidden_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "image_size": image_size,
        "patch_size": 8,
    }


def llava(vision: PreTrainedConfig, prefix: int = 0, seed: int = 0) -> tuple[Any, LlavaProcessor]:
    """LLaVA around this encoder, whose CLS token it drops if there is one; registers it reads."""
    torch.manual_seed(seed)
    words, strategy = tokenizer(), "default" if prefix else "full"
    configuration = LlavaConfig(
        vision_config=vision,
        text_config=text_config(words),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy=strategy,
    )
    pictures = BitImageProcessorPil if prefix else CLIPImageProcessorPil  # as on the hub
    edge = vision.image_size
    processor = LlavaProcessor(
        image_processor=pictures(size={"shortest_edge": edge}, crop_size={"height": edge, "width": edge}),
        tokenizer=words,
        patch_size=8,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=prefix,
    )
    return awake(LlavaForConditionalGeneration(configuration)), processor


def case(name: str, vision: Any, prefix: int = 0) -> Case:
    return Case(f"llava-{name}", partial(build, vision, prefix))


def build(vision: Any, prefix: int, **config: Any) -> tuple[Any, LlavaProcessor]:
    return llava(vision(**config), prefix)


CASES = [case("aimv2", aimv2), case("dinov2", dinov2, prefix=1)]
# Not among them: LLaVA reads registers as it reads patches, so that no merger can take the place of its projector.
REGISTERS = case("dinov2_with_registers", dinov2_with_registers, prefix=4)
