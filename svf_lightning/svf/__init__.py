"""Singular value fine-tuning: factor the pretrained layers, train their singular values, freeze the rest.

A kernel, read as a matrix with one row per output channel, is ``W = U diag(s) V^T``. Only ``s`` trains. This
room needs torch only and works on any network::

    network.requires_grad_(False)
    apply_svf(network, ["layer3", "layer4"])             # the new parameters, called s, are all that trains
    torch.save(svf_state_dict(network), "small.pt")      # kilobytes
    load_svf_state_dict(network, torch.load("small.pt"))
    merge_svf(network)                                   # the plain layers again

With ``rank=k`` only the k largest values train, which are those that move in the paper's Fig. 6. The kernel
is then ``rest + U_k diag(s) V_k^T``, still exact, and training costs little more than a frozen one.

Source:
    Sun et al., Singular Value Fine-tuning: Few-shot Segmentation requires Few-parameters Fine-tuning,
    NeurIPS 2022, arXiv:2206.06122. The authors' code (github.com/syp2ysy/SVF) was studied for its
    behaviour, none of it is used. Where we knowingly differ:

    - Full rank means full rank; theirs rounds the rank down to a multiple of four (27 becomes 24 in the
      stem, which changes what the stem computes).
    - One decomposition per group of a grouped or depthwise convolution; theirs mixes rows of different
      groups, or skips the layer. Linear layers get their factors; theirs keep random ones.
    - ``padding_mode``, dtype and device are kept, and every reconstruction is checked.
    - Theirs always computes two convolutions and a scale. Here training does so too, with a backward pass
      that keeps one feature map per layer, and evaluation is one plain convolution.
"""

from svf_lightning.svf.layer import SVFLayer, from_factors
from svf_lightning.svf.network import (
    apply_svf,
    load_svf_state_dict,
    merge_svf,
    singular_values,
    svf_state_dict,
)

__all__ = [
    "SVFLayer",
    "apply_svf",
    "from_factors",
    "load_svf_state_dict",
    "merge_svf",
    "singular_values",
    "svf_state_dict",
]
