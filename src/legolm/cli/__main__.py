"""`python -m legolm.cli`."""

from legolm.cli import main

main()
