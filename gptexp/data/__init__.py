"""Text on its way to the model: corpus -> tokenizer -> ids on disk -> the batch of a step.

Nothing is imported here: everything but `gptexp.data.datamodule` does without torch.
"""
