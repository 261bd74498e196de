"""What several tests share. Proofs and benchmarks import it too; nothing under tests/ imports them."""
