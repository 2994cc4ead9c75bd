"""python train.py method=ders_sm sparsity=0.9999"""

from ders.cli.train import main

if __name__ == "__main__":
    main()
