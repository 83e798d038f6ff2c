"""The command line as users type it: results, files, and one sentence with exit code 2 for every mistake."""

import json
import subprocess
import sys

import pytest
from PIL import Image

import laco
import tiny
from laco import cli
from laco.methods import registry


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command in this process; gives exit code, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["laco", *map(str, arguments)])
        monkeypatch.setattr(cli, "out", cli.Console(width=200))
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def refused(run):
    """Runs a command that must fail as a user's mistake; gives its one sentence."""

    def refused(*arguments):
        code, out, err = run(*arguments)
        assert code == 2, err
        assert out == ""
        assert err.startswith("laco: ")
        assert err.count("\n") == 1
        assert "Traceback" not in err
        return err

    return refused


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    tiny.picture().save(path)
    return path


def test_every_command_has_help_with_an_example(run):
    code, out, _ = run("--help")
    assert code == 0
    for command in ("demo", "ask", "compress", "train", "eval", "study", "methods", "families"):
        assert command in out
        code, help_text, _ = run(command, "--help")
        assert code == 0
        assert f"Example: laco {command}" in help_text
        assert "--json" in help_text


def test_methods_and_families(run):
    code, out, _ = run("methods", "--json")
    assert code == 0
    assert [row["name"] for row in json.loads(out)] == list(registry())
    _, table, _ = run("methods")
    assert all(name in table for name in registry())
    assert "laco methods NAME shows one in full" in table
    assert {row["name"] for row in json.loads(out) if row["video_only"]} >= {"evs"}
    code, out, _ = run("families", "--json")
    assert {"llava", "llava_onevision"} <= {row["name"] for row in json.loads(out)}
    _, table, _ = run("families")
    assert "LlavaForConditionalGeneration" in table


def test_one_method_in_full(run, refused):
    code, out, err = run("methods", "glimpse_prune")
    assert code == 0, err
    for text in ("grids: rows and columns", "A Glimpse to Compress", "confirmed", "assumed", "threshold: 0.5"):
        assert text in out
    code, out, _ = run("methods", "div_prune", "--json")
    told = json.loads(out)
    assert told["settings"] == {"keep": 0.098, "positions": "keep"}
    assert (told["static_count"], told["video_only"]) == (True, False)
    assert "there is no method 'glimpse'; did you mean 'glimpse_prune'?" in refused("methods", "glimpse")


def test_compress_ask_eval(run, talker_directory, tmp_path, picture):
    small = tmp_path / "small"
    code, out, err = run("compress", talker_directory, "-o", small, "--depth", "1/4", "--set", "hidden=8", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["method"]["method"] == "laco"
    assert (told["method"]["depth"], told["method"]["hidden"]) == (0.25, 8)
    assert (told["visual_tokens_before"], told["visual_tokens"]) == (36, 9)
    assert told["files"] == sorted(str(path) for path in small.iterdir())
    model, _ = laco.from_pretrained(small)
    stock, _ = laco.from_pretrained(talker_directory)
    assert told["parameters_added"] == model.num_parameters() - stock.num_parameters() > 0

    code, out, _ = run("ask", small, "--image", picture, "--image", picture, "what?", "--max-new-tokens", 3, "--json")
    asked = json.loads(out)
    assert (asked["visual_tokens_before"], asked["visual_tokens"], asked["new_tokens"]) == (72, 18, 3)
    _, text, _ = run("ask", small, "--image", picture, "what?", "--max-new-tokens", 3)
    assert "36 → 9" in text
    assert "ms a token" in text

    report = tmp_path / "reports" / "r.json"
    arguments = ("--samples", 14, "--seed", 2, "--max-new-tokens", 2, "--json")
    code, out, _ = run("eval", small, *arguments, report)
    assert code == 0
    assert out.rstrip().endswith(f"wrote {report}")
    saved = json.loads(report.read_text())
    assert saved["command"] == f"laco eval {small} --samples 14 --seed 2 --max-new-tokens 2 --json {report}"
    assert saved["visual_tokens"] == 9
    assert f"loyalty: {saved['loyalty']:.1f} %" in out  # `laco compress` has noted the base
    code, out, _ = run("eval", talker_directory, *arguments, "-")
    assert json.loads(out)["loyalty"] == 100.0


def test_compress_does_not_overwrite_unless_forced(run, refused, talker_directory, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    (small / "config.json").write_text("{}")
    assert "exists already" in refused("compress", talker_directory, "-o", small)
    assert (small / "config.json").read_text() == "{}"
    code, out, _ = run("compress", talker_directory, "-o", small, "--method", "average_pool", "--force")
    assert code == 0
    assert "36 → 9" in out
    assert out.rstrip().endswith(f"wrote {small}")
    laco.from_pretrained(small)
    (small / "diary.odt").write_text("precious")
    assert "diary.odt" in refused("compress", talker_directory, "-o", small, "--force")
    assert (small / "diary.odt").exists()


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_compress_does_not_destroy_what_it_reads(refused, talker_directory, tmp_path, force):
    (tmp_path / "link").symlink_to(talker_directory)
    before = {path.name: path.read_bytes() for path in talker_directory.iterdir()}
    for model, output in (
        (talker_directory, talker_directory),
        (talker_directory, tmp_path / "link"),
        (tmp_path / "link", talker_directory),
    ):
        assert "is the model that is read" in refused("compress", model, "-o", output, *force)
    assert {path.name: path.read_bytes() for path in talker_directory.iterdir()} == before


def test_compress_does_not_replace_what_is_no_model(refused, talker_directory, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.md").write_text("precious")
    err = refused("compress", talker_directory, "-o", tmp_path / "work", "--force")
    assert "work holds no saved model, but thesis.md" in err
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["thesis.md"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--depth", "0"], "depth must lie in (0, 1]"),
        (["--depth", "3/2"], "depth must lie in (0, 1]"),
        (["--depth", "1/0"], "depth is a fraction such as 1/4 or 0.25; got '1/0'"),
        (["--depth", "early"], "depth is a fraction"),
        (["--depth", "1/4", "--layer", "1"], "give depth or layer, not both"),
        (["--layer", "9"], "layer 9 is past the end"),
        (["--factor", "0"], "factor must be 1 or more"),
        (["--factor", "4", "--set", "odd=error"], "factor 4 does not divide"),
        (["--method", "lacoo"], "there is no method 'lacoo'; did you mean 'laco'?"),
        (["--set", "hiden=3"], "laco has no setting 'hiden'"),
        (["--set", "hidden=many"], "laco cannot have hidden=many: it should be a valid integer\n"),
        (["--set", "odd=maybe"], "laco cannot have odd=maybe"),
        (["--set", "odd"], "--set takes KEY=VALUE"),
        (["--method", "div_prune", "--set", "keep=abc"], "keep=abc: it should be a valid integer or a valid number\n"),
        (["--method", "tome", "--set", "r=3,x"], "tome cannot have r=3,x"),
        (["--method", "tome", "--set", "r=[3"], "several values are given as [a,b] or a,b; got '[3'"),
        (["--method", "div_prune", "--set", "keep=37"], "div_prune cannot keep 37 of 36 visual tokens"),
        (["--method", "fastv", "--layer", "1", "--set", "keep=37"], "fastv cannot keep 37 of 36 visual tokens"),
        (["--method", "div_prune", "--set", "keep=nan"], "keep is a count of visual tokens, 1 or more"),
        (["--method", "fastv", "--set", "keep=nan"], "keep has counts of visual tokens, 1 or more"),
        (
            ["--method", "div_prune", "--depth", "1/4"],
            "div_prune stands behind the vision encoder, so it takes",
        ),
        (["--method", "div_prune", "--layer", "99"], "div_prune stands behind the vision encoder, so it takes"),
        (["--method", "div_prune", "--set", "kep=1"], "div_prune has no setting 'kep'; it has keep, positions\n"),
        (["--method", "fastv", "--layer", "0"], "layer counts the layers that run before compressing, so 1 or more"),
        (["--method", "evs"], "evs compares frames of videos, which this model does not take"),
    ],
)
def test_bad_settings(refused, talker_directory, tmp_path, options, sentence):
    assert sentence in refused("compress", talker_directory, "-o", tmp_path / "small", *options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("method", "text", "value"),
    [
        ("tome", "r=3,4", [3, 4]),
        ("tome", "r=[3, 4]", [3, 4]),
        ("tome", "r=3", 3),
        ("sparsevlm", "keep=0.5,18,0.125", [0.5, 18, 0.125]),
        ("sparsevlm", "depths=[0.25]", [0.25]),
        ("spvit", "targets=[0.5, 0.25]", [0.5, 0.25]),
    ],
)
def test_settings_of_several_values(method, text, value):
    given = [text, "keep=[0.5]"] if text.startswith("depths") else [text]
    made = cli.make_method(method, {}, given)
    name = text.partition("=")[0]
    found = getattr(made, name)
    assert (list(found) if isinstance(found, tuple) else found) == value


def test_methods_for_videos_say_so(run, talker_directory, tmp_path):
    laco.save_pretrained(*tiny.llava_onevision(), tmp_path / "video")
    code, out, err = run("compress", tmp_path / "video", "-o", tmp_path / "small", "--method", "evs")
    assert code == 0, err
    assert "EVS: fewer visual tokens for a video, pictures are refused, +0 parameters" in out
    code, out, _ = run("compress", tmp_path / "video", "-o", tmp_path / "json", "--method", "evs", "--json")
    assert json.loads(out)["visual_tokens"] is None
    # A count above what one picture has may be meant for the frames of a video.
    arguments = ("--method", "div_prune", "--set", "keep=72")
    code, out, err = run("compress", tmp_path / "video", "-o", tmp_path / "many", *arguments)
    assert code == 0, err
    assert "36 → fewer visual tokens" in out


def test_compressing_twice_at_the_same_place(run, refused, talker_directory, tmp_path):
    run("compress", talker_directory, "-o", tmp_path / "small", "--layer", 1)
    err = refused("compress", tmp_path / "small", "-o", tmp_path / "smaller", "--layer", 1)
    assert "already compressed after layer 1" in err
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_bad_models(refused, talker_directory, tmp_path, picture, monkeypatch):
    monkeypatch.chdir(tmp_path)  # neither may be looked for on the hub
    for name in (tmp_path / "nowhere", "nowhere", f"{tmp_path.name}/../nowhere"):
        assert f"there is no model directory {name}" in refused("ask", name, "--image", picture, "what?")
    assert "no model directory nowhere" in refused("eval", talker_directory, "--reference", "nowhere")
    assert "no model directory nowhere" in refused("demo", "--model", "nowhere", "--output", "out")
    (tmp_path / "empty").mkdir()
    assert "empty" in refused("eval", tmp_path / "empty")
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in talker_directory.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "broken" in refused("compress", broken, "-o", tmp_path / "out")
    (tmp_path / "models").mkdir()
    assert "no model directory models/typo" in refused("compress", "models/typo", "-o", "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("question", ["", " \n\t"])
def test_a_blank_question(refused, talker_directory, picture, question):
    err = refused("ask", talker_directory, "--image", picture, question)
    assert "the question is empty; ask something about the picture" in err


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda path: None, "there is no picture"),
        (lambda path: path.mkdir(), "is a directory"),
        (lambda path: path.write_text("hello"), "is not a picture"),
        (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50)), "is not a picture"),
        (lambda path: Image.new("RGB", (1, 1)).save(path), "is 1x1 pixels"),
        (lambda path: Image.new("RGB", (20000, 20)).save(path), "is 20000x20 pixels"),
    ],
)
def test_bad_pictures(refused, talker_directory, tmp_path, make, sentence):
    make(tmp_path / "p.png")
    err = refused("ask", talker_directory, "--image", tmp_path / "p.png", "what?")
    assert sentence in err
    assert "p.png" in err


def test_truncated_picture(refused, talker_directory, tmp_path):
    tiny.picture(0, 300, 300).save(tmp_path / "p.jpg")
    whole = (tmp_path / "p.jpg").read_bytes()
    (tmp_path / "p.jpg").write_bytes(whole[: len(whole) // 2])
    assert "is truncated" in refused("ask", talker_directory, "--image", tmp_path / "p.jpg", "what?")


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("", "line 2 is empty"),
        ("{", "line 2 is not JSON"),
        ('{"image": "picture.png"}', "line 2 has no field 'question'"),
        ('{"image": "gone.png", "question": "q", "answer": "a"}', "line 2: there is no picture"),
    ],
)
def test_bad_lines(refused, talker_directory, tmp_path, picture, line, sentence):
    good = '{"image": "picture.png", "question": "q", "answer": "a"}'
    (tmp_path / "d.jsonl").write_text(f"{good}\n{line}\n{good}\n")
    report = tmp_path / "report.json"
    err = refused("eval", talker_directory, "--data", tmp_path / "d.jsonl", "--json", report)
    assert sentence in err
    assert "d.jsonl" in err
    assert not report.exists()


def test_missing_data_says_how_to_point_to_some(refused, talker_directory, tmp_path):
    err = refused("eval", talker_directory, "--data", tmp_path / "nowhere")
    assert "name a .jsonl file, a directory that holds one" in err


def test_results_that_cannot_be_written_are_refused_before_the_work(refused, talker_directory, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "load", lambda model: pytest.fail("a model was loaded"))
    assert "is a directory; give the name of a file" in refused("eval", talker_directory, "--json", tmp_path)
    (tmp_path / "s.yaml").write_text(f"output: out\nmodel: {talker_directory}\nbudgets: [0.5]\n")
    assert "is a directory; give the name of a file" in refused("study", tmp_path / "s.yaml", "--page", tmp_path)


@pytest.mark.parametrize(
    "keys", ["model: models/typo", "model: {m}\ndistill: {{teacher: models/typo}}", "new: {{weights: models/typo}}"]
)
def test_models_of_a_recipe_that_are_not_there(refused, talker_directory, tmp_path, monkeypatch, keys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    keys = keys.format(m=talker_directory)
    (tmp_path / "r.yaml").write_text(f"output: out\n{keys}\nstages: [{{name: a, steps: 1, lr: 1}}]\n")
    assert "there is no model directory models/typo" in refused("train", "r.yaml")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models", "r.yaml"]


def test_train_writes_where_it_is_told(run, talker_directory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stage = "{name: a, steps: 1, batch_size: 2, lr: 1.0e-4}"
    (tmp_path / "r.yaml").write_text(f"output: elsewhere\nmodel: {talker_directory}\nstages: [{stage}]\n")
    code, out, err = run("train", "r.yaml", "--output", "out/there", "--json")
    assert not code, err
    assert json.loads(out)["output"] == "out/there"
    assert (tmp_path / "out" / "there" / "model.safetensors").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "r.yaml"]


def test_a_finished_training_is_replaced_only_if_that_is_asked_for(
    run, refused, talker_directory, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    stage = "{name: a, steps: 1, batch_size: 2, lr: 1.0e-4}"
    (tmp_path / "r.yaml").write_text(f"output: out\nmodel: {talker_directory}\nstages: [{stage}]\n")
    assert not run("train", "r.yaml", "--json")[0]
    trained = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    err = refused("train", "r.yaml")
    assert "out holds a model already; give another output, or --restart to train it anew" in err
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == trained
    code, _, err = run("train", "r.yaml", "--restart", "--json")
    assert not code, err
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns > trained
    checkpoint = tmp_path / "out.run" / "00-a" / "checkpoint-1"
    checkpoint.mkdir(parents=True)  # a run that was to replace it, and was stopped, goes on
    assert not run("train", "r.yaml", "--json")[0]


@pytest.mark.parametrize(
    ("options", "said"), [((), "the same command goes on"), (("--restart",), "the same command without --restart goes")]
)
def test_an_interrupted_training_says_how_to_go_on(run, talker_directory, tmp_path, monkeypatch, options, said):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    (tmp_path / "r.yaml").write_text(
        f"output: {tmp_path / 'out'}\nmodel: {talker_directory}\nstages: [{{name: a, steps: 1, lr: 1}}]\n"
    )
    monkeypatch.setattr("laco.train.train", interrupt)
    code, _, err = run("train", tmp_path / "r.yaml", *options)
    assert code == 130
    assert err.startswith(f"laco: stopped; {said}")
    assert err.count("\n") == 1


def test_bad_recipes(refused, tmp_path):
    assert "there is no recipe" in refused("train", tmp_path / "none.yaml")
    recipe = tmp_path / "r.yaml"
    recipe.write_text("output: out\nmodle: x\nstages: [{name: a, steps: 1, lr: 1}]\n")
    err = refused("train", recipe)
    assert "modle" in err
    assert "model" in err


@pytest.mark.parametrize(
    "arguments", [["ask"], ["eval", "m", "--samples", "0"], ["frobnicate"], ["eval", "--sed", "1"]]
)
def test_wrong_usage_is_exit_2_without_traceback(run, arguments):
    code, _, err = run(*arguments)
    assert code == 2
    assert "Traceback" not in err
    assert "Usage" in err


def test_a_bug_keeps_its_traceback(run, monkeypatch):
    monkeypatch.setattr("laco.describe.catalogue", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("methods")


def test_interrupt_is_130(run, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr("laco.describe.catalogue", interrupt)
    assert run("methods")[0] == 130


def test_the_package_is_the_program():
    done = subprocess.run([sys.executable, "-m", "laco", "methods", "nothing"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("laco: there is no method 'nothing'")


def test_the_program_is_quiet(talker_directory, picture):
    """In a process of its own: JSON on stdout, and not a word of transformers on stderr."""
    program = [sys.executable, "-c", "from laco.cli import main; main()"]
    command = [*program, "ask", talker_directory, "--image", picture, "what?", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["visual_tokens"] == 36
