"""python scripts/compress.py checkpoint=DIR output=OUT compression=quantize bits=2"""

from ders.cli.compress import main

if __name__ == "__main__":
    main()
