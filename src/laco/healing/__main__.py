"""The process of a job: `python -m laco.healing DIRECTORY REFERENCE`."""

import sys
from pathlib import Path

from laco.errors import LacoError
from laco.files import write_file
from laco.healing.job import do_job
from laco.healing.run import REFUSAL

directory = Path(sys.argv[1])
try:
    do_job(directory, Path(sys.argv[2]))
except LacoError as error:
    write_file(directory / REFUSAL, str(error))
    sys.exit(1)
