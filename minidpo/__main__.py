"""The program `minidpo`, also as `python -m minidpo`."""

import sys


def main() -> int:
    """Run the command line; Ctrl-C while its modules are imported ends it without a traceback, too."""
    try:
        from .cli import main
    except KeyboardInterrupt:
        return 130
    return main()


if __name__ == "__main__":
    sys.exit(main())
