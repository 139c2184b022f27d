"""`python -m sweep` is the command `faultsweep`."""

from sweep.cli import main

if __name__ == "__main__":
    main()
