"""python scripts/benchmark.py suite=compress"""

from ders.cli.benchmark import main

if __name__ == "__main__":
    main()
