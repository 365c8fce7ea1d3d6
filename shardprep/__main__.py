"""`python -m shardprep`, the same as the command `shardprep`."""

from shardprep.cli import main

if __name__ == "__main__":
    main()
