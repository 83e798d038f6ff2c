"""Runs the processes of a healing study side by side, live bars over them; what is finished is kept on disk."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from threading import Event
from typing import NamedTuple

from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from laco.errors import LacoError
from laco.files import alone_in, write_file
from laco.healing.summary import Study
from laco.healing.variants import NONE, Job, Outcome, Protocol, Variant, label, slug

MANY = 24  # from so many jobs on, bars of finished ones make room
REFUSAL = "refused.txt"  # in the folder of a job whose method cannot stand or run in the model: why


def run_study(
    variants: Sequence[Variant],
    protocol: Protocol,
    output: str | Path,
    *,
    seeds: Sequence[int] = (0,),
    workers: int | None = None,
    progress: bool = True,
) -> Study:
    """Heals and evaluates every variant with every seed (those in which nothing is random, once).

    Args:
        variants: rows of the study; the model as it is (`NONE`) is always added, the others' loyalty needs its answers.
        protocol: what they share.
        output: directory with one folder a job; jobs that are finished there with the very same settings are skipped.
        seeds: of initialisation and data order.
        workers: processes at a time, of one thread each; None = one a core.
        progress: shows bars on stderr.

    Raises:
        LacoError: two variants have one name, the model as it is cannot be evaluated, or another process runs a study
            there.
    """
    jobs = jobs_of(variants, protocol, seeds)
    outcomes: dict[int, Outcome] = {}
    failures: dict[str, str] = {}
    refused: list[str] = []
    stop = Event()
    with (
        alone_in(output),
        Bars(enabled=progress, jobs=len(jobs)) as bars,
        ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool,
    ):
        start = partial(run_job, root=Path(output), bars=bars, stop=stop)
        # The model as it is comes first and alone: everything else is compared with its answers.
        base = start(jobs[0])
        if isinstance(base, Failure):
            raise LacoError(f"the uncompressed model cannot be evaluated: {base.reason}")
        outcomes[0] = base
        futures = {pool.submit(start, job): number for number, job in enumerate(jobs[1:], 1)}
        try:
            for future in as_completed(futures):
                number, result = futures[future], future.result()
                if isinstance(result, Outcome):
                    outcomes[number] = result
                else:
                    failures[label(jobs[number])] = result.reason
                    refused += [label(jobs[number])] if result.refused else []
        except BaseException:  # Ctrl-C: no further process starts, and those that run end
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    done = [outcomes[number] for number in sorted(outcomes)]
    return Study(protocol=protocol, outcomes=done, failures=failures, refused=refused)


def jobs_of(variants: Sequence[Variant], protocol: Protocol, seeds: Sequence[int]) -> list[Job]:
    """The processes of a study, that of the model as it is first. Arguments and errors as of `run_study`."""
    rows = [NONE, *(row for row in variants if row != NONE)]
    folders = [slug(row.name) for row in rows]
    if twice := [row.name for row in rows if folders.count(slug(row.name)) > 1]:
        raise LacoError(f"two variants are called {twice[0]!r}; give them different names")
    return [
        Job(variant=row, seed=seed, protocol=protocol.of(row))
        for row in rows
        for seed in (seeds if row.random else seeds[:1])
    ]


def finished_study(
    variants: Sequence[Variant], protocol: Protocol, output: str | Path, *, seeds: Sequence[int] = (0,)
) -> Study:
    """What `run_study` has finished so far: variants with all their seeds. Starts nothing.

    Raises:
        LacoError: two variants have one name, or the model as it is has not been evaluated yet.
    """
    jobs = jobs_of(variants, protocol, seeds)
    outcomes = [finished(Path(output) / slug(label(job)), job) for job in jobs]
    if outcomes[0] is None:
        raise LacoError(f"nothing of this study is finished in {output}; run it without --finished first")
    open_jobs = [job for job, outcome in zip(jobs, outcomes, strict=True) if outcome is None]
    refused = {label(job): reason for job in open_jobs if (reason := refusal(Path(output) / slug(label(job)), job))}
    pending = [label(job) for job in open_jobs if label(job) not in refused]
    waiting = {job.variant.name for job in open_jobs}
    done = [outcome for outcome in outcomes if outcome is not None and outcome.job.variant.name not in waiting]
    return Study(protocol=protocol, outcomes=done, failures=refused, refused=list(refused), pending=pending)


class Failure(NamedTuple):
    """Why there is no outcome; `refused` if a `LacoError` said so, else it is a defect."""

    reason: str
    refused: bool


class Bars(Progress):
    """A bar for each job: steps of healing, live; and one for all where there are many."""

    def __init__(self, enabled: bool, jobs: int):
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", style="bold"),
            console=Console(stderr=True),
            disable=not enabled,
        )
        self.whole = self.add_task("all", total=jobs, note="") if jobs >= MANY else None

    def close(self, bar: TaskID, note: str) -> None:
        """Ends the bar of a job."""
        self.update(bar, note=note, visible=self.whole is None)
        if self.whole is not None:
            self.advance(self.whole)


def run_job(job: Job, root: Path, bars: Bars, stop: Event) -> Outcome | Failure:
    """Runs a job in a process of its own and waits for it, or until `stop` is set."""
    directory = root / slug(label(job))
    bar = bars.add_task(label(job), total=job.protocol.steps if job.variant.heal else 1, note="")
    if (done := finished(directory, job)) is None:
        prepare(directory, job)
        command = [sys.executable, "-m", "laco.healing", str(directory), str(root / NONE.name)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        with (directory / "log.txt").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
            try:
                while process.poll() is None and not stop.is_set():
                    bars.update(bar, completed=steps_done(directory) if job.variant.heal else 0)
                    time.sleep(0.3)
            finally:
                process.kill()
                process.wait()
        done = finished(directory, job)
    if done is None:
        bars.close(bar, "[red]failed")
        lines = (directory / "log.txt").read_text().strip().splitlines() or ["no message"]
        if (reason := refusal(directory, job)) is not None:
            return Failure(reason, refused=True)
        return Failure(f"{lines[-1]} (exit code {process.returncode}, {directory / 'log.txt'})", refused=False)
    bars.update(bar, completed=bars.tasks[bar].total)
    bars.close(bar, f"{done.report.average:.1f} %")
    return done


def finished(directory: Path, job: Job) -> Outcome | None:
    """The outcome of an earlier run of this very job."""
    try:
        outcome = Outcome.model_validate_json((directory / "outcome.json").read_text())
    except (OSError, ValidationError):
        return None
    return outcome if outcome.job == job else None


def refusal(directory: Path, job: Job) -> str | None:
    """Why an earlier run of this very job could not be made, by what laco says."""
    file = directory / REFUSAL
    return file.read_text() if file.exists() and is_of(directory, job) else None


def is_of(directory: Path, job: Job) -> bool:
    """Whether a folder is that of this very job."""
    try:
        return Job.model_validate_json((directory / "job.json").read_text()) == job
    except (OSError, ValidationError):
        return False


def prepare(directory: Path, job: Job) -> None:
    """A folder for the job; one of an interrupted run of the very same job is continued, any other replaced."""
    if directory.exists() and not is_of(directory, job):
        shutil.rmtree(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / REFUSAL).unlink(missing_ok=True)
    write_file(directory / "job.json", job.model_dump_json(indent=1))


def steps_done(directory: Path) -> int:
    """Steps of healing so far: lines of the training's logs say the step of each stage."""
    done = 0
    for log in directory.glob("model.run/*/log.jsonl"):
        lines = log.read_bytes().splitlines()
        done += max(
            (int(line.split(b'"step": ')[1].split(b",")[0]) for line in lines if b'"step": ' in line), default=0
        )
    return done
