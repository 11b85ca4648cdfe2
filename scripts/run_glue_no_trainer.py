"""`hf-xgrad glue-loop` as a file, for `accelerate launch scripts/run_glue_no_trainer.py` and the like."""

import sys

from hf_xgrad.recipes.loop.glue import main

if __name__ == "__main__":
    sys.exit(main(prog="run_glue_no_trainer.py"))
