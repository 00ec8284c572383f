"""Fine-tune strategies: one file each, with one function ``prepare(backbone, **options) -> None``."""
