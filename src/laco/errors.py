"""The one exception that tells a user what is wrong and what would be right."""


class LacoError(ValueError):
    """A mistake in what the user asked for: one clear sentence, shown without traceback by the CLI (exit code 2)."""
