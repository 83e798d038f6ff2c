"""SigLIP 2 NaFlex: padded batches of pictures of any shape equal a loop over stock layers, each picture alone."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, Siglip2Config, Siglip2Model, Siglip2VisionConfig, Siglip2VisionModel

import laco
from laco.cost import encoder_layer_flops, merger_flops
from laco.cost.flops import linear_flops, pooling_head_flops
from laco.errors import LacoError
from laco.families.compat import checkpoint_activations
from laco.families.encoders.siglip2 import SIGLIP2, LacoSiglip2VisionModel
from laco.families.steps import Step
from laco.grid import Grid
from laco.methods import Merger
from laco.surgery import move_tensors

SHAPES = [(4, 6), (3, 5), (5, 2), (1, 7)]
LONGEST = 30  # more than any picture needs
METHODS: dict[str, list[Merger]] = {
    "layer 1": [laco.LaCo(layer=1, shortcut="saliency")],
    "layer 2, factor 3": [laco.LaCo(layer=2, factor=3, shortcut="saliency")],
    "layer 3, map": [laco.LDPv2(layer=3)],
    "layer 2, factor 3, map": [laco.LDPv2(layer=2, factor=3)],
    "after the last": [laco.LaCo(layer=4, shortcut="saliency")],
    "crop": [laco.LaCo(layer=2, odd="crop")],
    "resize": [laco.LaCo(layer=2, odd="resize")],
    "factor 3, resize, map": [laco.LDPv2(layer=2, factor=3, odd="resize")],
    "several": [laco.LaCo(layer=1), laco.LDPv2(layer=2, factor=3), laco.LaCo(layer=4)],
}
methods = pytest.mark.parametrize("mergers", METHODS.values(), ids=METHODS)


def config(**settings: Any) -> Siglip2VisionConfig:
    """4 x 4 learned positions, patches of 12 values."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    return Siglip2VisionConfig(**{**sizes, "patch_size": 2, "num_patches": 16, **settings})


def both(mergers: list[Merger], **settings: Any) -> tuple[Siglip2VisionModel, LacoSiglip2VisionModel]:
    """A stock encoder, and a compressed one around the same parameters with compressors that are not as they start."""
    torch.manual_seed(0)
    stock = Siglip2VisionModel(config(**settings)).eval()
    with torch.no_grad():
        for parameter in stock.parameters():  # biases are zero in a new model
            parameter.add_(0.1 * torch.randn_like(parameter))
    steps = [Step.at(merger, merger.layer) for merger in mergers]
    model = LacoSiglip2VisionModel(SIGLIP2.with_steps(stock.config, steps))
    move_tensors(stock, model)
    with torch.no_grad():
        for compressor in model.compressors().values():
            for parameter in compressor.parameters():
                parameter.normal_(std=0.3)
    return stock, model.eval()


def batch(shapes: list[tuple[int, int]], longest: int = LONGEST) -> dict[str, Tensor]:
    """Pictures of these shapes, the same however long the batch; after their end there is noise."""
    noise = torch.Generator().manual_seed(1)
    spatial_shapes = torch.tensor(shapes)
    pixels = torch.randn(len(shapes), 50, 12, generator=noise)[:, :longest]
    mask = torch.arange(longest) < spatial_shapes.prod(dim=-1, keepdim=True)
    return {"pixel_values": pixels, "pixel_attention_mask": mask.long(), "spatial_shapes": spatial_shapes}


def fitted(map_HWC: Tensor, factor: int, odd: str) -> Tensor:
    """The map with sides that the factor divides."""
    height, width = map_HWC.shape[:2]
    if odd == "crop":
        return map_HWC[: height // factor * factor, : width // factor * factor]
    size = (-(-height // factor) * factor, -(-width // factor) * factor)
    if odd == "resize":
        return F.interpolate(map_HWC.permute(2, 0, 1)[None], size, mode="bilinear")[0].permute(1, 2, 0)
    rows = [[map_HWC[min(y, height - 1), min(x, width - 1)] for x in range(size[1])] for y in range(size[0])]
    return torch.stack([torch.stack(row) for row in rows])


def merged_by_hand(compressor: nn.Module, map_HWC: Tensor, factor: int, odd: str) -> Tensor:
    map_HWC = fitted(map_HWC, factor, odd)
    if compressor.sees == "map":
        return compressor(map_HWC[None])[0]
    height, width = map_HWC.shape[:2]
    rows = []
    for y in range(0, height, factor):
        windows = [map_HWC[y : y + factor, x : x + factor].reshape(factor**2, -1) for x in range(0, width, factor)]
        rows.append(torch.stack([compressor(window) for window in windows]))
    return torch.stack(rows)


def states_by_hand(stock: Any, model: Any, pixels_NP: Tensor, shape: tuple[int, int]) -> list[Tensor]:
    """The hidden states of one picture without padding, as maps (H, W, C), and what the head makes of the last."""
    compressors, steps = model.compressors(), {step.layer: step.merger for step in model.config.steps}
    x_NC = stock.embeddings(pixels_NP[None, : shape[0] * shape[1]], torch.tensor([shape]))[0]
    states = [x_NC.view(*shape, -1)]
    for count, layer in enumerate(stock.encoder.layers, start=1):
        map_HWC = layer(states[-1].flatten(0, 1)[None], None)[0].view(*states[-1].shape)
        if count in steps:
            map_HWC = merged_by_hand(compressors[count], map_HWC, steps[count].factor, steps[count].odd)
        states.append(map_HWC)
    return [*states, stock.head(stock.post_layernorm(states[-1].flatten(0, 1)[None]))[0]]


@methods
@torch.no_grad()
def test_a_padded_batch_equals_a_loop_over_stock_layers(mergers):
    stock, model = both(mergers)
    stock.double(), model.double()
    shapes = [shape for shape in SHAPES if min(shape) > 1 or mergers[0].odd != "crop"]
    inputs = batch(shapes)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    found = model(**inputs, output_hidden_states=True)
    merged = model.merged_shapes(inputs["spatial_shapes"]).tolist()
    for index, (pixels, shape) in enumerate(zip(inputs["pixel_values"], shapes, strict=True)):
        *states, pooled = states_by_hand(stock, model, pixels, shape)
        for state, wanted in zip(found.hidden_states, states, strict=True):
            wanted = wanted.flatten(0, 1)
            torch.testing.assert_close(state[index, : len(wanted)], wanted, rtol=0, atol=1e-9)
        assert list(states[-1].shape[:2]) == merged[index]
        last = stock.post_layernorm(states[-1]).flatten(0, 1)
        torch.testing.assert_close(found.last_hidden_state[index, : len(last)], last, rtol=0, atol=1e-9)
        torch.testing.assert_close(found.pooler_output[index], pooled, rtol=0, atol=1e-9)
    assert found.last_hidden_state.shape[1] == max(height * width for height, width in merged)


@torch.no_grad()
def test_shapes_by_hand():
    """4 x 6, 3 x 5, 5 x 2, 1 x 7 in windows of 2 x 2: 2 x 3, 2 x 3, 3 x 1, 1 x 4; then in 3 x 3."""
    _, model = both([laco.LaCo(layer=1), laco.LaCo(layer=3, factor=3)])
    inputs = batch(SHAPES)
    assert model.merged_shapes(inputs["spatial_shapes"]).tolist() == [[1, 1], [1, 1], [1, 1], [1, 2]]
    states = model(**inputs, output_hidden_states=True).hidden_states
    assert [state.shape[1] for state in states] == [30, 6, 6, 2, 2]


@methods
@torch.no_grad()
def test_pictures_are_the_same_alone_and_with_others(mergers):
    _, model = both(mergers)
    shapes = SHAPES[:3]
    together, merged = model(**batch(shapes)), model.merged_shapes(torch.tensor(shapes)).prod(dim=-1)
    for index, shape in enumerate(shapes):
        for longest in (shape[0] * shape[1], 50):
            alone = {key: value[index : index + 1] for key, value in batch(shapes, longest).items()}
            found = model(**alone)
            assert found.last_hidden_state.shape[1] == merged[index]
            wanted = together.last_hidden_state[index, : merged[index]]
            torch.testing.assert_close(found.last_hidden_state[0], wanted, rtol=0, atol=1e-5)
            torch.testing.assert_close(found.pooler_output[0], together.pooler_output[index], rtol=0, atol=1e-5)


@torch.no_grad()
def test_factor_one_with_a_zero_mlp_is_the_stock_model():
    stock, model = both([laco.LaCo(layer=2, factor=1)])
    for compressor in model.compressors().values():
        compressor.reset_parameters()
    inputs = batch(SHAPES)
    wanted, found, inside = stock(**inputs), model(**inputs), inputs["pixel_attention_mask"].bool()[:, :24]
    assert not inside.all()
    torch.testing.assert_close(
        found.last_hidden_state[inside], wanted.last_hidden_state[:, :24][inside], rtol=0, atol=1e-6
    )
    torch.testing.assert_close(found.pooler_output, wanted.pooler_output, rtol=0, atol=1e-6)


@torch.no_grad()
def test_one_token():
    _, model = both([laco.LaCo(layer=2)], vision_use_head=False)
    found = model(**batch([(2, 2)], 4))
    assert found.pooler_output is None
    assert found.last_hidden_state.shape == (1, 1, 16)
    assert found.last_hidden_state.isfinite().all()


@pytest.mark.parametrize("mergers", [METHODS["layer 1"], METHODS["layer 3, map"]], ids=["windows", "map"])
def test_saved_loaded_and_from_stock_checkpoints(mergers, tmp_path):
    stock, model = both(mergers)
    model.save_pretrained(tmp_path / "compressed")
    again, info = AutoModel.from_pretrained(tmp_path / "compressed", output_loading_info=True)
    assert type(again) is LacoSiglip2VisionModel
    assert not any(info.values()), info
    inputs = batch(SHAPES)
    with torch.no_grad():
        assert torch.equal(again(**inputs).last_hidden_state, model(**inputs).last_hidden_state)

    stock.save_pretrained(tmp_path / "stock")
    new, info = AutoModel.from_pretrained(tmp_path / "stock", config=model.config, output_loading_info=True)
    assert info["missing_keys"] == {key for key in model.state_dict() if ".compressor." in key}
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert all(torch.equal(new.state_dict()[key], tensor) for key, tensor in stock.state_dict().items())


def test_checkpoints_of_pictures_and_text_load(tmp_path):
    """As on the hub: the vision encoder is a part of them."""
    text = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 9,
    }
    whole = Siglip2Model(Siglip2Config(text_config=text, vision_config=config().to_dict()))
    whole.save_pretrained(tmp_path)
    _, model = both(METHODS["layer 1"])
    new, info = LacoSiglip2VisionModel.from_pretrained(tmp_path, config=model.config, output_loading_info=True)
    assert info["missing_keys"] == {key for key in model.state_dict() if ".compressor." in key}
    for key, tensor in whole.vision_model.state_dict().items():
        assert torch.equal(new.state_dict()[key], tensor)


@methods
def test_gradients_and_their_checkpointing(mergers):
    _, model = both(mergers)
    shapes = [(7, 7), (5, 8)]
    inside = torch.arange(50) < model.merged_shapes(torch.tensor(shapes)).prod(dim=-1, keepdim=True)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        outputs = model(**batch(shapes, 50))
        features = outputs.last_hidden_state
        loss = features[inside[:, : features.shape[1]]].square().sum() + outputs.pooler_output.square().sum()
        loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    model.train()
    plain = gradients()
    # The softmax of attention does not see a bias of its keys.
    assert all(grad.abs().max() > 0 for name, grad in plain.items() if "encoder." in name and "k_proj.bias" not in name)
    checkpoint_activations(model)
    torch.testing.assert_close(gradients(), plain, rtol=1e-5, atol=1e-6)


@methods
@torch.no_grad()
def test_sdpa_equals_eager_and_bfloat16_is_close(mergers):
    _, model = both(mergers)
    inputs = batch(SHAPES[:3])
    sdpa = model(**inputs).pooler_output
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(**inputs).pooler_output, sdpa, rtol=0, atol=1e-5)
    model.set_attn_implementation("sdpa")
    assert (model.bfloat16()(**inputs).pooler_output.float() - sdpa).norm() < 0.05 * sdpa.norm()


class Features(nn.Module):
    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, pixel_values: Tensor, pixel_attention_mask: Tensor, spatial_shapes: Tensor) -> Tensor:
        return self.encoder(pixel_values, pixel_attention_mask, spatial_shapes).last_hidden_state


@torch.no_grad()
def test_one_program_for_batches_of_other_shapes():
    _, model = both([laco.LaCo(layer=1)], num_hidden_layers=2)
    encoder = Features(model)
    program = torch.export.export(encoder, tuple(batch([(4, 6), (3, 5)]).values()), strict=False).module()
    for shapes in ([(4, 6), (3, 5)], [(5, 5), (1, 1)], [(2, 9), (9, 2)]):
        inputs = batch(shapes).values()
        torch.testing.assert_close(program(*inputs), encoder(*inputs), rtol=0, atol=1e-6)


@methods
def test_flops_of_the_parts_are_what_torch_counts(mergers):
    _, model = both(mergers)
    model.set_attn_implementation("eager")
    settings, size = model.config, (10, 12)  # pixels, so 5 x 6 patches
    grid = SIGLIP2.own_grid(settings, size)
    assert grid == Grid(1, 5, 6)
    flops = linear_flops(grid.tokens, SIGLIP2.patch_values(settings), 16)
    at = {merger.layer: merger for merger in mergers}
    for layer in range(4):
        attended = SIGLIP2.attended(settings, grid, layer)
        hidden, gated = SIGLIP2.mlp(settings)
        flops += encoder_layer_flops(grid.tokens, 16, hidden, gated=gated, attended=attended)
        if merger := at.get(layer + 1):
            flops += merger_flops(merger, grid, 16)
            grid = merger.num_tokens(grid)
    assert grid == SIGLIP2.grid(settings, size)
    flops += pooling_head_flops(grid.tokens, 16, 32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**batch([(5, 6)], 30))
    assert flops == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_geometry():
    assert SIGLIP2.own_grid(config()) == Grid(1, 4, 4)
    assert SIGLIP2.geometry(config()) == {"patch_size": 2, "num_patches": 16}


def test_pictures_that_do_not_fit_are_refused():
    _, model = both([laco.LaCo(layer=2, odd="error")])
    model(**batch([(4, 6), (2, 2)]))
    with pytest.raises(LacoError, match="factor 2 does not divide a grid side of 5 tokens"):
        model(**batch([(4, 6), (5, 2)]))
    _, model = both([laco.LaCo(layer=2, odd="crop")])
    with pytest.raises(LacoError, match="would leave nothing of a grid side of 1 tokens"):
        model(**batch([(4, 6), (1, 7)]))
