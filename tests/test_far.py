"""On an accelerator no operation may mix devices: every method in every family, on a device that is made of Python."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

CASES = [
    "llava-siglip",
    "llava_onevision-siglip",
    "internvl-internvit",
    "idefics3-idefics3",
    "smolvlm-smolvlm",
    "qwen2_5_vl-qwen2_5_vl",
    "qwen3_vl-qwen3_vl",
]


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"), reason="this torch has no such device"
)
@pytest.mark.parametrize("what", ["methods", *CASES])
def test_no_operation_mixes_devices(what):
    program = Path(__file__).with_name("far.py")
    run = subprocess.run(
        [sys.executable, str(program), what],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
