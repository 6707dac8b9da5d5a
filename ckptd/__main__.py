"""`python -m ckptd` is `ckptd`: the daemon under its supervisor."""

import sys

from ckptd.supervisor import main

if __name__ == "__main__":
    sys.exit(main())
