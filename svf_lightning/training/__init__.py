"""Train and test a method: LightningModules, optimizers, losses, metrics, callbacks."""
