"""The configuration: its schema, what Hydra composes it from, and the messages for mistakes in it."""
