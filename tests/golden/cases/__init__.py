"""Which of our functions answers a numeric case: the tables `CASES` of the files here, from an index's method name.

A function gets a `Case` and gives its outputs by the names of the index. It builds the very module that users
get, loads the case's weights by meaning, and takes every size from the arrays and hyper-parameters.
"""

from collections.abc import Callable
from importlib import import_module
from pkgutil import iter_modules

from cases.case import Case, Outputs

CASES: dict[str, Callable[[Case], Outputs]] = {}
for _module in iter_modules(__path__):
    CASES |= getattr(import_module(f"{__name__}.{_module.name}"), "CASES", {})
