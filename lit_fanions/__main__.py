"""`python -m lit_fanions`: the command line of `lit_fanions.cli`."""

from lit_fanions.cli.app import main

if __name__ == "__main__":
    raise SystemExit(main())
