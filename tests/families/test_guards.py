"""Features of LLaVA-like models equal an independent loop over stock layers; for more guards see test_matrix_guards."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

import laco
import tiny
from laco.families import family_of

CASES = {
    "layer 1": laco.LaCo(layer=1),
    "layer 2, saliency": laco.LaCo(layer=2, shortcut="saliency"),
    "half, factor 3": laco.LaCo(depth=1 / 2, factor=3),
    "half, map": laco.LDPv2(depth=1 / 2),
    "after the last": laco.LaCo(depth=1),
    "projector": laco.PixelShuffle(),
    "projector of four levels": laco.TokenPacker(),
}
matrix = pytest.mark.parametrize("vision", tiny.ENCODERS)
families = pytest.mark.parametrize("name", tiny.FAMILIES)
cases = pytest.mark.parametrize("method", CASES.values(), ids=CASES)


def by_hand(compressor: nn.Module, patches_NC: Tensor, factor: int) -> Tensor:
    """Merges one picture window by window, repeating the last row and column of an odd grid."""
    side = int(len(patches_NC) ** 0.5)
    rows = []
    for top in range(0, side, factor):
        row = []
        for left in range(0, side, factor):
            window = [
                patches_NC[min(top + dy, side - 1) * side + min(left + dx, side - 1)]
                for dy in range(factor)
                for dx in range(factor)
            ]
            row.append(torch.stack(window))
        rows.append(torch.stack(row))
    windows_hwRC = torch.stack(rows)
    if compressor.sees == "windows":
        return torch.stack([compressor(window) for window in windows_hwRC.flatten(0, 1)])
    h, w = windows_hwRC.shape[:2]
    fitted = torch.empty(h * factor, w * factor, patches_NC.shape[1], dtype=patches_NC.dtype)
    for index in range(factor * factor):
        fitted[index // factor :: factor, index % factor :: factor] = windows_hwRC[:, :, index]
    return compressor(fitted[None]).flatten(0, 2)


def features_by_hand(stock: nn.Module, compressed: nn.Module, pixels: Tensor) -> Tensor:
    """Features of one picture (1, 3, H, W) for the language model, by a loop over the stock layers."""
    family, config = family_of(compressed), compressed.config
    compressors = family.compressors(compressed)
    steps = {step.layer: step for step in family.steps(config)}
    tower, prefix = stock.model.vision_tower, family.prefix(config)
    x_NC = tower.embeddings(pixels)[0]
    if prefix:
        x_NC = tower.pre_layrnorm(x_NC)
    states = [x_NC]
    for count, layer in enumerate(tower.encoder.layers, start=1):
        x_NC = layer(x_NC[None], None)[0]
        if f"layers.{count}" in compressors:
            merged = by_hand(compressors[f"layers.{count}"], x_NC[prefix:], steps[count].merger.factor)
            x_NC = torch.cat([x_NC[:prefix], merged])
        states.append(x_NC)
    features_NC = torch.cat([states[i][prefix:] for i in family.read_layers(config)], dim=-1)
    if "projector" in compressors:
        (step,) = (step for step in steps.values() if step.place == "projector")
        return by_hand(compressors["projector"], features_NC, step.merger.factor)
    return stock.model.multi_modal_projector(features_NC)


@families
@matrix
@cases
@pytest.mark.parametrize("image_size", [48, 40], ids=["even grid", "odd grid"])
def test_features_equal_a_loop_over_stock_layers(name, vision, method, image_size):
    model, processor = tiny.FAMILIES[name](vision, image_size=image_size)
    model.double()
    stock = deepcopy(model)
    laco.compress(model, processor, method)
    family = tiny.scramble(model)
    pixels = torch.randn(2, 3, image_size, image_size, dtype=torch.float64)
    # Straight to the projector, which the families share; what they do behind it has tests of its own.
    with torch.no_grad():
        tower = family.encoder(model)(pixels, output_hidden_states=True)
        states = [tower.hidden_states[i][:, family.prefix(model.config) :] for i in family.read_layers(model.config)]
        features = family.projector(model)(torch.cat(states, dim=-1))
        wanted = torch.stack([features_by_hand(stock, model, picture[None]) for picture in pixels])
    assert features.shape[1] == family.grid(model.config).tokens
    torch.testing.assert_close(features, wanted, rtol=0, atol=1e-9)


@families
@matrix
def test_two_mergers_at_two_depths(name, vision):
    model, processor = tiny.FAMILIES[name](vision, image_size=96)
    model.double()
    stock, pixels = deepcopy(model), torch.randn(2, 3, 96, 96, dtype=torch.float64)
    laco.compress(model, processor, laco.LaCo(layer=3, factor=2))
    first = family_of(model).compressors(model)["layers.3"]
    laco.compress(model, processor, laco.LaCo(layer=1, factor=2))
    laco.compress(model, processor, laco.PixelShuffle(factor=3))
    family = tiny.scramble(model)
    assert family.compressors(model)["layers.3"].fc1.weight is first.fc1.weight
    assert family.grid(model.config) == (1, 1, 1)
    with torch.no_grad():
        states = family.encoder(model)(pixels, output_hidden_states=True).hidden_states
        features = family.projector(model)(states[-1][:, family.prefix(model.config) :])
        wanted = torch.stack([features_by_hand(stock, model, picture[None]) for picture in pixels])
    assert [state.shape[1] - family.prefix(model.config) for state in states] == [144, 36, 36, 9, 9]
    torch.testing.assert_close(features, wanted, rtol=0, atol=1e-9)
    batch = tiny.inputs(processor, ("a <image> b", [tiny.picture()]))
    model(**{k: v.double() if v.is_floating_point() else v for k, v in batch.items()})
    laco.decompress(model, processor)
    assert model.config.to_dict() == stock.config.to_dict()
