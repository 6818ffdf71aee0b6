"""`python -m l2o_cli` and the console script `l2o`."""

import sys


def main() -> None:
    """Run the command line; say what to install where it is missing."""
    try:
        import typer  # noqa: F401
    except ImportError:
        sys.exit("the l2o command needs more packages: in its clone, pip install '.[train,onnx]'")
    from l2o_cli.main import app

    app(prog_name="l2o")


if __name__ == "__main__":
    main()
