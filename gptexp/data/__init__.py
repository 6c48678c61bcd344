"""Text on its way to the model: corpus -> tokenizer -> ids on disk -> the batch of a step.

Nothing is imported here, because only `gptexp.data.datamodule` needs torch.
"""
