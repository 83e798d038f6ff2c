"""The Pixtral encoder in LLaVA and in Mistral 3: pictures of any size packed into one sequence."""

import random
from copy import deepcopy
from itertools import product
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, AutoConfig, AutoModel, Mistral3Config, PixtralVisionConfig

import laco
import tiny
from laco.cost import stage_flops
from laco.errors import LacoError
from laco.families import family_of, family_of_config
from laco.families.encoders.pixtral import PIXTRAL, LacoPixtralVisionModel
from laco.families.steps import Step
from tiny.families.llava_pixtral import llava_pixtral
from tiny.families.mistral3 import mistral3
from tiny.parts import OLDEST

BUILDERS = {"llava": llava_pixtral, "mistral3": mistral3}
families = pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)


# The reference: every picture alone, its windows, masks and rotations from coordinates


def rotations(config: PixtralVisionConfig, positions: list[tuple[float, float]]) -> tuple[Tensor, Tensor]:
    """Of each head's width d, the frequencies theta^(-2j/d): even j turn with the row, odd j with the column."""
    width = config.hidden_size // config.num_attention_heads
    frequencies = [config.rope_parameters["rope_theta"] ** (-2 * j / width) for j in range(width // 2)]
    angles = [
        [y * frequency for frequency in frequencies[::2]] + [x * frequency for frequency in frequencies[1::2]]
        for y, x in positions
    ]
    angles_ND = torch.tensor(angles, dtype=torch.float64).repeat(1, 2)
    return angles_ND.cos(), angles_ND.sin()


def merged_by_hand(compressor: nn.Module, x_NC: Tensor, height: int, width: int, r: int) -> Tensor:
    if compressor.sees == "map":
        return compressor(x_NC.view(1, height, width, -1)).flatten(0, 2)
    merged = []
    for top, left in product(range(0, height, r), range(0, width, r)):
        window = [x_NC[(top + dy) * width + left + dx] for dy in range(r) for dx in range(r)]
        merged.append(compressor(torch.stack(window)))
    return torch.stack(merged)


def encoded_by_hand(stock: nn.Module, encoder: nn.Module, pixels: Tensor, centre: float = 0, anew: bool = False) -> Any:
    """Every state of one picture (3, H, W) by a loop over the stock layers; the last and its grid are the features.

    A merged token stands at the corner of its window, `centre` of the way to its centre; `anew` numbers them
    from 0 instead.
    """
    r, (_, height, width) = stock.patch_size, pixels.shape
    height, width = height // r, width // r
    mergers = {step.layer: (encoder.compressors()[step.layer], step.merger.factor) for step in encoder.config.steps}
    positions: list[tuple[float, float]] = list(product(range(height), range(width)))
    x_NC = stock.ln_pre(stock.patch_conv(pixels[None])[0].flatten(1).T)
    states = [x_NC]
    for count, layer in enumerate(stock.transformer.layers, start=1):
        x_NC = layer(x_NC[None], None, position_embeddings=rotations(stock.config, positions))[0]
        if count in mergers:
            compressor, r = mergers[count]
            x_NC = merged_by_hand(compressor, x_NC, height, width, r)
            corners = [positions[y * width + x] for y, x in product(range(0, height, r), range(0, width, r))]
            height, width = height // r, width // r
            positions = [(y + centre * (r - 1) / 2, x + centre * (r - 1) / 2) for y, x in corners]
            if anew:
                positions = list(product(range(height), range(width)))
        states.append(x_NC)
    return states, (height, width)


def pictures(*sizes: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Pixels of pictures at the top left of a batch of the largest size, noise around them; and their sizes."""
    height, width = (max(sides) for sides in zip(*sizes, strict=True))
    return torch.randn(len(sizes), 3, height, width, dtype=torch.float64), torch.tensor(sizes)


METHODS = {
    "layer 1": [laco.LaCo(layer=1, shortcut="saliency")],
    "layer 2, factor 3": [laco.LaCo(layer=2, factor=3, shortcut="saliency")],
    "layer 3": [laco.LaCo(layer=3)],
    "after the last": [laco.LaCo(depth=1, shortcut="saliency")],
    "map at layer 1": [laco.LDPv2(layer=1)],
    "map after the last": [laco.LDPv2(depth=1, factor=3)],
    "connector before the projector": [laco.TokenPacker()],
    "two mergers": [laco.LaCo(layer=1, factor=3), laco.LDPv2(layer=3)],
}


@families
@pytest.mark.parametrize("methods", METHODS.values(), ids=METHODS)
def test_states_equal_a_loop_over_stock_layers(build, methods):
    model, processor = build()
    model.double()
    family, stock = family_of(model), deepcopy(family_of(model).encoder(model))
    for method in methods:
        laco.compress(model, processor, method)
    tiny.scramble(model)
    encoder = family.encoder(model)
    unit = encoder.patch_size
    pixels, sizes = pictures((unit, 3 * unit), (2 * unit, 2 * unit), (3 * unit, unit))
    with torch.no_grad():
        states = encoder(pixels, image_sizes=sizes, output_hidden_states=True).hidden_states
        wanted = [
            encoded_by_hand(stock, encoder, picture[:, :height, :width])
            for picture, (height, width) in zip(pixels, sizes.tolist(), strict=True)
        ]
    assert [grid for _, grid in wanted] == [(1, 3), (2, 2), (3, 1)]
    # The stock norms compute in float32.
    for index, state in enumerate(states):
        torch.testing.assert_close(state[0], torch.cat([found[index] for found, _ in wanted]), rtol=0, atol=1e-5)
    assert len(states) == 5


def test_a_merged_token_stands_at_its_window_and_is_not_numbered_anew():
    model, processor = llava_pixtral()
    model.double()
    stock = deepcopy(model.model.vision_tower)
    laco.compress(model, processor, laco.LaCo(layer=1))
    tiny.scramble(model)
    encoder = model.model.vision_tower
    pixels, _ = pictures((24, 32))
    seen: list[Any] = []
    encoder.layers[1].register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    with torch.no_grad():
        features = encoder(pixels).last_hidden_state[0]
        centred, _ = encoded_by_hand(stock, encoder, pixels[0], centre=1)
        anew, _ = encoded_by_hand(stock, encoder, pixels[0], anew=True)
    corners = [(0, 0), (0, 2), (0, 4), (0, 6), (2, 0), (2, 2), (2, 4), (2, 6), (4, 0), (4, 2), (4, 4), (4, 6)]
    cosine, sine = seen[0]["position_embeddings"]
    torch.testing.assert_close(torch.stack([cosine, sine]), torch.stack(rotations(stock.config, corners)))
    torch.testing.assert_close(features, centred[-1], rtol=0, atol=1e-5)
    assert (features - anew[-1]).abs().max() > 1e-2


def test_masks_follow_the_merged_grids():
    model, processor = llava_pixtral()
    laco.compress(model, processor, laco.AveragePool(layer=1))
    encoder = model.model.vision_tower
    seen: list[Any] = []
    encoder.layers[1].register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    pixels, sizes = pictures((8, 16), (16, 16), (8, 8))
    encoder(pixels.float(), image_sizes=sizes)
    attends = seen[0]["attention_mask"][0, 0] == 0
    assert torch.equal(attends, torch.block_diag(torch.ones(2, 2), torch.ones(4, 4), torch.ones(1, 1)).bool())


def attention_by_bounds(module, query, key, value, attention_mask, scaling, cu_seq_lens_q, max_length_q, **kwargs):
    """What flash attention does with packed sequences."""
    assert attention_mask is None
    assert cu_seq_lens_q.dtype == torch.int32
    assert max_length_q == cu_seq_lens_q.diff().max()
    lengths = cu_seq_lens_q.diff().tolist()
    parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    attended = [nn.functional.scaled_dot_product_attention(*part, scale=scaling) for part in parts]
    return torch.cat(attended, dim=2).transpose(1, 2), None


def test_flash_attention_gets_the_bounds_of_the_pictures():
    AttentionInterface.register("flash_attention_by_hand", attention_by_bounds)
    model, processor = llava_pixtral()
    laco.compress(model, processor, laco.LaCo(layer=2))
    encoder = tiny.scramble(model).encoder(model)
    pixels, sizes = pictures((8, 32), (16, 16), (24, 8))
    with torch.no_grad():
        wanted = encoder(pixels.float(), image_sizes=sizes).last_hidden_state
        encoder.config._attn_implementation_internal = "flash_attention_by_hand"
        found = encoder(pixels.float(), image_sizes=sizes).last_hidden_state
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


# Placeholders


@families
@pytest.mark.parametrize("image_size", [48, 40])
@pytest.mark.parametrize("factor", [2, 3])
def test_placeholders_equal_features_for_many_sizes(build, image_size, factor):
    """Up to four times `image_size` pixels a side, so most pictures are made smaller, some to one window's height."""
    model, processor = build(image_size=image_size)
    laco.compress(model, processor, laco.AveragePool(layer=1, factor=factor))
    sizes = random.Random(0)
    unit = 4 * factor * processor.spatial_merge_size
    for _ in range(10):
        chosen = [(sizes.randint(5, 4 * image_size), sizes.randint(5, 4 * image_size)) for _ in range(15)]
        batch = processor(text=["<image>"] * 15, images=[tiny.picture(0, *size) for size in chosen], padding=True)
        placeholders = (batch["input_ids"] == model.config.image_token_id).sum(dim=-1).tolist()
        with torch.no_grad():
            features = model.model.get_image_features(batch["pixel_values"], image_sizes=batch["image_sizes"])
        assert [len(part) for part in features.pooler_output] == placeholders, chosen
        # A token behind every row, the last of which is the end.
        rows = [(height // unit, width // unit) for height, width in batch["image_sizes"].tolist()]
        assert placeholders == [height * width for height, width in rows]
        all_of_it = batch["attention_mask"].sum(dim=-1).tolist()
        assert all_of_it == [height * (width + 1) for height, width in rows]
        assert processor._get_num_multimodal_tokens(chosen).num_image_tokens == all_of_it
        # Enlarged by less than one window.
        assert (batch["image_sizes"] % unit == 0).all()
        assert (batch["image_sizes"] < image_size + unit).all()


@families
def test_rows_of_a_small_picture(build):
    """3 x 5 windows: the text that the language model reads, and the features in their places."""
    model, processor = build(image_size=80)
    laco.compress(model, processor, laco.AveragePool(layer=2))
    unit = 8 * processor.spatial_merge_size
    batch = processor(text="a<image>b", images=tiny.picture(1, 3 * unit, 5 * unit))
    row = "<image>" * 5
    assert processor.decode(batch["input_ids"][0]) == f"a{row}[IMG_BREAK]{row}[IMG_BREAK]{row}[IMG_END]b"
    placed: list[Tensor] = []
    language = model.model.language_model
    language.register_forward_pre_hook(
        lambda module, args, kwargs: placed.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**batch)
        (features,) = model.model.get_image_features(
            batch["pixel_values"], image_sizes=batch["image_sizes"]
        ).pooler_output
    assert torch.equal(placed[0][batch["input_ids"] == model.config.image_token_id], features)


@families
@pytest.mark.parametrize("factor", [2, 3])
def test_factor_one_and_identical_pictures(build, factor):
    """A picture in a batch of others, twice: the same features in both places, and with factor 1 the stock ones."""
    model, processor = build()
    pixels, sizes = (part for part in pictures((24, 48), (48, 24), (24, 48)))
    pixels[2] = pixels[0]
    with torch.no_grad():
        stock = model.model.get_image_features(pixels.float(), image_sizes=sizes).pooler_output
        laco.compress(model, processor, laco.LaCo(layer=1, factor=1))
        same = model.model.get_image_features(pixels.float(), image_sizes=sizes).pooler_output
        torch.testing.assert_close(torch.cat(same), torch.cat(stock), rtol=0, atol=1e-5)
        laco.compress(model, processor, laco.LaCo(layer=2, factor=factor))
        tiny.scramble(model)
        one, _, other = model.model.get_image_features(pixels.float(), image_sizes=sizes).pooler_output
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_llava_that_reads_other_layers():
    model, processor = llava_pixtral(vision_feature_layer=[2, -2])
    stock = deepcopy(model.double())
    with pytest.raises(LacoError, match="also reads the output of encoder layer 2"):
        laco.compress(model, processor, laco.LaCo(layer=3))
    laco.compress(model, processor, laco.LaCo(layer=2))
    tiny.scramble(model)
    pixels, sizes = pictures((16, 24))
    with torch.no_grad():
        (found,) = model.model.get_image_features(pixels, image_sizes=sizes).pooler_output
        states, _ = encoded_by_hand(stock.model.vision_tower, model.model.vision_tower, pixels[0, :, :16, :24])
        wanted = stock.model.multi_modal_projector(torch.cat([states[2], states[3]], dim=-1))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


# Classes, configurations, checkpoints


@families
def test_the_configuration_says_the_effective_patch_size(build, tmp_path):
    model, processor = build()
    before = model.config.to_dict()
    laco.compress(model, processor, laco.LaCo(layer=1))
    laco.compress(model, processor, laco.LaCo(layer=3, factor=3))
    vision, encoder = model.config.vision_config, model.model.vision_tower
    assert (vision.patch_size, vision.embed_patch_size) == (24, 4)
    assert (encoder.patch_size, encoder.patch_conv.kernel_size) == (24, (4, 4))
    assert (processor.patch_size, processor.spatial_merge_size) == (24, before.get("spatial_merge_size", 1))
    assert type(model) is family_of(model).stock
    assert encoder.config is vision
    assert all(layer.attention.config is vision for layer in encoder.layers)
    deepcopy(encoder).save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert type(again) is LacoPixtralVisionModel
    assert again.config.to_dict() == AutoConfig.from_pretrained(tmp_path).to_dict()
    assert (again.patch_size, again.patch_conv.kernel_size) == (24, (4, 4))
    laco.decompress(model, processor)
    assert model.config.to_dict() == before


@families
def test_hub_checkpoints_load(build, tmp_path):
    """Under the names that checkpoints on the hub have, written by transformers 4."""
    model, processor = build()
    prompt = ("a <image>", [tiny.picture(1, 60, 30)])
    stock = model(**tiny.CASES["llava-pixtral"].inputs(processor, prompt)).logits
    prefixes = {"model.language_model.": "language_model.model.", "model.": ""}
    renamed = {}
    for key, tensor in model.state_dict().items():
        if old := next((old for old in prefixes if key.startswith(old)), None):  # the head is tied
            renamed[prefixes[old] + key.removeprefix(old)] = tensor
    laco.save_pretrained(model, processor, tmp_path / "hub")
    save_file(renamed, tmp_path / "hub" / "model.safetensors", metadata={"format": "pt"})
    again, _ = laco.from_pretrained(tmp_path / "hub")
    assert torch.equal(again(**tiny.CASES["llava-pixtral"].inputs(processor, prompt)).logits, stock)

    laco.compress(model, processor, laco.LaCo(layer=2))
    third, info = type(model).from_pretrained(tmp_path / "hub", config=model.config, output_loading_info=True)
    assert info["missing_keys"] == {key for key in model.state_dict() if ".compressor." in key}
    assert not info["unexpected_keys"]
    batch = tiny.CASES["llava-pixtral"].inputs(processor, prompt)
    with torch.no_grad():
        model.model.vision_tower.compressors()[2].load_state_dict(
            third.model.vision_tower.compressors()[2].state_dict()
        )
        assert torch.equal(third(**batch).logits, model(**batch).logits)


def test_a_compressor_finds_its_way_back_at_a_factor_that_does_not_divide_the_largest_picture(tmp_path):
    model, processor = llava_pixtral(image_size=40)
    laco.compress(model, processor, laco.LaCo(layer=1, factor=3))
    laco.save_compressor(model, tmp_path)
    laco.load_compressor(*llava_pixtral(image_size=40), tmp_path)
    with pytest.raises(LacoError, match="its patch_size is 4, here it is 5"):
        laco.load_compressor(*llava_pixtral(image_size=40, patch_size=5), tmp_path)


@pytest.mark.xfail(OLDEST, reason="the stock encoder of transformers 5.16.1 does not export either", strict=True)
def test_the_encoder_exports_with_pictures_of_several_sizes():
    model, processor = llava_pixtral(layers=2)
    laco.compress(model, processor, laco.LaCo(layer=1))
    encoder = tiny.scramble(model).encoder(model).requires_grad_(False)
    pixels, sizes = pictures((24, 48), (48, 24))
    inputs = {"pixel_values": pixels.float(), "image_sizes": [tuple(size) for size in sizes.tolist()]}
    wanted = encoder(**inputs).last_hidden_state
    exported = torch.export.export(encoder, (), inputs).module()
    torch.testing.assert_close(exported(**inputs).last_hidden_state, wanted, rtol=0, atol=1e-6)


def test_traced_with_sizes_in_a_tensor_the_stock_encoder_fails_too():
    model, processor = llava_pixtral(layers=1)
    batch = tiny.CASES["llava-pixtral"].inputs(processor, ("<image>", [tiny.picture()]))
    encoder = model.model.vision_tower.requires_grad_(False)
    with pytest.raises(Exception, match=r"data-dependent|Dynamic slicing|unbacked"):
        torch.export.export(encoder, (), {key: batch[key] for key in ("pixel_values", "image_sizes")})


# Cost


@families
@pytest.mark.parametrize("methods", METHODS.values(), ids=METHODS)
def test_flops_are_what_torch_counts(build, methods):
    model, processor = build(image_size=96)
    config = deepcopy(model.config)
    for method in methods:
        laco.compress(model, processor, method)
    batch = processor(text="<image>what?", images=tiny.picture(1, 48, 96))
    length = batch["input_ids"].shape[1]
    visual = int((batch["input_ids"] == model.config.image_token_id).sum())
    size = tuple(batch["image_sizes"][0].tolist())
    flops = stage_flops(model, size=size, text_tokens=length - visual, logits=length)
    assert flops == stage_flops(config, methods, size=size, text_tokens=length - visual, logits=length)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**batch, use_cache=False)
    found = {name.rpartition(".")[2]: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    assert flops.encoder == pytest.approx(found["vision_tower"], rel=0.01)
    assert flops.projector == pytest.approx(found["multi_modal_projector"], rel=0.01)
    assert flops.forward == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_grids():
    config = PixtralVisionConfig(image_size=1024, patch_size=16)
    assert PIXTRAL.own_grid(config) == PIXTRAL.grid(config) == (1, 64, 64)
    compressed = PIXTRAL.with_steps(config, [Step.at(laco.LaCo(factor=3), 6)])
    assert (PIXTRAL.own_grid(compressed), PIXTRAL.grid(compressed)) == ((1, 66, 66), (1, 22, 22))
    assert PIXTRAL.own_grid(compressed, (48, 97)) == (1, 3, 9)
    assert PIXTRAL.grid(compressed, (48, 97)) == (1, 1, 3)
    assert PIXTRAL.with_steps(compressed, []).to_dict() == config.to_dict()


# What cannot be


@families
def test_a_picture_that_is_not_whole_effective_patches_is_refused(build):
    model, processor = build()
    laco.compress(model, processor, laco.LaCo(layer=1))
    encoder, (pixels, sizes) = model.model.vision_tower, pictures((8, 16), (12, 16))
    with pytest.raises(LacoError, match="whole patches of 8 x 8 pixels, which one of 12 x 16 is not"):
        encoder(pixels.float(), image_sizes=sizes)
    with pytest.raises(LacoError, match="one of 12 x 16"):
        encoder(pixels.float())


@families
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda processor: setattr(processor, "patch_size", 8), "patch_size is 8, the model needs 4"),
        (lambda processor: setattr(processor, "spatial_merge_size", 3), "spatial_merge_size is 3, the model needs"),
        (lambda processor: setattr(processor, "image_token_id", 1), "image_token_id is 1"),
    ],
)
def test_a_processor_of_another_model_is_refused(build, change, message):
    model, processor = build()
    change(processor)
    with pytest.raises(LacoError, match=message):
        laco.compress(model, processor, laco.LaCo(layer=2))
    assert type(model.model.vision_tower).__name__ == "PixtralVisionModel"


def test_the_rule_error_refuses_what_would_enlarge_the_largest_picture():
    model, processor = llava_pixtral(image_size=40)
    with pytest.raises(LacoError, match="factor 3 does not divide a grid side of 10"):
        laco.compress(model, processor, laco.LaCo(factor=3, odd="error"))
    laco.compress(model, processor, laco.LaCo(factor=2, odd="error"))


def test_a_configuration_that_contradicts_itself_is_refused():
    model, processor = llava_pixtral()
    laco.compress(model, processor, laco.LaCo(layer=1))
    data = model.config.vision_config.to_dict() | {"patch_size": 4}
    with pytest.raises(LacoError, match=r"patch_size 4 contradicts .* it must be 8"):
        type(model.config.vision_config)(**data)


def test_llava_knows_its_encoders_apart():
    assert family_of(llava_pixtral()[0]).name == "llava_pixtral"
    assert family_of(tiny.llava()[0]).name == "llava"
    assert family_of_config(llava_pixtral()[0].config).name == "llava_pixtral"
    assert family_of_config(Mistral3Config()).name == "mistral3"
