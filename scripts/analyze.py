"""python scripts/analyze.py checkpoint=DIR"""

from ders.cli.analyze import main

if __name__ == "__main__":
    main()
