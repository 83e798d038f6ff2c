"""A merger inside the encoder, behind it or as the projector, and a selector behind that, wherever both are taken."""

from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import laco
import tiny
from families.matrix import built
from families.test_reductions import CASES, every_case, last_layer, last_logits, prompts, views_by_hand
from laco.families import family_of
from laco.families.reduction.layout import Choice, laid_out
from laco.families.reduction.pictures import square_view
from laco.grid import pool_map
from laco.methods import Merger, Plan, Selector, Signals

MERGERS: dict[str, Merger] = {
    "inside": laco.LaCo(depth=1 / 2),
    "external": laco.LaCo(depth=1.0),
    "projector": laco.TokenPacker(),
}
SELECTORS: dict[str, Selector] = {
    "uniform_stride": laco.methods.UniformStride(keep=0.5),
    "div_prune": laco.methods.DivPrune(keep=0.5),
    "visionzip": laco.methods.VisionZip(keep=0.5),
    "vispruner": laco.methods.VisPruner(keep=0.5),
    "holov": laco.methods.HoloV(keep=0.5),
    "prunesid": laco.methods.PruneSID(keep=0.5),
}
# Only where the merger can take the place of the family's projector.
PLACES = [
    (name, place)
    for name in CASES
    for place in MERGERS
    if place != "projector" or family_of(built(name, "stock")[0]).connects
]


@cache
def merged(name: str, merger: Merger) -> tuple[Any, Any]:
    model, processor = deepcopy(built(name, "stock"))
    laco.compress(model, processor, merger)
    tiny.scramble(model)
    return model, processor


def both(name: str, merger: Merger, selector: Selector) -> tuple[Any, Any]:
    model, processor = deepcopy(merged(name, merger))
    laco.compress(model, processor, selector)
    return model, processor


def full(name: str, merger: Merger) -> Any:
    """A processor that goes on counting every token."""
    return merged(name, merger)[1]


def equal_alone(name: str, model: Any, processor: Any) -> None:
    case, some = tiny.CASES[name], prompts(name)
    together = last_logits(model, case.inputs(processor, *some))
    alone = torch.cat([last_logits(model, case.inputs(processor, prompt)) for prompt in some])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=2e-5)


def there(model: Any, batch: Any, token: int) -> Tensor:
    """(n,) which of the rows at these placeholders of one prompt the language model is given."""
    seen: dict[str, Any] = {}
    language_model = family_of(model).language_model(model)
    hook = language_model.register_forward_pre_hook(lambda _, __, kwargs: seen.update(kwargs), with_kwargs=True)
    last_logits(model, batch)
    hook.remove()
    return ~seen["inputs_embeds"][0, batch["input_ids"][0] == token, 0].isnan()


@pytest.mark.parametrize("kind", SELECTORS)
@pytest.mark.parametrize(("name", "place"), PLACES)
def test_a_batch_of_unequal_prompts_equals_each_alone_and_the_budget_holds(name, place, kind):
    selector = SELECTORS[kind]
    model, processor = both(name, MERGERS[place], selector)
    equal_alone(name, model, processor)
    batch = tiny.CASES[name].inputs(full(name, MERGERS[place]), prompts(name)[-1])
    left_n = there(model, batch, model.config.image_token_id)
    # CLS comes on top in VisionZip, where the projector takes it.
    extra = int(kind == "visionzip" and name.endswith("-clip") and place != "projector")
    for rows, grid in views_by_hand(name, model, batch, len(left_n)):
        assert int(left_n[rows].sum()) == selector.budget(grid.tokens) + extra


@pytest.mark.parametrize("merger", [laco.AveragePool(), laco.TokenPacker()], ids=lambda merger: merger.name)
@every_case
def test_a_selector_sees_the_means_of_the_windows_that_were_merged(name, merger, monkeypatch):
    """Keys and attention of the layer before, and features where the merger takes means: of the stock model's."""
    seen: list[list[Signals]] = []
    plan = laco.methods.VisionZip.plan
    monkeypatch.setattr(
        laco.methods.VisionZip, "plan", lambda self, signals: seen[-1].append(signals) or plan(self, signals)
    )
    for model, processor in (built(name, "stock"), merged(name, merger)):
        seen.append([])
        model = deepcopy(model)
        laco.compress(model, None, laco.methods.VisionZip(keep=0.5))
        last_logits(model, tiny.CASES[name].inputs(processor, prompts(name)[-1]))
    before, after = seen
    assert len(before) == len(after)
    for full, few in zip(before, after, strict=True):

        def means(x_NC: Tensor, full: Signals = full) -> Tensor:
            x_NC = x_NC.flatten(1) if x_NC.ndim > 1 else x_NC[:, None]
            return pool_map(x_NC.reshape(1, full.grid.height, full.grid.width, -1), 2).flatten(0, 2)

        assert few.grid.tokens == full.grid.tokens // 4
        torch.testing.assert_close(few.keys[few.prefix :].flatten(1), means(full.keys[full.prefix :]))
        if full.received is None:
            torch.testing.assert_close(few.cls_attention.T, means(full.cls_attention.T))
        else:
            torch.testing.assert_close(few.received[:, None], means(full.received))
        if merger == laco.AveragePool() or family_of(model).connects:
            torch.testing.assert_close(few.features[few.prefix :], means(full.features[full.prefix :]))


@pytest.mark.parametrize("kind", ["visionzip", "prunesid"])
@pytest.mark.parametrize("name", ["llava_onevision-siglip", "llava_onevision-clip", "qwen2_5_vl-qwen2_5_vl"])
def test_videos(name, kind):
    selector = SELECTORS[kind]
    model, _ = both(name, MERGERS["external"], selector)
    batch = tiny.CASES[name].videos(model, full(name, MERGERS["external"]), 4, 0)
    left_n = there(model, batch, model.config.video_token_id)
    breaks = int(name.startswith("llava_onevision"))
    assert int(left_n.sum()) == selector.budget(len(left_n) - breaks) + breaks


@pytest.mark.parametrize("name", ["idefics3-idefics3", "smolvlm-smolvlm"])
def test_maps_of_an_encoder_that_merges_early(name):
    glimpse = laco.methods.GlimpsePrune(keep=0.4, layer=last_layer(name), width=16, condition=16, threshold=0.0)
    model, processor = both(name, laco.LaCo(depth=0.1), glimpse)
    equal_alone(name, model, processor)


@pytest.mark.parametrize("keep", [0.25, 0.5, 1.0])
def test_prunesid_keeps_its_budget_where_no_projector_takes_cls(keep):
    name, selector = "internvl-internvit", laco.methods.PruneSID(keep=keep)
    model, processor = deepcopy(built(name, "stock"))
    laco.compress(model, processor, selector)
    equal_alone(name, model, processor)
    batch = tiny.CASES[name].inputs(built(name, "stock")[1], prompts(name)[-1])
    left_n = there(model, batch, model.config.image_token_id)
    assert int(left_n.sum()) == selector.budget(len(left_n))


def test_a_prefix_token_that_no_projector_takes_is_left_out():
    tokens_nD = torch.arange(8.0).view(4, 2)
    choice = Choice(square_view(4), Plan(torch.tensor([0, 2, 4])), 1, torch.randn(5, 3))
    out_nD = laid_out(tokens_nD, [choice])
    assert out_nD[:, 0].isnan().tolist() == [True, False, True, False]
    torch.testing.assert_close(out_nD[[1, 3]], tokens_nD[[1, 3]], rtol=0, atol=0)
