"""A small recipe on the world that trains in a second or two, and what the tests of training share."""

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from laco.train.recipe import NewModel, Recipe, parse_recipe

NEW = {
    "patch_size": 16,
    "vision": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2},
    "text": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
    },
}
SEE = {
    "name": "see",
    "steps": 2,
    "batch_size": 2,
    "lr": {"encoder_before": 1e-3},
    "questions": 0,
    "dense": 1.0,
    "pages": 0.5,
}
ANSWER = {"name": "answer", "steps": 2, "batch_size": 2, "lr": 1e-3, "questions": 3}


def new_model() -> NewModel:
    return NewModel(**NEW)


def recipe(output: Path, **keys: Any) -> Recipe:
    start = {} if "model" in keys else {"new": NEW}
    return parse_recipe({"output": str(output), **start, "stages": [ANSWER], "log_steps": 1, **keys})


def weights(directory: Path) -> dict[str, Tensor]:
    """A saved model's tensors by the names in its file, e.g. `multi_modal_projector.linear_1.bias`."""
    return load_file(directory / "model.safetensors")
