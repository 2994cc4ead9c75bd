"""ders models in the field's own evaluation harnesses, and our data as tasks of theirs.

Each harness lives in an environment of its own (`make lm-eval`, `make lmms-eval`) and is imported in one file only.
"""
