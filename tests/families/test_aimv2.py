"""AIMv2, alone and in LLaVA: no prefix, RMSNorm, a gated MLP, learned positions or sines for any square."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Aimv2VisionModel, CLIPImageProcessorPil

import laco
import tiny
from families.test_guards import by_hand
from laco.cost import stage_flops
from laco.families import family_of
from laco.families.encoders import encoder_of
from tiny.families.llava_aimv2 import aimv2

METHODS = {
    **{f"laco@{k}": laco.LaCo(layer=k, shortcut="saliency") for k in (1, 2, 3, 4)},
    "factor 3": laco.LaCo(layer=2, shortcut="saliency", factor=3),
    "map": laco.LDPv2(layer=2),
    "map, factor 3": laco.LDPv2(layer=3, factor=3),
}
CASES = {
    "even": ({"image_size": 48}, 48),
    "odd": ({"image_size": 40}, 40),
    "native": ({"is_native": True}, 48),
    "native, another size": ({"is_native": True}, 72),
}


def build(**config) -> Aimv2VisionModel:
    torch.manual_seed(0)
    return tiny.awake(Aimv2VisionModel(aimv2(**config))).double()


def states_by_hand(stock: nn.Module, compressed: nn.Module, pixels_CHW: Tensor) -> list[Tensor]:
    """Hidden states of one picture, then the normed last one, by a loop over the stock layers."""
    mergers = {step.layer: step.merger for step in compressed.config.steps}
    x_NC = stock.embeddings(pixels_CHW[None])[0]
    states = [x_NC]
    for count, layer in enumerate(stock.encoder.layers, start=1):
        x_NC = layer(x_NC[None], None)[0]
        if merger := mergers.get(count):
            x_NC = by_hand(compressed.encoder.layers[count - 1].compressor, x_NC, merger.factor)
        states.append(x_NC)
    return [*states, stock.rms_norm(x_NC)]


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize(("config", "picture"), CASES.values(), ids=CASES)
def test_states_equal_a_loop_over_stock_layers(method, config, picture):
    model = build(**config)
    stock = deepcopy(model)
    laco.compress(model, None, method)
    tiny.scramble(model)
    pixels = torch.randn(2, 3, picture, picture, dtype=torch.float64)
    with torch.no_grad():
        found = model(pixels, output_hidden_states=True)
        wanted = [states_by_hand(stock, model, picture) for picture in pixels]
        pooled = torch.cat([stock.head(last[None]) for *_, last in wanted])
    assert found.last_hidden_state.shape[1] == family_of(model).grid(model.config, (picture, picture)).tokens
    # Its RMSNorm computes in float32.
    for state, both in zip([*found.hidden_states, found.last_hidden_state], zip(*wanted, strict=True), strict=True):
        torch.testing.assert_close(state, torch.stack(both), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.pooler_output, pooled, rtol=0, atol=1e-5)


def test_two_mergers():
    model = build(image_size=96)
    stock = deepcopy(model)
    laco.compress(model, None, laco.LaCo(layer=3))
    laco.compress(model, None, laco.LDPv2(layer=1, factor=3))
    tiny.scramble(model)
    pixels = torch.randn(1, 3, 96, 96, dtype=torch.float64)
    with torch.no_grad():
        found = model(pixels, output_hidden_states=True)
        *_, wanted = states_by_hand(stock, model, pixels[0])
    assert [state.shape[1] for state in found.hidden_states] == [144, 16, 16, 4, 4]
    torch.testing.assert_close(found.last_hidden_state[0], wanted, rtol=0, atol=1e-5)


def test_only_native_checkpoints_take_other_sizes():
    size = {"height": 64, "width": 64}
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size=size)
    model = build(is_native=True)
    laco.compress(model, pictures, laco.LaCo(layer=1))
    assert model(torch.randn(1, 3, 64, 64).double()).last_hidden_state.shape[1] == 16
    model = build()
    with pytest.raises(laco.LacoError, match="pictures of 64 x 64 pixels, aimv2 takes 48 x 48"):
        laco.compress(model, pictures, laco.LaCo(layer=1))
    assert type(model) is Aimv2VisionModel


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("method", [None, laco.LaCo(layer=1)], ids=["stock", "compressed"])
def test_flops_with_gated_mlp_and_head(head, method):
    model = build(use_head=head, image_size=24, layers=2).float()
    assert encoder_of(model.config).mlp(model.config) == (model.encoder.layers[0].ffn.gate_proj.out_features, True)
    if method is not None:
        laco.compress(model, None, method)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(1, 3, 24, 24))
    flops = stage_flops(model)
    assert (flops.unread > 0) == head
    assert flops.encoder == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_placeholders_and_features_in_llava():
    """A picture is 6 x 6 patches of 8 pixels; merged, 3 x 3 effective patches of 16."""
    model, processor = tiny.CASES["llava-aimv2"].build()
    laco.compress(model, processor, laco.LaCo(depth=1 / 2))
    assert processor.patch_size == model.config.vision_config.patch_size == 16
    assert model.config.vision_config.embed_patch_size == 8
    batch = processor(text=["<image>"], images=[tiny.picture()], return_tensors="pt")
    assert (batch["input_ids"] == model.config.image_token_id).sum() == 9
    (features,) = model.model.get_image_features(batch["pixel_values"]).pooler_output
    assert len(features) == 9
