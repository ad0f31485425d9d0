"""``python -m msformer`` is the command ``msformer``."""

from msformer.cli import main

if __name__ == "__main__":
    main(prog_name="msformer")
