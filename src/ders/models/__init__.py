"""Models of transformers: building, loading, saving (floor 3; knows nothing of data)."""
