"""PaliGemma: an independent reference, every number that follows the grid, and attention both ways in the prefix."""

import random
from copy import deepcopy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, AutoProcessor, PaliGemmaConfig

import laco
import tiny
from families.test_guards import by_hand
from laco.cost import stage_flops
from laco.errors import LacoError
from laco.families import family_of, family_of_config
from laco.families.steps import Step
from tiny.families.paligemma import CASES, NUMPY, paligemma

pytestmark = pytest.mark.filterwarnings(f"ignore:{NUMPY}")
(CASE,) = CASES
METHODS = {
    "layer 1": laco.LaCo(layer=1, shortcut="saliency"),
    "layer 2, factor 3": laco.LaCo(layer=2, factor=3, shortcut="saliency"),
    "layer 3, map": laco.LDPv2(layer=3),
    "after the last": laco.LaCo(depth=1, shortcut="saliency"),
    "after the last, map": laco.LDPv2(depth=1),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("image_size", [48, 40], ids=["even grid", "odd grid"])
def test_features_equal_a_loop_over_stock_layers(method, image_size):
    model, processor = paligemma(image_size)
    model.double()
    stock = deepcopy(model)
    laco.compress(model, processor, method)
    family = tiny.scramble(model)
    ((place, compressor),) = family.compressors(model).items()
    pixels = torch.randn(2, 3, image_size, image_size, dtype=torch.float64)
    with torch.no_grad():
        found = model.get_image_features(pixels).pooler_output
        for picture, features in zip(pixels, found, strict=True):
            tower = stock.model.vision_tower
            x_NC = tower.embeddings(picture[None])[0]
            for count, layer in enumerate(tower.encoder.layers, start=1):
                x_NC = layer(x_NC[None], None)[0]
                if place == f"layers.{count}":
                    x_NC = by_hand(compressor, x_NC, method.factor)
            wanted = stock.model.multi_modal_projector(tower.post_layernorm(x_NC))
            torch.testing.assert_close(features, wanted, rtol=0, atol=1e-9)
    assert found.shape[1] == processor.image_seq_length == family.grid(model.config).tokens


def numbers(model, processor) -> list[int]:
    text = model.config.text_config, model.model.language_model.config
    parts = [processor.image_seq_length, processor.image_processor.image_seq_length]
    return [*parts, *(config.num_image_tokens for config in text)]


def test_every_number_follows_the_grid_and_comes_back(tmp_path):
    model, processor = paligemma()
    laco.compress(model, processor, laco.LaCo(layer=1))
    laco.compress(model, processor, laco.LaCo(layer=3, factor=3))
    assert numbers(model, processor) == [1, 1, 1, 1]
    laco.decompress(model, processor)
    assert numbers(model, processor) == [36, 36, 36, 36]

    laco.compress(model, processor, laco.LaCo(layer=2))
    assert numbers(model, processor) == [9, 9, 9, 9]
    laco.save_pretrained(model, processor, tmp_path / "model")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    other = AutoProcessor.from_pretrained(tmp_path / "model")
    assert numbers(again, other) == [9, 9, 9, 9]
    laco.decompress(again, other)
    assert numbers(again, other) == [36, 36, 36, 36]


def test_placeholders_equal_features_for_many_sizes():
    model, processor = paligemma(image_size=40)
    laco.compress(model, processor, laco.LaCo(layer=2))
    sizes = random.Random(0)
    pictures = [tiny.picture(seed, sizes.randint(1, 200), sizes.randint(1, 200)) for seed in range(300)]
    batch = CASE.inputs(processor, ("<image>" * 300 + "?", pictures))
    assert (batch["input_ids"] == model.config.image_token_id).sum() == 300 * 9
    with torch.no_grad():
        features = model.get_image_features(batch["pixel_values"]).pooler_output
    assert features.shape[:2] == (300, 9)


def test_published_sizes():
    """PaliGemma 224, 448 and 896 have 16 x 16, 32 x 32 and 64 x 64 patches of 14 pixels."""
    for pixels, side in ((224, 16), (448, 32), (896, 64)):
        vision = {"model_type": "siglip_vision_model", "image_size": pixels, "patch_size": 14}
        config = PaliGemmaConfig(vision_config=vision)
        assert config.text_config.num_image_tokens == side**2
        compressed = family_of_config(config).with_steps(config, [Step.at(laco.LaCo(), 7)])
        assert compressed.text_config.num_image_tokens == (side // 2) ** 2
        assert PaliGemmaConfig(**compressed.to_dict()).to_dict() == compressed.to_dict()
        assert family_of_config(config).with_steps(compressed, []).to_dict() == config.to_dict()


def test_positions_and_masks_are_those_of_the_shorter_prompt(monkeypatch):
    """9 pictures tokens, then prompt and suffix: positions from 1, everything before the suffix sees all of it."""
    model, processor = paligemma()
    laco.compress(model, processor, laco.LaCo(layer=2))
    batch = processor(text="<image>hi", images=tiny.picture(), suffix="yes", return_tensors="pt")
    kinds = batch["token_type_ids"][0]
    length, suffix = len(kinds), int(kinds.sum())
    assert (length - suffix, suffix) == (9 + len("<eos>hi\n".replace("<eos>", "E")), len("yes") + 1)
    seen = {}
    monkeypatch.setattr(model.model.language_model, "forward", lambda **inputs: seen.update(inputs) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**batch)
    assert seen["position_ids"].tolist() == [list(range(1, length + 1))]
    attends = seen["attention_mask"][0, 0]
    for query in range(length):
        for key in range(length):
            assert attends[query, key] == (key <= query or max(query, key) < length - suffix), (query, key)


def test_only_the_suffix_is_learnt():
    model, processor = paligemma()
    laco.compress(model, processor, laco.LaCo(layer=2))
    batch = processor(text="<image>hi", images=tiny.picture(), suffix="yes", return_tensors="pt")
    output = model(**batch)
    wanted = torch.nn.functional.cross_entropy(output.logits[0, -5:-1], batch["input_ids"][0, -4:])
    torch.testing.assert_close(output.loss, wanted)


@pytest.mark.parametrize("method", [laco.LaCo(depth=1 / 4), laco.LDPv2(depth=1)], ids=lambda method: method.name)
def test_flops_are_what_torch_counts(method):
    model, processor = paligemma()
    laco.compress(model, processor, method)
    batch = CASE.inputs(processor, ("<image><image>?", [tiny.picture(1), tiny.picture(2)]))
    length = batch["input_ids"].shape[1]
    flops = stage_flops(model, pictures=2, text_tokens=length - 18, logits=length)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(**batch, use_cache=False)
    found = {name.rpartition(".")[2]: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    assert flops.encoder == pytest.approx(found["vision_tower"], rel=0.01)
    assert flops.projector == pytest.approx(found["multi_modal_projector"], rel=0.01)
    assert flops.forward == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_a_processor_of_another_size_is_refused():
    model, processor = paligemma()
    processor.image_processor.image_seq_length = 256
    with pytest.raises(LacoError, match=r"image_processor.image_seq_length is 256, the model needs 36"):
        laco.compress(model, processor, laco.LaCo())
    assert family_of(model).steps(model.config) == []
    assert processor.image_seq_length == 36
