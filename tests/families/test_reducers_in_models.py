"""Methods inside the encoder's layers, in whole models."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

import laco
import tiny
from families.matrix import ONE, SQUARE, TWO, Prompt, built
from families.test_reductions import generated, last_logits
from laco.families import family_of

BY_TOKEN = ["llava-siglip", "llava-clip", "llava_onevision-siglip", "llava_onevision-clip"]
JOINING = ["internvl-internvit", "idefics3-idefics3", "smolvlm-smolvlm"]
PROMPTS: list[Prompt] = [(f"{text} or not?", pictures) for text, pictures in (ONE, TWO, SQUARE)]
METHODS = {
    "tome": laco.methods.ToMe(r=3),
    "evit": laco.methods.EViT(keep=0.6),
    "folder": laco.methods.Folder(keep=0.4, minimum=4),
    "spvit": laco.methods.SPViT(targets=(0.7,), layer=2),
    "ipcv": laco.methods.IPCV(keep=0.5, stabilise=1, layer=1),
}


def reduced(name: str, method: Any) -> tuple[Any, Any]:
    model, processor = deepcopy(built(name, "stock"))
    torch.manual_seed(0)
    return laco.compress(model, processor, method)


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("name", BY_TOKEN)
def test_the_language_model_reads_what_the_encoder_leaves(name, kind):
    model, processor = reduced(name, METHODS[kind])
    case, family = tiny.CASES[name], family_of(model)
    stock, its = built(name, "stock")
    batch = case.inputs(its, *PROMPTS)
    seen: dict[str, Tensor] = {}
    hook = family.language_model(model).register_forward_pre_hook(
        lambda _, __, kwargs: seen.update(embeds=kwargs["inputs_embeds"]), with_kwargs=True
    )
    together = last_logits(model, batch)
    hook.remove()
    assert together.isfinite().all()
    assert (together - last_logits(stock, batch)).abs().max() > 1e-3
    alone = torch.cat([last_logits(model, case.inputs(processor, prompt)) for prompt in PROMPTS])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=2e-5)
    if name.startswith("llava-") and kind != "spvit":
        left = (~seen["embeds"][..., 0].isnan() & (batch["input_ids"] == model.config.image_token_id)).sum(dim=1)
        per_picture = family.tokens_read(model.config, family.grid(model.config))
        assert left.tolist() == [per_picture, 2 * per_picture, per_picture]
        assert (per_picture < 36) == (kind != "ipcv")


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("name", BY_TOKEN[:3])
def test_generate_with_cache_equals_without(name, kind):
    model, processor = reduced(name, METHODS[kind])
    batch = tiny.CASES[name].inputs(processor, *PROMPTS)
    cached, uncached = (generated(model, batch, use_cache=use) for use in (True, False))
    assert torch.equal(cached, uncached)


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("name", JOINING)
def test_behind_a_joining_connector_merged_tokens_come_back_to_their_places(name, kind):
    model, processor = reduced(name, METHODS[kind])
    case = tiny.CASES[name]
    batch = case.inputs(processor, *PROMPTS)
    stock = last_logits(built(name, "stock")[0], batch)
    together = last_logits(model, batch)
    assert (together - stock).abs().max() > 1e-4
    alone = torch.cat([last_logits(model, case.inputs(processor, prompt)) for prompt in PROMPTS])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("name", JOINING)
def test_behind_a_joining_connector_no_token_may_be_missing(name):
    with pytest.raises(laco.LacoError, match="joins neighbours behind it"):
        reduced(name, laco.methods.EViT(keep=0.6, fuse=False))


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("name", [*BY_TOKEN[:2], "internvl-internvit"])
def test_saved_loaded_and_decompressed(name, kind, tmp_path):
    stock, its = built(name, "stock")
    model, processor = reduced(name, METHODS[kind])
    batch = tiny.CASES[name].inputs(its, *PROMPTS)
    wanted = last_logits(model, batch)
    model.save_pretrained(tmp_path / "whole")
    again, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(last_logits(again.eval(), batch), wanted, rtol=0, atol=0)
    laco.save_compressor(model, tmp_path / "adapter")
    fresh = deepcopy(stock)
    laco.load_compressor(fresh, None, tmp_path / "adapter")
    torch.testing.assert_close(last_logits(fresh, batch), wanted, rtol=0, atol=0)
    laco.decompress(model, processor)
    assert [type(part) for part in model.modules()] == [type(part) for part in stock.modules()]
    assert torch.equal(last_logits(model, batch), last_logits(stock, batch))


def test_hidden_states_and_attentions_are_captured():
    model, processor = reduced("llava-siglip", laco.methods.DivPrune(keep=0.4))
    batch = tiny.CASES["llava-siglip"].inputs(processor, ONE)
    with torch.no_grad():
        out = model(**batch, output_hidden_states=True)
    stock, its = built("llava-siglip", "stock")
    full = tiny.CASES["llava-siglip"].inputs(its, ONE)
    assert len(out.hidden_states) == len(stock(**full, output_hidden_states=True).hidden_states)
    read = full["input_ids"].shape[1] - 36 + round(0.4 * 36)
    assert {hidden.shape[1] for hidden in out.hidden_states[:-1]} == {read}


def test_what_does_not_go_together():
    model, processor = reduced("llava-siglip", laco.methods.ToMe(r=2))
    with pytest.raises(laco.LacoError, match="do not work together yet"):
        laco.compress(model, processor, laco.methods.DivPrune(keep=0.5))
    with pytest.raises(laco.LacoError, match="already has tome at that place"):
        laco.compress(model, processor, laco.methods.EViT())
    with pytest.raises(laco.LacoError, match="do not stand in one vision encoder"):
        laco.compress(model, processor, laco.LaCo(depth=1 / 2))
    laco.compress(model, processor, laco.methods.FastV(keep=0.5, layer=1))
    batch = tiny.CASES["llava-siglip"].inputs(processor, ONE)
    assert last_logits(model, batch).isfinite().all()
    qwen, its = deepcopy(built("qwen2_5_vl-qwen2_5_vl", "stock"))
    with pytest.raises(laco.LacoError, match="tome cannot run here"):
        laco.compress(qwen, its, laco.methods.ToMe())


def test_an_encoder_alone():
    encoder, processor = deepcopy(built("siglip-alone", "stock")) if "siglip-alone" in tiny.CASES else (None, None)
    if encoder is None:
        encoder = deepcopy(built("llava-siglip", "stock")[0].model.vision_tower)
    before = encoder(torch.zeros(1, 3, 48, 48)).last_hidden_state
    laco.compress(encoder, processor, laco.methods.ToMe(r=3))
    there = ~encoder(torch.zeros(1, 3, 48, 48)).last_hidden_state[0, :, 0].isnan()
    assert int(there.sum()) == before.shape[1] - 3 * len(encoder.encoder.layers)
    laco.decompress(encoder, processor)
    assert torch.equal(encoder(torch.zeros(1, 3, 48, 48)).last_hidden_state, before)
