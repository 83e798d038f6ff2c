"""Prompts that have a placeholder for every visual token that a method leaves: the same as full prompts, in all."""

import json
import pickle
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoProcessor

import laco
import tiny
from families.matrix import ONE, SQUARE, TWO, Prompt, built
from families.test_reductions import CASES, last_layer, methods
from laco.families import family_of
from laco.families.compat import TAKES_FEATURES
from laco.families.counts import CountingProcessor, Counts
from laco.families.reduction import kept_columns
from laco.families.reduction.kept import Kept
from laco.families.reduction.short import Short
from laco.methods import Plan

KINDS = ["div_prune", "renumbered", "visionzip", "cdpruner", "flexselect", "explainability"]
# Of LLaVA-OneVision, whose line breaks between tiles leave with their rows, only pictures beside others.
WHOLE = [name for name in CASES if not name.startswith("llava_onevision")]
PROMPTS: list[Prompt] = [(f"{text} or not?", pictures) for text, pictures in (ONE, TWO, SQUARE)]


def no_beams(name: str) -> None:
    if name.startswith("qwen") and not TAKES_FEATURES:
        pytest.skip("transformers before 5.18 finds a sample's pictures by tokens that tiny prompts do not have")


every_case = pytest.mark.parametrize("name", CASES)
every_kind = pytest.mark.parametrize("kind", KINDS)


def compressed(name: str, *several: Any) -> tuple[Any, Any, Any]:
    """A model, its processor, and one that counts every token."""
    model, processor = deepcopy(built(name, "stock"))
    its = deepcopy(processor)
    torch.manual_seed(0)
    for method in several:
        laco.compress(model, processor, method)
    return model, processor, its


def both(name: str, processor: Any, its: Any, *prompts: Prompt) -> tuple[Any, Any]:
    case = tiny.CASES[name]
    return case.inputs(processor, *prompts), case.inputs(its, *prompts)


def visual(model: Any, batch: Any) -> Tensor:
    return (batch["input_ids"] == model.config.image_token_id).sum(dim=1)


@torch.no_grad()
def said(model: Any, batch: Any, **further: Any) -> Any:
    return model(**batch, **further)


def ends(batch: Any, number: int) -> list[int]:
    return batch["input_ids"][0, -number:].tolist()


@every_kind
@every_case
def test_short_and_full_prompts_say_the_same(name, kind):
    model, processor, its = compressed(name, methods(name)[kind])
    short, full = both(name, processor, its, *PROMPTS)
    assert visual(model, short).sum() < visual(model, full).sum()
    mine, wanted = said(model, short), said(model, full)
    assert mine.logits.shape[:2] == short["input_ids"].shape
    text = 4  # behind the last picture
    torch.testing.assert_close(mine.logits[:, -text:], wanted.logits[:, -text:], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS[:3])
@pytest.mark.parametrize("name", WHOLE)
def test_what_enters_the_language_model_is_the_prompt_as_it_was_given(name, kind):
    """Every placeholder is one token that is read, every token that is read stands in the cache."""
    model, processor, its = compressed(name, methods(name)[kind])
    short, full = both(name, processor, its, PROMPTS[0])
    assert 0 < visual(model, short) < visual(model, full)
    out = said(model, short, use_cache=True, output_hidden_states=True)
    length = short["input_ids"].shape[1]
    assert out.past_key_values.get_seq_length() == length
    assert {layer.keys.shape[-2] for layer in out.past_key_values.layers} == {length}
    assert kept_columns(out.past_key_values)[0].tolist() == [list(range(length))]
    assert {state.shape[1] for state in out.hidden_states} == {length}
    wanted = said(model, full, use_cache=True).past_key_values
    for mine, theirs in zip(out.past_key_values.layers, wanted.layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys, rtol=1e-3, atol=1e-5)  # turned by the same positions


@every_kind
@every_case
@pytest.mark.parametrize("settings", [{}, {"use_cache": False}, {"num_beams": 2}], ids=["greedy", "no cache", "beams"])
def test_short_and_full_prompts_go_on_the_same(name, kind, settings):
    model, processor, its = compressed(name, methods(name)[kind])
    if "num_beams" in settings:
        no_beams(name)
    # transformers itself mixes up the pictures of beams of several samples in some families.
    prompts = PROMPTS[:1] if "num_beams" in settings else PROMPTS
    new = [
        model.generate(**batch, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0, **settings)[:, -5:]
        for batch in both(name, processor, its, *prompts)
    ]
    assert torch.equal(*new)


@pytest.mark.parametrize("name", ["llava-siglip", "internvl-internvit", "smolvlm-smolvlm"])
def test_beams_of_a_batch_with_unequal_numbers_of_pictures(name):
    model, processor, its = compressed(name, methods(name)["div_prune"])
    new = [
        model.generate(**batch, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0, num_beams=3)[
            :, -5:
        ]
        for batch in both(name, processor, its, *PROMPTS)
    ]
    assert torch.equal(*new)


@pytest.mark.parametrize("kind", ["div_prune", "renumbered", "cdpruner"])
@every_case
def test_training_on_short_and_full_prompts(name, kind):
    model, processor, its = compressed(name, methods(name)[kind])
    losses, gradients = [], []
    for batch in both(name, processor, its, *PROMPTS):
        labels = batch["input_ids"].clone()
        labels[:, :-3] = -100
        model.zero_grad()
        loss = model(**batch, labels=labels).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["tome", "evit"])
def test_tokens_that_leave_inside_the_encoder_have_no_placeholders(kind):
    method = {"tome": laco.ToMe(r=3), "evit": laco.EViT(keep=0.6)}[kind]
    model, processor, its = compressed("llava-clip", method)
    short, full = both("llava-clip", processor, its, *PROMPTS)
    family = family_of(model)
    each = family.tokens_read(model.config, family.grid(model.config))
    assert visual(model, short).tolist() == [each, 2 * each, each]
    torch.testing.assert_close(said(model, short).logits[:, -4:], said(model, full).logits[:, -4:])


@pytest.mark.parametrize("name", ["llava-siglip", "qwen2_5_vl-qwen2_5_vl", "qwen3_vl-qwen3_vl"])
@pytest.mark.parametrize("kind", ["fastv", "fastv_renumbered", "pyramid_drop", "sparsevlm"])
def test_a_method_inside_the_language_model_behind_a_selector(name, kind):
    model, processor, its = compressed(name, methods(name)["div_prune"], methods(name)[kind])
    short, full = both(name, processor, its, *PROMPTS)
    mine, wanted = (said(model, batch, use_cache=True) for batch in (short, full))
    torch.testing.assert_close(mine.logits[:, -4:], wanted.logits[:, -4:], rtol=1e-3, atol=1e-5)
    alone = both(name, processor, its, PROMPTS[0])
    pasts = [said(model, batch, use_cache=True).past_key_values for batch in alone]
    held = [[layer.keys.shape[-2] for layer in past.layers] for past in pasts]
    assert held[0] == held[1]
    assert held[0][last_layer(name)] < held[0][0]
    more = torch.tensor([ends(short, 2)])
    torch.testing.assert_close(
        *(said(model, {"input_ids": more}, past_key_values=past).logits for past in pasts), rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["div_prune", "renumbered"])
@every_case
def test_step_by_step_by_hand(name, kind):
    """Without `generate`: positions of later tokens follow from what the cache says was read."""
    model, processor, its = compressed(name, methods(name)[kind])
    logits = []
    for batch in both(name, processor, its, PROMPTS[0]):
        past = said(model, {k: x for k, x in batch.items() if k != "attention_mask"}, use_cache=True).past_key_values
        for token in ends(batch, 3):
            out = said(model, {"input_ids": torch.tensor([[token]])}, past_key_values=past, use_cache=True)
        logits.append(out.logits)
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-5)


def test_packed_questions():
    """A mask of pairs and positions of their own, as in training."""
    model, processor, its = compressed("llava-siglip", laco.DivPrune(keep=0.3))
    logits = []
    for batch in both("llava-siglip", processor, its, PROMPTS[0]):
        ids = torch.cat([batch["input_ids"], torch.tensor([ends(batch, 3)])], dim=1)
        length = ids.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        mask[-3:, -6:-3] = False  # two questions behind one picture
        place = torch.tensor([[*range(length - 3), *range(length - 6, length - 3)]])
        packed = {"input_ids": ids, "pixel_values": batch["pixel_values"], "position_ids": place}
        logits.append(said(model, packed, attention_mask=mask[None, None]).logits[:, -6:])
    torch.testing.assert_close(*logits)
    torch.testing.assert_close(logits[0][:, :3], logits[0][:, 3:])  # the same question twice


@pytest.mark.parametrize("method", [laco.DivPrune(keep=0.4), laco.EVS(keep=0.4)], ids=lambda method: method.name)
@pytest.mark.parametrize("name", ["llava_onevision-siglip", "qwen2_vl-qwen2_vl", "qwen2_5_vl-qwen2_5_vl"])
@pytest.mark.parametrize("beams", [1, 2])
def test_videos(name, method, beams):
    if beams > 1:
        no_beams(name)
    model, processor, its = compressed(name, method)
    full = tiny.CASES[name].videos(model, its, 5, 0)
    there = full["input_ids"][0] == model.config.video_token_id
    grid = full.get("video_grid_thw", torch.tensor([[5]]))
    left = family_of(model).counts(model.config).placeholders(int(there.sum()), int(grid[0, 0]))
    assert left < int(there.sum())
    stay = ~there
    stay[there.nonzero()[:left]] = True
    rows = ("input_ids", "attention_mask", "mm_token_type_ids")
    short = {key: x[:, stay] if key in rows else x for key, x in full.items()}
    if name.startswith("llava"):  # its processor takes the frames that the others get as numbers
        assert torch.equal(short["input_ids"], tiny.CASES[name].videos(model, processor, 5, 0)["input_ids"])
    torch.testing.assert_close(said(model, short).logits[:, -1], said(model, full).logits[:, -1], rtol=1e-3, atol=1e-5)
    new = [
        model.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0, num_beams=beams)
        for batch in (short, full)
    ]
    assert torch.equal(new[0][:, -4:], new[1][:, -4:])


def test_frames_of_qwen3_vl_keep_all_placeholders():
    """Each has its own, and how many of its tokens stay depends on what is seen."""
    model, _, _ = compressed("qwen3_vl-qwen3_vl", laco.DivPrune(keep=0.4))
    counts = family_of(model).counts(model.config)
    assert (counts.placeholders(20), counts.placeholders(20, frames=2)) == (8, 20)


@every_case
def test_processors_are_saved_loaded_copied_and_taken_back(name, tmp_path):
    stock = built(name, "stock")[1]
    model, processor, _ = compressed(name, laco.DivPrune(keep=0.3))
    processor.save_pretrained(tmp_path)
    wanted = tiny.CASES[name].inputs(processor, *PROMPTS)["input_ids"]
    for again in (AutoProcessor.from_pretrained(tmp_path), deepcopy(processor), pickle.loads(pickle.dumps(processor))):
        assert type(again) is type(processor)
        assert torch.equal(tiny.CASES[name].inputs(again, *PROMPTS)["input_ids"], wanted)
    _, processor = laco.decompress(model, processor)
    assert type(processor) is type(stock)
    assert processor.to_dict() == stock.to_dict()
    assert vars(processor).keys() == vars(stock).keys()


def test_a_processor_that_was_saved_without_its_counts(tmp_path):
    _, processor, _ = compressed("qwen2_vl-qwen2_vl", laco.DivPrune(keep=0.3))
    processor.save_pretrained(tmp_path)
    file = tmp_path / "processor_config.json"
    settings = json.loads(file.read_text())
    del settings["counts"]
    file.write_text(json.dumps(settings))
    with pytest.raises(laco.LacoError, match="does not say what its model leaves"):
        AutoProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", [name for name in WHOLE if name.startswith(("qwen", "internvl"))])
def test_what_servers_ask_the_processor(name):
    _, processor, its = compressed(name, laco.DivPrune(keep=0.25))
    short, full = both(name, processor, its, SQUARE)
    mine, theirs = (p._get_num_multimodal_tokens([(48, 48)]).num_image_tokens[0] for p in (processor, its))
    assert theirs - mine == full["input_ids"].shape[1] - short["input_ids"].shape[1] > 0


def test_no_method_no_class():
    model, processor, _ = compressed("qwen2_vl-qwen2_vl", laco.LaCo(layer=1))
    assert not isinstance(processor, CountingProcessor)
    laco.compress(model, processor, laco.methods.DynTok(threshold=0.2))
    full = tiny.CASES["qwen2_vl-qwen2_vl"].inputs(processor, ONE)
    laco.decompress(model, processor)
    laco.compress(model, processor, laco.LaCo(layer=1))
    assert torch.equal(tiny.CASES["qwen2_vl-qwen2_vl"].inputs(processor, ONE)["input_ids"], full["input_ids"])


def test_a_budget_above_all_tokens_is_refused_by_the_model():
    model, processor, _ = compressed("qwen2_vl-qwen2_vl", laco.DivPrune(keep=500))
    batch = tiny.CASES["qwen2_vl-qwen2_vl"].inputs(processor, ONE)
    with pytest.raises(laco.LacoError, match="div_prune cannot keep 500 of"):
        model(**batch)


def test_a_method_that_does_not_leave_what_it_says(monkeypatch):
    model, processor, _ = compressed("llava-siglip", laco.DivPrune(keep=0.3))
    batch = tiny.CASES["llava-siglip"].inputs(processor, ONE)
    monkeypatch.setattr(laco.DivPrune, "plan", lambda self, signals: Plan(torch.arange(5)))
    with pytest.raises(laco.LacoError, match=r"another number of visual tokens .* static_count is False"):
        model(**batch)


def test_prompts_that_fit_neither_way_are_refused():
    model, processor, _ = compressed("llava-siglip", laco.DivPrune(keep=0.3))
    batch = tiny.CASES["llava-siglip"].inputs(processor, ONE)
    where = int((batch["input_ids"][0] == model.config.image_token_id).nonzero()[0])
    cut = {key: torch.cat([batch[key][:, :where], batch[key][:, where + 1 :]], 1) for key in batch if key[0] != "p"}
    with pytest.raises(ValueError, match="do not match"):
        model(**cut, pixel_values=batch["pixel_values"])


@pytest.mark.parametrize("name", [name for name in WHOLE if name.startswith("qwen")])
def test_positions_that_the_model_makes_may_be_given(name):
    model, processor, _ = compressed(name, laco.DivPrune(keep=0.3))
    batch = dict(tiny.CASES[name].inputs(processor, *PROMPTS))
    wanted = said(model, batch).logits
    own = {key: batch[key] for key in ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")}
    place, _ = model.model.get_rope_index(**own)
    del batch["mm_token_type_ids"]
    torch.testing.assert_close(said(model, batch, position_ids=place).logits[:, -4:], wanted[:, -4:])


def test_positions_of_ones_own_in_m_rope_are_refused():
    model, processor, _ = compressed("qwen2_5_vl-qwen2_5_vl", laco.DivPrune(keep=0.3))
    batch = tiny.CASES["qwen2_5_vl-qwen2_5_vl"].inputs(processor, ONE)
    place = torch.arange(batch["input_ids"].shape[1])
    with pytest.raises(laco.LacoError, match="leave them out"):
        model(**batch, position_ids=place.expand(3, 1, -1))


@pytest.mark.parametrize("name", ["qwen2_5_vl-qwen2_5_vl", "qwen3_vl-qwen3_vl"])
def test_other_ways_to_generate_with_m_rope(name):
    """Candidates behind the prompt, a picture at its end without a cache; and what cannot be says so."""
    model, processor, _ = compressed(name, laco.DivPrune(keep=0.4))
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    batch = tiny.CASES[name].inputs(processor, ("hello <image> what is this? this this", ONE[1]))
    wanted = model.generate(**batch, **settings)
    assert torch.equal(model.generate(**batch, **settings, prompt_lookup_num_tokens=3), wanted)
    ended = tiny.CASES[name].inputs(processor, ("what is <image>", ONE[1]))
    assert torch.equal(model.generate(**ended, **settings, use_cache=False), model.generate(**ended, **settings))
    with pytest.raises(laco.LacoError, match="with a dynamic cache alone"):
        model.generate(**batch, **settings, cache_implementation="static")
    embedded = {"inputs_embeds": model.get_input_embeddings()(batch.pop("input_ids")), **batch}
    with pytest.raises(laco.LacoError, match=r"generate needs input_ids|position_ids are those"):  # before 5.18
        model.generate(**embedded, **settings)


@pytest.mark.skipif(not TAKES_FEATURES, reason="chunks of prompts with pictures are newer")
def test_prefill_in_chunks_is_refused():
    model, processor, its = compressed("llava-siglip", laco.DivPrune(keep=0.3))
    short, full = both("llava-siglip", processor, its, ONE)
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with pytest.raises(laco.LacoError, match="prefill_chunk_size"):
        model.generate(**short, **settings, prefill_chunk_size=8)
    wanted = model.generate(**full, **settings)
    assert torch.equal(model.generate(**full, **settings, prefill_chunk_size=8), wanted)


def test_counts():
    half = Counts(selector=laco.DivPrune(keep=0.5))
    assert (half.left(10), half.left(10, frames=5)) == (5, 5)
    one_grid = Counts(selector=laco.DivPrune(keep=0.5), grid=8, behind_video=1)
    assert [one_grid.left(tokens) for tokens in (8, 9, 10)] == [4, 5, None]  # as it is; with a line break; with tiles
    assert one_grid.left(17, frames=2) == 9
    assert Counts(selector=laco.methods.DynTok()).left(10) is None
    assert Counts(selector=laco.DivPrune(keep=20)).placeholders(10) == 10
    assert Counts().left(10) == 10
    for counts in (half, one_grid, Counts(reducer=laco.ToMe(r=2), layers=3, last=2, prefix=1)):
        assert Counts.from_dict(counts.to_dict()) == counts


def test_short_by_hand():
    """A sample with a picture of four tokens, two of which stay; and one with two pictures, of which one is whole."""
    ids = torch.tensor([[0, 1, 9, 9, 2, 3, 4], [9, 9, 1, 9, 9, 9, 2]])
    short = Short.of(ids, {9: ([4, 4, 3], [2, 2, 3])})
    assert short.source_BL.tolist() == [[0, 1, 2, 3, 3, 3, 4, 5, 6], [0, 1, 1, 1, 2, 3, 4, 5, 6]]
    assert short.full(ids, 7).tolist() == [[0, 1, 9, 9, 9, 9, 2, 3, 4], [9, 9, 9, 9, 1, 9, 9, 9, 2]]
    assert short.positions(torch.arange(7)[None]).tolist() == [list(range(9))] * 2
    keep = torch.ones(2, 9, dtype=torch.bool)
    keep[0, [2, 4]] = keep[1, [0, 3]] = False  # two of each picture
    keep[1, 6] = False  # of the whole one
    given = short.given(Kept.of(keep))
    assert given.columns_BK.tolist() == [[0, 1, 3, 5, 6, 7, 8], [1, 2, 4, 5, 6, 7, 8]]
    assert short.gained(given.columns_BK).tolist() == [[0, 0, 1, 2, 2, 2, 2], [1, 1, 2, 2, 2, 2, 2]]
    assert short.numbered(given, torch.tensor([[-1, 3], [2, 7]])).tolist() == [[-1, 2], [1, 5]]
    assert Short.of(ids, {9: ([2, 2, 3], [2, 2, 3])}) is None
    uneven = Short.of(ids, {9: ([2, 4, 3], [2, 2, 3])})
    assert uneven.source_BL.tolist() == [[-1, -1, *range(7)], [0, 1, 1, 1, 2, 3, 4, 5, 6]]
    assert uneven.mask(None, 7).tolist() == [[0, 0, *[1] * 7], [1] * 9]
    with pytest.raises(laco.LacoError, match="another number of visual tokens"):
        short.given(Kept.of(torch.ones(2, 9, dtype=torch.bool)))
