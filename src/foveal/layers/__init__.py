"""The distinctive layers of whole-network papers, as nn.Modules."""

from foveal.layers.atoms import NeighbourAttention
from foveal.layers.cross_axis import CrossAxisAttention
from foveal.layers.factorised_axes import FactorisedAxesAttention
from foveal.layers.groups import BoxAttention, HierarchicalAttention, ScaleAttention
from foveal.layers.heads import MultiHead
from foveal.layers.neighborhood import MedViTAttention, NeighborhoodAttention
from foveal.layers.recurrent import (
    BasedAttention,
    GatedDeltaNet,
    KimiDeltaAttention,
    LayerState,
    LightningAttention,
    MLSTMLayer,
    ShortConvolution,
)
from foveal.layers.sequence import ChunkedEncoder, SparseTransformerAttention
from foveal.layers.sphere import SphereAttention
from foveal.layers.windows import AxialAttention, DilatedWindowAttention, SwinWindowAttention

__all__ = [
    "AxialAttention",
    "BasedAttention",
    "BoxAttention",
    "ChunkedEncoder",
    "CrossAxisAttention",
    "DilatedWindowAttention",
    "FactorisedAxesAttention",
    "GatedDeltaNet",
    "HierarchicalAttention",
    "KimiDeltaAttention",
    "LayerState",
    "LightningAttention",
    "MLSTMLayer",
    "MedViTAttention",
    "MultiHead",
    "NeighborhoodAttention",
    "NeighbourAttention",
    "ScaleAttention",
    "ShortConvolution",
    "SparseTransformerAttention",
    "SphereAttention",
    "SwinWindowAttention",
]
