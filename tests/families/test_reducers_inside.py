"""Reducers inside vision encoders: equal to a loop over stock layers with the reducer called on tensors, in all ways in
which an encoder is used.
"""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Aimv2VisionConfig,
    AutoModel,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    Idefics3VisionConfig,
    InternVLVisionConfig,
    PreTrainedModel,
    SiglipVisionConfig,
)
from transformers.models.aimv2.modeling_aimv2 import Aimv2RMSNorm
from transformers.models.internvl.modeling_internvl import InternVLVisionRMSNorm
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig

import laco
from laco.attention import rows
from laco.errors import LacoError
from laco.families.compat import checkpoint_activations
from laco.families.encoders import ENCODERS, encoder_of
from laco.families.encoders.reducing import STATES
from laco.families.steps import Step
from laco.methods.evit import EViT
from laco.methods.folder import Folder
from laco.methods.ipcv import IPCV
from laco.methods.reducer import LayerSignals, Reducer, State
from laco.methods.spvit import SPViT
from laco.methods.tome import ToMe
from tiny.families.vision_encoder import tower as tiny_tower
from tiny.parts import awake

LAYERS, SIDE = 6, 6
exact = {"rtol": 1e-9, "atol": 1e-9, "equal_nan": True}

COMMON = {
    "hidden_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "image_size": 8 * SIDE,
    "patch_size": 8,
}
PLAIN = COMMON | {"intermediate_size": 32}
CONFIGS: dict[str, Callable[[], Any]] = {
    "siglip": lambda: SiglipVisionConfig(**PLAIN, vision_use_head=False),
    "clip": lambda: CLIPVisionConfig(**PLAIN),
    "internvit": lambda: InternVLVisionConfig(**PLAIN, use_qk_norm=True, use_mean_pooling=False, attention_bias=True),
    "dinov2": lambda: Dinov2Config(**COMMON, mlp_ratio=2),
    "dinov2_with_registers": lambda: Dinov2WithRegistersConfig(**COMMON, mlp_ratio=2, num_register_tokens=3),
    "aimv2": lambda: Aimv2VisionConfig(**PLAIN, use_head=False),
    "idefics3": lambda: Idefics3VisionConfig(**PLAIN),
    "smolvlm": lambda: SmolVLMVisionConfig(**PLAIN),
}
REDUCERS: dict[str, Reducer] = {
    "tome": ToMe(r=5),
    "tome, schedule": ToMe(r=4, inflection=-0.5, proportional=False, layer=2),
    "evit": EViT(keep=0.6),
    "evit, dropping": EViT(keep=0.6, fuse=False),
    "spvit": SPViT(),
    "folder": Folder(keep=0.2, minimum=0),
    "folder, features": Folder(keep=0.2, form="features"),
    "ipcv": IPCV(keep=0.4, stabilise=2, neighbours=3),
}
towers = pytest.mark.parametrize("name", CONFIGS)
some_towers = pytest.mark.parametrize("name", ["siglip", "clip", "idefics3"])
reducers = pytest.mark.parametrize("reducer", REDUCERS.values(), ids=REDUCERS)


@pytest.fixture(autouse=True)
def norms_in_double(monkeypatch):
    """Some norms round to single precision, which makes a large difference of the smallest one."""

    def forward(norm: Any, x: Tensor) -> Tensor:
        return norm.weight * x * (x.pow(2).mean(dim=-1, keepdim=True) + norm.variance_epsilon).rsqrt()

    for kind in (Aimv2RMSNorm, InternVLVisionRMSNorm):
        monkeypatch.setattr(kind, "forward", forward)


def stock_tower(name: str, **settings: Any) -> PreTrainedModel:
    config = CONFIGS[name]()
    for key, value in settings.items():
        setattr(config, key, value)
    return awake(AutoModel.from_config(config) if name != "idefics3" else encoder_of(config).stock(config)).double()


def reduced(stock: PreTrainedModel, reducer: Reducer | None, **settings: Any) -> PreTrainedModel:
    """The compressed encoder with the stock one's weights; selectors are random, and keep about two tokens of three."""
    kind = encoder_of(stock.config)
    tower = AutoModel.from_config(kind.with_reducer(stock.config, reducer, **settings)).double()
    missing, unexpected = tower.load_state_dict(stock.state_dict(), strict=False)
    assert not unexpected
    assert all(".compressor." in key for key in missing)
    tower.eval()
    for selector in tower.compressors().values():
        for parameter in selector.parameters():
            nn.init.normal_(parameter, std=0.5)
        balance(tower, selector)
    return tower


@torch.no_grad()
def balance(tower: PreTrainedModel, selector: nn.Module) -> None:
    seen: list[Tensor] = []
    hook = selector.register_forward_hook(lambda _, args, out: seen.append(out[0]))
    tower(pictures(6))
    hook.remove()
    keep, drop = seen[0].flatten(0, 1).unbind(dim=1)
    selector.score[-1].bias[0] -= (keep - drop).quantile(1 / 3)


def pictures(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 8 * SIDE, 8 * SIDE, dtype=torch.float64)


# The layers written out ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Names:
    """Parts of a stock layer."""

    norm1: str
    attention: str
    norm2: str
    mlp: str
    out: str = "out_proj"
    scale1: str = ""
    scale2: str = ""
    last_norm: str = ""


CLIP_LIKE = Names("layer_norm1", "self_attn", "layer_norm2", "mlp")
DINO = Names(
    "norm1", "attention", "norm2", "mlp", "o_proj", "layer_scale1.lambda1", "layer_scale2.lambda1", "layernorm"
)
NAMES = {
    "siglip": Names("layer_norm1", "self_attn", "layer_norm2", "mlp", last_norm="post_layernorm"),
    "clip": CLIP_LIKE,
    "internvit": Names(
        "layernorm_before",
        "attention",
        "layernorm_after",
        "mlp",
        "projection_layer",
        "lambda_1",
        "lambda_2",
        "layernorm",
    ),
    "dinov2": DINO,
    "dinov2_with_registers": DINO,
    "aimv2": Names("rms_norm1", "attention", "rms_norm2", "ffn", last_norm="rms_norm"),
    "idefics3": Names("layer_norm1", "self_attn", "layer_norm2", "mlp", last_norm="post_layernorm"),
    "smolvlm": Names("layer_norm1", "self_attn", "layer_norm2", "mlp", last_norm="post_layernorm"),
}


def part(module: nn.Module, path: str) -> Any:
    for name in path.split(".") if path else ():
        module = getattr(module, name)
    return module if path else 1


class Written:
    """A stock layer, half by half."""

    def __init__(self, layer: nn.Module, names: Names):
        self.layer, self.names = layer, names
        attention = part(layer, names.attention)
        if hasattr(attention, "attention"):  # DINOv2 in transformers 5.16
            inner = attention.attention
            self.projections, self.out = (inner.query, inner.key, inner.value), attention.output.dense
        else:
            self.projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            self.out = getattr(attention, names.out)
        self.norms = (getattr(attention, "q_norm", None), getattr(attention, "k_norm", None), None)

    def attend(self, x: Tensor, reducer: Reducer, state: State) -> tuple[Tensor, LayerSignals]:
        normed, heads = part(self.layer, self.names.norm1)(x), []
        for project, norm in zip(self.projections, self.norms, strict=True):
            y = project(normed) if norm is None else norm(project(normed))
            heads.append(y.view(*y.shape[:2], 2, 8).transpose(1, 2))
        q, k, v = heads
        weights = reducer.attention_weights(q @ k.mT / math.sqrt(8), state)
        y = self.out((weights @ v).transpose(1, 2).flatten(2))
        saliency = {"cls_attention": weights[:, :, 0]} if state.prefix else {"received": weights.mean(dim=(1, 2))}
        return x + y * part(self.layer, self.names.scale1), LayerSignals(keys=k, **saliency)

    def feed(self, x: Tensor) -> Tensor:
        y = part(self.layer, self.names.mlp)(part(self.layer, self.names.norm2)(x))
        return x + y * part(self.layer, self.names.scale2)


def by_hand(
    name: str, stock: PreTrainedModel, tower: PreTrainedModel, x: Tensor, last: int = LAYERS
) -> tuple[Tensor, State]:
    """Tokens (B, prefix + K, C) behind `last` layers, of those (B, S, C) that enter layer 0; what is known of them."""
    reducer, kind = tower.config.reducing_method, encoder_of(stock.config)
    state = reducer.start(x, LAYERS, last, kind.prefix(stock.config))
    for index, layer in enumerate(kind.layers(stock)[:last]):
        written = Written(layer, NAMES[name])
        x, state = reducer.before_layer(x, state, index, tower.compressors().get(index))
        x, signals = written.attend(x, reducer, state)
        x, state = reducer.before_mlp(x, state, index, signals)
        x = written.feed(x)
    return reducer.after_layers(x, state)


def placed(x: Tensor, state: State) -> Tensor:
    """(B, S, C), row by row: NaN where nothing is."""
    full = torch.full((*state.slot_BS.shape, x.shape[2]), torch.nan, dtype=x.dtype)
    for picture in range(len(x)):
        for token in range(x.shape[1]):
            if any(slot == token for slot in state.slot_BS[picture].tolist()):  # it has a source
                full[picture, state.place_BN[picture, token]] = x[picture, token]
    return full


def entering(stock: PreTrainedModel, pixels: Tensor) -> Tensor:
    return stock(pixels, output_hidden_states=True).hidden_states[0]


def there(x: Tensor) -> Tensor:
    """(B, S) which rows are tokens; a row is NaN in all channels or in none."""
    absent = x.isnan()
    assert torch.equal(absent.any(dim=-1), absent.all(dim=-1))
    return ~absent[..., 0]


# The features ---------------------------------------------------------------------------------------------------------


@towers
@reducers
@torch.no_grad()
def test_features_equal_a_loop_over_stock_layers(name, reducer):
    stock = stock_tower(name)
    tower, pixels = reduced(stock, reducer), pictures(6)
    found = tower(pixels).last_hidden_state
    norm = part(stock, NAMES[name].last_norm)
    for picture, x in enumerate(entering(stock, pixels)):
        y, state = by_hand(name, stock, tower, x[None])
        (wanted,) = placed(y if norm == 1 else norm(y), state)
        torch.testing.assert_close(found[picture], wanted, **exact)
    count = there(found).sum(dim=1) - encoder_of(stock.config).prefix(stock.config)
    if reducer.static_count:
        assert set(count.tolist()) == {reducer.num_tokens(SIDE * SIDE, LAYERS)}
    else:
        assert 4 < count.max() < SIDE * SIDE
        assert len(set(count.tolist())) > 1


@towers
@reducers
@torch.no_grad()
def test_the_layer_that_is_read_may_be_an_earlier_one(name, reducer):
    stock, last = stock_tower(name), LAYERS - 1
    tower, pixels = reduced(stock, reducer, last=last), pictures(2)
    outputs = tower(pixels, output_hidden_states=True)
    y, state = by_hand(name, stock, tower, entering(stock, pixels), last)
    torch.testing.assert_close(outputs.hidden_states[last], placed(y, state), **exact)
    assert len(outputs.hidden_states) == LAYERS + 1
    assert {x.shape for x in outputs.hidden_states} == {outputs.last_hidden_state.shape}
    assert torch.equal(there(outputs.last_hidden_state), there(outputs.hidden_states[last]))


NOTHING = {
    "tome": ToMe(r=0),
    "evit": EViT(keep=1.0),
    "folder": Folder(keep=1.0),
    "folder, features": Folder(keep=1.0, form="features"),
    "ipcv": IPCV(keep=1.0, stabilise=2),
}


@towers
@pytest.mark.parametrize("reducer", NOTHING.values(), ids=NOTHING)
@torch.no_grad()
def test_what_keeps_everything_is_the_stock_encoder(name, reducer):
    stock = stock_tower(name)
    tower, pixels = reduced(stock, reducer), pictures(2)
    ours, theirs = (model(pixels, output_hidden_states=True) for model in (tower, stock))
    torch.testing.assert_close(ours.last_hidden_state, theirs.last_hidden_state, rtol=1e-9, atol=1e-9)
    for one, other in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    if theirs.get("pooler_output") is not None:
        torch.testing.assert_close(ours.pooler_output, theirs.pooler_output, rtol=1e-9, atol=1e-9)


@towers
@reducers
@torch.no_grad()
def test_a_picture_in_a_batch_is_as_alone(name, reducer):
    tower, pixels = reduced(stock_tower(name), reducer), pictures()
    together = tower(pixels).last_hidden_state
    for picture, alone in enumerate(pixels):
        torch.testing.assert_close(tower(alone[None]).last_hidden_state[0], together[picture], **exact)
    assert not torch.equal(together[0].nan_to_num(), together[1].nan_to_num())


@towers
@reducers
@torch.no_grad()
def test_attention_written_out_gives_the_same(name, reducer):
    stock, pixels = stock_tower(name), pictures(2)
    tower = reduced(stock, reducer)
    tower.set_attn_implementation("sdpa")
    fused = tower(pixels).last_hidden_state
    tower.set_attn_implementation("eager")  # in some stock layers with a softmax in single precision
    torch.testing.assert_close(tower(pixels).last_hidden_state, fused, rtol=1e-4, atol=1e-4, equal_nan=True)


@towers
@torch.no_grad()
def test_signals_are_of_the_attention_that_runs(name, monkeypatch):
    monkeypatch.setattr(EViT, "attention_bias", lambda self, state: state.size_BN.log()[:, None, None])
    stock, pixels = stock_tower(name), pictures(2)
    tower = reduced(stock, EViT(keep=0.6))
    y, state = by_hand(name, stock, tower, entering(stock, pixels))
    found = tower(pixels, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(found, placed(y, state), **exact)


@torch.no_grad()
def test_the_fused_attention_is_what_runs(monkeypatch):
    called = []
    fused = nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        nn.functional,
        "scaled_dot_product_attention",
        lambda *args, **kwargs: called.append(kwargs["attn_mask"]) or fused(*args, **kwargs),
    )
    tower = reduced(stock_tower("siglip"), ToMe(r=5))
    tower.set_attn_implementation("sdpa")
    tower(pictures(2))
    assert [mask if mask is None else tuple(mask.shape) for mask in called] == [
        None,
        *((2, 1, 1, SIDE * SIDE - 5 * layer) for layer in range(1, LAYERS)),
    ]


@pytest.mark.parametrize("name", ["siglip", "aimv2"])
@torch.no_grad()
def test_pooling_heads_see_the_tokens_that_are_left(name):
    setting = {"siglip": "vision_use_head", "aimv2": "use_head"}[name]
    stock, pixels = stock_tower(name, **{setting: True}), pictures(2)
    outputs = reduced(stock, EViT(keep=0.6, fuse=False))(pixels)
    for picture, features in enumerate(outputs.last_hidden_state):
        kept = features[there(features[None])[0]]
        torch.testing.assert_close(outputs.pooler_output[picture], stock.head(kept[None])[0], rtol=1e-9, atol=1e-9)
    uneven = reduced(stock, SPViT())(pictures(6))
    assert len(set(there(uneven.last_hidden_state).sum(dim=1).tolist())) > 1
    assert uneven.pooler_output.isnan().all()  # a head would pool over padding too


def test_plain_tuples():
    tower, pixels = reduced(stock_tower("siglip"), EViT(keep=0.6)), pictures(1)
    features, states = tower(pixels, output_hidden_states=True, return_dict=False)
    torch.testing.assert_close(features, tower(pixels).last_hidden_state, **exact)
    assert len(states) == LAYERS + 1


# Tokens for connectors that join neighbours ---------------------------------------------------------------------------


@towers
@reducers
@torch.no_grad()
def test_every_token_gets_what_it_was_merged_into(name, reducer):
    stock, pixels = stock_tower(name), pictures(2)
    if reducer == REDUCERS["evit, dropping"]:
        with pytest.raises(LacoError, match="drops tokens"):
            reduced(stock, reducer, unmerge=True)
        return
    tower = reduced(stock, reducer, unmerge=True)
    found = tower(pixels, output_hidden_states=True)
    y, state = by_hand(name, stock, tower, entering(stock, pixels))
    norm = part(stock, NAMES[name].last_norm)
    for features, x in ((found.last_hidden_state, y if norm == 1 else norm(y)), (found.hidden_states[-1], y)):
        wanted = [
            torch.stack([picture[slot] for slot in slots]) for picture, slots in zip(x, state.slot_BS, strict=True)
        ]
        torch.testing.assert_close(features, torch.stack(wanted), rtol=1e-9, atol=1e-9)


# Training -------------------------------------------------------------------------------------------------------------


def loss_and_gradients(tower: PreTrainedModel, pixels: Tensor, read: int = LAYERS) -> tuple[Tensor, dict[str, Tensor]]:
    tower.train()
    tower.zero_grad()
    torch.manual_seed(7)
    states = tower(pixels, output_hidden_states=True).hidden_states
    loss = (states[read][there(states[read])] ** 2).mean() + tower(pixels).last_hidden_state.nansum() / 1000
    loss.backward()
    return loss.detach(), {key: p.grad.clone() for key, p in tower.named_parameters() if p.grad is not None}


@some_towers
@reducers
def test_activations_computed_anew_give_the_same_gradient(name, reducer):
    tower, pixels = reduced(stock_tower(name), reducer), pictures(2)
    loss, gradients = loss_and_gradients(tower, pixels)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert gradients[next(key for key in gradients if "layers.0" in key)].any()
    checkpoint_activations(tower, use_reentrant=False)
    again, recomputed = loss_and_gradients(tower, pixels)
    torch.testing.assert_close(again, loss, rtol=1e-12, atol=1e-12)
    assert gradients.keys() == recomputed.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(recomputed[key], gradient, rtol=1e-9, atol=1e-11, msg=key)


@some_towers
def test_masked_training_equals_a_loop_and_reaches_every_selector(name):
    stock, pixels = stock_tower(name), pictures(2)
    tower = reduced(stock, SPViT()).train()
    assert list(tower.compressors()) == [2, 3, 4]
    torch.manual_seed(7)
    features = tower(pixels, output_hidden_states=True).hidden_states[-1]
    x = entering(stock, pixels)
    torch.manual_seed(7)
    y, state = by_hand(name, stock, tower, x)
    assert y.shape[1] == x.shape[1] + 3  # masked ones stay, and there are three packages
    torch.testing.assert_close(features, placed(y, state), **exact)
    assert not there(features).all()
    features[there(features)].square().sum().backward()
    for index, selector in tower.compressors().items():
        for key, parameter in selector.named_parameters():
            assert parameter.grad.isfinite().all(), (index, key)
        assert all(parameter.grad.any() for parameter in selector.score.parameters()), index
        assert all(parameter.grad.any() for parameter in selector.embed.parameters()), index


def test_reentrant_checkpoints_are_refused():
    tower = reduced(stock_tower("siglip"), SPViT()).train()
    checkpoint_activations(tower, use_reentrant=True)
    with pytest.raises(LacoError, match="use_reentrant"):
        tower(pictures(1))


@torch.no_grad()
def test_nothing_is_remembered_after_a_call():
    tower, pixels = reduced(stock_tower("siglip"), IPCV(keep=0.4)), pictures(2)
    before = [dict(vars(layer)) for layer in tower.layers]
    tower(pixels)
    assert STATES.get(None) is None
    assert [vars(layer).keys() for layer in tower.layers] == [state.keys() for state in before]
    with pytest.raises(LacoError, match="inside its encoder"):
        tower.layers[-1](torch.zeros(1, SIDE * SIDE, 16, dtype=torch.float64))


# Saving ---------------------------------------------------------------------------------------------------------------


@towers
@reducers
@torch.no_grad()
def test_saved_and_loaded_it_is_the_same(name, reducer, tmp_path):
    tower, pixels = reduced(stock_tower(name), reducer, last=LAYERS - 1, unmerge=reducer.name == "tome"), pictures(1)
    tower.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(loaded) is type(tower)
    assert loaded.config.reducing_method == reducer
    assert loaded.config.to_dict() | {"_name_or_path": ""} == tower.config.to_dict()
    assert loaded.state_dict().keys() == tower.state_dict().keys()
    ours, theirs = (model(pixels, output_hidden_states=True) for model in (tower, loaded))
    torch.testing.assert_close(theirs.last_hidden_state, ours.last_hidden_state, **exact)
    torch.testing.assert_close(theirs.hidden_states[-2], ours.hidden_states[-2], **exact)


@towers
def test_a_stock_checkpoint_lacks_the_selectors_alone(name, tmp_path):
    stock = stock_tower(name)
    stock.save_pretrained(tmp_path)
    kind = encoder_of(stock.config)
    config = kind.with_reducer(stock.config, SPViT())
    tower, info = kind.compressed.from_pretrained(
        tmp_path, config=config, output_loading_info=True, dtype=torch.float64
    )
    assert info["missing_keys"]
    assert all(".compressor." in key for key in info["missing_keys"])
    assert not info["unexpected_keys"]
    for key, tensor in stock.state_dict().items():
        assert torch.equal(tower.state_dict()[key], tensor)
    for selector in tower.compressors().values():
        # By torch's own rule, as it wants it; the models' own would have no biases.
        linear = [part for part in selector.modules() if isinstance(part, nn.Linear)]
        assert all(part.bias.all() and part.weight.all() for part in linear)
        assert all(part.weight.abs().max() <= part.in_features**-0.5 for part in linear)


@towers
def test_configurations_forget_the_reducer_with_it(name):
    config = CONFIGS[name]()
    kind = encoder_of(config)
    changed = kind.with_reducer(config, ToMe(r=3), last=4, unmerge=True)
    assert (changed.reducer["r"], changed.reducer_last, changed.reducer_unmerge) == (3, 4, True)
    assert kind.own_grid(changed) == kind.grid(changed) == kind.own_grid(config)
    assert kind.with_reducer(changed, None).to_dict() == config.to_dict()
    assert kind.with_steps(changed, []).to_dict() == config.to_dict()


# The halves of a layer ------------------------------------------------------------------------------------------------


@towers
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_two_halves_are_the_stock_layer(name, attention):
    stock = stock_tower(name)
    stock.set_attn_implementation(attention)
    kind = encoder_of(stock.config)
    layer, x = kind.layers(stock)[1], torch.randn(2, 9, 16, dtype=torch.float64)
    given = () if name in ("internvit", "dinov2", "dinov2_with_registers") else (None,)
    halves = kind.compressed.halves
    attended = halves.attend(layer, x)
    # The stock softmax is in single precision where it is written out.
    exactly = {"rtol": 1e-12, "atol": 1e-12} if attention == "sdpa" else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(halves.feed(layer, attended.x_BNC), layer(x, *given), **exactly)
    for one, other in zip(attended[1:], kind.queries_keys(layer, x, {}), strict=True):
        assert torch.equal(one, other)


@towers
@torch.no_grad()
def test_queries_and_keys_are_those_of_the_stock_attention(name):
    stock, pixels = stock_tower(name), pictures(2)
    stock.set_attn_implementation("eager")
    outputs = stock(pixels, output_attentions=True, output_hidden_states=True)
    kind = encoder_of(stock.config)
    assert len(outputs.attentions) == LAYERS
    for layer, x, weights in zip(kind.layers(stock), outputs.hidden_states, outputs.attentions, strict=False):
        # SigLIP and its like compute this softmax in single precision.
        torch.testing.assert_close(rows(*kind.queries_keys(layer, x, {})), weights.double(), rtol=1e-5, atol=1e-7)


PACKED = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("merger", [None, laco.LaCo(layer=2)], ids=["stock", "behind a merger"])
@torch.no_grad()
def test_queries_and_keys_of_packed_pictures(name, merger):
    subject = tiny_tower(name)
    tower = subject.encoder
    kind, seen = encoder_of(tower.config), []
    if merger is not None:
        stock, tower = tower, kind.compressed(kind.with_steps(tower.config, [Step.at(merger, merger.layer)])).eval()
        tower.load_state_dict(stock.state_dict(), strict=False)
    tower.double()
    tower.set_attn_implementation("eager")
    layer = kind.layers(tower)[2]
    enters = layer.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    attends = layer.attn.register_forward_hook(
        lambda _, args, kwargs, out: seen.append((kwargs["cu_seqlens"], out)), with_kwargs=True
    )
    inputs = {key: x.double() if x.is_floating_point() else x for key, x in subject.inputs(merger).items()}
    tower(**inputs)
    enters.remove()
    attends.remove()
    (x, *_), kwargs = seen[0]
    bounds, wanted = seen[1]
    q, k = kind.queries_keys(layer, x, kwargs)
    assert q.shape == k.shape == (1, layer.attn.num_heads, len(x), layer.attn.head_dim)
    values = layer.attn.qkv(layer.norm1(x)).view(len(x), 3, layer.attn.num_heads, -1)[:, 2].transpose(0, 1)
    mixed = torch.empty_like(values)
    for begin, end in zip(bounds.tolist(), bounds.tolist()[1:], strict=False):
        inside = slice(begin, end)
        mixed[:, inside] = rows(q[:, :, inside], k[:, :, inside])[0] @ values[:, inside]
    # Rotations are computed in single precision.
    torch.testing.assert_close(layer.attn.proj(mixed.transpose(0, 1).flatten(1)), wanted, rtol=1e-5, atol=1e-6)


# Refusals -------------------------------------------------------------------------------------------------------------

CANNOT = {
    "qwen2_vl": "packs pictures",
    "qwen2_5_vl": "packs pictures",
    "qwen3_vl": "packs pictures",
    "pixtral": "packs pictures",
    "minicpmv": "packs pictures",
    "siglip2": "pads pictures",
    "llama4": "stands last",
}


def test_every_encoder_takes_reducers_or_says_why_not():
    assert {kind.name for kind in ENCODERS} == {*CONFIGS, *CANNOT}
    for kind in ENCODERS:
        reason = kind.why_not(kind.stock_config(), ToMe())
        assert CANNOT[kind.name] in reason if kind.name in CANNOT else reason is None


@pytest.mark.parametrize("name", CANNOT)
def test_encoders_that_take_none(name):
    kind = next(kind for kind in ENCODERS if kind.name == name)
    config = kind.stock_config()
    with pytest.raises(LacoError, match=f"^tome cannot run inside {name}: .*{CANNOT[name]}"):
        kind.with_reducer(config, ToMe())
    record = {"reducer": ToMe().to_dict()}
    with torch.device("meta"), pytest.raises(LacoError, match=CANNOT[name]):
        kind.compressed(kind.compressed_config(**kind.stock_settings(config), **record))


def test_a_reducer_and_mergers_are_refused():
    kind = encoder_of(config := CONFIGS["siglip"]())
    merging = Step.at(laco.LaCo(), 3)
    for refused in (
        lambda: kind.with_reducer(kind.with_steps(config, [merging]), ToMe()),
        lambda: kind.with_steps(kind.with_reducer(config, ToMe()), [merging]),
        lambda: kind.compressed_config(compression=[merging.to_dict()], reducer=ToMe().to_dict()),
    ):
        with pytest.raises(LacoError, match="mergers and a reducer"):
            refused()


@pytest.mark.parametrize(
    ("last", "reducer"), [(None, EViT(layer=LAYERS)), (4, EViT(layer=5)), (None, Folder(layer=LAYERS + 3))]
)
def test_layers_past_the_end_are_refused(last, reducer):
    kind = encoder_of(config := CONFIGS["siglip"]())
    with pytest.raises(LacoError, match="layer"):
        kind.with_reducer(config, reducer, last=last)


@pytest.mark.parametrize("record", [laco.LaCo(layer=2).to_dict(), {"method": "no such method"}, {"r": 3}])
def test_records_that_are_no_reducer_are_refused(record):
    kind = encoder_of(config := CONFIGS["siglip"]())
    with pytest.raises(LacoError):
        kind.compressed_config(**kind.stock_settings(config), reducer=record)


@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
@torch.no_grad()
def test_padded_tiles_are_refused(name):
    tower, pixels = reduced(stock_tower(name), ToMe(r=3)), pictures(2)
    mask = torch.ones(2, SIDE, SIDE, dtype=torch.bool)
    torch.testing.assert_close(tower(pixels, mask).last_hidden_state, tower(pixels).last_hidden_state, **exact)
    mask[1, -1] = False
    with pytest.raises(LacoError, match="padded"):
        tower(pixels, patch_attention_mask=mask)


def test_attention_without_a_bias_is_refused_where_one_is_needed():
    tower = reduced(stock_tower("siglip"), ToMe(r=3))
    tower.config._attn_implementation = "flash_attention_2"  # cannot be set properly on a machine without it
    layer, x = tower.layers[1], torch.zeros(1, 4, 16, dtype=torch.float64)
    with pytest.raises(LacoError, match="sdpa"):
        tower.halves.attend(layer, x, bias=torch.zeros(1, 1, 1, 4))


@torch.no_grad()
def test_copies_share_nothing():
    tower, pixels = reduced(stock_tower("clip"), SPViT()), pictures(1)
    wanted, copy = tower(pixels).last_hidden_state, deepcopy(tower)
    for parameter in copy.parameters():
        parameter.zero_()
    assert torch.equal(tower(pixels).last_hidden_state.nan_to_num(), wanted.nan_to_num())
