"""`python -m genrec.cli`: the console script by another name."""

from genrec.cli import main

if __name__ == "__main__":
    main()
