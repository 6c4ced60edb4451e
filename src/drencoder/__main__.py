"""`python -m drencoder`."""

from drencoder.cli.main import main

main()
