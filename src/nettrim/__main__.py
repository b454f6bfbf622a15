"""``python -m nettrim``: the command line."""

from .cli import main

main()
