"""Fine-tune strategies: one file each, with one function ``prepare(backbone, **options) -> None``.

The layer under most of them stands alone, needs torch only, and works on any network.
"""

from svf_lightning.finetune.svf import (
    SVFLayer,
    apply_svf,
    load_svf_state_dict,
    merge_svf,
    svf_state_dict,
)

__all__ = ["SVFLayer", "apply_svf", "load_svf_state_dict", "merge_svf", "svf_state_dict"]
