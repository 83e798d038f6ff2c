"""What users may get wrong with methods that drop tokens: each has its own sentence."""

from copy import deepcopy

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from transformers import LlavaForConditionalGeneration, MistralConfig

import laco
import tiny
from families.matrix import NONE, ONE, built
from laco.families import family_of
from laco.families.compat import TAKES_FEATURES
from laco.methods import Method, Plan, registry


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


@pytest.mark.parametrize(
    "method", [laco.FastV(layer=1), laco.FlexSelect(), laco.CDPruner()], ids=lambda method: method.name
)
def test_embeddings_do_not_tell_the_question(method):
    """`generate` may be given both; methods that look at pictures alone want none."""
    model, processor = compressed("llava-siglip", method)
    batch = dict(tiny.CASES["llava-siglip"].inputs(processor, (f"{ONE[0]} or not?", ONE[1])))
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    by_tokens = model.generate(**batch, **settings)
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach()
    assert torch.equal(model.generate(**batch, inputs_embeds=embeds, **settings), by_tokens)
    del batch["input_ids"]
    for ask in (model, lambda **given: model.generate(**given, **settings)):
        with pytest.raises(laco.LacoError, match=f"{method.name} needs the question: give .* input_ids together"):
            ask(**batch, inputs_embeds=embeds)


def test_embeddings_are_enough_for_methods_that_look_at_pictures():
    model, processor = compressed("llava-siglip", laco.DivPrune(keep=0.3))
    batch = dict(tiny.CASES["llava-siglip"].inputs(processor, ONE))
    with torch.no_grad():
        by_tokens = model(**batch).logits
        embeds = model.get_input_embeddings()(batch.pop("input_ids"))
        assert torch.equal(model(**batch, inputs_embeds=embeds).logits, by_tokens)


@pytest.mark.parametrize("kind", [laco.DivPrune, laco.VisionZip])
@pytest.mark.parametrize("kept", [[0, 3, 3, 5], [2, -1]], ids=["twice", "not there"])
def test_plans_that_have_no_place_in_a_model(monkeypatch, kind, kept):
    monkeypatch.setattr(kind, "plan", lambda self, signals: Plan(torch.tensor(kept)))
    refused("llava-clip", kind(), "keeps a token twice, or one that is not there, .*leave out strict_reference")


def mistral(window: int | None) -> LlavaForConditionalGeneration:
    config = deepcopy(built("llava-siglip", "stock")[0].config)
    text = config.text_config
    config.text_config = MistralConfig(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=window,
        pad_token_id=text.pad_token_id,
    )
    return LlavaForConditionalGeneration(config)


@pytest.mark.parametrize("method", [laco.DivPrune(), laco.FastV(layer=1), laco.EViT()], ids=lambda x: x.name)
def test_language_models_with_a_sliding_window_in_all_layers(method):
    with pytest.raises(laco.LacoError, match=r"sees the last 6 tokens alone; .* sliding_window=None in"):
        laco.compress(mistral(6), None, method)
    laco.compress(mistral(None), None, method)
    laco.compress(mistral(6), None, laco.LaCo())


@pytest.mark.parametrize("method", [laco.DivPrune(), laco.FastV(layer=1), laco.EViT()], ids=lambda x: x.name)
def test_models_that_are_spread_over_devices(method):
    """Hooks of accelerate hold the layers' own forward, which a change of their classes would not reach."""
    model, processor = deepcopy(built("llava-siglip", "stock"))
    spread, its = laco.compress(*deepcopy((model, processor)), method)
    for some in (model, spread):
        for layer in some.model.language_model.layers:
            add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu"))
    with pytest.raises(laco.LacoError, match="spread over devices; compress or decompress it before dispatching it"):
        laco.compress(model, processor, method)
    batch = tiny.CASES["llava-siglip"].inputs(its, ONE)
    with torch.no_grad():
        logits = spread(**batch).logits
    with pytest.raises(laco.LacoError, match="spread over devices"):
        laco.decompress(spread, its)
    with torch.no_grad():
        assert torch.equal(spread(**batch).logits, logits)


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


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("llava-siglip", laco.FastV(layer=1)),
        ("llava-siglip", laco.DivPrune()),
        ("llava-siglip", laco.EViT()),
        ("internvl-internvit", laco.ToMe(r=2)),
        ("qwen2_5_vl-qwen2_5_vl", laco.LaCo(layer=2)),
    ],
    ids=lambda x: getattr(x, "name", x),
)
def test_numbers_that_are_none_are_not_taken_for_tokens_that_were_dropped(name, method):
    model, processor = compressed(name, method)
    batch = tiny.CASES[name].inputs(processor, ONE)
    batch["pixel_values"] = batch["pixel_values"] * torch.nan
    with pytest.raises(laco.LacoError, match="puts out NaN"), torch.no_grad():
        model(**batch)


def test_text_that_is_no_number_is_not_dropped():
    model, processor = compressed("llava-siglip", laco.DivPrune())
    batch = tiny.CASES["llava-siglip"].inputs(processor, ONE)
    with torch.no_grad():
        model.get_input_embeddings().weight[batch["input_ids"][0, -1]] = torch.nan
    with pytest.raises(laco.LacoError, match="embeddings of text are NaN"):
        model(**batch)


def test_labels_that_begin_before_a_picture():
    """Up to where a method reads there would be nothing to drop: training without compression, unnoticed."""
    name, method = "llava-siglip", laco.FastV(keep=0.4, layer=1)
    model, processor = compressed(name, method)
    batch = tiny.CASES[name].inputs(processor, ("see <image> what is it? yes", ONE[1]))
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == model.config.image_token_id, -100)
    with pytest.raises(laco.LacoError, match="fastv reads a prompt up to the first answer, but labels begin before"):
        model(**batch, labels=labels)
    labels[:, :-4] = -100
    held = model(**batch, labels=labels, use_cache=True).past_key_values.layers[-1].keys.shape[-2]
    assert held < batch["input_ids"].shape[1]
    model, processor = compressed(name, laco.CDPruner(keep=0.4))
    batch = tiny.CASES[name].inputs(processor, ("see <image> what is it? yes", ONE[1]))
    with pytest.raises(laco.LacoError, match=r"cdpruner needs text, but .* not labelled as an answer"):
        model(**batch, labels=batch["input_ids"])


@pytest.mark.skipif(not TAKES_FEATURES, reason="chunks of prompts with pictures are newer")
@pytest.mark.parametrize("method", [laco.FastV(layer=1), laco.FlexSelect()], ids=lambda x: x.name)
def test_a_prompt_that_is_read_in_chunks(method):
    model, processor = compressed("internvl-internvit", method)
    batch = tiny.CASES["internvl-internvit"].inputs(processor, (f"{ONE[0]} or not?", ONE[1]))
    with pytest.raises(laco.LacoError, match=f"{method.name} chooses by a whole prompt, which prefill_chunk_size"):
        model.generate(**batch, max_new_tokens=2, prefill_chunk_size=8)


def test_a_placeholder_that_is_generated_is_a_word_like_others():
    class Forced:
        def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            forced = torch.full_like(scores, -torch.inf)
            forced[:, model.config.image_token_id] = 0
            return forced

    model, processor = compressed("llava-siglip", laco.FastV(keep=14, layer=1))
    batch = tiny.CASES["llava-siglip"].inputs(processor, (f"{ONE[0]} or not?", ONE[1]))
    out = model.generate(**batch, max_new_tokens=3, min_new_tokens=3, pad_token_id=0, logits_processor=[Forced()])
    assert (out[0, -3:] == model.config.image_token_id).all()
