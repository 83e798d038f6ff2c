"""Evaluation of real tiny models: what is fed, what is counted, and that nothing else changes the numbers."""

import json
import sys

import pytest
import torch
from PIL import Image
from torch import nn

import laco
import tiny
from laco.data import Sample, load_samples
from laco.errors import LacoError
from laco.evaluate import answer, evaluate, prompt
from laco.evaluate.generation import encode, encode_once, greedy
from laco.evaluate.report import command
from laco.families.compat import TAKES_FEATURES

QUESTIONS = ("hi?", "what is it?", "which word is written?")


def make_samples(pictures=4, families=("reading", "counting")):
    shown = [tiny.picture(seed) for seed in range(pictures)]
    return [
        Sample(f"{i}-{j}", (picture,), question, "nothing", families[j % len(families)])
        for j, question in enumerate(QUESTIONS)
        for i, picture in enumerate(shown)
    ]


def one_by_one(model, processor, sample, tokens):
    """The plain way: one question, pixels given to `generate`, no padding, no cache."""
    inputs = encode(processor, [sample.question], [sample.pictures()], [sample.video])
    arguments = {**greedy(processor, model, tokens), "use_cache": False}
    output = model.generate(**inputs, **arguments)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("batch_size", [1, 5, 32])
def test_batches_answer_as_one_by_one(talker, batch_size, compressed):
    model, processor = talker
    if compressed:
        laco.compress(model, processor, laco.LaCo(depth=1 / 4))
    samples = make_samples()
    answers = answer(model, processor, samples, batch_size=batch_size, max_new_tokens=5, progress=False)
    with torch.inference_mode():
        assert answers.texts == [one_by_one(model, processor, sample, 5) for sample in samples]
    assert len(set(answers.texts)) > 4  # pictures and questions matter
    assert set(answers.visual_tokens) == {9 if compressed else 36}


@pytest.mark.parametrize("batch_size", [1, 3])
def test_onevision_tiles_several_pictures_and_none(batch_size):
    model, processor = tiny.llava_onevision()
    wide = tiny.picture(1, 40, 140)
    shown = [(tiny.picture(0),), (wide,), (wide,), (tiny.picture(0), wide), ()]
    samples = [Sample(str(i), pictures, f"what {i}?", "", "") for i, pictures in enumerate(shown)]
    answers = answer(model, processor, samples, batch_size=batch_size, max_new_tokens=4, progress=False)
    with torch.inference_mode():
        assert answers.texts == [one_by_one(model, processor, sample, 4) for sample in samples]
    # Alone a picture is cut into tiles; of several, each is seen once, with the token that ends it.
    assert answers.visual_tokens[1] == answers.visual_tokens[2] > 36 + 1
    assert answers.visual_tokens[3:] == [2 * (36 + 1), 0]


@pytest.mark.skipif(not TAKES_FEATURES, reason="models of this transformers take no features")
def test_each_picture_is_encoded_once(talker, monkeypatch):
    model, processor = talker
    rows = []
    run = model.model.vision_tower.forward
    monkeypatch.setattr(
        model.model.vision_tower, "forward", lambda pixels, **kw: rows.append(len(pixels)) or run(pixels, **kw)
    )
    answer(model, processor, make_samples(pictures=4), batch_size=6, max_new_tokens=2, progress=False)
    assert rows == [2, 2]


@pytest.mark.parametrize("name", tiny.CASES)
def test_pictures_that_were_encoded_once_are_read_in_every_family(name):
    model, processor = tiny.CASES[name].build()
    first, second = tiny.picture(0, 150, 150), tiny.picture(1, 140, 150)
    shown = [[first], [second], [first]]
    inputs = encode(processor, QUESTIONS, shown)
    with torch.no_grad():
        wanted = model(**inputs).logits[:, -1]
        arguments = encode_once(model, inputs, shown)
        found = model(**arguments).logits[:, -1]
    # Tiles, or their features, say nothing of pictures.
    if (family := name.partition("-")[0]) not in ("idefics3", "smolvlm"):  # there it depends on transformers
        packs_tiles = family in ("internvl", "llama4", "minicpmv")
        assert ("mm_encoder_outputs" in arguments) == (TAKES_FEATURES and not packs_tiles)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    assert (wanted[0] - wanted[1]).abs().max() > 1e-3


def video_talker():
    """A tiny LLaVA-OneVision that is asked about videos, with embeddings of its own for output, as `talker`."""
    model, processor = tiny.llava_onevision()
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))
    return model, processor


def video_samples():
    clips = [tuple(tiny.picture(10 * clip + frame) for frame in range(3)) for clip in range(3)]
    return [Sample(f"{i}-{q}", clip, q, "no", "f", video=True) for q in QUESTIONS for i, clip in enumerate(clips)]


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_videos_are_answered_as_one_by_one_and_encoded_once(batch_size, monkeypatch):
    model, processor = video_talker()
    samples = video_samples()
    with torch.inference_mode():
        expected = [one_by_one(model, processor, sample, 4) for sample in samples]
    rows = []
    run = model.model.vision_tower.forward
    monkeypatch.setattr(
        model.model.vision_tower, "forward", lambda pixels, **kw: rows.append(len(pixels)) or run(pixels, **kw)
    )
    answers = answer(model, processor, samples, batch_size=batch_size, max_new_tokens=4, progress=False)
    assert answers.texts == expected
    assert len(set(expected)) > 4  # videos and questions matter
    assert set(answers.visual_tokens) == {3 * 9 + 1}
    if batch_size == 32 and TAKES_FEATURES:
        assert rows == [3 * 3]


def test_videos_pictures_and_text_in_one_batch():
    model, processor = video_talker()
    first, *_, last = video_samples()
    mixed = [first, Sample("p", (tiny.picture(0),), "what?", "no", "f"), last, Sample("t", (), "what?", "no", "f")]
    answers = answer(model, processor, mixed, max_new_tokens=4, progress=False)
    with torch.inference_mode():
        assert answers.texts == [one_by_one(model, processor, sample, 4) for sample in mixed]
    assert answers.visual_tokens[0] == answers.visual_tokens[2] == 3 * 9 + 1
    assert answers.visual_tokens[3] == 0


def test_a_selector_leaves_fewer_tokens_of_videos():
    model, processor = laco.compress(*video_talker(), laco.DivPrune(keep=0.5))
    answers = answer(model, processor, video_samples(), max_new_tokens=2, progress=False)
    assert all(10 < count < 20 for count in answers.visual_tokens)


def test_layers_of_the_language_model_are_averaged():
    model, processor = laco.compress(*video_talker(), laco.FastV(keep=5, layer=1))
    layers, tokens = model.config.text_config.num_hidden_layers, 3 * 9 + 1
    assert layers > 1
    answers = answer(model, processor, video_samples(), max_new_tokens=2, progress=False)
    assert answers.visual_tokens == pytest.approx([(tokens + (layers - 1) * 5) / layers] * len(video_samples()))


def test_a_model_without_videos_says_so(talker):
    with pytest.raises(LacoError, match="LlavaProcessor takes no videos"):
        evaluate(*talker, "world-video", samples=4, progress=False)


def test_report_counts_hits_by_family(talker):
    model, processor = talker
    samples = make_samples()
    said = answer(model, processor, samples, max_new_tokens=5, progress=False).texts
    right = {0, 1, 2, 5, 9}  # of reading (rows 0-3, 8-11) four, of counting (4-7) one
    told = [
        Sample(s.id, s.images, s.question, f" {said[i].upper()} " if i in right else "wrong!", s.family)
        for i, s in enumerate(samples)
    ]
    report = evaluate(model, processor, told, max_new_tokens=5, progress=False)
    reading, counting = report.families["reading"], report.families["counting"]
    assert (reading.accuracy, reading.n) == (50.0, 8)
    assert (counting.accuracy, counting.n) == (25.0, 4)
    assert reading.low < 50 < reading.high
    assert report.average == 37.5  # over families, not over questions
    assert report.answers == said
    assert (report.loyalty, report.visual_tokens, report.samples) == (100.0, 36.0, 12)
    assert report.case_sensitive["reading"] <= 50.0
    assert report.character_error_rate["reading"] > 0


def test_loyalty_is_agreement_with_the_reference(talker, talker_directory):
    model, processor = talker
    samples = make_samples()
    options = {"max_new_tokens": 5, "progress": False}
    before = evaluate(model, processor, samples, **options)
    laco.compress(model, processor, laco.LaCo(depth=1 / 4))
    assert evaluate(model, processor, samples, **options).loyalty is None
    after = evaluate(model, processor, samples, reference=before.answers, **options)
    agreed = sum(a.lower() == b.lower() for a, b in zip(before.answers, after.answers, strict=True))
    assert after.loyalty == pytest.approx(100 * agreed / 12)
    assert after.loyalty < 100
    stock = laco.from_pretrained(talker_directory)
    for reference in (stock, talker_directory, str(talker_directory)):
        report = evaluate(model, processor, samples, reference=reference, **options)
        assert report.loyalty == after.loyalty
    with pytest.raises(LacoError, match="2 answers for 12 samples"):
        evaluate(model, processor, samples, reference=["a", "b"], **options)


def test_the_base_noted_in_the_configuration_is_the_reference(talker, talker_directory):
    model, processor = talker
    laco.compress(model, processor, laco.LaCo(depth=1 / 4))
    model.config.base_model_name_or_path = str(talker_directory)
    named = evaluate(model, processor, make_samples(), max_new_tokens=3, progress=False)
    given = evaluate(model, processor, make_samples(), reference=talker_directory, max_new_tokens=3, progress=False)
    assert named.loyalty == given.loyalty is not None
    model.config.base_model_name_or_path = "/nowhere"
    assert evaluate(model, processor, make_samples(), max_new_tokens=3, progress=False).loyalty is None


def test_world_report_is_the_documented_json(talker, tmp_path):
    report = evaluate(*talker, seed=3, samples=21, max_new_tokens=2, progress=False)
    path = tmp_path / "out" / "report.json"
    report.save(path)
    saved = json.loads(path.read_text())
    keys = ["average", "families", "loyalty", "visual_tokens", "versions", "seed", "command"]
    assert list(saved)[: len(keys)] == keys
    assert "answers" not in saved
    assert saved["seed"] == 3
    assert set(saved["versions"]) == {"laco", "torch", "transformers", "python"}
    assert [list(family) for family in saved["families"].values()] == [["accuracy", "low", "high", "n"]] * 7
    assert sum(family["n"] for family in saved["families"].values()) == 21
    again = evaluate(*talker, seed=3, samples=21, max_new_tokens=2, progress=False)
    assert again.answers == report.answers
    assert evaluate(*talker, seed=4, samples=21, max_new_tokens=2, progress=False).answers != report.answers


def test_a_report_that_cannot_be_written_leaves_nothing(talker, tmp_path):
    report = evaluate(*talker, make_samples(1), max_new_tokens=1, progress=False)
    (tmp_path / "file").write_text("old")
    with pytest.raises(LacoError, match="cannot write"):
        report.save(tmp_path / "file" / "report.json")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


def test_prompts(talker):
    _, processor = talker
    assert prompt(processor, "what?", 2) == "<image><image>what? "
    processor.chat_template = None
    assert prompt(processor, "what?", 2) == "<image>\n<image>\nwhat?"
    assert prompt(video_talker()[1], "what?", 8, video=True) == "<video>\nwhat?"


def test_training_mode_and_generation_config_do_not_matter(talker):
    model, processor = talker
    samples = make_samples()
    plain = answer(model, processor, samples, max_new_tokens=5, progress=False)
    model.train()
    model.generation_config.update(do_sample=True, temperature=3.0)
    processor.tokenizer.padding_side = "right"
    assert answer(model, processor, samples, max_new_tokens=5, progress=False) == plain
    assert model.training
    assert processor.tokenizer.padding_side == "right"


def test_a_bad_picture_in_the_data_is_named(talker, tmp_path):
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    (tmp_path / "d.jsonl").write_text('{"image": "dot.png", "question": "q", "answer": "a"}\n')
    with pytest.raises(LacoError, match=r"dot\.png is 1x1 pixels"):
        evaluate(*talker, tmp_path, progress=False)
    with pytest.raises(LacoError, match="no samples"):
        evaluate(*talker, [], progress=False)


def test_public_sets_where_they_are_present(talker):
    from pathlib import Path

    shared = Path(__file__).parents[3] / "shared" / "data"
    if not shared.is_dir():
        pytest.skip(f"no public data sets at {shared}")
    for name in ("easyvqa", "iiit5k", "blindtest"):
        samples = load_samples(shared / name, limit=6)
        report = evaluate(*talker, samples, max_new_tokens=2, progress=False)
        assert report.samples == 6
        assert report.visual_tokens == 36


@pytest.mark.parametrize(("program", "wanted"), [("/bin/laco", "laco"), ("/lib/laco/__main__.py", "python -m laco")])
def test_the_command_is_one_that_can_be_typed(monkeypatch, program, wanted):
    monkeypatch.setattr(sys, "argv", [program, "eval", "a model"])
    assert command() == f"{wanted} eval 'a model'"
