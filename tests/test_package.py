"""The public names of the package."""

import subprocess
import sys

import laco


def test_packages_are_functions_too():
    assert {"llava", "internvl", "qwen2_5_vl", "vision_encoder"} <= {row["name"] for row in laco.families()}
    assert all(set(row) == {"name", "architectures", "encoders", "holds"} for row in laco.families())
    assert {"laco", "average_pool", "pixel_shuffle"} <= {row["name"] for row in laco.methods()}
    assert laco.methods.get("laco") is laco.LaCo
    assert callable(laco.evaluate)


def test_every_public_name_is_there_and_importing_stays_light():
    assert all(hasattr(laco, name) for name in laco.__all__)
    code = "import laco, sys; assert not {'matplotlib', 'peft', 'datasets', 'typer'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
