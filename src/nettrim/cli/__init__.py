"""The command line: parses arguments, calls the library, shows the result. Exit codes: 0 done, 2 bad input, 3 guarantee not met."""

from .app import app, main

__all__ = ["app", "main"]
