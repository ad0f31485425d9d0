"""The command ``msformer``, which is also ``python -m msformer``."""

import sys

from msformer.extras import missing_package


def main() -> None:
    """Runs the command line; where an extra is not installed, a line says which, and the exit code is 1."""
    try:
        from msformer.cli import main as command

        command(prog_name="msformer")
    except ModuleNotFoundError as error:
        sentence = missing_package(error)
        if sentence is None:
            raise
        sys.exit(f"error: {sentence}")


if __name__ == "__main__":
    main()
