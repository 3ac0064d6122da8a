"""Get real interleaved documents: Debian documentation packages, unpacked without installing them.

python tools/fetch_corpora.py OUT [PACKAGE ...]
"""

from lcl_mcore.commands.entry import run_main
from lcl_mcore.commands.fetch_corpora import main

if __name__ == "__main__":
    run_main(main)
