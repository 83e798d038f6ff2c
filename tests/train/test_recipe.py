"""Recipes: what is wrong is said in one sentence that names the key."""

from pathlib import Path

import pytest

from laco.errors import LacoError
from laco.train.recipe import GROUPS, load_recipe, parse_recipe
from small_runs import ANSWER, NEW

GOOD = {"output": "out", "model": "m", "stages": [ANSWER]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ouput": "x"}, "unknown key ouput; the nearest known key is output"),
        ({"stages": [ANSWER | {"step": 3}]}, "stages, answer: unknown key step; the nearest known key is steps"),
        ({"data": {"sourc": "world"}}, "unknown key data.sourc; the nearest known key is source"),
        ({"distill": {"wieght": 1}}, "nearest known key is weight"),
        ({"new": NEW}, "either model"),
        ({"model": None}, "either model"),
        ({"stages": []}, "stages"),
        ({"stages": [ANSWER | {"lr": {"compresor": 1e-3}}]}, "lr: there is no group compresor; the groups are"),
        ({"stages": [ANSWER | {"lr": {"projector": "x"}}]}, "a rate is a number, 0 or more; got 'x' for projector"),
        ({"stages": [ANSWER | {"lr": "fast"}]}, "stages, answer, lr: a rate is a number, 0 or more; got 'fast'"),
        ({"stages": [ANSWER | {"lr": -1}]}, "stages, answer, lr: a rate is a number, 0 or more; got -1"),
        ({"stages": [ANSWER | {"lr": float("nan")}]}, "stages, answer, lr: a rate is a number, 0 or more; got nan"),
        ({"stages": [ANSWER | {"steps": 0}]}, "stages, answer, steps should be greater than 0; got 0"),
        ({"stages": [ANSWER | {"questions": 0}]}, "nothing to learn"),
        ({"data": {"source": "d.jsonl"}, "stages": [ANSWER | {"dense": 1}]}, "world only"),
        ({"stages": [ANSWER | {"stills": 0.5}]}, "world-video only"),
        ({"stages": [ANSWER | {"pictures": 0.5}]}, "world-video only"),
        ({"data": {"source": "world-video"}, "model": None, "new": NEW}, "architecture: llava_onevision"),
        ({"data": {"source": "world-video"}, "stages": [ANSWER | {"dense": 1}]}, "world only"),
        ({"new": NEW | {"architecture": "llava_next"}, "model": None}, "new.architecture"),
        ({"precision": "fp8"}, "precision should be 'fp32' or 'bf16'; got 'fp8'"),
        ({"stages": ["see"]}, "stages, number 1 must hold keys and values, such as name: and steps:; got 'see'"),
        ({"stages": []}, "stages has no entry; give one or more"),
        ({"stages": [{"name": "see", "step": 1}]}, "stages, see: unknown key step; the nearest known key is steps"),
        ({"data": {"down_sample": 0.5}}, "data.down_sample should be greater than or equal to 1; got 0.5"),
    ],
)
def test_wrong_recipes(change: dict, message: str) -> None:
    with pytest.raises(LacoError, match=message):
        parse_recipe(GOOD | change)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "must hold keys and values"),
        ("a: [1,\n", "not readable as YAML"),
        ("output: !!python/object/apply:os.system ['touch HACKED']\n", "not readable as YAML"),
    ],
)
def test_unreadable_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(text)
    with pytest.raises(LacoError, match=message):
        load_recipe("r.yaml")
    assert not Path("HACKED").exists()


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(LacoError, match="no recipe"):
        load_recipe(tmp_path / "none.yaml")


def test_rates_and_overrides(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "output: a\nmodel: m\nstages: [{name: s, steps: 1, lr: {projector: 0.5}}, {name: t, steps: 1, lr: 1}]"
    )
    recipe = load_recipe(path, output="b", seed=None)
    assert (recipe.output, recipe.seed) == ("b", 0)
    assert recipe.stages[0].rates == {"projector": 0.5}
    assert recipe.stages[1].rates == dict.fromkeys(GROUPS, 1.0)


# Those called zoo are of studies.
OURS = [path for path in sorted(Path(__file__).parents[2].glob("recipes/*.yaml")) if not path.name.startswith("zoo")]


@pytest.mark.parametrize("path", OURS, ids=lambda p: p.name)
def test_our_recipes_are_right(path: Path) -> None:
    assert load_recipe(path).stages
    head = path.read_text().split("\n\n")[0]
    assert "Command:" in head or "laco train" in head, "a recipe says how it is run"
