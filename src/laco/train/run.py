"""`laco train RECIPE`: runs the stages of a recipe, resumes where a killed run stopped, and saves an ordinary model."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    ProcessorMixin,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from laco.errors import LacoError
from laco.train.collate import Collator
from laco.train.data import make_source
from laco.train.recipe import Recipe, Stage, load_recipe
from laco.train.scratch import build_new
from laco.train.trainer import LacoTrainer, Learner, freeze

_LOG = "log.jsonl"
_LAUNCHED = "LACO_LAUNCHED"  # set in the processes that `_launch` starts, so that they do not launch again


def train(recipe_path: str | Path, *, resume: bool = True, progress: bool = True, **overrides: Any) -> Path:
    """Trains what a recipe says and saves the model where it says.

    Args:
        recipe_path: a YAML file (see `laco.train.recipe.Recipe`).
        resume: go on with an earlier, unfinished run of the same recipe; False starts anew.
        progress: show progress bars.
        overrides: replace top-level keys of the recipe, such as `output` or `seed`.

    Returns:
        The directory of the trained model and processor, which also holds the log of the run.
    """
    recipe = load_recipe(recipe_path, **overrides)
    if recipe.processes > 1 and not {_LAUNCHED, "LOCAL_RANK"} & os.environ.keys():
        _launch(recipe, resume, progress)
        return Path(recipe.output)
    return run(recipe, resume=resume, progress=progress)


def work_directory(recipe: Recipe) -> Path:
    """Where checkpoints of an unfinished run lie: beside the output, removed by nobody but the user."""
    output = Path(recipe.output)
    return output.with_name(output.name + ".run")


def _launch(recipe: Recipe, resume: bool, progress: bool) -> None:
    """Starts this run again in several processes of one thread each; two of them beat one process of two threads."""
    work = work_directory(recipe)
    work.mkdir(parents=True, exist_ok=True)
    effective = work / "recipe.json"
    effective.write_text(recipe.model_dump_json(indent=1))
    threads = max(1, (os.cpu_count() or 1) // recipe.processes)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(recipe.processes)]
    # `--multi_gpu` is accelerate's name for torchrun; its own `--cpu` starts several processes only through MPI.
    command += ["--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", "0", "-m", "laco.train", str(effective)]
    command += [] if resume else ["--restart"]
    command += [] if progress else ["--quiet"]
    environment = os.environ | {_LAUNCHED: "1", "OMP_NUM_THREADS": str(threads)}
    if not torch.cuda.is_available():
        environment["ACCELERATE_USE_CPU"] = "true"
    if code := subprocess.run(command, env=environment).returncode:
        raise LacoError(f"the training processes ended with exit code {code}; their messages stand above")


def run(recipe: Recipe, *, resume: bool = True, progress: bool = True) -> Path:
    """Runs a recipe in this process (one of several under `accelerate launch`)."""
    work = work_directory(recipe)
    state = PartialState(cpu=not torch.cuda.is_available())
    set_seed(recipe.seed)
    model, processor = _start(recipe)
    teacher = _teacher(recipe, model, processor)
    done = [work / f"{i:02d}-{stage.name}" for i, stage in enumerate(recipe.stages)]
    start = 0
    for directory, stage in zip(done, recipe.stages, strict=True):
        finished = directory / "model.safetensors"
        if resume and finished.exists():
            _load_weights(model, finished)
        else:
            _run_stage(recipe, stage, model, processor, teacher, directory, start, resume, progress)
            if state.is_main_process:
                _save_weights(model, finished)
            state.wait_for_everyone()
        start += stage.steps * stage.batch_size
    if state.is_main_process:
        _finish(recipe, model, processor, work, done)
    state.wait_for_everyone()
    return Path(recipe.output)


def _start(recipe: Recipe) -> tuple[PreTrainedModel, ProcessorMixin]:
    if recipe.new is not None:
        model, processor = build_new(recipe.new)
    else:
        from laco.checkpoint import from_pretrained

        assert recipe.model is not None
        model, processor = from_pretrained(recipe.model)
    for entry in recipe.compress:
        from laco.methods import from_dict
        from laco.surgery import compress

        compress(model, processor, from_dict(entry))
    return model, processor


def _teacher(recipe: Recipe, model: PreTrainedModel, processor: ProcessorMixin) -> tuple[PreTrainedModel, Any] | None:
    if recipe.distill is None:
        return None
    from laco.checkpoint import from_pretrained

    directory = recipe.distill.teacher or recipe.model
    if directory is None:
        raise LacoError("distillation needs a teacher: give distill.teacher or start from a model")
    teacher, teacher_processor = from_pretrained(directory)
    return teacher.eval().requires_grad_(False), teacher_processor


def _run_stage(
    recipe: Recipe,
    stage: Stage,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    teacher: tuple[PreTrainedModel, Any] | None,
    directory: Path,
    start: int,
    resume: bool,
    progress: bool,
) -> None:
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if stage.batch_size % world_size:
        raise LacoError(f"stage {stage.name}: batch_size {stage.batch_size} does not divide by {world_size} processes")
    freeze(model, stage)
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=stage.steps,
        per_device_train_batch_size=stage.batch_size // world_size,
        lr_scheduler_type=stage.schedule,
        lr_scheduler_kwargs={"num_decay_steps": stage.steps // 4} if stage.schedule == "warmup_stable_decay" else None,
        warmup_steps=round(stage.warmup * stage.steps),
        learning_rate=max(stage.rates.values()),
        max_grad_norm=stage.max_grad_norm,
        bf16=recipe.precision == "bf16",
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        ddp_find_unused_parameters=True,
        remove_unused_columns=False,
        logging_steps=recipe.log_steps,
        save_steps=recipe.save_steps,
        save_total_limit=1,
        report_to=[],
        disable_tqdm=not progress,
        seed=recipe.seed,
        dataloader_num_workers=0,
        label_names=["labels"],
    )
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # The sampler draws no order of its own: the pictures are already in a random one.
    trainer = _InOrder(
        model=Learner(model, stage),
        args=arguments,
        train_dataset=make_source(recipe.data, stage, start, recipe.seed, model.config.vision_config.patch_size),
        data_collator=Collator(processor, teacher and teacher[1]),
        callbacks=[_Log(directory / _LOG, stage.name)],
        stage=stage,
        teacher=teacher and teacher[0],
        distill=recipe.distill,
    )
    checkpoint = get_last_checkpoint(str(directory)) if resume and directory.exists() else None
    trainer.train(resume_from_checkpoint=checkpoint)


class _InOrder(LacoTrainer):
    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(train_dataset or self.train_dataset)


class _Log(TrainerCallback):
    """Writes every logged line, so that the log can ship with the model."""

    def __init__(self, path: Path, stage: str):
        self.path, self.stage = path, stage

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if state.is_world_process_zero and logs:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as log:
                log.write(json.dumps({"stage": self.stage, "step": state.global_step, **logs}) + "\n")


def _save_weights(model: PreTrainedModel, path: Path) -> None:
    from safetensors.torch import save_model

    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    save_model(model, str(beside))
    beside.replace(path)


def _load_weights(model: PreTrainedModel, path: Path) -> None:
    from safetensors.torch import load_model

    load_model(model, str(path))


def _finish(recipe: Recipe, model: PreTrainedModel, processor: ProcessorMixin, work: Path, done: list[Path]) -> None:
    """Saves the whole model, and the recipe and the log of the run beside it."""
    from laco.checkpoint import save_pretrained

    model.requires_grad_(True).eval()
    extra = {
        "recipe.json": recipe.model_dump_json(indent=1),
        "training_log.jsonl": "".join((d / _LOG).read_text() for d in done if (d / _LOG).exists()),
    }
    save_pretrained(model, processor, recipe.output, extra_files=extra)
    if recipe.evaluate is not None:
        from laco.evaluate import evaluate

        reloaded = AutoModelForImageTextToText.from_pretrained(recipe.output)
        report = evaluate(
            reloaded,
            AutoProcessor.from_pretrained(recipe.output),
            recipe.evaluate.data,
            seed=recipe.evaluate.seed,
            samples=recipe.evaluate.samples,
        )
        Path(recipe.output, "evaluation.json").write_text(report.model_dump_json(indent=1))
