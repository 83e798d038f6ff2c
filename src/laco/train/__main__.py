"""`python -m laco.train RECIPE`: what `accelerate launch` starts in every process."""

import argparse

from laco.train.run import train

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--restart", action="store_true", help="ignore an unfinished run")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    given = parser.parse_args()
    train(given.recipe, resume=not given.restart, progress=not given.quiet)
