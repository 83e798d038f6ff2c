"""The models that come with the tree: stock architectures that know what their cards say."""

from pathlib import Path

import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

from laco.evaluate import evaluate

MODELS = Path(__file__).parents[1] / "models"


@pytest.mark.parametrize(
    ("name", "architecture", "data", "tokens", "at_least"),
    [
        ("laco-tiny", "LlavaForConditionalGeneration", "world", 144, 85),
        ("laco-tiny-video", "LlavaOnevisionForConditionalGeneration", "world-video", 8 * 36 + 1, 75),
        ("laco-tiny-video", "LlavaOnevisionForConditionalGeneration", "world", 2 * 144 + 12, 80),
    ],
)
def test_a_model_answers(name: str, architecture: str, data: str, tokens: int, at_least: float) -> None:
    model = AutoModelForImageTextToText.from_pretrained(MODELS / name)
    processor = AutoProcessor.from_pretrained(MODELS / name)
    assert type(model).__name__ == architecture
    report = evaluate(model, processor, data, samples=70, progress=False)
    assert report.average > at_least
    assert report.visual_tokens == tokens
