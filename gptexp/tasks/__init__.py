"""What a model learns to predict, and how well it does."""
