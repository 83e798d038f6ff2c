"""Questions asked side by side give exactly what each gives alone."""

import pytest
import torch

import laco
from laco.evaluate import prompt
from laco.train.collate import IGNORE, Collator, Item
from laco.train.scratch import build_new
from laco.train.trainer import answer_logits
from laco.world import World
from laco.world.labels import dense_labels
from small_runs import new_model


@pytest.fixture(scope="module")
def made():
    torch.manual_seed(0)
    model, processor = build_new(new_model())
    for parameter in model.parameters():  # small random models hardly look at anything: louder weights
        parameter.data.mul_(3)
    return model.eval(), processor


def items(count: int, questions: int = 4) -> list[Item]:
    pictures = [World(0)[i] for i in range(count)]
    return [Item([p.picture], [(q.question, q.answer) for q in p.questions[:questions]]) for p in pictures]


@torch.no_grad()
@pytest.mark.parametrize("compressed", [False, True])
def test_packed_questions_equal_single_ones(made, compressed: bool) -> None:
    model, processor = made
    if compressed:
        model, processor = laco.compress(*build_new(new_model()), laco.LaCo(layer=2))
        model.eval()
    batch = items(2)
    packed = Collator(processor)(batch)
    together = answer_logits(model, packed, packed.pop("labels"))

    alone = []
    for item in batch:
        for question, answer in item.asked:
            text = prompt(processor, question) + answer + processor.tokenizer.eos_token
            inputs = processor(images=item.images, text=text, return_tensors="pt")
            said = len(processor.tokenizer(answer).input_ids) + 1
            alone.append(model(**inputs).logits[0, -said - 1 : -1])
    alone = torch.cat(alone)
    assert together.shape == alone.shape
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-4)
    assert (together[:4] - alone[4:8]).abs().max() > 1e-2  # the comparison can fail


@torch.no_grad()
def test_what_a_selector_leaves_is_the_same_for_packed_questions(made) -> None:
    model, processor = laco.compress(*build_new(new_model()), laco.methods.DivPrune(keep=0.3))
    model.eval()
    batch = items(2, questions=3)
    together = answer_logits(model, packed := Collator(processor)(batch), packed.pop("labels"))
    alone = []
    for item in batch:
        for one in item.asked:
            single = Collator(processor)([Item(item.images, [one])])
            alone.append(answer_logits(model, single, single.pop("labels")))
    torch.testing.assert_close(together, torch.cat(alone), atol=2e-5, rtol=1e-4)


def test_labels_spell_the_answers_and_nothing_else(made) -> None:
    _, processor = made
    batch = items(3)
    labels = Collator(processor)(batch)["labels"]
    for item, row in zip(batch, labels, strict=True):
        said = processor.tokenizer.decode(row[row != IGNORE])
        assert said == "".join(answer + "<eos>" for _, answer in item.asked)


def test_the_mask_shows_the_picture_and_the_own_question_only(made) -> None:
    _, processor = made
    item = items(1, questions=2)[0]
    batch = Collator(processor)([item])
    mask, positions = batch["attention_mask"][0, 0], batch["position_ids"][0]
    visual = int((batch["input_ids"][0] == processor.image_token_id).sum())
    starts = [i for i in range(visual, len(positions)) if positions[i] == visual]
    assert len(starts) == 2
    first, second = range(*starts), range(starts[1], len(positions))
    assert mask[list(second)][:, list(first)].sum() == 0
    assert mask[second[-1], :visual].all()
    assert mask[second[-1], list(second)].all()
    assert not mask.triu(1).any()


def test_pages_and_scenes_in_one_batch_and_dense_labels(made) -> None:
    _, processor = made
    shown = [World(0)[i] for i in range(2)]
    batch = [
        Item([shown[0].picture], [("which word is written?", "ABC")], dense_labels(shown[0].scene, 16)),
        Item([shown[1].picture], [], dense_labels(shown[1].scene, 16)),
    ]
    out = Collator(processor)(batch)
    assert out["dense_labels"]["what"].shape == (2, 6, 6)
    assert (out["labels"][1] == IGNORE).all()
    assert (out["labels"][0] != IGNORE).sum() == 4
    assert set(Collator(processor)([Item(i.images, [], i.dense) for i in batch])) == {"pixel_values", "dense_labels"}


def test_teacher_inputs_ask_the_same(made) -> None:
    _, processor = made
    _, small = laco.compress(*build_new(new_model()), laco.LaCo(layer=2))
    out = Collator(small, teacher=processor)(items(2))
    own, teacher = out["labels"], out["teacher"]["labels"]
    assert torch.equal(own[own != IGNORE], teacher[teacher != IGNORE])
    assert own.shape[1] < teacher.shape[1]
