"""Reading of questions: files of every form, and what is said about bad ones."""

import json
from collections import Counter

import pytest

import tiny
from laco.data import Sample, load_samples, spread
from laco.errors import LacoError


@pytest.fixture
def folder(tmp_path):
    """Twelve questions about three pictures, in two splits and two categories of 9 and 3."""
    (tmp_path / "images").mkdir()
    for index in range(3):
        tiny.picture(index).save(tmp_path / "images" / f"{index}.png")
    rows = [
        {
            "id": f"q{index}",
            "image": f"images/{index % 3}.png",
            "question": f"which {index}?",
            "answer": index,
            "split": "val" if index % 2 else "train",
            "category": "rare" if index >= 9 else "common",
            "page": index,
        }
        for index in range(12)
    ]
    write_rows(tmp_path / "things.jsonl", rows)
    return tmp_path


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def edit_line(path, number, text):
    lines = path.read_text().splitlines()
    lines[number - 1] = text
    path.write_text("\n".join(lines) + "\n")


def test_reads_a_file_and_the_folder_that_holds_it(folder):
    samples = load_samples(folder / "things.jsonl")
    assert [s.id for s in load_samples(str(folder))] == [s.id for s in samples] == [f"q{i}" for i in range(12)]
    sample = samples[4]
    assert (sample.question, sample.answer, sample.family) == ("which 4?", "4", "common")
    assert sample.images == (folder / "images" / "1.png",)
    assert sample.extra == {"page": 4, "split": "train"}
    (picture,) = sample.pictures()
    assert picture.size == (60, 60)
    assert picture.tobytes() == tiny.picture(1).tobytes()


def test_family_falls_back_to_category_and_file_name(folder):
    row = {"image": "images/0.png", "question": "q", "answer": "a"}
    rows = [{**row, "family": "f", "category": "c"}, {**row, "category": "c"}, row]
    write_rows(folder / "things.jsonl", rows)
    samples = load_samples(folder)
    assert [s.family for s in samples] == ["f", "c", "things"]
    assert [s.id for s in samples] == ["things-1", "things-2", "things-3"]


def test_several_pictures(folder):
    row = {"image": ["images/0.png", "images/2.png"], "question": "q", "answer": "a"}
    write_rows(folder / "things.jsonl", [row])
    (sample,) = load_samples(folder)
    shown = [picture.tobytes() for picture in sample.pictures()]
    assert shown == [tiny.picture(0).tobytes(), tiny.picture(2).tobytes()]


def test_split(folder):
    assert [s.id for s in load_samples(folder, split="val")] == [f"q{i}" for i in range(1, 12, 2)]
    with pytest.raises(LacoError, match="has no split 'test'; it has train, val"):
        load_samples(folder, split="test")


def test_limit_is_spread_over_families_and_chosen_by_the_seed(folder):
    chosen = [[s.id for s in load_samples(folder, limit=6, seed=seed)] for seed in range(5)]
    families = {s.id: s.family for s in load_samples(folder)}
    for ids in chosen:
        assert Counter(families[name] for name in ids) == {"common": 3, "rare": 3}
        assert ids == sorted(ids, key=lambda name: int(name[1:]))
    assert len({tuple(ids) for ids in chosen}) > 1
    assert chosen[2] == [s.id for s in load_samples(folder, limit=6, seed=2)]
    assert len(load_samples(folder, limit=11)) == 11  # the rare ones are used up, the common ones fill
    with pytest.raises(LacoError, match="1 or more"):
        load_samples(folder, limit=0)


def test_spread_is_as_even_as_can_be():
    samples = [Sample(str(i), (), "q", "a", "abc"[i % 3]) for i in range(30)]
    counts = Counter(s.family for s in spread(samples, 16, seed=3))
    assert sorted(counts.values()) == [5, 5, 6]


def test_llava_json(folder):
    entries = [
        {
            "id": "7",
            "image": "images/1.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is it?"},
                {"from": "gpt", "value": "noise"},
                {"from": "human", "value": "Sure?"},
                {"from": "gpt", "value": "yes"},
            ],
        },
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    ]
    path = folder / "llava.json"
    path.write_text(json.dumps(entries))
    samples = load_samples(path)
    assert [(s.id, s.question, s.answer, len(s.images)) for s in samples] == [
        ("7-0", "What is it?", "noise", 1),
        ("7-1", "Sure?", "yes", 1),
        ("llava-2", "Hi", "Hello", 0),
    ]
    assert samples[0].picture_key == samples[1].picture_key


def test_clips_of_the_world_are_videos():
    samples = load_samples("world-video", limit=10, seed=5)
    assert Counter(s.family for s in samples) == {"motion": 3, "order": 3, "flash": 2, "static": 2}
    assert all(s.video and len(s.images) == 8 for s in samples)
    assert samples[0].id.startswith("world-video-test-5-0-")
    again = load_samples("world-video", limit=10, seed=5)
    assert [(s.question, s.answer) for s in again] == [(s.question, s.answer) for s in samples]
    assert len({s.picture_key for s in samples}) < 10  # clips are shared by their questions
    train = load_samples("world-video", "train", limit=10, seed=5)
    assert [s.answer for s in train] != [s.answer for s in samples]


def test_a_line_may_be_about_a_video(folder):
    frames = [f"images/{index}.png" for index in range(3)]
    row = {"image": frames, "question": "q", "answer": "a"}
    write_rows(folder / "things.jsonl", [{**row, "video": True}, row])
    video, several = load_samples(folder)
    assert (video.video, several.video) == (True, False)
    assert [path.name for path in video.images] == ["0.png", "1.png", "2.png"]


def test_world_is_even_seeded_and_held_out():
    samples = load_samples("world", limit=30, seed=5)
    counts = Counter(s.family for s in samples)
    assert len(samples) == 30
    assert max(counts.values()) - min(counts.values()) == 1
    again = load_samples("world", limit=30, seed=5)
    assert [(s.question, s.answer) for s in again] == [(s.question, s.answer) for s in samples]
    assert again[0].pictures()[0].tobytes() == samples[0].pictures()[0].tobytes()
    other = load_samples("world", limit=30, seed=6)
    assert other[0].pictures()[0].tobytes() != samples[0].pictures()[0].tobytes()
    words = {
        split: {s.answer for s in load_samples("world", split, 70) if s.family == "word"} for split in ("test", "train")
    }
    assert words["test"]
    assert not words["test"] & words["train"]
    assert [s.answer for s in load_samples("world", "test", 30, 5)] == [s.answer for s in samples]
    with pytest.raises(LacoError, match="split"):
        load_samples("world", "val")


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("", r"things.jsonl, line 5 is empty"),
        ("   ", r"things.jsonl, line 5 is empty"),
        ('{"id": "q4", "image": ', r"things.jsonl, line 5 is not JSON"),
        ("[1, 2]", r"things.jsonl, line 5 is not a JSON object"),
        ('{"image": "images/0.png", "question": "q"}', r"line 5 has no field 'answer'"),
        ('{"question": "q", "answer": "a"}', r"line 5 has no field 'image'"),
        ('{"image": "images/0.png", "answer": "a"}', r"line 5 has no field 'question'"),
        ('{"image": 3, "question": "q", "answer": "a"}', r"line 5: field 'image' is wrong"),
        ('{"image": "images/0.png", "question": null, "answer": "a"}', r"line 5: field 'question' is wrong"),
        ('{"image": "images/9.png", "question": "q", "answer": "a"}', r"line 5: there is no picture .*9\.png"),
        ('{"image": "\\u0000", "question": "q", "answer": "a"}', r"line 5: there is no picture"),
        ('{"image": "' + "x" * 5000 + '", "question": "q", "answer": "a"}', r"line 5: there is no picture"),
        ("[" * 100_000, r"things.jsonl, line 5 is not JSON"),
    ],
)
def test_a_bad_line_is_named(folder, line, sentence):
    edit_line(folder / "things.jsonl", 5, line)
    with pytest.raises(LacoError, match=sentence):
        load_samples(folder)


def test_bytes_that_are_no_text(folder):
    with (folder / "things.jsonl").open("ab") as file:
        file.write(b'{"image": "\xff\xfe"}\n')
    with pytest.raises(LacoError, match="line 13 is not JSON"):
        load_samples(folder)


def test_missing_empty_and_ambiguous_sources(folder, tmp_path):
    with pytest.raises(LacoError, match=r'there is no data at .*; name a \.jsonl file, .*"world"'):
        load_samples(folder / "nowhere")
    with pytest.raises(LacoError, match=r"holds no \.jsonl file"):
        load_samples(folder / "images")
    (folder / "more.jsonl").touch()
    with pytest.raises(LacoError, match=r"several data files, name one: more\.jsonl, things\.jsonl"):
        load_samples(folder)
    with pytest.raises(LacoError, match=r"more\.jsonl is empty"):
        load_samples(folder / "more.jsonl")


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        ({}, "is not LLaVA JSON"),
        ([], "is not LLaVA JSON"),
        (["x"], "entry 1 is not a JSON object"),
        ([{"image": "images/0.png"}], "entry 1 has no field 'conversations'"),
        ([{"conversations": [{"from": "human", "value": "q"}]}], "entry 1 has 1 turns"),
        ([{"conversations": [{"from": "human"}, {"from": "gpt"}]}], "entry 1: field 'conversations' is wrong"),
    ],
)
def test_bad_llava_json(folder, entries, sentence):
    path = folder / "llava.json"
    path.write_text(json.dumps(entries))
    with pytest.raises(LacoError, match=sentence):
        load_samples(path)
