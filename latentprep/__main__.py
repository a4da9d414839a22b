"""`python -m latentprep`: the same as `latentprep`."""

from latentprep.cli import main

main()
