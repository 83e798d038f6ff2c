"""Tiny PaliGemma."""

import warnings
from typing import Any

import torch
from transformers import (
    BatchFeature,
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    ProcessorMixin,
    SiglipImageProcessorPil,
)

from tiny.case import Case, Prompt
from tiny.parts import OLDEST, awake, tokenizer, vision_config

NUMPY = "__array__ implementation"  # begins a warning about how the processor makes labels


def paligemma(
    image_size: int = 48, patch_size: int = 8, layers: int = 4, seed: int = 0, **config: Any
) -> tuple[PaliGemmaForConditionalGeneration, PaliGemmaProcessor]:
    """PaliGemma with 6 x 6 tokens by default."""
    torch.manual_seed(seed)
    words = tokenizer()
    words.bos_token = "<eos>"  # the processor writes it between pictures and prompt
    pictures = SiglipImageProcessorPil(size={"height": image_size, "width": image_size})
    pictures.image_seq_length = (image_size // patch_size) ** 2
    processor = PaliGemmaProcessor(image_processor=pictures, tokenizer=words)
    text = GemmaConfig(
        vocab_size=len(words),  # the processor has added its words for places and segments
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=12,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    configuration = PaliGemmaConfig(
        vision_config=vision_config("siglip", image_size, patch_size, layers),
        text_config=text,
        image_token_index=words.convert_tokens_to_ids("<image>"),
        vocab_size=len(words),
        projection_dim=24,
        hidden_size=24,
        **config,
    )
    return awake(PaliGemmaForConditionalGeneration(configuration)), processor


class PaliGemmaCase(Case):
    def inputs(self, processor: ProcessorMixin, *prompts: Prompt) -> BatchFeature:
        """Without the labels that its processor makes, of which there are none in a prompt without a suffix."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", NUMPY)
            batch = super().inputs(processor, *prompts)
        del batch["labels"]
        return batch


CASES = [
    PaliGemmaCase(
        "paligemma-siglip",
        paligemma,
        nested=True,
        cannot={"text_only": "the stock processor refuses prompts without a picture"}
        | ({"generation": "without a cache, later steps attend one way only"} if OLDEST else {}),
    )
]
