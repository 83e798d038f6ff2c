"""Training on the Hugging Face Trainer: from scratch (laco-tiny), and healing after a compressor is inserted."""

from laco.train.recipe import Recipe, load_recipe
from laco.train.run import run, train

__all__ = ["Recipe", "load_recipe", "run", "train"]
