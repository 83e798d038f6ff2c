"""DINOv2, without and with registers: prefix tokens, SwiGLU, positions for any square, masks that export makes."""

from copy import deepcopy

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model, Dinov2WithRegistersModel, PreTrainedModel

import laco
import tiny
from families.test_guards import by_hand
from laco.cost import stage_flops
from laco.families import family_of
from laco.families.encoders import encoder_of
from tiny.families.llava_aimv2 import dinov2, dinov2_with_registers

MODELS = {
    "plain": lambda **config: Dinov2Model(dinov2(**config)),
    "swiglu": lambda **config: Dinov2Model(dinov2(use_swiglu_ffn=True, **config)),
    "registers": lambda **config: Dinov2WithRegistersModel(dinov2_with_registers(**config)),
}
PREFIX = {"plain": 1, "swiglu": 1, "registers": 4}
METHODS = {
    **{f"laco@{k}": laco.LaCo(layer=k, shortcut="saliency") for k in (1, 2, 3, 4)},
    "factor 3": laco.LaCo(layer=2, shortcut="saliency", factor=3),
    "map": laco.LDPv2(layer=2),
    "map, factor 3": laco.LDPv2(layer=3, factor=3),
}
models = pytest.mark.parametrize("name", MODELS)


def build(name: str, **config) -> PreTrainedModel:
    torch.manual_seed(0)
    return tiny.awake(MODELS[name](**config)).double()


def states_by_hand(stock: nn.Module, compressed: nn.Module, pixels_CHW: Tensor) -> list[Tensor]:
    """Hidden states of one picture, then the normed last one, by a loop over the stock layers."""
    prefix, steps = 1 + getattr(stock.config, "num_register_tokens", 0), compressed.config.steps
    mergers = {step.layer: step.merger for step in steps}
    x_NC = stock.embeddings(pixels_CHW[None])[0]
    states = [x_NC]
    for count, layer in enumerate(stock.encoder.layer, start=1):
        x_NC = layer(x_NC[None])[0]
        if merger := mergers.get(count):
            merged = by_hand(compressed.encoder.layer[count - 1].compressor, x_NC[prefix:], merger.factor)
            x_NC = torch.cat([x_NC[:prefix], merged])
        states.append(x_NC)
    return [*states, stock.layernorm(x_NC)]


@models
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize(("image_size", "picture"), [(48, 48), (40, 40), (48, 72)], ids=["even", "odd", "another size"])
def test_states_equal_a_loop_over_stock_layers(name, method, image_size, picture):
    model = build(name, image_size=image_size)
    stock = deepcopy(model)
    laco.compress(model, None, method)
    tiny.scramble(model)
    pixels = torch.randn(2, 3, picture, picture, dtype=torch.float64)
    with torch.no_grad():
        found = model(pixels, output_hidden_states=True)
        wanted = [states_by_hand(stock, model, picture) for picture in pixels]
    grid = family_of(model).grid(model.config, (picture, picture))
    assert found.last_hidden_state.shape[1] == PREFIX[name] + grid.tokens
    assert torch.equal(found.pooler_output, found.last_hidden_state[:, 0])
    for state, both in zip([*found.hidden_states, found.last_hidden_state], zip(*wanted, strict=True), strict=True):
        torch.testing.assert_close(state, torch.stack(both), rtol=0, atol=1e-9)


@models
def test_two_mergers(name):
    model = build(name, image_size=96)
    stock = deepcopy(model)
    laco.compress(model, None, laco.LaCo(layer=3))
    laco.compress(model, None, laco.LDPv2(layer=1, factor=3))
    tiny.scramble(model)
    pixels = torch.randn(1, 3, 96, 96, dtype=torch.float64)
    with torch.no_grad():
        found = model(pixels, output_hidden_states=True)
        *_, wanted = states_by_hand(stock, model, pixels[0])
    counts = [state.shape[1] - PREFIX[name] for state in found.hidden_states]
    assert counts == [144, 16, 16, 4, 4]
    torch.testing.assert_close(found.last_hidden_state[0], wanted, rtol=0, atol=1e-9)


def test_layer_scale_and_masked_patches_matter():
    model = build("plain")
    laco.compress(model, None, METHODS["laco@2"])
    tiny.scramble(model)
    pixels, hidden = torch.randn(1, 3, 48, 48).double(), torch.arange(36)[None] < 9
    with torch.no_grad():
        model.embeddings.mask_token.normal_()
        before = model(pixels).last_hidden_state
        assert (model(pixels, bool_masked_pos=hidden).last_hidden_state - before).abs().max() > 1e-2
        model.encoder.layer[3].layer_scale1.lambda1.mul_(0.1)
        assert (model(pixels).last_hidden_state - before).abs().max() > 1e-2


# Masks: the stock model makes one of ones where it is exported --------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "registers"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_export(name, attention):
    model = build(name, layers=2).float().requires_grad_(False)
    model.set_attn_implementation(attention)
    laco.compress(model, None, METHODS["laco@1"])
    tiny.scramble(model)
    pixels = torch.randn(2, 3, 48, 48)
    program = torch.export.export(model, (pixels,), strict=False)
    torch.testing.assert_close(
        program.module()(pixels).last_hidden_state, model(pixels).last_hidden_state, rtol=0, atol=1e-5
    )


@models
def test_masks_from_outside_are_refused(name):
    model = build(name)
    laco.compress(model, None, METHODS["laco@2"])
    pixels = torch.randn(1, 3, 48, 48).double()
    mask = torch.ones(1, 36 + PREFIX[name])
    for call in (lambda: model(pixels, attention_mask=mask), lambda: model(pixels, None, mask)):
        with pytest.raises(laco.LacoError, match="dinov2 takes no attention_mask"):
            call()


# Sizes --------------------------------------------------------------------------------------------------------------


def test_the_processor_of_the_hub_checkpoints():
    """Their configurations say 518 pixels, 37 x 37 patches; their processors make pictures of 224, 16 x 16."""
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=518)
    model = Dinov2Model(config)
    size = {"height": 224, "width": 224}
    laco.compress(model, BitImageProcessorPil(size={"shortest_edge": 256}, crop_size=size), laco.LaCo(layer=1))
    family = family_of(model)
    assert family.grid(model.config) == (1, 19, 19)
    assert model.config.patch_size == 27  # 518 // 27 = 19, by which models around it count tokens
    assert family.grid(model.config, (224, 224)) == (1, 8, 8)
    assert model(torch.randn(1, 3, 224, 224)).last_hidden_state.shape[1] == 1 + 64
    assert stage_flops(model, size=(224, 224)).encoder < stage_flops(model).encoder / 4


@pytest.mark.parametrize("size", [(32, 72), (48, 40)], ids=["4 x 9 are as many as 6 x 6", "6 x 5"])
@models
def test_oblong_pictures_are_refused(name, size):
    model = build(name)
    laco.compress(model, None, METHODS["laco@2"])
    with pytest.raises(laco.LacoError, match=rf"square pictures alone; got {size[0]} x {size[1]} pixels"):
        model(torch.randn(1, 3, *size).double())


@models
def test_mlp_and_prefix_are_what_the_layers_have(name):
    model = build(name, layers=1)
    kind = encoder_of(model.config)
    *_, last = (part for part in model.encoder.layer[0].mlp.modules() if isinstance(part, nn.Linear))
    assert kind.mlp(model.config) == (last.in_features, name != "plain")
    assert kind.prefix(model.config) == PREFIX[name]


# Checkpoints --------------------------------------------------------------------------------------------------------

OLD = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.down_proj": "mlp.weights_out",
}


def in_hub_format(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights under the names that checkpoints on the hub have, written by transformers 4."""
    renamed = {}
    for key, tensor in model.state_dict().items():
        for new, old in OLD.items():
            key = key.replace(new, old)
        renamed[key] = tensor
    for key in [key for key in renamed if "mlp.gate_proj" in key]:
        gate, up = renamed.pop(key), renamed.pop(key.replace("gate", "up"))
        renamed[key.replace("gate_proj", "weights_in")] = torch.cat([gate, up])
    return renamed


@models
def test_hub_checkpoints_load_into_a_compressed_configuration(name, tmp_path):
    model = build(name).float()
    stock, pixels = deepcopy(model), torch.randn(1, 3, 48, 48)
    laco.save_pretrained(model, None, tmp_path)
    old = in_hub_format(model)
    assert not any("q_proj" in key or "gate" in key for key in old)
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    laco.compress(model, None, laco.LaCo(layer=2))
    again, info = type(model).from_pretrained(
        tmp_path, config=deepcopy(model.config), dtype=torch.float32, output_loading_info=True
    )
    assert info["missing_keys"] == {key for key in model.state_dict() if ".compressor." in key}
    assert not info["unexpected_keys"]
    laco.decompress(again, None)
    assert torch.equal(again(pixels).last_hidden_state, stock(pixels).last_hidden_state)


def test_device_maps_keep_merging_layers_whole():
    model = build("registers")
    laco.compress(model, None, laco.LaCo(layer=2))
    assert type(model.encoder.layer[1]).__name__ in model._no_split_modules
