"""What a prediction depends on, and how much train mode and eval mode differ."""
