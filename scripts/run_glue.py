"""`hf-xgrad glue` as a file, for `accelerate launch scripts/run_glue.py` and the like."""

import sys

from hf_xgrad.recipes.classification.glue import main

if __name__ == "__main__":
    sys.exit(main(prog="run_glue.py"))
