"""python scripts/data.py action=check data=digits_vqa"""

from ders.cli.data import main

if __name__ == "__main__":
    main()
