"""The `carve` command: parsing only; every command calls one function of the package."""

import sys

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train, evaluate and use CARVE language models.",
)


def main() -> None:
    """Run the command line; a user's mistake is one line on stderr and exit code 2."""
    try:
        app()
    except (ValueError, OSError, ImportError) as error:
        print(f"carve: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
