"""python scripts/eval.py checkpoint=DIR"""

from ders.cli.eval import main

if __name__ == "__main__":
    main()
