"""Runs: what learns and what does not, resuming, distillation, several processes, and an ordinary model in the end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import laco
import tiny
from laco.errors import LacoError
from laco.train import run, train
from laco.train.recipe import GROUPS, Stage
from laco.train.run import work_directory
from laco.train.scratch import build_new
from laco.train.trainer import freeze, group_of, grouped
from laco.world import World
from small_runs import ANSWER, SEE, new_model, recipe, weights


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """An uncompressed model on disk."""
    directory = tmp_path_factory.mktemp("base") / "model"
    torch.manual_seed(1)
    laco.save_pretrained(*build_new(new_model()), directory)
    return directory


def losses(directory: Path) -> list[dict[str, float]]:
    """The logged steps of a run."""
    lines = [json.loads(line) for line in (directory / "training_log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def quiet_run(*args, **keys) -> Path:
    return run(recipe(*args, **keys), progress=False)


def test_from_scratch_gives_a_stock_model(tmp_path: Path) -> None:
    out = quiet_run(tmp_path / "out", stages=[SEE, ANSWER | {"dense": 0.3}], evaluate={"samples": 14})
    model = AutoModelForImageTextToText.from_pretrained(out)
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert not any("dense" in name for name in weights(out))
    processor = AutoProcessor.from_pretrained(out)
    inputs = processor(images=World()[0].picture, text="<image>which word is written?\n", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 1
    log = [json.loads(line) for line in (out / "training_log.jsonl").read_text().splitlines()]
    assert {"see", "answer"} == {line["stage"] for line in log}
    assert set(json.loads((out / "evaluation.json").read_text())["families"]) == {
        "word", "number", "chart", "colour", "count", "relation", "locate"
    }  # fmt: skip
    card = (out / "README.md").read_text()
    assert f"{model.num_parameters():,} parameters" in card
    assert "| see | 2 | 4 |" in card
    assert "| **average** |" in card
    assert not work_directory(recipe(out)).exists()


def test_learning_reduces_the_loss(tmp_path: Path) -> None:
    stage = ANSWER | {"steps": 40, "batch_size": 4, "lr": 1e-2, "dense": 0.1}
    out = quiet_run(tmp_path / "out", stages=[stage])
    answers = [line["answer"] for line in losses(out)]
    assert sum(answers[-5:]) / 5 < 0.75 * sum(answers[:3]) / 3


def test_groups_partition_the_parameters(base: Path) -> None:
    model, _ = laco.from_pretrained(base, compressor=laco.LaCo(layer=2))
    groups = {name: group for group, name, _ in grouped(model)}
    assert set(groups.values()) == set(GROUPS)
    assert groups["model.vision_tower.encoder.layers.1.mlp.fc1.weight"] == "encoder_before"
    assert groups["model.vision_tower.encoder.layers.2.mlp.fc1.weight"] == "encoder_after"
    assert groups["model.multi_modal_projector.linear_1.weight"] == "projector"
    assert groups["lm_head.weight"] == groups["model.language_model.norm.weight"] == "language_model"
    assert {n for n, g in groups.items() if g == "compressor"} == {n for n in groups if ".compressor." in n}
    assert group_of("model.vision_tower.encoder.layers.3.mlp.fc1.weight", None) == "encoder_before"


def test_the_two_stages_of_the_paper(base: Path, tmp_path: Path) -> None:
    """First compressor and projector learn, then everything; frozen groups stay bit-equal."""
    compressor = {"method": "laco", "layer": 2, "zero_init": False}
    first = ANSWER | {"name": "align", "lr": {"compressor": 1e-3, "projector": 1e-3}}
    aligned = quiet_run(tmp_path / "a", model=str(base), compress=[compressor], stages=[first])
    before, after = weights(base), weights(aligned)
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed
    assert all("multi_modal_projector" in name for name in changed)

    second = ANSWER | {"lr": dict.fromkeys(GROUPS, 0.001) | {"encoder_before": 0.0}}
    healed = quiet_run(tmp_path / "b", model=str(base), compress=[compressor], stages=[first, second])
    after = weights(healed)
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert not any("layers.0." in name and "vision_tower" in name for name in changed)
    assert any("layers.3." in name and "vision_tower" in name for name in changed)
    assert any("language_model" in name for name in changed)
    model, processor = laco.from_pretrained(healed)
    assert model.config.vision_config.compression[0]["layer"] == 2
    assert processor.patch_size == 32


def test_learning_rates_differ_by_group(base: Path, tmp_path: Path) -> None:
    """With Adam, one step moves a weight by its rate: a hundredfold rate moves it a hundred times further."""
    stage = ANSWER | {
        "steps": 1,
        "warmup": 0,
        "schedule": "constant",
        "lr": {"projector": 1e-3, "language_model": 1e-5},
    }
    out = quiet_run(tmp_path / "out", model=str(base), stages=[stage])
    before, after = weights(base), weights(out)
    moved = {name: (after[name] - before[name]).abs().max().item() for name in before}
    assert moved["multi_modal_projector.linear_1.weight"] == pytest.approx(1e-3, rel=0.05)
    assert moved["language_model.lm_head.weight"] == pytest.approx(1e-5, rel=0.05)


def test_a_stage_that_cannot_learn(base: Path) -> None:
    model, _ = laco.from_pretrained(base)
    with pytest.raises(LacoError, match="trains compressor, but the model has no parameter"):
        freeze(model, Stage(name="s", steps=1, lr={"compressor": 1.0}))
    with pytest.raises(LacoError, match="nothing learns"):
        freeze(model, Stage(name="s", steps=1, lr={"projector": 0.0}))


def start(given: Path, *extra: str) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "laco.train", str(given), "--quiet", *extra], env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip


def test_resuming_after_a_kill_is_bit_equal(tmp_path: Path) -> None:
    stages = [SEE, ANSWER | {"steps": 60, "dense": 0.2}]
    whole = quiet_run(tmp_path / "whole", stages=stages, save_steps=5)
    wanted = recipe(tmp_path / "killed", stages=stages, save_steps=5)
    given = tmp_path / "recipe.json"
    given.write_text(wanted.model_dump_json())
    process = start(given)
    stage_directory = work_directory(wanted) / "01-answer"
    deadline = time.monotonic() + 120
    while not list(stage_directory.glob("checkpoint-*/trainer_state.json")):
        assert process.poll() is None, process.stdout.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed").exists()
    steps = [int(p.name.split("-")[1]) for p in stage_directory.glob("checkpoint-*")]
    assert max(steps) < 60, "the run was over before it could be killed"
    (stage_directory / f"checkpoint-{max(steps) + 1}").mkdir()  # as a kill in the middle of saving leaves one

    run(wanted, progress=False)
    one, other = weights(whole), weights(tmp_path / "killed")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [line["loss"] for line in losses(whole)] == [line["loss"] for line in losses(tmp_path / "killed")]


def test_an_unfinished_run_of_another_recipe_is_refused(tmp_path: Path) -> None:
    work = work_directory(recipe(tmp_path / "out"))
    (work / "00-answer" / "checkpoint-1").mkdir(parents=True)
    (work / "recipe.json").write_text(json.dumps({"seed": 7}))
    with pytest.raises(LacoError, match="another recipe"):
        quiet_run(tmp_path / "out")
    run(recipe(tmp_path / "out"), resume=False, progress=False)
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"compress": [{"method": "lacoo"}]}, "no method 'lacoo'"),
        ({"compress": [{"method": "laco", "layer": 20}]}, "layer 20 is past the end"),
        ({"compress": [{"method": "div_prune", "keep": 1000}]}, "cannot keep 1000"),
        ({"model": "nowhere/nothing"}, "nowhere/nothing"),
        ({"data": {"source": "none.jsonl"}}, "no data at none.jsonl"),
        ({"stages": [ANSWER | {"lr": 0}]}, "nothing learns in stage answer"),
        ({"stages": [ANSWER, ANSWER | {"name": "more", "lr": {"compressor": 1}}]}, "stage more trains compressor"),
        ({"evaluate": {"data": "none.jsonl"}}, "no data at none.jsonl"),
        ({"output": "a-file"}, "a-file is a file; give the name of a directory"),
        ({"output": "a-file/out"}, "a-file is a file; give the name of a directory"),
    ],
)
def test_a_mistake_leaves_nothing_behind(
    base: Path, tmp_path: Path, wrong: dict, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is trained either, though the mistake be in what comes last; and the recipe may be corrected."""
    monkeypatch.chdir(tmp_path)
    Path("a-file").write_text("precious")
    module = sys.modules["laco.train.run"]  # whose name in the package is that of the function
    monkeypatch.setattr(module, "_save_weights", lambda *_: pytest.fail("a stage was trained"))
    with pytest.raises(LacoError, match=sentence):
        run(recipe(**{"output": Path("out"), "model": str(base), **wrong}), progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["a-file"]
    assert Path("a-file").read_text() == "precious"


@pytest.mark.parametrize("key", ["model", "new", "distill"])
def test_what_is_read_is_not_overwritten(base: Path, tmp_path: Path, key: str) -> None:
    (tmp_path / "link").symlink_to(base)
    keys = {
        "model": {"model": str(base)},
        "new": {"new": {"weights": str(base)}},
        "distill": {"distill": {"teacher": str(base)}},
    }[key]
    before = weights(base)
    with pytest.raises(LacoError, match="link is the model that is read"):
        quiet_run(tmp_path / "link", **keys)
    assert weights(base).keys() == before.keys()
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


@pytest.mark.parametrize("processes", [1, 2])
def test_what_may_not_be_replaced_shows_before_training(
    base: Path, tmp_path: Path, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.md").write_text("precious")
    module = sys.modules["laco.train.run"]
    for name in ("_start", "_launch"):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("it went on"))
    given = tmp_path / "recipe.json"
    given.write_text(recipe(tmp_path / "out", model=str(base), processes=processes).model_dump_json())
    with pytest.raises(LacoError, match=r"out holds no saved model, but thesis\.md"):
        train(given, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "recipe.json"]


def test_what_was_killed_before_it_trained_is_no_other_run(base: Path, tmp_path: Path) -> None:
    work = work_directory(recipe(tmp_path / "out"))
    (work / "00-answer").mkdir(parents=True)
    (work / "00-answer" / "log.jsonl").touch()
    (work / "recipe.json").write_text(json.dumps({"seed": 7}))
    quiet_run(tmp_path / "out", model=str(base))
    assert not work.exists()


def test_distillation_from_the_uncompressed_model(base: Path, tmp_path: Path) -> None:
    frozen = ANSWER | {"steps": 1, "warmup": 0, "lr": {"projector": 1e-30}}
    itself = quiet_run(tmp_path / "itself", model=str(base), distill={"weight": 1.0}, stages=[frozen])
    assert losses(itself)[-1]["distill"] == pytest.approx(0, abs=1e-5)

    model, processor = laco.from_pretrained(base)
    for parameter in model.parameters():
        parameter.data.mul_(4)  # a teacher that is sure of what it says
    laco.save_pretrained(model, processor, tmp_path / "teacher")
    out = quiet_run(
        tmp_path / "out",
        model=str(base),
        compress=[{"method": "average_pool", "layer": 1}],
        distill={"teacher": str(tmp_path / "teacher"), "weight": 50.0},
        stages=[ANSWER | {"steps": 25, "batch_size": 4, "lr": 1e-2}],
    )
    parts = [line["distill"] for line in losses(out)]
    assert sum(parts[-5:]) < 0.9 * sum(parts[:5])


def test_gradient_checkpointing_changes_nothing(base: Path, tmp_path: Path) -> None:
    keys = {"model": str(base), "compress": [{"method": "laco", "layer": 2}], "stages": [ANSWER]}
    plain = weights(quiet_run(tmp_path / "plain", **keys))
    saved = weights(quiet_run(tmp_path / "saved", **keys, gradient_checkpointing=True))
    for name, tensor in plain.items():
        torch.testing.assert_close(saved[name], tensor, atol=1e-6, rtol=1e-5)


def test_bf16_stays_near_fp32(base: Path, tmp_path: Path) -> None:
    keys = {"model": str(base), "compress": [{"method": "laco", "layer": 2}], "stages": [ANSWER]}
    full, half = quiet_run(tmp_path / "full", **keys), quiet_run(tmp_path / "half", **keys, precision="bf16")
    assert losses(half)[-1]["answer"] == pytest.approx(losses(full)[-1]["answer"], rel=0.02)
    assert losses(half)[-1]["answer"] != losses(full)[-1]["answer"]


def test_two_processes_do_what_one_does(base: Path, tmp_path: Path) -> None:
    """Through `accelerate launch` with gloo. All answers have one length, so that the mean over a batch is the mean of
    the means of its halves."""
    pictures = tmp_path / "data"
    pictures.mkdir()
    lines = []
    for i in range(8):
        World(0)[i].picture.save(pictures / f"{i}.png")
        word = World(0)[i].scene.texts[0].string
        lines.append(json.dumps({"image": f"{i}.png", "question": "which?", "answer": word}))
    (pictures / "d.jsonl").write_text("\n".join(lines) + "\n")
    keys = {
        "model": str(base),
        "data": {"source": str(pictures)},
        "stages": [ANSWER | {"batch_size": 4, "questions": 1}],
    }
    one = weights(quiet_run(tmp_path / "one", **keys))
    given = tmp_path / "two.yaml"
    given.write_text(recipe(tmp_path / "two", **keys, processes=2).model_dump_json())
    train(given, progress=False)
    two = weights(tmp_path / "two")
    start_weights = weights(base)
    assert any((two[name] - start_weights[name]).abs().max() > 1e-4 for name in two)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=2e-5, rtol=1e-4)  # Adam moves by up to 1e-3


@pytest.mark.parametrize("name", ["qwen2_5_vl", "paligemma"])
def test_models_that_cannot_take_packed_questions_are_refused(name: str, tmp_path: Path) -> None:
    """Their positions have three dimensions, or their prompts attend in both directions: training would be wrong."""
    case = next(case for label, case in tiny.CASES.items() if label.startswith(name))
    model, processor = case.build()
    processor.chat_template = "{{ messages }}"
    laco.save_pretrained(model, processor, tmp_path / "model")
    with pytest.raises(LacoError, match=f"which the language model of {name} does not allow"):
        quiet_run(tmp_path / "out", model=str(tmp_path / "model"), new=None)
    assert not (tmp_path / "out").exists()
