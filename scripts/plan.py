"""python scripts/plan.py model=moe_llava_phi method=ders_sm sparsity=0.9999"""

from ders.cli.plan import main

if __name__ == "__main__":
    main()
