"""`python -m branchcore`."""

from branchcore.cli import main

if __name__ == "__main__":
    main()
