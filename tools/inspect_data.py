"""Look at a prepared data set: its statistics, or one document as HTML.

python tools/inspect_data.py DATA --tokenizer tokenizer.json
python tools/inspect_data.py DATA --tokenizer tokenizer.json --document 7 --html page.html
"""

from lcl_mcore.commands.entry import run_main
from lcl_mcore.commands.inspect import main

if __name__ == "__main__":
    run_main(main)
