"""`python -m laco`: the command line."""

from laco.cli import main

if __name__ == "__main__":
    main()
