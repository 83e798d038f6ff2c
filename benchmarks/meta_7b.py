"""How long compressing a 7B model takes, and what it allocates: `python benchmarks/meta_7b.py`.

The models have the shapes of LLaVA-1.5-7B and LLaVA-OneVision-7B and live on the meta device, so nothing is
downloaded and weights cost nothing. Prints seconds (the slowest of three) and the parameters that are new.
"""

from time import perf_counter

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedModel,
    Qwen2Config,
    SiglipVisionConfig,
)

import laco


def llava_7b() -> PreTrainedModel:
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=LlamaConfig()))


def llava_onevision_7b() -> PreTrainedModel:
    vision = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=26,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
        vision_use_head=False,
    )
    text = Qwen2Config(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152000,
    )
    config = LlavaOnevisionConfig(vision_config=vision, text_config=text)
    return LlavaOnevisionForConditionalGeneration(config)


def main() -> None:
    for build in (llava_7b, llava_onevision_7b):
        with torch.device("meta"):
            model = build()
        before = {id(parameter) for parameter in model.parameters()}
        size = sum(parameter.numel() for parameter in model.parameters())
        for method in (laco.LaCo(depth=1 / 4), laco.TokenPacker()):
            seconds = []
            for _ in range(3):
                start = perf_counter()
                laco.compress(model, None, method)
                seconds.append(perf_counter() - start)
                new = [parameter for parameter in model.parameters() if id(parameter) not in before]
                laco.decompress(model, None)
            count = sum(parameter.numel() for parameter in new)
            place = "depth 1/4" if method.depth else "external"
            print(
                f"{build.__name__} ({size / 1e9:.2f}B): {method.name} at {place} in {max(seconds):.2f} s,"
                f" {len(new)} new tensors of {count:,} parameters"
            )
        assert before == {id(parameter) for parameter in model.parameters()}


if __name__ == "__main__":
    main()
