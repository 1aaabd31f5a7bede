"""`megavlm train` for a launcher that wants a script: torchrun --nproc-per-node 8 tools/train.py RECIPE.yaml [key=value ...]"""

import sys

from megavlm.cli.main import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
