"""The process of a job: `python -m laco.healing DIRECTORY REFERENCE`."""

import sys
from pathlib import Path

from laco.errors import LacoError
from laco.healing.job import do_job
from laco.healing.run import REFUSED

try:
    do_job(Path(sys.argv[1]), Path(sys.argv[2]))
except LacoError as error:
    print(error, file=sys.stderr)
    sys.exit(REFUSED)
