"""CPU kernels in C++, compiled on first use; torch is their fallback and oracle."""
