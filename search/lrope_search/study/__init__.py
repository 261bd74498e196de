"""The search itself: what is evaluated when, kept on disk so that it can be killed and resumed."""
