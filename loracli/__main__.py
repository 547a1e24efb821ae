"""`python -m loracli`, the same as the command `loracat`."""

from loracli.cli import main

if __name__ == "__main__":
    main()
