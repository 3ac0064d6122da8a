"""`python -m lcl_mcore` is the command `lcl`."""

from lcl_mcore.commands.dispatch import run

if __name__ == "__main__":
    run()
