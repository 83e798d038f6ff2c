"""Gemma 3: an independent reference through its pooling, its one number outside of the encoder, masks, and crops."""

import random
from copy import deepcopy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, AutoProcessor, Gemma3Config

import laco
import tiny
from families.test_guards import by_hand
from laco.ask import uncompressed_processor
from laco.cost import stage_flops
from laco.errors import LacoError
from laco.families import family_of, family_of_config
from laco.families.gemma3 import LacoGemma3Config
from laco.families.steps import Step
from laco.grid import Grid
from tiny.families.gemma3 import BEGIN, CASES, gemma3

(CASE,) = CASES
METHODS = {
    "layer 1": laco.LaCo(layer=1, shortcut="saliency"),
    "layer 2, factor 3": laco.LaCo(layer=2, factor=3, shortcut="saliency"),
    "layer 3, map": laco.LDPv2(layer=3),
    "after the last": laco.LaCo(depth=1, shortcut="saliency"),
    "after the last, map": laco.LDPv2(depth=1),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize(("image_size", "pooled"), [(64, 2), (48, 1), (44, 1)], ids=str)
def test_features_equal_a_loop_over_stock_layers(method, image_size, pooled):
    model, processor = gemma3(image_size, pooled=pooled)
    model.double()
    stock = deepcopy(model)
    laco.compress(model, processor, method)
    family = tiny.scramble(model)
    ((place, compressor),) = family.compressors(model).items()
    pixels = torch.randn(2, 3, image_size, image_size, dtype=torch.float64)
    with torch.no_grad():
        found = model.get_image_features(pixels).pooler_output
        for picture, features in zip(pixels, found, strict=True):
            tower, projector = stock.model.vision_tower, stock.model.multi_modal_projector
            x_NC = tower.embeddings(picture[None])[0]
            for count, layer in enumerate(tower.encoder.layers, start=1):
                x_NC = layer(x_NC[None], None)[0]
                if place == f"layers.{count}":
                    x_NC = by_hand(compressor, x_NC, method.factor)
            x_NC = tower.post_layernorm(x_NC)
            side = int(len(x_NC) ** 0.5)
            corners = [(y, x) for y in range(0, side, pooled) for x in range(0, side, pooled)]
            offsets = [(dy, dx) for dy in range(pooled) for dx in range(pooled)]
            means = [torch.stack([x_NC[(y + dy) * side + x + dx] for dy, dx in offsets]).mean(0) for y, x in corners]
            wanted = projector.mm_soft_emb_norm(torch.stack(means)) @ projector.mm_input_projection_weight
            # The stock norm computes in float32.
            torch.testing.assert_close(features, wanted, rtol=0, atol=1e-5)
    assert found.shape[1] == processor.image_seq_length == model.config.mm_tokens_per_image


def numbers(model, processor) -> tuple[int, ...]:
    projector = model.model.multi_modal_projector
    assert processor.full_image_sequence.count("<image>") == processor.image_seq_length
    assert projector.avg_pool.kernel_size == projector.kernel_size
    own = projector.patches_per_image, projector.tokens_per_side, projector.kernel_size
    return (model.config.mm_tokens_per_image, processor.image_seq_length, *own)


def test_every_number_follows_the_grid_and_comes_back(tmp_path):
    model, processor = gemma3()
    assert numbers(model, processor) == (64, 64, 16, 8, 2)
    laco.compress(model, processor, laco.LaCo(layer=1))
    assert numbers(model, processor) == (16, 16, 8, 4, 2)
    laco.compress(model, processor, laco.LaCo(layer=3))
    assert numbers(model, processor) == (4, 4, 4, 2, 2)
    laco.save_pretrained(model, processor, tmp_path / "model")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    other = AutoProcessor.from_pretrained(tmp_path / "model")
    for compressed in ((model, processor), (again, other)):
        assert numbers(*compressed) == (4, 4, 4, 2, 2)
        laco.decompress(*compressed)
        assert numbers(*compressed) == (64, 64, 16, 8, 2)
        assert compressed[0].config.to_dict().keys() == Gemma3Config().to_dict().keys() | {"dtype", "architectures"}


def test_published_sizes():
    """Gemma 3 has 64 x 64 patches of 14 pixels and averages 4 x 4 of them: 256 tokens a picture, a quarter is 64."""
    config = Gemma3Config(vision_config={"model_type": "siglip_vision_model", "image_size": 896, "patch_size": 14})
    family = family_of_config(config)
    assert family.visual_tokens(config, family.grid(config)) == config.mm_tokens_per_image == 256
    assert family.visual_tokens(config, Grid(1, 32, 32)) == 64
    for factor, tokens in ((2, 64), (4, 16), (16, 1)):
        steps = [Step.at(laco.LaCo(factor=factor), 7)]
        family.check_steps(config, steps)
        compressed = family.with_steps(config, steps)
        assert compressed.mm_tokens_per_image == tokens
        settings = {**compressed.to_dict(), "model_type": "laco_gemma3"}
        assert LacoGemma3Config(**settings).to_dict() == settings
        assert family.with_steps(compressed, []).to_dict() == config.to_dict()
    with pytest.raises(LacoError, match="averages 4 x 4 visual tokens and would cut off a part of the 22 x 22"):
        family.check_steps(config, [Step.at(laco.LaCo(factor=3), 7)])


def test_placeholders_equal_features_for_many_sizes_and_crops():
    model, processor = gemma3()
    laco.compress(model, processor, laco.LaCo(layer=2))
    sizes, crops = random.Random(0), 0
    options = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 20, "return_tensors": "pt"}
    for seed in range(100):
        some = [tiny.picture(seed, sizes.randint(1, 200), sizes.randint(1, 200)) for _ in range(2)]
        batch = processor(text=f"{BEGIN} and {BEGIN}", images=[some], **options)
        crops += len(batch["pixel_values"]) - 2
        assert (batch["input_ids"] == model.config.image_token_id).sum() == 16 * len(batch["pixel_values"])
    assert crops > 50
    with torch.no_grad():
        features = model.get_image_features(batch["pixel_values"]).pooler_output
    assert features.shape[:2] == (len(batch["pixel_values"]), 16)


def test_crops_matter():
    model, processor = gemma3()
    laco.compress(model, processor, laco.LaCo(layer=2))
    options = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 20, "return_tensors": "pt"}
    batch = processor(text=f"see {BEGIN}!", images=[[tiny.picture(0, 60, 130)]], **options)
    assert len(batch["pixel_values"]) == 3
    with torch.no_grad():
        logits = model(**batch).logits[0, -1]
        for crop in range(3):
            other = batch["pixel_values"].clone()
            other[crop] = torch.randn_like(other[crop])
            changed = model(**{**batch, "pixel_values": other}).logits[0, -1]
            assert (changed - logits).abs().max() > 1e-3


def test_masks_are_those_of_the_shorter_prompt(monkeypatch):
    """16 tokens a picture that see each other; beside that causal, and in sliding layers the last 32 alone."""
    model, processor = gemma3()
    laco.compress(model, processor, laco.LaCo(layer=2))
    batch = CASE.inputs(processor, ("see <image> and <image>!", [tiny.picture(0), tiny.picture(1)]))
    seen = {}
    monkeypatch.setattr(model.model.language_model, "forward", lambda **inputs: seen.update(inputs) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**batch)
    # "see", a space, two line breaks, the beginning; then the end and so on.
    before, between = len("see \n\n") + 1, 1 + len("\n\n and \n\n") + 1
    first = range(before, before + 16)
    second = range(first.stop + between, first.stop + between + 16)
    length = second.stop + 1 + len("\n\n!")
    assert batch["input_ids"].shape[1] == length
    assert batch["token_type_ids"][0].nonzero().flatten().tolist() == [*first, *second]
    for query in range(length):
        for key in range(length):
            together = any(query in picture and key in picture for picture in (first, second))
            full = key <= query or together
            assert seen["attention_mask"]["full_attention"][0, 0, query, key] == full, (query, key)
            near = full and key > query - 32
            assert seen["attention_mask"]["sliding_attention"][0, 0, query, key] == near, (query, key)


def test_a_processor_for_the_model_before():
    model, processor = gemma3()
    laco.compress(model, processor, laco.LaCo(layer=2))
    before = uncompressed_processor(model, processor)
    assert before.image_seq_length == before.full_image_sequence.count("<image>") == 64
    assert numbers(model, processor) == (16, 16, 8, 4, 2)


@pytest.mark.parametrize("method", [laco.LaCo(depth=1 / 4), laco.LDPv2(depth=1)], ids=lambda method: method.name)
def test_flops_are_what_torch_counts(method):
    model, processor = gemma3()
    laco.compress(model, processor, method)
    batch = CASE.inputs(processor, ("<image><image>?", [tiny.picture(1), tiny.picture(2)]))
    length = batch["input_ids"].shape[1]
    flops = stage_flops(model, pictures=2, text_tokens=length - 32, logits=length)
    assert flops == stage_flops(gemma3()[0], [method], pictures=2, text_tokens=length - 32, logits=length)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(**batch, use_cache=False)
    found = {name.rpartition(".")[2]: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    assert flops.encoder == pytest.approx(found["vision_tower"], rel=0.01)
    assert flops.projector == pytest.approx(found["multi_modal_projector"], rel=0.01)
    assert flops.forward == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_what_the_pooling_would_cut_off_is_refused():
    model, processor = gemma3()
    before = numbers(model, processor)
    with pytest.raises(LacoError, match="averages 2 x 2 visual tokens and would cut off a part of the 3 x 3"):
        laco.compress(model, processor, laco.LaCo(factor=6))
    assert numbers(model, processor) == before
    assert family_of(model).steps(model.config) == []


def test_a_configuration_that_contradicts_itself_is_refused():
    model, processor = gemma3()
    model.config.mm_tokens_per_image = processor.image_seq_length = 60
    processor.full_image_sequence = "<image>" * 60
    with pytest.raises(LacoError, match="mm_tokens_per_image is 60, which no average pooling of 16 x 16"):
        laco.compress(model, processor, laco.LaCo())


def test_processors_that_count_otherwise_are_refused():
    model, processor = gemma3()
    processor.image_seq_length = 16  # too late for what it has already made of it
    with pytest.raises(LacoError, match="image_seq_length is 16, the model needs 64"):
        laco.compress(model, processor, laco.LaCo())
    processor.image_seq_length, processor.full_image_sequence = 64, "<image>" * 16
    with pytest.raises(LacoError, match="full_image_sequence is 16, the model needs 64"):
        laco.compress(model, processor, laco.LaCo())
    model, processor = gemma3()
    model.config.image_token_index += 1
    with pytest.raises(LacoError, match="image_token_id is 258, the model needs 259"):
        laco.compress(model, processor, laco.LaCo())
    with pytest.raises(LacoError, match="image_seq_length is None, the model needs 64"):
        laco.compress(model, tiny.llava()[1], laco.LaCo())
