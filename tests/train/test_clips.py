"""Training on clips: a model for videos that begins with the weights of one for pictures."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import laco
from laco.data import load_samples
from laco.errors import LacoError
from laco.evaluate import prompt
from laco.train import run
from laco.train.collate import IGNORE, Collator, Item
from laco.train.data import make_source
from laco.train.recipe import Data, NewModel, Stage
from laco.train.scratch import build_new
from laco.train.trainer import answer_logits
from laco.world import FRAMES, Clips, World
from small_runs import ANSWER, NEW, new_model, recipe

NEW_VIDEO = {**NEW, "architecture": "llava_onevision"}


def stage(**keys) -> Stage:
    return Stage(**{"name": "only", "steps": 20, "batch_size": 4, "lr": 1e-3, "questions": 3, **keys})


def source(**keys):
    return make_source(Data(source="world-video"), stage(**keys), 8, 0, 16)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("base") / "pictures"
    torch.manual_seed(1)
    laco.save_pretrained(*build_new(new_model()), directory)
    return directory


@pytest.fixture(scope="module")
def made():
    torch.manual_seed(0)
    model, processor = build_new(NewModel(**NEW_VIDEO))
    for parameter in model.parameters():  # small random models hardly look at anything: louder weights
        parameter.data.mul_(3)
    return model.eval(), processor


def items(count: int) -> list[Item]:
    clips = [Clips(0)[i] for i in range(count)]
    return [Item(c.pictures, [(q.question, q.answer) for q in c.exercises[:3]], video=True) for c in clips]


def test_clips_are_those_of_the_world_with_all_its_questions() -> None:
    made = source()
    assert len(made) == 80
    for index in (0, 5):
        clip, item = Clips(0)[8 + index], made[index]
        assert item.video
        assert [np.asarray(p).tolist() for p in item.images] == clip.pixels.tolist()
        assert item.asked == [(q.question, q.answer) for q in clip.exercises[:3]]


def test_single_frames_come_in_whole_steps_and_pictures_anywhere() -> None:
    mixed = source(stills=0.5, pictures=0.25)
    shown = [mixed[index] for index in range(len(mixed))]
    assert 0.1 < np.mean([not item.video for item in shown]) < 0.4
    lengths = [{len(i.images) for i in shown[start : start + 4] if i.video} for start in range(0, len(shown), 4)]
    assert {FRAMES} in lengths
    assert {1} in lengths
    assert {1, FRAMES} not in lengths
    assert all(len(item.images) == 1 for item in shown if not item.video)


@torch.no_grad()
def test_packed_questions_about_clips_equal_single_ones(made) -> None:
    """Also beside a picture in the same batch."""
    model, processor = made
    picture = World(0)[3]
    batch = [*items(2), Item([picture.picture], [(q.question, q.answer) for q in picture.questions[:3]])]
    packed = Collator(processor)(batch)
    together = answer_logits(model, packed, packed.pop("labels"))
    alone = []
    for item in batch:
        for question, answer in item.asked:
            text = prompt(processor, question, video=item.video) + answer + processor.tokenizer.eos_token
            shown = {"videos": [item.images]} if item.video else {"images": [item.images]}
            inputs = processor(text=[text], return_tensors="pt", **shown)
            said = len(processor.tokenizer(answer).input_ids) + 1
            alone.append(model(**inputs).logits[0, -said - 1 : -1])
    torch.testing.assert_close(together, torch.cat(alone), atol=5e-5, rtol=1e-4)
    assert (alone[0][-1] - alone[3][-1]).abs().max() > 1e-2  # the comparison can fail


def test_labels_and_placeholders_of_clips(made) -> None:
    _, processor = made
    batch = items(2)
    out = Collator(processor)(batch)
    assert out["pixel_values_videos"].shape == (2, FRAMES, 3, 96, 96)
    assert (out["input_ids"] == processor.video_token_id).sum(dim=1).tolist() == [FRAMES * 9 + 1] * 2
    for item, row in zip(batch, out["labels"], strict=True):
        said = processor.tokenizer.decode(row[row != IGNORE])
        assert said == "".join(answer + "<eos>" for _, answer in item.asked)


@torch.no_grad()
def test_a_model_for_videos_begins_with_weights_of_one_for_pictures(base: Path) -> None:
    old, old_processor = laco.from_pretrained(base)
    new, processor = build_new(NewModel(architecture="llava_onevision", weights=str(base)))
    picture = World(0)[0].picture
    one = old_processor(images=picture, text="<image>", return_tensors="pt")
    other = processor(images=[[picture]], text=["<image>"], return_tensors="pt")
    features = new.get_image_features(other["pixel_values"], other["image_sizes"], return_dict=True).pooler_output[0]
    expected = old.get_image_features(one["pixel_values"], return_dict=True).pooler_output[0]
    assert expected.std() > 1e-3
    torch.testing.assert_close(features[:36], expected)

    old_words, words = old_processor.tokenizer, processor.tokenizer
    for index in range(20):
        for asked in World(1)[index].questions:
            assert words.tokenize(asked.question) == old_words.tokenize(asked.question)
    old_ids, ids = old_words.get_vocab(), words.get_vocab()
    both = sorted(old_ids.keys() & ids)
    assert len(both) > 0.9 * len(old_ids)
    for matrix, old_matrix in (
        (new.get_input_embeddings().weight, old.get_input_embeddings().weight),
        (new.lm_head.weight, old.lm_head.weight),
    ):
        assert torch.equal(matrix[[ids[token] for token in both]], old_matrix[[old_ids[token] for token in both]])
    language = (name for name in new.state_dict() if "language_model.layers" in name)
    assert all(torch.equal(new.state_dict()[name], old.state_dict()[name]) for name in language)


def test_words_of_questions_about_clips_are_single_tokens(made) -> None:
    words = made[1].tokenizer
    assert words.tokenize("which way does the circle move?")[1:-1] == ["Ġway", "Ġdoes", "Ġthe", "Ġcircle", "Ġmove"]
    assert words.tokenize("nowhere") == ["nowhere"]
    assert words.tokenize("EKB") == list("EKB")


def test_what_is_no_model_to_begin_with(made, tmp_path: Path) -> None:
    laco.save_pretrained(*made, tmp_path / "video")
    with pytest.raises(LacoError, match="image_newline has no place"):
        build_new(NewModel(weights=str(tmp_path / "video")))


def test_a_run_on_clips_gives_a_stock_model_that_is_judged_on_them(base: Path, tmp_path: Path) -> None:
    look = {**ANSWER, "name": "look", "stills": 1.0, "pictures": 0.5}
    watch = {**ANSWER, "lr": {"projector": 1e-3, "language_model": 1e-3}, "pictures": 0.5}
    given = recipe(
        tmp_path / "out",
        new={"architecture": "llava_onevision", "weights": str(base)},
        data={"source": "world-video"},
        stages=[look, watch],
        evaluate={"data": "world-video", "samples": 8},
    )
    out = run(given, progress=False)
    model = AutoModelForImageTextToText.from_pretrained(out)
    assert type(model).__name__ == "LlavaOnevisionForConditionalGeneration"
    report = json.loads((out / "evaluation.json").read_text())
    assert {name: score["n"] for name, score in report["families"].items()} == dict.fromkeys(
        ("motion", "order", "flash", "static"), 2
    )
    assert report["visual_tokens"] == FRAMES * 9 + 1
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    changed = {name for name, tensor in before.items() if name in after and not torch.equal(tensor, after[name])}
    assert any("vision" in name for name in changed)  # in the first stage
    assert any(name.startswith("language_model.") for name in changed)


@torch.no_grad()
def test_a_compressed_model_reads_fewer_tokens_of_clips(made, tmp_path: Path) -> None:
    laco.save_pretrained(*made, tmp_path / "video")
    model, processor = laco.from_pretrained(tmp_path / "video", compressor=laco.LaCo(layer=2))
    report = laco.evaluate(model, processor, load_samples("world-video", limit=4), progress=False, max_new_tokens=2)
    assert report.visual_tokens == FRAMES * 4 + 1


def test_dense_labels_are_for_encoders_that_see_whole_pictures(tmp_path: Path) -> None:
    given = recipe(tmp_path / "out", new=NEW_VIDEO, stages=[ANSWER | {"dense": 0.3}])
    with pytest.raises(LacoError, match=r"dense labels are of every patch .* llava_onevision sees tiles or frames"):
        run(given, progress=False)
