"""Writes docs/families.md from the matrix, so that it claims only what the tests test: `make families-table`.

The properties are the test functions marked with `holds`, the rows `tiny.CASES`, the texts those of the families.
"""

import sys
from collections.abc import Iterable
from importlib import import_module
from inspect import cleandoc
from itertools import groupby
from pathlib import Path
from typing import Any

import tiny
from families.matrix import PROPERTIES, Property
from laco.families import FAMILIES, Family, family_of_config
from laco.families.encoders import ENCODERS
from laco.methods import FastV, Method, ToMe, UniformStride
from tiny.case import Case

PAGE = Path(__file__).parents[2] / "docs" / "families.md"

HEAD = """# Families and encoders

Every cell is a test on a tiny random model, with a merger inside the vision encoder and with an external one (methods
that leave no grid have tests of their own); so it says that the model computes correctly, nothing about the quality of
answers or about speed. This page is made from the tests by `make families-table`, and a test holds it to them.

- **yes**: it holds.
- **no**: the stock model cannot do it either, for the reason below the table; a test checks that it cannot.
- **-**: the family has no such thing.
"""

KINDS: dict[str, Method] = {
    "layer by layer inside the encoder": ToMe(r=1),
    "behind the encoder": UniformStride(),
    "inside the language model": FastV(depth=0.7),
}


def page() -> str:
    for path in sorted(Path(__file__).parent.glob("test_matrix*.py")):
        import_module(f"families.{path.stem}")  # registers its properties
    properties = sorted(PROPERTIES.values(), key=lambda each: each.order)
    themes = groupby(properties, key=lambda each: each.theme)
    return "\n".join(
        [
            HEAD,
            *(table(theme, list(properties)) for theme, properties in themes),
            methods(),
            *(section(family) for family in sorted(FAMILIES, key=lambda family: family.name)),
            encoders(),
        ]
    )


def table(theme: str, properties: list[Property]) -> str:
    def cell(case: Case, each: Property) -> str | None:
        return case.cannot.get(each.name) if each.applies(case) else ""

    rows = {case.name: [cell(case, each) for each in properties] for _, case in sorted(tiny.CASES.items())}
    return "\n".join([f"## {theme}", "", *with_reasons([each.title for each in properties], rows)])


def methods() -> str:
    """Which kinds of methods that leave no grid stand where; one of each kind is asked for all."""
    rows = {}
    for _, case in sorted(tiny.CASES.items()):
        config = case.build()[0].config
        rows[case.name] = [family_of_config(config).why_not(config, method) for method in KINDS.values()]
    text = (
        "Mergers of windows stand in all. Methods that drop or merge single tokens stand here, by where they work; no"
        " means that `compress` refuses them, for the reason below."
    )
    return "\n".join(["## Methods", "", text, "", *with_reasons(list(KINDS), rows)])


def with_reasons(head: list[str], rows: dict[str, list[str | None]]) -> list[str]:
    """A table of what holds (None), what does not (the reason, numbered below), and what there is not (empty)."""
    reasons: dict[str, int] = {}  # numbered by their order

    def cell(reason: str | None) -> str:
        if not reason:
            return "yes" if reason is None else "-"
        return f"no ({reasons.setdefault(reason, len(reasons) + 1)})"

    lines = [*markdown(["", *head], [[name, *map(cell, cells)] for name, cells in rows.items()]), ""]
    return lines + [f"{number}. {reason}" for reason, number in reasons.items()] + [""] * bool(reasons)


def markdown(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def section(family: Family) -> str:
    if family.connects:
        external = "in the place of the projector if its paper has it there, else before the projector"
    elif family.encoder_at:
        external = "after the encoder's last layer, before the family's own connector, which stays"
    else:
        external = "after the last layer"
    facts = {
        "classes": ", ".join(f"`{kind.__name__}`" for kind in (*family.stock_classes, *family.compressed_classes)),
        "encoders": ", ".join(encoder.name for encoder in family.encoders),
        "holds": family.holds,
        "external mergers": external,
    }
    listed = [f"- {name}: {fact}" for name, fact in facts.items()]
    return "\n".join([f"## {family.name}", "", described(type(family)), "", *listed, ""])


def encoders() -> str:
    rows = [[encoder.name, " ".join(described(encoder.compressed).split())] for encoder in ENCODERS]
    return "\n".join(["## Encoders", "", *markdown(["", ""], sorted(rows)), ""])


def described(kind: type[Any]) -> str:
    """What the file of a class says of it."""
    return cleandoc(sys.modules[kind.__module__].__doc__ or "")


if __name__ == "__main__":
    PAGE.write_text(page())
