"""What several tests share; the proofs and benchmarks may import it too."""
