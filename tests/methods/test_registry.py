"""Methods by name, from saved settings, from other packages; and what they say to wrong settings."""

import json
from pathlib import Path

import pytest

from laco.errors import LacoError
from laco.methods import (
    AveragePool,
    LaCo,
    LDPv2,
    Method,
    PixelShuffle,
    RandomKeep,
    TokenPacker,
    WindowMerger,
    catalogue,
    from_dict,
    get,
    registry,
)


def test_every_method_comes_back_from_json() -> None:
    settings: list[Method] = [
        LaCo(depth=1 / 4, factor=3, shortcut="saliency", norm="rmsnorm", hidden=7, odd="crop"),
        AveragePool(layer=3),
        RandomKeep(seed=3),
        PixelShuffle(form="smolvlm", depth=1),
        LDPv2(),
        TokenPacker(heads=4),
        WindowMerger(attention=False, ffn=12),
    ]
    others = [method() for method in set(registry().values()) - {type(method) for method in settings}]
    for method in [*settings, *others]:
        assert from_dict(json.loads(json.dumps(method.to_dict()))) == method


def test_names() -> None:
    assert get("laco") is LaCo
    with pytest.raises(LacoError, match="did you mean 'token_packer'"):
        get("tokenpacker")
    with pytest.raises(LacoError, match="there are laco, average_pool"):
        get("zzz")
    with pytest.raises(LacoError, match='under "method"'):
        from_dict({"factor": 2})
    with pytest.raises(LacoError, match="laco has no setting 'facto'"):
        from_dict({"method": "laco", "facto": 2})


def test_catalogue_has_a_row_for_every_method() -> None:
    rows = {row["name"]: row for row in catalogue()}
    assert rows.keys() == registry().keys()
    assert rows["average_pool"]["trained"] is False
    assert rows["laco"]["places"] == ["encoder", "external"]
    assert "2507.02279" in rows["laco"]["paper"]
    assert all(row[key] for row in rows.values() for key in ("title", "paper", "confirmed", "assumed"))
    json.dumps(catalogue())


PLUGIN = """
from dataclasses import dataclass
from laco.methods import LaCo

@dataclass(frozen=True, kw_only=True)
class Elsewhere(LaCo):
    name = {name!r}
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts a package with an entry point of the group laco.methods on the path, as an installer would."""

    def with_entry(name: str, target: str) -> None:
        (tmp_path / "laco_elsewhere.py").write_text(PLUGIN.format(name=name))
        info = tmp_path / "laco_elsewhere-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: laco-elsewhere\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[laco.methods]\nelsewhere = {target}\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(__import__("sys").modules, "laco_elsewhere", raising=False)
        registry.cache_clear()

    yield with_entry
    registry.cache_clear()


def test_a_method_from_another_package(install) -> None:
    install("elsewhere", "laco_elsewhere:Elsewhere")
    method = from_dict({"method": "elsewhere", "hidden": 3})
    assert method.build(8).fc1.out_features == 3
    assert "elsewhere" in {row["name"] for row in catalogue()}


def test_another_package_may_not_take_a_name_or_bring_something_else(install) -> None:
    install("laco", "laco_elsewhere:Elsewhere")
    with pytest.raises(LacoError, match="reuses the name 'laco'"):
        registry()


def test_an_entry_point_must_be_a_method(install) -> None:
    install("elsewhere", "laco_elsewhere:dataclass")
    with pytest.raises(LacoError, match=r"is no laco\.methods\.Method"):
        registry()


@pytest.mark.parametrize(
    ("cls", "settings", "sentence"),
    [
        (LaCo, {"depth": 0}, "depth must lie in"),
        (LaCo, {"depth": 1.5}, "depth must lie in"),
        (LaCo, {"depth": float("nan")}, "depth must lie in"),
        (LaCo, {"depth": "1/4"}, "depth='1/4' does not fit"),
        (LaCo, {"layer": 0}, "layer counts"),
        (LaCo, {"depth": 0.5, "layer": 3}, "depth or layer, not both"),
        (LaCo, {"factor": 0}, "factor must be 1 or more"),
        (LaCo, {"factor": 2.5}, "factor=2.5 does not fit"),
        (LaCo, {"factor": True}, "factor=True does not fit"),
        (LaCo, {"odd": "pat"}, "'pad', 'resize', 'crop' or 'error'"),
        (LaCo, {"shortcut": "max"}, "'mean', 'none' or 'saliency'"),
        (LaCo, {"norm": "batchnorm"}, "'none', 'layernorm' or 'rmsnorm'"),
        (LaCo, {"activation": "swish"}, "'gelu', 'gelu_tanh', 'silu' or 'relu'"),
        (LaCo, {"hidden": 0}, "hidden must be 1 or more"),
        (LaCo, {"shortcut": "none", "zero_init": True}, "would make every merged token zero"),
        (PixelShuffle, {"form": "nano"}, "'internvl', 'smolvlm' or 'qwen'"),
        (WindowMerger, {"ffn": -1}, "ffn must be 1 or more"),
    ],
)
def test_wrong_settings(cls: type[Method], settings: dict, sentence: str) -> None:
    with pytest.raises(LacoError, match=r"^[^\n]*$") as error:
        cls(**settings)
    assert sentence in str(error.value)


@pytest.mark.parametrize("cls", [TokenPacker, WindowMerger])
def test_heads_must_divide_the_width(cls: type[Method]) -> None:
    assert cls().build(12).attention.heads == 4  # what the usual number and the width share
    with pytest.raises(LacoError, match="heads must be a divisor of the width 12; got 5"):
        cls(heads=5).build(12)
    with pytest.raises(LacoError, match="heads must be a divisor"):
        cls(heads=0).build(12)


def test_layers() -> None:
    assert LaCo().layer_in(24) == 6
    assert LaCo(depth=1 / 12).layer_in(27) == 2
    assert LaCo(depth=1e-3).layer_in(12) == 1
    assert LaCo(depth=1).layer_in(24, last=23) == 23
    assert LaCo(depth=0.99).layer_in(24, last=23) == 23
    assert LaCo(layer=5).layer_in(24) == 5
    assert AveragePool().layer_in(12) == 12
    with pytest.raises(LacoError, match="past the end"):
        LaCo(layer=24).layer_in(24, last=23)
