"""FLOPs of every stage of a vision-language model, from its configuration alone, before anything runs.

Counted are matrix products, attention and convolutions, two FLOPs for a multiplication with addition; norms,
activations, softmax and embeddings are left out, as in torch.utils.flop_counter, with which these numbers agree.
Attention is counted over all pairs of tokens, also where a mask hides some of them.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig, PreTrainedModel

from laco.errors import LacoError
from laco.families import FAMILIES, Family
from laco.grid import Grid, merge_map
from laco.methods import Merger, Method
from laco.surgery import place


@dataclass(frozen=True)
class StageFlops:
    """FLOPs of one question about its pictures, stage by stage.

    `encoder_before` are the encoder layers before the first merger (all of them if there is none inside),
    `encoder_after` those on merged tokens, `unread` what runs behind the layer that the language model reads (the
    last layer of LLaVA 1.5's encoder, SigLIP's pooling head). A merger in the place of the projector counts as
    `projector`.
    """

    patch_embedding: float
    encoder_before: float
    compressor: float
    encoder_after: float
    unread: float
    projector: float
    language_model: float

    @property
    def encoder(self) -> float:
        """The vision encoder with the compressors inside it."""
        return self.patch_embedding + self.encoder_before + self.compressor + self.encoder_after + self.unread

    @property
    def forward(self) -> float:
        return self.encoder + self.projector + self.language_model

    @property
    def training_step(self) -> float:
        """Forward and backward with every parameter learning, without gradient checkpointing."""
        # Backward costs each product twice, for its input and for its weight; pixels need no gradient.
        return 3 * self.forward - self.patch_embedding - 2 * self.unread

    def to_dict(self) -> dict[str, float]:
        return asdict(self) | {name: getattr(self, name) for name in ("encoder", "forward", "training_step")}


def linear_flops(tokens: float, inputs: int, outputs: int) -> float:
    return 2 * tokens * inputs * outputs


def encoder_layer_flops(tokens: int, width: int, hidden: int, *, gated: bool = False) -> float:
    """One transformer layer: four width x width projections, attention, an MLP of two (gated: three) maps."""
    attention = 4 * linear_flops(tokens, width, width) + 4 * tokens * tokens * width
    return attention + (3 if gated else 2) * linear_flops(tokens, width, hidden)


def pooling_head_flops(tokens: int, width: int, hidden: int) -> float:
    """SigLIP's head: one learned query attends to all tokens, then an MLP."""
    attention = 2 * linear_flops(tokens, width, width) + 2 * linear_flops(1, width, width) + 4 * tokens * width
    return attention + 2 * linear_flops(1, width, hidden)


def decoder_flops(config: Any, tokens: int, logits: int = 1) -> float:
    """A Llama-like language model over a sequence: grouped-query attention, gated MLP, `logits` tokens scored."""
    width, heads = config.hidden_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or width // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    projections = 2 * linear_flops(tokens, width, heads * head) + 2 * linear_flops(tokens, width, groups * head)
    attention = 4 * tokens * tokens * heads * head
    mlp = 3 * linear_flops(tokens, width, config.intermediate_size)
    layers = config.num_hidden_layers * (projections + attention + mlp)
    return layers + linear_flops(logits, width, config.vocab_size)


def merger_flops(merger: Merger, grid: Grid, width: int, out_width: int | None = None) -> float:
    """A merger's own FLOPs on one grid, counted by running its module on the meta device: no weights, no memory.

    Args:
        grid: before merging.
        width: channels of the tokens.
        out_width: channels of the language model, where the merger stands in the place of the projector.
    """
    levels = 1 if out_width is None else 1 + len(merger.projector_levels)
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        module = merger.build(width) if out_width is None else merger.build_projector(width, out_width)
        merge_map(module, torch.empty(*grid, levels * width), merger.factor, merger.odd)
    return counter.get_total_flops()


def stage_flops(
    model: PreTrainedModel | PreTrainedConfig,
    methods: Sequence[Method] = (),
    *,
    pictures: int = 1,
    text_tokens: int = 32,
    visual_tokens: int | None = None,
    logits: int = 1,
) -> StageFlops:
    """FLOPs of one question to a model.

    Args:
        model: a model of a known family, stock or compressed, or only its configuration.
        methods: mergers to count as if they were put into it.
        pictures: what the vision encoder sees: pictures, tiles or frames.
        text_tokens: all other tokens of the sequence.
        visual_tokens: what the language model reads, if not every token of every picture (families that add line
            breaks or cut padding off).
        logits: tokens for which the vocabulary is scored: 1 in prefill, those of the answers in training.

    Raises:
        LacoError: the family or encoder is not known, or a method cannot stand in the model.
    """
    config: Any = model.config if isinstance(model, PreTrainedModel) else model
    family = family_of_config(config)
    steps = [*family.steps(config), *(place(method, family, config) for method in methods)]
    inside = sorted((step for step in steps if step.place == "encoder"), key=lambda step: step.layer)
    connector = next((step.merger for step in steps if step.place == "projector"), None)
    vision, text = config.vision_config, config.text_config
    width, hidden, prefix = vision.hidden_size, vision.intermediate_size, family.prefix(config)

    # Through the encoder from merger to merger, with the grid.
    grid, compressor, passed, spans = family.own_grid(config), 0.0, 0, []
    patch = getattr(vision, "embed_patch_size", None) or vision.patch_size
    patch_embedding = linear_flops(grid.tokens, vision.num_channels * patch**2, width)
    for step in inside:
        spans.append((step.layer - passed) * encoder_layer_flops(grid.tokens + prefix, width, hidden))
        compressor += merger_flops(step.merger, grid, width)
        grid, passed = step.merger.num_tokens(grid), step.layer
    layer = encoder_layer_flops(grid.tokens + prefix, width, hidden)
    last = max(family.read_layers(config))
    spans.append((last - passed) * layer)
    unread = (vision.num_hidden_layers - last) * layer
    if getattr(vision, "vision_use_head", False):
        unread += pooling_head_flops(grid.tokens, width, hidden)

    read = grid.tokens + prefix - (config.vision_feature_select_strategy == "default")
    if connector is not None:
        projector = merger_flops(connector, grid, width, text.hidden_size)
        read = connector.num_tokens(grid).tokens
    else:
        joined = len(family.read_layers(config)) * width
        projector = linear_flops(read, joined, text.hidden_size) + linear_flops(
            read, text.hidden_size, text.hidden_size
        )
    sequence = (pictures * read if visual_tokens is None else visual_tokens) + text_tokens
    return StageFlops(
        patch_embedding=pictures * patch_embedding,
        encoder_before=pictures * spans[0],
        compressor=pictures * compressor,
        encoder_after=pictures * sum(spans[1:]),
        unread=pictures * unread,
        projector=pictures * projector,
        language_model=decoder_flops(text, sequence, logits),
    )


def family_of_config(config: PreTrainedConfig) -> Family:
    """The family of a configuration; `LacoError` naming the known ones if there is none."""
    for family in FAMILIES:
        if type(config) in (family.stock_config, family.connected_config):
            return family
    known = ", ".join(family.stock_config.__name__ for family in FAMILIES)
    raise LacoError(f"{type(config).__name__} belongs to no family that laco knows; it knows {known}")
