"""What has to hold for every family and encoder with a merger at every place."""

from copy import deepcopy
from itertools import product

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

import laco
import tiny
from laco.families import family_of
from laco.methods.token_packer import TokenPackerProjector

METHODS = {
    "inside": laco.LaCo(depth=1 / 2, shortcut="saliency"),
    "projector": laco.TokenPacker(),
}


@pytest.fixture(params=product(METHODS, tiny.FAMILIES, tiny.ENCODERS), ids="-".join)
def compressed(request):
    method, name, vision = request.param
    model, processor = tiny.FAMILIES[name](vision, vision_feature_layer=-2 if vision == "clip" else -1)
    laco.compress(model, processor, METHODS[method])
    tiny.scramble(model)
    return model, processor


PROMPTS = [
    ("what is <image> here?", [tiny.picture(1, 50, 120)]),
    ("<image> and <image>", [tiny.picture(2, 90, 40), tiny.picture(3)]),
    ("no picture", []),
    ("say <image>", [tiny.picture(4, 48, 48)]),
]


def last_logits(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits[:, -1]


def test_a_batch_of_unequal_prompts_equals_each_alone(compressed):
    model, processor = compressed
    together = last_logits(model, tiny.inputs(processor, *PROMPTS))
    for prompt, logits in zip(PROMPTS, together, strict=True):
        alone = last_logits(model, tiny.inputs(processor, prompt))[0]
        torch.testing.assert_close(alone, logits, rtol=0, atol=1e-5)


def test_generation_with_cache_equals_without(compressed):
    model, processor = compressed
    batch = tiny.inputs(processor, *PROMPTS)
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    cached, plain = (model.generate(**batch, **options, use_cache=use) for use in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(cached.logits, plain.logits, rtol=0, atol=1e-5)


def test_the_auto_classes_load_what_save_pretrained_wrote(compressed, tmp_path):
    model, processor = compressed
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert type(again) is type(model)
    assert family_of(again).steps(again.config) == family_of(model).steps(model.config)
    assert family_of(again).compressors(again).keys() == family_of(model).compressors(model).keys()
    batch = tiny.inputs(AutoProcessor.from_pretrained(tmp_path), *PROMPTS)
    assert torch.equal(batch["input_ids"], tiny.inputs(processor, *PROMPTS)["input_ids"])
    assert torch.equal(last_logits(again, batch), last_logits(model, batch))


def test_the_stock_checkpoint_leaves_only_the_compressor_missing(compressed, tmp_path):
    model, processor = compressed
    steps, config = family_of(model).steps(model.config), model.config
    (place,) = family_of(model).compressors(model)
    mine = {key for key in model.state_dict() if ".compressor." in key}
    laco.decompress(model, processor)
    model.save_pretrained(tmp_path)
    laco.compress(model, processor, steps[0].merger)
    again, info = type(model).from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert info["missing_keys"] == mine
    replaced = {
        f"model.multi_modal_projector.{layer}.{key}" for layer in ("linear_1", "linear_2") for key in ("weight", "bias")
    }
    assert info["unexpected_keys"] == (replaced if place == "projector" else set())
    found = family_of(again).compressors(again)[place]
    assert started_well(found), "transformers initialised the compressor, not its own reset_parameters"


def in_hub_format(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights under the names that checkpoints on the hub have, written by transformers 4."""
    prefixes = {
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.language_model.": "language_model.model.",
        "model.": "",
    }
    renamed = {}
    for key, tensor in model.state_dict().items():
        old = next((old for old in prefixes if key.startswith(old)), None)
        if old is not None:  # the head is tied to the embeddings
            renamed[prefixes[old] + key.removeprefix(old)] = tensor
    return renamed


def test_hub_checkpoints_load_and_are_saved_again(compressed, tmp_path):
    model, processor = compressed
    family, config = family_of(model), deepcopy(model.config)
    (step,) = family.steps(model.config)
    laco.decompress(model, processor)
    stock = last_logits(model, tiny.inputs(processor, *PROMPTS))
    laco.save_pretrained(model, processor, tmp_path / "hub")
    save_file(in_hub_format(model), tmp_path / "hub" / "model.safetensors", metadata={"format": "pt"})

    again, other = laco.from_pretrained(tmp_path / "hub")
    assert torch.equal(last_logits(again, tiny.inputs(other, *PROMPTS)), stock)
    laco.compress(again, other, step.merger)
    tiny.scramble(again)
    laco.save_pretrained(again, other, tmp_path / "compressed")
    third, other = laco.from_pretrained(tmp_path / "compressed")
    batch = tiny.inputs(other, *PROMPTS)
    assert torch.equal(last_logits(third, batch), last_logits(again, batch))

    model_class = family.compressed if step.place == "projector" else family.stock
    _, info = model_class.from_pretrained(tmp_path / "hub", config=config, output_loading_info=True)
    assert info["missing_keys"] == {key for key in third.state_dict() if ".compressor." in key}


@torch.no_grad()
def started_well(compressor: torch.nn.Module) -> bool:
    """What `reset_parameters` of these methods chooses and no initialisation of transformers does."""
    if isinstance(compressor, TokenPackerProjector):
        bound = (0.5 * 6 / (2 * compressor.width)) ** 0.5  # Xavier with gain sqrt(1/2)
        largest = float(compressor.attention.q.weight.abs().max())
        return 0.9 * bound < largest <= bound and float(compressor.mlp[0].bias.abs().max()) == 0
    zeros = [compressor.fc2.weight, compressor.saliency.weight]
    bound = compressor.fc1.in_features**-0.5  # of torch's own nn.Linear
    largest = float(compressor.fc1.weight.abs().max())
    return all(float(weight.abs().max()) == 0 for weight in zeros) and 0.9 * bound < largest <= bound


def grads(model: PreTrainedModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_reach_everything_and_checkpointing_keeps_them(compressed):
    model, processor = compressed
    model.train()
    batch = tiny.inputs(processor, *PROMPTS)
    plain = grads(model, batch)
    family = family_of(model)
    parts = {"layer before": family.layers(model)[0], **family.compressors(model)}
    for part, module in parts.items():
        for key, parameter in module.named_parameters():
            # The softmax of attention does not see a bias of its keys.
            assert "k_proj.bias" in key or parameter.grad.abs().max() > 0, f"{part}.{key}"
    model.gradient_checkpointing_enable()
    assert family.layers(model)[1].gradient_checkpointing
    torch.testing.assert_close(grads(model, batch), plain, rtol=1e-5, atol=1e-6)


def test_sdpa_equals_eager(compressed):
    model, processor = compressed
    batch = tiny.inputs(processor, *PROMPTS)
    assert family_of(model).encoder(model).config._attn_implementation == "sdpa"
    sdpa = last_logits(model, batch)
    model.set_attn_implementation("eager")
    assert family_of(model).layers(model)[2].self_attn.config._attn_implementation == "eager"
    torch.testing.assert_close(last_logits(model, batch), sdpa, rtol=0, atol=1e-5)


def test_encoder_compiles_without_graph_breaks():
    model, processor = tiny.llava("clip")
    laco.compress(model, processor, METHODS["inside"])
    encoder = family_of(model).encoder(model)
    pixels = torch.randn(2, 3, 48, 48)
    whole = torch.compile(encoder, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(whole(pixels).last_hidden_state, encoder(pixels).last_hidden_state)


def test_lora_on_the_language_model_trains_the_whole_compressor(compressed):
    peft = pytest.importorskip("peft")
    model, processor = compressed
    config = peft.LoraConfig(target_modules=r".*language_model.*q_proj", modules_to_save=["compressor"])
    batch = tiny.inputs(processor, *PROMPTS)
    before = last_logits(model, batch)
    adapted = peft.get_peft_model(model, config)
    torch.testing.assert_close(last_logits(adapted, batch), before, rtol=0, atol=1e-6)
    found = grads(adapted, batch)
    trained = {name.split(".")[-2] if "lora" in name else "compressor" for name in found}
    assert trained == {"default", "compressor"}
    assert all("lora" in name or "compressor.modules_to_save" in name for name in found)
    assert all(grad.abs().max() > 0 for name, grad in found.items() if "lora_A" not in name and "k.2.bias" not in name)
