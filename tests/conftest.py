"""Fixtures for all tests."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin

import laco
import tiny

TEMPLATE = (
    "{% for turn in messages %}{% for part in turn.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %} {% endif %}"
)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tiny models are slower with more threads, and test processes share the cores."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def make_talker() -> tuple[PreTrainedModel, ProcessorMixin]:
    """A tiny LLaVA with a chat template and embeddings of its own for output, so that answers differ."""
    model, processor = tiny.llava()
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))
    processor.chat_template = TEMPLATE
    return model, processor


@pytest.fixture
def talker() -> tuple[PreTrainedModel, ProcessorMixin]:
    """A model that gives different answers to different pictures and questions; a test may change it."""
    return make_talker()


@pytest.fixture(scope="session")
def talker_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, saved; not to be written to."""
    directory = tmp_path_factory.mktemp("models") / "talker"
    laco.save_pretrained(*make_talker(), directory)
    return directory
