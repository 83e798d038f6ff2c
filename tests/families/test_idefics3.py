"""Idefics 3 and SmolVLM, which share everything but their names: tiles, padded pictures, limits of the connector."""

import json
import random
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, AutoModelForImageTextToText

import laco
import tiny
from laco.cost import stage_flops
from laco.errors import LacoError
from laco.families import family_of
from laco.families.encoders.idefics3 import merge_mask, merge_padded
from tiny.families.idefics3 import idefics3
from tiny.families.smolvlm import smolvlm

BUILDERS = {"idefics3": idefics3, "smolvlm": smolvlm}
both = pytest.mark.parametrize("name", BUILDERS)


def inputs(name: str, processor, *prompts):
    return tiny.CASES[f"{name}-{name}"].inputs(processor, *prompts)


# The independent reference: one picture after another without any padding, window by window.


def merged_by_hand(compressor: nn.Module, x_HWC: Tensor, factor: int, odd: str) -> Tensor:
    """Merges one picture, (H, W, C) -> (h, w, C): over the edge the last row and column again, or a cut."""
    height, width = x_HWC.shape[:2]
    tops, lefts = range(0, height, factor), range(0, width, factor)
    if odd == "crop":
        tops, lefts = (range(0, side - factor + 1, factor) for side in (height, width))
    cells = {
        (top, left): [
            x_HWC[min(top + dy, height - 1), min(left + dx, width - 1)] for dy in range(factor) for dx in range(factor)
        ]
        for top in tops
        for left in lefts
    }
    if compressor.sees == "windows":
        rows = [torch.stack([compressor(torch.stack(cells[top, left])) for left in lefts]) for top in tops]
        return torch.stack(rows)
    rows = [
        torch.stack([cells[top, left][dy * factor + dx] for left in lefts for dx in range(factor)])
        for top in tops
        for dy in range(factor)
    ]
    return compressor(torch.stack(rows)[None])[0]


def features_by_hand(stock: nn.Module, compressed: nn.Module, pixels_3HW: Tensor) -> Tensor:
    """What the encoder gives for one unpadded picture, (h, w, C), by a loop over the stock layers."""
    family = family_of(compressed)
    steps = {step.layer: step.merger for step in family.steps(compressed.config)}
    tower, patch = stock.model.vision_model, stock.config.vision_config.patch_size
    height, width = (side // patch for side in pixels_3HW.shape[1:])
    x_NC = tower.embeddings(pixels_3HW[None], torch.ones(1, height, width, dtype=torch.bool))[0]
    for count, layer in enumerate(tower.encoder.layers, start=1):
        x_NC = layer(x_NC[None], None)[0]
        if merger := steps.get(count):
            compressor = family.compressors(compressed)[f"layers.{count}"]
            x_hwC = merged_by_hand(compressor, x_NC.view(height, width, -1), merger.factor, merger.odd)
            height, width, x_NC = *x_hwC.shape[:2], x_hwC.flatten(0, 1)
    return tower.post_layernorm(x_NC).view(height, width, -1)


SIZES = [(7, 9), (5, 8), (7, 3), (4, 9)]  # pictures in patches; the canvas takes all of them


def canvas(patch: int) -> tuple[Tensor, Tensor]:
    """A batch of padded pictures (B, 3, H, W) and which of their patches are real. The padding is noise."""
    pixels = torch.randn(len(SIZES), 3, 7 * patch, 9 * patch, dtype=torch.float64)
    real_BHW = torch.zeros(len(SIZES), 7, 9, dtype=torch.bool)
    for picture, (height, width) in enumerate(SIZES):
        real_BHW[picture, :height, :width] = True
    return pixels, real_BHW


METHODS = {"windows": lambda **where: laco.LaCo(shortcut="saliency", **where), "map": laco.LDPv2}


@both
@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("layer", [1, 2, 4])
@pytest.mark.parametrize("method", METHODS)
def test_features_equal_a_loop_over_stock_layers(name, method, layer, factor):
    model, processor = BUILDERS[name]()
    model.double()
    stock, patch = deepcopy(model), model.config.vision_config.patch_size
    laco.compress(model, processor, METHODS[method](layer=layer, factor=factor))
    tiny.scramble(model)
    pixels, real_BHW = canvas(patch)
    with torch.no_grad():
        output = model.model.vision_model(pixels, patch_attention_mask=real_BHW, output_hidden_states=True)
        h, w = -(-7 // factor), -(-9 // factor)
        assert [state.shape[1] for state in output.hidden_states] == [63] * layer + [h * w] * (5 - layer)
        for picture, (height, width) in enumerate(SIZES):
            wanted = features_by_hand(stock, model, pixels[picture, :, : height * patch, : width * patch])
            found = output.last_hidden_state[picture].view(h, w, -1)[: wanted.shape[0], : wanted.shape[1]]
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)


@both
@pytest.mark.parametrize("odd", ["pad", "crop", "resize"])
def test_two_mergers_on_padded_pictures(name, odd):
    model, processor = BUILDERS[name](scale_factor=1)
    model.double()
    stock, patch = deepcopy(model), model.config.vision_config.patch_size
    for layer in (3, 1):
        laco.compress(model, processor, laco.LaCo(layer=layer, odd=odd))
    tiny.scramble(model)
    pixels, real_BHW = canvas(patch)
    if odd == "crop":  # of 3 patches it leaves 1, and of that nothing
        pixels, real_BHW = pixels[[0, 1, 3]], real_BHW[[0, 1, 3]]
    with torch.no_grad():
        found = model.model.vision_model(pixels, patch_attention_mask=real_BHW).last_hidden_state
        found = found.unflatten(1, (1, 2) if odd == "crop" else (2, 3))
        for picture, real_HW in enumerate(real_BHW):
            height, width = int(real_HW[:, 0].sum()), int(real_HW[0].sum())
            alone = pixels[picture, :, : height * patch, : width * patch]
            if odd == "resize":
                grid = [-(-side // 4) for side in (height, width)]
                wanted = model.model.vision_model(alone[None]).last_hidden_state[0].unflatten(0, grid)
            else:
                wanted = features_by_hand(stock, model, alone)
            part = found[picture, : wanted.shape[0], : wanted.shape[1]]
            torch.testing.assert_close(part, wanted, rtol=0, atol=1e-9)


@both
@pytest.mark.parametrize("odd", ["pad", "resize"])
def test_factor_one_keeps_padding_as_well(name, odd):
    """The language model reads features of padding too, so these have to stay what they are in the stock model."""
    model, processor = BUILDERS[name]()
    pixels, real_BHW = canvas(model.double().config.vision_config.patch_size)
    with torch.no_grad():
        stock = model.model.vision_model(pixels, patch_attention_mask=real_BHW).last_hidden_state
        laco.compress(model, processor, laco.LaCo(layer=2, factor=1, odd=odd))
        found = model.model.vision_model(pixels, patch_attention_mask=real_BHW).last_hidden_state
    torch.testing.assert_close(found, stock, rtol=0, atol=1e-12)


@both
def test_eager_attention_hides_padding_as_well(name):
    model, processor = BUILDERS[name]()
    laco.compress(model, processor, laco.LaCo(layer=2))
    pixels, real_BHW = canvas(model.config.vision_config.patch_size)
    with torch.no_grad():
        sdpa = model.model.vision_model(pixels.float(), patch_attention_mask=real_BHW).last_hidden_state
        model.set_attn_implementation("eager")
        eager = model.model.vision_model(pixels.float(), patch_attention_mask=real_BHW).last_hidden_state
    real_Bhw = merge_mask(real_BHW, 2, "pad").flatten(1)
    torch.testing.assert_close(eager[real_Bhw], sdpa[real_Bhw], rtol=0, atol=1e-5)


def test_which_windows_are_real():
    """A picture of 3 x 2 patches on a canvas of 5 x 4."""
    real_BHW = torch.zeros(1, 5, 4, dtype=torch.bool)
    real_BHW[:, :3, :2] = True
    assert merge_mask(real_BHW, 2, "pad").long().tolist() == [[[1, 0], [1, 0], [0, 0]]]
    assert merge_mask(real_BHW, 2, "crop").long().tolist() == [[[1, 0], [0, 0]]]


def test_real_parts_that_are_no_rectangles_are_refused():
    x_BHWC, real_BHW = torch.randn(1, 4, 4, 4), torch.ones(1, 4, 4, dtype=torch.bool)
    real_BHW[0, 1, 1] = False
    with pytest.raises(LacoError, match="padded only right and below"):
        merge_padded(laco.AveragePool().build(4), x_BHWC, real_BHW, 2, "pad")


def test_exported_encoders_take_any_padding():
    model, processor = idefics3(layers=2)
    laco.compress(model, processor, laco.LaCo(layer=1))
    tiny.scramble(model)
    pixels, real_BHW = canvas(model.config.vision_config.patch_size)
    encoder, pixels = model.model.vision_model, pixels.float()
    program = torch.export.export(encoder, (pixels, torch.ones_like(real_BHW))).module()
    found = program(pixels, real_BHW).last_hidden_state
    real_Bhw = merge_mask(real_BHW, 2, "pad").flatten(1)
    wanted = encoder(pixels, real_BHW).last_hidden_state
    torch.testing.assert_close(found[real_Bhw], wanted[real_Bhw], rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", [laco.LDPv2(), laco.AveragePool(odd="resize")])
def test_compiled_mergers_that_cannot_follow_padding_give_no_numbers(monkeypatch, method):
    x_BHWC, real_BHW = torch.randn(2, 4, 4, 4), torch.ones(2, 4, 4, dtype=torch.bool)
    merger = method.build(4)
    wanted = merge_padded(merger, x_BHWC, real_BHW, 2, method.odd)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(merge_padded(merger, x_BHWC, real_BHW, 2, method.odd), wanted)
    real_BHW[1, 3:] = False
    assert merge_padded(merger, x_BHWC, real_BHW, 2, method.odd).isnan().all()


# Tiles, the connector, and the count of placeholders.


@both
@pytest.mark.parametrize("layer", [2, 4])
def test_the_language_model_reads_the_tiles_in_order(name, layer):
    """Of two prompts with three and one tiles; the connector by hand: 2 x 2 neighbours side by side, row-major."""
    model, processor = BUILDERS[name]()
    model.double()
    stock = deepcopy(model)
    laco.compress(model, processor, laco.LaCo(layer=layer, factor=3))
    tiny.scramble(model)
    pixels = torch.randn(2, 3, 3, 48, 48, dtype=torch.float64)
    pixels[1, 1:] = 0  # filled up, as the processor does
    tiles = [*pixels[0], pixels[1, 0]]
    wanted = []
    with torch.no_grad():
        for tile in tiles:
            x_hwC = features_by_hand(stock, model, tile)
            assert x_hwC.shape[:2] == (6, 6)
            for row in range(0, 6, 2):
                for column in range(0, 6, 2):
                    joined = torch.cat([x_hwC[row + dy, column + dx] for dy in (0, 1) for dx in (0, 1)])
                    wanted.append(stock.model.connector.modality_projection(joined))
        found = model.model.get_image_features(pixels, return_dict=True).pooler_output
    torch.testing.assert_close(torch.cat([*found]).flatten(0, -2), torch.stack(wanted), rtol=0, atol=1e-9)


@both
@pytest.mark.parametrize(("image_size", "patch_size", "scale", "factor"), [(48, 3, 2, 2), (48, 4, 3, 2), (45, 5, 3, 3)])
def test_placeholders_equal_features_for_many_sizes(name, image_size, patch_size, scale, factor):
    model, processor = BUILDERS[name](image_size, patch_size, scale_factor=scale, tiles=3)
    laco.compress(model, processor, laco.LaCo(layer=2, factor=factor))
    side = -(-(image_size // patch_size) // factor) // scale
    with torch.no_grad():
        tile = model.model.get_image_features(torch.randn(1, 1, 3, image_size, image_size), return_dict=True)
        assert tile.pooler_output[0].flatten(0, -2).shape[0] == side**2
    sizes, shapes = random.Random(0), set()
    for _ in range(100):
        height, width = sizes.randint(8, 6 * image_size), sizes.randint(8, 6 * image_size)
        batch = inputs(name, processor, ("<image>?", [tiny.picture(1, height, width)]))
        placeholders = int((batch["input_ids"] == model.config.image_token_id).sum())
        tiles = batch["pixel_values"].shape[1]
        assert batch["pixel_attention_mask"].all()
        assert placeholders == tiles * side**2, (height, width)
        shapes.add(tiles)
    assert shapes == {4, 7, 10}


@both
def test_the_text_around_tiles(name):
    """A wide picture of two tiles and the whole, 16 x 16 patches each, merged to 8 x 8, joined to 4 x 4."""
    model, processor = BUILDERS[name]()
    laco.compress(model, processor, laco.LaCo(layer=1))
    batch = inputs(name, processor, ("see <image> well", [tiny.picture(1, 40, 96)]))
    around, tile = "<fake_token_around_image>", "<image>" * 16
    wanted = f"see {around}<row_1_col_1>{tile}{around}<row_1_col_2>{tile}\n\n{around}<global-img>{tile}{around} well"
    assert processor.tokenizer.decode(batch["input_ids"][0]) == wanted


@both
def test_pictures_that_are_not_split(name):
    model, processor = BUILDERS[name]()
    processor.image_processor.do_image_splitting = False
    laco.compress(model, processor, laco.LaCo(layer=1))
    batch = inputs(name, processor, ("<image>", [tiny.picture(1, 40, 96)]))
    assert batch["pixel_values"].shape[1] == 1
    assert (batch["input_ids"] == model.config.image_token_id).sum() == 16
    with torch.no_grad():
        assert model(**batch).logits.isfinite().all()


# Limits.


@both
@pytest.mark.parametrize(
    ("side", "scale", "advice"),
    [
        # Idefics3-8B: 364 pixels in patches of 14.
        (26, 2, 'use factor 3 with odd="crop" or factor 4 with odd="crop" or factor 5 with odd="pad"'),
        # SmolVLM2-2.2B: 384 pixels in patches of 14.
        (27, 3, 'use factor 3 or factor 4 with odd="crop" or factor 5 with odd="pad"'),
        (2, 2, "no factor leaves a multiple of 2"),
    ],
)
def test_grids_that_the_connector_does_not_divide_are_refused(name, side, scale, advice):
    model, processor = BUILDERS[name](image_size=2 * side, patch_size=2, layers=1, scale_factor=scale)
    remain = -(-side // 2)
    with pytest.raises(LacoError) as error:
        laco.compress(model, processor, laco.LaCo(layer=1))
    assert str(error.value) == (
        f"the connector of {name} joins {scale} x {scale} visual tokens, which do not divide the"
        f" {remain} x {remain} that would remain; {advice}"
    )


@both
def test_the_advice_works(name):
    model, processor = BUILDERS[name](image_size=26, patch_size=1, layers=1)
    for factor, odd, tokens in [(3, "crop", 16), (4, "crop", 9), (5, "pad", 9)]:
        laco.compress(model, processor, laco.LaCo(layer=1, factor=factor, odd=odd))
        assert processor.image_seq_len == tokens
        batch = inputs(name, processor, ("<image>", [tiny.picture(1, 20, 20)]))
        with torch.no_grad():
            assert model(**batch).logits.isfinite().all()
        laco.decompress(model, processor)


@both
def test_processors_of_other_tiles_are_refused(name):
    model, processor = BUILDERS[name]()
    processor.image_processor.max_image_size = {"longest_edge": 24}
    with pytest.raises(LacoError, match="max_image_size of the image_processor is 24, the model needs 48"):
        laco.compress(model, processor, laco.LaCo(layer=1))


# Configurations and classes.


@both
def test_configurations_of_the_hub(name, tmp_path):
    """Their `vision_config` may have the whole model's `model_type`, and settings that are read by nobody."""
    model, processor = BUILDERS[name]()
    laco.save_pretrained(model, processor, tmp_path / "hub")
    path = tmp_path / "hub" / "config.json"
    config = json.loads(path.read_text())
    config["vision_config"] |= {"model_type": name, "use_base_siglip": False, "size": {"longest_edge": 96}}
    path.write_text(json.dumps(config))
    model, processor = laco.from_pretrained(tmp_path / "hub", laco.LaCo(layer=2))
    tiny.scramble(model)
    laco.save_pretrained(model, processor, tmp_path / "compressed")
    again, other = laco.from_pretrained(tmp_path / "compressed", attn_implementation="eager")
    assert type(again) is type(model)
    attentions = [layer.self_attn.config._attn_implementation for layer in family_of(again).layers(again)]
    assert attentions == ["eager"] * 4
    again.set_attn_implementation("sdpa")
    batch = inputs(name, other, ("<image>", [tiny.picture()]))
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)
    body, info = AutoModel.from_pretrained(tmp_path / "compressed", output_loading_info=True)
    assert type(body) is family_of(model).compressed_model
    assert not any(info.values())


@both
def test_a_model_made_from_a_compressed_configuration(name):
    model, processor = BUILDERS[name]()
    laco.compress(model, processor, laco.LaCo(layer=2))
    new = AutoModelForImageTextToText.from_config(deepcopy(model.config)).eval()
    assert type(new) is type(model)
    assert [type(part) for part in new.modules()] == [type(part) for part in model.modules()]
    new.load_state_dict(model.state_dict())
    batch = inputs(name, processor, ("<image>", [tiny.picture()]))
    with torch.no_grad():
        assert torch.equal(new(**batch).logits, model(**batch).logits)
    assert type(type(model.config)().vision_config) is type(model.config.vision_config)  # without any argument


# Costs.


@both
@pytest.mark.parametrize("methods", [[], [laco.LaCo(layer=1)], [laco.LDPv2(layer=2, factor=2), laco.LaCo(layer=4)]])
def test_flops_are_what_torch_counts(name, methods):
    model, processor = BUILDERS[name]()
    for method in methods:
        laco.compress(model, processor, method)
    model.set_attn_implementation("eager")
    batch = inputs(name, processor, ("<image>?", [tiny.picture(1, 40, 96)]))
    length, tiles = batch["input_ids"].shape[1], batch["pixel_values"].shape[1]
    visual = int((batch["input_ids"] == model.config.image_token_id).sum())
    flops = stage_flops(model, pictures=tiles, text_tokens=length - visual, logits=length)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**batch, use_cache=False)
    found = {part.rpartition(".")[2]: sum(ops.values()) for part, ops in counter.get_flop_counts().items()}
    assert flops.encoder == pytest.approx(found["vision_model"], rel=0.01)
    assert flops.projector == pytest.approx(found["connector"], rel=0.01)
    assert flops.forward == pytest.approx(counter.get_total_flops(), rel=0.01)
