"""`python -m unlabeled`, as torchrun starts it."""

from unlabeled.cli import main

main()
