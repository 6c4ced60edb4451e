"""`python -m drencoder`."""

from drencoder.cli import main

main()
