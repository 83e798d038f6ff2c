"""`laco train RECIPE`: runs the stages of a recipe, resumes where a killed run stopped, and saves an ordinary model."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import load_model, save_model
from torch import nn
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProcessorMixin,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from laco.checkpoint import from_pretrained, save_pretrained
from laco.data import load_samples
from laco.errors import LacoError
from laco.evaluate import evaluate
from laco.evaluate.generation import check_answers
from laco.families import family_of
from laco.families.compat import checkpoint_activations
from laco.files import holds_model, refuse_foreign, refuse_source, write_file
from laco.methods import from_dict
from laco.surgery import compress
from laco.train.card import model_card
from laco.train.collate import Collator
from laco.train.data import Source, make_source
from laco.train.recipe import Recipe, Stage, load_recipe
from laco.train.scratch import build_new
from laco.train.trainer import DenseHeads, LacoTrainer, Learner, check_lessons, freeze

_LOG = "log.jsonl"
_LAUNCHED = "LACO_LAUNCHED"  # set in the processes that `_launch` starts, so that they do not launch again
# What may change between a run and its resumption.
_FREE = {"output", "description", "processes", "log_steps", "save_steps", "evaluate"}


def train(recipe_path: str | Path, *, resume: bool = True, progress: bool = True, **overrides: Any) -> Path:
    """Trains what a recipe says and saves the model where it says.

    Args:
        recipe_path: a YAML file (see `laco.train.recipe.Recipe`).
        resume: go on with an earlier, unfinished run of the same recipe; False starts anew.
        progress: show progress bars.
        overrides: replace top-level keys of the recipe, such as `output` or `seed`.

    Returns:
        The directory of the trained model and processor, which also holds the recipe and the log of the run.

    Raises:
        LacoError: the recipe is wrong, or does not fit the model; before anything is trained or written.
    """
    recipe = load_recipe(recipe_path, **overrides)
    if recipe.processes > 1 and not {_LAUNCHED, "LOCAL_RANK"} & os.environ.keys():
        _check_places(recipe, work_directory(recipe), resume)  # said once, not by every process
        _launch(recipe, resume, progress)
        return Path(recipe.output)
    return run(recipe, resume=resume, progress=progress)


def work_directory(recipe: Recipe) -> Path:
    """Where the checkpoints of an unfinished run lie: beside the output, until the run is finished."""
    output = Path(recipe.output)
    return output.with_name(output.name + ".run")


def _launch(recipe: Recipe, resume: bool, progress: bool) -> None:
    """Starts this run again in several processes; two of one thread beat one of two threads on small models."""
    given = work_directory(recipe).with_suffix(".run.json")
    write_file(given, recipe.model_dump_json(indent=1))
    threads = max(1, (os.cpu_count() or 1) // recipe.processes)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(recipe.processes)]
    # `--multi_gpu` is accelerate's name for torchrun; its own `--cpu` starts several processes only through MPI.
    command += ["--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", "0", "-m", "laco.train", str(given)]
    command += [] if resume else ["--restart"]
    command += [] if progress else ["--quiet"]
    environment = os.environ | {_LAUNCHED: "1", "OMP_NUM_THREADS": str(threads)}
    if not torch.cuda.is_available():
        environment["ACCELERATE_USE_CPU"] = "true"
    try:
        code = subprocess.run(command, env=environment).returncode
    finally:
        given.unlink()
    if code:
        raise LacoError(f"the training processes ended with exit code {code}; their messages stand above")


def run(recipe: Recipe, *, resume: bool = True, progress: bool = True) -> Path:
    """Runs a recipe in this process (one of several under `accelerate launch`); returns the output's directory."""
    state = PartialState(cpu=not torch.cuda.is_available())
    work = work_directory(recipe)
    _check_places(recipe, work, resume)
    set_seed(recipe.seed)
    model, processor = _start(recipe)
    check_lessons(model, recipe)
    teacher = _teacher(recipe)
    sources = _check_stages(recipe, model, state.num_processes)
    with state.main_process_first():
        if state.is_main_process:
            _open_work(recipe, work, resume)
    dense = DenseHeads(model.config.vision_config.hidden_size) if any(s.dense for s in recipe.stages) else None
    directories = [work / f"{i:02d}-{stage.name}" for i, stage in enumerate(recipe.stages)]
    try:
        for directory, stage, source in zip(directories, recipe.stages, sources, strict=True):
            learner = Learner(model, stage, dense)
            finished = directory / "model.safetensors"
            if finished.exists():
                load_model(learner, finished, strict=False)
                continue
            trainer = _trainer(recipe, stage, learner, source, processor, teacher, directory, progress)
            trainer.train(resume_from_checkpoint=_last_checkpoint(directory, state.num_processes))
            if state.is_main_process:
                _save_weights(learner, finished)
            state.wait_for_everyone()
    except BaseException:  # some mistakes show in the first step, such as a budget above what pictures have
        if state.is_main_process and not _has_trained(work):
            shutil.rmtree(work)
        raise
    if state.is_main_process:
        _finish(recipe, model, processor, directories, progress)
        shutil.rmtree(work)
    state.wait_for_everyone()
    return Path(recipe.output)


def _check_places(recipe: Recipe, work: Path, resume: bool) -> None:
    """Raises `LacoError` where the trained model cannot be written, or what is to be asked in the end cannot be read,
    or another recipe's training would be lost.
    """
    output = Path(recipe.output).absolute()
    there = next(path for path in (output, *output.parents) if path.exists())
    if not there.is_dir():
        raise LacoError(f"{there} is a file; give the name of a directory as output")
    teacher = recipe.distill.teacher if recipe.distill else None
    for source in (recipe.model, recipe.new.weights if recipe.new else None, teacher):
        if source is not None:
            refuse_source(output, source)
    refuse_foreign(output)
    if recipe.evaluate is not None:
        load_samples(recipe.evaluate.data, limit=1)
    kept = work / "recipe.json"
    if resume and kept.exists() and _has_trained(work) and json.loads(kept.read_text()) != _wanted(recipe):
        raise LacoError(f"{work} holds an unfinished run of another recipe; start anew with --restart, or remove it")


def refuse_finished(recipe: Recipe) -> None:
    """Raises `LacoError` where a model lies that is trained already, unless a run that was stopped is to replace it."""
    work = work_directory(recipe)
    _check_places(recipe, work, resume=True)
    if holds_model(Path(recipe.output)) and not _has_trained(work):
        raise LacoError(f"{recipe.output} holds a model already; give another output, or --restart to train it anew")


def _check_stages(recipe: Recipe, model: PreTrainedModel, processes: int) -> list[Source]:
    """What each stage shows; raises `LacoError` where a stage cannot be trained, also a later one."""
    sources, seen, patch = [], 0, getattr(model.config.vision_config, "patch_size", 0)
    for stage in recipe.stages:
        if stage.batch_size % processes:
            raise LacoError(
                f"stage {stage.name}: batch_size {stage.batch_size} does not divide by {processes} processes"
            )
        freeze(model, stage)
        sources.append(make_source(recipe.data, stage, seen, recipe.seed, patch))
        seen += stage.steps * stage.batch_size
    return sources


def _wanted(recipe: Recipe) -> dict[str, Any]:
    """What a run must have in common with the one that it goes on with."""
    return recipe.model_dump(mode="json", exclude=_FREE)


def _has_trained(work: Path) -> bool:
    """Whether a run has left anything that it could go on with, or logged a step."""
    logs = [log for log in work.glob(f"*/{_LOG}") if log.stat().st_size]
    return bool(logs or [*work.glob("*/checkpoint-*"), *work.glob("*/model.safetensors")])


def _open_work(recipe: Recipe, work: Path, resume: bool) -> None:
    """Makes the working directory, or leaves it as an unfinished run of the same recipe left it."""
    if not resume:
        shutil.rmtree(work, ignore_errors=True)
    write_file(work / "recipe.json", json.dumps(_wanted(recipe), indent=1))


def _start(recipe: Recipe) -> tuple[PreTrainedModel, ProcessorMixin]:
    model: PreTrainedModel
    processor: ProcessorMixin
    if recipe.new is not None:
        model, processor = build_new(recipe.new)
    else:
        assert recipe.model is not None
        model, processor = from_pretrained(recipe.model)
        check_answers(processor)
        if not family_of(model).packs:
            raise LacoError(
                f"laco train asks several questions about a picture in one sequence, which the language model of"
                f" {family_of(model).name} does not allow; train it with the Trainer of transformers"
            )
    for entry in recipe.compress:
        compress(model, processor, from_dict(entry))
    if recipe.compress and recipe.model and Path(recipe.model).is_dir():
        model.config.base_model_name_or_path = str(Path(recipe.model).resolve())  # for the loyalty to it
    return model, processor


def _teacher(recipe: Recipe) -> tuple[PreTrainedModel | None, ProcessorMixin | None]:
    if recipe.distill is None:
        return None, None
    directory = recipe.distill.teacher or recipe.model
    if directory is None:
        raise LacoError("distillation needs a teacher: give distill.teacher or start from a model")
    teacher, processor = from_pretrained(directory)
    check_answers(processor)
    return teacher.eval().requires_grad_(False), processor


def _trainer(
    recipe: Recipe,
    stage: Stage,
    learner: Learner,
    source: Source,
    processor: ProcessorMixin,
    teacher: tuple[PreTrainedModel | None, ProcessorMixin | None],
    directory: Path,
    progress: bool,
) -> LacoTrainer:
    """The Trainer of one stage."""
    freeze(learner.vlm, stage)
    if recipe.gradient_checkpointing:
        checkpoint_activations(learner.vlm, use_reentrant=False)
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=stage.steps,
        per_device_train_batch_size=stage.batch_size // PartialState().num_processes,
        lr_scheduler_type=stage.schedule,
        warmup_steps=round(stage.warmup * stage.steps),
        learning_rate=max(stage.rates.values()),
        max_grad_norm=stage.max_grad_norm,
        bf16=recipe.precision == "bf16",
        use_cpu=not torch.cuda.is_available(),
        ddp_find_unused_parameters=True,  # LLaVA leaves the encoder's last norm out
        remove_unused_columns=False,
        logging_steps=recipe.log_steps,
        save_steps=recipe.save_steps,
        save_total_limit=1,
        report_to=[],
        disable_tqdm=not progress,
        seed=recipe.seed,
    )
    trainer = LacoTrainer(
        model=learner,
        args=arguments,
        train_dataset=source,
        data_collator=Collator(processor, teacher[1]),
        callbacks=[_Log(directory / _LOG, stage.name)],
        teacher=teacher[0],
        distill=recipe.distill,
    )
    trainer.remove_callback(PrinterCallback)  # what it prints without bars would stand in the way of JSON on stdout
    return trainer


def _last_checkpoint(directory: Path, processes: int) -> str | None:
    """The newest checkpoint that a kill did not leave half-written; half-written ones are removed."""
    while directory.exists() and (found := get_last_checkpoint(str(directory))):
        random_states = "rng_state*.pth"
        if Path(found, "trainer_state.json").exists() and len(list(Path(found).glob(random_states))) >= processes:
            return found
        PartialState().wait_for_everyone()
        if PartialState().is_main_process:
            shutil.rmtree(found)
        PartialState().wait_for_everyone()
    return None


class _Log(TrainerCallback):
    """Writes every logged line to a file that ships with the model; a resumed run drops what it does again."""

    def __init__(self, path: Path, stage: str):
        self.path, self.stage = path, stage

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            old = self.path.read_text().splitlines() if self.path.exists() else []
            kept = [line for line in old if json.loads(line)["step"] <= state.global_step]
            write_file(self.path, "".join(line + "\n" for line in kept))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if state.is_world_process_zero and logs:
            with self.path.open("a") as log:
                log.write(json.dumps({"stage": self.stage, "step": state.global_step, **logs}) + "\n")


def _save_weights(learner: nn.Module, path: Path) -> None:
    beside = path.with_suffix(".tmp")
    save_model(learner, str(beside))
    beside.replace(path)


def _finish(
    recipe: Recipe, model: PreTrainedModel, processor: ProcessorMixin, directories: list[Path], progress: bool
) -> None:
    """Saves the whole model, and beside it the recipe, the log of the run and, where asked for, the evaluation."""
    model.requires_grad_(True).eval()
    log, report = "".join((directory / _LOG).read_text() for directory in directories), None
    if (judge := recipe.evaluate) is not None:
        report = evaluate(model, processor, judge.data, seed=judge.seed, samples=judge.samples, progress=progress)
    files = {
        "README.md": model_card(recipe, model, log, report),
        "recipe.json": recipe.model_dump_json(indent=1) + "\n",
        "training_log.jsonl": log,
    }
    if report is not None:
        files["evaluation.json"] = report.model_dump_json(indent=1) + "\n"
    save_pretrained(model, processor, recipe.output, extra_files=files)
