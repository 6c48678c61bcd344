"""The arguments of Lightning's Trainer, and the shorter names that some of them have here."""

from typing import Annotated, Literal

from gptexp.config.settings import NEUTRAL, settings


@settings
class TrainerConfig:
    """The arguments of Lightning's Trainer that have no other name here; null leaves each to Lightning.

    Not here are those that take objects, which have groups of their own (`callbacks`, `logger`), and `plugins` and
    `default_root_dir`, which belong to the run.
    """

    fast_dev_run: bool | int | None = None
    """Try a single batch, or this many, and record nothing."""
    max_epochs: int | None = None
    """Epochs of `limit_train_batches` batches."""
    min_epochs: int | None = None
    """Epochs that no callback may cut short."""
    min_steps: int | None = None
    """Steps that no callback may cut short."""
    max_time: str | None = None
    """Stop after this time, DD:HH:MM:SS."""
    limit_train_batches: int | float | None = None
    """Batches that make an epoch, with `max_epochs`."""
    limit_val_batches: int | float | None = None
    """Evaluate on this many batches, or this share of them."""
    limit_test_batches: int | float | None = None
    """Test on this many batches."""
    limit_predict_batches: int | float | None = None
    """Predict this many batches."""
    overfit_batches: int | float | None = None
    """Train on this many batches, the same ones in each epoch."""
    check_val_every_n_epoch: int | None = None
    """Epochs between evaluations."""
    num_sanity_val_steps: int | None = None
    """Batches evaluated before training, to find faults early."""
    enable_checkpointing: bool | None = None
    """Let Lightning save checkpoints of its own."""
    enable_progress_bar: Annotated[bool | None, NEUTRAL] = None
    """Show a progress bar."""
    enable_model_summary: Annotated[bool | None, NEUTRAL] = None
    """Print Lightning's table of layers."""
    gradient_clip_algorithm: Literal["norm", "value"] | None = None
    """Clip the gradient's norm, or each of its values."""
    benchmark: bool | None = None
    """Let cuDNN choose its fastest algorithms by trying them."""
    inference_mode: bool | None = None
    """Evaluate under torch.inference_mode rather than torch.no_grad."""
    use_distributed_sampler: bool | None = None
    """Let Lightning share out the batches among processes; gptexp's data does that itself."""
    profiler: Annotated[Literal["simple", "advanced", "pytorch", "xla"] | None, NEUTRAL] = None
    """Measure where the time goes, and say so at the end."""
    detect_anomaly: Annotated[bool | None, NEUTRAL] = None
    """Find the operation that makes a gradient nan; slow."""
    barebones: bool | None = None
    """Train without loggers, checkpoints and progress, to measure Lightning's own cost."""
    sync_batchnorm: bool | None = None
    """Convert torch's own batch norms to synchronized ones; gptexp's are already."""
    reload_dataloaders_every_n_epochs: int | None = None
    """Ask the data module for its batches anew after this many epochs."""
    enable_autolog_hparams: Annotated[bool | None, NEUTRAL] = None
    """Log the module's hyperparameters to the loggers."""
    model_registry: str | None = None
    """Where Lightning's model registry keeps the model."""


SHORT = {
    "max_steps": "max_steps",
    "gradient_clip_val": "grad_clip",
    "accumulate_grad_batches": "gradient_accumulation_steps",
    "val_check_interval": "eval_interval",
    "log_every_n_steps": "log_interval",
    "accelerator": "hardware.accelerator",
    "devices": "hardware.devices",
    "num_nodes": "hardware.num_nodes",
    "strategy": "hardware.strategy",
    "precision": "hardware.precision",
    "deterministic": "hardware.deterministic",
}
"""Arguments of the Trainer that have a shorter name here. Both names set the same setting, so only one may be used."""
