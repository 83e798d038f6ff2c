"""One file a family: how its tiny model is built, and its `CASES`."""
