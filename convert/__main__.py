"""`python -m convert SRC DST` is `flax-vlm convert SRC DST`."""

import sys

from flax_vlm.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
