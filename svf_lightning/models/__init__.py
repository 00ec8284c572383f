"""Few-shot segmentation methods, one a file; each reads beside its paper."""
