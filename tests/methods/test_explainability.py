"""The explainability-driven compressor: its labels, its convolution, its training. No public code to compare with."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2Model

import laco
from laco.errors import LacoError
from laco.evaluate.generation import encode
from laco.grid import Grid
from laco.methods import DivPrune, Explainability, Signals
from laco.methods.explainability import CHANNELS, RelevancePredictor, label, relevance, relevance_loss
from laco.world import World
from tiny.parts import awake

TINY = Path(__file__).parents[2] / "models" / "laco-tiny"


def signals(tokens: int = 48, heads: int = 3, words: int = 5) -> Signals:
    return Signals(grid=Grid(1, 1, tokens), text_attention=torch.rand(heads, words, tokens))


def trained(module: RelevancePredictor) -> RelevancePredictor:
    """Away from where it starts."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


# The choice.


@pytest.mark.parametrize("kernel", [1, 5, 7])
def test_before_training_the_attention_is_passed_on(kernel):
    method, given = Explainability(kernel=kernel), signals()
    module = method.build(7)
    attention = method.attention(given)
    assert torch.equal(module(attention), attention)
    assert torch.equal(method(given, module).kept, method(given).kept)
    assert set(method(given).kept.tolist()) == set(attention.topk(24).indices.tolist())
    for parameter in module.parameters():
        parameter.data.fill_(7.0)  # memory that `to_empty` leaves holds anything
    module.reset_parameters()
    assert torch.equal(module(attention), attention)


def test_the_convolution_by_hand():
    module = trained(Explainability().build()).double()
    assert [layer.across.out_channels for layer in module.layers] == [32, 64, 128, 256, 512] == list(CHANNELS)
    attention, size = torch.rand(9, dtype=torch.double), 2
    x = attention[None]
    for layer in module.layers:
        padded = torch.cat([torch.zeros(len(x), size), x, torch.zeros(len(x), size)], dim=1)
        along = torch.stack(
            [(padded[:, i : i + 5] * layer.along.weight[:, 0]).sum(dim=1) + layer.along.bias for i in range(9)], dim=1
        )
        x = torch.relu(layer.across.weight[:, :, 0] @ along + layer.across.bias[:, None])
    torch.testing.assert_close(module(attention), (module.outward.weight[0, :, 0] @ x))
    assert module(attention).std() > 0
    two = torch.stack([attention, torch.rand(9, dtype=torch.double)])
    torch.testing.assert_close(module(two)[0], module(attention))
    assert module(two[:, None])[:, 0].shape == (2, 9)


def test_a_trained_module_decides():
    method, given = Explainability(keep=0.25), signals()
    module = trained(method.build())
    plan = method(given, module)
    score = module(method.attention(given))
    assert plan.weights is None
    assert plan.kept.tolist() == sorted(score.topk(12).indices.tolist())
    assert plan.kept.tolist() != method(given).kept.tolist()
    half = method(given, module.bfloat16())
    assert len(half.kept) == 12
    torch.testing.assert_close(
        method.attention(given), method.attention(replace(given, text_attention=given.text_attention / 9))
    )


def test_budget_is_rounded_down():
    assert Explainability().budget(577) == 288
    assert Explainability(keep=0.25).budget(7) == 1
    assert Explainability(keep=0.25).budget(3) == 1


def test_bad_input():
    with pytest.raises(LacoError, match="kernel is an odd number"):
        Explainability(kernel=4)
    with pytest.raises(LacoError, match="explainability needs the module that its build gives"):
        Explainability()(signals(), torch.nn.Identity())
    with pytest.raises(LacoError, match="div_prune takes no module"):
        DivPrune()(Signals(grid=Grid(1, 1, 4), tokens=torch.randn(4, 3)), Explainability().build())


# The labels.


def decoder() -> Qwen2Model:
    torch.manual_seed(3)
    config = Qwen2Config(
        vocab_size=8,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="eager",
    )
    return awake(Qwen2Model(config))


def rollout(logit: Tensor, attentions: tuple[Tensor, ...]) -> Tensor:
    """All of R, as it is published."""
    gradients = torch.autograd.grad(logit, attentions, retain_graph=True)
    r = torch.eye(attentions[0].shape[-1])
    for attention, gradient in zip(attentions, gradients, strict=True):
        heads = [(a * g).clamp(min=0) for a, g in zip(attention[0], gradient[0], strict=True)]
        r = r + sum(heads) / len(heads) @ r
    return r.detach()


def test_relevance_is_a_row_of_the_rollout():
    model, x = decoder(), torch.randn(1, 11, 24)
    out = model(inputs_embeds=x, output_attentions=True)
    found = relevance(out.last_hidden_state[0, -1, 5], out.attentions)
    wanted = rollout(out.last_hidden_state[0, -1, 5], out.attentions)
    torch.testing.assert_close(found, wanted[-1])
    assert (found >= 0).all()
    assert found[-1] > 1
    assert (found[:-1] > 0).any()
    assert not found.requires_grad


def test_an_answer_of_several_tokens_needs_one_pass():
    model, x = decoder(), torch.randn(1, 11, 24)
    whole = model(inputs_embeds=x, output_attentions=True)
    short = model(inputs_embeds=x[:, :8], output_attentions=True)
    found = relevance(whole.last_hidden_state[0, 7, 5], whole.attentions, row=7)
    torch.testing.assert_close(found[:8], relevance(short.last_hidden_state[0, -1, 5], short.attentions))
    assert not found[8:].any()


def test_without_gradients_a_token_explains_itself():
    attentions = tuple(torch.rand(2, 6, 6).softmax(dim=-1).requires_grad_() for _ in range(3))
    nothing = sum((a * 0).sum() for a in attentions)
    assert relevance(nothing, attentions, row=4).tolist() == [0, 0, 0, 0, 1, 0]
    against = -sum(a.sum() for a in attentions)
    assert relevance(against, attentions).tolist() == [0, 0, 0, 0, 0, 1]


def test_labels_by_hand():
    r = torch.tensor([[0.0, 1, 5, 2, 3], [4, 3, 1, 0, 1]])  # mean 2, 2, 3, 1, 2
    torch.testing.assert_close(label(r), torch.tensor([2.0, 2, 3, 0, 0]) / 7)
    torch.testing.assert_close(label(r[:, :4]), torch.tensor([2.0, 0, 3, 0]) / 5)
    assert label(torch.tensor([[0.5]])).tolist() == [1]
    with pytest.raises(LacoError, match="no visual token explains this answer"):
        label(torch.zeros(2, 4))


def test_pruning_by_the_labels_is_nearly_lossless():
    """Half of the tokens of a model that answers well, chosen by true relevance; by the reverse, answers are lost."""
    model, processor = laco.from_pretrained(TINY)
    model.eval().set_attn_implementation("eager")
    text_model, world = model.model.language_model, World(seed=5)

    def read(rows: Tensor, embeddings: Tensor, **options):
        out = text_model(inputs_embeds=embeddings[:, rows], position_ids=rows[None], **options)
        return model.lm_head(out.last_hidden_state)[0, -1], out

    probability, same = [], []
    for index in range(5):
        asked = encode(processor, [world[index].questions[0].question], [[world[index].picture]])
        ids = asked["input_ids"][0]
        visual, every = (ids == model.config.image_token_id).nonzero()[:, 0], torch.arange(len(ids))
        with torch.no_grad():
            embeddings = model.get_input_embeddings()(ids)[None]
            embeddings[0, visual] = model.get_image_features(pixel_values=asked["pixel_values"]).pooler_output[0]
        logits, out = read(every, embeddings, output_attentions=True)
        word = logits.argmax()
        order = relevance(logits[word], out.attentions)[visual].argsort(descending=True)
        row = []
        for kept in (visual, visual[order[:72]], visual[order[72:]]):
            rows = torch.cat([every[~torch.isin(every, visual)], kept]).sort().values
            with torch.no_grad():
                row.append(read(rows, embeddings)[0].softmax(dim=0))
        same.append([int(found.argmax() == word) for found in row])
        probability.append(torch.stack([found[word] for found in row]))
    full, by_relevance, reverse = torch.stack(probability).unbind(dim=1)
    assert by_relevance.mean() > full.mean() - 0.1
    assert reverse.mean() < 0.5
    assert [sum(column) for column in zip(*same, strict=True)][:2] == [5, 5]


# The training.


def test_the_loss_is_the_divergence():
    logits = torch.randn(3, 7)
    target = torch.stack([label(torch.rand(2, 7)) for _ in range(3)])
    predicted = logits.softmax(dim=1)
    wanted = [
        sum(t * (t / p).log() for t, p in zip(ts, ps, strict=True) if t > 0)
        for ts, ps in zip(target, predicted, strict=True)
    ]
    torch.testing.assert_close(relevance_loss(logits, target), sum(wanted) / 3)
    assert relevance_loss(target.log().clamp(min=-1e4), target) == pytest.approx(0, abs=1e-6)


def test_a_few_samples_are_learnt_by_heart():
    method = Explainability()
    given = [signals(16) for _ in range(8)]
    attention = torch.stack([method.attention(sample) for sample in given])
    target = torch.stack([label(torch.rand(2, 16)) for _ in given])
    module = method.build()
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    losses = []
    for _ in range(120):
        loss = relevance_loss(module(attention), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.03 * losses[0]
    chosen = torch.stack([method(sample, module).kept for sample in given])
    assert target.gather(1, chosen).sum(dim=1).min() > 0.9  # the label's tokens, but for the least of them
