"""``python -m mergemill`` is the command `mergemill`."""

from mergemill.cli.main import main

if __name__ == "__main__":
    main()
