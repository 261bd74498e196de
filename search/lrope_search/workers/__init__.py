"""Who evaluates: this process, others of this machine, a Ray cluster. They know nothing of models."""
