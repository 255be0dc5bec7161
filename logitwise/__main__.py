"""`python -m logitwise` is the command line."""

from logitwise.cli import main

main()
