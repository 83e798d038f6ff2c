"""Every method can be told in full."""

import json
from dataclasses import fields

import pytest

from laco.describe import NEEDS, describe
from laco.methods import DecoderSignals, Signals, registry
from laco.methods.reducer import LayerSignals


@pytest.mark.parametrize("name", registry())
def test_every_need_is_explained(name: str) -> None:
    told = describe(name)
    assert all(told["needs"].values()), told["needs"]
    json.dumps(told)


def test_what_is_explained_is_a_signal() -> None:
    known = {field.name for signals in (Signals, DecoderSignals, LayerSignals) for field in fields(signals)}
    assert set(NEEDS) <= known
