"""`python -m legolm.cli`."""

from legolm.cli.main import main

main()
