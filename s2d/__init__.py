"""S2D: Selective Spectral Decay for quantization-friendly activations (arXiv 2602.14432)."""

from s2d.bound import BoundCheck, SpectralNormBounds, check_bound, spectral_norm_bounds
from s2d.cap import SpectralNormCap, cap_spectral_norm_
from s2d.layers import LinearMap, linear_maps
from s2d.outliers import (
    ActivationStatistics,
    ActivationSummary,
    OutlierRows,
    excess_kurtosis,
    neuron_kurtosis,
    watch_activations,
)
from s2d.pcdr import activation_pcdr, layer_pcdr, outlier_rank, spectral_pcdr
from s2d.regularizer import SelectiveSpectralDecay, add_spectral_penalty_, penalty_cosine, spectral_penalty
from s2d.spectral import (
    SingularTriplets,
    SolvedTriplets,
    as_matrix,
    solve_top_triplets,
    top_singular_triplets,
)

__version__ = "0.1.0"

__all__ = [
    "ActivationStatistics",
    "ActivationSummary",
    "BoundCheck",
    "LinearMap",
    "OutlierRows",
    "SelectiveSpectralDecay",
    "SingularTriplets",
    "SolvedTriplets",
    "SpectralNormBounds",
    "SpectralNormCap",
    "activation_pcdr",
    "add_spectral_penalty_",
    "as_matrix",
    "cap_spectral_norm_",
    "check_bound",
    "excess_kurtosis",
    "layer_pcdr",
    "linear_maps",
    "neuron_kurtosis",
    "outlier_rank",
    "penalty_cosine",
    "spectral_norm_bounds",
    "spectral_pcdr",
    "solve_top_triplets",
    "spectral_penalty",
    "top_singular_triplets",
    "watch_activations",
]
