"""Visual-token compression inside the vision encoder of Hugging Face vision-language models.

    import laco

    model, processor = laco.compress(model, processor, laco.LaCo(depth=1 / 4, factor=2))

Importing the package makes the Auto classes of transformers know compressed models. `laco.methods()` and
`laco.families()` list what there is, `laco.evaluate(model, processor)` measures what it costs in accuracy.
"""

from types import ModuleType

from laco import evaluate, families, methods
from laco._version import __version__ as __version__
from laco.checkpoint import from_pretrained, load_compressor, save_compressor, save_pretrained
from laco.errors import LacoError
from laco.methods import *  # noqa: F403
from laco.surgery import compress, decompress

__all__ = [
    "LacoError",
    "compress",
    "decompress",
    "evaluate",
    "families",
    "from_pretrained",
    "load_compressor",
    "methods",
    "save_compressor",
    "save_pretrained",
    *methods.__all__,
]

# Packages that are functions too: laco.methods holds the methods and laco.methods() lists them.
for _package, _function in (
    (evaluate, evaluate.evaluate),
    (families, families.catalogue),
    (methods, methods.catalogue),
):
    _package.__class__ = type("CallablePackage", (ModuleType,), {"__call__": staticmethod(_function)})
