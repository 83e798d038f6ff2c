"""The interleaved clock: order, ratios, intervals, and the parts of a model that it times."""

import time
from itertools import pairwise
from math import comb

import pytest
import torch

import laco
import tiny
from laco.cost import encoder_call, interleave, median_interval, prefill_call, training_call
from laco.train.collate import Collator, Item


def test_rounds_are_interleaved_and_nothing_always_follows_the_same() -> None:
    def order() -> list[str]:
        calls: list[str] = []
        timings = interleave({n: lambda n=n: calls.append(n) for n in "abc"}, rounds=12, warmup=1, progress=False)
        assert all(len(values) == 12 for values in timings.milliseconds.values())
        return calls

    calls = order()
    assert calls[:3] == ["a", "b", "c"]  # warms up
    assert all(sorted(calls[i : i + 3]) == ["a", "b", "c"] for i in range(0, len(calls), 3))
    assert {f"{x}{y}" for x, y in pairwise(calls[3:]) if x != y} == {"ab", "ac", "ba", "bc", "ca", "cb"}
    assert calls == order()


def test_times_and_ratios_are_real() -> None:
    waits = {"slow": 0.02, "fast": 0.005}
    timings = interleave({n: lambda s=s: time.sleep(s) for n, s in waits.items()}, rounds=7, progress=False)
    assert 20 <= timings.median("slow") < 60
    ratio = timings.speedup("fast")
    assert ratio.low <= ratio.value <= ratio.high
    assert 1.5 < ratio.value < 4.5  # 4 on a quiet machine
    assert timings.speedup("slow").value == 1
    assert timings.speedup("slow", over="fast").value == pytest.approx(1 / ratio.value)
    assert timings.summary()["fast"]["speedup"] == ratio.value
    assert timings.machine["threads"] == torch.get_num_threads()
    assert timings.machine["processor"]


def test_the_interval_of_a_median_covers_95_per_cent() -> None:
    assert median_interval([3, 1, 2]).model_dump() == {"value": 2, "low": 1, "high": 3}
    for n in (6, 10, 25):
        found = median_interval([float(i) for i in range(n)])
        rank = int(found.low)  # the true median lies below ordered[rank] with this probability
        assert found.high == n - 1 - rank
        outside = [2 * sum(comb(n, k) for k in range(cut)) / 2**n for cut in (rank + 1, rank + 2)]
        assert outside[0] <= 0.05 < outside[1]


def test_the_parts_of_a_model() -> None:
    model, processor = tiny.llava()
    processor.chat_template = (
        "{% for m in messages %}{% for part in m.content %}"
        "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
    )
    laco.compress(model, processor, laco.LaCo(depth=1 / 4))
    inputs = processor(text="<image>what?", images=tiny.picture(), return_tensors="pt")
    with torch.no_grad():
        whole = model(**inputs)
    assert encoder_call(model, inputs)()["image"].pooler_output[0].shape == (9, model.config.text_config.hidden_size)
    torch.testing.assert_close(prefill_call(model, inputs)().logits[:, -1], whole.logits[:, -1])

    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    batch = Collator(processor)([Item([tiny.picture()], [("what?", "that"), ("why?", "so")])])
    step = training_call(model, batch, lr=0.1)
    step()
    step()
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("method", [laco.VidCom2(keep=0.5), laco.CDPruner(keep=0.5), laco.FlexSelect(keep=0.5), None])
def test_the_parts_of_a_model_that_watches_a_video_or_reads_the_question(method: laco.Method | None) -> None:
    case = tiny.CASES["llava_onevision-siglip"]
    model, processor = case.build()
    if method is not None:
        laco.compress(model, processor, method)
    inputs = case.videos(model, processor, frames=3, seed=0)
    with torch.no_grad():
        whole = model(**inputs)
    features = encoder_call(model, inputs)()
    assert list(features) == ["video"]
    missing = features["video"].pooler_output[0].isnan().any(dim=-1).sum()
    # What is chosen in the language model leaves there.
    assert missing == (27 // 2 if isinstance(method, laco.VidCom2 | laco.CDPruner) else 0)
    torch.testing.assert_close(prefill_call(model, inputs)().logits[:, -1], whole.logits[:, -1])
