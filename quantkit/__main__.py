"""`python -m quantkit`: the command line."""

from quantkit.cli.app import main

if __name__ == "__main__":
    main()
