"""``python -m selfdistill``, which is also what ``accelerate launch -m selfdistill`` starts."""

import sys

from selfdistill.cli import main

if __name__ == "__main__":
    sys.exit(main())
