"""The distinctive layers of whole-network papers, as nn.Modules."""

from foveal.layers.cross_axis import CrossAxisAttention
from foveal.layers.factorised_axes import FactorisedAxesAttention
from foveal.layers.heads import MultiHead
from foveal.layers.neighborhood import MedViTAttention, NeighborhoodAttention
from foveal.layers.sequence import ChunkedEncoder, SparseTransformerAttention
from foveal.layers.sphere import SphereAttention
from foveal.layers.windows import AxialAttention, DilatedWindowAttention, SwinWindowAttention

__all__ = [
    "AxialAttention",
    "ChunkedEncoder",
    "CrossAxisAttention",
    "DilatedWindowAttention",
    "FactorisedAxesAttention",
    "MedViTAttention",
    "MultiHead",
    "NeighborhoodAttention",
    "SparseTransformerAttention",
    "SphereAttention",
    "SwinWindowAttention",
]
