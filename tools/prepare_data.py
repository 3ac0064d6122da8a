"""Turn a public data format into the native one, or split a prepared set into train and heldout.

    python tools/prepare_data.py {mmc4,obelics,omnicorpus,pairs,html} INPUT OUTPUT
    python tools/prepare_data.py split PREPARED OUTPUT --heldout-share 0.1

May be killed at any moment and started again; a second run changes nothing.
"""

from lcl_mcore.commands.entry import run_main
from lcl_mcore.commands.prepare import main

if __name__ == "__main__":
    run_main(main)
