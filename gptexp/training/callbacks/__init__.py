"""What happens around a training step: recording, evaluation, checkpoints, stopping, the progress bar."""
