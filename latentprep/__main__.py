"""`python -m latentprep`: the same as `latentprep`."""

from latentprep.cli.commands import main

main()
