"""``msformer doctor``: what is installed and used here, whether it computes the right thing, and what to do better."""
