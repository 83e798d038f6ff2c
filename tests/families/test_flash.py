"""Flash attention reads what is left of pictures as attention by sdpa does; its kernels are plain torch here."""

from copy import deepcopy
from typing import Any

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash
from torch import Tensor

import laco
import tiny
from families.matrix import ONE
from families.test_glimpse_prune import deep
from families.test_turns import METHODS

DEEP_ENOUGH = {name: method for name, method in METHODS.items() if name != "pyramid_drop"}  # behind DeepStack
every_method = pytest.mark.parametrize("method", DEEP_ENOUGH.values(), ids=DEEP_ENOUGH)


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    """(Lq, H, d), (Lk, G, d) -> (Lq, H, d); the last query sees all keys."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    logits = torch.einsum("qhd,khd->hqk", q, k) * scale
    if causal:
        seen = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
        logits = logits.masked_fill(~seen, -torch.inf)
    return torch.einsum("hqk,khd->qhd", logits.softmax(dim=-1).nan_to_num(), v)


def kernel(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, softmax_scale: float = 1, **_: Any) -> Tensor:
    return torch.stack([attend(*qkv, causal, softmax_scale) for qkv in zip(q, k, v, strict=True)])


def varlen_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool = False,
    softmax_scale: float = 1,
    **_: Any,
) -> Tensor:
    texts = [x.split(cu.diff().tolist()) for x, cu in ((q, cu_seqlens_q), (k, cu_seqlens_k), (v, cu_seqlens_k))]
    return torch.cat([attend(*qkv, causal, softmax_scale) for qkv in zip(*texts, strict=True)])


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = (kernel, varlen_kernel, None, flash._pad_input, flash._unpad_input)
    monkeypatch.setattr(flash, "_lazy_imports", lambda *_, **__: ours)
    monkeypatch.setattr(flash, "_loaded_implementation", None)


def compressed(name: str, method: Any) -> Any:
    torch.manual_seed(1)
    return laco.compress(*deepcopy(deep(name)), method)


def by_flash(model: Any) -> Any:
    copy = deepcopy(model)
    copy.base_model.language_model.config._attn_implementation = "flash_attention_2"
    return copy


@every_method
def test_two_turns_with_pictures(kernels, method):
    """Behind a cache, positions with gaps are those of one text still."""
    model, processor = compressed("llava-siglip", method)
    then = ("so <image> what?", [tiny.picture(9)])
    first, second = (tiny.CASES["llava-siglip"].inputs(processor, prompt) for prompt in (ONE, then))
    outs = []
    for kind in (model, by_flash(model)):
        with torch.no_grad():
            past = kind(**first, use_cache=True).past_key_values
            texts = [kind(**{**second, "attention_mask": None}, past_key_values=past).logits[:, -1]]
            texts += [kind(input_ids=torch.tensor([[70]]), past_key_values=past).logits[:, -1]]
        outs.append(torch.stack(texts))
    torch.testing.assert_close(*outs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["llava-siglip", "qwen2_5_vl-qwen2_5_vl", "qwen3_vl-qwen3_vl"])
@every_method
def test_answers(kernels, name, method):
    model, processor = compressed(name, method)
    batch = tiny.CASES[name].inputs(processor, ONE)
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "output_logits": True, "return_dict_in_generate": True}
    outs = [kind.generate(**batch, **settings, do_sample=False, pad_token_id=0) for kind in (model, by_flash(model))]
    torch.testing.assert_close(*(torch.stack(out.logits) for out in outs), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", [laco.DivPrune(keep=0.3), laco.FastV(layer=2, keep=0.3)], ids=lambda x: x.name)
def test_texts_that_positions_alone_tell_apart(method):
    model, processor = compressed("llava-siglip", method)
    batch = tiny.CASES["llava-siglip"].inputs(processor, ONE)
    ids = torch.cat([batch["input_ids"]] * 2, dim=1)
    positions = torch.arange(batch["input_ids"].shape[1]).repeat(2)[None]
    pixels = torch.cat([batch["pixel_values"]] * 2)
    with pytest.raises(laco.LacoError, match="from several texts in one sequence that positions alone tell apart"):
        model(input_ids=ids, pixel_values=pixels, position_ids=positions)
