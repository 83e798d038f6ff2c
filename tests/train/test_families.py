"""`laco train` on a compressed model of every family whose language model takes several questions in one sequence."""

from pathlib import Path

import pytest

import laco
import tiny
from laco.families import family_of
from laco.train import run
from small_runs import ANSWER, recipe, weights

TEMPLATE = (
    "{% for turn in messages %}{% for part in turn.content %}"
    "{% if part.type == 'image' %}IMAGE{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %} {% endif %}"
)


@pytest.mark.parametrize("case", tiny.CASES.values(), ids=tiny.CASES)
def test_a_compressed_model_learns_and_is_saved(case: tiny.Case, tmp_path: Path) -> None:
    model, processor = case.build()
    if not family_of(model).packs:
        pytest.skip("its language model takes no packed questions; that it is refused is tested in test_run.py")
    if case.name.startswith("smolvlm"):
        pytest.skip("its chat template asks the video processor, which needs torchvision")
    processor.chat_template = TEMPLATE.replace("IMAGE", case.image)
    laco.save_pretrained(model, processor, tmp_path / "base")
    method = laco.LaCo(depth=1 / 2, **case.method)
    stages = [ANSWER | {"questions": 2, "lr": 1e-2}]
    # Embeddings that are the head's weights too go through the Trainer's checkpoints as well.
    out = run(
        recipe(
            tmp_path / "out", model=str(tmp_path / "base"), compress=[method.to_dict()], stages=stages, save_steps=1
        ),
        progress=False,
    )
    again, _ = laco.from_pretrained(out)
    (step,) = family_of(again).steps(again.config)
    assert step.merger == laco.LaCo(layer=step.layer, **case.method)
    before, after = weights(tmp_path / "base"), weights(out)
    compressor = [name for name in after if ".compressor." in name]
    assert compressor
    assert all(after[name].abs().max() > 0 for name in compressor if "fc2" in name)  # zero before the first step
    assert any(
        "language_model" in n or "text_model" in n for n in before if not before[n].equal(after.get(n, before[n]))
    )
