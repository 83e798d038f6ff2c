"""What users may get wrong with methods that drop tokens: each has its own sentence."""

from copy import deepcopy

import pytest
import torch

import laco
import tiny
from families.matrix import NONE, ONE, built
from laco.families import family_of
from laco.methods import Method, registry


def compressed(name: str, method: Method):
    model, processor = deepcopy(built(name, "stock"))
    return laco.compress(model, processor, method)


def refused(name: str, method: Method, match: str, prompts=(ONE,)) -> None:
    model, processor = compressed(name, method)
    with pytest.raises(laco.LacoError, match=match), torch.no_grad():
        model(**tiny.CASES[name].inputs(processor, *prompts))


@pytest.mark.parametrize("kind", [laco.DivPrune, laco.FastV, laco.EViT, laco.Folder])
@pytest.mark.parametrize("keep", [0, -3, 1.5])
def test_budgets_that_are_none(kind, keep):
    with pytest.raises(laco.LacoError, match=f"{kind.name}: keep .*got {keep}"):
        kind(keep=keep)


@pytest.mark.parametrize("method", [laco.DivPrune(keep=1000), laco.FastV(keep=1000, layer=1)], ids=lambda x: x.name)
def test_a_budget_above_all_tokens(method):
    refused("llava-siglip", method, f"{method.name} cannot keep 1000 of \\d+ visual tokens")


STATIC = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "cache_implementation": "static"}


@pytest.mark.parametrize("method", [laco.DivPrune(), laco.FlexSelect(), laco.FastV(layer=1)], ids=lambda x: x.name)
def test_a_cache_of_a_fixed_size(method):
    model, processor = compressed("llava-siglip", method)
    batch = tiny.CASES["llava-siglip"].inputs(processor, (f"{ONE[0]} or not?", ONE[1]))
    with pytest.raises(laco.LacoError, match="with a dynamic cache alone, not with a StaticLayer; leave out"):
        model.generate(**batch, **STATIC)


@pytest.mark.parametrize(
    ("name", "method", "prompt"),
    [("internvl-internvit", laco.ToMe(r=2), ONE), ("llava-siglip", laco.DivPrune(), NONE)],
    ids=["merged for the encoder alone", "no picture"],
)
def test_a_cache_of_a_fixed_size_where_nothing_is_dropped(name, method, prompt):
    model, processor = compressed(name, method)
    batch = tiny.CASES[name].inputs(processor, prompt)
    dynamic = model.generate(**batch, **STATIC | {"cache_implementation": None})
    assert torch.equal(model.generate(**batch, **STATIC), dynamic)


@pytest.mark.parametrize(
    "kind", [kind for kind in registry().values() if "cls_attention" in kind.needs], ids=lambda kind: kind.name
)
def test_without_a_cls_token_the_attention_from_all_tokens_is_taken(kind):
    model, processor = compressed("llava-siglip", kind(keep=0.5))
    assert not family_of(model).prefix(model.config)
    with torch.no_grad():
        assert model(**tiny.CASES["llava-siglip"].inputs(processor, ONE)).logits.isfinite().all()


def test_the_question_is_needed():
    model, processor = compressed("llava-siglip", laco.CDPruner(keep=0.5))
    batch = tiny.CASES["llava-siglip"].inputs(processor, ONE)
    with pytest.raises(laco.LacoError, match="cdpruner needs the question"):
        model.get_image_features(pixel_values=batch["pixel_values"])
    picture = batch["input_ids"][0] == model.config.image_token_id
    alone = {name: batch[name][:, picture] for name in ("input_ids", "attention_mask")}
    with pytest.raises(laco.LacoError, match="cdpruner needs text, but the prompt has none"):
        model(**alone, pixel_values=batch["pixel_values"])


def test_what_no_model_gathers_is_refused_at_once():
    with pytest.raises(laco.LacoError, match="needs clip_text and clip_tokens, which laco does not gather"):
        compressed("llava-clip", laco.CDPruner(keep=0.5, relevance="clip"))


def test_prompts_without_a_picture_are_no_matter():
    model, processor = compressed("llava-siglip", laco.CDPruner(keep=0.5))
    with torch.no_grad():
        assert model(**tiny.CASES["llava-siglip"].inputs(processor, NONE)).logits.isfinite().all()


@pytest.mark.parametrize("name", ["llava-siglip", "llava_onevision-siglip", "qwen2_5_vl-qwen2_5_vl"])
def test_video_methods_on_still_pictures(name):
    refused(name, laco.EVS(keep=0.5), "evs compares frames of videos")


def test_layers_past_the_end():
    with pytest.raises(laco.LacoError, match=r"fastv drops tokens between layers .* last point can be 1; got 2"):
        compressed("llava-siglip", laco.FastV(layer=2))
