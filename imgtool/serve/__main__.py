"""``python -m imgtool.serve`` serves the current folder."""

import sys

from imgtool.serve.wsgi import main

if __name__ == "__main__":
    sys.exit(main())
