"""`python -m qdelta`."""

from .cli import main

main()
