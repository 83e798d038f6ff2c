"""The command line. A user's mistake is one sentence on stderr and exit code 2; a bug keeps its traceback.

Modules that load torch are imported by the commands that need them, and only then.
"""

import json
import signal
import sys
from contextlib import redirect_stdout
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from laco.errors import LacoError

app = typer.Typer(
    name="laco",
    help="Visual-token compression inside the vision encoder of Hugging Face vision-language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
out = Console()

Model = Annotated[str, typer.Argument(help="Directory saved by laco or transformers, or a name on the hub.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def main() -> None:
    """The console entry point."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what a command has started ends with it
    try:
        app()
    except (LacoError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        print(f"laco: {error}", file=sys.stderr)
        sys.exit(2)


@app.command(epilog="Example: laco demo --output out/demo")
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for the report.")] = Path("out/demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Hardly any training: shows only that it runs.")] = False,
    model: Annotated[str | None, typer.Option(help="Directory of another model than the bundled one.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of initialisation, training and test pictures.")] = 0,
    as_json: AsJson = False,
) -> None:
    """The whole story on the bundled model in minutes: insert, heal, measure, report."""
    if model is not None:
        check_model(model)
    quiet()
    from laco.demo import run

    with redirect_stdout(sys.stderr if as_json else sys.stdout):
        results = run(output, quick, model=model, seed=seed)
    if as_json:
        print_json(results.model_dump(mode="json"))
    if results.failures:
        raise typer.Exit(1)


@app.command(epilog="Example: laco ask models/laco-tiny --image picture.png 'which word is written?'")
def ask(
    model: Model,
    question: Annotated[str, typer.Argument(help="What to ask.")],
    image: Annotated[list[Path], typer.Option(help="Picture file; give it again for several pictures.")],
    video: Annotated[bool, typer.Option("--video", help="The pictures are the frames of one video.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
    as_json: AsJson = False,
) -> None:
    """Ask a model about pictures, or a video: the answer, visual tokens before and after, and times after a warm-up."""
    from laco.pictures import open_picture

    pictures = [open_picture(path) for path in image]
    loaded = load(model)

    from laco.ask import ask as ask_model

    asked = ask_model(*loaded, pictures, question, video=video, max_new_tokens=max_new_tokens)
    if as_json:
        print_json(asked.model_dump())
        return
    out.print(asked.answer, style="bold", markup=False)
    table = Table("visual tokens", "encoder", "prefill", "decode", box=None, header_style="dim")
    tokens = f"{asked.visual_tokens:g}"
    if asked.visual_tokens != asked.visual_tokens_before:
        tokens = f"{asked.visual_tokens_before:g} → {asked.visual_tokens:g}"
    decode = "no further token" if asked.decode_ms is None else f"{asked.decode_ms:.1f} ms a token"
    table.add_row(tokens, f"{asked.encoder_ms:.1f} ms", f"{asked.prefill_ms:.1f} ms", decode)
    out.print(table)


@app.command(epilog="Example: laco compress models/laco-tiny -o out/small --method laco --depth 1/4 --factor 2")
def compress(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for the compressed model.")],
    method: Annotated[str, typer.Option(help="Name of a method, see `laco methods`.")] = "laco",
    depth: Annotated[str | None, typer.Option(help="Fraction of the encoder before it: 1/4, 0.25.")] = None,
    layer: Annotated[int | None, typer.Option(help="Count of encoder layers before it, instead of --depth.")] = None,
    factor: Annotated[int | None, typer.Option(help="Side r of the windows that become one token.")] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Another setting of the method: hidden=64, keep=[72,36,18]."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a model that is already there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Put a compressor into a model and save the result. It works at once and wants healing (laco train)."""
    from laco.files import refuse_source

    refuse_source(output, model)
    if output.exists() and not force:
        raise LacoError(f"{output} exists already; give another name or --force")

    from laco.checkpoint import save_pretrained
    from laco.evaluate.generation import check_videos, visual_tokens
    from laco.surgery import compress as compress_model

    given = {"depth": parse_depth(depth), "layer": layer, "factor": factor}
    settings = {key: value for key, value in given.items() if value is not None}
    made = make_method(method, settings, setting or [])
    loaded, processor = load(model)
    before = loaded.num_parameters()
    tokens_before = visual_tokens(loaded, processor)
    check_videos(loaded, made)
    compress_model(loaded, processor, made)
    tokens = visual_tokens(loaded, processor)  # a budget that no picture has shows before anything is written
    if Path(model).is_dir():
        loaded.config.base_model_name_or_path = str(Path(model).resolve())
    save_pretrained(loaded, processor, output)
    result = {
        "method": made.to_dict(),
        "visual_tokens_before": tokens_before,
        "visual_tokens": tokens,
        "parameters_added": loaded.num_parameters() - before,
        "files": sorted(str(path) for path in output.iterdir()),
    }
    if as_json:
        print_json(result)
        return
    effect = ""
    if getattr(made, "video_only", False):
        effect = " fewer visual tokens for a video, pictures are refused,"
    elif tokens_before is not None:
        left = "fewer" if tokens is None else f"{tokens:g}"
        effect = f" {tokens_before:g} → {left} visual tokens for a picture (or tile),"
    out.print(f"{made.title}:{effect} {result['parameters_added']:+,} parameters")
    out.print(f"wrote {output}", highlight=False, soft_wrap=True)


@app.command(epilog="Example: laco train recipes/heal.yaml --output out/healed")
def train(
    recipe: Annotated[Path, typer.Argument(help="YAML file, see recipes/.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Instead of the recipe's output.")] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Start anew: ignore an unfinished run, replace a finished one.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train what a recipe says; a run that was killed goes on where it stopped."""
    quiet()
    from laco.train import load_recipe
    from laco.train import train as run
    from laco.train.run import refuse_finished

    read = load_recipe(recipe, output=output)
    started_from = read.model if read.new is None else read.new.weights
    for source in (started_from, read.distill.teacher if read.distill else None):
        if source is not None:
            check_model(source)
    if not restart:
        refuse_finished(read)
    try:
        written = run(recipe, resume=not restart, progress=not as_json, output=output)
    except KeyboardInterrupt:
        same = "the same command without --restart" if restart else "the same command"
        print(f"laco: stopped; {same} goes on from what was saved last", file=sys.stderr)
        raise typer.Exit(130) from None
    if as_json:
        print_json({"output": str(written), "files": sorted(str(path) for path in written.iterdir())})
    else:
        out.print(f"wrote {written}", highlight=False, soft_wrap=True)


@app.command("eval", epilog="Example: laco eval models/laco-tiny --data world --seed 1 --samples 700 --json out.json")
def evaluate(
    model: Model,
    data: Annotated[
        str, typer.Option(help='"world", "world-video", a .jsonl file, a directory with one, or a LLaVA .json file.')
    ] = "world",
    split: Annotated[str | None, typer.Option(help="Only this split of the data.")] = None,
    seed: Annotated[int, typer.Option(help="Chooses fresh pictures, or which questions of a file.")] = 0,
    samples: Annotated[int, typer.Option(min=1, help="Questions at most, evenly over the families.")] = 1000,
    reference: Annotated[str | None, typer.Option(help="The uncompressed model, for the loyalty.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions at a time.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 32,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the report there; - prints it.")
    ] = None,
) -> None:
    """Answer held-out questions: exact match by family with 95 % intervals, and loyalty."""
    from laco.data import load_samples

    if json_file != Path("-"):
        check_file(json_file)
    load_samples(data, split=split, limit=samples, seed=seed)  # mistakes show before models are loaded
    if reference is not None:
        check_model(reference)
    loaded = load(model)

    from laco.evaluate import evaluate as run

    report = run(
        *loaded,
        data,
        reference=reference,
        split=split,
        seed=seed,
        samples=samples,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
    )
    if json_file == Path("-"):
        print_json(report.model_dump())
        return
    table = Table("family", "accuracy", "95 % interval", "n", box=None, header_style="dim")
    for name, family in report.families.items():
        table.add_row(name, f"{family.accuracy:.1f}", f"{family.low:.1f} – {family.high:.1f}", str(family.n))
    table.add_row("average", f"{report.average:.1f}", "", str(report.samples), style="bold")
    out.print(table)
    loyalty = "not measured, name the uncompressed model by --reference"
    if report.loyalty is not None:
        loyalty = f"{report.loyalty:.1f} %"
    out.print(f"loyalty: {loyalty}; visual tokens: {report.visual_tokens:.1f}", highlight=False)
    if json_file is not None:
        out.print(f"wrote {report.save(json_file)}", highlight=False, soft_wrap=True)


@app.command(epilog="Example: laco study recipes/zoo.yaml --jobs 2 --page docs/zoo.md")
def study(
    recipe: Annotated[Path, typer.Argument(help="YAML file, see recipes/zoo.yaml.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Instead of the recipe's output.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes at a time, one thread each; one a core.")] = None,
    only: Annotated[list[str] | None, typer.Option(metavar="ROW", help="Run only this row and the baselines.")] = None,
    timing: Annotated[bool, typer.Option("--timing", help="Measure times again; nothing else should run.")] = False,
    page: Annotated[Path | None, typer.Option(metavar="FILE", help="Where the Markdown page goes.")] = None,
    as_it_is: Annotated[
        bool, typer.Option("--as-it-is", help="Run what needs no healing; it can follow later.")
    ] = False,
    finished: Annotated[bool, typer.Option("--finished", help="Start nothing; show what is there so far.")] = False,
    show_plan: Annotated[bool, typer.Option("--list", help="Show what would run, and run nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Judge every method of a recipe on one model, at several budgets; goes on where it was stopped."""
    from laco.study.recipe import load_study

    check_file(page)
    read = load_study(recipe, output=None if output is None else str(output))
    check_model(read.model)
    quiet()
    from laco.study import page as pages
    from laco.study import plan, run, write

    if show_plan:
        listed = plan.listing(read, only or [], as_it_is)
        if as_json:
            print_json(listed)
        else:
            out.print(pages.plan_table(listed))
        return
    try:
        results = run(
            read,
            jobs=jobs,
            retime=timing,
            only=only or [],
            as_it_is=as_it_is,
            finished=finished,
            progress=not as_json,
        )
    except KeyboardInterrupt:
        print("laco: stopped; the same command goes on from here", file=sys.stderr)
        raise typer.Exit(130) from None
    written = write(results, read.output, page)
    if as_json:
        print_json(results.model_dump(mode="json"))
    else:
        out.print(pages.table(results))
        for text in pages.remarks(results):
            out.print(text, highlight=False, markup=False)
        for path in written:
            out.print(f"wrote {path}", highlight=False, soft_wrap=True)
    if results.failures:
        raise typer.Exit(1)


@app.command(epilog="Example: laco methods fastv")
def methods(
    name: Annotated[str | None, typer.Argument(help="Show this method in full; all if left out.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the compression methods, or show one in full: needs, settings, what is confirmed and what assumed."""
    from laco.describe import all_methods, describe

    if name is None:
        print_catalogue(all_methods(), as_json, ("name", "places", "needs", "trained", "static_count", "arxiv"))
        if not as_json:
            out.print("laco methods NAME shows one in full: paper, what is confirmed and assumed, needs, settings")
    elif as_json:
        print_json(describe(name))
    else:
        print_method(describe(name))


@app.command(epilog="Example: laco families --json")
def families(as_json: AsJson = False) -> None:
    """List the families of models that can be compressed."""
    from laco.families import catalogue

    print_catalogue(catalogue(), as_json, ("name", "architectures", "encoders", "holds"))


def check_model(name: str) -> None:
    """Refuses what can be no model, before the hub is asked: neither a directory nor org/name."""
    path = Path(name)
    if not path.is_dir() and (len(path.parts) != 2 or path.parent.exists()):
        raise LacoError(f"there is no model directory {name}")


def check_file(path: Path | None) -> None:
    """Refuses what can be no file to write, before there is anything to write."""
    if path is not None and path.is_dir():
        raise LacoError(f"{path} is a directory; give the name of a file")


def load(model: str) -> tuple[Any, Any]:
    """A model and its processor, without the chatter of transformers."""
    check_model(model)
    quiet()
    from laco.checkpoint import from_pretrained

    return from_pretrained(model)


def quiet() -> None:
    """Silences what transformers says about loading; its errors stay."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def parse_depth(text: str | None) -> float | None:
    """A depth from "1/4" or "0.25"."""
    try:
        return None if text is None else float(Fraction(text))
    except (ValueError, ZeroDivisionError) as error:
        raise LacoError(f"depth is a fraction such as 1/4 or 0.25; got {text!r}") from error


def make_method(name: str, settings: dict[str, Any], texts: list[str]) -> Any:
    """A method by name, with settings from KEY=VALUE texts, read as the types that its dataclass declares."""
    from pydantic import ValidationError

    from laco.methods import get
    from laco.recipes import wanted

    method = get(name)
    hints = get_type_hints(method)
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise LacoError(f"--set takes KEY=VALUE; got {text!r}")
        settings[key] = value
        if key in hints:
            try:
                settings[key] = read_setting(hints[key], value)
            except ValidationError as error:
                raise LacoError(f"{name} cannot have {key}={value}: it {wanted(error.errors())}") from error
    return method.from_fields(settings)


def read_setting(kind: Any, text: str) -> Any:
    """A value of a type from text: of several ones from "[a,b]", as YAML and JSON have it, or "a,b"."""
    import yaml
    from pydantic import TypeAdapter

    if text.startswith("[") or "," in text:
        try:
            return TypeAdapter(kind).validate_python(yaml.safe_load(text if text.startswith("[") else f"[{text}]"))
        except yaml.YAMLError as error:
            raise LacoError(f"several values are given as [a,b] or a,b; got {text!r}") from error
    return TypeAdapter(kind).validate_strings(text)


def print_json(value: Any) -> None:
    """JSON on stdout, and nothing else."""
    typer.echo(json.dumps(value, indent=2))


def print_catalogue(rows: list[dict[str, Any]], as_json: bool, columns: tuple[str, ...]) -> None:
    """A catalogue as a table, or with all its fields as JSON."""
    if as_json:
        print_json(rows)
        return
    table = Table(box=None, header_style="dim")
    for column in columns:
        table.add_column(column.replace("_", " "), no_wrap=column in ("name", "arxiv"), overflow="fold")
    for row in rows:
        table.add_row(*(cell_text(row[column]) for column in columns))
    out.print(table)


def print_method(method: dict[str, Any]) -> None:
    """One method, a line for each thing that is known of it."""
    table = Table(show_header=False, box=None)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for key in ("title", "places", "needs", "trained", "static_count", "video_only", "paper", "confirmed", "assumed"):
        value = method[key]
        if isinstance(value, dict):
            value = [f"{name}: {text}" for name, text in value.items()] or "nothing"
        table.add_row(key.replace("_", " "), Text(cell_text(value)))
    settings = [
        f"{name}: {'not given' if value is None else json.dumps(value)}" for name, value in method["settings"].items()
    ]
    table.add_row("settings", Text(cell_text(settings)))
    out.print(table)


def cell_text(value: Any) -> str:
    """A value as one writes it in a table."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "\n".join(value) if isinstance(value, list) else str(value)
