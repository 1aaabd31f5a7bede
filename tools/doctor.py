"""`megavlm doctor` from a checkout: python tools/doctor.py [--json]"""

import sys

from megavlm.cli.main import main

if __name__ == "__main__":
    main(["doctor", *sys.argv[1:]])
