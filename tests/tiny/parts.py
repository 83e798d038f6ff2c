"""What the tiny random models are made of: an in-memory tokenizer, configurations, pictures. No hub."""

from typing import TypeVar

import torch
import transformers
from packaging.version import Version
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2Config,
    SiglipVisionConfig,
)

from laco.families import Family, family_of

SPECIALS = ("<pad>", "<eos>", "<image>", "<video>")
# The oldest transformers that is tested, 5.16.1, can do a little less; `Case.cannot` names it.
OLDEST = Version(transformers.__version__) < Version("5.19")

ProcessorClass = TypeVar("ProcessorClass", bound=type[ProcessorMixin])


def findable(processor: ProcessorClass) -> ProcessorClass:
    """Lets AutoProcessor find a class of the tests by its name, which is what saved processors record."""
    config = type(f"{processor.__name__}Config", (PreTrainedConfig,), {})  # 5.16.1 ignores its own configurations here
    AutoProcessor.register(config, processor)
    return processor


def tokenizer(**further: str) -> PreTrainedTokenizerFast:
    """One token a byte and the special tokens, after them; `further` ones by their names in the tokenizer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    pad, eos, image, video = SPECIALS
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=pad,
        eos_token=eos,
        extra_special_tokens={"image_token": image, "video_token": video, **further},
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


def picture(seed: int = 0, height: int = 60, width: int = 60) -> Image.Image:
    """Random blocks, so that neighbouring patches differ and rescaling leaves them different."""
    noise = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(noise.numpy()).resize((width, height), Image.Resampling.BICUBIC)


def scramble(model: PreTrainedModel, scale: float = 0.3) -> Family:
    """Gives the compressors random weights, as training would: what starts at zero would hide mistakes."""
    family = family_of(model)
    with torch.no_grad():
        for compressor in family.compressors(model).values():
            for parameter in compressor.parameters():
                parameter.normal_(std=scale)
    return family
