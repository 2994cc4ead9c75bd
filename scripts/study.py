"""python scripts/study.py"""

from ders.cli.study import main

if __name__ == "__main__":
    main()
