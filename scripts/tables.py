"""python scripts/tables.py"""

from ders.cli.tables import main

if __name__ == "__main__":
    main()
