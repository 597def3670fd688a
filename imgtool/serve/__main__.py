"""``python -m imgtool.serve`` serves the current folder."""

import sys

from imgtool.serve.wsgi import main

if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit("usage: python -m imgtool.serve, in a folder that imgtool export --to docker wrote")
    sys.exit(main())
