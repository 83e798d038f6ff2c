"""compress and decompress: in place, exact, and without a trace after an error."""

import time
from copy import deepcopy
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import pytest
import torch
from accelerate import cpu_offload
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    BertConfig,
    BertModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import laco
import tiny
from laco.families import family_of
from laco.families.compat import checkpoint_activations
from laco.families.encoders.siglip import LacoSiglipVisionConfig
from laco.families.steps import Step, effective_patch_size

METHODS = {
    "inside": laco.LaCo(depth=1 / 2),
    "after the last": laco.AveragePool(depth=1),
    "projector": laco.PixelShuffle(),
    "projector of four levels": laco.TokenPacker(),
}


def state_of(model, processor):
    """Everything that an error may not change."""
    return {
        "classes": (type(model), type(model.model), type(model.config)),
        "modules": {name: (id(module), type(module)) for name, module in model.named_modules()},
        "tensors": {name: id(p) for name, p in model.named_parameters()},
        "config": deepcopy(model.config.to_dict()),
        "processor": deepcopy(processor.to_dict()),
    }


def logits_of(model, processor):
    batch = tiny.inputs(processor, ("a <image> b", [tiny.picture(1, 50, 110)]))
    with torch.no_grad():
        return model(**batch).logits


@pytest.fixture(params=product(METHODS, tiny.FAMILIES, tiny.ENCODERS), ids="-".join)
def case(request):
    method, name, vision = request.param
    return METHODS[method], *tiny.FAMILIES[name](vision)


def test_decompress_gives_back_exactly_the_model_from_before(case):
    method, model, processor = case
    before, logits = state_of(model, processor), logits_of(model, processor)
    assert laco.compress(model, processor, method) == (model, processor)
    kept = [name for name in before["tensors"] if "multi_modal_projector" not in name]
    now = dict(model.named_parameters())
    assert all(id(now[name]) == before["tensors"][name] for name in kept)
    assert not any(module.training for module in model.modules())
    assert logits_of(model, processor).shape[1] < logits.shape[1]
    assert laco.decompress(model, processor) == (model, processor)
    assert torch.equal(logits_of(model, processor), logits)
    after = state_of(model, processor)
    for part in ("classes", "tensors", "config", "processor"):
        assert after[part] == before[part]


@pytest.mark.parametrize("method", [laco.LaCo(depth=1 / 2), laco.PixelShuffle()], ids=["inside", "projector"])
def test_dtype_mode_and_switches_stay(method):
    model, processor = tiny.llava()
    model.to(torch.bfloat16).train()
    model.set_attn_implementation("eager")
    checkpoint_activations(model)
    family = family_of(model)
    family.layers(model)[0].requires_grad_(False)
    laco.compress(model, processor, method)
    (compressor,) = family.compressors(model).values()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad for p in compressor.parameters())
    assert not any(p.requires_grad for p in family.layers(model)[0].parameters())
    assert all(p.requires_grad for p in family.layers(model)[1].parameters())
    assert family.encoder(model).config._attn_implementation == "eager"
    assert all(layer.gradient_checkpointing for layer in family.layers(model))
    batch = tiny.inputs(processor, ("a <image>", [tiny.picture()]))
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in compressor.parameters())


def test_a_big_model_on_the_meta_device_takes_under_a_second_and_allocates_only_the_compressor():
    text = {"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28}
    vision = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304}
    vision |= {"num_hidden_layers": 27, "num_attention_heads": 16, "image_size": 384, "patch_size": 14}
    config = LlavaConfig(
        vision_config=vision, text_config=text, vision_feature_layer=-1, vision_feature_select_strategy="full"
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    assert sum(p.numel() for p in model.parameters()) > 7e9
    before = {id(p) for p in model.parameters()}
    start = time.perf_counter()
    laco.compress(model, None, laco.LaCo(depth=1 / 4))
    assert time.perf_counter() - start < 1
    new = {name: p for name, p in model.named_parameters() if id(p) not in before}
    assert sum(p.numel() for p in new.values()) == 5 * 1152**2 + 2 * 1152
    assert {name.rsplit(".", 2)[0] for name in new} == {"model.vision_tower.encoder.layers.6.compressor"}
    assert all(p.is_meta for p in model.parameters())
    assert family_of(model).grid(model.config) == (1, 14, 14)


@pytest.mark.parametrize("vision", tiny.ENCODERS)
@pytest.mark.parametrize("k", [1, 3, 4])
def test_hidden_states_are_merged_from_layer_k_on(vision, k):
    model, processor = tiny.llava(vision)
    pixels = torch.randn(1, 3, 48, 48)
    model.model.vision_tower(pixels, output_hidden_states=True)  # capture must not be installed twice
    laco.compress(model, processor, laco.LaCo(layer=k))
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    prefix = int(vision == "clip")
    assert [state.shape[1] - prefix for state in states] == [36] * k + [9] * (5 - k)


@pytest.mark.parametrize(
    ("read", "method", "layer", "reads"),
    [
        (-2, laco.LaCo(depth=1), 3, -2),
        (-2, laco.PixelShuffle(), 3, -2),
        (-1, laco.LaCo(), 1, -1),
        ([-3, -1], laco.LaCo(depth=1 / 2), 2, [-3, -1]),
        ([-3, -1], laco.PixelShuffle(), 4, 4),
        (-2, laco.TokenPacker(), 3, [2, 3, 3, 3]),
    ],
)
def test_depth_counts_to_the_last_layer_that_is_read(read, method, layer, reads):
    model, processor = tiny.llava("clip", vision_feature_layer=read)
    logits = logits_of(model, processor)
    laco.compress(model, processor, method)
    (step,) = family_of(model).steps(model.config)
    assert (step.layer, model.config.vision_feature_layer) == (layer, reads)
    assert logits_of(model, processor).shape[1] == logits.shape[1] - 27
    laco.decompress(model, processor)
    assert model.config.vision_feature_layer == read


def test_cls_token_is_kept_out_and_passed_on():
    """With the strategy `full` the language model reads CLS too: 1 + 9 tokens, the first untouched by the merger."""
    model, processor = tiny.llava("clip")
    model.config.vision_feature_select_strategy = processor.vision_feature_select_strategy = "full"
    pixels = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        stock = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[4]
        laco.compress(model, processor, laco.LaCo(depth=1))
        tiny.scramble(model)
        merged = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[4]
    assert merged.shape[1] == 10
    assert torch.equal(merged[:, 0], stock[:, 0])
    assert logits_of(model, processor).shape[1] == 4 + 10


@pytest.mark.parametrize(
    ("image_size", "patch_size", "factor", "odd", "wanted"),
    [(384, 14, 2, "pad", 27), (384, 14, 2, "crop", 29), (384, 14, 3, "error", 42), (336, 14, 2, "error", 28)],
)
def test_effective_patch_size(image_size, patch_size, factor, odd, wanted):
    step = Step.at(laco.AveragePool(factor=factor, odd=odd), layer=1)
    assert effective_patch_size(image_size, patch_size, [step]) == wanted


@dataclass(frozen=True, kw_only=True)
class Breaks(laco.AveragePool):
    """A method that cannot be built where memory is real, so it fails half-way."""

    name: ClassVar[str] = "breaks"

    def build(self, width):
        if torch.empty(0).is_meta:
            return super().build(width)
        raise MemoryError("no memory")


def lora_on_encoder(model, processor):
    peft = pytest.importorskip("peft")
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=r".*vision_tower.*q_proj"), model)


def offloaded(model, processor):
    cpu_offload(model, execution_device="cpu")


def changed(**attributes):
    def change(model, processor):
        for name, value in attributes.items():
            setattr(processor, name, value)

    return change


def picture_size(model, processor):
    processor.image_processor.size = {"height": 64, "width": 64}


def already(method):
    return lambda model, processor: laco.compress(model, processor, method)


BAD = {
    "twice": (already(laco.LaCo(layer=2)), laco.AveragePool(layer=2), "already compressed after layer 2, by laco"),
    "twice by depth": (already(laco.LaCo(layer=1)), laco.LaCo(depth=1 / 4), "already compressed after layer 1"),
    "two projectors": (already(laco.TokenPacker()), laco.PixelShuffle(), "already compressed after layer 4"),
    "past the end": (None, laco.LaCo(layer=5), "layer 5 is past the end"),
    "indivisible": (None, laco.LaCo(factor=4, odd="error"), "factor 4 does not divide a grid side of 6"),
    "nothing left": (None, laco.LaCo(factor=7, odd="crop"), "would leave nothing"),
    "no method": (None, "laco", "compressed by a method"),
    "read before": (already(laco.TokenPacker()), laco.LaCo(layer=3), "also reads the output of encoder layer 2"),
    "levels before": (already(laco.LaCo(layer=3)), laco.TokenPacker(), "also reads the output of encoder layer 2"),
    "patch size": (changed(patch_size=16), laco.LaCo(), "patch_size is 16, the model needs 8"),
    "prefix": (changed(num_additional_image_tokens=1), laco.LaCo(), "num_additional_image_tokens is 1"),
    "strategy": (changed(vision_feature_select_strategy="default"), laco.LaCo(), "vision_feature_select_strategy"),
    "image token": (changed(image_token_id=7), laco.LaCo(), "image_token_id is 7"),
    "picture size": (picture_size, laco.LaCo(), r"picture size is \(64, 64\)"),
    "adapters": (lora_on_encoder, laco.LaCo(), "before quantising it or adding adapters"),
    "offloaded": (offloaded, laco.LaCo(), "spread over devices"),
}


@pytest.mark.parametrize(("prepare", "method", "message"), BAD.values(), ids=BAD)
def test_errors_leave_everything_as_it_was(prepare, method, message):
    model, processor = tiny.llava()
    if prepare:
        prepare(model, processor)
    before = state_of(model, processor)
    with pytest.raises(laco.LacoError, match=message):
        laco.compress(model, processor, method)
    assert state_of(model, processor) == before


def test_failing_half_way_leaves_everything_as_it_was():
    model, processor = tiny.llava()
    before, logits = state_of(model, processor), logits_of(model, processor)
    laco.methods.registry()["breaks"] = Breaks
    try:
        with pytest.raises(MemoryError):
            laco.compress(model, processor, Breaks(layer=2))
    finally:
        del laco.methods.registry()["breaks"]
    assert state_of(model, processor) == before
    assert torch.equal(logits_of(model, processor), logits)


def test_a_grid_that_no_patch_size_gives():
    """20 pixels in 7 tokens: 20 // 2 = 10 and 20 // 3 = 6."""
    model, processor = tiny.llava(image_size=20, patch_size=1)
    before = state_of(model, processor)
    with pytest.raises(laco.LacoError, match="no patch size divides 20 pixels into the 7 x 7 tokens"):
        laco.compress(model, processor, laco.LaCo(layer=1, factor=3))
    assert state_of(model, processor) == before


def test_a_projector_needs_all_patch_tokens():
    model, processor = tiny.llava("clip")
    model.config.vision_feature_select_strategy = processor.vision_feature_select_strategy = "full"
    with pytest.raises(laco.LacoError, match="needs all patch tokens"):
        laco.compress(model, processor, laco.PixelShuffle())


def test_an_unknown_family_names_the_known_ones():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    bert = BertModel(BertConfig(vocab_size=9, **sizes))
    with pytest.raises(laco.LacoError, match=r"BertModel .* LlavaForConditionalGeneration, LlavaOnevision"):
        laco.compress(bert, None, laco.LaCo())


def test_an_unknown_encoder_names_the_known_ones():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = LlavaConfig(vision_config={"model_type": "vit", **sizes}, text_config=tiny.text_config(tiny.tokenizer()))
    with pytest.raises(laco.LacoError, match=r"'vit' is not supported; there are siglip, clip"):
        laco.compress(LlavaForConditionalGeneration(config), None, laco.LaCo())


@pytest.mark.parametrize("wrong", ["other family", "tokenizer"])
def test_a_processor_of_another_kind(wrong):
    model, processor = tiny.llava()
    other = tiny.llava_onevision()[1] if wrong == "other family" else processor.tokenizer
    with pytest.raises(laco.LacoError, match="processor"):
        laco.compress(model, other, laco.LaCo())


def test_onevision_processor_with_other_pinpoints_or_count():
    model, processor = tiny.llava_onevision()
    processor.num_image_tokens = 49
    with pytest.raises(laco.LacoError, match="num_image_tokens is 49, the model needs 36"):
        laco.compress(model, processor, laco.LaCo())
    processor.num_image_tokens = 36
    processor.image_processor.image_grid_pinpoints = [[48, 48]]
    with pytest.raises(laco.LacoError, match="image_grid_pinpoints"):
        laco.compress(model, processor, laco.LaCo())


def test_decompressing_what_is_not_compressed():
    with pytest.raises(laco.LacoError, match="is not compressed"):
        laco.decompress(*tiny.llava())


def test_a_vision_configuration_resolves_its_own_patch_size(tmp_path):
    steps = [Step.at(laco.LaCo(), layer=2).to_dict()]
    config = LacoSiglipVisionConfig(patch_size=8, image_size=256, compression=steps)  # 16 is the stock default
    assert (config.embed_patch_size, config.patch_size) == (8, 16)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert (type(again), again.embed_patch_size, again.patch_size) == (LacoSiglipVisionConfig, 8, 16)
    assert again.steps == config.steps
    with pytest.raises(laco.LacoError, match="patch_size 16 contradicts"):
        LacoSiglipVisionConfig(patch_size=16, embed_patch_size=16, image_size=256, compression=steps)


NO_MERGERS = [
    name
    for name, method in laco.methods.registry().items()
    if not issubclass(method, laco.Merger) and "maps" not in method.needs
]


@pytest.mark.parametrize("vision", ["siglip", "clip"])
def test_a_window_merger_starts_from_the_layer_before(vision, tmp_path):
    """Of every token alone, its layer is the merger: so of windows of one token, up to the activation."""
    model, processor = tiny.llava(vision)
    layer = family_of(model).encoder_kind(model.config).layers(family_of(model).encoder(model))[1]
    layer.mlp.activation_fn = torch.nn.GELU(approximate="tanh")
    laco.compress(model, processor, laco.WindowMerger(layer=2, factor=1, reuse=True))
    merger = family_of(model).encoder(model).compressors()[2]
    config = layer.self_attn.config
    step = model.config.vision_config.steps[0].merger
    assert (step.heads, step.ffn) == (config.num_attention_heads, config.intermediate_size)
    token = torch.randn(5, 1, config.hidden_size)
    attended = token + layer.self_attn.out_proj(layer.self_attn.v_proj(layer.layer_norm1(token)))
    wanted = attended + layer.mlp(layer.layer_norm2(attended))
    with torch.no_grad():
        torch.testing.assert_close(merger(token), wanted[:, 0], rtol=0, atol=3e-4)  # norms of another epsilon

    with torch.no_grad():
        merger.fc1.weight.mul_(2)  # a reload starts from what was learnt, not from the layer
    model.save_pretrained(tmp_path)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(family_of(again).encoder(again).compressors()[2].fc1.weight, merger.fc1.weight)


def test_a_window_merger_cannot_start_from_layers_that_are_more():
    model, processor = tiny.CASES["llava-dinov2"].build()
    with pytest.raises(laco.LacoError, match=r"no merger can start from a layer of dinov2.*leave reuse out"):
        laco.compress(model, processor, laco.WindowMerger(layer=2, reuse=True))
    assert not family_of(model).methods(model.config)


@pytest.mark.parametrize("name", NO_MERGERS)
def test_methods_that_are_no_mergers_go_in_and_out(name):
    model, processor = tiny.llava()
    before = state_of(model, processor)
    method = laco.methods.get(name)
    # Methods that drop tokens at several points need more layers.
    method = method(layer=1, keep=0.5) if issubclass(method, laco.methods.DecoderMethod) else method()
    laco.compress(model, processor, method)
    assert family_of(model).methods(model.config) == [method]
    laco.decompress(model, processor)
    for state in (after := state_of(model, processor), before):  # other objects, of the same classes
        state["modules"] = {name: kind for name, (_, kind) in state["modules"].items()}
    assert after == before


def test_a_refused_method_leaves_the_model_as_it_was():
    model, processor = tiny.llava()
    before = state_of(model, processor)
    with pytest.raises(laco.LacoError, match="last point can be 1; got 3"):
        laco.compress(model, processor, laco.methods.PyramidDrop())
    assert state_of(model, processor) == before


def test_a_model_that_shares_its_configuration_with_another_gets_its_own():
    teacher, _ = tiny.llava()
    before = teacher.config.to_dict()
    student = AutoModelForImageTextToText.from_config(teacher.config)
    for method in (laco.AveragePool(layer=2), laco.FastV(layer=1)):
        laco.compress(student, None, method)
    assert teacher.config.to_dict() == before
    assert type(teacher.config) is LlavaConfig
    assert student.config.vision_config is student.model.vision_tower.config
    assert student.config.text_config is student.model.language_model.config
