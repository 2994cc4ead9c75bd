"""python scripts/export.py checkpoint=DIR output=DIR layout=mixtral"""

from ders.cli.export import main

if __name__ == "__main__":
    main()
