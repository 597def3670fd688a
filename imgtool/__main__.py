"""``python -m imgtool`` is the ``imgtool`` command."""

from imgtool.cli import main

if __name__ == "__main__":
    main()
