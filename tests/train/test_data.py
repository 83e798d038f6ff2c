"""Training pictures: always the same ones, and with as little detail as the baseline is to see."""

import json

import numpy as np
import pytest

from laco.pictures import down_sampled
from laco.train.data import make_source
from laco.train.recipe import Data, Stage


def stage() -> Stage:
    return Stage(name="only", steps=2, batch_size=2, lr=1e-3)


@pytest.fixture(params=["world", "file"])
def source(request, tmp_path):
    if request.param == "world":
        return "world"
    make_source(Data(), stage(), 0, 0, 8)[0].images[0].save(tmp_path / "a.png")
    row = {"image": "a.png", "question": "what?", "answer": "this"}
    (tmp_path / "data.jsonl").write_text(json.dumps(row) + "\n")
    return str(tmp_path / "data.jsonl")


def test_down_sampled_pictures_ask_the_same_with_less_detail(source):
    plain, coarse = (make_source(Data(source=source, down_sample=factor), stage(), 0, 0, 8) for factor in (1, 2))
    for one, other in zip(map(plain.__getitem__, range(4)), map(coarse.__getitem__, range(4)), strict=True):
        assert one.asked == other.asked
        wanted = down_sampled(one.images[0], 2)
        assert np.array_equal(np.asarray(other.images[0]), np.asarray(wanted))
        assert np.abs(np.asarray(wanted, dtype=float) - np.asarray(one.images[0])).mean() > 0.1
