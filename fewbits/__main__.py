"""`python -m fewbits` is the command line."""

from fewbits.cli.main import app

if __name__ == "__main__":
    app(prog_name="fewbits")
