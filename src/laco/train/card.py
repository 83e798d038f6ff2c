"""The model card of a trained model: what it is, how it was made, and what it can do, from the run itself."""

import json
from typing import Any

from transformers import PreTrainedModel

from laco.evaluate import Report
from laco.evaluate.report import versions
from laco.train.recipe import Recipe


def model_card(recipe: Recipe, model: PreTrainedModel, log: str, report: Report | None) -> str:
    """README.md in the layout of the Hugging Face hub; `log` holds the JSON lines of all stages."""
    base = f"base_model: {recipe.model}\n" if recipe.model else ""
    parts = [
        f"---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\n{base}tags: [laco]\n---\n",
        f"# {recipe.output.rstrip('/').rsplit('/', 1)[-1]}\n",
        recipe.description.strip() + "\n",
        f"`{type(model).__name__}`, {model.num_parameters():,} parameters. Trained by `laco train` from the recipe in"
        " `recipe.json`; every logged step is in `training_log.jsonl`.\n",
        "## Training\n",
        *stage_table(recipe, [json.loads(line) for line in log.splitlines()]),
    ]
    if recipe.compress:
        parts += ["", "Compressed by", *(f"- `{json.dumps(entry)}`" for entry in recipe.compress)]
    if report is not None:
        parts += [
            "\n## Accuracy\n",
            f"On held-out questions ({report.data}, seed {report.seed}), exact match in per cent.\n",
        ]
        parts += score_table(report)
    made_with = ", ".join(f"{name} {version}" for name, version in versions().items())
    parts += ["\n## Use\n", USE.format(path=recipe.output), f"Made with {made_with}; seed {recipe.seed}.\n"]
    return "\n".join(parts)


USE = """```python
import laco

model, processor = laco.from_pretrained("{path}")
```
"""


def stage_table(recipe: Recipe, log: list[dict[str, Any]]) -> list[str]:
    rows = ["| stage | steps | pictures | learning rates | last loss | minutes |", "|---|---|---|---|---|---|"]
    for stage in recipe.stages:
        lines = [line for line in log if line["stage"] == stage.name]
        loss = next((f"{line['loss']:.3f}" for line in reversed(lines) if "loss" in line), "")
        minutes = sum(line.get("train_runtime", 0.0) for line in lines) / 60
        rates = ", ".join(f"{group} {rate:g}" for group, rate in stage.rates.items())
        seen = f"{stage.steps * stage.batch_size:,}"
        rows.append(f"| {stage.name} | {stage.steps} | {seen} | {rates} | {loss} | {minutes:.0f} |")
    return [*rows, "", "Minutes are those since the last resumption where a run was stopped."]


def score_table(report: Report) -> list[str]:
    rows = ["| family | accuracy | 95 % interval | n |", "|---|---|---|---|"]
    for name, score in report.families.items():
        rows.append(f"| {name} | {score.accuracy:.1f} | {score.low:.1f} – {score.high:.1f} | {score.n} |")
    return [*rows, f"| **average** | **{report.average:.1f}** | | {report.samples} |"]
