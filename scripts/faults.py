"""python scripts/faults.py kills=36"""

from ders.cli.faults import main

if __name__ == "__main__":
    main()
