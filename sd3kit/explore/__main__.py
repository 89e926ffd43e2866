import sys

from .quick import main

if __name__ == "__main__":
    sys.exit(main())
