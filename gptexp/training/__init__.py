"""Training: a LightningModule around a model, its optimizer, schedule and callbacks."""
