"""Few-shot segmentation with singular value fine-tuning."""

__version__ = "0.1.0"
