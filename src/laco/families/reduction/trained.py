"""What methods train behind the encoder and inside the language model: modules beside the language model's layers."""

from collections.abc import Mapping, Sequence
from typing import Any

from laco.methods import DecoderMethod, MergerModule, Method, Selector


def kind_of(method: Method) -> str:
    """Under which name the module of a method stands; a model has one method of each kind at most."""
    return "selector" if isinstance(method, Selector) else "decoder"


def trained_modules(methods: Sequence[Method], text_config: Any, encoder_channels: int) -> Mapping[str, MergerModule]:
    """New modules of those methods that have any, by `kind_of`, on the device that torch is set to."""
    found: dict[str, MergerModule] = {}
    for method in methods:
        module = None
        if isinstance(method, Selector):
            module = method.build(encoder_channels if method.applies_to == "features" else text_config.hidden_size)
        elif isinstance(method, DecoderMethod) and method.trained:
            module = method.build(
                layers=method.points(text_config.num_hidden_layers)[0],
                channels=text_config.hidden_size,
                heads=text_config.num_attention_heads,
                encoder_channels=encoder_channels,
            )
        if module is not None:
            found[kind_of(method)] = module
    return found
