"""`python -m latentprep`: the same as `latentprep`."""

from latentprep.cli.commands import main

if __name__ == "__main__":  # the processes of several devices import it too
    main()
