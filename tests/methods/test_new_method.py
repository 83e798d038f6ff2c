"""The worked example of docs/new-method.md: taken from the page, installed and used."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```\w+ ([\w.]+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# What the page promises, in a process that knows the package only by its entry points.
CHECKS = """
import json, sys
import pytest, torch
import laco, tiny
from laco.grid import Grid

loudest, tokens = laco.methods.get("loudest"), laco.methods.get("loudest_tokens")
rows = {row["name"]: row for row in laco.methods()}
assert rows["loudest"]["places"] == ["encoder", "external"], rows["loudest"]
assert rows["loudest_tokens"]["static_count"]
method = loudest(layer=2, order=1.0)
assert laco.methods.from_dict(json.loads(json.dumps(method.to_dict()))) == method
with pytest.raises(laco.LacoError, match="order must be above 0"):
    loudest(order=0.0)

windows = torch.randn(3, 5, 4, 8)
kept = method.build(8)(windows)
for i in range(3):
    for j in range(5):
        assert torch.equal(kept[i, j], max(windows[i, j], key=lambda token: float(token.abs().sum())))

x = torch.randn(20, 6)
plan = tokens(keep=5)(laco.Signals(grid=Grid(1, 4, 5), tokens=x))
assert plan.kept.tolist() == sorted(sorted(range(20), key=lambda i: -float(x[i].norm()))[:5])

model, processor = tiny.llava()
prompt = ("<image>\\nwhat?", [tiny.picture(1)])
with torch.no_grad():
    before = model(**tiny.inputs(processor, prompt)).logits
    laco.compress(model, processor, method)
    batch = tiny.inputs(processor, prompt)
    assert int((batch["input_ids"] == model.config.image_token_id).sum()) == 9
    logits = model(**batch).logits
    assert logits.shape[1] == before.shape[1] - 27
    other = tiny.inputs(processor, ("<image>\\nwhat?", [tiny.picture(2)]))
    assert not torch.allclose(model(**other).logits[:, -1], logits[:, -1])
    laco.save_pretrained(model, processor, sys.argv[1])
    again, processor = laco.from_pretrained(sys.argv[1])
    assert type(again.model.vision_tower.encoder.layers[1].compressor).__name__ == "LoudestModule"
    torch.testing.assert_close(again(**tiny.inputs(processor, prompt)).logits, logits)
    laco.decompress(again, processor)
    torch.testing.assert_close(again(**tiny.inputs(processor, prompt)).logits, before)
print("as promised")
"""


def run(*command: str | Path, **options: str | Path) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_page(tmp_path: Path) -> None:
    files: dict[str, str] = {}
    for name, text in FENCE.findall((ROOT / "docs" / "new-method.md").read_text()):
        files[name] = files.get(name, "") + text
    assert files.keys() == {"pyproject.toml", "laco_loudest.py", "use"}
    package, site = tmp_path / "laco-loudest", tmp_path / "site"
    package.mkdir()
    for name in ("pyproject.toml", "laco_loudest.py"):
        (package / name).write_text(files[name])
    quiet = ("--quiet", "--disable-pip-version-check", "--no-input")
    run(
        *(sys.executable, "-m", "pip", "install", *quiet, "--no-index", "--no-build-isolation", "--no-deps"),
        *("--target", site, package),
    )
    path = os.pathsep.join([str(site), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    (tmp_path / "models").symlink_to(ROOT / "models")
    checked = run(sys.executable, "-c", files["use"] + CHECKS, tmp_path / "tiny", env=environment, cwd=tmp_path)
    assert checked.splitlines()[-1] == "as promised"
    assert "loudest" in (tmp_path / "out" / "loud" / "config.json").read_text()
