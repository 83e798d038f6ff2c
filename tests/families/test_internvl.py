"""InternVL: an independent reference, counts of tiles and frames, positions, the slots that forget their class."""

import random
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    InternVLVisionModel,
    PreTrainedModel,
)

import laco
import tiny
from laco.cost import stage_flops
from laco.errors import LacoError
from laco.families import family_of
from laco.families.encoders.internvit import INTERNVIT, LacoInternVLVisionConfig, LacoInternVLVisionModel
from laco.families.internvl import LacoInternVLConfig, LacoInternVLForConditionalGeneration, LacoInternVLModel
from laco.families.steps import Step
from tiny.families.internvl import CASES, SIX_BILLION, internvl, video

CASE = CASES[0]
PROMPTS = [
    ("what is <image> here?", [tiny.picture(1, 50, 120)]),
    ("<image> and <image>", [tiny.picture(2, 90, 40), tiny.picture(3)]),
    ("no picture", []),
]
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "6B": {"vision": SIX_BILLION},
    "no positions, key biases": {"vision": {"use_absolute_position_embeddings": False, "attention_bias": True}},
    "last but one layer": {"vision_feature_layer": -2},
    "no pixel shuffle": {"downsample_ratio": 1.0},
    "quarter": {"image_size": 128, "downsample_ratio": 0.25},
}
variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


@torch.no_grad()
def logits(model: PreTrainedModel, batch: Any) -> Tensor:
    return model(**batch).logits[:, -1]


def windows(map_HWC: Tensor, factor: int, odd: str) -> Tensor:
    """(H, W, C) -> (h, w, R, C) token by token; beyond the edge the last row or column is taken again."""
    height, width = map_HWC.shape[:2]
    fit = (lambda side: side // factor) if odd == "crop" else (lambda side: -(-side // factor))
    return torch.stack(
        [
            torch.stack(
                [
                    torch.stack(
                        [
                            map_HWC[min(factor * i + di, height - 1), min(factor * j + dj, width - 1)]
                            for di in range(factor)
                            for dj in range(factor)
                        ]
                    )
                    for j in range(fit(width))
                ]
            )
            for i in range(fit(height))
        ]
    )


def merged_by_hand(compressor: Any, tokens_NC: Tensor, merger: Any) -> Tensor:
    side, factor = int(len(tokens_NC) ** 0.5), merger.factor
    windows_hwRC = windows(tokens_NC.unflatten(0, (side, side)), factor, merger.odd)
    if compressor.sees == "windows":
        return torch.stack([compressor(window_RC) for window_RC in windows_hwRC.flatten(0, 1)])
    h, w, _, width = windows_hwRC.shape
    fitted = torch.empty(1, h * factor, w * factor, width, dtype=tokens_NC.dtype)
    for index in range(factor * factor):
        fitted[0, index // factor :: factor, index % factor :: factor] = windows_hwRC[:, :, index]
    return compressor(fitted).flatten(0, 2)


def features_by_hand(stock: nn.Module, compressed: nn.Module, pixels_CHW: Tensor) -> Tensor:
    """What the language model reads of one picture, by a loop over the stock layers, the CLS token apart."""
    family, config = family_of(compressed), stock.config
    compressors = family.compressors(compressed)
    mergers = {step.layer: step.merger for step in family.steps(compressed.config)}
    tower = stock.model.vision_tower
    x_NC = tower.embeddings(pixels_CHW[None])[0]
    states = [x_NC]
    for count, layer in enumerate(tower.encoder.layer, start=1):
        x_NC = layer(x_NC[None])[0]
        if count in mergers:
            patches_NC = merged_by_hand(compressors[f"layers.{count}"], x_NC[1:], mergers[count])
            x_NC = torch.cat([x_NC[:1], patches_NC])
        states.append(x_NC)
    read = config.vision_feature_layer
    patches_NC = (tower.layernorm(x_NC) if read == -1 else states[read])[1:]
    side, joined = int(len(patches_NC) ** 0.5), round(1 / config.downsample_ratio)
    shuffled_NC = windows(patches_NC.unflatten(0, (side, side)), joined, "error").flatten(0, 1).flatten(-2)
    return stock.model.multi_modal_projector(shuffled_NC)


MERGERS = {
    "laco": (partial(laco.LaCo, shortcut="saliency", factor=2), 64),  # 8 -> 4
    "map": (partial(laco.LDPv2, factor=2), 64),
    "laco, 3": (partial(laco.LaCo, factor=3), 96),  # 12 -> 4
    "map, 3": (partial(laco.LDPv2, factor=3), 96),
    "odd, padded": (partial(laco.LaCo, factor=4), 112),  # 14 -> 4
    "odd, padded map": (partial(laco.LDPv2, factor=3), 80),  # 10 -> 4
    "odd, cropped": (partial(laco.LaCo, factor=3, odd="crop"), 64),  # 8 -> 2
}


@pytest.mark.parametrize("layer", [1, 2, 3, 4])
@pytest.mark.parametrize(("merger", "image_size"), MERGERS.values(), ids=MERGERS)
def test_features_equal_a_loop_over_stock_layers(merger, image_size, layer):
    check_against_the_loop(merger(layer=layer), {"image_size": image_size})


@variants
def test_features_of_other_configurations(variant):
    check_against_the_loop(laco.LaCo(layer=2, shortcut="saliency"), variant)


@torch.no_grad()
def check_against_the_loop(method: laco.Method, settings: dict[str, Any]) -> None:
    model, processor = internvl(**settings)
    model.double()
    stock = deepcopy(model)
    laco.compress(model, processor, method)
    family = tiny.scramble(model)
    size = model.config.vision_config.image_size
    pixels = torch.randn(2, 3, *size, dtype=torch.float64)
    features = model.model.get_image_features(pixels).pooler_output
    wanted = torch.stack([features_by_hand(stock, model, picture) for picture in pixels])
    torch.testing.assert_close(features, wanted, rtol=0, atol=1e-9)
    assert features.shape[1] == processor.image_seq_length == model.config.image_seq_length
    assert features.shape[1] == family.visual_tokens(model.config, family.grid(model.config))


@torch.no_grad()
def test_two_mergers_at_two_depths():
    model, processor = internvl(image_size=96)
    model.double()
    stock, pixels = deepcopy(model), torch.randn(2, 3, 96, 96, dtype=torch.float64)
    laco.compress(model, processor, laco.LaCo(layer=4, factor=3))
    laco.compress(model, processor, laco.LaCo(layer=1, factor=2))
    tiny.scramble(model)
    assert processor.image_seq_length == 1
    wanted = torch.stack([features_by_hand(stock, model, picture) for picture in pixels])
    features = model.model.get_image_features(pixels).pooler_output
    torch.testing.assert_close(features, wanted, rtol=0, atol=1e-9)


# Counts


@pytest.mark.parametrize(("image_size", "factor", "tokens"), [(64, 1, 16), (64, 2, 4), (80, 3, 4), (96, 3, 4)], ids=str)
def test_placeholders_equal_features_for_many_sizes(image_size, factor, tokens):
    model, processor = internvl(image_size)
    laco.compress(model, processor, laco.LaCo(layer=2, factor=factor))
    assert processor.image_seq_length == tokens
    sizes = random.Random(image_size + factor)
    seen = set()
    for _ in range(100):
        height, width = sizes.randint(8, 5 * image_size), sizes.randint(8, 5 * image_size)
        batch = CASE.inputs(processor, ("<image>?", [tiny.picture(0, height, width)]))
        placeholders = int((batch["input_ids"] == model.config.image_token_id).sum())
        assert placeholders == tokens * len(batch["pixel_values"]), (height, width)
        assert processor._get_num_multimodal_tokens([[height, width]]).num_image_tokens[0] == placeholders + 2
        seen.add(len(batch["pixel_values"]))
    assert seen == {1, 3, 4, 5}  # one tile alone, else with a thumbnail
    with torch.no_grad():
        assert model.model.get_image_features(batch["pixel_values"]).pooler_output.shape[1] == tokens
        model(**batch)  # which raises where the counts differ


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_videos(frames):
    """Frames are pictures, in the order of their numbers."""
    model, processor = internvl()
    laco.compress(model, processor, laco.LaCo(layer=2))
    family = tiny.scramble(model)
    batch = video(model, processor, frames, seed=0)
    tokens = family.visual_tokens(model.config, family.grid(model.config))
    assert (batch["input_ids"] == model.config.image_token_id).sum() == frames * tokens
    found = logits(model, batch)
    other = {**batch, "pixel_values": batch["pixel_values"].flip(0) if frames > 1 else batch["pixel_values"] + 1}
    assert (logits(model, other) - found).abs().max() > 1e-3


def test_videos_of_different_length_together():
    """The stock processor reads one number of frames for the whole batch; the model needs no such thing."""
    model, processor = internvl()
    laco.compress(model, processor, laco.LaCo(layer=2))
    tiny.scramble(model)
    videos = [video(model, processor, frames, seed=frames) for frames in (3, 2)]
    texts = [processor.tokenizer.decode(one["input_ids"][0]) for one in videos]
    words = processor.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    together = logits(model, {**words, "pixel_values": torch.cat([one["pixel_values"] for one in videos])})
    for one, found in zip(videos, together, strict=True):
        torch.testing.assert_close(logits(model, one)[0], found, rtol=0, atol=1e-5)


# Positions


@torch.no_grad()
def test_merged_positions_computed_by_hand():
    """A 4 x 4 grid with token i at position value i, layers that add nothing: means of 2 x 2 positions, CLS as it was.

    0  1  2  3
    4  5  6  7  ->  2.5  4.5
    8  9 10 11     10.5 12.5
    12 13 14 15
    """
    model, processor = internvl(image_size=32)
    tower = model.model.vision_tower
    for parameter in (tower.embeddings.cls_token, *tower.embeddings.patch_embeddings.parameters()):
        parameter.zero_()
    for layer in tower.encoder.layer:
        layer.lambda_1.zero_()
        layer.lambda_2.zero_()
    tower.embeddings.position_embeddings[0] = torch.tensor([-7.0, *range(16)])[:, None]
    laco.compress(model, processor, laco.AveragePool(layer=2))
    found = model.model.vision_tower(torch.zeros(1, 3, 32, 32), output_hidden_states=True)
    assert found.last_hidden_state[0, :, 0].tolist() == [-7, 2.5, 4.5, 10.5, 12.5]
    assert [len(state[0]) for state in found.hidden_states] == [17, 17, 5, 5, 5]


@torch.no_grad()
def test_pictures_of_another_size_get_the_positions_of_the_stock_encoder():
    model, processor = internvl()
    model.double()
    stock = deepcopy(model)
    laco.compress(model, processor, laco.LaCo(layer=1))
    tiny.scramble(model)
    picture = torch.randn(3, 96, 96, dtype=torch.float64)
    features = model.model.get_image_features(picture[None]).pooler_output[0]
    assert features.shape[0] == 9
    torch.testing.assert_close(features, features_by_hand(stock, model, picture), rtol=0, atol=1e-9)


# Saving and loading


@pytest.fixture
def compressed():
    model, processor = internvl()
    laco.compress(model, processor, laco.LaCo(depth=1 / 2, shortcut="saliency"))
    tiny.scramble(model)
    return model, processor


def test_a_saved_model_comes_back_compressed(compressed, tmp_path):
    """The stock configuration makes an uncompressed encoder of whatever dictionary it finds."""
    model, processor = compressed
    laco.save_pretrained(model, processor, tmp_path)
    again, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert type(again) is type(model) is LacoInternVLForConditionalGeneration
    assert type(again.model) is type(model.model) is LacoInternVLModel
    assert type(again.config) is type(model.config) is LacoInternVLConfig
    assert type(again.model.vision_tower) is type(model.model.vision_tower) is LacoInternVLVisionModel
    batch = CASE.inputs(AutoProcessor.from_pretrained(tmp_path), *PROMPTS)
    assert torch.equal(batch["input_ids"], CASE.inputs(processor, *PROMPTS)["input_ids"])
    assert torch.equal(logits(again, batch), logits(model, batch))
    assert type(AutoModel.from_pretrained(tmp_path)) is LacoInternVLModel

    # Whoever asks for the stock class is told, because the patch embedding does not fit.
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        InternVLForConditionalGeneration.from_pretrained(tmp_path)


def test_a_configuration_survives_as_a_dictionary(compressed):
    config = compressed[0].config
    again = LacoInternVLConfig.from_dict(config.to_dict())
    assert type(again.vision_config) is LacoInternVLVisionConfig
    assert again.to_dict() == config.to_dict()
    assert again.vision_config.steps == config.vision_config.steps


def in_hub_format(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights under the names of checkpoints on the hub, written by transformers 4."""
    renamed = {}
    for key, tensor in model.state_dict().items():
        if key.startswith("model."):  # the head is tied to the embeddings
            part = key.removeprefix("model.")
            renamed[part.replace("language_model.", "language_model.model.", 1)] = tensor
    return renamed


@pytest.mark.parametrize("hub", [False, True], ids=["new keys", "hub keys"])
def test_a_stock_checkpoint_leaves_only_the_compressor_missing(compressed, hub, tmp_path):
    model, processor = compressed
    config, mine = deepcopy(model.config), {key for key in model.state_dict() if ".compressor." in key}
    (step,) = family_of(model).steps(config)
    laco.decompress(model, processor)
    laco.save_pretrained(model, processor, tmp_path)
    if hub:
        save_file(in_hub_format(model), tmp_path / "model.safetensors", metadata={"format": "pt"})
    again, info = LacoInternVLForConditionalGeneration.from_pretrained(
        tmp_path, config=config, output_loading_info=True
    )
    assert info["missing_keys"] == mine
    assert not info["unexpected_keys"]
    laco.compress(model, processor, step.merger)
    batch = CASE.inputs(processor, *PROMPTS)
    for each in (model, again):
        for parameter in family_of(each).compressors(each)["layers.2"].parameters():
            nn.init.constant_(parameter, 0.01)
    assert torch.equal(logits(again, batch), logits(model, batch))


@variants
def test_decompression_gives_the_model_from_before(variant):
    model, processor = internvl(**variant)
    stock, number = deepcopy(model), processor.image_seq_length
    laco.compress(model, processor, laco.LaCo(layer=2))
    assert processor.image_seq_length == model.config.image_seq_length == number // 4
    laco.decompress(model, processor)
    assert processor.image_seq_length == model.config.image_seq_length == number
    assert model.config.to_dict() == stock.config.to_dict()
    assert type(model) is InternVLForConditionalGeneration
    assert type(model.config) is InternVLConfig
    assert [type(part) for part in model.modules()] == [type(part) for part in stock.modules()]
    batch = CASE.inputs(processor, *PROMPTS)
    assert torch.equal(logits(model, batch), logits(stock, batch))


def test_a_number_that_was_wrong_before_stays():
    model, processor = internvl()
    model.config.image_seq_length = 256
    laco.compress(model, processor, laco.LaCo(layer=2))
    assert model.config.image_seq_length == 256
    laco.decompress(model, processor)
    assert model.config.image_seq_length == 256


# Costs


@pytest.mark.parametrize("variant", [VARIANTS["default"], VARIANTS["6B"], VARIANTS["last but one layer"]])
@pytest.mark.parametrize("method", [None, laco.LaCo(layer=2), laco.LDPv2(layer=3)], ids=str)
def test_flops_are_what_torch_counts(variant, method):
    model, processor = internvl(**variant)
    if method:
        laco.compress(model, processor, method)
    model.set_attn_implementation("eager")
    batch = CASE.inputs(processor, ("<image>?", [tiny.picture(0, 60, 150)]))
    length, tiles = batch["input_ids"].shape[1], len(batch["pixel_values"])
    visual = int((batch["input_ids"] == model.config.image_token_id).sum())
    flops = stage_flops(model, pictures=tiles, text_tokens=length - visual, logits=length)
    with FlopCounterMode(display=False) as counter:
        model(**batch, use_cache=False)
    found = {name.rpartition(".")[2]: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    assert flops.encoder == pytest.approx(found["vision_tower"], rel=0.01)
    assert flops.projector == pytest.approx(found["multi_modal_projector"], rel=0.01)
    assert flops.forward == pytest.approx(counter.get_total_flops(), rel=0.01)


# The encoder alone


def lone_encoder(**settings: Any) -> tuple[InternVLVisionModel, LacoInternVLVisionModel]:
    stock = internvl(**settings)[0].model.vision_tower
    config = INTERNVIT.with_steps(stock.config, [Step.at(laco.LaCo(shortcut="saliency"), 2)])
    compressed = AutoModel.from_config(config).eval()
    missing, unexpected = compressed.load_state_dict(stock.state_dict(), strict=False)
    assert all(".compressor." in key for key in missing)
    assert not unexpected
    for parameter in compressed.compressors()[2].parameters():
        nn.init.normal_(parameter, std=0.3)
    return stock, compressed


@variants
def test_the_encoder_alone(variant, tmp_path):
    _, encoder = lone_encoder(**variant)
    assert type(encoder) is LacoInternVLVisionModel
    pixels = torch.randn(2, 3, *encoder.config.image_size)
    encoder.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert again.config.to_dict() == AutoConfig.from_pretrained(tmp_path).to_dict()
    with torch.no_grad():
        states = encoder(pixels, output_hidden_states=True).hidden_states
        grid = INTERNVIT.own_grid(encoder.config).tokens
        assert [state.shape[1] for state in states] == [grid + 1, grid + 1, *[grid // 4 + 1] * 3]
        assert torch.equal(again(pixels).last_hidden_state, encoder(pixels).last_hidden_state)


def test_the_encoder_exports_with_batches_of_any_size():
    _, encoder = lone_encoder()
    pixels = torch.randn(2, 3, 64, 64)
    batch = torch.export.Dim("batch", min=1, max=8)
    with torch.no_grad():
        wanted = encoder(pixels).last_hidden_state
        exported = torch.export.export(encoder, (pixels,), dynamic_shapes={"pixel_values": {0: batch}}).module()
        torch.testing.assert_close(exported(pixels).last_hidden_state, wanted, rtol=0, atol=1e-6)
        assert exported(torch.cat([pixels, pixels[:1]])).last_hidden_state.shape == (3, 17, 16)


def test_the_six_billion_encoder_has_its_shape():
    config = InternVLVisionConfig(
        hidden_size=3200,
        intermediate_size=12800,
        num_hidden_layers=45,
        num_attention_heads=25,
        layer_norm_eps=1e-6,
        **SIX_BILLION,
    )
    with torch.device("meta"):
        encoder = AutoModel.from_config(INTERNVIT.with_steps(config, [Step.at(laco.LaCo(), 11)]))
    own = sum(parameter.numel() for parameter in encoder.compressors()[11].parameters())
    assert own == 5 * 3200**2 + 2 * 3200
    assert encoder(torch.empty(1, 3, 448, 448, device="meta")).last_hidden_state.shape == (1, 257, 3200)


# What cannot be


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (laco.LaCo(factor=3), "joins 2 x 2 tokens, which do not divide the 3 x 3"),
        (laco.LaCo(factor=8), "joins 2 x 2 tokens, which do not divide the 1 x 1"),
        (laco.LaCo(factor=3, odd="error"), "factor 3 does not divide a grid side of 8 tokens"),
        (laco.LaCo(layer=5), "past the end"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_and_nothing_changes(method, message):
    model, processor = internvl()
    before, parts = model.config.to_dict(), [type(part) for part in model.modules()]
    with pytest.raises(LacoError, match=message):
        laco.compress(model, processor, method)
    assert model.config.to_dict() == before
    assert [type(part) for part in model.modules()] == parts
    assert processor.image_seq_length == 16
    with pytest.raises(LacoError, match=message):  # a plan of it is no better
        stage_flops(model, [method])


def test_a_merger_behind_what_is_read_is_refused():
    model, processor = internvl(vision_feature_layer=-2)
    with pytest.raises(LacoError, match="past the end: the model uses 3"):
        laco.compress(model, processor, laco.LaCo(layer=4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda processor: setattr(processor, "image_seq_length", 256), "image_seq_length is 256, the model needs 16"),
        (lambda processor: setattr(processor, "image_token_id", 1), "image_token_id is 1"),
        (
            lambda processor: setattr(processor.image_processor, "size", {"height": 48, "width": 64}),
            r"the picture size is \(48, 64\), the model needs \(64, 64\)",
        ),
    ],
)
def test_a_processor_of_another_model_is_refused(change, message):
    model, processor = internvl()
    change(processor)
    with pytest.raises(LacoError, match=message):
        laco.compress(model, processor, laco.LaCo(layer=2))


def test_pictures_must_be_square():
    """4 x 9 tokens would pass for 6 x 6."""
    _, encoder = lone_encoder()
    with pytest.raises(LacoError, match="square pictures alone; got 32 x 72 pixels"):
        encoder(torch.randn(1, 3, 32, 72))
    config = InternVLVisionConfig(num_hidden_layers=4, image_size=[32, 72], patch_size=8)
    with pytest.raises(LacoError, match=r"square grids alone; .* give 4 x 9 tokens"):
        INTERNVIT.with_steps(config, [Step.at(laco.LaCo(), 2)])


def test_sizes_may_be_numbers_pairs_or_lists():
    record = [Step.at(laco.LaCo(), 2).to_dict()]
    for size in (8, (8, 8), [8, 8]):
        config = LacoInternVLVisionConfig(image_size=64, patch_size=size, compression=record)
        assert tuple(config.patch_size) == (16, 16)
        assert tuple(config.embed_patch_size) == (8, 8)
        again = LacoInternVLVisionConfig(image_size=64, patch_size=16, embed_patch_size=size, compression=record)
        assert again.to_dict() == config.to_dict()
    with pytest.raises(LacoError, match="contradicts the compression"):
        LacoInternVLVisionConfig(image_size=64, patch_size=8, embed_patch_size=8, compression=record)
