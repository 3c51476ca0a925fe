"""`python -m cogumi` is the `cogumi` command."""

from cogumi.cli.main import main

main()
